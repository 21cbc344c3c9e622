"""Sends a call to an engine and passes the answer on: streams piece by piece, the rest in one.

Until the first byte of an answer has gone to the client, a broken engine costs another attempt elsewhere.
After it nothing is replayed: the stream ends with an error event. A client that goes away cancels the
request at its engine at once (the server cancels the handler's task, which closes the connection).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

import aiohttp
from aiohttp import web
from yarl import URL

from kvfabric.errors import TransferError
from kvfabric.handle import SESSION_HEADER
from kvfabric_router.api import (
    ApiError,
    EventSplitter,
    Usage,
    decode_answer,
    error_body,
    events_of,
    parse_usage,
)
from kvfabric_router.desk import Asked, Attempt, Desk, Fault
from kvfabric_router.engine_http import FAULTS, MISDIRECTED, STREAM, Body, is_stream, words_of
from kvfabric_router.fleet import ProbeReport
from kvfabric_router.probes import read_report

MAX_ATTEMPTS = 3
REQUEST_ID, ENGINE_ID = "X-Request-Id", "x-kvfabric-engine"
_ELSEWHERE = frozenset({502, 503, 504})
"""Answers of an engine that another one may not give."""
_BUSY = frozenset({429, 503})
_PASSED_ON = ("Retry-After",)
_KEPT_URLS = 1024

C = TypeVar("C", bound=Asked)


class _Failed(TransferError):
    """Nothing reached the client yet: another engine may do better. `answer` is what a busy one said,
    `report` what one that started anew, and would be refused the handle, is now.
    """

    def __init__(
        self,
        fault: Fault,
        why: str,
        *,
        answer: web.Response | None = None,
        report: ProbeReport | None = None,
    ) -> None:
        super().__init__(why)
        self.fault = fault
        self.answer = answer
        self.report = report


@dataclass(slots=True)
class _Exchange:
    """A client's connection during one call. `stream` is set once bytes went to the client."""

    request: web.Request
    call: Asked
    arrived: float
    stream: web.StreamResponse | None = None


class Proxy(Generic[C]):
    """See the module. `http` is the caller's, made by `client()`."""

    def __init__(self, desk: Desk[C], *, http: aiohttp.ClientSession, timeout_s: float) -> None:
        self._desk = desk
        self.http = http
        self._timeout_s = timeout_s
        self._urls: dict[str, URL] = {}

    def url(self, endpoint: str, path: str) -> URL:
        """Of an engine's `path`, one of a few; parsed once."""
        url = self._urls.get(endpoint + path)
        if url is None:
            if len(self._urls) >= _KEPT_URLS:
                self._urls.clear()
            url = self._urls[endpoint + path] = URL(endpoint + path)
        return url

    async def serve(self, request: web.Request, call: C) -> web.StreamResponse:
        """Answer a client's request. Raises ApiError if no engine could.

        On cancellation: the request is cancelled at its engine and no longer accounted for.
        """
        exchange = _Exchange(request, call, arrived=time.monotonic())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._attempts(exchange, call)
        except TimeoutError:
            if exchange.stream is not None:
                return await _break_off(exchange)
            raise ApiError(
                504, f"No engine answered within {self._timeout_s:g} s.", code="timeout"
            ) from None

    async def _attempts(self, exchange: _Exchange, call: C) -> web.StreamResponse:
        busy: web.Response | None = None
        for number in range(MAX_ATTEMPTS):
            try:
                attempt = await self._desk.admit(call)
            except ApiError:
                if number and busy is not None:
                    return busy
                raise
            with attempt:
                try:
                    return await _At(self, exchange, attempt).run()
                except _Failed as exc:
                    busy = exc.answer or busy
                    attempt.failed(exc.fault, str(exc), exc.report)
        if busy is not None:
            return busy
        raise ApiError(503, "Several engines failed on this request.", code="no_engine")


