"""Orders of device work and points in them: the only file that touches CUDA streams and events.

A lane is a stream of its own on CUDA. On CPU everything is done when the call returns, so a lane orders
nothing and its marks are passed at once: the code above runs unchanged on both.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch


class Fence(ABC):
    """A point in an order of work: what waits for it sees all that was enqueued before."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until everything before the fence is done."""


class Passed(Fence):
    """On CPU whoever hands a block over has computed it."""

    def wait(self) -> None:
        return


class Lane:
    """An order of work on the CPU."""

    def use(self) -> AbstractContextManager[object]:
        """What the thread enqueues inside goes into this lane."""
        return contextlib.nullcontext()

    def mark(self) -> Fence:
        """A fence behind everything enqueued here so far."""
        return Passed()

    def wait_for(self, fence: Fence) -> None:
        """What is enqueued here from now on runs after `fence`; blocks no thread on CUDA."""
        fence.wait()


class _Event(Fence):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class _CudaLane(Lane):
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # untyped in torch

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Fence:
        return _record(self._stream)

    def wait_for(self, fence: Fence) -> None:
        if isinstance(fence, _Event):
            self._stream.wait_event(fence.event)
        else:
            fence.wait()


def new_lane(device: torch.device) -> Lane:
    return _CudaLane(device) if device.type == "cuda" else Lane()


def fence_here(device: torch.device) -> Fence:
    """A fence behind what the calling thread launched on the device's current stream. Waits for nothing."""
    if device.type != "cuda":
        return Passed()
    return _record(torch.cuda.current_stream(device))


def _record(stream: torch.cuda.Stream) -> Fence:
    # Not spinning: a save waits for milliseconds, beside the thread that launches the engine's steps.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # untyped in torch
    event.record(stream)
    return _Event(event)
