"""A daemon hands over to its successor: nothing is lost, and whoever dies when, one serves and has one arena.

Every daemon and engine here is a real process; failpoints kill a side at a step of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvfabric.client import EngineHello, NodeClient
from kvfabric.config import NodeConfig
from kvfabric.daemon import takeover
from kvfabric.daemon.node import Node
from kvfabric.daemon.takeover_wire import LAYOUT, VERSION, Ask, Packet, Refused
from kvfabric.errors import PeerClosed
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.protocol.messages import Ping, Pong
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.processes import EngineProcess, NodeProcess, until

pytestmark = [pytest.mark.fleet, pytest.mark.slow]
HTTP = {"http": "127.0.0.1:0"}

OF_THE_PREDECESSOR = ("frozen", "given", "agreed", "gone")
OF_THE_SUCCESSOR = ("asked", "received", "restored", "ready", "going")


@contextlib.contextmanager
def running(node: NodeProcess) -> Iterator[NodeProcess]:
    """As the node's own context, for one that may have ended."""
    try:
        yield node.start()
    finally:
        node.stop()


_connected: list[TinyEngine] = []


@pytest.fixture(autouse=True)
def no_engine_stays() -> Iterator[None]:
    """Also after a failure: this process would go on mapping that arena."""
    yield
    while _connected:
        _connected.pop().client.close()


def connect(node: NodeProcess, hello: EngineHello | None = None) -> TinyEngine:
    _connected.append(TinyEngine.connect(node.socket, hello))
    return _connected[-1]


def succeed(old: NodeProcess, **options: Any) -> NodeProcess:
    """Not started yet."""
    return NodeProcess(old.state_dir, takeover=True, **options)


def arenas(*pids: int) -> set[int]:
    """Inodes of every arena that these processes map or have open."""
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memfd:kvfabric-arena" in str(entry.readlink()):
                    found.add(entry.stat().st_ino)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "memfd:kvfabric-arena" in line:
                found.add(int(line.split(maxsplit=5)[4]))
    return found


def reconnect(engine: TinyEngine, node: NodeProcess) -> TinyEngine:
    client = NodeClient.connect(
        node.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
    )
    _connected.append(TinyEngine(client, engine.hello))
    return _connected[-1]


def expect_hits(engine: TinyEngine, request: str, prompt: str, num_blocks: int) -> None:
    keys = engine.open(request, prompt, num_blocks)
    found = engine.load(request, keys)
    assert (len(found), wrong_blocks(keys, found)) == (num_blocks, 0)
    engine.release(request)


# ---------------------------------------------------------------------- everything is kept


def test_contents_and_connections_are_kept(tmp_path: Path) -> None:
    """The engines notice nothing: hits before and after, right bytes, the same connection, window and arena;
    twice over, and the second successor hands over what the first had added."""
    with running(NodeProcess(tmp_path, **HTTP)) as old:
        engine = connect(old)
        keys = engine.open("r", "prompt", 8)
        assert engine.store("r", keys) == 8
        expect_hits(engine, "r2", "prompt", 8)
        [inode] = arenas(old.pid, os.getpid())
        with running(succeed(old, **HTTP)) as new:
            assert old.wait() == 0
            assert any(f"process {new.pid} serves now" in line for line in old.log)
            assert any("8 blocks and 1 connections were taken over" in line for line in new.log)
            expect_hits(engine, "r3", "prompt", 8)
            assert engine.store("s", engine.open("s", "more", 4)) == 4
            with running(succeed(new, **HTTP)) as newest:
                assert new.wait() == 0
                expect_hits(engine, "r4", "prompt", 8)
                expect_hits(engine, "r5", "more", 4)
                assert arenas(newest.pid, os.getpid()) == {inode}
                metrics = newest.metrics()
                assert metrics['tier_blocks{tier="host"}'] == 12
                assert (metrics["sessions"], metrics["connections"]) == (1, 1)
                assert metrics["draining_bytes"] == metrics["leased_bytes"] == 0
                late = connect(newest, tiny_hello(revision="late"))
                assert late.store("l", late.open("l", "p", 2)) == 2
                late.client.close()
                engine.client.close()
                until(lambda: newest.metrics()["sessions"] == 0)
            assert not (tmp_path / "takeover.sock").exists()