class _At(Generic[C]):
    """One call at one engine."""

    def __init__(self, proxy: Proxy[C], exchange: _Exchange, attempt: Attempt) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._call = exchange.call
        self._attempt = attempt
        self._usage: Usage | None = None
        self._ttft_ms: float | None = None

    async def run(self) -> web.StreamResponse:
        """Raises _Failed."""
        answer, piece = await self._begin()
        try:
            if is_stream(answer):
                response = await self._stream(answer, piece)
            else:
                response = self._whole(answer, piece)
        finally:
            answer.close()  # one that was not read to its end closes the connection
        if response.status < 400 and not self._call.result:
            self._attempt.answered(self._usage, self._ttft_ms)
        return response

    # ------------------------------------------------------------------ towards the engine

    async def _begin(self) -> tuple[aiohttp.ClientResponse, bytes]:
        """Ask, and wait for the first piece of a stream, or for all of another answer."""
        answer: aiohttp.ClientResponse | None = None
        try:
            async with self._attempt.unless_lost():
                answer = await self._ask()
                if is_stream(answer):
                    return answer, await answer.content.readany()
                return answer, await answer.read()
        except BaseException as exc:
            if answer is not None:
                answer.close()
            if isinstance(exc, FAULTS):
                raise _Failed(Fault.LOST, words_of(exc)) from exc
            raise

    async def _ask(self) -> aiohttp.ClientResponse:
        attempt = self._attempt
        headers = {"Content-Type": "application/json", REQUEST_ID: self._call.request_id}
        if attempt.has_handle:
            headers[SESSION_HEADER] = attempt.session.hex()
        url = self._proxy.url(attempt.endpoint, self._exchange.request.path)
        data = Body(attempt.body, attempt.sent)
        return await self._proxy.http.post(url, data=data, headers=headers)

    # ------------------------------------------------------------------ towards the client

    def _headers(self, answer: aiohttp.ClientResponse) -> dict[str, str]:
        passed = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
        return {
            **passed,
            REQUEST_ID: self._call.request_id,
            ENGINE_ID: self._attempt.engine_id,
        }

    def _whole(self, answer: aiohttp.ClientResponse, raw: bytes) -> web.Response:
        headers = self._headers(answer)
        decoded = decode_answer(raw)
        moved = read_report(decoded) if answer.status == MISDIRECTED else None
        if moved is not None and moved.session != self._attempt.session:
            why = f"its session is {moved.session.hex()} now"
            raise _Failed(Fault.SESSION, why, report=moved)
        if answer.status >= 400 and not (isinstance(decoded, dict) and "error" in decoded):
            raw = error_body(
                answer.status, _words(decoded) or f"The engine answered {answer.status}."
            )
        if answer.status in _BUSY:
            headers.setdefault("Retry-After", "1")
        response = web.Response(
            status=answer.status, body=raw, headers=headers, content_type="application/json"
        )
        if answer.status in _ELSEWHERE or answer.status in _BUSY:
            raise _Failed(Fault.BUSY, f"status {answer.status}", answer=response)
        if answer.status < 400:
            self._usage = parse_usage(decoded)
            self._observe_first_byte()
        return response

    async def _stream(self, answer: aiohttp.ClientResponse, piece: bytes) -> web.StreamResponse:
        if not piece:
            raise _Failed(Fault.LOST, "it ended the stream before the first byte")
        self._observe_first_byte()
        headers = {"Content-Type": STREAM, "Cache-Control": "no-cache", **self._headers(answer)}
        response = _EventStream(headers=headers)
        self._exchange.stream = response
        await response.prepare(self._exchange.request)
        splitter = EventSplitter()
        finished, why = False, "it ended the stream without saying so"
        while piece:
            self._attempt.piece()
            events = splitter.feed(piece)
            if events:
                finished = finished or _is_end(events)
                await response.write(self._usage_taken(events))
            try:
                piece = await answer.content.readany()
            except FAULTS as exc:
                finished, why = False, words_of(exc)
                break
        if not finished:
            self._attempt.failed(Fault.BROKE_OFF, why)
            return await _break_off(self._exchange)
        await response.write_eof()
        return response

    def _usage_taken(self, events: bytes) -> bytes:
        """`events` with the usage read; without the event that only we asked for."""
        if b'"usage"' not in events:
            return events
        kept = []
        for event in events.replace(b"\r\n", b"\n").split(b"\n\n"):
            decoded = [decode_answer(data) for data in events_of(event)] if event else []
            found = [(d, usage) for d in decoded if (usage := parse_usage(d)) is not None]
            if found:
                body, self._usage = found[-1]
                only_usage = isinstance(body, dict) and not body.get("choices")
                if only_usage and not self._call.request.usage_wanted:
                    continue
            kept.append(event)
        return b"\n\n".join(kept)

    # ------------------------------------------------------------------ what is learned

    def _observe_first_byte(self) -> None:
        after_s = time.monotonic() - self._exchange.arrived
        self._attempt.first_byte(after_s)
        if self._call.request.stream:
            self._ttft_ms = after_s * 1e3


class _EventStream(web.StreamResponse):
    """Its head leaves with the first piece, in one packet instead of two."""

    _send_headers_immediately = False


def _words(answer: object) -> str:
    """What an error that has not the OpenAI shape says: SGLang's `message`, FastAPI's `detail`."""
    said = [answer.get(name) for name in ("message", "detail")] if isinstance(answer, dict) else []
    return next((one for one in said if isinstance(one, str)), "")


def _is_end(events: bytes) -> bool:
    """Whether the end of the stream is among `events`; an answer may hold its text too."""
    return b"[DONE]" in events and b"[DONE]" in events_of(events)


async def _break_off(exchange: _Exchange) -> web.StreamResponse:
    """End a stream with an error event: whole events went before it."""
    response = exchange.stream
    assert response is not None
    exchange.call.result = "broken_off"
    error = error_body(500, "The engine broke off in this answer.", code="engine_lost")
    await response.write(b"data: " + error + b"\n\n")
    await response.write_eof()
    return response
