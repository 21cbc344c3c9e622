"""Pool: whoever lent a buffer to a thread hears of the cancellation only when the thread is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

import pytest

from kvfabric.tiers.pool import IoPool


def block(started: threading.Event, go: threading.Event, ended: list[str]) -> None:
    started.set()
    go.wait(10)
    ended.append("work")


async def test_cancelled_caller_waits_for_its_thread() -> None:
    pool = IoPool(1, "test-pool")
    started, go, ended = threading.Event(), threading.Event(), list[str]()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(pool.run(partial(block, started, go, ended)))
        await asyncio.to_thread(started.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["work"]
    await pool.close()


async def test_work_cancelled_in_the_queue_never_starts() -> None:
    pool = IoPool(1, "test-pool")
    started, go, ended = threading.Event(), threading.Event(), list[str]()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(pool.run(partial(block, started, go, ended)))
        await asyncio.to_thread(started.wait, 10)
        second = group.create_task(pool.run(partial(ended.append, "second")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        await first
    await pool.close()
    assert ended == ["work"]


async def test_error_of_one_is_raised_after_all_ended() -> None:
    pool = IoPool(2, "test-pool")
    started, go, ended = threading.Event(), threading.Event(), list[str]()

    def fail() -> None:
        started.wait(10)
        go.set()
        raise ZeroDivisionError

    works: list[Callable[[], None]] = [fail, partial(block, started, go, ended)]
    with pytest.raises(ZeroDivisionError):
        await pool.run_all(works)
    assert ended == ["work"]
    await pool.close()
