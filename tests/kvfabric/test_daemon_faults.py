"""Engines and nodes that die, stop and come back: no wrong byte, no memory reused under a reader.

Every process here is real and is killed or stopped by signals.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvfabric.client import NodeClient
from kvfabric.errors import DeadlineExceeded, PeerClosed
from kvfabric.hashing import ROOT_PARENT
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.processes import EngineProcess, NodeProcess, until

pytestmark = [pytest.mark.fleet, pytest.mark.slow]
HTTP = {"http": "127.0.0.1:0"}


def arena_inode(client: NodeClient) -> int:
    return os.fstat(client._arena_descriptor).st_ino


def resume(engine: TinyEngine, node: NodeProcess) -> TinyEngine:
    client = NodeClient.connect(
        node.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
    )
    return TinyEngine(client, engine.hello)


# ---------------------------------------------------------------------- deadlines


def test_stopped_node_costs_a_deadline_and_no_more(tmp_path: Path) -> None:
    """A node that does not answer is given up in time, and usable again when it wakes."""
    with NodeProcess(tmp_path) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 2)
        node.send(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            engine.client.match("r", keys, deadline_s=0.1)
        assert time.monotonic() - began < 1
        node.send(signal.SIGCONT)
        assert engine.store("r", keys) == 2
        engine.client.close()


# ---------------------------------------------------------------------- window


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "guard removed"])
def test_window_region_is_not_reused_before_its_commit_is_answered(
    tmp_path: Path, guarded: bool
) -> None:
    """A commit that outlived its deadline still reads its region. Handed out again too early, the region
    puts another block's bytes under the key: that is what the twin without the guard shows.
    """
    with NodeProcess(tmp_path) as node:
        hello = tiny_hello(window_bytes=4 * 4096)
        engine = TinyEngine.connect(node.socket, hello)
        if not guarded:
            engine.client.window.hold = lambda offsets: ()  # type: ignore[method-assign]
        keys = engine.open("r", "prompt", 4)
        reserved = engine.client.reserve(
            "r", ROOT_PARENT, keys, group=0, shard=0, deadline_s=DEADLINE_S
        )
        start, offsets = engine.write(keys)
        node.send(signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            engine.client.commit(reserved.reservation, range(4), offsets, deadline_s=0.05)
        engine.client.window.free(start)
        again = engine.client.window.allocate(4 * 4096)
        assert (again is None) == guarded
        if again is not None:
            engine.client.window.view(again, 4 * 4096)[:] = b"\xee" * 4 * 4096
        node.send(signal.SIGCONT)
        engine.client.ping(deadline_s=DEADLINE_S)
        until(lambda: len(engine.load("r", keys)) == 4)
        assert (wrong_blocks(keys, engine.load("r", keys)) == 0) == guarded
        if guarded:  # the late answer gave the region back
            assert engine.client.window.allocate(4 * 4096) == start
        engine.client.close()


def test_engine_stopped_past_its_reservation_cannot_commit(tmp_path: Path) -> None:
    """An engine that slept through its reservation and then writes on spoils nothing: its commit is
    refused, and the blocks that another stored meanwhile stay what they are.
    """
    with (
        NodeProcess(tmp_path, reservation_s=0.2) as node,
        EngineProcess(node.socket) as sleeper,
    ):
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 4)
        assert (
            sleeper.do("reserve", request="s", prompt="prompt", num_blocks=4)["states"] == [0] * 4
        )
        sleeper.send(signal.SIGSTOP)
        assert engine.store("r", keys) == 0  # pending: the sleeper's right still counts
        until(lambda: engine.store("r", keys) == 4)
        sleeper.send(signal.SIGCONT)
        sleeper.do("scribble")
        assert sleeper.do("commit")["states"] == [0] * 4
        found = engine.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (4, 0)
        engine.client.close()


def test_engine_that_writes_its_window_while_it_commits_spoils_only_its_own_block(
    tmp_path: Path,
) -> None:
    """Garbage written before the copy is stored under the engine's own keys and no other; what others
    stored before and after verifies.
    """
    with NodeProcess(tmp_path) as node, EngineProcess(node.socket) as wild:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "other prompt", 4)
        assert engine.store("r", keys[:2]) == 2
        wild.do("reserve", request="w", prompt="prompt", num_blocks=4)
        wild.do("scribble")
        wild.do("commit")
        assert engine.store("r", keys) == 2
        found = engine.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (4, 0)
        engine.client.close()


# ---------------------------------------------------------------------- leases


def test_engine_stopped_past_its_lease_reads_no_wrong_byte(tmp_path: Path) -> None:
    """Its lease lapsed and the arena filled up meanwhile: the slots it was promised were not written
    anew, yet it may not use them any more.
    """
    with (
        NodeProcess(tmp_path, lease_s=0.2, host_bytes=1 << 20) as node,
        EngineProcess(node.socket) as sleeper,
    ):
        engine = TinyEngine.connect(node.socket)
        engine.store("r", engine.open("r", "prompt", 8))
        engine.release("r")
        assert sleeper.do("lease", request="s", prompt="prompt", num_blocks=8)["leased"] == 8
        sleeper.send(signal.SIGSTOP)
        for number in range(12):  # three times what the arena holds
            name = f"filler {number}"
            engine.store(name, engine.open(name, name, 64))
            engine.release(name)
        until(lambda: not _renewable(engine))
        sleeper.send(signal.SIGCONT)
        assert sleeper.do("read_leased") == {"good": 8, "wrong": 0, "confirmed": 0}
        engine.client.close()


def _renewable(engine: TinyEngine) -> bool:
    """Whether a lease taken now would still hold at the next look: false once lease_s has passed."""
    keys = engine.open("probe", "filler 11", 1)
    located = engine.locate("probe", keys)
    time.sleep(0.25)
    confirmed = engine.client.confirm(
        "probe", keys[: located.num_blocks], located, group=0, shard=0, deadline_s=DEADLINE_S
    )
    engine.release("probe")
    return bool(confirmed.num_blocks)


def test_killed_engine_drains_until_it_is_gone(tmp_path: Path) -> None:
    """A lost connection ends rights, not memory: the bytes drain while the process lives, and are free
    when it has exited.
    """
    with NodeProcess(tmp_path, **HTTP) as node, EngineProcess(node.socket) as other:
        engine = TinyEngine.connect(node.socket)
        engine.store("r", engine.open("r", "prompt", 8))
        engine.release("r")
        other.do("lease", request="o", prompt="prompt", num_blocks=8)
        assert node.metrics()["leased_bytes"] == 8 * 4096
        other.do("hang_up")
        until(lambda: node.metrics()["sessions_draining"] == 1)
        assert node.metrics()["draining_bytes"] == 8 * 4096
        other.kill()
        until(lambda: node.metrics()["sessions_draining"] == 0)
        assert node.metrics()["draining_bytes"] == 0
        engine.client.close()


def test_resumed_session_is_quiet(tmp_path: Path) -> None:
    """An engine that comes back and says that it copies nothing frees what it had leased."""
    with NodeProcess(tmp_path, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 4)
        engine.store("r", keys)
        engine.locate("r", keys)
        engine.client._break(PeerClosed("lost"))
        until(lambda: node.metrics()["sessions_draining"] == 1)
        back = resume(engine, node)
        assert back.client.session == engine.client.session
        values = node.metrics()
        assert (values["sessions_draining"], values["draining_bytes"]) == (0, 0)
        assert back.open("r2", "prompt", 4) == keys
        assert len(back.load("r2", keys)) == 4
        back.client.close()
        until(lambda: node.metrics()["sessions"] == 0)


# ---------------------------------------------------------------------- a node that dies


def test_arena_of_a_killed_node_is_adopted(tmp_path: Path) -> None:
    """The engine gives the arena's descriptor back; the new daemon uses that memory, contents void."""
    with NodeProcess(tmp_path) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 4)
        assert engine.store("r", keys) == 4
        inode = arena_inode(engine.client)
        node.kill()
        with pytest.raises(PeerClosed):
            engine.client.ping(deadline_s=DEADLINE_S)
        node.start()
        back = resume(engine, node)
        assert back.client.arena_adopted
        assert arena_inode(back.client) == inode
        assert back.client.boot_id != engine.client.boot_id
        assert back.open("r", "prompt", 4) == keys
        assert back.load("r", keys) == []
        assert back.store("r", keys) == 4
        found = back.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (4, 0)
        back.client.close()


