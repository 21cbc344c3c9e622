"""What ucxx has no Python for, asked of the same libucp by ctypes: memory registered once, what a link uses.

On the thread that has the context and its links. Handles are UCX's own, as ucxx gives them.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from kvfabric.errors import ConfigError

_ADDRESS, _LENGTH, _FLAGS = 1, 2, 4
_LISTENS = "0A"
_RESOURCE = re.compile(r"(\S+/\S+)\s*$", re.MULTILINE)
_NONBLOCK = 1
"""Registered without being touched first, where the network can: pages of an arena come one by one."""


@dataclass(frozen=True, slots=True)
class Information:
    """What a transport runs on. `settings`: UCX_NAME=VALUE of the environment, NAME=VALUE of ours;
    `resources`: TRANSPORT/DEVICE that it may use; `listening`: HOST:PORT."""

    library: str = ""
    settings: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    listening: tuple[str, ...] = ()


def information(said: str, options: Mapping[str, str], before: Set[str]) -> Information:
    """`said`: of the context; `options`: UCX_NAME for those of the environment, NAME for ours; `before`:
    sockets that were there when it was made."""
    return Information(
        library=_library_in_use(),
        settings=tuple(f"{name}={v}" for name, v in sorted(options.items())),
        resources=tuple(_RESOURCE.findall(said)),
        listening=tuple(sorted(listening_sockets() - before)),
    )


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


def _library_in_use() -> str:
    """Its version and where it lies."""
    library = _library()
    library.ucp_get_version_string.restype = ctypes.c_char_p
    version: bytes = library.ucp_get_version_string()
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    path = next((path for path in sorted(paths) if "/libucp" in path), "?")
    return f"{version.decode()} in {path}"


def listening_sockets() -> set[str]:
    """HOST:PORT of each TCP socket on which this process listens."""
    own = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("socket:["):
                own.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and fields[9] in own:
                    found.add(_endpoint(fields[1]))
    return found


def _endpoint(text: str) -> str:
    """As /proc/net has it: 32-bit words in this machine's order, port in hexadecimal."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    host = ipaddress.ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    return f"{host}:{int(port, 16)}" if host.version == 4 else f"[{host}]:{int(port, 16)}"


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libucp.so.0")  # loaded already, by ucxx
