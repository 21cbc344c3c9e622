"""Who waits at the router goes in a fair order, to an engine with room, and a full queue stays bounded."""

from __future__ import annotations

from kvfabric_router.hold import (
    QUANTUM_TOKENS,
    DemandOf,
    Held,
    HoldQueue,
    has_room,
    newcomers_view,
    next_to_go,
)
from kvfabric_router.policy import Candidate, EngineView, Ranked, costs


def held(tenant: str, item: str, *, since: float = 0.0, tokens: int = 1000) -> Held[str]:
    return Held(tenant, since, item, endpoint="a", tokens=tokens, service_ms=tokens / 10)


def queue_of(*some: Held[str], max_held: int = 100) -> HoldQueue[str]:
    queue = HoldQueue[str](max_held=max_held)
    for one in some:
        queue.add(one)
    return queue


def drain(queue: HoldQueue[str], number: int, now: float = 1.0) -> list[Held[str]]:
    gone = []
    for _ in range(number):
        first = next(queue.in_turn(now, limit=1))
        queue.served(first)
        gone.append(first)
    return gone


def test_short_work_goes_first_but_age_wins_in_the_end() -> None:
    long, short = held("t", "long", tokens=10_000), held("t", "short", tokens=100, since=0.7)
    queue = queue_of(long, short)
    assert [one.item for one in queue.in_turn(1.0, limit=2)] == ["short", "long"]
    late = held("t", "late", tokens=100, since=99.99)
    queue = queue_of(long, late)
    assert [one.item for one in queue.in_turn(100.0, limit=2)] == ["long", "late"]


def test_a_tenant_with_many_requests_waits_behind_its_own() -> None:
    """Two tenants get the same tokens, whoever asks more and in whatever sizes."""
    greedy = [held("greedy", str(i), tokens=4_000) for i in range(60)]
    modest = [held("modest", str(i), tokens=1_000, since=0.5) for i in range(60)]
    gone = drain(queue_of(*greedy, *modest), 40)
    tokens = {
        name: sum(one.tokens for one in gone if one.tenant == name) for name in ("greedy", "modest")
    }
    assert abs(tokens["greedy"] - tokens["modest"]) <= 2 * QUANTUM_TOKENS
    # The guard taken out: in order of arrival alone the greedy one takes everything.
    in_order = sorted([*greedy, *modest], key=lambda one: one.since)[:40]
    assert {one.tenant for one in in_order} == {"greedy"}


def test_what_was_used_beyond_ones_turn_is_remembered() -> None:
    queue = queue_of(held("big", "huge", tokens=100_000), held("other", "x"))
    huge = next(one for one in queue.in_turn(1.0, limit=2) if one.tenant == "big")
    queue.served(huge)
    queue.add(held("big", "again"))
    assert next(queue.in_turn(1.0, limit=1)).tenant == "other"


def test_a_full_queue_refuses_who_holds_most() -> None:
    mine = [held("greedy", str(i), since=i) for i in range(4)]
    queue = queue_of(*mine, max_held=4)
    newcomer = held("greedy", "5")
    assert queue.add(newcomer) is newcomer
    assert len(queue) == 4
    other = held("modest", "1")
    assert queue.add(other) is mine[3]
    assert len(queue) == 4
    assert other in list(queue.in_turn(5.0, limit=9))


def test_demand_follows_every_change() -> None:
    one, two = held("t", "1"), held("t", "2", tokens=500)
    queue = queue_of(one, two)
    assert (queue.demand("a").num, queue.demand("a").ms) == (2, 150.0)
    queue.turn_to(two, "b", tokens=100, service_ms=10.0)
    assert (queue.demand("a").num, queue.demand("b").ms) == (1, 10.0)
    queue.remove(one)
    queue.remove(one)
    queue.served(two)
    assert (queue.demand("a").num, queue.demand("b").num, queue.service_ms) == (0, 0, 0.0)


def engine(name: str, **fields: object) -> EngineView:
    return EngineView(name, name, "m", **fields)  # type: ignore[arg-type]


def test_room_is_shortly_before_an_engine_runs_dry() -> None:
    assert has_room(engine("a"))
    assert has_room(engine("a", num_waiting=3, waiting_ms=50.0))
    assert has_room(engine("a", num_waiting=1, waiting_ms=5_000.0))  # nothing is next there
    assert not has_room(engine("a", num_waiting=2, waiting_ms=5_000.0))


def test_a_crowd_that_wants_one_engine_spreads() -> None:
    """Those that pass count as ahead: the tenth of ten does not wait for the same engine as the first."""
    busy, idle = engine("a", num_waiting=2, waiting_ms=200.0), engine("b")
    queue = queue_of(*(held("t", str(i), tokens=2_000) for i in range(8)))

    def rank(_: Held[str], demand: DemandOf) -> Ranked:
        # At `a` half of the prompt is cached; without a queue that is worth waiting 200 ms for.
        views = [demand(busy), demand(idle)]
        tokens = {"a": 1_000, "b": 2_000}
        ranked = costs([Candidate(view, tokens[view.endpoint]) for view in views])
        return min(ranked, key=lambda one: one.terms.wait + one.terms.own_work)

    gone = next_to_go(queue, 1.0, rank)
    assert gone is not None
    assert gone.endpoint == "b"
    alone = queue_of(held("t", "alone"))
    assert next_to_go(alone, 1.0, rank) is None  # it waits for `a`


def test_a_newcomer_is_behind_all_that_wait() -> None:
    queue = queue_of(held("t", "1"), held("t", "2"))
    seen = newcomers_view(queue)(engine("a", num_waiting=1))
    assert (seen.num_held, seen.held_ms, seen.queue) == (2, 200.0, 3)
    assert newcomers_view(queue)(engine("b")).queue == 0


def test_who_cannot_be_ranked_any_more_is_passed_over() -> None:
    queue = queue_of(held("t", "1"))
    assert next_to_go(queue, 1.0, lambda held, demand: None) is None
