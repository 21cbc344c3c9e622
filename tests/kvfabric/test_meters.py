"""What a node measures: bytes over the time in which any moved, told when it has changed."""

from __future__ import annotations

import pytest

from kvfabric.daemon.meters import KEPT, Meters
from kvfabric.store.meter import Meter

MIB = 1 << 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_moves_that_overlap_count_once_in_time(clock: Clock) -> None:
    meter = Meter(clock)
    for _ in range(4):
        meter.begin()
    clock.now = 0.5
    for _ in range(4):
        meter.end(MIB)
    clock.now = 100.0  # nothing moved meanwhile
    meter.begin()
    clock.now += 0.5
    meter.end(4 * MIB)
    assert meter.bytes_per_s == pytest.approx(8 * MIB)
    assert meter.num_sights == 2


def test_what_did_not_come_took_time_all_the_same(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin()
    meter.begin()
    clock.now = 1.0
    meter.end(0)
    meter.end(MIB)
    assert meter.bytes_per_s == pytest.approx(MIB)


def test_where_something_always_moves_a_rate_comes_of_it(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin()
    for _ in range(30):
        meter.begin()
        clock.now += 0.1
        meter.end(MIB)
    assert meter.num_sights == 2
    assert meter.bytes_per_s == pytest.approx(10 * MIB, rel=0.05)


def test_a_rate_follows_what_changes_and_small_moves_say_nothing(clock: Clock) -> None:
    meter = Meter(clock)
    for _ in range(50):
        meter.saw(100 * MIB, 1.0)
    meter.saw(4096, 10.0)
    assert meter.bytes_per_s == pytest.approx(100 * MIB)
    for _ in range(20):
        meter.saw(10 * MIB, 1.0)
    assert meter.bytes_per_s == pytest.approx(10 * MIB, rel=0.15)


def test_an_engines_load_is_from_the_answer_to_its_confirmation(clock: Clock) -> None:
    meters = Meters(Meter(clock), clock)
    meters.located((b"s", "r", 0, 0), MIB)
    meters.located((b"s", "r", 0, 1), 3 * MIB)
    clock.now = 0.5
    meters.confirmed((b"s", "r", 0, 0), is_good=True)
    meters.confirmed((b"s", "r", 0, 1), is_good=False)  # part of it was not good: no rate
    meters.confirmed((b"s", "unknown", 0, 0), is_good=True)
    assert meters.host.num_sights == 1
    assert meters.host.bytes_per_s == pytest.approx(2 * MIB)


def test_loads_that_nobody_confirms_are_forgotten(clock: Clock) -> None:
    meters = Meters(Meter(clock), clock)
    for number in range(3 * KEPT):
        meters.located((b"s", f"r{number}", 0, 0), MIB)
    assert len(meters._located) == KEPT


def test_only_what_changed_is_news_and_then_all_is_told(clock: Clock) -> None:
    meters = Meters(Meter(clock), clock)
    assert meters.news() == []
    meters.host.saw(100 * MIB, 1.0)
    meters.peer("n2").saw(10 * MIB, 1.0)
    assert [(rate.tier, rate.peer) for rate in meters.news()] == [("host", ""), ("peer", "n2")]
    meters.host.saw(102 * MIB, 1.0)
    assert meters.news() == []
    for _ in range(10):
        meters.host.saw(200 * MIB, 1.0)
    assert len(meters.news()) == 2
