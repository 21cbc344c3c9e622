"""A prompt computed chunk by chunk at one node and taken as it comes at another: real nodes, tiny engines.

The prefill engine stores a chunk when the test says so; the decode engine follows. Whatever becomes of the
one, the other is answered, in time, by blocks that verify.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.handle import Handoff
from kvfabric.protocol.messages import Matched
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, wrong_blocks
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import BlockKey
from tests.fleet.test_peers import LARGE, SMALL, Pair, nodes_on, wait

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

CHUNK, NUM_CHUNKS = 4, 4
NUM_BLOCKS = CHUNK * NUM_CHUNKS
LEAKS = ("leased_bytes", "draining_bytes")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with nodes_on(tmp_path_factory.mktemp("handoffs")) as found:
        found.minter.sources = ()  # nothing but what the hand-off itself names
        yield found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of the hand-off and its prompt: each test has its own."""
    return str(request.node.name)


class Prefill:
    """An engine that computes a prompt for another."""

    def __init__(self, pair: Pair, name: str, part_bytes: int = SMALL) -> None:
        self.engine = pair.engine(pair.a, part_bytes)
        self.request = f"{name}-p"
        handle = pair.handle(self.engine, self.request, Handoff(name, "a"))
        self.keys = self.engine.open(self.request, name, NUM_BLOCKS, handle)
        assert self.engine.opened is not None
        assert self.engine.opened.hands_over

    def chunk(self, number: int) -> None:
        first = number * CHUNK
        parent = {"parent": self.keys[first - 1]} if first else {}
        stored = self.engine.store(self.request, self.keys[first : first + CHUNK], **parent)
        assert stored == CHUNK


class Decode:
    """An engine that waits for it, at node `b` unless told otherwise."""

    def __init__(
        self,
        pair: Pair,
        name: str,
        *,
        wait_s: float = 10.0,
        part_bytes: int = SMALL,
        node: NodeProcess | None = None,
    ) -> None:
        self.engine = pair.engine(node or pair.b, part_bytes)
        self.request = f"{name}-d"
        handoff = Handoff(name, "a", int(wait_s * 1e3))
        handle = pair.handle(self.engine, self.request, handoff)
        self.keys = self.engine.open(self.request, name, NUM_BLOCKS, handle)
        assert self.engine.opened is not None
        assert self.engine.opened.wait_s == wait_s

    def follow(self, beyond: int = 0, wait_s: float = DEADLINE_S) -> Matched:
        return self.engine.client.match(
            self.request, self.keys, deadline_s=2 * DEADLINE_S, beyond=beyond, wait_s=wait_s
        )

    def load(self, count: int) -> list[bytes]:
        return self.engine.load(self.request, self.keys[:count]) if count else []


def fetched(pair: Pair) -> float:
    """Blocks that came to node `b` until now."""
    return pair.b.metrics().get('transfers_total{result="fetched_blocks"}', 0)


def check(keys: list[BlockKey], found: list[bytes], count: int) -> None:
    assert len(found) == count
    assert wrong_blocks(keys, found) == 0


def nothing_leaks(pair: Pair, *engines: TinyEngine) -> None:
    for engine in engines:
        engine.client.close()
    for node in (pair.a, pair.b):
        until = time.monotonic() + DEADLINE_S
        while kept := [name for name in LEAKS if node.metrics()[name]]:
            assert time.monotonic() < until, (node.state_dir.name, kept, pair.told())
            time.sleep(0.02)


@pytest.mark.parametrize("part_bytes", [SMALL, LARGE])
def test_each_chunk_is_there_before_the_next_is_computed(
    pair: Pair, name: str, part_bytes: int
) -> None:
    before, decode = fetched(pair), Decode(pair, name, part_bytes=part_bytes)
    assert decode.follow(wait_s=0).more
    prefill = Prefill(pair, name, part_bytes)
    for number in range(NUM_CHUNKS):
        prefill.chunk(number)
        matched = decode.follow(beyond=number * CHUNK)
        assert matched.num_blocks == (number + 1) * CHUNK, pair.told()
        assert matched.more == (number < NUM_CHUNKS - 1)
        check(decode.keys, decode.load(matched.num_blocks), matched.num_blocks)
    assert fetched(pair) - before == NUM_BLOCKS
    nothing_leaks(pair, prefill.engine, decode.engine)


def test_both_at_one_node(pair: Pair, name: str) -> None:
    decode = Decode(pair, name, node=pair.a)
    assert decode.follow(wait_s=0).more
    prefill = Prefill(pair, name)
    prefill.chunk(0)
    assert decode.follow().num_blocks == CHUNK
    for number in range(1, NUM_CHUNKS):
        prefill.chunk(number)
    matched = decode.follow(beyond=NUM_BLOCKS - 1)
    assert (matched.num_blocks, matched.more) == (NUM_BLOCKS, False)
    check(decode.keys, decode.load(NUM_BLOCKS), NUM_BLOCKS)
    nothing_leaks(pair, prefill.engine, decode.engine)


