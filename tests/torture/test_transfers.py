"""Transfers that break: the peer dies at each tenth, the cable is cut, what was given up arrives after all.

Real nodes and engines. Whatever happens, an engine gets right bytes or none, within the deadline; nothing
leaks; the next transfer works. Beside each the same with the guard out, which must fail.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvfabric.client import NodeClient
from kvfabric.daemon.fetching import CHUNK_BYTES, FETCH_S
from kvfabric.testing.engine import DEADLINE_S, wrong_blocks
from kvfabric.testing.minting import Minter
from kvfabric.testing.netns import Network, why_not, within
from kvfabric.testing.processes import NodeProcess
from kvfabric.testing.redis import RedisServer
from tests.fleet.peer_faults import LATE_S, altered
from tests.fleet.test_peers import LARGE, SMALL, Pair, fetched, found_after, nodes_on, stored, wait
from tests.torture.scale import FULL, at_most, count, record

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

TENTHS = range(10) if FULL else (1, 5, 9)
ROUNDS = count(1, 10, "KVFABRIC_TORTURE_TRANSFERS")
BLOCKS = CHUNK_BYTES // LARGE
"""What is sent at once."""

LEASE_S = 5.0
"""Of epochs: not what is tried here, so not to be lost on a busy machine."""

NOTICED_S = 4.0
"""A peer whose process ended: its kernel says so, long before `FETCH_S`."""


# ---------------------------------------------------------------------- a peer that dies


def test_a_peer_that_dies_at_each_tenth_of_a_transfer(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    served = 0
    with nodes_on(tmp_path, sender=("dies_on_the_way",), epoch_lease_s=LEASE_S) as pair:
        for number in range(ROUNDS):
            for tenth in TENTHS:
                seen.append(died_at(pair, tenth, f"{number} {tenth}"))
                wait(lambda: not pair.b.metrics()["draining_bytes"])
                # All or nothing: what was posted may arrive although its sender is dead.
                assert seen[-1] in ((0, 0), (BLOCKS, 0))
                served += seen[-1][0]
                assert pair.b.metrics()['tier_used_bytes{tier="host"}'] == served * LARGE
                pair.a.start()
        # Its successor at the same address is asked as it was, over a link of its own.
        wait(lambda: pair.a.metrics()["epoch_lease_valid"])
        assert found_after(pair, "again", BLOCKS, LARGE) == (BLOCKS, 0)
    record(
        "transfers. peer killed at each tenth of a transfer, in bytes sent",
        len(seen),
        f"{at_most(0, len(seen))} times a wrong block, or some of a transfer, was served; "
        f"{sum(not found for found, _ in seen)} transfers broke, of which no slot was left",
    )
    assert (0, 0) in seen


def died_at(pair: Pair, tenth: int, prompt: str) -> tuple[int, int]:
    """(blocks, wrong ones) that an engine of `b` gets from `a`, which dies on the way."""
    fault = pair.a.state_dir / "fault"
    owner, engine = pair.engine(pair.a, LARGE), pair.engine(pair.b, LARGE)
    keys = owner.open("put", prompt, BLOCKS, pair.handle(owner, "put"))
    assert owner.store("put", keys) == BLOCKS
    owner.release("put")
    fault.write_text(str(tenth))
    ends, found = time.monotonic() + DEADLINE_S, list[bytes]()
    while pair.a.is_running() and not found:
        assert time.monotonic() < ends, pair.told()
        began = time.monotonic()
        keys, found = fetched(pair, engine, BLOCKS, prompt)
    assert time.monotonic() - began < NOTICED_S
    pair.a.wait()
    fault.unlink()
    for one in (owner, engine):
        one.client.close()
    return len(found), wrong_blocks(keys, found)


def test_without_looking_what_failed_parts_are_served(tmp_path: Path) -> None:
    """The twin."""
    changes = ("takes_what_is_there",)
    with nodes_on(
        tmp_path, sender=("dies_on_the_way",), receiver=changes, epoch_lease_s=LEASE_S
    ) as pair:
        num_found, num_wrong = died_at(pair, 5, "half")
        assert num_found == BLOCKS
        assert 0 < num_wrong < BLOCKS


def test_a_node_that_crashed_fetches_into_the_arena_that_its_engine_returns(tmp_path: Path) -> None:
    """It has none when it starts, and UCX nothing to register."""
    with nodes_on(tmp_path) as pair:
        engine = pair.engine(pair.b, LARGE)
        pair.b.kill()
        pair.b.start()
        client = NodeClient.connect(
            pair.b.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
        )
        pair.stack.callback(client.close)
        assert client.arena_adopted
        wait(lambda: pair.b.metrics()["epoch_lease_valid"])
        assert found_after(pair, "returned", BLOCKS, LARGE) == (BLOCKS, 0)


# ---------------------------------------------------------------------- a message that comes too late


NEW_BLOCKS = 40
"""More than were given up: slots that are free are taken again first."""


@pytest.mark.parametrize(("num_blocks", "part_bytes"), [(8, LARGE), (400, SMALL)][: 1 + FULL])
def test_what_comes_late_is_in_nobodys_slot(
    tmp_path: Path, num_blocks: int, part_bytes: int
) -> None:
    with late_pair(tmp_path, "waits_less") as pair:
        assert not_verified(pair, num_blocks, part_bytes) == 0, pair.told()
        wait(lambda: not pair.b.metrics()["draining_bytes"])
        # And the peer that was late is asked again.
        (pair.a.state_dir / "fault").unlink()
        assert found_after(pair, "next", 4, LARGE) == (4, 0)


def test_without_draining_it_is_in_anothers_slot(tmp_path: Path) -> None:
    """The twin."""
    with late_pair(tmp_path, "waits_less", "lets_go_at_once") as pair:
        assert not_verified(pair, 8, LARGE) > 0


@contextmanager
def late_pair(tmp_path: Path, *receiver: str) -> Iterator[Pair]:
    sender = ("sends_late",)
    with nodes_on(tmp_path, sender=sender, receiver=receiver, epoch_lease_s=LEASE_S) as pair:
        (pair.a.state_dir / "fault").write_text("late")
        yield pair


def not_verified(pair: Pair, num_blocks: int, part_bytes: int) -> int:
    """Blocks of an engine of `b`, in slots that a given up transfer had, which are not what it stored."""
    assert found_after(pair, "late", num_blocks, part_bytes) == (0, 0)
    given_up = time.monotonic()
    engine = pair.engine(pair.b, LARGE)
    keys = engine.open("own", "own", NEW_BLOCKS, pair.handle(engine, "own"))
    assert engine.store("own", keys) == NEW_BLOCKS
    assert time.monotonic() - given_up < LATE_S - 1.0, "too slow: what was late is there already"
    located = engine.locate("own", keys)
    assert located.num_blocks == NEW_BLOCKS
    time.sleep(LATE_S)
    buffers = [memoryview(bytearray(LARGE)) for _ in keys]
    return NEW_BLOCKS - engine.client.read(located, buffers)


# ---------------------------------------------------------------------- half-open connections


class FarNode(NodeProcess):
    """A node in a network of its own."""

    def __init__(self, namespace: str, state_dir: Path, *changes: str, **options: object) -> None:
        python = altered(state_dir.parent, *changes) if changes else sys.executable
        script = state_dir.parent / f"far-{state_dir.name}"
        script.write_text(f'#!/bin/sh\nexec ip netns exec {namespace} {python} "$@"\n')
        script.chmod(0o700)
        super().__init__(state_dir, python=str(script), **options)
        self._namespace = namespace

    def metrics(self) -> dict[str, float]:
        return within(self._namespace, super().metrics)


@contextmanager
def far_pair(tmp_path: Path, *receiver: str) -> Iterator[tuple[Pair, Network]]:
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        network = stack.enter_context(Network(("a", "b")))
        redis = stack.enter_context(RedisServer(tmp_path / "redis"))
        changes: dict[str, Sequence[str]] = {"a": ("gives_up_sooner",), "b": receiver}
        nodes = [
            stack.enter_context(
                FarNode(
                    network.namespace(name),
                    tmp_path / name,
                    *changes[name],
                    node_id=name,
                    directory=redis.url,
                    keyring_dir=tmp_path / "keys",
                    listen=f"{network.address(name)}:9400",
                    insecure="true",
                    ucx_net_devices="eth0",
                    http="127.0.0.1:0",
                    epoch_lease_s=LEASE_S,
                    host_bytes=512 << 20,
                )
            )
            for name in ("a", "b")
        ]
        wait(lambda: all(node.metrics()["epoch_lease_valid"] for node in nodes))
        minter = Minter(tmp_path / "keys")
        minter.sources = ("a",)
        yield Pair(nodes[0], nodes[1], minter, stack), network


def cut_in_a_transfer(pair: Pair, network: Network) -> threading.Thread:
    """An engine of `b` that waits for blocks of `a`, whose cable was cut when some were over."""
    stored(pair, BLOCKS, LARGE, "cut")
    engine = pair.engine(pair.b, LARGE)
    network.limit("b", "80mbit")  # two seconds
    begun = threading.Event()

    def fetch() -> None:
        found: list[bytes] = []
        while not found and not begun.is_set():
            keys = engine.open("get", "cut", BLOCKS, pair.handle(engine, "get"))
            matched = engine.client.match("get", keys, deadline_s=DEADLINE_S)
            if not matched.num_blocks:  # the peer did not answer at once
                engine.release("get")
                continue
            begun.set()
            found = engine.load("get", keys)
            engine.release("get")
        results.append(len(found))

    results: list[int] = []
    thread = threading.Thread(target=fetch)
    thread.start()
    assert begun.wait(DEADLINE_S)
    time.sleep(0.7)
    network.cut("a")
    return thread


def test_a_half_open_connection_costs_a_deadline(tmp_path: Path) -> None:
    with far_pair(tmp_path) as (pair, network):
        thread = cut_in_a_transfer(pair, network)
        began = time.monotonic()
        # Meanwhile its own engines are served.
        assert own_blocks(pair, "meanwhile") < FETCH_S / 2
        thread.join(FETCH_S + 1)
        assert not thread.is_alive()
        took = time.monotonic() - began
        wait(lambda: not pair.b.metrics()["draining_bytes"])
        wait(lambda: not pair.a.metrics()["leased_bytes"])
        network.mend("a")
        network.unlimit("b")
        assert found_after(pair, "after", BLOCKS, LARGE) == (BLOCKS, 0)
        record(
            "transfers. cable cut in a transfer",
            1,
            f"given up after {took:.1f} s, mended, all well",
        )


def own_blocks(pair: Pair, prompt: str) -> float:
    """Seconds that an engine of `b` takes to store and load some."""
    engine = pair.engine(pair.b, LARGE)
    began = time.monotonic()
    keys = engine.open("own", prompt, 8, pair.handle(engine, "own"))
    assert engine.store("own", keys) == 8
    assert wrong_blocks(keys, engine.load("own", keys)) == 0
    engine.release("own")
    return time.monotonic() - began


def test_without_a_deadline_an_engine_waits_on(tmp_path: Path) -> None:
    """The twin."""
    with far_pair(tmp_path, "never_gives_up") as (pair, network):
        thread = cut_in_a_transfer(pair, network)
        thread.join(FETCH_S + 1)
        assert thread.is_alive()
        network.mend("a")
        network.unlimit("b")
        thread.join(DEADLINE_S)
