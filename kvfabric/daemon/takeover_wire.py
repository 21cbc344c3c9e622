"""What two daemons say to each other in a takeover, and what one gives to the other.

A packet of their SOCK_SEQPACKET socket is one MessagePack message, perhaps with descriptors. The state is a
memory file among these: magic, version, length, XXH3-128, MessagePack.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
import struct
from typing import TypeVar

import msgspec
import xxhash

from kvfabric.daemon.connection import ConnectionState
from kvfabric.daemon.sessions import SessionState
from kvfabric.errors import PeerClosed, RemoteProtocolError
from kvfabric.protocol import descriptors
from kvfabric.protocol.messages import PROTOCOL_VERSION
from kvfabric.store.contents import Contents
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.types import KEY_BYTES

VERSION = 1
"""Of everything here and in the state. Another version is a mismatch: there is no conversion."""
MAX_DESCRIPTORS = 253
"""The kernel's limit for one message."""

_PACKET_BYTES = 64 << 10
_HEADER = struct.Struct("<8sIQ16s")
_MAGIC = b"KVFTAKE\0"


class Ask(msgspec.Struct, frozen=True, tag=1):
    """First packet. `layout`: what must be equal beside the version for the state to mean anything."""

    version: int
    layout: tuple[int, ...]


class Given(msgspec.Struct, frozen=True, tag=2):
    """Carries descriptors. The first two of the first are the predecessor's pidfd and the state."""

    last: bool


class Refused(msgspec.Struct, frozen=True, tag=3):
    """Nothing is handed over. `ends`: the predecessor stops, so that the successor can start from SSD; its
    pidfd goes along."""

    reason: str
    ends: bool


class Ready(msgspec.Struct, frozen=True, tag=4):
    """Everything is restored."""


class Unusable(msgspec.Struct, frozen=True, tag=5):
    """The state does not fit; the predecessor is asked to stop."""

    reason: str


class Go(msgspec.Struct, frozen=True, tag=6):
    """It is yours."""


class Serving(msgspec.Struct, frozen=True, tag=7):
    """I have it."""


Packet = Ask | Given | Refused | Ready | Unusable | Go | Serving
P = TypeVar("P", bound=Packet)
_DECODER = msgspec.msgpack.Decoder(Packet)
LAYOUT = (PROTOCOL_VERSION, PAGE_BYTES, KEY_BYTES)


class HbmEntry(msgspec.Struct, frozen=True):
    """What an engine's HBM holds under one namespace tag: 8-byte key prefixes, packed."""

    session: bytes
    namespace_tag: bytes
    keys: bytes


class NodeState(msgspec.Struct, frozen=True):
    """A whole daemon at rest. `arena`, `lock` (of the state directory), `ssd_lock`, `listener`,
    `takeover_listener`: positions of descriptors, -1: none."""

    contents: Contents
    sessions: tuple[SessionState, ...]
    connections: tuple[ConnectionState, ...]
    hbm: tuple[HbmEntry, ...]
    arena: int
    lock: int
    ssd_lock: int
    listener: int
    takeover_listener: int


# ---------------------------------------------------------------------- packets


class Channel:
    """One end of the conversation."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, packet: Packet, numbered: list[int] | None = None) -> None:
        """Raises PeerClosed."""
        data = msgspec.msgpack.encode(packet)
        while True:
            try:
                socket.send_fds(self._sock, [data], numbered or [])
            except BlockingIOError:
                await _writable(self._sock)
            except OSError as exc:
                raise PeerClosed(f"the other daemon is gone: {exc.strerror}") from exc
            else:
                return

    async def receive(self, received: list[int]) -> Packet:
        """The next packet; its descriptors are appended to `received`, which the caller owns.

        Raises PeerClosed at the end, and RemoteProtocolError for what is no packet.
        """
        while True:
            try:
                data, found, _, _ = socket.recv_fds(
                    self._sock, _PACKET_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await descriptors.readable(self._sock)
                continue
            except OSError as exc:
                if exc.errno == errno.ECONNRESET:  # said once, before what is still queued
                    continue
                raise PeerClosed(f"the other daemon is gone: {exc.strerror}") from exc
            received.extend(found)
            if not data:
                raise PeerClosed("the other daemon is gone")
            try:
                packet: Packet = _DECODER.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise RemoteProtocolError(f"no packet of a takeover: {exc}") from exc
            return packet

    async def expect(self, *kinds: type[P], within_s: float | None) -> P:
        """The next packet, of one of `kinds` and without descriptors. Raises TimeoutError too; None: waits
        for ever."""
        received: list[int] = []
        try:
            async with asyncio.timeout(within_s):
                packet = await self.receive(received)
        finally:
            descriptors.close_all(received)
        if not isinstance(packet, kinds):
            raise RemoteProtocolError(f"{type(packet).__name__} comes at the wrong time")
        return packet

    def close(self) -> None:
        self._sock.close()


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock)


async def exited(pidfd: int) -> None:
    """Wait until that process has exited. On cancellation nothing changed."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)


def pack(state: NodeState) -> int:
    """The state as a memory file; the caller closes it. Raises OSError."""
    body = msgspec.msgpack.encode(state)
    header = _HEADER.pack(_MAGIC, VERSION, len(body), xxhash.xxh3_128_digest(body))
    descriptor = os.memfd_create("kvfabric-takeover", os.MFD_CLOEXEC)
    try:
        with open(os.dup(descriptor), "wb") as file:
            file.write(header)
            file.write(body)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unpack(descriptor: int) -> NodeState:
    """Raises RemoteProtocolError for anything that is not a whole state of this version."""
    try:
        with mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            data = bytes(mapping)
        magic, version, length, digest = _HEADER.unpack_from(data)
    except (OSError, ValueError, struct.error) as exc:
        raise RemoteProtocolError(f"the state handed over does not read: {exc}") from exc
    if magic != _MAGIC or version != VERSION:
        raise RemoteProtocolError(f"the state is of version {version}, not {VERSION}")
    body = memoryview(data)[_HEADER.size :]
    if len(body) != length or xxhash.xxh3_128_digest(body) != digest:
        raise RemoteProtocolError("the state handed over is damaged")
    try:
        return msgspec.msgpack.decode(body, type=NodeState)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"the state handed over does not decode: {exc}") from exc
