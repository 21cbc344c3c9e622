"""Frames on the Unix socket between engine and node. Sans-IO: bytes in, messages out.

A frame is a 16-byte header and a MessagePack body, little-endian:

    4 B magic "KVF1" | u32 body length | u64 correlation id

The correlation id of a reply is that of its request; replies may come in any order. Lengths are checked
against a cap before anything is allocated; a frame that breaks a rule ends the connection.
"""

from __future__ import annotations

import struct

import msgspec

from kvfabric.errors import LocalProtocolError, RemoteProtocolError
from kvfabric.protocol.messages import Reply, Request

MAGIC = b"KVF1"
HEADER = struct.Struct("<4sIQ")
MAX_BODY_BYTES = 4 << 20
"""128 Ki keys of 32 bytes: more blocks than any prompt has."""
MAX_HELLO_BYTES = 16 << 10
"""Cap of the first frame, before the peer has said who it is."""

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS = msgspec.msgpack.Decoder(Request)
_REPLIES = msgspec.msgpack.Decoder(Reply)


def encode(correlation: int, message: Request | Reply) -> bytes:
    """One frame. Raises LocalProtocolError if it would be larger than the other side accepts."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_BODY_BYTES:
        name = type(message).__name__
        raise LocalProtocolError(f"{name} of {len(body)} bytes; a frame holds {MAX_BODY_BYTES}")
    return HEADER.pack(MAGIC, len(body), correlation) + body


class FrameReader:
    """Cuts a byte stream into (correlation id, body). Holds at most one frame beyond what it returned."""

    __slots__ = ("_buffer", "max_body_bytes")

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.max_body_bytes = max_body_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[tuple[int, bytes]]:
        """Every frame that is whole now. Raises RemoteProtocolError; the reader is dead after that."""
        self._buffer += data
        frames: list[tuple[int, bytes]] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            magic, length, correlation = HEADER.unpack_from(self._buffer, start)
            if magic != MAGIC:
                raise RemoteProtocolError(f"not a kvfabric frame: starts with {magic!r}")
            if length > self.max_body_bytes:
                raise RemoteProtocolError(f"frame of {length} bytes; at most {self.max_body_bytes}")
            body = start + HEADER.size
            if len(self._buffer) - body < length:
                break
            frames.append((correlation, bytes(memoryview(self._buffer)[body : body + length])))
            start = body + length
        del self._buffer[:start]
        return frames

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of an unfinished frame: not zero at end of stream means it was cut off."""
        return len(self._buffer)

    @property
    def unfinished(self) -> bytes:
        """Those bytes."""
        return bytes(self._buffer)


def decode_request(body: bytes) -> Request:
    """Raises RemoteProtocolError for anything that is not exactly a request of this version."""
    try:
        request: Request = _REQUESTS.decode(body)
        return request
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"request does not decode: {exc}") from exc


def decode_reply(body: bytes) -> Reply:
    """Raises RemoteProtocolError for anything that is not exactly a reply of this version."""
    try:
        reply: Reply = _REPLIES.decode(body)
        return reply
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"reply does not decode: {exc}") from exc
