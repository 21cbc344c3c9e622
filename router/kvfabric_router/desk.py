"""What stands between HTTP and the decisions: the proxy asks a desk where a call goes, and tells it what came
of that.

There are two: that of the process that decides (`local_desk.py`), and a worker's, which asks that process
(`worker_desk.py`). An attempt is accounted for from its `with` statement on until that block ends, however it
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from kvfabric_router.api import ModelRequest, Usage
from kvfabric_router.fleet import ProbeReport

_log = logging.getLogger(__name__)


class Fault(enum.StrEnum):
    """Why an attempt came to nothing. Of BROKE_OFF the client has seen a part."""

    BUSY = "busy"
    LOST = "lost"
    SESSION = "session"
    BROKE_OFF = "broke_off"


class Asked(Protocol):
    """A client's request. `result` is how it ended, where the status of the answer does not tell."""

    @property
    def request_id(self) -> str: ...

    @property
    def request(self) -> ModelRequest: ...

    result: str


class Attempt(Protocol):
    """One call at one engine. Enter it before anything is awaited."""

    @property
    def endpoint(self) -> str: ...

    @property
    def engine_id(self) -> str: ...

    @property
    def session(self) -> bytes: ...

    @property
    def has_handle(self) -> bool: ...

    @property
    def body(self) -> bytes: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def unless_lost(self) -> asyncio.Timeout:
        """Around the wait for the engine's answer. Raises TimeoutError once the engine is given up."""

    def sent(self) -> None:
        """The request is on its way."""

    def first_byte(self, after_s: float) -> None:
        """Of an answer that is no error; `after_s` the request arrived."""

    def piece(self) -> None:
        """A piece of a streamed answer arrived."""

    def answered(self, usage: Usage | None, ttft_ms: float | None) -> None:
        """The answer is whole; `ttft_ms` is None if it came in one piece."""

    def failed(self, fault: Fault, why: str, report: ProbeReport | None = None) -> None:
        """It came to nothing. `report`: what the engine of a session that is no more says of itself."""


def unless(when_lost: Callable[[Callable[[], None]], bool]) -> asyncio.Timeout:
    """A timeout that ends once what `when_lost` is given is called; at once if that returns true."""
    limit = asyncio.timeout(None)

    def lost() -> None:
        with contextlib.suppress(RuntimeError):  # that wait has ended
            limit.reschedule(asyncio.get_running_loop().time())

    return asyncio.timeout(0) if when_lost(lost) else limit


C_contra = TypeVar("C_contra", bound=Asked, contravariant=True)


class Desk(Protocol[C_contra]):
    async def admit(self, call: C_contra) -> Attempt:
        """Where it goes, once there is room; never twice to an engine that failed on it. Raises ApiError."""
