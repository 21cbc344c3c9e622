"""What a worker and the process that decides say to each other, over a socket pair.

Frames as between engine and node (`kvfabric.protocol.codec`); the number of a frame is that of the call, 0
for the worker itself.

    worker   Open, then Ask or End; after a Go: Sent, First, Answered or Failed; then Next or End
    decider  Refused or Go to Ask and Next, Welcome to Knock, Lost if the engine of a Go is given up

Whatever the worker says last, End or the end of the connection, ends the call's account.
"""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar, cast

import msgspec

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol.codec import HEADER, MAGIC, FrameReader
from kvfabric_router.api import MAX_BODY_BYTES, Usage
from kvfabric_router.desk import Fault
from kvfabric_router.fleet import ProbeReport

_MAX_FRAME_BYTES = MAX_BODY_BYTES + (1 << 20)


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """The worker accepts connections."""


class Open(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """A request has begun; its body may still come."""

    request_id: str
    authorization: str | None


class Knock(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """May it go on? Asked before a large body is read."""


class Ask(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    path: str
    raw: bytes
    no_store: bool
    no_read: bool
    ttft_ms: float | None


class Sent(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


class First(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """The first byte of an answer that is no error."""

    after_s: float
    is_stream: bool


class Answered(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    usage: Usage | None
    ttft_ms: float | None


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    fault: Fault
    why: str
    report: ProbeReport | None


class Next(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Where else?"""


class End(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    result: str


class Welcome(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


class Go(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    endpoint: str
    engine_id: str
    session: bytes
    fields: dict[str, Any]


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    status: int
    message: str
    code: str | None
    param: str | None
    retry_after_s: int


class Lost(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


FromWorker = Ready | Open | Knock | Ask | Sent | First | Answered | Failed | Next | End
ToWorker = Welcome | Go | Refused | Lost
_In = TypeVar("_In")
_ENCODER = msgspec.msgpack.Encoder()


class Channel(asyncio.Protocol, Generic[_In]):
    """One end. What is said in one turn of the loop leaves in one write. A bad frame ends it."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[_In]) -> None:
        self._decoder = decoder
        self._reader = FrameReader(_MAX_FRAME_BYTES)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []

    def heard(self, number: int, message: _In) -> None:
        """The other end said this of a call."""
        raise NotImplementedError

    def over(self) -> None:
        """The other end is gone."""
        raise NotImplementedError

    def say(self, number: int, message: FromWorker | ToWorker) -> None:
        """To an end that is gone, nothing is said."""
        body = _ENCODER.encode(message)
        self._out.append(HEADER.pack(MAGIC, len(body), number) + body)
        if len(self._out) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        data, self._out = b"".join(self._out), []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for number, body in self._reader.feed(data):
                self.heard(number, self._decoder.decode(body))
        except (RemoteProtocolError, msgspec.DecodeError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over()
