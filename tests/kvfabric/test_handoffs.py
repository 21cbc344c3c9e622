"""What nodes know of a prompt that one engine computes for another: how long it is worth waiting for."""

from __future__ import annotations

import asyncio

from kvfabric.daemon.handoffs import IDLE_S, MAX_KEPT, MAX_WAIT_S, OPEN_S, Handoffs
from kvfabric.handle import Handoff
from kvfabric.types import SessionId, TenantId

TENANT = TenantId("t")
P, D = SessionId(b"p" * 16), SessionId(b"d" * 16)
NAME = (TENANT, "h")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def handoffs(node: str = "a") -> tuple[Handoffs, Clock]:
    clock = Clock()
    return Handoffs(node, clock=clock), clock


def computes(known: Handoffs, request: str = "r", session: SessionId = P) -> None:
    known.opened(session, request, TENANT, Handoff("h", "a"), "handle")


def waits(known: Handoffs, wait_ms: int = 5000, node: str = "a") -> None:
    known.opened(D, "w", TENANT, Handoff("h", node, wait_ms), "handle")


def test_more_may_come_while_a_request_computes_it() -> None:
    known, clock = handoffs()
    assert known.may_come(NAME, since=100.0)  # it may still open it
    clock.now += OPEN_S
    assert not known.may_come(NAME, since=100.0)
    computes(known)
    clock.now += 3600
    assert known.may_come(NAME, since=100.0)
    known.released(P, ["r"])
    assert known.may_come(NAME, since=100.0)  # vLLM opens one for each save
    clock.now += IDLE_S
    assert not known.may_come(NAME, since=100.0)
    assert len(known) == 0


def test_several_requests_compute_one() -> None:
    known, clock = handoffs()
    computes(known, "r1")
    computes(known, "r2")
    known.released(P, ["r1"])
    clock.now += 2 * IDLE_S
    assert known.may_come(NAME, since=100.0)
    known.session_ended(P)
    clock.now += IDLE_S
    assert not known.may_come(NAME, since=100.0)


def test_another_tenants_is_another() -> None:
    known, clock = handoffs()
    computes(known)
    clock.now += OPEN_S
    assert not known.may_come((TenantId("other"), "h"), since=100.0)
    waits(known)
    known.ended((TenantId("other"), "h"))
    awaited = known.awaited(D, "w")
    assert awaited is not None
    assert known.is_awaited(awaited)


def test_a_wait_ends_by_whatever_comes_first() -> None:
    for ending in ("deadline", "router", "blocks", "prefill"):
        known, clock = handoffs()
        computes(known)
        waits(known)
        awaited = known.awaited(D, "w")
        assert awaited is not None
        assert known.is_awaited(awaited)
        if ending == "deadline":
            clock.now += 5.0
        elif ending == "router":
            known.ended(NAME)
        elif ending == "blocks":
            known.over(awaited)
        else:
            known.session_ended(P)
            clock.now += IDLE_S
        assert not known.is_awaited(awaited), ending


def test_what_another_node_computes_is_not_judged_here() -> None:
    known, clock = handoffs("b")
    waits(known)
    awaited = known.awaited(D, "w")
    assert awaited is not None
    clock.now += 2 * OPEN_S
    assert known.is_awaited(awaited)


def test_no_wait_is_longer_than_the_most() -> None:
    known, clock = handoffs("b")
    waits(known, wait_ms=10**9)
    awaited = known.awaited(D, "w")
    assert awaited is not None
    clock.now += MAX_WAIT_S
    assert not known.is_awaited(awaited)


def test_what_is_kept_is_bounded() -> None:
    known, _ = handoffs()
    for number in range(2 * MAX_KEPT):
        handoff = Handoff(f"h{number}", "a", number % 2)
        known.opened(P, f"r{number}", TENANT, handoff, "handle")
    assert len(known) <= 2 * MAX_KEPT
    known.session_ended(P)
    assert len(known) == 0


async def test_more_answers_when_there_is_more() -> None:
    known = Handoffs("a")
    computes(known)
    waits(known)
    awaited = known.awaited(D, "w")
    assert awaited is not None
    here = 2

    async def more(beyond: int, wait_s: float = 5.0) -> bool:
        return await known.more(awaited, lambda: here, beyond=beyond, wanted=4, wait_s=wait_s)

    assert await more(1)
    assert await more(2, wait_s=0.01)  # nothing new, and not over
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(more(2))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        here = 3
        known.news.tell()
    assert waiting.result()
    here = 4
    assert not await more(3)  # that is all


async def test_a_release_while_it_is_waited_for() -> None:
    """The request that waits is gone: whoever asked for it is answered at once."""
    known = Handoffs("b")
    waits(known, node="a")
    awaited = known.awaited(D, "w")
    assert awaited is not None
    async with asyncio.timeout(1.0), asyncio.TaskGroup() as group:
        waiting = group.create_task(known.more(awaited, lambda: 0, beyond=0, wanted=4, wait_s=5.0))
        await asyncio.sleep(0.01)
        known.released(D, ["w"])
    assert not waiting.result()
