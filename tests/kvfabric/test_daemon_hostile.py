"""A node whose engines, disk or machine are hostile: it refuses, says so, and serves the others."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvfabric.client import NodeClient
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import KVFabricError, PeerClosed
from kvfabric.handle import Handle, from_segments, mint
from kvfabric.hashing import BlockHasher, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.testing.engine import (
    BLOCK_TOKENS,
    DEADLINE_S,
    TinyEngine,
    tiny_hello,
    tokens_of,
    wrong_blocks,
)
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import DEFAULT_TENANT, Incarnation, Segment

pytestmark = pytest.mark.fleet
HTTP = {"http": "127.0.0.1:0"}
_names = itertools.count()
HELLO = tiny_hello().to_wire(session=b"", resumed=False)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), **HTTP) as running:
        yield running


def answers(peer: socket.socket) -> list[m.Reply]:
    """Every reply until the node closes the connection."""
    reader, found = FrameReader(), []
    while data := peer.recv(1 << 16):
        found += [decode_reply(body) for _, body in reader.feed(data)]
    return found


def raw_peer(node: NodeProcess) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(10)
    peer.connect(str(node.socket))
    return peer


def is_serving(node: NodeProcess) -> bool:
    engine = TinyEngine.connect(node.socket, tiny_hello(revision=f"probe {next(_names)}"))
    keys = engine.open("r", "prompt", 2)
    found = engine.load("r", keys) if engine.store("r", keys) == 2 else []
    engine.client.close()
    return len(found) == 2 and wrong_blocks(keys, found) == 0


# ---------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": -1},
        {"head_dim": 1 << 40},
        {"parts": (m.WirePart(0, 0, 1 << 63),)},
        {"parts": (m.WirePart(-1, 0, 4096),)},
    ],
    ids=str,
)
def test_absurd_layout_gets_one_error(node: NodeProcess, changes: dict[str, object]) -> None:
    layout = msgspec.structs.replace(HELLO.layout, **changes)
    with raw_peer(node) as peer:
        peer.sendall(encode(0, msgspec.structs.replace(HELLO, layout=layout)))
        [answer] = answers(peer)
    assert isinstance(answer, m.Failed)
    assert answer.code == "remote_protocol"
    assert is_serving(node)


@pytest.mark.parametrize(
    "request_",
    [
        m.OpenHandle("r" * 1025, ""),
        m.Release(("r",) * 65_537),
        m.EngineEvents((m.BlockRun(b"", b"", b""),) * 131_073, (), cleared=False),
    ],
    ids=["request id", "request ids", "runs"],
)
def test_vector_beyond_its_bound_gets_one_error(node: NodeProcess, request_: m.Request) -> None:
    """What a frame may unfold into is bounded, not only the frame."""
    with raw_peer(node) as peer:
        peer.sendall(encode(0, HELLO))
        assert peer.recv(1 << 16)
        peer.sendall(encode(1, request_))
        [answer] = answers(peer)
    assert isinstance(answer, m.Failed)
    assert answer.code == "remote_protocol"


def test_hello_that_trickles_in_with_descriptors_is_refused(node: NodeProcess) -> None:
    """Two descriptors beside each byte of it would be thousands."""
    before = node.metrics()["refused_connections_total"]
    null = os.open(os.devnull, os.O_RDONLY)
    with raw_peer(node) as peer:
        sent = 0
        for byte in encode(0, HELLO):
            try:
                socket.send_fds(peer, [bytes([byte])], [null, null])
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += 1
            time.sleep(0.002)
    os.close(null)
    assert sent < 50
    until(lambda: node.metrics()["refused_connections_total"] == before + 1)
    assert is_serving(node)


def test_node_without_descriptors_refuses_and_lives(tmp_path: Path) -> None:
    """Wherever in a handshake they run out."""
    with NodeProcess(tmp_path) as node:
        assert is_serving(node)
        soft, hard = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
        for spare in range(8):
            limit = _limit_leaving(node.pid, spare)
            resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (limit, hard))
            try:
                client = NodeClient.connect(node.socket, tiny_hello(), deadline_s=0.3)
                client.close()
            except KVFabricError:
                pass
            resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert is_serving(node), f"with {spare} descriptors"


def _limit_leaving(pid: int, spare: int) -> int:
    """The limit of descriptors under which a process can open `spare` more."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in itertools.count() if number not in used)
    return next(itertools.islice(free, spare, None))


