"""Which block gives way, seen through a store of few slots."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from kvfabric.registry.state import RegistryState, Tenant, TierQuota
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import PART_BYTES, SESSION, StoreRig, grant_of, make_keys
from kvfabric.types import BlockKey, TenantId, TierName


def resident(rig: StoreRig, keys: list[BlockKey]) -> list[bool]:
    present = {prefix for _, prefix in rig.events.present}
    return [key[:8] in present for key in keys]


def quotas(**of: TierQuota) -> RegistryState:
    tenants = {
        TenantId(f"t-{name}"): Tenant(TenantId(f"t-{name}"), name, host=quota)
        for name, quota in of.items()
    }
    return RegistryState(tenants=MappingProxyType(tenants))


async def test_leaves_go_before_their_parents() -> None:
    async with StoreRig(num_slots=8) as rig:
        chain = make_keys(8)
        await rig.put(chain)
        await rig.put(make_keys(3, seed=1))
        assert resident(rig, chain) == [True] * 5 + [False] * 3


async def test_a_stream_used_once_does_not_push_out_what_is_reused() -> None:
    async with StoreRig(num_slots=20) as rig:
        reused = make_keys(10)
        await rig.put(reused)
        assert len(await rig.get(reused)) == 10
        for seed in range(1, 15):
            await rig.put(make_keys(5, seed=seed))
        assert resident(rig, reused) == [True] * 10


async def test_a_block_that_returns_soon_after_its_eviction_is_kept_longer() -> None:
    async with StoreRig(num_slots=20) as rig:
        returning = make_keys(4)
        await rig.put(returning)
        await rig.put(make_keys(19, seed=1))
        assert not all(resident(rig, returning))
        num_blocks, reason = rig.match("look", returning)
        assert (num_blocks < 4, reason) == (True, "evicted")
        rig.store.release(SESSION, ["look"])
        await rig.put(returning)
        for seed in range(2, 10):
            await rig.put(make_keys(4, seed=seed))
        assert all(resident(rig, returning))


async def test_leased_blocks_are_never_evicted() -> None:
    async with StoreRig(num_slots=8) as rig:
        kept = make_keys(4)
        await rig.put(kept)
        assert rig.match("reader", kept)[0] == 4
        for seed in range(1, 6):
            await rig.put(make_keys(4, seed=seed))
        assert resident(rig, kept) == [True] * 4
        refused = rig.reserve("reader", make_keys(5, seed=9))
        assert list(refused.states) == [0, 0, 0, 0, 3]
        assert refused.reason == "over_quota"


async def test_over_quota_is_a_refused_store_and_own_blocks_make_room_first() -> None:
    async with StoreRig(num_slots=16) as rig:
        rig.state = quotas(a=TierQuota(max_bytes=4 * PART_BYTES))
        assert await rig.put(make_keys(8), grant=grant_of("t-a")) == 4
        other = make_keys(3, seed=1)
        assert await rig.put(other, grant=grant_of("t-b")) == 3
        fresh = make_keys(4, seed=2)
        assert await rig.put(fresh, grant=grant_of("t-a")) == 4
        assert resident(rig, other + fresh) == [True] * 7
        assert rig.store.statistics().refusals["over_quota"] == 4


@pytest.mark.parametrize("floor_slots", [6, 0], ids=["floor", "guard removed"])
async def test_nobody_is_pushed_below_its_floor(floor_slots: int) -> None:
    async with StoreRig(num_slots=16) as rig:
        rig.state = quotas(a=TierQuota(floor_bytes=floor_slots * PART_BYTES))
        guarded = make_keys(8)
        await rig.put(guarded, grant=grant_of("t-a"))
        for name in ("t-b", "t-c", "t-d", "t-e", "t-f"):
            await rig.put(make_keys(4, seed=ord(name[-1])), grant=grant_of(name))
        assert all(resident(rig, guarded[:6])) == (floor_slots == 6)


async def test_blocks_of_the_tenant_over_its_budget_go_first() -> None:
    async with StoreRig(num_slots=16) as rig:
        large, small = make_keys(12), make_keys(4, seed=1)
        await rig.put(large, grant=grant_of("t-a"))
        await rig.put(small, grant=grant_of("t-b"))
        await rig.put(make_keys(3, seed=2), grant=grant_of("t-c"))
        assert resident(rig, small) == [True] * 4
        assert sum(resident(rig, large)) == 9


async def test_rows_run_out_before_bytes_and_evicting_gives_both() -> None:
    limits = StoreLimits(host_bytes=64 * PART_BYTES, max_blocks=16, lease_share=1.0)
    async with StoreRig(limits=limits) as rig:
        for seed in range(8):
            assert await rig.put(make_keys(5, seed=seed)) == 5
        statistics = rig.store.statistics()
        assert statistics.num_blocks[TierName.HOST] <= 16
        rig.store._residency.check()


async def test_one_tenants_leases_do_not_make_anothers_request_miss() -> None:
    limits = StoreLimits(host_bytes=40 * PART_BYTES, max_blocks=64, lease_share=0.1)
    async with StoreRig(limits=limits) as rig:
        chains = {name: make_keys(8, seed=at) for at, name in enumerate(("t-a", "t-b"))}
        for name, keys in chains.items():
            await rig.put(keys, grant=grant_of(name))
        assert rig.match("a", chains["t-a"], grant_of("t-a")) == (4, "lease_budget")
        assert rig.match("b", chains["t-b"], grant_of("t-b"))[0] == 4
        again = replace(grant_of("t-a"))
        assert rig.match("a", chains["t-a"], again)[0] == 4
        assert rig.match("a2", chains["t-a"], again)[0] == 4
