"""Arena and SSD tier together: real segment files, real restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvfabric.errors import NoSpace, TransferError
from kvfabric.registry.state import Tenant, TenantLimits
from kvfabric.store.ssd import SsdTraffic
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import (
    PART_BYTES,
    SESSION,
    StoreRig,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.segments import SegmentTier
from kvfabric.tiers.write_budget import TenantBudgets
from kvfabric.types import DEFAULT_TENANT, Part, TenantId, TierName

KEYS = make_keys(6)
EXPECTED = [part_bytes(key) for key in KEYS]


class MoodyTier(SegmentTier):
    """The real tier, on a medium that fails when told."""

    failing = False
    full = False
    reads = 0
    gate: asyncio.Event | None = None
    waiting = 0

    async def _pass_gate(self) -> None:
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1

    async def read_into(
        self, location: Location, identity: PartIdentity, buffer: memoryview
    ) -> bytes:
        self.reads += 1
        await self._pass_gate()
        if self.failing:
            raise TransferError("EIO")
        return await super().read_into(location, identity, buffer)

    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        await self._pass_gate()
        if self.failing:
            raise TransferError("EIO")
        if self.full:
            raise NoSpace("ENOSPC")
        return await super().write(identity, payload)


@asynccontextmanager
async def rig_over(
    directory: Path, *, num_slots: int = 32, num_parts: int = 1
) -> AsyncIterator[tuple[StoreRig, MoodyTier]]:
    """One life of a daemon over `directory`."""
    tier = MoodyTier(
        directory,
        capacity_bytes=8 << 20,
        segment_bytes=1 << 20,
        clock=asyncio.get_running_loop().time,
    )
    async with tier:
        limits = StoreLimits(
            host_bytes=num_slots * PART_BYTES, ssd_bytes=8 << 20, max_blocks=256, lease_share=1.0
        )
        rig = StoreRig(limits=limits, layout=make_layout(num_parts), ssd=tier)
        async with rig:
            yield rig, tier


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not happen")


def ssd_of(rig: StoreRig) -> SsdTraffic:
    assert rig.store._ssd is not None
    return rig.store._ssd


async def store_and_seal(rig: StoreRig, *, shards: tuple[int, ...] = (0,)) -> None:
    await rig.put(KEYS, shards=shards)
    for shard in shards:
        assert len(await rig.get(KEYS, shard=shard)) == 6  # the second use admits them
    await rig.store.seal()


async def test_blocks_used_once_are_not_written(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await rig.put(KEYS)
        await rig.store.seal()
        assert rig.store.statistics().ssd_writes == 0
        await rig.get(KEYS[:4])
        await rig.get(KEYS[:4])
        await rig.store.seal()
        statistics = rig.store.statistics()
        assert (statistics.ssd_writes, statistics.num_blocks[TierName.SSD]) == (4, 4)


@pytest.mark.parametrize("num_parts", [1, 3])
async def test_a_restart_is_warm(tmp_path: Path, num_parts: int) -> None:
    shards = tuple(range(num_parts))
    async with rig_over(tmp_path, num_parts=num_parts) as (rig, _):
        await store_and_seal(rig, shards=shards)
        used = rig.store.statistics().used_bytes[TierName.SSD]
    async with rig_over(tmp_path, num_parts=num_parts) as (rig, _):
        assert rig.store.statistics().used_bytes[TierName.SSD] == used
        rig.open("r")
        matched = rig.store.match(SESSION, "r", b"".join(KEYS))
        assert (matched.num_blocks, matched.tiers) == (6, bytes([1] * 6))
        rig.store.release(SESSION, ["r"])
        for shard in shards:
            assert await rig.get(KEYS, shard=shard) == [part_bytes(key, shard) for key in KEYS]
        matched = rig.store.match(SESSION, "r", b"".join(KEYS))
        assert rig.match("r", KEYS)[0] == 6
        assert rig.store.statistics().promotions == 6 * num_parts
        assert len(rig.events.present) == 6
        rig.store._residency.check()


async def test_a_restart_knows_the_place_of_every_block(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, _):
        longer = make_keys(8)
        assert await rig.put(longer[6:], parent=longer[5]) == 2
        assert await rig.get(longer) == [part_bytes(key) for key in longer]


async def test_one_read_per_part_however_many_ask(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, tier):
        for name in ("a", "b"):
            rig.match(name, KEYS)
        located = await asyncio.gather(rig.load("a", KEYS), rig.load("b", KEYS))
        assert [rig.copy(one) for one in located] == [EXPECTED, EXPECTED]
        assert tier.reads == 6


async def test_what_was_used_is_written_before_it_is_evicted(tmp_path: Path) -> None:
    async with rig_over(tmp_path, num_slots=6) as (rig, _):
        await store_and_seal(rig)
        other = make_keys(6, seed=1)
        await rig.put(other)
        assert await rig.get(KEYS) == EXPECTED
        assert rig.store.statistics().promotions >= 5
        rig.store._residency.check()


def spoil(directory: Path, needle: bytes) -> None:
    """Flip a byte of the payload in whatever segment has it."""
    for path in directory.rglob("*"):
        if path.is_file() and needle in (data := path.read_bytes()):
            with path.open("r+b") as file:
                file.seek(data.index(needle) + 100)
                file.write(bytes([data[data.index(needle) + 100] ^ 1]))
            return
    raise AssertionError("not on the medium")


async def test_a_corrupt_record_is_a_miss_and_is_gone(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    spoil(tmp_path, EXPECTED[2])
    async with rig_over(tmp_path) as (rig, _):
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        assert (located.num_blocks, located.reason) == (2, "corrupt")
        rig.store.release(SESSION, ["r"])
        assert rig.match("r2", KEYS)[0] == 2
        assert rig.store.statistics().corrupt == 1
        assert rig.store.statistics().num_blocks[TierName.SSD] == 5
        rig.store._residency.check()


async def test_an_error_is_a_miss_and_the_tier_returns_by_itself(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, tier):
        tier.failing = True
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        assert (located.num_blocks, located.reason) == (0, "tier_down")
        rig.store.release(SESSION, ["r"])
        assert rig.match("r", KEYS) == (0, "tier_down")
        assert rig.store.degraded(TierName.SSD) == {"SSD reading": "EIO"}
        tier.failing = False
        rig.clock.now += 5
        assert await rig.get(KEYS) == EXPECTED
        assert rig.store.degraded(TierName.SSD) == {}
        assert rig.store.statistics().ssd_errors == 6
        assert rig.arena.free_bytes == rig.arena.size_bytes - 6 * PART_BYTES


async def test_the_tier_returns_without_anybody_asking(tmp_path: Path) -> None:
    """Half open, the store itself reads a part: nobody's request has to be the probe."""
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, tier):
        tier.failing = True
        rig.match("r", KEYS)
        await rig.load("r", KEYS)
        rig.store.release(SESSION, ["r"])
        rig.clock.now += 5
        await eventually(lambda: tier.reads > 6)  # the probe of the housekeeping
        assert rig.store.degraded(TierName.SSD)
        tier.failing = False
        rig.clock.now += 9
        await asyncio.sleep(0.6)
        assert rig.store.degraded(TierName.SSD), "after a failed probe the pause is longer"
        rig.clock.now += 1
        await eventually(lambda: not rig.store.degraded(TierName.SSD))
        assert rig.match("r", KEYS)[0] == 6


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "guard removed"])
async def test_a_late_read_is_a_miss_and_its_slot_drains_until_it_ends(
    tmp_path: Path, guarded: bool
) -> None:
    """A device that is late still writes where it was told to. Given away at the deadline (the twin), that
    slot gets another block's bytes under it."""
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path, num_slots=8) as (rig, tier):
        ssd, residency = rig.store._ssd, rig.store._residency
        assert ssd is not None
        ssd._deadline_s = 0.1
        tier.gate = asyncio.Event()
        rig.match("r", KEYS[:2])
        began = asyncio.get_running_loop().time()
        located = await rig.load("r", KEYS[:2])
        assert (located.num_blocks, located.reason) == (0, "tier_down")
        assert asyncio.get_running_loop().time() - began < 2
        assert rig.store.statistics().draining_bytes == 2 * PART_BYTES
        assert rig.store.statistics().reserved_bytes == 0
        assert "not done after 0.1 s" in rig.store.degraded(TierName.SSD)["SSD reading"]
        residency.check()
        rig.store.release(SESSION, ["r"])
        if not guarded:
            in_use = np.flatnonzero(~free_pages(rig)).astype(np.uint32)
            rig.arena.free(in_use, PART_BYTES)
            residency.host.accounts[0].detached = 0
        others = make_keys(8, seed=1)
        assert await rig.put(others) == (6 if guarded else 8)
        rig.match("o", others)
        located = await rig.load("o", others)
        if not guarded:
            residency.host.accounts[0].detached = 2 * PART_BYTES
        tier.gate.set()
        await eventually(lambda: not tier.waiting and ssd.counts["promotions"] == 2)
        copies = rig.copy(located, verify=False)
        right = copies == [part_bytes(key) for key in others[: len(copies)]]
        assert right == guarded
        if guarded:
            assert rig.store.statistics().draining_bytes == 0
            residency.check()
            rig.store.release(SESSION, ["o"])
            assert rig.match("r2", KEYS[:2])[0] == 2  # what came late is of use to the next