def test_memory_of_the_node_is_closed_to_its_user(tmp_path: Path) -> None:
    """No core dump, and no process of the same user looks into the keys: its files under /proc are root's."""
    code = (
        "import ctypes\nfrom kvfabric.keyring import hide_memory\nhide_memory()\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


# ---------------------------------------------------------------------- start and stop


def test_arena_of_a_stopped_node_is_adopted(tmp_path: Path) -> None:
    """After an orderly stop as after a crash: one of the engines does not even read its answers, and
    is stopped, so that its connection never ends by itself."""
    with NodeProcess(tmp_path, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        inode = os.fstat(engine.client._arena_descriptor).st_ino
        with raw_peer(node) as silent:
            silent.sendall(encode(0, HELLO))
            assert silent.recv(1 << 16)
            silent.setblocking(False)
            burst = encode(1, m.Ping()) * 1000
            for _ in range(2000):  # until neither side has room
                try:
                    silent.send(burst)
                except BlockingIOError:
                    break
            assert node.stop() == 0
            node.start()
            assert node.metrics()["adoption_waits_processes"] == 1
            with pytest.raises(PeerClosed):
                engine.client.ping(deadline_s=DEADLINE_S)
            client = NodeClient.connect(
                node.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
            )
            assert client.arena_adopted
            assert node.metrics()["adoption_waits_processes"] == 0
            assert os.fstat(client._arena_descriptor).st_ino == inode
            client.close()


def test_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        command = [sys.executable, "-m", "kvfabric", "node", "--state-dir", str(tmp_path)]
        done = subprocess.run(
            [*command, "--http", address, "--host-bytes", "1MiB"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"kvfabric: cannot listen on {address}")


# ---------------------------------------------------------------------- disks


def test_node_serves_without_an_ssd_tier_that_does_not_open(tmp_path: Path) -> None:
    """A disk that is full or broken at the start costs that tier, visibly, and not the node; mended, it
    comes back by itself."""
    (tmp_path / "ssd").mkdir(mode=0o700)
    (tmp_path / "ssd" / "index").write_text("no directory")
    with NodeProcess(tmp_path, ssd_bytes=64 << 20, **HTTP) as node:
        assert is_serving(node)
        assert len(log_lines(node, "SSD tier is out of service")) == 1
        metrics = node.metrics()
        assert metrics['tier_up_info{tier="ssd"}'] == 0
        assert metrics['tier_up_info{tier="host"}'] == 1
        with AdminClient(tmp_path / "admin.sock") as admin:
            status = admin.call(admin.admin.Status, pb.StatusRequest())
        [ssd] = [tier for tier in status.tiers if tier.tier == "ssd"]
        assert ssd.state == "degraded"
        assert ssd.detail
        assert ready_text(node) == f"ok, degraded: ssd: {ssd.detail}"
        (tmp_path / "ssd" / "index").unlink()
        until(lambda: node.metrics()['tier_up_info{tier="ssd"}'] == 1)
        assert ready_text(node) == "ok"
        until(lambda: len(log_lines(node, "SSD tier is back")) == 1)
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 2)
        engine.store("r", keys)
        assert len(engine.load("r", keys)) == 2
        until(lambda: node.metrics()["ssd_writes_total"] == 2)
        engine.client.close()


def log_lines(node: NodeProcess, text: str) -> list[str]:
    return [line for line in node.log if text in line]


def ready_text(node: NodeProcess) -> str:
    with urllib.request.urlopen(f"{node.http}/readyz", timeout=20) as answer:
        text: str = answer.read().decode().strip()
    return text


def test_refused_memory_costs_the_host_tier_until_it_is_given(tmp_path: Path) -> None:
    """No memfd for the arena: every lookup misses, visibly, and no engine fails. Once the machine gives the
    memory, the tier is there and engines are sent to fetch it."""
    node = NodeProcess(tmp_path, sessions_return_s=0.1, **HTTP)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, unlimited[1]))  # of memory files too
    try:
        node.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with contextlib.ExitStack() as stack:
        stack.callback(node.stop)
        assert len(log_lines(node, "the host tier is out of service")) == 1
        assert node.metrics()['tier_up_info{tier="host"}'] == 0
        assert ready_text(node).startswith("ok, degraded: host: no arena of")
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 2)
        assert engine.store("r", keys) == 0
        assert engine.load("r", keys) == []
        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, unlimited)
        until(lambda: node.metrics()['tier_up_info{tier="host"}'] == 1)
        assert len(log_lines(node, "the host tier is back")) == 1
        with pytest.raises(PeerClosed):
            engine.client.ping(deadline_s=DEADLINE_S)
        client = NodeClient.connect(
            node.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
        )
        back = TinyEngine(client, engine.hello)
        assert back.store("r", back.open("r", "prompt", 2)) == 2
        client.close()


