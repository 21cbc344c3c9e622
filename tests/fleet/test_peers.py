"""Blocks from node to node over UCX: real nodes, a real Redis, engines that verify every byte."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvfabric.registry.state import RegistryState
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.minting import Minter
from kvfabric.testing.processes import NodeProcess
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT, BlockKey

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

SMALL, LARGE = 4096, 1 << 20


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass
class Pair:
    """Node `a` has blocks, an engine of node `b` wants them."""

    a: NodeProcess
    b: NodeProcess
    minter: Minter
    stack: ExitStack

    def engine(self, node: NodeProcess, part_bytes: int) -> TinyEngine:
        hello = tiny_hello(part_bytes=part_bytes, window_bytes=64 << 20)
        engine = TinyEngine.connect(node.socket, hello)
        self.stack.callback(engine.client.close)
        return engine

    def handle(self, engine: TinyEngine, request: str) -> str:
        return self.minter.handle(engine, request, RegistryState(), tenant=DEFAULT_TENANT)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(tmp_path / "redis"))
        keys = tmp_path / "keys"
        nodes = [
            stack.enter_context(
                NodeProcess(
                    tmp_path / name,
                    node_id=name,
                    directory=redis.url,
                    keyring_dir=keys,
                    ucx_net_devices="lo",
                    http="127.0.0.1:0",
                    epoch_lease_s=1.0,
                    host_bytes=512 << 20,
                )
            )
            for name in ("a", "b")
        ]
        wait(lambda: all(node.metrics()["epoch_lease_valid"] for node in nodes))
        minter = Minter(keys)
        minter.sources = ("a",)
        yield Pair(nodes[0], nodes[1], minter, stack)


def stored(pair: Pair, num_blocks: int, part_bytes: int) -> None:
    """By an engine at `a`: the prompt "p"."""
    engine = pair.engine(pair.a, part_bytes)
    keys = engine.open("put", "p", num_blocks, pair.handle(engine, "put"))
    assert engine.store("put", keys) == num_blocks
    engine.release("put")


def fetched(pair: Pair, engine: TinyEngine, num_blocks: int) -> tuple[list[BlockKey], list[bytes]]:
    keys = engine.open("get", "p", num_blocks, pair.handle(engine, "get"))
    found = engine.load("get", keys)
    engine.release("get")
    return keys, found


@pytest.mark.parametrize(("num_blocks", "part_bytes"), [(200, SMALL), (40, LARGE)])
def test_blocks_come_from_the_node_that_a_handle_names(
    pair: Pair, num_blocks: int, part_bytes: int
) -> None:
    stored(pair, num_blocks, part_bytes)
    second = pair.engine(pair.b, part_bytes)
    found: list[bytes] = []
    keys: list[BlockKey] = []
    until = time.monotonic() + DEADLINE_S
    while not found:  # a peer that does not answer at once is not waited for
        assert time.monotonic() < until
        keys, found = fetched(pair, second, num_blocks)
    assert len(found) == num_blocks
    assert wrong_blocks(keys, found) == 0
    metrics = pair.b.metrics()
    assert metrics['blocks_matched_total{tier="peer"}'] == num_blocks
    assert metrics['transfers_total{result="fetched_blocks"}'] == num_blocks
    # They are here now, and leave the other node nothing to keep.
    assert len(fetched(pair, second, num_blocks)[1]) == num_blocks
    assert pair.b.metrics()['blocks_matched_total{tier="host"}'] == num_blocks
    wait(lambda: not pair.a.metrics()["leased_bytes"])


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
