"""Bounds in bytes, buffers, and parts as messages."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from kvfabric.transfer.flow import Buffers, Flow
from kvfabric.transfer.packing import cut, gather, messages_of, parts_per_message, scatter


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_no_more_than_the_limit_in_the_order_asked() -> None:
    flow, went = Flow(100), list[str]()

    async def pass_through(name: str, num_bytes: int, go: asyncio.Event) -> None:
        async with flow.room(num_bytes):
            went.append(name)
            assert flow.taken_bytes <= 100 or flow.taken_bytes == num_bytes
            await go.wait()

    async with asyncio.TaskGroup() as group:
        gates = {name: asyncio.Event() for name in "abcd"}
        for name, size in (("a", 60), ("b", 60), ("c", 20), ("d", 500)):
            group.create_task(pass_through(name, size, gates[name]))
        await turns()
        assert went == ["a"]  # "c" would fit, and does not overtake
        gates["a"].set()
        await turns()
        assert went == ["a", "b", "c"]
        gates["b"].set()
        await turns()
        assert went == ["a", "b", "c"]
        gates["c"].set()
        await turns()
        assert went == ["a", "b", "c", "d"]
        gates["d"].set()
    assert flow.taken_bytes == 0


@pytest.mark.parametrize("is_served", [False, True])
async def test_who_is_cancelled_while_waiting_takes_nothing_and_holds_nobody_up(
    is_served: bool,
) -> None:
    flow = Flow(100)
    await flow.take(80)
    async with asyncio.TaskGroup() as group:
        late = group.create_task(flow.take(90))
        behind = group.create_task(flow.take(20))
        await turns()
        if is_served:
            flow.give(80)  # it has its turn, and is cancelled before it knows
        late.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await late
        await behind
    assert flow.taken_bytes == (20 if is_served else 100)


async def test_buffers_are_kept_for_the_next_and_bounded() -> None:
    buffers = Buffers(4 << 20)
    one = await buffers.take(1_000_000)
    assert len(one) == 1 << 20
    buffers.give(one)
    assert await buffers.take(600_000) is one
    other = await buffers.take(2 << 20)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(buffers.take(2 << 20))
        await turns()
        assert not waiting.done()
        buffers.give(other)
    assert waiting.result() is other
    buffers.give(other)
    buffers.give(one)
    assert buffers.lent_bytes == 0
    # Kept ones of other sizes make room.
    large = await buffers.take(4 << 20)
    assert len(large) == 4 << 20
    assert "4194304 B lent, 0 B kept" in repr(buffers)


def test_neighbours_are_one_view_and_the_rest_is_copied_once() -> None:
    arena = np.arange(64, dtype=np.uint8).data
    messages = messages_of(arena, [0, 4, 8, 20, 24, 40], 4, 3)
    assert [[bytes(view) for view in views] for views in messages] == [
        [bytes(range(12))],
        [bytes(range(20, 28)), bytes(range(40, 44))],
    ]
    assert [len(views) for views in messages_of(arena, [8, 4, 0], 4, 3)] == [3]
    assert [len(m) for m in messages_of(arena, [0, 4, 8], 4, 1)] == [1, 1, 1]
    buffer = memoryview(bytearray(12))
    gather(messages[1], buffer)
    assert bytes(buffer) == bytes([*range(20, 28), *range(40, 44)])
    other = np.zeros(64, dtype=np.uint8)
    ((*views,),) = messages_of(other.data, [0, 30, 34], 4, 3)
    scatter(buffer, views)
    assert bytes(other[:4]) == bytes(range(20, 24))
    assert bytes(other[30:38]) == bytes([*range(24, 28), *range(40, 44)])
    assert other.sum() == sum(buffer)  # nothing beside them
    assert [bytes(piece) for piece in cut(buffer, [4, 8])] == [
        bytes(range(20, 24)),
        bytes([*range(24, 28), *range(40, 44)]),
    ]


def test_small_parts_travel_together() -> None:
    assert parts_per_message(4096) == 512
    assert parts_per_message(64 << 10) == 32
    assert parts_per_message(256 << 10) == 1
    assert parts_per_message(9 << 20) == 1
