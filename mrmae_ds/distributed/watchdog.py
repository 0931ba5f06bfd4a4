"""Watchdog: abort the job with an explanation when a rank fails, dies or hangs.

A rank that fails leaves the others waiting in a collective operation, for half an hour or for good. So each rank has
threads that check, twice a second,

* the process group's store: if another rank has reported a failure, this rank exits,
* the other ranks of this node: if one has died without a report (killed, out of memory), this rank reports it,
* the launcher: if it has ended, this rank takes it for a stop signal, upon which all ranks save and stop,
* this rank's progress: if there was none within the timeout, all ranks dump their stacks, and the job fails.

The first failure is printed last: the rank that failed first waits until the others have stopped printing.
docs/checkpoints.md lists the failures that nothing else notices.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from mrmae_ds.distributed.failure_store import Failure, FailureStore
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.local_ranks import LocalRanks
from mrmae_ds.errors import RaisedOnAllRanks

FAILED_STATUS = 1
POLL_S = 0.5
RECORD_S = 2.0  # for rank 0 to close its record
NEWS_S = 2.0  # an error that another rank's death may have caused waits this long for a report of that


class Watchdog:
    """Watches this rank and the others while it is entered, which all ranks must do together.

    Args:
        launch: this rank.
        timeout_s: without :meth:`heartbeat`, after which the rank counts as hung.

    Attributes:
        on_failure: called when the job fails, whichever rank failed; rank 0 closes its record.
    """

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        self.launch, self.timeout_s = launch, timeout_s
        self.on_failure: Callable[[], None] = lambda: None
        self._last, self._activity = time.monotonic(), "starting"
        self._closed = threading.Event()
        self._exiting = threading.Lock()
        self._orphaned = False

    def __enter__(self) -> Watchdog:
        self._local = LocalRanks(self.launch, self.timeout_s)
        self._store = FailureStore(self.launch)
        self.heartbeat("starting")
        # Two threads: a request to the store may take long when it has just been lost.
        checks = (self._check_node, self._check_store)
        self._threads = [threading.Thread(target=self._watch, args=(check,), daemon=True) for check in checks]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, RaisedOnAllRanks):
            self._fail(error)
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._local.close()

    def heartbeat(self, activity: str) -> None:
        """Report progress.

        Args:
            activity: for the message if it is the last one.
        """
        self._last, self._activity = time.monotonic(), activity
        self._local.postpone_last_resort(self._last)

    # ---- this rank's own failure, in the main thread

    def _fail(self, error: BaseException) -> None:
        """Report an exception. Return when the others are quiet if it is the job's first failure; else exit."""
        if isinstance(error, RuntimeError) and self.launch.world_size > 1:
            time.sleep(NEWS_S)  # a broken connection: a thread reads the cause, and ends this process
            for check in (self._check_node, self._check_store):
                self._act_on(check)  # the threads of a loaded machine may not have run
        with self._exiting:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if not self._store.report(Failure(self.launch.rank, text)):
                self._exit_quietly()
            self._close_record()
            self._store.wait_until_quiet()
            self._closed.set()

    # ---- the threads

    def _watch(self, check: Callable[[], Callable[[], None] | None]) -> None:
        """Check twice a second; the first finding ends the process."""
        while not self._closed.wait(POLL_S):
            self._act_on(check)

    def _act_on(self, check: Callable[[], Callable[[], None] | None]) -> None:
        end = check()
        with self._exiting:
            if end is not None and not self._closed.is_set():
                end()

    def _check_node(self) -> Callable[[], None] | None:
        """Check the launcher, the other ranks of this node, and this rank's progress."""
        self._check_launcher()
        if dead := self._local.dead():
            self._store.note_death(dead.rank)
            text = f"rank {dead.rank} (process {dead.pid}) died without reporting an error: killed, or out of memory"
            return partial(self._lead, Failure(dead.rank, text), dead=1)
        idle = time.monotonic() - self._last
        if idle > self.timeout_s:
            text = f"rank {self.launch.rank} made no progress for {idle:.0f} s, at: {self._activity}"
            return partial(self._lead, Failure(self.launch.rank, text, hung=True))
        return None

    def _check_launcher(self) -> None:
        """Stop as after SIGTERM if the launcher has ended: nobody else would end these ranks."""
        ended = next((process for process in self.launch.launcher if process.ended()), None)
        if ended is not None and not self._orphaned:
            self._orphaned = True
            self._print(f"warning: the launcher (process {ended.pid}) has ended without ending its ranks")
            os.kill(os.getpid(), signal.SIGTERM)

    def _check_store(self) -> Callable[[], None] | None:
        """Check the reports of other ranks."""
        if failure := self._store.read():
            return partial(self._follow, failure)
        if self._store.lost:
            time.sleep(2 * POLL_S)  # if its process was on this node, the other thread has found its death by now
            if self._orphaned:  # torchrun's store ends with it; the ranks save without
                return None
            text = "the process that holds the job's store, rank 0 or its launcher, has ended"
            return partial(self._lead, Failure(0, text))
        return None

    def _lead(self, failure: Failure, dead: int = 0) -> None:
        """Report what this thread has found, unless another rank was first; print it last; exit."""
        if not self._store.report(failure):
            self._follow(self._store.read() or failure)
        if failure.hung:
            self._local.dump_stacks()
        self._close_record()
        self._store.wait_until_quiet(dead)
        self._print(f"error: {failure.text}")
        os._exit(FAILED_STATUS)

    def _follow(self, failure: Failure) -> None:
        """Exit because another rank has failed."""
        if failure.hung:
            self._local.dump_stacks()
        self._print(f"warning: exiting because rank {failure.rank} failed")
        self._exit_quietly()

    def _exit_quietly(self) -> None:
        """Stop printing, leave the first to fail time to print, and exit."""
        self._close_record()
        self._store.keep_quiet()
        os._exit(FAILED_STATUS)

    def _close_record(self) -> None:
        """Close the record, within a limit: the file system may be what all ranks are waiting for."""
        closing = threading.Thread(target=self._try_to_close, daemon=True)
        closing.start()
        closing.join(RECORD_S)

    def _try_to_close(self) -> None:
        try:
            self.on_failure()
        except Exception as error:
            self._print(f"warning: {type(error).__name__}: {error}")

    def _print(self, text: str) -> None:
        """Print to stderr. Not by logging: the main thread may hang while it holds the lock of a log handler."""
        prefix = f"[rank {self.launch.rank}] " if self.launch.rank else ""
        with contextlib.suppress(OSError):  # the terminal, or the launcher that read a pipe, may be gone
            print(f"{prefix}{text}", file=sys.stderr, flush=True)
