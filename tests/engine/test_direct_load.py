"""Loads straight from the arena, on a CPU pool through the code that a GPU runs: real node, real engine."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from kvfabric_engine import direct_load
from kvfabric_engine.direct_load import DirectLoads, NodeCalls, parts_of
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.lanes import Copies, Lane
from kvfabric_engine.layout import PoolShape, pages_as_bytes
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.sequence import Sequence
from kvfabric_engine.registrations import Addresses, PinnedMemory, address_of
from kvfabric_engine.staging import (
    Fence,
    Landing,
    LayerArrival,
    Pages,
    StagedMover,
    _StagedLanding,
)
from kvfabric_engine.testing import Answer, ask, small_config

from kvfabric.errors import DeadlineExceeded, RemoteProtocolError
from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import MissReason

SHAPE = PoolShape(64, 2, 8, 2, 16, torch.float32, block_tokens=16)
SIZE = SHAPE.part_bytes
NUM_PARTS = 20
BLOCKS = [(2 * n, 2 * n + 1) for n in range(NUM_PARTS)]
PROMPTS = [random.Random(n).choices(range(3, 259), k=n) for n in (70, 100, 450)]


class Arena:
    """Parts in memory, the node's answers about them, and a pool to load them into."""

    def __init__(self) -> None:
        self.bytes = np.random.default_rng(0).integers(0, 256, NUM_PARTS * SIZE, np.uint8)
        self.order = random.Random(1).sample(range(NUM_PARTS), NUM_PARTS)
        self.pool = SHAPE.create(torch.device("cpu"))
        paged = PagedRuns([pages_as_bytes(self.pool)])
        self.mover = StagedMover(paged, SHAPE.pages_per_block, stage_bytes=3 * SIZE)
        landing = self.mover.landing(self.bytes.data)
        assert landing is not None
        self.landing: Landing = landing
        self.loads = DirectLoads(self.landing, self.bytes.data)
        self.landed = 0
        self.num_confirmed = NUM_PARTS
        self.confirms: list[tuple[int, int]] = []

    def pin(self, num_bytes: int = NUM_PARTS * SIZE) -> None:
        self.landing.pin(0, num_bytes)

    def located(self, first: int, count: int) -> Located:
        slots = self.order[first : first + count]
        views = [self.bytes[slot * SIZE : (slot + 1) * SIZE].data for slot in slots]
        return Located(
            count,
            SIZE,
            np.array([slot * SIZE for slot in slots], "<u8").tobytes(),
            bytes(4 * count),
            b"".join(map(xxhash.xxh3_128_digest, views)),
            "",
        )

    def confirm(self, first: int, located: Located) -> Confirmed:
        self.confirms.append((first, located.num_blocks))
        count = min(located.num_blocks, max(0, self.num_confirmed - first))
        return Confirmed(count, "" if count == located.num_blocks else MissReason.FENCED)

    def read(self, first: int, located: Located) -> tuple[int, MissReason]:
        offsets = np.frombuffer(located.offsets, "<u8").tolist()
        parts = [self.bytes[offset : offset + SIZE].data for offset in offsets]
        self.mover.scatter(parts, BLOCKS[first : first + located.num_blocks])
        return located.num_blocks, MissReason.NONE

    def land(self, first: int, count: int) -> None:
        assert first == self.landed
        self.landed += count

    def run(self, locate: Callable[[int, int], Located] | None = None) -> MissReason:
        calls = NodeCalls(locate or self.located, self.confirm, self.read, self.land)
        return self.loads.run(calls, BLOCKS, SIZE)

    def part(self, number: int) -> bytes:
        """What the pool holds as block `number`."""
        return pages_as_bytes(self.pool)[list(BLOCKS[number])].numpy().tobytes()

    def check(self, count: int) -> None:
        """The first `count` blocks hold their parts, the others are untouched."""
        assert self.landed == count
        for number in range(NUM_PARTS):
            slot = self.order[number]
            expected = self.bytes[slot * SIZE : (slot + 1) * SIZE].tobytes()
            assert self.part(number) == (expected if number < count else bytes(SIZE))


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.loads.close()


