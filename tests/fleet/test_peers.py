"""Blocks from node to node over UCX: real nodes, a real Redis, engines that verify every byte."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvfabric.handle import Handoff
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.state import RegistryState
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.minting import Minter
from kvfabric.testing.processes import NodeProcess
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT, BlockKey
from tests.fleet.peer_faults import FAULTS, altered

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

SMALL, LARGE = 4096, 1 << 20


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass
class Pair:
    """Node `a` has blocks, an engine of node `b` wants them. `stack`: of the engines."""

    a: NodeProcess
    b: NodeProcess
    minter: Minter
    stack: ExitStack

    def engine(self, node: NodeProcess, part_bytes: int) -> TinyEngine:
        hello = tiny_hello(part_bytes=part_bytes, window_bytes=64 << 20)
        engine = TinyEngine.connect(node.socket, hello)
        self.stack.callback(engine.client.close)
        return engine

    def told(self) -> str:
        """What happened, for a test that fails."""
        shown = ("misses", "transfers", "matched", "epoch", "refused", "holders")
        return "\n".join(
            f"{name}: {key} {value:g}"
            for name, node in (("a", self.a), ("b", self.b))
            for key, value in node.metrics().items()
            if value and key.startswith(shown)
        ) + "".join(self.a.log[-9:] + self.b.log[-9:])

    def handle(self, engine: TinyEngine, request: str, handoff: Handoff | None = None) -> str:
        self.minter.handoff = handoff
        return self.minter.handle(engine, request, RegistryState(), tenant=DEFAULT_TENANT)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with nodes_on(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For tests that leave them as they were."""
    with nodes_on(tmp_path_factory.mktemp("serving")) as found:
        yield found


