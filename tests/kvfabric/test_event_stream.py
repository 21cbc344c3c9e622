from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvfabric.errors import RemoteProtocolError
from kvfabric.events.index import FleetIndex, Holder, NodeFeed
from kvfabric.events.stream import SLICE_BLOCKS, EventStream
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.types import BlockKey, TierName

BOOT, TAG, SESSION = b"b" * 16, b"tag-0001", b"s" * 16
ENGINE = pb.Engine(session=SESSION, engine_id="e1", endpoint="http://127.0.0.1:1")


def prefixes(start: int, count: int) -> bytes:
    rng = random.Random(start)
    return b"".join(rng.randbytes(8) for _ in range(count))


def hbm(
    *, stored: bytes = b"", removed: bytes = b"", cleared: bool = False, tag: bytes = TAG
) -> EngineEvents:
    return EngineEvents(
        stored=(BlockRun(tag, b"", stored),) if stored else (),
        removed=(BlockRun(tag, b"", removed),) if removed else (),
        cleared=cleared,
    )


def stream(**options: int) -> EventStream:
    return EventStream(boot_id=BOOT, **options)


async def take(batches: AsyncIterator[pb.EventBatch], count: int) -> list[pb.EventBatch]:
    async with asyncio.timeout(5):
        return [await anext(batches) for _ in range(count)]