def test_everything_arrives_where_it_belongs(arena: Arena) -> None:
    """Slots in any order, chunks of three parts, each confirmed after it was read."""
    arena.pin()
    assert arena.run() is MissReason.NONE
    arena.check(NUM_PARTS)
    assert arena.confirms == [(n, min(3, NUM_PARTS - n)) for n in range(0, NUM_PARTS, 3)]


def test_corrupt_part_ends_the_load_before_it(arena: Arena) -> None:
    """What does not verify, and all behind it, never reaches the pool."""
    arena.pin()
    described = arena.located(0, NUM_PARTS)
    arena.bytes[arena.order[7] * SIZE + 5] ^= 1
    assert arena.run(lambda first, n: parts_of(described, first, first + n)) is MissReason.CORRUPT
    arena.check(7)


def test_without_verification_the_corrupt_part_would_be_loaded(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has power."""
    arena.pin()
    described = arena.located(0, NUM_PARTS)
    arena.bytes[arena.order[7] * SIZE + 5] ^= 1
    monkeypatch.setattr(direct_load, "num_good", lambda located, _: located.num_blocks)
    assert arena.run(lambda first, n: parts_of(described, first, first + n)) is MissReason.NONE
    arena.check(NUM_PARTS)


def test_bytes_that_change_on_their_way_into_the_device_are_found(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked lies in the buffer: a bit that only the copy has wrong never reaches the pool."""
    arena.pin()
    copy, start = Lane.copy, address_of(arena.bytes.data)
    wrong = start + arena.order[7] * SIZE

    def copy_wrongly(lane: Lane, copies: Copies) -> None:
        copy(lane, copies)
        for target, source, num_bytes in copies.tolist():
            if source <= wrong < source + num_bytes:
                ctypes.memset(target + (wrong - source), int(arena.bytes[wrong - start]) ^ 1, 1)

    monkeypatch.setattr(Lane, "copy", copy_wrongly)
    assert arena.run() is MissReason.CORRUPT
    arena.check(7)


def test_part_that_is_not_confirmed_is_not_used(arena: Arena) -> None:
    """A slot given away or fenced meanwhile: its bytes and what follows stay out of the pool."""
    arena.pin()
    arena.num_confirmed = 4
    assert arena.run() is MissReason.FENCED
    arena.check(4)


def test_what_is_not_page_locked_yet_is_copied(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each answer of the node: with a part outside of what is page-locked it comes by the CPU."""
    monkeypatch.setattr(direct_load, "LOCATE_BYTES", 3 * SIZE)
    arena.pin(NUM_PARTS * SIZE * 3 // 4 + 100)
    assert arena.run() is MissReason.NONE
    arena.check(NUM_PARTS)
    assert 0 < len(arena.confirms) < 7


def test_failure_on_the_way_keeps_what_landed(arena: Arena) -> None:
    """The node stops answering in the middle: what was confirmed is there, nothing else."""
    arena.pin()

    def short(first: int, count: int) -> Located:
        return msgspec.structs.replace(arena.located(first, min(count, 5)), reason="evicted")

    assert arena.run(short) is MissReason.EVICTED  # fewer than asked for: the rest is missing
    arena.check(5)

    def late(first: int, count: int) -> Located:
        raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded):
        arena.run(late)


def test_node_that_names_other_memory_is_refused(arena: Arena) -> None:
    """An offset outside the arena is an error of the node, and nothing is read there."""
    arena.pin()
    offsets = np.array([0, NUM_PARTS * SIZE - 1], "<u8").tobytes()
    bad = msgspec.structs.replace(arena.located(0, 2), offsets=offsets)
    with pytest.raises(RemoteProtocolError, match="outside"):
        arena.run(lambda first, n: bad)
    arena.check(0)


def _copies(pinned: PinnedMemory, host: Addresses, size: int, is_target: bool) -> list[list[int]]:
    """(other side's offset, host's, bytes), the other side packed, by the host's order."""
    other = np.arange(len(host), dtype=np.int64) * size
    targets, sources = (host, other) if is_target else (other, host)
    copies = pinned.copies(targets, sources, size, host=0 if is_target else 1).astype(np.int64)
    rows = copies[:, [1, 0, 2] if is_target else [0, 1, 2]]
    return sorted(rows.tolist(), key=lambda row: row[1])


@pytest.mark.parametrize("is_target", [True, False])
def test_copies_never_cross_registrations(is_target: bool) -> None:
    """Neighbours are one copy, but one of each registration, whatever size they have; nothing is left out.
    What is not locked here, two allocations perhaps, is never joined."""
    pinned = PinnedMemory(torch.device("cpu"))
    start = 1000
    for offset, size in ((0, 30), (30, 30), (70, 5)):
        assert pinned.add(start + offset, size, is_writable=True)

    def cut(offsets: list[int], size: int) -> list[list[int]]:
        host = np.array(offsets, dtype=np.int64) + start
        found = _copies(pinned, host, size, is_target)
        return [[other, address - start, length] for other, address, length in found]

    assert cut([0, 20, 40, 60, 80], 20) == [
        [0, 0, 30],
        [30, 30, 30],
        [60, 60, 10],
        [70, 70, 5],
        [75, 75, 5],
        [80, 80, 20],
    ]
    assert cut([40, 0, 80], 20) == [[20, 0, 20], [0, 40, 20], [40, 80, 20]]
    assert cut([10], 62) == [[0, 10, 20], [20, 30, 30], [50, 60, 10], [60, 70, 2]]
    assert cut([], 20) == []
    draw = random.Random(4)
    offsets = draw.sample(range(0, 100, 7), 10)
    bytes_of = {o: n for n, o in enumerate(b for item in offsets for b in range(item, item + 7))}
    found = [(o + i, h + i) for o, h, n in cut(offsets, 7) for i in range(n)]
    assert sorted(found) == sorted((n, o) for o, n in bytes_of.items())


def test_only_page_locked_memory_is_held() -> None:
    pinned = PinnedMemory(torch.device("cpu"))
    assert not pinned.holds(np.array([1000]), 1)
    pinned.add(1030, 30, is_writable=True)
    pinned.add(1000, 30, is_writable=True)
    assert pinned.holds(np.array([1000, 1040, 1020]), 20)
    for outside in (999, 1041, 1060, 5):
        assert not pinned.holds(np.array([1000, outside]), 20)
    pinned.remove(1000)
    pinned.remove(1000)
    assert not pinned.holds(np.array([1000]), 20)
    assert pinned.holds(np.array([1030]), 30)


def _answers(engine: Engine) -> list[Answer]:
    found = [ask(engine, prompt, max_tokens=8) for prompt in PROMPTS]
    connector = engine.connector
    assert connector is None or connector.wait_connected(10)
    until(lambda: connector is None or connector.statistics().saving_bytes == 0)
    return found


def _staged_engine(node: NodeProcess) -> Engine:
    engine = Engine(small_config(node_socket=str(node.socket)))
    paged = PagedRuns([pages_as_bytes(engine.pool)])
    engine._mover = StagedMover(paged, engine.shape.pages_per_block, stage_bytes=64 << 10)
    engine.start(endpoint="")
    assert engine.connector is not None
    assert engine.connector.wait_connected(10)
    assert engine.connector.wait_pinned(10)
    return engine


@pytest.mark.slow
def test_engine_loads_straight_from_the_arena(tmp_path: Path) -> None:
    """Saved through one staged engine, loaded by another: answers token for token as without a node.

    After a kill of the node the memory of the new connection is page-locked anew, and it works on.
    """
    with Engine(small_config()) as engine:
        cold = [ask(engine, prompt, max_tokens=8).token_ids for prompt in PROMPTS]
    with NodeProcess(tmp_path / "node") as node:
        first = _staged_engine(node)
        assert [a.token_ids for a in _answers(first)] == cold
        first.stop()
        second = _staged_engine(node)
        warm = _answers(second)
        assert [a.token_ids for a in warm] == cold
        assert [a.reused.host for a in warm] == [64, 96, 448]
        records = second.fetch_records()
        assert [record.loaded_blocks for record in records] == [4, 6, 28]
        assert all(record.outcome_s > 0 for record in records)
        node.kill()
        node.start()
        connector = second.connector
        assert connector is not None
        until(lambda: connector.statistics().is_up)
        assert [a.token_ids for a in _answers(second)] == cold
        second.clear_prefix_cache()
        again = _answers(second)
        second.stop()
        assert [a.token_ids for a in again] == cold
        assert [a.reused.host for a in again] == [64, 96, 448]


@pytest.mark.slow
def test_what_is_computed_behind_a_load_counts_only_if_all_of_it_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine computes the rest of a prompt while its layers arrive. A part that then does not verify
    is computed anew with all behind it, and the answer is right; with that guard removed it is not."""
    with Engine(small_config()) as engine:
        cold = [ask(engine, prompt, max_tokens=8).token_ids for prompt in PROMPTS]
    behind: list[int] = []
    compute = Engine._compute_behind

    def watch(engine: Engine, sequence: Sequence, *rest: Any) -> None:
        compute(engine, sequence, *rest)
        behind.append(len(sequence.ahead))

    monkeypatch.setattr(Engine, "_compute_behind", watch)
    with NodeProcess(tmp_path / "node") as node:
        first = _staged_engine(node)
        _answers(first)
        first.stop()
        second = _staged_engine(node)
        assert [a.token_ids for a in _answers(second)] == cold
        assert behind == [1, 1, 1]
        _arrive_wrongly(monkeypatch, block=2)
        second.clear_prefix_cache()
        wrong = _answers(second)
        assert [a.token_ids for a in wrong] == cold
        assert [a.reused.host for a in wrong] == [32, 32, 32]
        assert behind == [1] * 6
        monkeypatch.setattr(direct_load, "num_good", lambda located, _: located.num_blocks)
        second.clear_prefix_cache()
        assert all(a.token_ids != right for a, right in zip(_answers(second), cold, strict=True))
        second.stop()


def _arrive_wrongly(monkeypatch: pytest.MonkeyPatch, *, block: int) -> None:
    """Layers of this block of each load arrive as zeros in the pool."""
    begin = _StagedLanding.begin_layers

    def begin_wrongly(
        landing: _StagedLanding, offsets: list[int], blocks: list[Pages], num_layers: int
    ) -> LayerArrival | None:
        region = landing._mover.page_major
        copy = Lane.copy

        def copy_and_spoil(lane: Lane, copies: Copies) -> None:
            copy(lane, copies)
            assert region is not None
            region[list(blocks[block])] = 0

        with monkeypatch.context() as patch:
            patch.setattr(Lane, "copy", copy_and_spoil)
            return begin(landing, offsets, blocks, num_layers)

    monkeypatch.setattr(_StagedLanding, "begin_layers", begin_wrongly)


class _Held(Fence):
    """A step that is not computed yet."""

    def __init__(self) -> None:
        self._is_passed = threading.Event()

    def wait(self) -> None:
        self._is_passed.wait(10)

    def is_passed(self) -> bool:
        return self._is_passed.is_set()

    def pass_(self) -> None:
        self._is_passed.set()


@pytest.mark.slow
def test_only_computed_blocks_are_late(tmp_path: Path) -> None:
    """An engine launches far ahead of its GPU: its saves wait for it, and none is dropped for that.

    Once they are computed and still not saved, the next one is.
    """
    with (
        NodeProcess(tmp_path / "node") as node,
        Engine(small_config(node_socket=str(node.socket), window_bytes=32 << 10)) as engine,
    ):
        connector = engine.connector
        assert connector is not None
        assert connector.wait_connected(10)
        opened = connector.open("r", "", "", PROMPTS[2]).result(10)
        assert opened.keys is not None
        keys = opened.keys.first(20 * 16)
        held = _Held()
        ahead = [
            connector.save(
                "r", keys[n - 1] if n else ROOT_PARENT, keys[n : n + 5], BLOCKS[:5], held
            )
            for n in (0, 5, 10)
        ]
        assert not any(saved.done() for saved in ahead)
        held.is_passed = lambda: True  # type: ignore[method-assign] # computed, but nobody got to them
        late = connector.save("r", keys[14], keys[15:20], BLOCKS[:5], held)
        assert late.result(0).reason is MissReason.DEADLINE
        held.pass_()
        assert [saved.result(10).num_stored for saved in ahead] == [5, 5, 5]