def test_leases_drain_and_reservations_end(tmp_path: Path) -> None:
    """What was promised before is no promise any more; the bytes stay until the session proves quiet."""
    with running(NodeProcess(tmp_path, **HTTP)) as old, EngineProcess(old.socket) as reader:
        engine = connect(old)
        engine.store("r", engine.open("r", "prompt", 8))
        engine.release("r")
        reader.do("lease", request="o", prompt="prompt", num_blocks=8)
        reader.do("reserve", request="w", prompt="other", num_blocks=4)
        with running(succeed(old, **HTTP)) as new:
            old.wait()
            metrics = new.metrics()
            assert (metrics["draining_bytes"], metrics["reserved_bytes"]) == (8 * 4096, 0)
            assert reader.do("read_leased") == {"good": 8, "wrong": 0, "confirmed": 0}
            assert reader.do("commit")["states"] == [0] * 4
            assert reader.do("store", request="w2", prompt="other", num_blocks=4)["stored"] == 4
            reader.send(signal.SIGKILL)
            until(lambda: new.metrics()["draining_bytes"] == 0)
            assert new.metrics()["leased_bytes"] == 0
            engine.client.close()


def test_busy_engines_lose_no_request(tmp_path: Path) -> None:
    """Engines store and load all the while, through three takeovers: no call fails, no byte is wrong."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(running(NodeProcess(tmp_path)))
        stop, errors, rounds = threading.Event(), list[BaseException](), [0, 0]

        def work(number: int) -> None:
            engine = connect(node, tiny_hello(revision=f"rev {number}"))
            try:
                while not stop.is_set():
                    name = f"prompt {rounds[number]}"
                    keys = engine.open(name, name, 8)
                    stored = engine.store(name, keys)
                    found = engine.load(name, keys)
                    assert wrong_blocks(keys, found) == 0
                    assert len(found) <= 8
                    assert stored <= 8
                    engine.release(name)
                    rounds[number] += 1
                engine.client.close()
            except BaseException as exc:  # noqa: BLE001 - shown by the main thread
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                until(more_rounds(rounds, errors))
                successor = stack.enter_context(running(succeed(node)))
                assert node.wait() == 0
                node = successor
            until(more_rounds(rounds, errors))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []


def more_rounds(rounds: list[int], errors: list[BaseException]) -> Callable[[], bool]:
    """Whether each has gone some rounds from now on."""
    before = list(rounds)
    return lambda: (
        bool(errors) or all(now > then + 5 for now, then in zip(rounds, before, strict=True))
    )


def test_more_descriptors_than_one_message_carries(tmp_path: Path) -> None:
    with running(NodeProcess(tmp_path)) as old:
        hello = tiny_hello(window_bytes=8192)
        engines = [connect(old, hello) for _ in range(130)]
        engines[0].store("r", engines[0].open("r", "prompt", 2))
        with running(succeed(old)) as new:
            assert old.wait() == 0
            for engine in engines:
                expect_hits(engine, "q", "prompt", 2)
            assert engines[-1].store("s", engines[-1].open("s", "last", 2)) == 2
            for engine in engines:
                engine.client.close()
            assert new.is_running()


def test_frame_that_is_half_sent_is_answered(tmp_path: Path) -> None:
    """The successor goes on in the middle of a frame, and what waits in the socket is not lost."""
    with running(NodeProcess(tmp_path)) as old, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(old.socket))
        sock.settimeout(DEADLINE_S)
        sock.sendall(encode(0, tiny_hello(window_bytes=0).to_wire(session=b"", resumed=False)))
        reader = FrameReader()
        while not reader.feed(sock.recv(65536)):
            pass
        ping = encode(7, Ping())
        sock.sendall(ping[:9])
        with running(succeed(old)):
            old.wait()
            sock.sendall(ping[9:])
            [(correlation, body)] = FrameReader().feed(sock.recv(65536))
            assert (correlation, decode_reply(body)) == (7, Pong(0, ()))


def test_ssd_comes_back_when_the_predecessor_has_exited(tmp_path: Path) -> None:
    """What was evicted to SSD before is read from there after; what is in both tiers is there once. What may
    still be written today is what it was."""
    options: dict[str, Any] = {"ssd_bytes": 64 << 20, "host_bytes": 1 << 20} | HTTP
    options["ssd_write_bytes_per_day"] = 24 << 20  # an hour's worth at once, and 291 bytes a second
    with running(NodeProcess(tmp_path, **options)) as old:
        engine = connect(old)
        engine.store("r", engine.open("r", "prompt", 8))
        expect_hits(engine, "r2", "prompt", 8)
        engine.release("r")
        until(lambda: old.metrics()["ssd_writes_total"] >= 8)
        for number in range(6):  # more than the arena holds
            engine.store("f", engine.open("f", f"filler {number}", 64))
            engine.release("f")
        engine.store("s", engine.open("s", "both", 4))
        expect_hits(engine, "s2", "both", 4)
        engine.release("s")
        until(lambda: old.metrics()["ssd_writes_total"] >= 12)
        left = old.metrics()["ssd_budget_left_bytes"]
        assert left <= (1 << 20) - 12 * 8192 + 10_000
        with running(succeed(old, **options)) as new:
            old.wait()
            expect_hits(engine, "s3", "both", 4)
            until(lambda: new.metrics()['tier_up_info{tier="ssd"}'] == 1)
            expect_hits(engine, "r3", "prompt", 8)
            expect_hits(engine, "s4", "both", 4)
            metrics = new.metrics()
            assert metrics["corrupt_parts_total"] == 0
            assert metrics['tier_blocks{tier="ssd"}'] >= 12
            assert left - 12 * 8192 <= metrics["ssd_budget_left_bytes"] <= left + 10_000
            engine.client.close()


def test_without_a_daemon_it_is_an_ordinary_start(tmp_path: Path) -> None:
    with running(NodeProcess(tmp_path, takeover=True)) as node:
        assert any("no daemon to take over from" in line for line in node.log)
        engine = connect(node)
        assert engine.store("r", engine.open("r", "prompt", 2)) == 2
        engine.client.close()


# ---------------------------------------------------------------------- what does not fit


def test_an_index_that_is_too_small_starts_from_ssd(tmp_path: Path) -> None:
    """The predecessor stops in order, and what SSD has is served by the successor."""
    options: dict[str, Any] = {"ssd_bytes": 64 << 20} | HTTP
    with running(NodeProcess(tmp_path, **options)) as old:
        engine = connect(old)
        engine.store("r", engine.open("r", "prompt", 8))
        expect_hits(engine, "r2", "prompt", 8)
        engine.release("r")
        until(lambda: old.metrics()["ssd_writes_total"] >= 8)
        engine.store("s", engine.open("s", "only host", 64))
        [inode] = arenas(old.pid, os.getpid())
        with running(succeed(old, **(options | {"max_blocks": 60}))) as new:
            assert old.wait() == 0
            assert any("does not hold" in line and "from SSD" in line for line in new.log)
            assert any("cannot use it" in line for line in old.log)
            back = reconnect(engine, new)
            assert back.client.arena_adopted
            assert arenas(new.pid, os.getpid()) == {inode}
            expect_hits(back, "r3", "prompt", 8)
            back.client.close()


@pytest.mark.parametrize(
    "ask",
    [Ask(VERSION + 1, LAYOUT), Ask(VERSION, (*LAYOUT[:-1], 33)), b"nothing of the kind"],
    ids=["version", "layout", "garbage"],
)
def test_a_mismatch_ends_in_a_clear_line(tmp_path: Path, ask: Ask | bytes) -> None:
    """Another version is told so and the node stops for it; what is no successor at all is hung up on."""
    with running(NodeProcess(tmp_path)) as old:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(tmp_path / "takeover.sock"))
            sock.send(ask if isinstance(ask, bytes) else msgspec.msgpack.encode(ask))
            data, found, _, _ = socket.recv_fds(sock, 65536, 4)
            for descriptor in found:
                os.close(descriptor)
        if isinstance(ask, bytes):
            assert data == b""
            engine = connect(old)
            engine.client.close()
            until(lambda: any("takeover broken off" in line for line in old.log))
        else:
            refused = msgspec.msgpack.decode(data, type=Packet)
            assert isinstance(refused, Refused)
            assert refused.ends
            assert old.wait() == 0
            assert any(refused.reason in line and "from SSD" in line for line in old.log)


# ---------------------------------------------------------------------- whoever dies, one serves


def test_predecessor_killed_at_any_step(tmp_path: Path) -> None:
    """The successor serves: one after the other, each is killed as it hands over. From the moment the next
    had everything, contents and connections are kept; before, it is as after any crash."""
    with contextlib.ExitStack() as stack:
        steps = [f"takeover.{step}:1" for step in OF_THE_PREDECESSOR]
        node = stack.enter_context(running(NodeProcess(tmp_path, failpoint=steps[0])))
        engine = connect(node)
        [inode] = arenas(node.pid, os.getpid())
        for step, following in zip(steps, [*steps[1:], ""], strict=True):
            engine.store("r", engine.open("r", step, 8))
            engine.release("r")
            new = stack.enter_context(running(succeed(node, failpoint=following)))
            assert node.wait() == -signal.SIGKILL
            if "frozen" in step:
                with pytest.raises(PeerClosed):
                    engine.client.ping(deadline_s=DEADLINE_S)
                engine = reconnect(engine, new)
                assert engine.client.arena_adopted
                assert engine.store("r", engine.open("r", step, 8)) == 8
            expect_hits(engine, "r2", step, 8)
            assert arenas(new.pid, os.getpid()) == {inode}
            node = new
        engine.client.close()


def test_successor_killed_at_any_step(tmp_path: Path) -> None:
    """The predecessor serves on as if nothing had been, and hands over to the next one that asks."""
    with running(NodeProcess(tmp_path, **HTTP)) as old:
        engine = connect(old)
        [inode] = arenas(old.pid, os.getpid())
        for step in OF_THE_SUCCESSOR:
            engine.store("r", engine.open("r", step, 8))
            with pytest.raises(RuntimeError, match="ended with -9"):
                succeed(old, failpoint=f"takeover.{step}:1").start()
            assert old.is_running()
            expect_hits(engine, "r", step, 8)
            assert engine.store("s", engine.open("s", f"after {step}", 2)) == 2
            until(lambda: _is_answered(old))
            assert arenas(old.pid, os.getpid()) == {inode}
        with running(succeed(old)) as new:
            assert old.wait() == 0
            for step in OF_THE_SUCCESSOR:
                expect_hits(engine, "r", step, 8)
                expect_hits(engine, "s", f"after {step}", 2)
            assert arenas(new.pid, os.getpid()) == {inode}
            engine.client.close()


def _is_answered(node: NodeProcess) -> bool:
    try:
        return bool(node.metrics())
    except OSError:
        return False


def test_successor_killed_when_it_serves_is_a_crash_as_any(tmp_path: Path) -> None:
    """The predecessor is gone then; the next start adopts the arena."""
    with running(NodeProcess(tmp_path)) as old:
        engine = connect(old)
        engine.store("r", engine.open("r", "prompt", 8))
        with pytest.raises(RuntimeError, match="ended with -9"):
            succeed(old, failpoint="takeover.serving:1").start()
        assert old.wait() == 0
        with running(NodeProcess(tmp_path)) as node:
            back = reconnect(engine, node)
            assert back.client.arena_adopted
            assert len(arenas(node.pid, os.getpid())) == 1
            back.client.close()


ASKS_AND_SLEEPS = """
import socket, sys, time
from kvfabric.daemon.takeover_wire import *
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sock.send(msgspec.msgpack.encode(Ask(VERSION, LAYOUT)))
time.sleep(60)
"""


async def test_late_successor_is_killed_and_the_node_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that got everything and says nothing must never come alive beside us."""
    monkeypatch.setattr(takeover, "READY_S", 0.3)
    config = NodeConfig(state_dir=tmp_path, http="", host_bytes=1 << 20, ssd_bytes=0)
    async with Node(config) as node:
        late = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASKS_AND_SLEEPS, str(config.takeover_socket_path)
        )
        async with asyncio.timeout(DEADLINE_S):
            assert await late.wait() == -signal.SIGKILL
        engine = await asyncio.to_thread(TinyEngine.connect, config.socket_path)
        stored = await asyncio.to_thread(lambda: engine.store("r", engine.open("r", "p", 2)))
        assert stored == 2
        await asyncio.to_thread(engine.client.close)
        assert not node.ended.is_set()


