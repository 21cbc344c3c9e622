"""Whose bytes count, and who has to give way."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.registry.state import Tenant, TenantLimits, TierQuota
from kvfabric.store.quota import TierAccounts
from kvfabric.types import PUBLIC_TENANT, TenantId

A, B, C = (TenantId(name) for name in ("t-a", "t-b", "t-c"))


def accounts(**quotas: TierQuota) -> TierAccounts:
    made = TierAccounts(1000, lambda tenant: tenant.host)
    tenants = {TenantId(f"t-{name}"): quota for name, quota in quotas.items()}
    made.configure(
        {tenant: Tenant(tenant, tenant, host=quota) for tenant, quota in tenants.items()}
    )
    return made


def test_reserved_ready_and_draining_bytes_all_count() -> None:
    made = accounts()
    slot = made.slot(A)
    vector = np.array([slot, slot], dtype=np.uint32)
    made.add("reserved", vector, 100)
    made.add("ready", vector, np.array([1, 2]))
    made.accounts[slot].detached = 40
    assert made.accounts[slot].used == made.used == 243
    assert made.over_capacity(800) == 43
    made.add("reserved", vector, -100)
    assert made.accounts[slot].reserved == 0


def test_the_hard_maximum_bounds_what_may_be_reserved() -> None:
    made = accounts(a=TierQuota(max_bytes=300))
    account = made.accounts[made.slot(A)]
    account.ready = 250
    assert made.over_maximum(made.slot(A), 100) == 50
    account.reserved = 300
    assert made.room_to_reserve(made.slot(A)) == 0


def test_reserved_bytes_leave_every_floor_untouched() -> None:
    made = accounts(a=TierQuota(floor_bytes=300), b=TierQuota())
    made.accounts[made.slot(B)].reserved = 650
    assert made.room_to_reserve(made.slot(B)) == 50
    assert made.room_to_reserve(made.slot(A)) == 350


def test_floors_beyond_nine_tenths_shrink_together() -> None:
    made = accounts(a=TierQuota(floor_bytes=900), b=TierQuota(floor_bytes=900))
    assert [account.floor_bytes for account in made.accounts] == [450, 450]


def test_the_one_furthest_above_its_budget_goes_first() -> None:
    made = accounts(a=TierQuota(floor_bytes=400), b=TierQuota(), c=TierQuota())
    for tenant, ready in ((A, 500), (B, 300), (C, 200)):
        made.accounts[made.slot(tenant)].ready = ready
    assert made.by_excess() == [made.slot(B), made.slot(C), made.slot(A)]
    assert made.above_floor(made.slot(A)) == 100


def test_leases_above_the_floor_have_a_share_of_the_tier_and_public_ones_have_no_bound() -> None:
    made = accounts(a=TierQuota(floor_bytes=50))
    account = made.accounts[made.slot(A)]
    account.leased, account.lapsed = 60, 30
    assert made.room_to_lease(made.slot(A), 0.1) == 60
    account.detached = 100
    assert made.room_to_lease(made.slot(A), 0.1) == 0
    assert made.room_to_lease(made.slot(PUBLIC_TENANT), 0.1) == 1000


def test_a_lease_budget_is_above_neither_share_nor_itself() -> None:
    made = TierAccounts(1000, lambda tenant: tenant.host)
    limits = TenantLimits(lease_max_bytes=70)
    made.configure({A: Tenant(A, A, host=TierQuota(floor_bytes=50), limits=limits)})
    account = made.accounts[made.slot(A)]
    account.leased = 60
    assert made.room_to_lease(made.slot(A), 0.1) == 10
    made.configure({A: Tenant(A, A, host=TierQuota(floor_bytes=50))})
    assert made.room_to_lease(made.slot(A), 0.1) == 90


def test_a_strict_partition_gives_each_tenant_what_no_other_can_move() -> None:
    made = TierAccounts(6400, lambda tenant: tenant.host, strict=True)
    quotas = {A: TierQuota(floor_bytes=1000), B: TierQuota(), C: TierQuota(max_bytes=500)}
    made.configure({name: Tenant(name, name, host=quota) for name, quota in quotas.items()})
    rooms = {account.tenant: account.max_bytes for account in made.accounts}
    assert rooms == {A: 2766, B: 1766, C: 500}, "a floor, and a third of 63/64 of the rest"
    before = {name: made.room_to_reserve(made.slot(name)) for name in (B, C)}
    made.accounts[made.slot(A)].reserved = rooms[A]
    assert {name: made.room_to_reserve(made.slot(name)) for name in (B, C)} == before
    assert made.room_to_reserve(made.slot(A)) == 0
    stranger = made.slot(TenantId("t-unknown"))
    assert made.accounts[stranger].max_bytes == 0
    gone = {A: Tenant(A, A, is_offboarded=True), B: Tenant(B, B)}
    made.configure(gone)
    assert made.accounts[made.slot(B)].max_bytes == 6300
    assert made.over_maximum(made.slot(A), 0) == rooms[A]


steps = st.tuples(
    st.sampled_from(["reserve", "pin", "unpin"]), st.integers(0, 2), st.integers(1, 999)
)


@given(
    floors=st.lists(st.integers(0, 300), min_size=3, max_size=3), log=st.lists(steps, max_size=20)
)
def test_whatever_is_reserved_and_pinned_every_floor_can_be_had(
    floors: list[int], log: list[tuple[str, int, int]]
) -> None:
    made = TierAccounts(1000, lambda tenant: tenant.host)
    limits = TenantLimits(pin_max_bytes=800)
    made.configure(
        {
            name: Tenant(name, name, host=TierQuota(floor_bytes=floor), limits=limits)
            for name, floor in zip((A, B, C), floors, strict=True)
        }
    )
    for what, slot, amount in log:
        account = made.accounts[slot]
        if what == "reserve":
            account.reserved += min(amount, made.room_to_reserve(slot))
        else:
            change = min(amount, made.room_to_pin(slot)) if what == "pin" else -account.pinned
            account.pinned += change
            account.pinned_idle += change
            account.ready += change
        for other in made.accounts:
            own = made.slot(other.tenant)
            assert made.over_pin_budget(own) <= 0
            left = other.floor_bytes - other.unevictable
            assert made.room_to_reserve(own) >= left
    assert sum(account.unevictable for account in made.accounts) <= 1000


def test_pins_within_a_floor_take_nothing_from_those_above_others() -> None:
    made = accounts(a=TierQuota(floor_bytes=400), b=TierQuota())
    a, b = made.slot(A), made.slot(B)
    for account in made.accounts:
        account.pin_max_bytes = 1000
    made.accounts[a].pinned = made.accounts[a].pinned_idle = 400
    assert made.room_to_pin(b) == 300  # half of what the floor leaves
    made.accounts[b].pinned = made.accounts[b].pinned_idle = 300
    assert (made.room_to_pin(a), made.room_to_pin(b)) == (0, 0)
    assert made.room_to_reserve(b) == 300
