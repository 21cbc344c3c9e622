"""Reclaim: what is hot outlives its segment, at a bounded cost; and the write budget."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvfabric.errors import QuotaExceeded, TransferError
from kvfabric.testing.segments import (
    PAGE_BYTES,
    RECORD,
    SMALL,
    Owner,
    bytes_on_disk,
    flip_bit,
    readable,
    small_tier,
    write_parts,
)
from kvfabric.testing.tiers import make_part, read_back
from kvfabric.tiers import segment_groups
from kvfabric.tiers.base import ROW, Lineage, RecordBatch
from kvfabric.tiers.records import record_bytes
from kvfabric.tiers.segment_groups import Plan
from kvfabric.tiers.segment_index import BudgetState, Extent
from kvfabric.tiers.segment_recovery import bury_older
from kvfabric.tiers.segment_rescue import slices_of, to_rescue
from kvfabric.tiers.segments import SegmentTier
from kvfabric.tiers.write_budget import BURST_S, DAY_S, WriteBudget
from kvfabric.types import TenantId


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups close at once."""
    monkeypatch.setattr(segment_groups, "GROUP_S", 0.0)


def part_of(seed: int) -> object:
    return make_part(seed, RECORD)[0].part


# ------------------------------------------------------------------ rescue


async def survivors(directory: Path, hot: set[int], *, told: bool = True) -> list[int]:
    """Which of 24 parts are left in a tier of four segments of four records, two of which are hot."""
    owner = Owner()
    owner.wanted = {make_part(seed, RECORD)[0].part for seed in hot}
    async with small_tier(directory, owner=owner if told else None) as tier:
        for seed in range(24):
            await write_parts(tier, range(seed, seed + 1))
            assert bytes_on_disk(directory) <= 4 * SMALL
        left = await readable(tier)
        places = {identity.part: location for identity, location in tier.records()}
        assert owner.places.items() <= places.items()
        assert {part_of(seed) for seed in left}.isdisjoint(
            part for parts in owner.gone for part in parts
        )
    async with small_tier(directory) as tier:
        assert await readable(tier) == left
    shutil.rmtree(directory / "index")
    async with small_tier(directory) as tier:  # the newer record wins, and the older is gone
        assert await readable(tier) == left
    return left


async def test_hot_records_outlive_their_segment(tmp_path: Path) -> None:
    """Hot records are there after five rounds of reclaim, across a restart and a rebuild; without
    somebody who says what is hot they are not."""
    assert {1, 2} <= set(await survivors(tmp_path / "told", {1, 2}))
    assert {1, 2}.isdisjoint(await survivors(tmp_path / "twin", {1, 2}, told=False))


async def test_reclaim_goes_on_when_everything_is_hot(tmp_path: Path) -> None:
    """At most half a segment is written anew at each reclaim, so there is always room for what comes."""
    owner = Owner()
    owner.wanted = {make_part(seed, RECORD)[0].part for seed in range(60)}
    async with small_tier(tmp_path, owner=owner) as tier:
        for seed in range(60):
            await write_parts(tier, range(seed, seed + 1))
            assert seed in await readable(tier)
        s = tier.statistics()
        assert s.rescued_bytes <= s.sealed_writes * record_bytes(RECORD)
        assert s.live_bytes + s.dead_bytes == s.used_bytes <= s.file_bytes <= s.capacity_bytes
    assert s.rescued_bytes > 0


async def test_a_corrupt_record_is_not_rescued(tmp_path: Path) -> None:
    """What does not verify is not written anew under a fresh header."""
    owner = Owner()
    owner.wanted = {make_part(1, RECORD)[0].part, make_part(2, RECORD)[0].part}
    async with small_tier(tmp_path, owner=owner) as tier:
        located = await write_parts(tier, range(4))
        flip_bit(tmp_path, located[make_part(1, RECORD)[0]], PAGE_BYTES + 5)
        await write_parts(tier, range(4, 17))
        left = await readable(tier)
        assert 2 in left
        assert 1 not in left
        assert tier.statistics().quarantined == 1
    assert make_part(1, RECORD)[0].part in {part for parts in owner.gone for part in parts}


async def test_a_reader_finds_a_moved_part_at_its_new_place(tmp_path: Path) -> None:
    owner = Owner()
    owner.wanted = {make_part(0, RECORD)[0].part}
    async with small_tier(tmp_path, owner=owner) as tier:
        [(identity, old)] = (await write_parts(tier, range(1))).items()
        await write_parts(tier, range(1, 14))
        new = owner.places[identity.part]
        assert await read_back(tier, new, identity) == bytes(make_part(0, RECORD)[1])
        with pytest.raises(TransferError, match="reclaimed"):
            await read_back(tier, old, identity)