@contextmanager
def nodes_on(
    tmp_path: Path,
    *,
    sender: Sequence[str] = (),
    receiver: Sequence[str] = (),
    **options: object,
) -> Iterator[Pair]:
    """`sender`, `receiver`: what is changed in them, of `peer_faults`. `options`: of both nodes."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(tmp_path / "redis"))
        keys = tmp_path / "keys"
        nodes = [
            stack.enter_context(
                NodeProcess(
                    tmp_path / name,
                    python=altered(tmp_path, *changes) if changes else sys.executable,
                    node_id=name,
                    directory=redis.url,
                    keyring_dir=keys,
                    ucx_net_devices="lo",
                    http="127.0.0.1:0",
                    **{"host_bytes": 512 << 20, "epoch_lease_s": 1.0, **options},
                )
            )
            for name, changes in (("a", sender), ("b", receiver))
        ]
        wait(lambda: all(node.metrics()["epoch_lease_valid"] for node in nodes))
        minter = Minter(keys)
        minter.sources = ("a",)
        with ExitStack() as engines:
            yield Pair(nodes[0], nodes[1], minter, engines)


def stored(pair: Pair, num_blocks: int, part_bytes: int, prompt: str = "p") -> None:
    """By an engine at `a`."""
    engine = pair.engine(pair.a, part_bytes)
    keys = engine.open("put", prompt, num_blocks, pair.handle(engine, "put"))
    assert engine.store("put", keys) == num_blocks
    engine.release("put")


def description_of(node: NodeProcess) -> pb.NodeDescription:
    with grpc.insecure_channel(f"unix:{node.state_dir}/admin.sock") as channel:
        events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        described: pb.NodeDescription = events.Describe(pb.DescribeRequest())
        return described


def fetched(
    pair: Pair, engine: TinyEngine, num_blocks: int, prompt: str = "p"
) -> tuple[list[BlockKey], list[bytes]]:
    keys = engine.open("get", prompt, num_blocks, pair.handle(engine, "get"))
    found = engine.load("get", keys)
    engine.release("get")
    return keys, found


# 5,000 B: slots that are never neighbours.
@pytest.mark.parametrize(("num_blocks", "part_bytes"), [(200, SMALL), (90, 5000), (40, LARGE)])
def test_blocks_come_from_the_node_that_a_handle_names(
    serving: Pair, num_blocks: int, part_bytes: int
) -> None:
    pair = serving
    stored(pair, num_blocks, part_bytes)
    second = pair.engine(pair.b, part_bytes)
    before = pair.b.metrics()
    found: list[bytes] = []
    keys: list[BlockKey] = []
    until = time.monotonic() + DEADLINE_S
    while not found:  # a peer that does not answer at once is not waited for
        assert time.monotonic() < until, pair.told()
        keys, found = fetched(pair, second, num_blocks)
    assert len(found) == num_blocks
    assert wrong_blocks(keys, found) == 0

    def grown(name: str) -> float:
        return pair.b.metrics()[name] - before.get(name, 0)

    assert grown('blocks_matched_total{tier="peer"}') == num_blocks
    assert grown('transfers_total{result="fetched_blocks"}') == num_blocks
    # How fast that was, routers hear of it.
    wait(lambda: {rate.tier for rate in description_of(pair.b).rates} >= {"peer", "host"})
    told = description_of(pair.b)
    assert told.exchanges
    assert told.machine == description_of(pair.a).machine != b""
    (peer,) = [rate for rate in told.rates if rate.tier == "peer"]
    assert peer.peer == "a"
    assert 1e6 < peer.bytes_per_s < 1e11
    # They are here now, and leave the other node nothing to keep.
    assert len(fetched(pair, second, num_blocks)[1]) == num_blocks
    assert grown('blocks_matched_total{tier="host"}') == num_blocks
    wait(lambda: not pair.a.metrics()["leased_bytes"])


def test_a_hint_has_them_fetched_before_the_engine_asks(pair: Pair) -> None:
    num_blocks = 12
    stored(pair, num_blocks, LARGE, "hinted")
    second = pair.engine(pair.b, LARGE)
    keys = second.open("early", "hinted", num_blocks, pair.handle(second, "early"))
    second.release("early")
    fetched_blocks = 'transfers_total{result="fetched_blocks"}'
    before = pair.b.metrics().get(fetched_blocks, 0)
    with grpc.insecure_channel(f"unix:{pair.b.state_dir}/admin.sock") as channel:
        hints = pb_grpc.NodeHintsStub(channel)  # type: ignore[no-untyped-call]
        until, number = time.monotonic() + DEADLINE_S, 0
        while pair.b.metrics().get(fetched_blocks, 0) < before + num_blocks:
            assert time.monotonic() < until, pair.told()  # a late answer of the peer is given up
            number += 1
            hint = pb.PrefetchHint(handle=pair.handle(second, f"get{number}"), keys=b"".join(keys))
            reply = hints.Prefetch(pb.PrefetchRequest(hints=[hint]))
            assert reply.num_begun == 1
            time.sleep(0.5)
    keys = second.open("get", "hinted", num_blocks, pair.handle(second, "get"))
    matched = second.client.match("get", keys, deadline_s=DEADLINE_S)
    assert list(matched.tiers) == [0] * num_blocks
    found = second.load("get", keys)
    assert (len(found), wrong_blocks(keys, found)) == (num_blocks, 0)
    second.release("get")
    wait(lambda: not pair.a.metrics()["leased_bytes"])
    wait(lambda: not pair.b.metrics()["leased_bytes"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_does_not_answer_costs_a_recompute(pair: Pair, how: signal.Signals) -> None:
    stored(pair, 8, LARGE)
    second = pair.engine(pair.b, LARGE)
    os.kill(pair.a.pid, how)
    began = time.monotonic()
    assert fetched(pair, second, 8)[1] == []
    assert time.monotonic() - began < 1.0
    if how is signal.SIGSTOP:
        os.kill(pair.a.pid, signal.SIGCONT)


def found_after(pair: Pair, prompt: str, num_blocks: int, part_bytes: int) -> tuple[int, int]:
    """(blocks, wrong ones) that an engine of `b` gets once a transfer was tried."""
    stored(pair, num_blocks, part_bytes, prompt)
    second = pair.engine(pair.b, part_bytes)
    found: list[bytes] = []
    keys: list[BlockKey] = []
    before, until = tried(pair), time.monotonic() + DEADLINE_S
    while not found and tried(pair) == before:
        assert time.monotonic() < until, pair.told()
        keys, found = fetched(pair, second, num_blocks, prompt)
    return len(found), wrong_blocks(keys, found)


def tried(pair: Pair) -> float:
    """Blocks that came, or did not, until now."""
    metrics = pair.b.metrics()
    results = ("fetched", "corrupt", "failed", "unwanted")
    return sum(metrics.get(f'transfers_total{{result="{r}_blocks"}}', 0) for r in results)


def test_a_peer_that_sends_something_else(tmp_path: Path) -> None:
    """No byte of it is served, nothing leaks, and nothing is in the way of a store of the same blocks."""
    with nodes_on(tmp_path, sender=("sends_something_else",), receiver=("waits_less",)) as pair:
        for number, fault in enumerate(FAULTS):
            num_blocks, part_bytes = ((100, SMALL), (12, LARGE))[number % 2]
            (pair.a.state_dir / "fault").write_text(fault)
            assert found_after(pair, fault, num_blocks, part_bytes) == (0, 0), fault
            assert pair.b.metrics()['tier_blocks{tier="host"}'] == 0
        (pair.a.state_dir / "fault").unlink()
        wait(lambda: not pair.a.metrics()["leased_bytes"])
        wait(lambda: not pair.b.metrics()["draining_bytes"])
        assert pair.b.metrics()['tier_used_bytes{tier="host"}'] == 0
        engine = pair.engine(pair.b, SMALL)
        keys = engine.open("own", FAULTS[0], 100, pair.handle(engine, "own"))
        assert engine.store("own", keys) == 100
        assert wrong_blocks(keys, engine.load("own", keys)) == 0
        # And who sent nonsense is asked again.
        assert found_after(pair, "another", 100, SMALL) == (100, 0)


def test_without_verifying_wrong_bytes_are_served(tmp_path: Path) -> None:
    """The twin."""
    changes = ("believes_what_comes",)
    with nodes_on(tmp_path, sender=("sends_something_else",), receiver=changes) as pair:
        (pair.a.state_dir / "fault").write_text("wrong bytes")
        assert found_after(pair, "small", 100, SMALL) == (100, 100)
        assert found_after(pair, "large", 12, LARGE) == (12, 12)
