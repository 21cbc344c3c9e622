"""When a tier is left alone, and how it comes back."""

from __future__ import annotations

import logging

import pytest

from kvfabric.store.breaker import MAX_PAUSE_S, PAUSE_S, Breaker
from kvfabric.testing.store import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_one_probe_decides_after_the_pause(clock: FakeClock) -> None:
    breaker = Breaker("disk", clock)
    assert breaker.begin()
    breaker.fail("EIO")
    assert breaker.is_open
    assert not breaker.begin()
    clock.now += PAUSE_S
    assert breaker.is_half_open
    assert breaker.begin()
    assert not breaker.begin(), "until the probe has ended nobody else may"
    assert repr(breaker) == "<Breaker disk probing: EIO>"
    breaker.succeed()
    assert repr(breaker) == "<Breaker disk closed: well>"


def test_failed_probes_double_the_pause_up_to_a_minute(clock: FakeClock) -> None:
    breaker = Breaker("disk", clock)
    breaker.fail("EIO")
    pauses = []
    for _ in range(6):
        began = clock.now
        while not breaker.begin():
            clock.now += 0.5
        pauses.append(clock.now - began)
        breaker.fail("EIO again")
    assert pauses == [5, 10, 20, 40, 60, 60]
    clock.now += MAX_PAUSE_S
    breaker.begin()
    breaker.succeed()
    breaker.fail("new")
    clock.now += PAUSE_S
    assert breaker.begin(), "well once, the first pause is short again"


def test_an_abandoned_probe_leaves_it_to_the_next(clock: FakeClock) -> None:
    breaker = Breaker("disk", clock)
    breaker.fail("EIO")
    clock.now += PAUSE_S
    assert breaker.begin()
    breaker.abandon()
    assert breaker.begin()


def test_what_began_before_it_opened_decides_nothing(clock: FakeClock) -> None:
    breaker = Breaker("disk", clock)
    breaker.fail("EIO")
    breaker.succeed()
    assert breaker.is_open
    clock.now += PAUSE_S
    breaker.fail("late")
    assert breaker.is_half_open
    assert breaker.reason == "EIO"


def test_one_line_when_it_opens_and_one_when_it_closes(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    breaker = Breaker("disk", clock)
    for _ in range(3):
        breaker.fail("EIO")
    for _ in range(2):
        clock.now += MAX_PAUSE_S
        breaker.begin()
        breaker.fail("EIO")
    clock.now += MAX_PAUSE_S
    breaker.begin()
    breaker.succeed()
    breaker.succeed()
    assert caplog.messages == ["disk is out of service: EIO", "disk is back after: EIO"]
