"""How the router talks HTTP to engines: its client, bodies that say when they are on their way, faults."""

from __future__ import annotations

import io
from collections.abc import Callable

import aiohttp

STREAM = "text/event-stream"
MISDIRECTED = 421
"""What an engine answers that started anew: the handle was made for another session of it."""
FAULTS = (TimeoutError, aiohttp.ClientError, OSError)
"""What a wait for an engine ends with if the engine, or the way there, is broken."""


def client() -> aiohttp.ClientSession:
    """For requests to engines: as many connections as there are answers, no cookies kept between them, no
    time limit but on connecting.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=2.0),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    )


class Body(aiohttp.BytesIOPayload):
    """A request's body, sent in pieces because prompts are long; `sent` is called when it is on its way."""

    def __init__(self, data: bytes, sent: Callable[[], None]) -> None:
        super().__init__(io.BytesIO(data), content_type="application/json")
        self._sent = sent

    async def write_with_length(
        self, writer: aiohttp.abc.AbstractStreamWriter, content_length: int | None
    ) -> None:
        await super().write_with_length(writer, content_length)
        self._sent()


def is_stream(answer: aiohttp.ClientResponse) -> bool:
    return answer.status == 200 and answer.content_type == STREAM


def words_of(fault: BaseException) -> str:
    """What a fault of a wait for the engine means."""
    if isinstance(fault, TimeoutError):
        return "it stopped answering"
    return str(fault) or type(fault).__name__