def free_pages(rig: StoreRig) -> npt.NDArray[np.bool_]:
    """Which pages of the arena nobody has."""
    allocator = rig.arena.allocator
    free = np.zeros(allocator.num_pages, dtype=np.bool_)
    for start, count in zip(allocator._run_starts, allocator._run_pages, strict=True):
        free[int(start) : int(start + count)] = True
    for pages, stack in allocator._stacks.items():
        for first in stack:
            free[first : first + pages] = True
    return free


async def test_a_late_write_opens_the_breaker_of_writes_alone(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, tier):
        await store_and_seal(rig)
        ssd = rig.store._ssd
        assert ssd is not None
        ssd._deadline_s = 0.1
        tier.gate = asyncio.Event()
        more = make_keys(3, seed=1)
        await rig.put(more)
        assert len(await rig.get(more)) == 3
        await eventually(lambda: bool(rig.store.degraded(TierName.SSD)))
        assert list(rig.store.degraded(TierName.SSD)) == ["SSD writing"]
        tier.gate.set()
        await rig.store.seal()
        assert rig.store.statistics().num_blocks[TierName.SSD] == 9
        rig.store._residency.check()


@pytest.mark.parametrize("flag", ["failing", "full"])
async def test_failing_writes_leave_the_host_tier_alone(tmp_path: Path, flag: str) -> None:
    async with rig_over(tmp_path, num_slots=6) as (rig, tier):
        setattr(tier, flag, True)
        await rig.put(KEYS)
        assert await rig.get(KEYS) == EXPECTED
        await rig.store.seal()
        for seed in range(1, 4):
            assert await rig.put(make_keys(6, seed=seed)) > 0
            await asyncio.sleep(0)
        assert rig.store.statistics().num_blocks[TierName.SSD] == 0
        rig.store._residency.check()


