"""Work on the event loop takes turns, so that it does not add up before a timer."""

from __future__ import annotations

import asyncio
import time

from kvfabric.store.turns import TURN_S, Turns

_PIECE_S = 0.002
_PIECES = 12
_TRIES = 5


def _work(done: list[int], number: int) -> None:
    ends = time.monotonic() + _PIECE_S
    while time.monotonic() < ends:
        pass
    done.append(number)


async def _late_by(crowd: list[asyncio.Task[None]]) -> float:
    """Seconds that a timer is late which falls due while the crowd wants to work."""
    loop = asyncio.get_running_loop()
    late: asyncio.Future[float] = loop.create_future()
    due = loop.time() + _PIECE_S / 2
    loop.call_at(due, lambda: late.set_result(loop.time() - due))
    found = await late
    await asyncio.gather(*crowd)
    return found


async def test_a_timer_waits_for_little_however_many_want_to_work() -> None:
    """A turn and two pieces at most: the one under way when it fell due, and one that began before it."""
    turns, found = Turns(), list[float]()
    for _ in range(_TRIES):  # what the machine adds now and then, it does not add each time
        done = list[int]()

        async def member(number: int, done: list[int] = done) -> None:
            await turns.wait()
            _work(done, number)

        async with asyncio.TaskGroup() as group:
            crowd = [group.create_task(member(number)) for number in range(_PIECES)]
            found.append(await _late_by(crowd))
        assert done == list(range(_PIECES))  # in the order in which they asked
    assert min(found) < 4 * _PIECE_S + TURN_S


async def test_without_turns_the_same_crowd_adds_up() -> None:
    """The test above with its guard removed."""
    done = list[int]()

    async def member(number: int) -> None:
        _work(done, number)

    async with asyncio.TaskGroup() as group:
        crowd = [group.create_task(member(number)) for number in range(_PIECES)]
        late = await _late_by(crowd)
    assert late > 0.8 * _PIECES * _PIECE_S


async def test_work_and_waiters_are_served_in_order() -> None:
    turns, done = Turns(), list[int]()

    async def member(number: int) -> None:
        await turns.wait()
        done.append(number)

    assert turns.is_open()
    _work(done, 0)
    assert not turns.is_open()  # the turn is used up
    async with asyncio.TaskGroup() as group:
        group.create_task(member(1))
        await asyncio.sleep(0)
        turns.call(lambda: done.append(2))
        group.create_task(member(3))
    assert done == [0, 1, 2, 3]
    await asyncio.sleep(2 * TURN_S)
    assert turns.is_open()


async def test_who_is_cancelled_while_waiting_holds_nobody_up() -> None:
    turns, done = Turns(), list[int]()
    turns.is_open()
    _work(done, 0)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(turns.wait())
        second = group.create_task(turns.wait())
        await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(5):
            await second
    assert first.cancelled()
    assert "0 waiting" in repr(turns)
