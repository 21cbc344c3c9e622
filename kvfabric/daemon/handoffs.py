"""Prompts that one engine computes for another to answer: what their nodes know of it. Sync state.

    node of the prefill engine   requests that compute for somebody, and whether more of their blocks is to
                                 come: not once the last such request ended, however it did
    node of the decode engine    requests that wait for blocks, and until when

Both may be one node. Nothing here moves bytes; whoever waits looks again at each news, and none waits past
the time that the router gave in the handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvfabric.handle import Handoff
from kvfabric.types import MissReason, SessionId, TenantId

MAX_WAIT_S = 30.0
OPEN_S = 1.0
"""An engine that was sent a prompt opens it within this: between two of its steps."""
IDLE_S = 0.25
"""A prompt that no request computes any more for this long will not be: vLLM opens one for each save."""
LOOK_EVERY_S = 0.1
"""Without news: some of what ends a wait is told by nobody."""
BATCH_S = 0.002
MAX_KEPT = 4096

MAY_COME = frozenset(
    reason.value
    for reason in (MissReason.NONE, MissReason.ABSENT, MissReason.EVICTED, MissReason.PENDING)
)
"""Why a block misses that another engine is computing. What misses for any other reason does so however long
one waits."""

Name = tuple[TenantId, str]


class News:
    """Wakes all that wait whenever something happened; they look for themselves what."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Until the next news, and whatever comes with it, or until `timeout_s`."""
        event = self._event
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
                await asyncio.sleep(BATCH_S)


@dataclass(slots=True)
class _Computed:
    """One prompt. `idle_since`: no request computes it since then (monotonic seconds)."""

    requests: set[tuple[SessionId, str]] = field(default_factory=set)
    idle_since: float = 0.0


@dataclass(slots=True, eq=False)
class Awaited:
    """A request that waits. `since`, `deadline`: monotonic seconds. `is_begun`: its node follows."""

    name: Name
    node: str
    handle: str
    since: float
    deadline: float
    is_begun: bool = False
    is_over: bool = False


class Handoffs:
    """See the module. `node_id`: this node's; `clock`: monotonic seconds."""

    def __init__(self, node_id: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.news = News()
        self._node_id = node_id
        self._clock = clock
        self._computed: OrderedDict[Name, _Computed] = OrderedDict()
        self._names: dict[tuple[SessionId, str], Name] = {}
        self._awaited: OrderedDict[tuple[SessionId, str], Awaited] = OrderedDict()

    def __len__(self) -> int:
        """Requests that compute or wait now."""
        return len(self._names) + len(self._awaited)

    def opened(
        self, session: SessionId, request_id: str, tenant: TenantId, handoff: Handoff, handle: str
    ) -> None:
        """A request of an engine here has such a handle."""
        name, request = (tenant, handoff.name), (session, request_id)
        if handoff.wait_ms:
            now = self._clock()
            deadline = now + min(handoff.wait_ms / 1e3, MAX_WAIT_S)
            self._awaited[request] = Awaited(name, handoff.node, handle, now, deadline)
            if len(self._awaited) > MAX_KEPT:
                self._awaited.popitem(last=False)
            return
        self._computed.setdefault(name, _Computed()).requests.add(request)
        self._names[request] = name
        if len(self._computed) > MAX_KEPT:
            self._forget(next(iter(self._computed)))

    def released(self, session: SessionId, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            awaited = self._awaited.pop((session, request_id), None)
            if awaited is not None:
                awaited.is_over = True
            name = self._names.pop((session, request_id), None)
            known = self._computed.get(name) if name is not None else None
            if known is not None:
                known.requests.discard((session, request_id))
                known.idle_since = self._clock()
        self.news.tell()

    def session_ended(self, session: SessionId) -> None:
        """Its rights are over: it stores nothing more."""
        self.released(session, [r for s, r in [*self._names, *self._awaited] if s == session])

    def _forget(self, name: Name) -> None:
        for request in self._computed.pop(name).requests:
            self._names.pop(request, None)

    # -- where it is computed ------------------------------------------------------------------------

    def may_come(self, name: Name, since: float) -> bool:
        """Whether more blocks of it may be stored here, for somebody who waits `since` then."""
        known, now = self._computed.get(name), self._clock()
        if known is None:
            return now < since + OPEN_S
        return bool(known.requests) or now < known.idle_since + IDLE_S

    # -- where it is waited for ----------------------------------------------------------------------

    def awaited(self, session: SessionId, request_id: str) -> Awaited | None:
        return self._awaited.get((session, request_id))

    def is_here(self, awaited: Awaited) -> bool:
        """Whether an engine of this very node computes it."""
        return awaited.node == self._node_id

    def over(self, awaited: Awaited) -> None:
        """What was to come has come, or will not."""
        awaited.is_over = True
        self.news.tell()

    def ended(self, name: Name) -> None:
        """Its router says that nobody computes it any more."""
        for awaited in self._awaited.values():
            if awaited.name == name:
                awaited.is_over = True
        self.news.tell()

    def is_awaited(self, awaited: Awaited) -> bool:
        """Whether more of it may still be here in time."""
        if awaited.is_over or self._clock() >= awaited.deadline:
            return False
        return not self.is_here(awaited) or self.may_come(awaited.name, awaited.since)

    async def more(
        self,
        awaited: Awaited,
        num_here: Callable[[], int],
        *,
        beyond: int,
        wanted: int,
        wait_s: float,
    ) -> bool:
        """Wait until more than `beyond` blocks of `wanted` are here, nothing more is to come, or `wait_s`;
        whether more is to come. On cancellation: nothing happens."""
        until = min(self._clock() + min(wait_s, MAX_WAIT_S), awaited.deadline)
        while True:
            is_awaited = self.is_awaited(awaited)
            here = num_here()
            if here >= wanted or not is_awaited:
                return False
            if here > beyond or (left := until - self._clock()) <= 0:
                return True
            await self.news.wait(min(left, LOOK_EVERY_S))