def test_node_waits_for_the_arena_rather_than_make_a_second(tmp_path: Path) -> None:
    """While a process maps the old arena there is no other: newcomers get none, and are sent to resume
    when it is there. A node without the record would make a second at once (the twin).
    """
    with NodeProcess(tmp_path, sessions_return_s=0.3, **HTTP) as node:
        holder = TinyEngine.connect(node.socket)
        node.kill()
        node.start()
        newcomer = TinyEngine.connect(node.socket, tiny_hello(revision="new"))
        assert len(newcomer.client.arena) == 0
        keys = newcomer.open("r", "prompt", 2)
        assert newcomer.store("r", keys) == 0  # a refused store, not an error
        until(lambda: any("keep the earlier arena" in line for line in node.log))
        assert node.metrics()["adoption_waits_processes"] == 1
        back = resume(holder, node)
        assert back.client.arena_adopted
        with pytest.raises(PeerClosed):
            newcomer.client.ping(deadline_s=DEADLINE_S)
        newcomer = resume(newcomer, node)
        assert newcomer.store("r", newcomer.open("r", "prompt", 2)) == 2
        newcomer.client.close()

        node.kill()
        (tmp_path / "arena.json").unlink()
        node.start()
        twin = resume(back, node)
        assert not twin.client.arena_adopted
        twin.client.close()


