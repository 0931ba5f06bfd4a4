"""Order of copies on a GPU's two streams, with fake streams that record calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mrmae_ds.teachers.placement import offloaded
from mrmae_ds.teachers.placement.offloaded import Bundle


class Stream:
    """Fake stream that records its waits."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class Cuda:
    """The part of torch.cuda that :class:`Bundle` uses."""

    def __init__(self, log: list[str]) -> None:
        self.compute, self.log = Stream("compute", log), log

    def current_stream(self, device: torch.device) -> Stream:
        return self.compute

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"{stream.name} copies")
        yield


class Torch:
    """torch with fake streams and fake pinned memory."""

    def __init__(self, log: list[str]) -> None:
        self.cuda, self.pinned = Cuda(log), 0

    def empty(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        self.pinned += pin_memory
        return torch.empty(*size, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the log of the fake streams."""
    events: list[str] = []
    monkeypatch.setattr(offloaded, "torch", Torch(events))
    return events


def test_copy_and_compute_streams_wait_for_each_other(log: list[str]) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    bundle = Bundle([weight], torch.device("cpu"), Stream("side", log))
    assert offloaded.torch.pinned == 1 and log == [] and weight.numel() == 0
    bundle.fetch()
    assert log == ["side waits for compute", "side copies"]
    bundle.wait()
    bundle.wait()  # once is enough
    assert log[2:] == ["compute waits for event of side"]
    assert torch.equal(weight, torch.arange(6.0).view(2, 3))
    bundle.drop()
    assert log[3:] == [] and weight.numel() == 0


def test_unused_fetch_is_not_freed_during_its_copy(log: list[str]) -> None:
    bundle = Bundle([torch.ones(3)], torch.device("cpu"), Stream("side", log))
    bundle.fetch()
    bundle.drop()
    assert log == ["side waits for compute", "side copies", "compute waits for event of side"]