def ends(pair: Pair, decode: Decode, *, within_s: float, num_blocks: int) -> None:
    """Nobody waits longer, and what did come is there."""
    until, seen = time.monotonic() + within_s, 0
    while (matched := decode.follow(beyond=seen, wait_s=0.25)).more:
        assert time.monotonic() < until, f"waits still {pair.told()}"
        seen = max(seen, matched.num_blocks)
    assert time.monotonic() < until, pair.told()
    assert matched.num_blocks == num_blocks, pair.told()
    check(decode.keys, decode.load(num_blocks), num_blocks)


def test_more_than_may_be_leased_is_not_waited_for(pair: Pair, name: str) -> None:
    """A tenth of the host tier: what is beyond it would not be given however long one asks."""
    part_bytes = 8 << 20
    decode, prefill = Decode(pair, name, part_bytes=part_bytes), Prefill(pair, name, part_bytes)
    for number in range(NUM_CHUNKS):
        prefill.chunk(number)
    until, seen = time.monotonic() + 3.0, 0
    while (matched := decode.follow(beyond=seen, wait_s=0.25)).more:
        assert time.monotonic() < until, pair.told()
        seen = max(seen, matched.num_blocks)
    assert CHUNK <= matched.num_blocks < NUM_BLOCKS
    nothing_leaks(pair, prefill.engine, decode.engine)


@pytest.mark.parametrize("num_chunks", [0, 2], ids=["before", "during"])
@pytest.mark.parametrize("how", ["dies", "gives up"])
def test_prefill_that_ends_early(pair: Pair, name: str, num_chunks: int, how: str) -> None:
    """The rest is not waited for: its node knows that nobody computes it any more."""
    decode, prefill = Decode(pair, name), Prefill(pair, name)
    decode.follow(wait_s=0)
    for number in range(num_chunks):
        prefill.chunk(number)
    if how == "dies":
        prefill.engine.client.close()
    else:
        prefill.engine.release(prefill.request)
    ends(pair, decode, within_s=2.0, num_blocks=num_chunks * CHUNK)
    nothing_leaks(pair, prefill.engine, decode.engine)


def test_prefill_that_dies_when_all_is_stored(pair: Pair, name: str) -> None:
    decode, prefill = Decode(pair, name, part_bytes=LARGE), Prefill(pair, name, LARGE)
    for number in range(NUM_CHUNKS):
        prefill.chunk(number)
    prefill.engine.client.close()
    ends(pair, decode, within_s=2.0, num_blocks=NUM_BLOCKS)
    nothing_leaks(pair, decode.engine)


def test_prefill_that_never_begins(pair: Pair, name: str) -> None:
    decode = Decode(pair, name)
    ends(pair, decode, within_s=3.0, num_blocks=0)


def test_twins_and_a_node_that_is_killed(tmp_path: Path) -> None:
    """Without the deadline, and without a look at who computes, the tests above fail. That a node is gone is
    noticed all the same."""
    changes = {"sender": ("hopes_for_more",), "receiver": ("waits_for_ever",)}
    with nodes_on(tmp_path, **changes) as pair:
        decode, prefill = Decode(pair, "hangs", wait_s=0.5), Prefill(pair, "hangs")
        prefill.chunk(0)
        with pytest.raises(AssertionError, match="waits still"):
            ends(pair, decode, within_s=1.5, num_blocks=CHUNK)
        prefill.engine.client.close()
        with pytest.raises(AssertionError, match="waits still"):
            ends(pair, decode, within_s=1.5, num_blocks=CHUNK)
        decode.engine.release(decode.request)

        decode, prefill = Decode(pair, "p"), Prefill(pair, "p")
        prefill.chunk(0)
        assert decode.follow().num_blocks == CHUNK
        pair.a.kill()
        ends(pair, decode, within_s=1.0, num_blocks=CHUNK)
        decode.engine.client.close()
        wait(lambda: not pair.b.metrics()["leased_bytes"])
        wait(lambda: not pair.b.metrics()["draining_bytes"])


def test_prefill_that_hangs(pair: Pair, name: str) -> None:
    """It is connected and stores nothing more: only the deadline tells."""
    decode, prefill = Decode(pair, name, wait_s=1.5), Prefill(pair, name)
    prefill.chunk(0)
    ends(pair, decode, within_s=2.0, num_blocks=CHUNK)
    nothing_leaks(pair, prefill.engine, decode.engine)


def test_its_node_stands_still(pair: Pair, name: str) -> None:
    wait_s = 1.5
    decode, prefill = Decode(pair, name, wait_s=wait_s), Prefill(pair, name)
    prefill.chunk(0)
    assert decode.follow().num_blocks == CHUNK
    os.kill(pair.a.pid, signal.SIGSTOP)
    try:
        ends(pair, decode, within_s=wait_s + 0.5, num_blocks=CHUNK)
    finally:
        os.kill(pair.a.pid, signal.SIGCONT)
    nothing_leaks(pair, prefill.engine, decode.engine)
    wait(lambda: pair.a.metrics()["epoch_lease_valid"])


def test_decode_that_dies_leaves_nothing(pair: Pair, name: str) -> None:
    decode, prefill = Decode(pair, name, wait_s=2.0), Prefill(pair, name)
    prefill.chunk(0)
    decode.follow()
    decode.engine.client.close()
    for number in range(1, NUM_CHUNKS):
        prefill.chunk(number)
    nothing_leaks(pair, prefill.engine)