async def test_without_room_in_the_arena_a_promotion_is_a_miss(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path, num_slots=8) as (rig, _):
        rig.open("w")
        rig.reserve("w", make_keys(5, seed=1))
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        assert (located.num_blocks, located.reason) == (3, "evicted")
        assert rig.copy(located) == EXPECTED[:3]


async def test_a_cancelled_load_leaks_nothing(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, _):
        rig.match("r", KEYS)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(rig.load("r", KEYS))
            await asyncio.sleep(0)
            task.cancel()
        assert (await rig.load("r", KEYS)).num_blocks == 6
        rig.store.release(SESSION, ["r"])
        assert rig.store.statistics().reserved_bytes == 0
        rig.store._residency.check()


async def test_rights_that_end_during_a_promotion_give_no_location(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, _):
        rig.match("r", KEYS)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(rig.load("r", KEYS))
            await asyncio.sleep(0)
            rig.store.release(SESSION, ["r"])
        assert (task.result().num_blocks, task.result().reason) == (0, "no_handle")


async def test_dropped_segments_leave_the_index(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, tier):
        places = {identity.part: location for identity, location in tier.records()}
        first, *_ = places.values()
        elsewhere = first._replace(file=first.file + 1)
        owner = ssd_of(rig)
        owner.dropped([(part, places[part]) for part in places if part.key in KEYS[3:]])
        owner.dropped([(Part(KEYS[0], 9, 9), first), (Part(KEYS[1], 0, 0), elsewhere)])
        assert rig.match("r", KEYS) == (3, "absent")
        rig.store._residency.check()