async def test_a_disk_that_fails_during_a_rescue_loses_nothing(tmp_path: Path) -> None:
    """The old segment stays until the new records are durable."""
    owner = Owner()
    owner.wanted = {make_part(0, RECORD)[0].part}

    class Fails(SegmentTier):
        failing = True

        async def _sync_data(self, plan: Plan) -> None:
            if plan.forgets and plan.records and self.failing:
                raise TransferError("EIO")
            await super()._sync_data(plan)

    tier = Fails(tmp_path, capacity_bytes=4 * SMALL, segment_bytes=SMALL, clock=lambda: 0.0)
    tier.owner = owner
    async with tier:
        await write_parts(tier, range(14))
        assert 0 in await readable(tier)
        tier.failing = False
        await write_parts(tier, range(14, 16))
        assert set(await readable(tier)) >= {0, *range(8, 16)}


async def test_a_part_deleted_while_it_is_rescued_is_told_of(tmp_path: Path) -> None:
    """The owner hears of the move, finds that it does not want the part, and deletes the new place."""
    owner = Owner()
    owner.wanted = {make_part(0, RECORD)[0].part}

    class Deletes(SegmentTier):
        async def _commit_index(self, plan: Plan) -> list[Extent]:
            if plan.forgets and plan.records:
                self.delete([*plan.forgets])
            return await super()._commit_index(plan)

    tier = Deletes(tmp_path, capacity_bytes=4 * SMALL, segment_bytes=SMALL, clock=lambda: 0.0)
    tier.owner = owner
    async with tier:
        await write_parts(tier, range(14))
        tier.delete([owner.places[make_part(0, RECORD)[0].part]])
        await write_parts(tier, range(14, 15))
        assert 0 not in await readable(tier)


def batch_of(num_bytes: list[int]) -> RecordBatch:
    rows = np.zeros(len(num_bytes), ROW)
    rows["num_bytes"], rows["lineage"] = num_bytes, 1
    rows["offset"] = np.cumsum([PAGE_BYTES, *(record_bytes(n) for n in num_bytes[:-1])])
    return RecordBatch(1, rows, {1: Lineage(TenantId("t"), bytes(8), bytes(32), ())})


def test_a_rescue_takes_half_a_segment_or_the_room_there_is() -> None:
    batch = batch_of([RECORD] * 10)
    size, hot = record_bytes(RECORD), np.ones(10, dtype=np.bool_)
    assert len(to_rescue(batch, hot, 5 * size)) == 5
    assert len(to_rescue(batch, hot, 3 * size)) == 3
    assert len(to_rescue(batch, hot, size - 1)) == 0
    assert len(to_rescue(batch, ~hot, 100 * size)) == 0
    hot[::2] = False
    assert to_rescue(batch, hot, 2 * size).rows["offset"].tolist() == [
        batch.rows["offset"][1],
        batch.rows["offset"][3],
    ]


def test_slices_are_all_of_it_in_order() -> None:
    batch = batch_of([1, 50_000, 9_000_000, 1, 4096, 100])
    pieces = list(slices_of(batch, 60_000))
    assert [len(piece) for piece in pieces] == [2, 1, 3]
    offsets = [offset for piece in pieces for offset in piece.rows["offset"].tolist()]
    assert offsets == batch.rows["offset"].tolist()


def test_of_several_records_the_newest_is_alive() -> None:
    """Across files, in whatever order, also where keys only begin alike."""
    batches = [batch_of([1] * 4), batch_of([1] * 4)]
    keys = [[1, 2, 3, 4], [2, 1, 2, 5]]
    for number, batch in enumerate(batches):
        batch.rows["key"] = np.array([bytes(31) + bytes([k]) for k in keys[number]], dtype="V32")
        batch.rows["sequence"] = np.array([10, 20, 30, 40]) + number * 5
        batch.rows["is_live"] = 1
    bury_older(batches)
    assert [batch.rows["is_live"].tolist() for batch in batches] == [[0, 0, 1, 1], [0, 1, 1, 1]]
    batches[1].rows["shard"] = 1
    for batch in batches:
        batch.rows["is_live"] = 1
    bury_older(batches)
    assert [batch.rows["is_live"].tolist() for batch in batches] == [[1, 1, 1, 1], [0, 1, 1, 1]]


# ------------------------------------------------------------------ hard capacity


async def test_a_file_that_cannot_be_removed_takes_room(tmp_path: Path) -> None:
    """Capacity counts what lies in the directory, whoever left it; it does not add up to more."""
    async with small_tier(tmp_path, files=4) as tier:
        await write_parts(tier, range(4))
        stray = tmp_path / "seg-0000ffff.kvf"
        stray.mkdir()
        await write_parts(tier, range(4, 20))
        s = tier.statistics()
        assert s.file_bytes == 3 * SMALL + stray.stat().st_size
        assert len(await readable(tier)) == 8
        stray.rmdir()
        await write_parts(tier, range(20, 36))
        assert tier.statistics().file_bytes == 4 * SMALL


