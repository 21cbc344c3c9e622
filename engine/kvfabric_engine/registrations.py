"""What memory of the host is page-locked for the device, by address, and the copies that heed it.

The driver refuses one copy from one registration into another, or out of one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvfabric_engine.lanes import Copies, on_device

Addresses = npt.NDArray[np.int64]
REGISTER_READ_ONLY = 8
"""cudaHostRegisterReadOnly"""


class PinnedMemory:
    """What is page-locked for the device, by address. Thread-safe.

    One copy never crosses from one registration into another, nor out of one: the driver refuses that.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._lock = threading.Lock()
        self._ends: dict[int, int] = {}  # by start
        self._known: _Registrations | None = None  # of now; made when asked for

    def add(self, address: int, num_bytes: int, *, is_writable: bool) -> bool:
        """Page-lock; False if the driver does not. Blocks, and the driver's other calls with it."""
        if self._is_cuda:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # untyped in torch
            flags = 0 if is_writable else REGISTER_READ_ONLY
            with on_device(self._device):
                if int(runtime.cudaHostRegister(address, num_bytes, flags)) != 0:
                    return False
        with self._lock:
            self._ends[address] = address + num_bytes
            self._known = None
        return True

    def remove(self, address: int) -> None:
        """Undo `add`. Idempotent."""
        with self._lock:
            if address not in self._ends:
                return
            del self._ends[address]
            self._known = None
        if self._is_cuda:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # untyped in torch
            with on_device(self._device):
                runtime.cudaHostUnregister(address)

    def holds(self, addresses: Addresses, size: int) -> bool:
        """Whether all these items of `size` bytes are page-locked, by one registration or by neighbours."""
        known = self._registrations()
        spans = np.searchsorted(known.span_starts, addresses, side="right") - 1
        return bool(np.all((spans >= 0) & (addresses + size <= known.span_ends[spans])))

    def copies(self, targets: Addresses, sources: Addresses, size: int, *, host: int) -> Copies:
        """Items of `size` bytes each as few copies as possible. `host`: which of the two is the host's, 0 or
        1. No copy crosses the edge of a registration; of memory that is none of ours, which may be neighbours
        by chance alone, each item is a copy of its own."""
        if not len(targets):
            return np.empty((0, 3), dtype=np.uint64)
        joins = (np.diff(targets) == size) & (np.diff(sources) == size)
        joins &= self._registrations().are_within((targets, sources)[host][1:])
        heads = np.flatnonzero(np.append(True, ~joins))
        left = size * np.diff(np.append(heads, len(targets)))
        sides = (targets[heads], sources[heads])
        edges, cut = self._registrations().edges, []
        while len(left):
            until = edges[np.searchsorted(edges, sides[host], side="right")] - sides[host]
            taken = np.minimum(left, until)
            cut.append(np.stack([*sides, taken], axis=1))
            rest = left > taken
            left, sides = left - taken, (sides[0] + taken, sides[1] + taken)
            left, sides = left[rest], (sides[0][rest], sides[1][rest])
        return np.concatenate(cut).astype(np.uint64)

    def _registrations(self) -> _Registrations:
        with self._lock:
            if self._known is None:
                self._known = _Registrations.of(self._ends)
            return self._known


class _Registrations(NamedTuple):
    """`starts` and `ends` of all, ascending; `edges` are both, and one above every address. Spans: what
    neighbours hold together. The first registration and the first span hold nothing."""

    starts: Addresses
    ends: Addresses
    edges: Addresses
    span_starts: Addresses
    span_ends: Addresses

    @classmethod
    def of(cls, ends: Mapping[int, int]) -> _Registrations:
        starts, stops = np.array(sorted(ends.items()), dtype=np.int64).reshape(-1, 2).T
        begins = np.append(True, starts[1:] != stops[:-1])[: len(starts)]
        lasts = np.append(begins[1:], True)[: len(starts)]
        edges = np.unique(np.concatenate([starts, stops, [np.iinfo(np.int64).max]]))
        spans = np.append(0, starts[begins]), np.append(0, stops[lasts])
        return cls(np.append(0, starts), np.append(0, stops), edges, *spans)

    def are_within(self, addresses: Addresses) -> npt.NDArray[np.bool_]:
        """Which lie behind the first byte of a registration and before its end."""
        owners = np.searchsorted(self.starts, addresses, side="left") - 1
        return (owners >= 0) & (addresses < self.ends[owners])


def address_of(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
