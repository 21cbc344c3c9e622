"""Memory of the device that other processes of the host can map, read-only, by a file descriptor.

On CUDA by the driver's virtual memory management (cuMemCreate with a POSIX descriptor; CUDA driver API,
"Virtual Memory Management"), not by `cudaIpcOpenMemHandle`: such a mapping can be read-only, the descriptor
goes only to whom it is given, what is mapped stays valid when its maker dies, and each process may see its
own GPU alone. On the CPU it is a memfd, so that everything above runs unchanged there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from kvfabric.errors import TransferError
from kvfabric_engine.lanes import on_device

_PINNED, _ON_DEVICE = 1, 1  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE
_BY_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_*
_RECOMMENDED = 1  # CU_MEM_ALLOC_GRANULARITY_RECOMMENDED


class _Location(ctypes.Structure):
    """CUmemLocation"""

    _fields_: ClassVar = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_: ClassVar = [
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_: ClassVar = [("location", _Location), ("flags", ctypes.c_int)]


class ShareableMemory:
    """`tensor`: uint8 [num_bytes], ours to write. `descriptor`: of the same memory, for others; ours.

    The memory lives as long as the tensor, or what was made of it; after that as long as somebody maps it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Zeroed. Raises TransferError where the driver has no such memory."""
        self.num_bytes = num_bytes
        make = _make_on_device if device.type == "cuda" else _make_on_host
        self.tensor, self.descriptor = make(num_bytes, device)

    def close(self) -> None:
        """Nobody else can map it from now on; the tensor stays. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class MappedMemory:
    """Another process's memory, mapped here read-only: `address` is for the device that it was mapped for."""

    def __init__(self, descriptor: int, num_bytes: int, device: torch.device) -> None:
        """`descriptor` stays the caller's. Raises TransferError if it cannot be mapped so."""
        self.num_bytes = num_bytes
        map_it = _map_on_device if device.type == "cuda" else _map_on_host
        self.address, self._unmap = map_it(descriptor, num_bytes, device)

    def close(self) -> None:
        """Nothing may read it any more. Idempotent."""
        unmap, self._unmap = self._unmap, lambda: None
        unmap()


def _make_on_host(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, int]:
    descriptor = os.memfd_create("kvfabric-pool", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, num_bytes)
        mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED)
        return torch.from_numpy(np.frombuffer(mapping, np.uint8)), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _map_on_host(
    descriptor: int, num_bytes: int, device: torch.device
) -> tuple[int, Callable[[], None]]:
    if os.fstat(descriptor).st_size < num_bytes:
        raise TransferError(f"a descriptor of {num_bytes} B is shorter than that")
    mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    seen = np.frombuffer(mapping, np.uint8)
    address: int = seen.__array_interface__["data"][0]
    del seen
    return address, mapping.close


class _Range:
    """Owns a mapping of the driver: torch holds on to it for as long as a tensor needs it."""

    def __init__(self, address: int, num_bytes: int, unmap: Callable[[], None]) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        weakref.finalize(self, unmap).atexit = False  # the driver's own end comes first there


def _make_on_device(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, int]:
    with on_device(device):
        index = _context(device)
        properties = _Properties(_PINNED, _BY_DESCRIPTOR, _Location(_ON_DEVICE, index))
        size = _rounded(num_bytes, properties)
        handle = ctypes.c_uint64()
        _call("cuMemCreate", ctypes.byref(handle), _size(size), ctypes.byref(properties), _u64(0))
        try:
            address, unmap = _mapped(handle.value, size, index, _READ_WRITE)
            descriptor = ctypes.c_int(-1)
            try:
                pointer = ctypes.addressof(descriptor)
                _call(
                    "cuMemExportToShareableHandle",
                    ctypes.c_void_p(pointer),
                    handle,
                    _BY_DESCRIPTOR,
                    _u64(0),
                )
                whole = torch.as_tensor(_Range(address, size, unmap), device=device)
            except BaseException:
                unmap()
                raise
        finally:
            _call("cuMemRelease", handle)  # mapped and exported, it needs no handle
        whole.zero_()
        return whole[:num_bytes], descriptor.value


def _map_on_device(
    descriptor: int, num_bytes: int, device: torch.device
) -> tuple[int, Callable[[], None]]:
    with on_device(device):
        index = _context(device)
        handle = ctypes.c_uint64()
        number = ctypes.c_void_p(descriptor)
        _call("cuMemImportFromShareableHandle", ctypes.byref(handle), number, _BY_DESCRIPTOR)
        try:
            properties = _Properties()
            _call("cuMemGetAllocationPropertiesFromHandle", ctypes.byref(properties), handle)
            return _mapped(handle.value, _rounded(num_bytes, properties), index, _READ)
        finally:
            _call("cuMemRelease", handle)


def _mapped(handle: int, size: int, index: int, access: int) -> tuple[int, Callable[[], None]]:
    address = ctypes.c_uint64()
    _call("cuMemAddressReserve", ctypes.byref(address), _size(size), _size(0), _u64(0), _u64(0))

    def free() -> None:
        _call("cuMemAddressFree", address, _size(size))

    def unmap() -> None:
        _call("cuMemUnmap", address, _size(size))
        free()

    try:
        _call("cuMemMap", address, _size(size), _size(0), _u64(handle), _u64(0))
    except BaseException:
        free()
        raise
    wanted = _Access(_Location(_ON_DEVICE, index), access)
    try:
        _call("cuMemSetAccess", address, _size(size), ctypes.byref(wanted), _size(1))
    except BaseException:
        unmap()
        raise
    return address.value, unmap


def _context(device: torch.device) -> int:
    """The device's number; its context exists from here on."""
    torch.cuda.current_stream(device).synchronize()
    return torch.cuda.current_device()


def _rounded(num_bytes: int, properties: _Properties) -> int:
    step = ctypes.c_size_t()
    function = "cuMemGetAllocationGranularity"
    _call(function, ctypes.byref(step), ctypes.byref(properties), _RECOMMENDED)
    return -(-num_bytes // step.value) * step.value


_size, _u64 = ctypes.c_size_t, ctypes.c_uint64


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise TransferError(f"no CUDA driver: {exc}") from exc


def _call(name: str, *arguments: object) -> None:
    function = getattr(_driver(), name, None)
    if function is None:
        raise TransferError(f"this CUDA driver has no {name}")
    error = function(*arguments)
    if error:
        text = ctypes.c_char_p()
        with contextlib.suppress(AttributeError):
            _driver().cuGetErrorString(error, ctypes.byref(text))
        message = (text.value or b"").decode()
        raise TransferError(f"{name} failed: CUDA error {error} ({message})")
