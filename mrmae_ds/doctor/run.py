"""Run of the checks: order, limits, verdicts, exit status."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from mrmae_ds.config.engine import default_recipe, load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import choose_device, end_process_group
from mrmae_ds.doctor.checks import CHECKS, START
from mrmae_ds.doctor.context import Check, DoctorContext, DoctorRequest
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import HardFailure, NotApplicable
from mrmae_ds.doctor.report import CheckResult, DoctorReport, summarize
from mrmae_ds.doctor.tiny_job import make_job_folder, remove_files
from mrmae_ds.errors import UserError
from mrmae_ds.profiling.gpus import match_device

logger = logging.getLogger(__name__)

FAILED_STATUS = 1
GATHER_S = 60.0
SOFT_S = 5.0  # for the end of a check that was interrupted
LINGER_S = 5.0  # a launcher ends all ranks when one exits: rank 0, which writes the report, exits first


def run_doctor(request: DoctorRequest, launch: Launch) -> int:
    """Run the selected checks on this rank; rank 0 prints and writes the report.

    Returns:
        The exit status: 0, or 1 after an error, a hard failure or a check over its limit.

    Raises:
        UserError: for a name that is not a check, a wrong recipe or engine config, more ranks than GPUs on a node, or a
            report that cannot be written.
    """
    checks = select_checks(request)
    _check_configs(request)
    device = choose_device(launch)
    gpu = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        gpu = match_device(properties.name, properties.total_memory)
    ranks = RankStore(launch)
    context = DoctorContext(request, launch, device, gpu, ranks, make_job_folder(request.out, ranks))
    report = DoctorReport(context, [check.name for check in checks])
    try:
        return _run_checks(context, checks, report)
    except KeyboardInterrupt:
        report.finish()
        raise
    finally:
        remove_files(context)


def select_checks(request: DoctorRequest) -> list[Check]:
    """Return the checks to run.

    Raises:
        UserError: for a name that is not a check, or if none is left.
    """
    names = [check.name for check in CHECKS]
    for option, given in {"--only": request.only, "--skip": request.skip}.items():
        if unknown := [name for name in given if name not in names]:
            raise UserError(f"{option} {unknown[0]}: no such check; there are {', '.join(names)}")
    quick = {check.name for check in CHECKS if check.quick or not request.quick}
    wanted = (set(request.only) or quick) - set(request.skip)
    grouped = {check.name for check in CHECKS[CHECKS.index(START) + 1 :]}
    if not wanted:
        raise UserError(f"--skip {request.skip[0]}: no check is left to run")
    return [check for check in CHECKS if check.name in wanted or (check is START and wanted & grouped)]


def _check_configs(request: DoctorRequest) -> None:
    """Load the engine config and the recipe, whichever checks will read them."""
    if request.ds_config is None:
        if request.recipe is not None:
            raise UserError(f"--recipe {request.recipe}: is used with an engine config; name one with --ds_config")
        return
    path = request.recipe or default_recipe(request.ds_config)
    load_engine_config(request.ds_config)
    load_recipe(path).stage("pretrain")


def _run_checks(context: DoctorContext, checks: Sequence[Check], report: DoctorReport) -> int:
    for check in checks:
        with _limit(context, check, report):
            result = _run_check(context, check)
        report.add(result)
        if result.status == "stop":
            report.finish()
            _linger(context)
            return FAILED_STATUS
    report.finish()
    end_process_group()
    return FAILED_STATUS if report.failed() else 0


def _run_check(context: DoctorContext, check: Check) -> CheckResult:
    """Run a check on this rank, and combine the results of all ranks."""
    status, message, readings = "done", "", []
    context.begin(check.seconds)
    began = time.monotonic()
    try:
        with _soft_limit(context, check):
            readings = check.run(context)
    except NotApplicable as reason:
        status, message = "not applicable", str(reason)
    except HardFailure as failure:
        status, message = "stop", str(failure)
    except _OverLimitError:
        status, message = "failed", f"over its limit of {check.seconds:g} s"
    except Exception as error:  # a defect of the node must not hide the results of the other checks
        status, message = "failed", f"{type(error).__name__}: {error}"
        logger.error("%s", check.name, exc_info=error)
    context.found[check.name] = readings
    seconds = time.monotonic() - began
    own = {"status": status, "message": message, "readings": [asdict(reading) for reading in readings]}
    return summarize(check, context.ranks.gather(own, GATHER_S), seconds, context.request.judge)


class _OverLimitError(BaseException):
    """A check took longer than its limit; no check handles it as an error of its own."""


@contextmanager
def _soft_limit(context: DoctorContext, check: Check) -> Iterator[None]:
    """Interrupt a check over its limit where no other rank and no device waits for this one: the others can run."""
    if context.on_cuda or context.launch.world_size > 1:
        yield
        return

    def end(*_: object) -> None:
        raise _OverLimitError

    handler, timer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, check.seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _limit(context: DoctorContext, check: Check, report: DoctorReport) -> Iterator[None]:
    """Dump all stacks and end this process, with the report so far, if a check takes longer than its limit.

    A thread that waits inside a collective or a kernel cannot be interrupted, and what it holds cannot be used again.
    """

    def end() -> None:
        faulthandler.dump_traceback(all_threads=True)
        text = f"over its limit of {check.seconds:g} s on rank {context.launch.rank}; stacks are above. Continue with "
        report.add(CheckResult(check.name, "stop", text + f"--skip '{check.name}'", check.seconds, check.decides, []))
        try:
            report.finish()
        except UserError as error:
            logger.error("%s", error)
        _linger(context)
        remove_files(context)
        sys.stdout.flush()
        os._exit(FAILED_STATUS)

    grace = GATHER_S if context.launch.world_size > 1 else 0.0 if context.on_cuda else SOFT_S
    timer = threading.Timer(check.seconds + grace, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _linger(context: DoctorContext) -> None:
    if context.launch.rank:
        time.sleep(LINGER_S)
