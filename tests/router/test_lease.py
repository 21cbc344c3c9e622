"""An epoch lease ends by its own clock, counted from before the renewal was sent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvfabric.registry.lease import EpochLease, boottime
from kvfabric.registry.state import RegistryState
from tests.router.standin import REGISTRY_ID, registry_state


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lease(clock: Clock) -> EpochLease:
    return EpochLease(clock)


STATE = registry_state(version=5)


def renew(lease: EpochLease, sent_at: float, *, version: int = 5, who: bytes = REGISTRY_ID) -> None:
    lease.renewed(sent_at=sent_at, registry_id=who, ttl_s=2.0, version=version)


def test_there_is_no_lease_before_the_first_renewal(lease: EpochLease) -> None:
    assert not lease.allows(STATE)


def test_a_lease_lasts_from_the_sending_of_its_renewal(lease: EpochLease, clock: Clock) -> None:
    clock.now = 1001.5  # the answer took 1.5 s
    renew(lease, 1000.0)
    assert lease.allows(STATE)
    clock.now = 1001.999
    assert lease.allows(STATE)
    clock.now = 1002.0
    assert not lease.allows(STATE)


def test_a_renewal_extends_it(lease: EpochLease, clock: Clock) -> None:
    renew(lease, 1000.0)
    renew(lease, 1001.0)
    clock.now = 1002.9
    assert lease.allows(STATE)


def test_a_late_answer_does_not_shorten_it(lease: EpochLease, clock: Clock) -> None:
    renew(lease, 1001.0)
    renew(lease, 1000.0)
    clock.now = 1002.5
    assert lease.allows(STATE)


def test_a_state_older_than_the_registrys_is_not_acted_on(lease: EpochLease) -> None:
    renew(lease, 1000.0, version=6)
    assert not lease.allows(STATE)
    assert lease.allows(replace(STATE, version=6))
    renew(lease, 1000.0, version=5)  # an answer that was overtaken
    assert not lease.allows(STATE)


def test_no_state_or_another_registrys_is_not_acted_on(lease: EpochLease) -> None:
    renew(lease, 1000.0)
    assert not lease.allows(None)
    assert not lease.allows(RegistryState(registry_id=b"x" * 16, version=9))


def test_another_registry_is_not_trusted_for_two_lease_times(
    lease: EpochLease, clock: Clock
) -> None:
    other = replace(STATE, registry_id=b"x" * 16, version=1)
    renew(lease, 1000.0)
    renew(lease, 1000.0, version=1, who=b"x" * 16)
    assert not lease.allows(STATE)
    assert not lease.allows(other)
    clock.now = 1003.9
    renew(lease, 1003.9, version=1, who=b"x" * 16)
    assert not lease.allows(other)
    clock.now = 1004.0
    assert lease.allows(other)


def test_another_registry_that_grants_nothing_yet_is_not_trusted_earlier(
    lease: EpochLease, clock: Clock
) -> None:
    """The first renewal there is behind, so it grants 0 s: the old registry's leases run all the same."""
    other = replace(STATE, registry_id=b"x" * 16, version=6)
    renew(lease, 1000.0)
    lease.renewed(sent_at=1000.0, registry_id=b"x" * 16, ttl_s=0.0, version=6)
    clock.now = 1000.1
    renew(lease, 1000.1, version=6, who=b"x" * 16)
    assert not lease.allows(other)
    clock.now = 1004.0
    renew(lease, 1004.0, version=6, who=b"x" * 16)
    assert lease.allows(other)


def test_the_clock_runs_on_while_the_machine_sleeps() -> None:
    assert boottime() > 0
