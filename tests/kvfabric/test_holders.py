from __future__ import annotations

import pytest

from kvfabric.errors import Conflict, Overloaded
from kvfabric.registry import holders as holders_module
from kvfabric.registry.holders import PREVIOUS_LIFE, Ack, Holders

TTL_S = 2.0


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def settled(kind: type[Holders] = Holders) -> tuple[Holders, Clock]:
    """Holders of a node that has been up long enough to know every lease."""
    clock = Clock()
    holders = kind(ttl_s=TTL_S, clock=clock)
    clock.now += 10
    return holders, clock


def test_a_round_ends_when_every_holder_has_applied_the_change() -> None:
    holders, clock = settled()
    holders.renew("r1", "router", 1, 1)
    holders.renew("r2", "router", 1, 1)
    current = holders.begin(2)
    assert holders.wait_s(current) == pytest.approx(TTL_S + 0.5)
    clock.now += 0.1
    holders.renew("r1", "router", 2, 2)
    assert holders.wait_s(current) is not None
    clock.now += 0.1
    holders.renew("r2", "router", 2, 2)
    assert holders.wait_s(current) is None
    assert [(ack.holder_id, ack.waited_out) for ack in current.acks] == [
        ("r1", False),
        ("r2", False),
    ]
    assert [ack.at - 1010 for ack in current.acks] == pytest.approx([0.1, 0.2])


def test_a_silent_holder_is_waited_out_for_its_lease_and_half_a_second() -> None:
    holders, clock = settled()
    holders.renew("r1", "router", 1, 1)
    clock.now += 1.5
    current = holders.begin(2)
    assert holders.wait_s(current) == pytest.approx(1.0)
    clock.now += 0.99
    assert holders.wait_s(current) is not None
    clock.now += 0.02
    assert holders.wait_s(current) is None
    assert [(ack.holder_id, ack.waited_out) for ack in current.acks] == [("r1", True)]


def keeps_renewing_behind(holders: Holders, clock: Clock) -> bool:
    """A holder that renews in time but applies nothing: has its lease run out when a round ends?"""
    ends = clock.now + holders.renew("r1", "router", 1, 1)
    current = holders.begin(2)
    for _ in range(20):
        if (wait_s := holders.wait_s(current)) is None:
            return clock.now >= ends
        clock.now += min(0.4, wait_s)
        granted = holders.renew("r1", "router", 1, 2)
        ends = max(ends, clock.now + granted)
    return False


def test_a_holder_that_is_behind_cannot_lengthen_its_lease() -> None:
    holders, clock = settled()
    assert keeps_renewing_behind(holders, clock)


def test_without_that_rule_it_would_serve_the_old_state_after_the_round() -> None:
    class Generous(Holders):
        def renew(self, holder_id: str, kind: str, applied: int, newest: int) -> float:
            del newest
            return super().renew(holder_id, kind, applied, applied)

    holders, clock = settled(Generous)
    assert not keeps_renewing_behind(holders, clock)


def test_leases_of_the_nodes_previous_life_are_waited_out() -> None:
    clock = Clock()
    holders = Holders(ttl_s=TTL_S, clock=clock)
    clock.now += 1.0
    current = holders.begin(2)
    assert holders.wait_s(current) == pytest.approx(1.5)
    clock.now += 1.5
    assert holders.wait_s(current) is None
    assert current.acks == [Ack(PREVIOUS_LIFE, "unknown", 1002.5, waited_out=True)]
    assert holders.wait_s(holders.begin(3)) is None


def test_a_holder_that_has_the_change_already_is_not_waited_for() -> None:
    holders, _ = settled()
    holders.renew("r1", "router", 2, 2)
    current = holders.begin(2)
    assert holders.wait_s(current) is None
    assert [ack.waited_out for ack in current.acks] == [False]


def test_holders_of_long_ago_are_forgotten() -> None:
    holders, clock = settled()
    holders.renew("r1", "router", 1, 1)
    clock.now += TTL_S + 0.6
    assert holders.wait_s(holders.begin(2)) is None


def test_a_holder_that_saw_a_newer_registry_reveals_an_old_copy() -> None:
    holders, _ = settled()
    with pytest.raises(Conflict, match="old copy"):
        holders.renew("r1", "router", 7, 6)


def test_holders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders_module, "MAX_HOLDERS", 2)
    holders, clock = settled()
    holders.renew("r1", "router", 1, 1)
    holders.renew("r2", "router", 1, 1)
    with pytest.raises(Overloaded):
        holders.renew("r3", "router", 1, 1)
    clock.now += TTL_S + 0.6
    assert holders.renew("r3", "router", 1, 1) == TTL_S


def test_two_rounds_at_once_end_each_on_its_own() -> None:
    holders, _ = settled()
    holders.renew("r1", "router", 1, 1)
    first, second = holders.begin(2), holders.begin(3)
    holders.renew("r1", "router", 2, 3)
    assert holders.wait_s(first) is None
    assert holders.wait_s(second) is not None
    holders.end(first)
    holders.renew("r1", "router", 3, 3)
    assert holders.wait_s(second) is None
