"""The desk of a worker process: each question, and all that is seen, goes to the process that decides."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from kvfabric_router.api import ApiError, ModelRequest, Usage
from kvfabric_router.desk import Fault, unless
from kvfabric_router.fleet import ProbeReport
from kvfabric_router.worker_channel import (
    Answered,
    Ask,
    Channel,
    End,
    Failed,
    First,
    Go,
    Knock,
    Lost,
    Next,
    Open,
    Ready,
    Refused,
    Sent,
    ToWorker,
    Welcome,
)


@dataclass(slots=True, eq=False)
class WorkerCall:
    """A client's request at a worker. See `desk.Asked`."""

    number: int
    request_id: str
    path: str
    request: ModelRequest
    no_store: bool = False
    no_read: bool = False
    ttft_ms: float | None = None
    result: str = ""
    was_asked: bool = False


@dataclass(slots=True, eq=False)
class _Pending:
    reply: asyncio.Future[Go | Welcome]
    is_lost: bool = False
    lost: Callable[[], None] = field(default=lambda: None)


class WorkerDesk(Channel[ToWorker]):
    """See the module. `gone` is called when the process that decides is."""

    def __init__(self, gone: Callable[[], None]) -> None:
        super().__init__(msgspec.msgpack.Decoder(ToWorker))
        self._gone = gone
        self._is_alone = False
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Pending] = {}

    def __repr__(self) -> str:
        return f"<WorkerDesk {len(self._calls)} calls>"

    def ready(self) -> None:
        self.say(0, Ready())

    def open(self, request_id: str, authorization: str | None) -> int:
        """A request has begun; `end` follows, whatever becomes of it. Returns the number of the call."""
        number = next(self._numbers)
        self._calls[number] = _Pending(asyncio.get_running_loop().create_future())
        self.say(number, Open(request_id, authorization))
        return number

    async def welcome(self, number: int) -> None:
        """Raises ApiError if it would be refused without being looked at."""
        self.say(number, Knock())
        await self._reply(number)

    def end(self, number: int, result: str) -> None:
        pending = self._calls.pop(number)
        if pending.reply.done() and not pending.reply.cancelled():
            pending.reply.exception()  # of a call that ended before anybody asked
        self.say(number, End(result))

    async def admit(self, call: WorkerCall) -> WorkerAttempt:
        """See `desk.Desk`."""
        if call.was_asked:
            self.say(call.number, Next())
        else:
            call.was_asked = True
            asked = Ask(call.path, call.request.raw, call.no_store, call.no_read, call.ttft_ms)
            self.say(call.number, asked)
        go = await self._reply(call.number)
        if not isinstance(go, Go):
            raise ApiError(500, "The router failed on this request.")
        return WorkerAttempt(self, call, go)

    async def _reply(self, number: int) -> Go | Welcome:
        if self._is_alone:
            raise _without_decider()
        pending = self._calls[number]
        try:
            return await pending.reply
        finally:
            pending.reply = asyncio.get_running_loop().create_future()

    def when_lost(self, number: int, call: Callable[[], None]) -> bool:
        """See `Flight.when_lost`."""
        self._calls[number].lost = call
        return self._calls[number].is_lost

    # ------------------------------------------------------------------ what it is told

    def heard(self, number: int, message: ToWorker) -> None:
        pending = self._calls.get(number)
        if pending is None:
            return  # it ended meanwhile
        if isinstance(message, Lost):
            pending.is_lost = True
            pending.lost()
        elif pending.reply.done():
            return
        elif isinstance(message, Refused):
            refused = message
            pending.reply.set_exception(
                ApiError(
                    refused.status,
                    refused.message,
                    code=refused.code,
                    param=refused.param,
                    retry_after_s=refused.retry_after_s,
                )
            )
        else:
            pending.is_lost = False
            pending.reply.set_result(message)

    def over(self) -> None:
        self._is_alone = True
        self._gone()
        for pending in self._calls.values():
            if not pending.reply.done():
                pending.reply.set_exception(_without_decider())


def _without_decider() -> ApiError:
    return ApiError(503, "The router is going down.", code="not_ready")


class WorkerAttempt:
    """See `desk.Attempt`. Its account is closed by what the worker says next of the call: Next or End."""

    def __init__(self, desk: WorkerDesk, call: WorkerCall, go: Go) -> None:
        self._desk = desk
        self._call = call
        self._fields = go.fields
        self._is_streaming = False
        self.endpoint = go.endpoint
        self.engine_id = go.engine_id
        self.session = go.session

    @property
    def has_handle(self) -> bool:
        return "kv_transfer_params" in self._fields

    @property
    def body(self) -> bytes:
        return self._call.request.with_fields(self._fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def unless_lost(self) -> asyncio.Timeout:
        return unless(lambda call: self._desk.when_lost(self._call.number, call))

    def sent(self) -> None:
        self._desk.say(self._call.number, Sent())

    def first_byte(self, after_s: float) -> None:
        self._desk.say(self._call.number, First(after_s, self._call.request.stream))

    def piece(self) -> None:
        return  # the first is known by `first_byte`, the last by `answered`

    def answered(self, usage: Usage | None, ttft_ms: float | None) -> None:
        self._desk.say(self._call.number, Answered(usage, ttft_ms))

    def failed(self, fault: Fault, why: str, report: ProbeReport | None = None) -> None:
        self._desk.say(self._call.number, Failed(fault, why, report))
