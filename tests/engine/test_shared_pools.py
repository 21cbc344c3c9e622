"""KV out of another engine's pool: on CPU pools in memfds, through the code that a GPU runs; real node, real
engines. On a GPU: `test_cuda.py`."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from kvfabric_engine import direct_load
from kvfabric_engine.device_memory import MappedMemory, ShareableMemory
from kvfabric_engine.direct_load import DirectLoads
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.layout import pages_as_bytes
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.shared_pools import BorrowedPools, create_shared
from kvfabric_engine.staging import StagedMover
from kvfabric_engine.testing import Answer, ask, small_config

from kvfabric.client.pools import LentPool
from kvfabric.errors import RemoteProtocolError, TransferError
from kvfabric.protocol.messages import Located, PoolName
from kvfabric.testing.processes import NodeProcess, until

CPU = torch.device("cpu")
PROMPTS = [random.Random(n).choices(range(3, 259), k=n) for n in (70, 100, 450)]
NUM_BLOCKS = 4 + 6 + 28


@contextlib.contextmanager
def staged_engine(node: NodeProcess, *, lends: bool = True) -> Iterator[Engine]:
    """An engine that moves KV as one on a GPU does. `lends`: others may read its pool."""
    engine = Engine(small_config(node_socket=str(node.socket)))
    shared = None
    if lends:
        engine.pool, shared = create_shared(engine.shape, CPU)
    paged = PagedRuns([pages_as_bytes(engine.pool)])
    engine._mover = StagedMover(paged, engine.shape.pages_per_block, stage_bytes=64 << 10)
    engine._mover.shared = shared
    engine.start(endpoint="")
    try:
        assert engine.connector is not None
        assert engine.connector.wait_connected(10)
        assert engine.connector.wait_pinned(10)
        yield engine
    finally:
        engine.stop()


def answers(engine: Engine) -> list[Answer]:
    found = [ask(engine, prompt, max_tokens=8) for prompt in PROMPTS]
    connector = engine.connector
    assert connector is not None
    until(lambda: connector.statistics().saving_bytes == 0)
    return found


def counts(engine: Engine) -> tuple[int, int]:
    """Blocks that came out of somebody's pool, and those looked for there in vain."""
    assert engine.connector is not None
    state = engine.connector.statistics()
    return state.borrowed_blocks, state.stale_blocks


def lenders(engine: Engine) -> int:
    """How many pools it has mapped."""
    assert engine.connector is not None
    direct = engine.connector._loads.direct
    return 0 if direct is None else len(direct.landing.borrowed.owners)


def wait_lent(engine: Engine) -> None:
    """Until what it saves is told to others."""
    connector = engine.connector
    assert connector is not None
    until(lambda: connector._saves.lends)


@pytest.fixture(scope="module")
def cold() -> list[tuple[int, ...]]:
    with Engine(small_config()) as engine:
        return [ask(engine, prompt, max_tokens=8).token_ids for prompt in PROMPTS]


