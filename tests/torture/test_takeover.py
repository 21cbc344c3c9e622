"""Proof 5, of daemons: killed in a row, and killed in the middle of handing over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.client import NodeClient
from kvfabric.errors import PeerClosed
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, wrong_blocks
from kvfabric.testing.processes import EngineProcess, until
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode, arenas
from tests.torture.scale import at_most, count, record

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

KILLS = count(3, 50, "KVFABRIC_TORTURE_DAEMON_KILLS")
TAKEOVERS = count(4, 500, "KVFABRIC_TORTURE_TAKEOVERS")
PART = 4096
OF_THE_SUCCESSOR = ("asked", "received", "restored", "ready", "going")


@contextlib.contextmanager
def closing(engine: TinyEngine) -> Iterator[list[TinyEngine]]:
    """The engine as it is now: [0] changes when it comes back."""
    now = [engine]
    try:
        yield now
    finally:
        now[0].client.close()


def come_back(now: list[TinyEngine], node: ForkedNode) -> bool:
    """Whether the connection was lost; it is a new one then."""
    earlier = now[0]
    with contextlib.suppress(PeerClosed):
        earlier.client.ping(deadline_s=DEADLINE_S)
        return False
    client = NodeClient.connect(
        node.socket, earlier.hello, deadline_s=DEADLINE_S, resume_from=earlier.client
    )
    now[0] = TinyEngine(client, earlier.hello)
    return True


def use(engine: TinyEngine, name: str) -> int:
    """Store a prompt and load it: how many blocks were wrong."""
    keys = engine.open(name, name, 8)
    engine.store(name, keys)
    found = engine.load(name, keys)
    engine.release(name)
    return wrong_blocks(keys, found) + (not found)


def orphan_bytes(node: ForkedNode) -> float:
    metrics = node.metrics()
    held = metrics["draining_bytes"] + metrics["leased_bytes"] + metrics["reserved_bytes"]
    blocks = metrics['tier_blocks{tier="host"}']
    return metrics['tier_used_bytes{tier="host"}'] - PART * blocks + held


# ---------------------------------------------------------------------- killed in a row


def lives(launcher: Launcher, directory: Path, kills: int, *, record_kept: bool) -> list[str]:
    """A node that is killed and started `kills` times under three engines; what went wrong."""
    wrong: list[str] = []
    chance = random.Random(5)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(ForkedNode(launcher, directory))
        others = [stack.enter_context(EngineProcess(node.socket)) for _ in range(2)]
        now = stack.enter_context(closing(TinyEngine.connect(node.socket)))
        pids = [os.getpid(), *(other.pid for other in others)]
        for number in range(kills):
            use(now[0], f"prompt {number}")
            others[0].do("lease", request="l", prompt=f"prompt {number}", num_blocks=8)
            others[1].do("reserve", request="r", prompt=f"reserved {number}", num_blocks=8)
            if chance.random() < 0.5:
                others[1].begin("commit")
                time.sleep(chance.random() * 0.002)
                node.kill()
                others[1].finish()
            else:
                node.kill()
            if not record_kept:
                (directory / "arena.json").unlink()
            node = stack.enter_context(ForkedNode(launcher, directory))
            come_back(now, node)
            for other in others:
                other.do("resume", socket=str(node.socket))
            if now[0].client.arena.nbytes == 0:  # it came before the one with the descriptor
                until(lambda now=now, node=node: come_back(now, node))  # type: ignore[misc]
            if use(now[0], f"after {number}"):
                wrong.append(f"kill {number}: wrong or missing bytes")
            found = arenas(node.pid, *pids)
            if len(found) != 1:
                wrong.append(f"kill {number}: {len(found)} arenas")
            if orphan_bytes(node):
                wrong.append(f"kill {number}: orphan bytes")
    return wrong


def test_killed_daemons_leave_one_arena_and_no_orphan(tmp_path: Path) -> None:
    with Launcher() as launcher:
        assert lives(launcher, tmp_path / "n", KILLS, record_kept=True) == []
    record(
        "5c. daemons killed under three engines that map their arena",
        KILLS,
        f"{at_most(0, KILLS)} second arenas, orphan bytes or wrong blocks",
    )


def test_without_the_record_there_are_two_arenas(tmp_path: Path) -> None:
    """The twin: a daemon that does not know who has the earlier arena makes another beside it."""
    with Launcher() as launcher:
        wrong = lives(launcher, tmp_path / "n", 1, record_kept=False)
    assert wrong == []  # the engines gave the old one up when they came back
    with (
        Launcher() as launcher,
        ForkedNode(launcher, tmp_path / "m") as node,
        EngineProcess(node.socket) as engine,
    ):
        node.kill()
        (tmp_path / "m" / "arena.json").unlink()
        with ForkedNode(launcher, tmp_path / "m") as second:
            assert len(arenas(second.pid, engine.pid)) == 2


# ---------------------------------------------------------------------- killed while handing over


class Line:
    """Nodes that follow each other on one directory, and an engine that stays."""

    def __init__(self, stack: contextlib.ExitStack, launcher: Launcher, directory: Path) -> None:
        self._stack = stack
        self._launcher = launcher
        self._directory = directory
        self.node = self.start()
        self.node.wait_ready()
        self.engine = stack.enter_context(closing(TinyEngine.connect(self.node.socket)))
        self.kept = 0
        self.serial = 0

    def start(self, **options: object) -> ForkedNode:
        node = ForkedNode(self._launcher, self._directory, **options)  # type: ignore[arg-type]
        self._stack.callback(node.__exit__)
        return node

    def succeed(self, killed: str, step: str, after_s: float) -> list[str]:
        """One takeover in which `killed` (old, new, nobody) dies: at a failpoint, or after a time if there
        is none; what went wrong."""
        old, dies = self.node, f"takeover.{step}:1" if step else ""
        self.serial += 1
        names = [f"prompt {self.serial}", f"prompt {self.serial - 1}"]
        use(self.engine[0], names[0])
        new = self.start(takeover=True, failpoint=dies if killed == "new" else "")
        if killed != "nobody" and not step:
            time.sleep(after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(old.pid if killed == "old" else new.pid, signal.SIGKILL)
        self.node = self._who_serves(killed, old, new)
        self.node.wait_ready()
        return self.check(f"{killed} {step or after_s}", names)

    def _who_serves(self, killed: str, old: ForkedNode, new: ForkedNode) -> ForkedNode:
        if killed != "new":
            until(lambda: not old.is_running(), deadline_s=60)
            return new
        until(lambda: not new.is_running(), deadline_s=60)
        until(lambda: not old.is_running() or _answers(old), deadline_s=60)
        # It was killed as it began to serve: an ordinary crash, and an ordinary start.
        return old if old.is_running() else self.start()

    def check(self, what: str, names: list[str]) -> list[str]:
        wrong = []
        until(self._is_there)
        lost = come_back(self.engine, self.node)
        engine = self.engine[0]
        for name in names:
            keys = engine.open(name, name, 8)
            found = engine.load(name, keys)
            engine.release(name)
            if wrong_blocks(keys, found):
                wrong.append(f"{what}: wrong bytes")
            if not lost and name == names[0]:
                self.kept += 1
                if len(found) < 8:
                    wrong.append(f"{what}: the connection is kept, and blocks are not")
        if use(engine, f"fresh {self.serial}"):
            wrong.append(f"{what}: does not serve")
        there = arenas(self.node.pid, os.getpid())
        if len(there) != 1:
            wrong.append(f"{what}: {len(there)} arenas")
        if orphan_bytes(self.node):
            wrong.append(f"{what}: orphan bytes")
        return wrong

    def _is_there(self) -> bool:
        return _answers(self.node)


def _answers(node: ForkedNode) -> bool:
    try:
        return bool(node.metrics())
    except OSError:
        return False


def test_takeovers_whoever_dies_when(tmp_path: Path) -> None:
    """At failpoints of either side and at random times: one daemon serves, with one arena and right bytes."""
    chance, wrong = random.Random(9), list[str]()
    with contextlib.ExitStack() as stack:
        line = Line(stack, stack.enter_context(Launcher()), tmp_path / "n")
        for number in range(TAKEOVERS):
            killed = ("nobody", "new", "old", "new")[number % 4]
            step = chance.choice(OF_THE_SUCCESSOR) if number % 4 == 1 else ""
            wrong += line.succeed(killed, step, chance.random() * 0.25)
        assert wrong == []
        assert line.kept >= TAKEOVERS // 2
        kept = line.kept
    record(
        "5d. takeovers in which one side is killed, at a failpoint or at any time, or none",
        TAKEOVERS,
        f"{at_most(0, TAKEOVERS)} without exactly one daemon, one arena and right bytes; "
        f"{kept} kept contents and connections, the others were crashes",
    )


def test_a_predecessor_that_goes_on_is_found_out(tmp_path: Path) -> None:
    """The twin: it hands over and serves on, so that two have the same arena and the same connections."""
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        directory = tmp_path / "n"
        old = stack.enter_context(ForkedNode(launcher, directory, changes=("goes_on",)))
        new = stack.enter_context(ForkedNode(launcher, directory, takeover=True))
        time.sleep(0.5)
        assert old.is_running()
        assert new.is_running()
