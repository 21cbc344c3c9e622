"""What ucxx has no Python for, asked of the same libucp by ctypes: memory registered once, what a link uses.

On the thread that has the context and its links. Handles are UCX's own, as ucxx gives them.
"""

from __future__ import annotations

import ctypes

from kvfabric.errors import ConfigError

_ADDRESS, _LENGTH, _FLAGS = 1, 2, 4
_NONBLOCK = 1
"""Registered without being touched first, where the network can: pages of an arena come one by one."""


class _MapParameters(ctypes.Structure):
    """`ucp_mem_map_params_t`, its fields up to the ones used here (UCX 1.10 and later)."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported", ctypes.c_void_p),
        ("room", ctypes.c_uint64 * 8),
    )


def map_memory(context: int, memory: memoryview) -> int:
    """Register writable `memory` with every device of a context that needs it; the handle, for
    `unmap_memory`. TCP needs none, and it takes 10 us; RDMA pins it. Raises ConfigError."""
    library = _library()
    parameters = _MapParameters(
        field_mask=_ADDRESS | _LENGTH | _FLAGS,
        address=ctypes.addressof(ctypes.c_char.from_buffer(memory)),
        length=memory.nbytes,
        flags=_NONBLOCK,
    )
    handle = ctypes.c_void_p()
    library.ucp_mem_map.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    library.ucp_mem_map.restype = ctypes.c_int8
    status = library.ucp_mem_map(context, ctypes.byref(parameters), ctypes.byref(handle))
    if status or not handle.value:
        raise ConfigError(
            f"UCX does not register {memory.nbytes} bytes of arena (status {status}): is `ulimit -l` enough?"
        )
    return handle.value


def unmap_memory(context: int, handle: int) -> None:
    library = _library()
    library.ucp_mem_unmap.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.ucp_mem_unmap(context, handle)


def describe_link(link: int) -> str:
    """Lanes (transport and device) and, for sizes sent so far, protocols: UCX's own words."""
    library, c = _library(), ctypes.CDLL(None)
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    c.open_memstream.restype = ctypes.c_void_p
    c.fclose.argtypes = c.free.argtypes = (ctypes.c_void_p,)
    stream = c.open_memstream(ctypes.byref(text), ctypes.byref(size))
    library.ucp_ep_print_info.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.ucp_ep_print_info(link, stream)
    c.fclose(stream)
    said = text.value or b""
    c.free(text)
    return said.decode(errors="replace")


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libucp.so.0")  # loaded already, by ucxx
