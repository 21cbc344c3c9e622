"""Cancellation at every single await of the store's public methods: nothing leaks, counters are as before.

Each coroutine is driven await by await; a run of its own cancels it at the first, the next at the second,
and so on until one gets to its end uncancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import coroutine
from typing import Any

import pytest

from kvfabric.protocol.messages import Reserved
from kvfabric.store.residency import Residency
from kvfabric.store.statistics import StoreStatistics
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import PART_BYTES, SESSION, StoreRig, grant_of, make_keys
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import TierName

KEYS = make_keys(6)
MAX_AWAITS = 200


@asynccontextmanager
async def rig_over(directory: Path) -> AsyncIterator[StoreRig]:
    """One life of a store over the SSD tier of `directory`."""
    clock = asyncio.get_running_loop().time
    tier = SegmentTier(directory, capacity_bytes=8 << 20, segment_bytes=1 << 20, clock=clock)
    limits = StoreLimits(
        host_bytes=32 * PART_BYTES, ssd_bytes=8 << 20, max_blocks=256, lease_share=1.0
    )
    async with tier, StoreRig(limits=limits, ssd=tier) as rig:
        yield rig


async def store_and_seal(rig: StoreRig) -> None:
    await rig.put(KEYS)
    assert len(await rig.get(KEYS)) == 6  # the second use admits them
    await rig.store.seal()


async def reads_ended(rig: StoreRig) -> None:
    for _ in range(5000):
        if not rig.store.statistics().reserved_bytes:
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


@coroutine
def _cancelled_at(work: Awaitable[object], number: int) -> Generator[Any, None, bool]:
    """Run `work` and cancel it at its await `number`, from 0; False if it ended before."""
    steps, count = work.__await__(), 0
    try:
        waited = steps.send(None)
        while True:
            if count == number:
                if isinstance(waited, asyncio.Future):
                    waited._asyncio_future_blocking = False
                    waited.cancel()
                waited = steps.throw(asyncio.CancelledError())
            count += 1
            yield waited
            waited = steps.send(None)
    except StopIteration:
        return count > number
    except asyncio.CancelledError:
        return True


def held(statistics: StoreStatistics) -> StoreStatistics:
    """What a cancelled call must leave as it was: all but counters of what happened."""
    return replace(statistics, hits={}, misses={}, refusals={}, promotions=0)


def apart_from_bytes(statistics: StoreStatistics) -> StoreStatistics:
    return replace(statistics, used_bytes={}, num_blocks={}, tenants=())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def commits_cancelled(rig: StoreRig) -> int:
    """At how many awaits a commit was cancelled, statistics checked after each."""
    await rig.put(make_keys(1, seed=1))
    rig.open("w")
    before = held(rig.store.statistics())
    free = rig.arena.free_bytes
    for number in range(MAX_AWAITS):
        reserved: Reserved = rig.reserve("w", KEYS)
        if not await _cancelled_at(rig.commit(reserved, KEYS), number):
            return number
        rig.store.abort(SESSION, reserved.reservation)
        await settled()
        assert held(rig.store.statistics()) == before
        assert rig.arena.free_bytes == free
        rig.store._residency.check()
    raise AssertionError("it never ends")


async def test_a_commit_cancelled_anywhere_leaves_nothing() -> None:
    async with StoreRig() as rig:
        assert await commits_cancelled(rig) >= 1
        assert len(await rig.get(KEYS)) == 6


@pytest.mark.parametrize("cleanup", ["cancel", "give_back"])
async def test_a_commit_without_one_of_its_cleanups_is_found_out(
    monkeypatch: pytest.MonkeyPatch, cleanup: str
) -> None:
    async with StoreRig() as rig:
        monkeypatch.setattr(Residency, cleanup, lambda *_: None)
        with pytest.raises(AssertionError):
            await commits_cancelled(rig)
        monkeypatch.undo()


async def test_a_load_cancelled_anywhere_leaves_nothing(tmp_path: Path) -> None:
    async with rig_over(tmp_path) as rig:
        await store_and_seal(rig)
    cancelled = True
    for number in range(MAX_AWAITS):
        async with rig_over(tmp_path) as rig:  # each from SSD alone
            rig.match("r", KEYS)
            before = held(rig.store.statistics())
            cancelled = await _cancelled_at(rig.load("r", KEYS), number)
            await reads_ended(rig)
            after = held(rig.store.statistics())
            # Reads go on; what they brought is there, and nothing else has changed.
            assert apart_from_bytes(after) == apart_from_bytes(before)
            assert after.used_bytes[TierName.SSD] == before.used_bytes[TierName.SSD]
            assert after.num_blocks[TierName.HOST] in (0, 6)
            rig.store.release(SESSION, ["r"])
            assert rig.store.statistics().leased_bytes == rig.store.statistics().draining_bytes == 0
            rig.store._residency.check()
        if not cancelled:
            break
    assert not cancelled
    assert number >= 1


Call = Callable[[StoreRig], Awaitable[object]]
CALLS: dict[str, Call] = {
    "scrub": lambda rig: rig.store.scrub(1 << 20),
    "recheck": lambda rig: rig.store.recheck(SESSION, "r", b"".join(KEYS), 0, 0),
    "seal": lambda rig: rig.store.seal(),
    "purge of nothing": lambda rig: rig.store.purge([bytes(16)]),
}


async def calls_cancelled(rig: StoreRig, call: Call) -> int:
    rig.match("r", KEYS)
    before = held(rig.store.statistics())
    for number in range(MAX_AWAITS):
        if not await _cancelled_at(call(rig), number):
            return number
        await settled()
        assert held(rig.store.statistics()) == before
        rig.store._residency.check()
    raise AssertionError("it never ends")


@pytest.mark.parametrize("name", CALLS)
async def test_others_cancelled_anywhere_leave_everything_as_it_was(
    tmp_path: Path, name: str
) -> None:
    async with rig_over(tmp_path) as rig:
        await store_and_seal(rig)
        await rig.put(make_keys(4, seed=1), grant=grant_of("t-a"))
        assert await calls_cancelled(rig, CALLS[name]) >= (name != "seal")
        rig.store.release(SESSION, ["r"])
        rig.store._residency.check()
