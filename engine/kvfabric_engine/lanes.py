"""Orders of device work and points in them: the only file that touches CUDA streams and events.

A lane is a stream of its own on CUDA. On CPU everything is done when the call returns, so a lane orders
nothing and its marks are passed at once: the code above runs unchanged on both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from kvfabric.errors import TransferError

MEMCPY_DEFAULT = 4
"""cudaMemcpyDefault: the driver sees from the addresses which way."""


Copies = npt.NDArray[np.uint64]
"""[n, 3]: target and source addresses, and bytes."""


class Fence(ABC):
    """A point in an order of work: what waits for it sees all that was enqueued before."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until everything before the fence is done."""

    def is_passed(self) -> bool:
        """Whether `wait` would return at once."""
        return True


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

    def copy(self, copies: Copies) -> None:
        """Enqueue copies between addresses, of the host (page-locked, or it blocks) or of the device."""
        for target, source, num_bytes in copies.tolist():
            ctypes.memmove(target, source, num_bytes)


class _Event(Fence):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def is_passed(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call] # untyped in torch


class _CudaLane(Lane):
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # untyped in torch
        self._handle = self._stream.cuda_stream
        self._copy = _memcpy_async()
        self._copy_batch = _memcpy_batch_async()

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Fence:
        return _record(self._stream)

    def wait_for(self, fence: Fence) -> None:
        _wait_on_device(self._stream, fence)

    def copy(self, copies: Copies) -> None:
        # As one batch: the driver leaves no gap between its copies (of 1 MiB each they reach 0.97 of one long
        # copy, one by one 0.86). Not by torch's copy_, which takes as long as 512 KiB of DMA to begin.
        if len(copies) > 1 and self._copy_batch is not None and self._copied_batch(copies):
            return
        for target, source, num_bytes in copies.tolist():
            error = self._copy(target, source, num_bytes, MEMCPY_DEFAULT, self._handle)
            if error:
                _forget_error()
                raise TransferError(
                    f"the device refuses a copy of {num_bytes} B: CUDA error {error}"
                )

    def _copied_batch(self, copies: Copies) -> bool:
        """False if the driver takes no such batch, one with memory that is not page-locked perhaps."""
        assert self._copy_batch is not None
        columns = np.ascontiguousarray(copies.T)
        addresses = [column.ctypes.data for column in columns]
        if self._copy_batch(addresses, len(copies), self._handle) == 0:
            return True
        _forget_error()
        return False


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The runtime library that torch has loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    return ctypes.CDLL(f"libcudart.so.{major}")


def _forget_error() -> None:
    """What this thread's last call failed with was seen: torch would report it at its next launch."""
    _runtime().cudaGetLastError()


@functools.cache
def _memcpy_async() -> Any:
    """cudaMemcpyAsync"""
    function = _runtime().cudaMemcpyAsync
    pointer = ctypes.c_void_p
    function.argtypes = (pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer)
    function.restype = ctypes.c_int
    return function


class _CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes"""

    _fields_: ClassVar = [
        ("source_access_order", ctypes.c_int),
        ("location_hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    ]


IN_STREAM_ORDER = 1
"""cudaMemcpySrcAccessOrderStream"""


@functools.cache
def _memcpy_batch_async() -> Callable[[list[int], int, int], int] | None:
    """cudaMemcpyBatchAsync (targets, sources and sizes; how many; stream) -> error; None before CUDA 12.8."""
    major = (torch.version.cuda or "").partition(".")[0]
    function = getattr(_runtime(), "cudaMemcpyBatchAsync", None)
    if function is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    failed = (pointer,) if major == "12" else ()  # index of the copy that failed: gone in 13
    function.argtypes = (pointer, pointer, pointer, size, pointer, pointer, size, *failed, pointer)
    function.restype = ctypes.c_int
    attributes, first = _CopyAttributes(IN_STREAM_ORDER), size(0)
    index = size()

    def copy(addresses: list[int], count: int, stream: int) -> int:
        last = (ctypes.byref(index),) if failed else ()
        return int(
            function(
                *addresses,
                count,
                ctypes.byref(attributes),
                ctypes.byref(first),
                1,
                *last,
                stream,
            )
        )

    return copy


def new_lane(device: torch.device) -> Lane:
    return _CudaLane(device) if device.type == "cuda" else Lane()


def fence_here(device: torch.device) -> Fence:
    """A fence behind what the calling thread launched on the device's current stream. Waits for nothing."""
    if device.type != "cuda":
        return Passed()
    return _record(torch.cuda.current_stream(device))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The calling thread works on this device inside: of several, a new thread starts on the first."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def wait_here(device: torch.device, fence: Fence) -> None:
    """What is launched on the device's current stream from now on runs after `fence`; blocks no thread."""
    if device.type == "cuda":
        _wait_on_device(torch.cuda.current_stream(device), fence)
    else:
        fence.wait()


def _wait_on_device(stream: torch.cuda.Stream, fence: Fence) -> None:
    if isinstance(fence, _Event):
        stream.wait_event(fence.event)
    else:
        fence.wait()


def _record(stream: torch.cuda.Stream) -> Fence:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call] # untyped in torch
    event.record(stream)
    return _Event(event)
