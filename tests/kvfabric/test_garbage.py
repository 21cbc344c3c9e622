"""Cyclic garbage is collected in turns of the loop, and Python's own schedule comes back."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter

from kvfabric import garbage


class Knot:
    def __init__(self) -> None:
        self.me = self


async def test_young_knots_are_untied_in_their_turn_and_not_before() -> None:
    with garbage.own_schedule():
        turn, untied = asyncio.Event(), asyncio.Event()
        weakref.finalize(Knot(), untied.set)

        async def wait_turn() -> None:
            await turn.wait()

        async with asyncio.TaskGroup() as group:
            collecting = group.create_task(garbage.collect(wait_turn))
            await asyncio.sleep(2 * garbage.YOUNG_S)
            assert not untied.is_set()
            turn.set()
            async with asyncio.timeout(5):
                await untied.wait()
            collecting.cancel()


def test_pythons_own_schedule_comes_back() -> None:
    before = gc.get_threshold()
    with garbage.own_schedule():
        assert gc.get_threshold()[0] == garbage.MAX_YOUNG
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_older_objects_are_looked_at_seldom() -> None:
    generations = Counter(garbage._generation(count) for count in range(1, 6001))
    assert generations == {0: 5400, 1: 599, 2: 1}