async def test_discarding_takes_a_block_off_both_tiers(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
        index = rig.store._index
        for row in range(1, index.highest_row + 1):
            rig.store._drop(row)
        assert rig.match("r", KEYS)[0] == 0
        rig.store.release(SESSION, ["r"])
        assert index.free_rows == rig.limits.max_blocks
    async with rig_over(tmp_path) as (_, tier):
        assert list(tier.records()) == []


async def test_the_index_keeps_room_for_new_blocks(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
        ssd_of(rig)._max_rows = 6
        more = make_keys(3, seed=1)
        await rig.put(more)
        await rig.get(more)
        await rig.store.seal()
        assert rig.store.statistics().num_blocks[TierName.SSD] == 6


async def test_what_is_dropped_while_it_is_read_does_not_come_back(tmp_path: Path) -> None:
    """A block that SSD forgets during its promotion is not published by it."""
    async with rig_over(tmp_path) as (rig, _):
        await store_and_seal(rig)
    async with rig_over(tmp_path) as (rig, tier):
        rig.match("r", KEYS)
        async with asyncio.TaskGroup() as group:
            load = group.create_task(rig.load("r", KEYS))
            await asyncio.sleep(0)  # the load starts its reads
            await asyncio.sleep(0)
            ssd_of(rig).dropped([(one.part, location) for one, location in tier.records()])
        assert load.result().num_blocks == 0
        rig.store.release(SESSION, ["r"])
        assert rig.store.statistics().num_blocks[TierName.HOST] == 0
        rig.store._residency.check()


async def test_what_is_used_stays_through_reclaim_and_is_found_where_it_went(
    tmp_path: Path,
) -> None:
    """Blocks that were matched since they were written outlive their segment; others go with it."""

    def make_tier() -> SegmentTier:
        clock = asyncio.get_running_loop().time
        return SegmentTier(tmp_path, capacity_bytes=3 << 16, segment_bytes=1 << 16, clock=clock)

    limits = StoreLimits(
        host_bytes=200 * PART_BYTES, ssd_bytes=3 << 16, max_blocks=1024, lease_share=1.0
    )
    async with make_tier() as tier, StoreRig(limits=limits, ssd=tier) as rig:
        await store_and_seal(rig)
        cold = make_keys(6, seed=50)
        await rig.put(cold)
        await rig.get(cold)
        await rig.store.seal()
        for seed in range(1, 6):
            await rig.get(KEYS)  # used since it was written, or written anew
            others = make_keys(5, seed=seed)
            await rig.put(others)
            await rig.get(others)
            await rig.store.seal()
        assert tier.statistics().rescued_bytes > 0
        held = {identity.part.key for identity, _ in tier.records()}
        assert set(KEYS) <= held
        assert held.isdisjoint(cold)
        rig.store._residency.check()
    async with make_tier() as tier, StoreRig(limits=limits, ssd=tier) as rig:
        assert await rig.get(KEYS) == EXPECTED


async def test_a_tenants_write_budget_refuses_the_write_and_nothing_else(tmp_path: Path) -> None:
    """Changed while the daemon runs; used blocks of the tenant stay in the host tier alone."""
    async with rig_over(tmp_path) as (rig, _):
        tenant = Tenant(DEFAULT_TENANT, DEFAULT_TENANT)

        def limit(bytes_per_day: int) -> None:
            limits = TenantLimits(ssd_write_bytes_per_day=bytes_per_day)
            tenants = {DEFAULT_TENANT: replace(tenant, limits=limits)}
            assert rig.state is not None
            rig.state = replace(rig.state, version=rig.state.version + 1, tenants=tenants)

        limit(0)
        await store_and_seal(rig)
        written = rig.store.statistics().tenants[0].ssd_written_bytes
        assert written == len(KEYS) * 2 * PART_BYTES
        limit(24 * 4096)  # an hour's worth: half a record, so one write and no second
        others = make_keys(4, seed=5)
        await rig.put(others)
        assert await rig.get(others) == [part_bytes(key) for key in others]
        await rig.store.seal()
        statistics = rig.store.statistics()
        assert statistics.tenants[0].ssd_written_bytes == written + 2 * PART_BYTES
        assert statistics.ssd_refused == len(others) - 1
        assert await rig.get(others) == [part_bytes(key) for key in others]
        limit(0)
        await rig.get(others)
        await rig.store.seal()
        assert rig.store.statistics().num_blocks[TierName.SSD] == len(KEYS) + len(others)


def test_a_tenants_budget_of_an_earlier_life_begins_empty() -> None:
    now = 0.0
    budgets = TenantBudgets(lambda: now)
    first, later = TenantId("t-first"), TenantId("t-later")
    budgets.configure({first: 86_400})
    budgets.configure({first: 86_400, later: 86_400})
    assert not budgets.take(first, 1)
    assert budgets.take(later, 3_600)
    assert not budgets.take(later, 1)
    now = 1.0
    assert budgets.take(first, 1)
    budgets.spend(first, 2)
    now = 2.5
    assert not budgets.take(first, 1)