@pytest.mark.slow
def test_full_disk_is_in_nobodys_way(tmp_path: Path) -> None:
    """While no file can grow the host tier serves on; when there is room again SSD writes again."""
    with NodeProcess(tmp_path, ssd_bytes=64 << 20, host_bytes=8 << 20, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        unlimited = resource.prlimit(node.pid, resource.RLIMIT_FSIZE)

        def use_twice(prompt: str) -> None:
            keys = engine.open(prompt, prompt, 4)
            assert engine.store(prompt, keys) == 4
            found = engine.load(prompt, keys)  # admits them to SSD
            assert (len(found), wrong_blocks(keys, found)) == (4, 0)
            engine.release(prompt)

        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        use_twice("first")
        until(lambda: node.metrics()["ssd_refused_total"] >= 1)
        use_twice("second")
        assert ready_text(node).startswith("ok, degraded: ssd: SSD writing: ")
        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, unlimited)
        numbers = itertools.count()

        def writes_again() -> bool:
            use_twice(f"later {next(numbers)}")
            return node.metrics()["ssd_writes_total"] >= 4

        until(writes_again)
        assert ready_text(node) == "ok"
        assert len(log_lines(node, "SSD writing is out of service")) == 1
        assert len(log_lines(node, "SSD writing is back")) == 1
        engine.client.close()


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [1e-6, 5.0], ids=["too late", "in time"])
def test_a_disk_that_takes_longer_than_it_may_is_left_alone(
    tmp_path: Path, deadline_s: float
) -> None:
    """Visibly; memory serves on."""
    with NodeProcess(tmp_path, ssd_bytes=64 << 20, ssd_deadline_s=deadline_s, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 6)
        assert engine.store("r", keys) == 6
        assert len(engine.load("r", keys)) == 6  # the second use admits them to SSD
        up = 'tier_up_info{tier="ssd"}'
        if deadline_s < 1:
            until(lambda: node.metrics()[up] == 0)
            until(lambda: bool(log_lines(node, "a write is not done after 1e-06 s")))
        else:
            until(lambda: node.metrics()["ssd_writes_total"] >= 6)
            assert node.metrics()[up] == 1
        found = engine.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (6, 0)
        engine.client.close()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["stopped", "running"])
def test_unreadable_ssd_file_is_a_miss(tmp_path: Path, when: str) -> None:
    """A segment that cannot be read gives no wrong byte and stops nobody: its blocks are computed and
    stored anew."""
    with NodeProcess(tmp_path, ssd_bytes=64 << 20, **HTTP) as node:
        engine = TinyEngine.connect(node.socket)
        keys = engine.open("r", "prompt", 6)
        assert engine.store("r", keys) == 6
        assert len(engine.load("r", keys)) == 6  # the second use admits them to SSD
        until(lambda: node.metrics()["ssd_writes_total"] >= 6)
        if when == "running":  # warm from SSD first, with an arena that is void
            node.kill()
            node.start()
        else:
            node.kill()
        [segment] = [path for path in (tmp_path / "ssd").glob("seg-*.kvf") if _has_records(path)]
        if when == "running":
            os.truncate(segment, 4096)
        else:
            segment.unlink()
            segment.mkdir()
            node.start()
        client = NodeClient.connect(
            node.socket, engine.hello, deadline_s=DEADLINE_S, resume_from=engine.client
        )
        back = TinyEngine(client, engine.hello)
        assert back.open("r", "prompt", 6) == keys
        assert back.load("r", keys) == []
        back.release("r")
        back.open("r", "prompt", 6)
        assert back.store("r", keys) == 6
        found = back.load("r", keys)
        assert (len(found), wrong_blocks(keys, found)) == (6, 0)
        client.close()


def _has_records(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(4096)
        return file.read(4) == b"KVFR"


# ---------------------------------------------------------------------- gone means gone


def test_purge_takes_the_blocks_out_of_the_node(tmp_path: Path) -> None:
    """All that was made of the version, and nothing else."""
    with NodeProcess(tmp_path, **HTTP) as node, AdminClient(tmp_path / "admin.sock") as admin:
        template = admin.call(
            admin.registry.RegisterTemplate,
            pb.RegisterTemplateRequest(name="t", version="1", text=b"text"),
        )
        segment = Segment("t", "1", Incarnation(template.incarnation), 2 * BLOCK_TOKENS)
        engine = TinyEngine.connect(node.socket)
        client = engine.client
        opened = client.open_handle("r", _handle(node, engine, segment), deadline_s=DEADLINE_S)
        hasher = BlockHasher(opened.namespace_key, BLOCK_TOKENS, segments=[segment])
        keys = hasher.extend(tokens_of("prompt", 5))
        assert engine.store("r", keys) == 5
        engine.release("r")
        request = pb.InvalidateRequest(scope="template", name="t", version="1", purge=True)
        admin.call(admin.registry.Invalidate, request)
        assert node.metrics()['tier_blocks{tier="host"}'] == 2
        client.close()


def _handle(node: NodeProcess, engine: TinyEngine, segment: Segment) -> str:
    key_id, key = Keyring.open(node.state_dir).current_handle_key()
    handle = Handle(
        version=1,
        key_id=key_id,
        tenant=DEFAULT_TENANT,
        model_revision=engine.hello.model_revision,
        adapter="",
        adapter_revision="",
        layout_fingerprint=layout_fingerprint(engine.hello.layout),
        segments=from_segments((segment,)),
        public_tokens=0,
        cacheable_tokens=-1,
        epochs=(),
        audience=engine.client.session,
        request_id="r",
        expires_at=int(time.time()) + 60,
    )
    return mint(handle, key)
