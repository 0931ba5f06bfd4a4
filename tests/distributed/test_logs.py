from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.logs import PACKAGE, ConsoleHandler, configure_logging

logger = logging.getLogger(f"{PACKAGE}.somewhere")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the package's logger as it was."""
    package = logging.getLogger(PACKAGE)
    handlers, level = list(package.handlers), package.level
    yield
    package.handlers[:] = handlers
    package.setLevel(level)


def _launch(rank: int) -> Launch:
    return Launch(rank=rank, local_rank=rank, world_size=4, local_size=4)


@pytest.mark.parametrize("rank, prefix", [(0, ""), (3, "[rank 3] ")])
def test_prefixes_ranks_other_than_0(rank: int, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(_launch(rank))
    logger.debug("not shown")
    logger.info("step %d of %d", 1, 2)
    logger.warning("disk is full")
    logger.error("no way on")
    out, err = capsys.readouterr()
    assert out == f"{prefix}step 1 of 2\n"
    assert err == f"{prefix}warning: disk is full\n{prefix}error: no way on\n"


def test_a_command_keeps_stdout_for_its_product(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    print("product.png")
    logger.info("drawn")
    assert capsys.readouterr() == ("product.png\n", "drawn\n")


def test_prints_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(_launch(1))
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    err = capsys.readouterr().err
    assert err.startswith("[rank 1] error: failed\nTraceback (most recent call last):") and err.endswith(": why\n")


def test_a_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(_launch(1))
    configure_logging(_launch(2))
    logger.info("once")
    assert capsys.readouterr().out == "[rank 2] once\n"
    assert sum(isinstance(handler, ConsoleHandler) for handler in logging.getLogger(PACKAGE).handlers) == 1