def test_predecessor_that_stands_still_keeps_the_successor_from_serving(tmp_path: Path) -> None:
    """Stopped in the middle, it may wake up: the successor waits, and serves once it is killed."""
    with running(NodeProcess(tmp_path)) as old:
        engine = connect(old)
        engine.store("r", engine.open("r", "prompt", 4))
        old.send(signal.SIGSTOP)
        new = succeed(old)
        command = [sys.executable, "-m", "kvfabric", "node", "--state-dir", str(tmp_path)]
        waiting = subprocess.Popen(
            [*command, "--takeover", "--http", "", "--host-bytes", "64MiB", "--ssd-bytes", "0"],
            stderr=subprocess.PIPE,
        )
        try:
            time.sleep(1.5)
            assert waiting.poll() is None
            waiting.kill()
            old.send(signal.SIGCONT)
            expect_hits(engine, "r2", "prompt", 4)
        finally:
            waiting.kill()
            waiting.communicate()
        with running(new):
            old.wait()
            expect_hits(engine, "r3", "prompt", 4)
            engine.client.close()


def test_nothing_has_a_name_and_nothing_is_left(tmp_path: Path) -> None:
    """No file in /dev/shm, and after SIGKILL of all that took part no memory and no process."""
    before = set(os.listdir("/dev/shm"))
    with running(NodeProcess(tmp_path)) as old, EngineProcess(old.socket) as engine:
        engine.do("store", request="r", prompt="p", num_blocks=4)
        with running(succeed(old)) as new:
            old.wait()
            assert set(os.listdir("/dev/shm")) <= before
            new.kill()
            engine.kill()
    left = [path.name for path in tmp_path.iterdir() if path.is_socket()]
    assert set(left) <= {"node.sock", "admin.sock", "takeover.sock"}
    holders = [
        pid for pid in os.listdir("/proc") if pid.isdigit() and _has_open(pid, str(tmp_path))
    ]
    assert holders == []