@pytest.fixture(params=["in place", "by buffers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a load: straight into the pool, or verified first, for an engine whose pages must not be spoilt."""
    if request.param == "by buffers":
        monkeypatch.setattr(
            DirectLoads,
            "run_in_place",
            lambda loads, calls, blocks, size, *_: loads.run(calls, blocks, size),
        )


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_blocks_come_out_of_the_other_engines_pool(
    tmp_path: Path, cold: list[tuple[int, ...]]
) -> None:
    """All of them, and the answers are those without a node. When the lender is gone its memory is let go of,
    and the blocks come out of the arena."""
    with NodeProcess(tmp_path) as node, staged_engine(node, lends=False) as second:
        with staged_engine(node) as first:
            wait_lent(first)
            assert [a.token_ids for a in answers(first)] == cold
            until(lambda: lenders(second) == 1)
            assert [a.token_ids for a in answers(second)] == cold
            assert counts(second) == (NUM_BLOCKS, 0)
        until(lambda: lenders(second) == 0)
        second.clear_prefix_cache()
        warm = answers(second)
        assert [a.token_ids for a in warm] == cold
        assert [a.reused.host for a in warm] == [64, 96, 448]
        assert counts(second) == (NUM_BLOCKS, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_pages_that_hold_something_else_by_now_are_never_used(
    tmp_path: Path, cold: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again without a word: found by their bytes alone, and the blocks come out of the arena. With
    that guard removed the answers are wrong."""
    with (
        NodeProcess(tmp_path) as node,
        staged_engine(node) as first,
        staged_engine(node, lends=False) as second,
    ):
        wait_lent(first)
        answers(first)
        until(lambda: lenders(second) == 1)
        spoil(first)
        warm = answers(second)
        assert [a.token_ids for a in warm] == cold
        assert [a.reused.host for a in warm] == [64, 96, 448]
        borrowed, stale = counts(second)
        assert stale > 0
        assert borrowed < NUM_BLOCKS
        second.clear_prefix_cache()
        monkeypatch.setattr(direct_load, "num_good", lambda located, _: located.num_blocks)
        wrong = answers(second)
        assert all(a.token_ids != right for a, right in zip(wrong, cold, strict=True))


def spoil(engine: Engine) -> None:
    """Write over the third block of each prompt, and over much else."""
    pages = pages_as_bytes(engine.pool)
    pages[4:] ^= 1


@pytest.mark.slow
def test_pool_is_lent_again_to_a_successor_and_after_a_crash(tmp_path: Path) -> None:
    """Neither a takeover nor a new node knows of pools: engines say it anew by themselves."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(NodeProcess(tmp_path))
        first = stack.enter_context(staged_engine(node))
        second = stack.enter_context(staged_engine(node, lends=False))
        until(lambda: _goes_by_hbm(first, second))
        successor = stack.enter_context(NodeProcess(tmp_path, takeover=True))
        node.wait()
        until(lambda: _goes_by_hbm(first, second))
        successor.kill()
        stack.enter_context(NodeProcess(tmp_path))
        until(lambda: _goes_by_hbm(first, second))


def _goes_by_hbm(first: Engine, second: Engine) -> bool:
    """Whether `second` answers a new prompt out of the pool of `first`, which answered it before."""
    prompt, before = random.choices(range(3, 259), k=40), counts(second)[0]
    right = ask(first, prompt, max_tokens=4).token_ids
    connector = first.connector
    assert connector is not None
    until(lambda: connector.statistics().saving_bytes == 0)
    assert ask(second, prompt, max_tokens=4).token_ids == right
    return counts(second)[0] > before


@pytest.fixture
def borrowed() -> Iterator[tuple[BorrowedPools, PoolName, ShareableMemory]]:
    memory, name = ShareableMemory(8 * 64, CPU), PoolName(b"s" * 16, 0)
    pools = BorrowedPools(CPU, page_bytes=64, pages_per_block=2)
    pools.renew([name], lambda _: LentPool(8, 64, os.dup(memory.descriptor)))
    yield pools, name, memory
    pools.close()
    memory.close()


def located(name: PoolName, owner_of: bytes, pages: list[int]) -> Located:
    count = len(owner_of)
    vector = np.array(pages, "<u4").tobytes()
    return Located(count, 128, bytes(8 * count), b"", b"", "", (name,), owner_of, vector)


def test_what_was_located_is_cut_where_it_changes_from_whom_it_comes(
    borrowed: tuple[BorrowedPools, PoolName, ShareableMemory],
) -> None:
    """And a pool that is not mapped (yet) counts as none."""
    pools, name, _ = borrowed
    found = list(pools.stretches(located(name, b"\1\1\0\1", [1, 2, 3, 4, 0, 0, 7, 0])))
    assert [(s.start, s.stop, s.pool is not None) for s in found] == [
        (0, 2, True),
        (2, 3, False),
        (3, 4, True),
    ]
    assert found[0].pages is not None
    assert found[0].pages.tolist() == [[1, 2], [3, 4]]
    unknown = located(PoolName(b"t" * 16, 0), b"\1", [1, 2])
    assert [s.pool for s in pools.stretches(unknown)] == [None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_of": b"\1"},
        {"pool_of": b"\1\2"},
        {"pool_pages": bytes(4)},
        {"pool_pages": np.array([0, 1, 2, 8], "<u4").tobytes()},
    ],
)
def test_a_node_that_names_other_memory_is_refused(
    borrowed: tuple[BorrowedPools, PoolName, ShareableMemory], wrong: dict[str, bytes]
) -> None:
    """A page outside of the pool would be read by a kernel of ours."""
    pools, name, _ = borrowed
    bad = msgspec.structs.replace(located(name, b"\1\1", [0, 1, 2, 3]), **wrong)
    with pytest.raises(RemoteProtocolError):
        list(pools.stretches(bad))


def test_a_pool_that_does_not_fit_is_not_borrowed(caplog: pytest.LogCaptureFixture) -> None:
    """Shorter than was said, pages of another size: one line each, and no second try while it is lent."""
    pools = BorrowedPools(CPU, page_bytes=64, pages_per_block=2)
    names = [PoolName(bytes([n]) * 16, 0) for n in range(2)]
    asked: list[PoolName] = []

    def borrow(name: PoolName) -> LentPool:
        asked.append(name)
        memory = ShareableMemory(64, CPU)
        return LentPool(8, 64 if name == names[0] else 32, memory.descriptor)

    pools.renew(names, borrow)
    pools.renew(names, borrow)
    assert asked == names
    assert len(caplog.records) == 2
    pools.renew([], borrow)
    pools.renew(names, borrow)
    assert asked == names * 2


def test_mapped_memory_is_the_makers_and_read_only() -> None:
    memory = ShareableMemory(4096, CPU)
    mapped = MappedMemory(memory.descriptor, 4096, CPU)
    memory.tensor[7] = 9
    maps = next(
        line for line in Path("/proc/self/maps").read_text().splitlines()
        if line.startswith(f"{mapped.address:x}-")
    )  # fmt: skip
    assert maps.split()[1].startswith("r--")
    with pytest.raises(TransferError, match="shorter"):
        MappedMemory(memory.descriptor, 8192, CPU)
    mapped.close()
    mapped.close()
    memory.close()
    memory.close()
    tensor = memory.tensor[7:8]
    del memory
    gc.collect()
    assert tensor.item() == 9  # the maker's own mapping stays
