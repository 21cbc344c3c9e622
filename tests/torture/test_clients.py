"""Proof 5: engines that are killed or stopped leave nothing behind and touch nothing that is not theirs."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kvfabric.testing.engine import TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.processes import EngineProcess, until
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode
from tests.torture.nursery import Nursery
from tests.torture.scale import at_most, count, record

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

CLIENTS = count(200, 10_000, "KVFABRIC_TORTURE_CLIENTS")
BATCH = 20
STOPPED = count(1, 50)
PART = 4096

ZERO = (
    "leased_bytes",
    "draining_bytes",
    "reserved_bytes",
    "requests_open",
    "sessions",
    "sessions_draining",
    "connections",
)


def left_over(node: ForkedNode) -> dict[str, float]:
    """Counters that are not exactly zero, bytes that belong to no block."""
    metrics = node.metrics()
    found = {name: metrics[name] for name in ZERO if metrics[name]}
    orphans = metrics['tier_used_bytes{tier="host"}'] - PART * metrics['tier_blocks{tier="host"}']
    return found | ({"orphan_bytes": orphans} if orphans else {})


def fill(node: ForkedNode) -> None:
    engine = TinyEngine.connect(node.socket, tiny_hello())
    assert engine.store("r", engine.open("r", "shared", 8)) == 8
    engine.client.close()


def test_killed_clients_leave_every_counter_at_zero(tmp_path: Path) -> None:
    """Killed while they hold leases and reservations, copy, or shake hands: nothing is left charged."""
    with Launcher() as launcher, Nursery() as nursery, ForkedNode(launcher, tmp_path / "n") as node:
        fill(node)
        until(lambda: not left_over(node))
        before = node.descriptors()
        holding = 0
        for seed in range(CLIENTS // BATCH):
            holding += nursery.batch(node.socket, BATCH, seed)
            if seed % 25 == 0:
                until(lambda: not left_over(node))
        until(lambda: not left_over(node))
        until(lambda: node.descriptors() <= before)
        engine = TinyEngine.connect(node.socket, tiny_hello())
        keys = engine.open("r", "shared", 8)
        found = engine.load("r", keys)
        assert wrong_blocks(keys, found) == 0
        engine.client.close()
    assert holding >= CLIENTS // 3
    record(
        "5a. clients killed while they hold leases and reservations",
        CLIENTS,
        f"{at_most(0, CLIENTS)} left a byte, a session or a descriptor; {holding} held both when killed",
    )


def test_without_the_watch_of_exits_counters_stay(tmp_path: Path) -> None:
    """The twin: a daemon that does not learn of exits keeps the bytes of the dead."""
    with (
        Launcher() as launcher,
        Nursery() as nursery,
        ForkedNode(launcher, tmp_path / "n", changes=("no_exit_watch",)) as node,
    ):
        fill(node)
        assert nursery.batch(node.socket, 6, 0) >= 2
        time.sleep(1.0)
        found = left_over(node)
        assert found["sessions_draining"] >= 2
        assert found["draining_bytes"] >= 8 * PART


def stopped_past_every_deadline(node: ForkedNode, number: int) -> list[str]:
    """What went wrong with a client that slept through its rights and then wrote on; [] for nothing."""
    wrong: list[str] = []
    shared, own = f"shared {number}", f"own {number}"
    with EngineProcess(node.socket) as sleeper:
        engine = TinyEngine.connect(node.socket)
        engine.store("r", engine.open("r", shared, 8))
        engine.release("r")
        sleeper.do("lease", request="s", prompt=shared, num_blocks=8)
        sleeper.do("reserve", request="w", prompt=own, num_blocks=4)
        sleeper.send(signal.SIGSTOP)
        until(lambda: node.metrics()["reserved_bytes"] == node.metrics()["leased_bytes"] == 0)
        if node.metrics()["draining_bytes"] != 8 * PART:
            wrong.append("what it leased does not drain")
        assert engine.store("o", engine.open("o", own, 4)) == 4  # its reservation is over
        for filler in range(32):  # used more than it, and three times what the arena holds
            name = f"filler {number} {filler}"
            keys = engine.open(name, name, 24)
            engine.store(name, keys)
            engine.load(name, keys)
            engine.release(name)
        ready = {name: engine.open(f"q {name}", name, 4) for name in (own, name)}
        before = {name: engine.load(f"q {name}", keys) for name, keys in ready.items()}
        sleeper.send(signal.SIGCONT)
        sleeper.do("scribble")
        if any(sleeper.do("commit")["states"]):
            wrong.append("a commit past its deadline was taken")
        sleeper.do("scribble")
        for name, keys in ready.items():
            after = engine.load(f"q {name}", keys)
            if after != before[name] or wrong_blocks(keys, after):
                wrong.append("a READY block changed")
        engine.release("o", *(f"q {name}" for name in ready))
        if sleeper.do("read_leased") != {"good": 8, "wrong": 0, "confirmed": 0}:
            wrong.append("its leased slots were written anew")
        if node.metrics()["draining_bytes"] != 8 * PART:
            wrong.append("its bytes do not stand under draining")
        engine.client.close()
    until(lambda: not left_over(node))
    return wrong


OPTIONS: dict[str, Any] = {"lease_s": 0.3, "reservation_s": 0.3, "host_bytes": 1 << 20}


def test_stopped_client_that_writes_on_changes_nothing(tmp_path: Path) -> None:
    with Launcher() as launcher, ForkedNode(launcher, tmp_path / "n", **OPTIONS) as node:
        for number in range(STOPPED):
            assert stopped_past_every_deadline(node, number) == []
    record(
        "5b. a client stopped past every deadline writes on into its window",
        STOPPED,
        f"{at_most(0, STOPPED)} READY blocks changed; its bytes drained until it exited",
    )


def test_where_time_frees_memory_its_slots_are_written_anew(tmp_path: Path) -> None:
    """The twin: leases that end with their deadline, as if nobody could read past it."""
    with (
        Launcher() as launcher,
        ForkedNode(launcher, tmp_path / "n", changes=("time_frees",), **OPTIONS) as node,
    ):
        wrong = stopped_past_every_deadline(node, 0)
    assert "its leased slots were written anew" in wrong
    assert "what it leased does not drain" in wrong
