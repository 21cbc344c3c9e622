"""The deciding process's end of one worker's channel: each call that the worker has is a task here.

What a worker tells is believed as far as its own calls go. When its channel ends, for whatever reason, its
calls end with it: nothing of them stays accounted for.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

import msgspec

from kvfabric.registry.state import Tenant
from kvfabric_router import api
from kvfabric_router.api import ApiError
from kvfabric_router.dispatch import Call
from kvfabric_router.local_desk import LocalAttempt, LocalDesk
from kvfabric_router.worker_channel import (
    Answered,
    Ask,
    Channel,
    End,
    Failed,
    First,
    FromWorker,
    Go,
    Knock,
    Lost,
    Next,
    Open,
    Ready,
    Refused,
    Sent,
    Welcome,
)

_log = logging.getLogger(__name__)


class Door(Protocol):
    """Who may ask, and who has asked: what every front of the router shares."""

    def enter(self, authorization: str | None) -> Tenant:
        """Raises ApiError 401, 429 or 503."""

    def again(self, authorization: str | None) -> Tenant:
        """Of one who entered, once its body is there: the key may be revoked meanwhile. Raises ApiError."""

    def left(self, tenant: str, result: str) -> None:
        """A request has ended."""


@dataclass(slots=True, eq=False)
class _Served:
    """One call of the worker. `refused`: it may not ask."""

    opened: Open
    tenant: str = ""
    refused: ApiError | None = None
    task: asyncio.Task[None] | None = None
    attempt: LocalAttempt | None = None
    next: asyncio.Event | None = None


class WorkerLink(Channel[FromWorker]):
    """See the module. `ready` is set once the worker accepts connections. `group` owns the calls' tasks."""

    def __init__(self, desk: LocalDesk, door: Door, group: asyncio.TaskGroup) -> None:
        super().__init__(msgspec.msgpack.Decoder(FromWorker))
        self._group = group
        self.ready = asyncio.Event()
        self._desk = desk
        self._door = door
        self._calls: dict[int, _Served] = {}

    def __repr__(self) -> str:
        return f"<WorkerLink {len(self._calls)} calls>"

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def over(self) -> None:
        for number in list(self._calls):
            self._end(number, "disconnected")

    def heard(self, number: int, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.ready.set()
        elif isinstance(message, Open):
            self._open(number, message)
        elif number in self._calls:
            self._of_call(number, self._calls[number], message)

    def _open(self, number: int, message: Open) -> None:
        served = self._calls[number] = _Served(message)
        try:
            served.tenant = self._door.enter(message.authorization).tenant_id
        except ApiError as exc:
            served.refused = exc

    def _of_call(self, number: int, served: _Served, message: FromWorker) -> None:
        attempt = served.attempt
        if isinstance(message, End):
            self._end(number, message.result)
        elif isinstance(message, Knock | Ask) and served.refused is not None:
            self.say(number, _refused(served.refused))
        elif isinstance(message, Knock):
            self.say(number, Welcome())
        elif isinstance(message, Ask):
            if served.task is None:
                served.task = self._group.create_task(self._serve(number, served, message))
        elif isinstance(message, Next):
            if served.next is not None:
                served.next.set()
        elif attempt is not None:
            _tell(attempt, message)

    def _end(self, number: int, result: str) -> None:
        served = self._calls.pop(number)
        if served.task is not None:
            served.task.cancel()
        self._door.left(served.tenant, result)

    async def _serve(self, number: int, served: _Served, ask: Ask) -> None:
        """Until the worker ends it, which cancels this."""
        try:
            call = Call(
                request_id=served.opened.request_id,
                tenant=self._door.again(served.opened.authorization),
                request=api.parse(ask.path, ask.raw),
                no_store=ask.no_store,
                no_read=ask.no_read,
                ttft_ms=ask.ttft_ms,
            )
            while True:
                served.next = asyncio.Event()
                with await self._desk.admit(call) as attempt:
                    if attempt.flight.when_lost(lambda: self.say(number, Lost())):
                        self.say(number, Lost())
                    served.attempt = attempt
                    self.say(
                        number,
                        Go(
                            attempt.endpoint,
                            attempt.engine_id,
                            attempt.session,
                            dict(attempt.plan.fields),
                        ),
                    )
                    await served.next.wait()
                    served.attempt = None
        except ApiError as exc:
            self.say(number, _refused(exc))
        except Exception:  # noqa: BLE001 - a fault in one call is no other's
            _log.exception("request %s", served.opened.request_id)
            self.say(number, _refused(ApiError(500, "The router failed on this request.")))


def _tell(attempt: LocalAttempt, message: FromWorker) -> None:
    if isinstance(message, Sent):
        attempt.sent()
    elif isinstance(message, First):
        attempt.first_byte(message.after_s)
        if message.is_stream:
            attempt.piece()
    elif isinstance(message, Answered):
        if message.ttft_ms is not None:
            attempt.piece()
        attempt.answered(message.usage, message.ttft_ms)
    elif isinstance(message, Failed):
        attempt.failed(message.fault, message.why, message.report)


def _refused(error: ApiError) -> Refused:
    return Refused(error.status, str(error), error.reason, error.param, error.retry_after_s)
