"""Seeing that a job whose processes cannot go on ends, soon, and says why.

A process that fails leaves the others waiting in a collective operation, for half an hour or for good. So each process
has a thread that looks, twice a second,

* whether another one has told of a failure, through the process group's store: then this one ends,
* whether one on this node has ended without a word (killed, out of memory): then it tells of that,
* whether this process has got on within the limit: if not, all processes write down where they are, and the job fails.

The first failure is printed last: who failed first waits until the others have gone silent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from mrmae_ds.distributed.failure_store import Failure, FailureStore
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.stack_dump import StackDump
from mrmae_ds.errors import RaisedOnAllRanks

FAILED_STATUS = 1
POLL_S = 0.5
RECORD_S = 2.0  # for rank 0 to close its record
NEWS_S = 2.0  # that an error which another process's end may have caused waits for news of that


class Watchdog:
    """Watches this process and its fellows while it is entered, which all ranks must do together.

    Args:
        launch: this process.
        limit_s: without :meth:`beat`, after which the process counts as stuck.

    Attributes:
        on_failure: called when the job fails, whoever failed; rank 0 closes its record.
    """

    def __init__(self, launch: Launch, limit_s: float) -> None:
        self.launch, self.limit_s = launch, limit_s
        self.on_failure: Callable[[], None] = lambda: None
        self._last, self._doing = time.monotonic(), "starting"
        self._closed = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> Watchdog:
        self._stacks = StackDump(self.launch, self.limit_s)
        self._board = FailureStore(self.launch)
        self.beat("starting")
        # Two threads: asking the store may take long where it has just gone.
        looks = (self._look_around, self._look_at_board)
        self._threads = [threading.Thread(target=self._watch, args=(look,), daemon=True) for look in looks]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, RaisedOnAllRanks):
            self._fail(error)
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._stacks.close()

    def beat(self, doing: str) -> None:
        """The process gets on; ``doing`` says what it is at now."""
        self._last, self._doing = time.monotonic(), doing
        self._stacks.postpone(self._last)

    # ---- this process's own failure, in the main thread

    def _fail(self, error: BaseException) -> None:
        """Tell the others; returns when they are silent, if this was the first failure, and else does not return."""
        if isinstance(error, RuntimeError) and self.launch.world_size > 1:
            time.sleep(NEWS_S)  # a broken connection: the thread hears of the reason, and ends this process
        with self._ending:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if not self._board.tell(Failure(self.launch.rank, text)):
                self._leave()
            self._close_record()
            self._board.wait_for_silence()
            self._closed.set()

    # ---- the threads

    def _watch(self, look: Callable[[], Callable[[], None] | None]) -> None:
        """Look twice a second; what is found ends the process, once."""
        while not self._closed.wait(POLL_S):
            end = look()
            with self._ending:
                if end is not None and not self._closed.is_set():
                    end()

    def _look_around(self) -> Callable[[], None] | None:
        """At the processes of this node, and at how long ago this one got on."""
        if dead := self._stacks.neighbors.dead():
            rank, pid = dead
            self._board.note_end(rank)
            text = f"rank {rank} (process {pid}) ended without a word: killed, or out of memory"
            return partial(self._first, Failure(rank, text), ended=1)
        idle = time.monotonic() - self._last
        if idle > self.limit_s:
            text = f"rank {self.launch.rank} got no further for {idle:.0f} s, at: {self._doing}"
            return partial(self._first, Failure(self.launch.rank, text, stuck=True))
        return None

    def _look_at_board(self) -> Callable[[], None] | None:
        """At what other processes have told."""
        if failure := self._board.read():
            return partial(self._follow, failure)
        if self._board.lost:
            time.sleep(2 * POLL_S)  # if its process is on this node, the other thread has seen its end by now
            text = "the process that holds the job's store, rank 0 or its launcher, has ended"
            return partial(self._first, Failure(0, text))
        return None

    def _first(self, failure: Failure, ended: int = 0) -> None:
        """Tell of what this thread has found, unless another one was first; print it last; end."""
        if not self._board.tell(failure):
            self._follow(self._board.read() or failure)
        if failure.stuck:
            self._stacks.dump()
        self._close_record()
        self._board.wait_for_silence(ended)
        print(f"error: {failure.text}", file=sys.stderr, flush=True)
        os._exit(FAILED_STATUS)

    def _follow(self, failure: Failure) -> None:
        """End because another process has failed."""
        if failure.stuck:
            self._stacks.dump()
        print(f"rank {self.launch.rank}: ending, because rank {failure.rank} failed", file=sys.stderr, flush=True)
        self._leave()

    def _leave(self) -> None:
        """Fall silent, let the first one speak, and end."""
        self._close_record()
        self._board.fall_silent()
        os._exit(FAILED_STATUS)

    def _close_record(self) -> None:
        """Not waited for beyond a limit: the file system may be what all are waiting for."""
        closing = threading.Thread(target=self._try_to_close, daemon=True)
        closing.start()
        closing.join(RECORD_S)

    def _try_to_close(self) -> None:
        try:
            self.on_failure()
        except Exception as error:
            print(f"rank {self.launch.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
