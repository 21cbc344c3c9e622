"""HBM events: netted per block, in runs, and whole for a node that is new."""

from __future__ import annotations

import pytest
from kvfabric_engine import pool_events
from kvfabric_engine.pool_events import CachedKey, PoolEvents

from kvfabric.hashing import ROOT_PARENT, block_keys
from kvfabric.protocol.messages import EngineEvents

KEYS = block_keys(range(16 * 8), 16, bytes(32))


def block(number: int, tag: bytes = b"tag-tag-") -> CachedKey:
    return CachedKey(KEYS[number], KEYS[number - 1] if number else ROOT_PARENT, tag)


def prefixes(*numbers: int) -> bytes:
    return b"".join(KEYS[number][:8] for number in numbers)


def test_neighbours_of_a_chain_are_one_run() -> None:
    """Runs break where the chain or the namespace does."""
    events = PoolEvents()
    for entry in (block(0), block(1), block(2), block(5), block(6, b"other---")):
        events.stored(entry)
    taken = events.take()
    assert taken is not None
    assert [(run.parent, run.keys) for run in taken.stored] == [
        (bytes(8), prefixes(0, 1, 2)),
        (KEYS[4][:8], prefixes(5)),
        (KEYS[5][:8], prefixes(6)),
    ]
    assert events.take() is None


def test_what_came_and_went_is_told_once() -> None:
    """Only the last state of a block counts."""
    events = PoolEvents()
    events.stored(block(0))
    events.stored(block(1))
    events.removed(KEYS[1])
    events.removed(KEYS[0])
    events.stored(block(0))
    taken = events.take()
    assert taken is not None
    assert [run.keys for run in taken.stored] == [prefixes(0)]
    assert [run.keys for run in taken.removed] == [prefixes(1)]


def test_snapshot_is_everything_and_drops_the_pending() -> None:
    """A new node hears that all is gone, then what is cached, each block once."""
    events = PoolEvents()
    for number in range(3):
        events.stored(block(number))
    events.take()
    events.removed(KEYS[2])
    assert events.snapshot() == EngineEvents(stored=(), removed=(), cleared=True)
    rest = events.take()
    assert rest is not None
    assert [run.keys for run in rest.stored] == [prefixes(0, 1)]
    assert rest.removed == ()
    assert events.take() is None


def test_many_changes_are_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the pool, no message outgrows a frame."""
    monkeypatch.setattr(pool_events, "BLOCKS_PER_MESSAGE", 3)
    events = PoolEvents()
    for number in range(8):
        events.stored(block(number))
    events.snapshot()
    taken = []
    while (more := events.take()) is not None:
        taken.append(b"".join(run.keys for run in more.stored))
    assert taken == [prefixes(0, 1, 2), prefixes(3, 4, 5), prefixes(6, 7)]


def test_change_is_announced_once_a_batch() -> None:
    """The publisher is woken by the first change, not by each."""
    events = PoolEvents()
    calls: list[int] = []
    events.on_change = lambda: calls.append(1)
    events.stored(block(0))
    events.stored(block(1))
    assert len(calls) == 1
    events.take()
    events.removed(KEYS[1])
    assert len(calls) == 2