def test_arena_of_engines_that_are_gone_is_not_waited_for(tmp_path: Path) -> None:
    """When every listed process has exited, or does not have the memory any more, a fresh arena is made."""
    with NodeProcess(tmp_path) as node:
        with EngineProcess(node.socket) as gone:
            node.kill()
            gone.kill()
        node.start()
        engine = TinyEngine.connect(node.socket)
        assert len(engine.client.arena)
        assert not engine.client.arena_adopted
        node.kill()
        engine.client.close()  # this process lives on, without the arena
        node.start()
        again = TinyEngine.connect(node.socket)
        assert len(again.client.arena)
        again.client.close()


def test_engine_that_dies_while_the_node_waits_frees_the_way(tmp_path: Path) -> None:
    with NodeProcess(tmp_path) as node, EngineProcess(node.socket) as holder:
        node.kill()
        node.start()
        early = TinyEngine.connect(node.socket)
        assert len(early.client.arena) == 0
        holder.kill()
        until(lambda: _is_gone(early))
        late = resume(early, node)
        assert len(late.client.arena)
        assert not late.client.arena_adopted
        late.client.close()


def _is_gone(engine: TinyEngine) -> bool:
    try:
        engine.client.ping(deadline_s=DEADLINE_S)
    except PeerClosed:
        return True
    return False


def test_sealed_blocks_survive_a_kill(tmp_path: Path) -> None:
    """What SSD had sealed when the node was killed is served by its successor, bit for bit."""
    with NodeProcess(tmp_path, ssd_bytes=64 << 20, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 6)
        assert engine.store("r", keys) == 6
        assert len(engine.load("r", keys)) == 6  # the second use admits them to SSD
        until(lambda: node.metrics()["ssd_writes_total"] >= 6)
        node.kill()
        node.start()
        back = resume(engine, node)
        assert back.open("r", "prompt", 6) == keys
        matched = back.client.match("r", keys, deadline_s=DEADLINE_S)
        assert (matched.num_blocks, matched.tiers) == (6, b"\1" * 6)
        found = back.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (6, 0)
        back.client.close()