def _has_open(pid: str, prefix: str) -> bool:
    try:
        return any(
            str(entry.readlink()).startswith(prefix) for entry in Path(f"/proc/{pid}/fd").iterdir()
        )
    except OSError:
        return False


def test_a_stopped_engine_does_not_hold_the_upgrade_up(tmp_path: Path) -> None:
    """Answers that nobody reads cost that engine its connection; it comes back to the successor."""
    with running(NodeProcess(tmp_path)) as old:
        hello = tiny_hello()
        sock = socket.socket(socket.AF_UNIX)
        with sock:
            sock.connect(str(old.socket))
            sock.sendall(encode(0, hello.to_wire(session=b"", resumed=False)))
            reader, frames = FrameReader(), list[tuple[int, bytes]]()
            while not frames:
                data, found, _, _ = socket.recv_fds(sock, 65536, 2)
                for descriptor in found:
                    os.close(descriptor)
                frames = reader.feed(data)
            sock.setblocking(False)
            ping = encode(1, Ping()) * 64
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(ping)
            engine = connect(old, tiny_hello(revision="other"))
            keys = engine.open("r", "prompt", 2)
            engine.store("r", keys)
            with running(succeed(old)) as new:
                assert old.wait() == 0
                expect_hits(engine, "r2", "prompt", 2)
                assert new.is_running()
                engine.client.close()