async def test_neighbouring_runs_of_a_chain_become_one() -> None:
    events, keys = stream(), prefixes(1, 4)
    events.stored(TierName.HOST, TAG, bytes(8), keys[:16])
    events.stored(TierName.HOST, TAG, keys[8:16], keys[16:])
    events.stored(TierName.HOST, TAG, b"elsewher", prefixes(2, 1))
    events.removed(TierName.HOST, TAG, keys)
    events.removed(TierName.HOST, TAG, keys[:8])
    events.flush()
    (batch,) = await take(events.subscribe(BOOT, 1), 1)
    assert [(run.kind, len(run.keys) // 8) for run in batch.runs] == [
        (pb.STORED, 4),
        (pb.STORED, 1),
        (pb.REMOVED, 5),
    ]
    assert batch.runs[0].parent == bytes(8)


async def test_batches_come_by_themselves_and_are_numbered() -> None:
    events = stream()
    reader = events.subscribe(BOOT, 1)
    for number in (1, 2):
        events.stored(TierName.HOST, TAG, b"", prefixes(number, 3))
        (batch,) = await take(reader, 1)
        assert (batch.sequence, batch.gap, len(batch.runs)) == (number, False, 1)


async def test_a_reader_of_another_life_or_from_the_past_is_told_of_the_gap() -> None:
    events = stream()
    events.engine_joined(ENGINE)
    for number in range(3):
        events.stored(TierName.HOST, TAG, b"", prefixes(number, 1))
        events.flush()
    for boot, from_sequence in ((b"", 0), (b"o" * 16, 2), (BOOT, 0), (BOOT, 99)):
        (batch,) = await take(events.subscribe(boot, from_sequence), 1)
        assert batch.gap
        assert batch.sequence == events.sequence == 3
        assert [engine.engine_id for engine in batch.engines] == ["e1"]
    assert [b.sequence for b in await take(events.subscribe(BOOT, 2), 2)] == [2, 3]


async def test_history_is_bounded_and_a_slow_reader_gets_a_gap() -> None:
    events = stream(history_bytes=2000)
    slow = events.subscribe(BOOT, 1)
    events.stored(TierName.HOST, TAG, b"", prefixes(0, 1))
    events.flush()
    assert (await take(slow, 1))[0].sequence == 1
    for number in range(50):
        events.stored(TierName.HOST, TAG, b"", prefixes(number, 20))
        events.flush()
    assert events.statistics().history_bytes <= 2000
    (batch,) = await take(slow, 1)
    assert batch.gap
    assert batch.sequence == 51
    events.stored(TierName.HOST, TAG, b"", prefixes(99, 1))
    assert (await take(slow, 1))[0].sequence == 52


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


async def test_the_bound_of_the_history_is_one_of_memory() -> None:
    """Small batches are many: 2 MiB of them as messages would take 20."""
    events, before = stream(history_bytes=2 << 20), resident_bytes()
    for number in range(25_000):
        events.stored(TierName.HOST, TAG, b"", prefixes(number, 1))
        events.flush()
    assert events.statistics().history_batches > 15_000
    assert resident_bytes() - before < 8 << 20


async def test_a_flood_is_cut_into_batches_that_a_message_can_carry() -> None:
    events, keys = stream(), prefixes(3, 3 * SLICE_BLOCKS + 5)
    events.removed(TierName.HOST, TAG, keys)
    events.flush()
    batches = await take(events.subscribe(BOOT, 1), 4)
    assert all(batch.ByteSize() < 10 * SLICE_BLOCKS for batch in batches)
    assert b"".join(run.keys for batch in batches for run in batch.runs) == keys


async def test_ssd_is_not_streamed() -> None:
    events = stream()
    events.stored(TierName.SSD, TAG, b"", prefixes(1, 1))
    events.flush()
    assert events.sequence == 0


async def test_close_ends_subscriptions_after_what_was_pending() -> None:
    events = stream()
    events.stored(TierName.HOST, TAG, b"", prefixes(1, 1))
    events.close()
    assert [batch.sequence async for batch in events.subscribe(BOOT, 1)] == [1]
    assert events.statistics().subscriptions == 0


async def test_malformed_engine_events_change_nothing() -> None:
    events = stream()
    events.engine_joined(ENGINE)
    good, bad = BlockRun(TAG, b"", prefixes(1, 1)), BlockRun(TAG, b"", b"seven..")
    for wrong in (
        EngineEvents((good, bad), (), False),
        EngineEvents((good,), (bad,), False),
        EngineEvents((BlockRun(b"tag", b"", b""),), (), True),
    ):
        with pytest.raises(RemoteProtocolError):
            events.engine_events(SESSION, wrong)
    assert events.statistics().hbm_blocks == 0


def mirror(events: EventStream) -> tuple[FleetIndex, NodeFeed]:
    """An index that took a snapshot of the stream, as a router does."""
    index = FleetIndex(capacity=64)
    feed = NodeFeed(index, "n1")
    feed.watch(pb.EventBatch(boot_id=BOOT, sequence=events.sequence, gap=True))
    start = pb.EventBatch(boot_id=BOOT, sequence=events.sequence, engines=events.engines)
    feed.snapshot([start, *events.hbm_runs(), events.snapshot_batch([], end=True)])
    return index, feed


async def test_snapshot_of_hbm_is_what_the_events_added_up_to() -> None:
    events, keys = stream(), prefixes(4, 40)
    blocks = [BlockKey(keys[i : i + 8] + bytes(24)) for i in range(0, len(keys), 8)]
    events.engine_joined(ENGINE)
    events.engine_events(SESSION, hbm(stored=prefixes(77, 5)))
    events.engine_events(SESSION, hbm(cleared=True, stored=keys))
    events.engine_events(SESSION, hbm(removed=keys[:80]))
    events.flush()
    holder = Holder("n1", TierName.HBM, SESSION)
    live, snapshot = FleetIndex(capacity=64), mirror(events)[0]
    for batch in await take(events.subscribe(BOOT, 1), events.sequence):
        live.apply("n1", batch)
    assert live.match(TAG, blocks)[holder].tolist() == [False] * 10 + [True] * 30
    assert snapshot.match(TAG, blocks)[holder].tolist() == [False] * 10 + [True] * 30
    assert live.statistics().num_blocks == snapshot.statistics().num_blocks == 30


async def test_end_of_a_session_clears_its_hbm_and_late_events_are_no_news() -> None:
    events, keys = stream(), prefixes(5, 3)
    blocks = [BlockKey(keys[i : i + 8] + bytes(24)) for i in range(0, len(keys), 8)]
    events.engine_joined(ENGINE)
    events.engine_events(SESSION, hbm(stored=keys))
    events.flush()
    index, feed = mirror(events)
    assert index.match(TAG, blocks)
    assert set(feed.engines) == {SESSION}
    events.engine_gone(SESSION)
    events.engine_gone(SESSION)
    events.engine_events(SESSION, hbm(stored=keys))
    events.flush()
    for batch in await take(events.subscribe(*feed.position), 1):
        assert feed.watch(batch)
    assert index.match(TAG, blocks) == {}
    assert feed.engines == {}
    assert events.engines == []
    assert events.statistics().hbm_blocks == 0


async def test_an_engine_that_leaves_and_returns_within_a_batch_is_there() -> None:
    events = stream()
    index = FleetIndex(capacity=64)
    feed = NodeFeed(index, "n1")
    feed.watch(pb.EventBatch(boot_id=BOOT, gap=True))
    feed.snapshot([events.snapshot_batch([], end=True)])
    events.engine_joined(ENGINE)
    events.engine_events(SESSION, hbm(stored=prefixes(1, 2)))
    events.engine_gone(SESSION)
    events.engine_joined(ENGINE)
    events.flush()
    for batch in await take(events.subscribe(BOOT, 1), events.sequence):
        assert feed.watch(batch)
    assert set(feed.engines) == {SESSION}
    assert index.statistics().num_blocks == 0