async def test_with_room_for_one_segment_the_tier_goes_on(tmp_path: Path) -> None:
    """No spare any more: what is full is dropped before the next is made."""
    async with small_tier(tmp_path, files=2) as tier:
        for name in ("seg-0000fff0.kvf", "seg-0000fff1.kvf"):
            (tmp_path / name).mkdir()
        await write_parts(tier, range(10))
        assert await readable(tier) == [8, 9]
        s = tier.statistics()
        assert s.live_bytes + s.dead_bytes == s.used_bytes
        assert s.file_bytes < 2 * SMALL


# ------------------------------------------------------------------ write budget


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


HOUR_OF_FOUR = int(4 * record_bytes(RECORD) * DAY_S / BURST_S)
"""Bytes a day of which an hour has four records."""


async def refused(tier: SegmentTier, seeds: range) -> int:
    """How many of these writes are refused."""
    count = 0
    for seed in seeds:
        try:
            await tier.write(*make_part(seed, RECORD))
        except QuotaExceeded:
            count += 1
    return count


async def test_a_spent_budget_refuses_until_time_has_passed(tmp_path: Path) -> None:
    clock = Clock()
    async with small_tier(tmp_path, budget=WriteBudget(HOUR_OF_FOUR, clock)) as tier:
        assert await refused(tier, range(10)) == 6
        assert await readable(tier) == [0, 1, 2, 3]
        assert tier.statistics().budget_refused == 6
        clock.now += BURST_S / 2
        assert await refused(tier, range(10, 20)) == 8
        clock.now += 10 * DAY_S  # never more than an hour's worth at once
        assert await refused(tier, range(20, 30)) == 6


@pytest.mark.parametrize("how", ["closed", "killed", "index lost"])
async def test_a_restart_gives_no_new_budget(tmp_path: Path, how: str) -> None:
    """Closed or killed, what was spent stays spent; where nobody knows, nothing is left."""
    clock = Clock()
    directory, image = tmp_path / "tier", tmp_path / "image"
    async with small_tier(directory, budget=WriteBudget(HOUR_OF_FOUR, clock)) as tier:
        assert await refused(tier, range(3)) == 0
        if how == "killed":  # what the disk holds at this moment
            shutil.copytree(directory, image)
    if how == "index lost":
        shutil.rmtree(directory / "index")
    there = image if how == "killed" else directory
    async with small_tier(there, budget=WriteBudget(HOUR_OF_FOUR, clock)) as tier:
        assert await refused(tier, range(10, 20)) == (9 if how == "closed" else 10)


async def test_without_what_was_kept_a_restart_would_give_it(tmp_path: Path) -> None:
    """The twin: a budget that forgets."""

    class Forgets(WriteBudget):
        def resume(self, kept: BudgetState) -> None:
            pass

    clock = Clock()
    total = 0
    for life in range(3):
        async with small_tier(tmp_path, budget=Forgets(HOUR_OF_FOUR, clock)) as tier:
            total += 4 - await refused(tier, range(4 * life, 4 * life + 4))
    assert total == 12


async def test_rescues_are_paid_from_the_budget(tmp_path: Path) -> None:
    owner, clock = Owner(), Clock()
    owner.wanted = {make_part(seed, RECORD)[0].part for seed in range(100)}
    budget = WriteBudget(HOUR_OF_FOUR * 5, clock)  # twenty records
    async with small_tier(tmp_path, owner=owner, budget=budget) as tier:
        written = 40 - await refused(tier, range(40))
        s = tier.statistics()
        assert s.budget_left_bytes <= 0
        assert written * record_bytes(RECORD) + s.rescued_bytes <= 22 * record_bytes(RECORD)
        assert s.rescued_bytes > 0


async def test_a_write_that_was_taken_back_costs_nothing(tmp_path: Path) -> None:
    clock = Clock()
    async with small_tier(tmp_path, budget=WriteBudget(HOUR_OF_FOUR, clock)) as tier:
        before = tier.statistics().budget_left_bytes
        task = asyncio.get_running_loop().create_task(tier.write(*make_part(1, RECORD)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tier.statistics().budget_left_bytes in (before, before - record_bytes(RECORD))


def test_a_budget_follows_the_clock_only_forward() -> None:
    clock = Clock()
    budget = WriteBudget(int(DAY_S), clock)  # a byte a second
    assert budget.take(3600)
    assert not budget.take(1)
    clock.now -= 50_000
    assert not budget.take(1)
    clock.now += 10
    assert budget.left_bytes == 10
    assert budget.take(5_000)  # overdrawn once
    assert budget.left_bytes == -4990
    assert budget.to_keep(64).left == -4990
    assert not WriteBudget(0, clock).is_limited
    assert WriteBudget(0, clock).take(1 << 60)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def life() -> None:
        async with small_tier(tmp_path) as tier:
            await write_parts(tier, range(24))

    asyncio.run(life())
    assert len(os.listdir("/proc/self/fd")) == before
