"""Memory for the arena that the machine does not give: the tier is smaller, visibly, until it does."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvfabric.store import store
from kvfabric.store.index import HOST
from kvfabric.testing.store import PART_BYTES, StoreRig, make_keys
from kvfabric.tiers import arena
from kvfabric.types import TierName

PAGES, GIVEN, SLICE = 64, 32, 16


class Machine:
    """Gives an arena its first 32 pages, and the others when it has more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_more = False
        self._slices = 0
        monkeypatch.setattr(store, "_TOUCH_BYTES", SLICE * PART_BYTES)
        monkeypatch.setattr(arena, "populate", self._populate)

    def _populate(self, memory: npt.NDArray[np.uint8]) -> int:
        """Asked for one slice after the other, and for a refused one again."""
        if self._slices * SLICE >= GIVEN and not self.has_more:
            return errno.ENOMEM
        self._slices += 1
        return 0


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not happen")


async def pages_of_many(rig: StoreRig, seed: int, count: int = 80) -> list[int]:
    """Where blocks lie after so many were stored: more than there is room for."""
    for at in range(count):
        await rig.put(make_keys(1, seed=1000 * seed + at))
    index = rig.store._index
    pages: list[int] = index.part_page.array[(index.part_state.array & HOST) != 0].tolist()
    return pages


def capacity(rig: StoreRig) -> int:
    return rig.store.statistics().capacity_bytes[TierName.HOST]


async def test_refused_memory_makes_the_tier_smaller_until_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch)
    async with StoreRig(num_slots=PAGES) as rig:
        await eventually(lambda: bool(rig.store.degraded(TierName.HOST)))
        pages = await pages_of_many(rig, 1)
        assert GIVEN // 2 <= len(pages) <= GIVEN
        assert max(pages) < GIVEN
        assert capacity(rig) == GIVEN * PART_BYTES
        [(what, why)] = rig.store.degraded(TierName.HOST).items()
        assert what == "a part of the host tier"
        assert why.endswith(f"it gave {GIVEN * PART_BYTES} of {PAGES * PART_BYTES} bytes")
        rig.store._residency.check()
        machine.has_more = True
        rig.clock.now += 10
        await eventually(lambda: capacity(rig) == PAGES * PART_BYTES)
        assert not rig.store.degraded(TierName.HOST)
        assert max(await pages_of_many(rig, 2)) >= GIVEN
        rig.store._residency.check()


async def test_without_withholding_blocks_lie_where_there_is_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin. The first write to such a page would end the process."""
    monkeypatch.setattr(arena.Arena, "withhold", lambda *_: None)
    Machine(monkeypatch)
    async with StoreRig(num_slots=PAGES) as rig:
        await eventually(lambda: bool(rig.store.degraded(TierName.HOST)))
        assert max(await pages_of_many(rig, 1)) >= GIVEN


async def test_what_lies_behind_the_refusal_keeps_its_memory_and_all_adds_up() -> None:
    async with StoreRig(num_slots=PAGES) as rig:
        before = await pages_of_many(rig, 1, count=40)
        assert max(before) == 39
        rig.arena.withhold(GIVEN * PART_BYTES)
        rig.store._host.resize(rig.arena.size_bytes - rig.arena.withheld_bytes)
        after = await pages_of_many(rig, 2)
        assert GIVEN < len(after) <= 40
        used = rig.store.statistics().used_bytes[TierName.HOST]
        assert len(after) * PART_BYTES == used <= capacity(rig) < PAGES * PART_BYTES
        rig.store._residency.check()
