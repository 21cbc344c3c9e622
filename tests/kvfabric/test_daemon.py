"""A real `kvfabric node` process and real clients: what an engine gets, and what it gets for nonsense."""

from __future__ import annotations

import itertools
import os
import select
import socket
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvfabric.client import AsyncNodeClient, NodeClient
from kvfabric.errors import (
    BadHandle,
    Fenced,
    LocalProtocolError,
    NotFound,
    PeerClosed,
    RemoteProtocolError,
    UnknownTenant,
)
from kvfabric.handle import Handle, from_segments, mint
from kvfabric.hashing import ROOT_PARENT, block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import HEADER, MAGIC, MAX_BODY_BYTES, FrameReader, decode_reply, encode
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import DEFAULT_TENANT, GrantState, Incarnation, Segment, TenantId

pytestmark = pytest.mark.fleet
_names = itertools.count()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), http="127.0.0.1:0") as running:
        yield running


@pytest.fixture
def engine(node: NodeProcess) -> Iterator[TinyEngine]:
    """A session with a model of its own: no test finds another's blocks."""
    connected = TinyEngine.connect(node.socket, tiny_hello(revision=f"model {next(_names)}"))
    yield connected
    connected.client.close()


def http_get(node: NodeProcess, path: str) -> tuple[int, str]:
    with urllib.request.urlopen(f"{node.http}{path}", timeout=5) as answer:
        return answer.status, answer.read().decode()


# ---------------------------------------------------------------------- the life of a request


@pytest.mark.parametrize("part_bytes", [4096, 5000, 1 << 18])
def test_what_was_stored_is_what_is_loaded(node: NodeProcess, part_bytes: int) -> None:
    """store -> match -> load -> read -> confirm -> release gives every byte back, whatever the size."""
    hello = tiny_hello(part_bytes=part_bytes, window_bytes=4 << 20, revision=f"m{next(_names)}")
    first, second = TinyEngine.connect(node.socket, hello), TinyEngine.connect(node.socket, hello)
    keys = first.open("r1", "prompt", 6)
    assert first.store("r1", keys) == 6
    first.release("r1")
    assert second.open("r2", "prompt", 6) == keys
    found = second.load("r2", keys)
    assert (len(found), wrong_blocks(keys, found)) == (6, 0)
    second.release("r2")
    first.client.close()
    second.client.close()


def test_match_is_the_longest_stored_prefix(engine: TinyEngine) -> None:
    keys = engine.open("r1", "prompt", 8)
    assert engine.client.match("r1", keys, deadline_s=DEADLINE_S).num_blocks == 0
    assert engine.store("r1", keys[:5]) == 5
    matched = engine.client.match("r1", keys, deadline_s=DEADLINE_S)
    assert (matched.num_blocks, matched.tiers, matched.reason) == (5, b"\0" * 5, "absent")
    assert matched.lease_s > 0
    engine.release("r1")


def test_second_store_of_the_same_blocks_is_spared(engine: TinyEngine) -> None:
    """What is stored exists, what is being stored is pending: nobody writes it twice."""
    keys = engine.open("r1", "prompt", 4)
    engine.store("r1", keys[:2])
    first = engine.client.reserve("r1", ROOT_PARENT, keys, group=0, shard=0, deadline_s=DEADLINE_S)
    again = engine.client.reserve("r1", ROOT_PARENT, keys, group=0, shard=0, deadline_s=DEADLINE_S)
    assert list(first.states) == [GrantState.EXISTS] * 2 + [GrantState.GRANTED] * 2
    assert list(again.states) == [GrantState.EXISTS] * 2 + [GrantState.PENDING] * 2
    engine.client.abort(first.reservation, deadline_s=DEADLINE_S)
    assert engine.store("r1", keys) == 2


def test_aborted_reservation_stores_nothing(engine: TinyEngine) -> None:
    keys = engine.open("r1", "prompt", 2)
    reserved = engine.client.reserve(
        "r1", ROOT_PARENT, keys, group=0, shard=0, deadline_s=DEADLINE_S
    )
    start, offsets = engine.write(keys)
    engine.client.abort(reserved.reservation, deadline_s=DEADLINE_S)
    committed = engine.client.commit(reserved.reservation, [0, 1], offsets, deadline_s=DEADLINE_S)
    engine.client.window.free(start)
    assert list(committed.states) == [0, 0]
    assert engine.load("r1", keys) == []


def test_models_do_not_share_blocks(node: NodeProcess) -> None:
    """The same prompt under another model revision misses, although the tokens are the same."""
    one = TinyEngine.connect(node.socket, tiny_hello(revision=f"m{next(_names)}"))
    other = TinyEngine.connect(node.socket, tiny_hello(revision=f"m{next(_names)}"))
    keys = one.open("r", "prompt", 3)
    one.store("r", keys)
    elsewhere = other.open("r", "prompt", 3)
    assert set(elsewhere).isdisjoint(keys)
    assert other.load("r", elsewhere) == []
    assert other.load("r", keys) == []  # not even by asking for the other's keys
    one.client.close()
    other.client.close()


def test_many_requests_at_once_over_one_connection(engine: TinyEngine) -> None:
    """Concurrent callers of one client each get their own answers."""
    keys = engine.open("r", "prompt", 4)
    engine.store("r", keys)
    wrong: list[int] = []

    def work(name: str) -> None:
        engine.client.open_handle(name, "", deadline_s=DEADLINE_S)
        for _ in range(5):
            found = engine.load(name, keys)
            if len(found) != 4 or wrong_blocks(keys, found):
                wrong.append(len(found))
        engine.release(name)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


async def test_async_client_has_the_same_verbs(node: NodeProcess) -> None:
    hello = tiny_hello(revision=f"m{next(_names)}")
    async with await AsyncNodeClient.connect(node.socket, hello, deadline_s=5) as client:
        opened = await client.open_handle("r", "", deadline_s=5)
        keys = block_keys(range(32), 16, opened.namespace_key)
        reserved = await client.reserve("r", ROOT_PARENT, keys, group=0, shard=0, deadline_s=5)
        start = client.window.allocate(4096 * 2)
        assert start is not None
        client.window.view(start, 8192)[:] = b"a" * 4096 + b"b" * 4096
        committed = await client.commit(
            reserved.reservation, [0, 1], [start, start + 4096], deadline_s=5
        )
        client.window.free(start)
        assert list(committed.states) == [1, 1]
        await client.match("r", keys, deadline_s=5)
        located = await client.load("r", keys, group=0, shard=0, deadline_s=5)
        buffers = [bytearray(4096) for _ in keys]
        assert await client.read(located, [memoryview(buffer) for buffer in buffers]) == 2
        assert buffers == [b"a" * 4096, b"b" * 4096]
        confirmed = await client.confirm("r", keys, located, group=0, shard=0, deadline_s=5)
        assert confirmed.num_blocks == 2
        await client.release(["r"], deadline_s=5)
        await client.ping(deadline_s=5)


# ---------------------------------------------------------------------- handles


def handle_for(node: NodeProcess, engine: TinyEngine, **changes: object) -> str:
    """A handle as a router would mint it for this engine, with some fields changed."""
    keyring = Keyring.open(node.state_dir)
    key_id, key = keyring.current_handle_key()
    fields: dict[str, object] = {
        "version": 1,
        "key_id": key_id,
        "tenant": DEFAULT_TENANT,
        "model_revision": engine.hello.model_revision,
        "adapter": "",
        "adapter_revision": "",
        "layout_fingerprint": layout_fingerprint(engine.hello.layout),
        "segments": (),
        "public_tokens": 0,
        "cacheable_tokens": -1,
        "epochs": (),
        "audience": engine.client.session,
        "request_id": "r",
        "expires_at": int(time.time()) + 60,
    }
    return mint(Handle(**(fields | changes)), key)  # type: ignore[arg-type]


def test_valid_handle_opens_the_request(node: NodeProcess, engine: TinyEngine) -> None:
    keys = engine.open("r", "prompt", 3, handle_for(node, engine))
    assert engine.store("r", keys) == 3
    assert len(engine.load("r", keys)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"audience": bytes(16)},
        {"model_revision": "other"},
        {"adapter": "other"},
        {"layout_fingerprint": bytes(32)},
        {"request_id": "another"},
        {"expires_at": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_handle_for_something_else_is_refused(
    node: NodeProcess, engine: TinyEngine, changes: dict[str, object]
) -> None:
    """A handle counts for one engine session, model, adapter and layout, and for a time."""
    with pytest.raises(BadHandle):
        engine.open("r", "prompt", 3, handle_for(node, engine, **changes))
    engine.client.ping(deadline_s=DEADLINE_S)  # the connection lives


def test_forged_handle_is_refused(node: NodeProcess, engine: TinyEngine) -> None:
    good = handle_for(node, engine)
    forged = good[:-3] + ("AAA" if good[-3:] != "AAA" else "BBB")
    with pytest.raises(BadHandle):
        engine.open("r", "prompt", 1, forged)


def test_handle_keys_have_two_generations_on_a_running_node(
    node: NodeProcess, engine: TinyEngine
) -> None:
    """Rotated beside it: what was signed before opens once more, and after another rotation no more."""
    keyring = Keyring.open(node.state_dir)
    before = handle_for(node, engine)
    keyring.rotate_handle_key()
    engine.open("r", "prompt", 1, before)
    engine.open("r", "prompt", 1, handle_for(node, engine))
    keyring.rotate_handle_key()
    with pytest.raises(BadHandle):
        engine.open("r", "prompt", 1, before)
    engine.open("r", "prompt", 1, handle_for(node, engine))


@pytest.mark.parametrize("cut", [0, 1, 8, 40])
def test_cut_or_replayed_handle_is_refused(node: NodeProcess, engine: TinyEngine, cut: int) -> None:
    """Cut at either end, or used for another request than it was made for."""
    good = handle_for(node, engine, request_id="req-1")
    engine.open("req-1", "prompt", 1, good)
    with pytest.raises(BadHandle):
        engine.open("req-2", "prompt", 1, good)
    for broken in (good[: len(good) - cut], good[cut:]) if cut else (good + "A", "A" + good):
        with pytest.raises(BadHandle):
            engine.open("req-1", "prompt", 1, broken)


def test_another_tenants_handle_finds_that_tenants_blocks_alone(
    node: NodeProcess, engine: TinyEngine
) -> None:
    """With the same tokens, and with the first one's own keys. A tenant without a secret is refused."""
    keyring = Keyring.create_or_open(node.state_dir)
    keyring.add_tenant(TenantId("t-other"))
    mine = engine.open("r1", "prompt", 3, handle_for(node, engine, request_id="r1"))
    assert engine.store("r1", mine) == 3
    foreign = {"tenant": "t-other", "request_id": "r2"}
    theirs = engine.open("r2", "prompt", 3, handle_for(node, engine, **foreign))
    assert set(theirs).isdisjoint(mine)
    for keys in (theirs, mine):
        assert engine.client.match("r2", keys, deadline_s=DEADLINE_S).num_blocks == 0
    assert engine.client.match("r1", mine, deadline_s=DEADLINE_S).num_blocks == 3
    with pytest.raises(UnknownTenant):
        engine.open("r3", "prompt", 1, handle_for(node, engine, tenant="t-gone", request_id="r3"))


def test_no_store_and_no_read_are_kept(node: NodeProcess, engine: TinyEngine) -> None:
    """What the handle forbids does not happen, and is no error."""
    keys = engine.open("r1", "prompt", 3, handle_for(node, engine, request_id="r1", no_store=True))
    assert engine.store("r1", keys) == 0
    engine.open("r2", "prompt", 3, handle_for(node, engine, request_id="r2"))
    assert engine.store("r2", keys) == 3
    engine.open("r3", "prompt", 3, handle_for(node, engine, request_id="r3", no_read=True))
    matched = engine.client.match("r3", keys, deadline_s=DEADLINE_S)
    assert (matched.num_blocks, matched.reason) == (0, "no_read")


def test_moved_epoch_fences_the_request(node: NodeProcess, engine: TinyEngine) -> None:
    """A handle that saw other epochs than the node is not opened: no key, so nothing in HBM either."""
    keys = engine.open("r", "prompt", 3, handle_for(node, engine))
    engine.store("r", keys)
    engine.release("r")
    with pytest.raises(Fenced):
        engine.open("r", "prompt", 3, handle_for(node, engine, epochs=(("fabric", 7),)))
    withdrawn = from_segments((Segment("t", "1", Incarnation(bytes(16)), 0),))
    with pytest.raises(Fenced):
        engine.open("r", "prompt", 3, handle_for(node, engine, segments=withdrawn))
    assert engine.client.match("r", keys, deadline_s=DEADLINE_S).num_blocks == 0
    assert engine.store("r", keys) == 0


def test_request_that_was_not_opened_misses(engine: TinyEngine) -> None:
    keys = engine.open("r", "prompt", 2)
    matched = engine.client.match("never opened", keys, deadline_s=DEADLINE_S)
    assert (matched.num_blocks, matched.reason) == (0, "no_handle")


# ---------------------------------------------------------------------- sessions and memory


def test_second_connection_joins_the_session(node: NodeProcess, engine: TinyEngine) -> None:
    """A worker's connection shares the rights of the scheduler's, and has a window of its own."""
    worker = NodeClient.connect(
        node.socket, engine.hello, deadline_s=5, session=engine.client.session
    )
    keys = engine.open("r", "prompt", 2)
    assert TinyEngine(worker, engine.hello).store("r", keys) == 2
    assert engine.client.match("r", keys, deadline_s=5).num_blocks == 2
    worker.close()
    assert engine.client.match("r", keys, deadline_s=5).num_blocks == 2


def test_unknown_session_is_refused(node: NodeProcess) -> None:
    with pytest.raises(NotFound):
        NodeClient.connect(node.socket, tiny_hello(), deadline_s=5, session=b"x" * 16)


def test_connection_of_another_model_may_not_join(node: NodeProcess, engine: TinyEngine) -> None:
    hello = tiny_hello(revision="another")
    with pytest.raises(RemoteProtocolError):
        NodeClient.connect(node.socket, hello, deadline_s=5, session=engine.client.session)


def test_arena_cannot_be_written_by_an_engine(engine: TinyEngine) -> None:
    """The mapping is read-only, and the descriptor that came cannot be mapped otherwise."""
    assert engine.client.arena.readonly
    descriptor = engine.client._arena_descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)


def test_window_is_not_larger_than_allowed(node: NodeProcess) -> None:
    hello = tiny_hello(window_bytes=1 << 40)
    with NodeClient.connect(node.socket, hello, deadline_s=5) as client:
        assert client.window.num_bytes == 256 << 20


def test_commit_from_outside_the_window_is_refused(engine: TinyEngine) -> None:
    """An offset that leaves the window stores nothing and kills nobody but the connection, at most."""
    keys = engine.open("r", "prompt", 1)
    reserved = engine.client.reserve("r", ROOT_PARENT, keys, group=0, shard=0, deadline_s=5)
    with pytest.raises(LocalProtocolError):
        engine.client.commit(reserved.reservation, [0], [1 << 40], deadline_s=5)
    engine.client.window.hold = lambda offsets: ()  # type: ignore[method-assign]
    with pytest.raises((RemoteProtocolError, PeerClosed)):
        engine.client.commit(reserved.reservation, [0], [1 << 40], deadline_s=5)


def test_socket_is_private(node: NodeProcess) -> None:
    mode = node.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


# ---------------------------------------------------------------------- nonsense on the wire


class RawPeer:
    """A connection that sends whatever bytes a test wants, after an optional handshake."""

    def __init__(self, node: NodeProcess, *, hello: bool) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(node.socket))
        self.reader = FrameReader()
        if hello:
            self.sock.sendall(encode(0, tiny_hello().to_wire(session=b"", resumed=False)))
            assert isinstance(self.answers(1)[0], m.Welcome)

    def answers(self, at_most: int) -> list[m.Reply]:
        """Replies until so many came or the node closed."""
        found: list[m.Reply] = []
        while len(found) < at_most and (data := self.sock.recv(65536)):
            found += [decode_reply(body) for _, body in self.reader.feed(data)]
        return found

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


_HELLO = encode(0, tiny_hello().to_wire(session=b"", resumed=False))
NONSENSE = {
    "bad magic": b"HTTP/1.1 200 OK\r\n\r\n",
    "unknown tag": HEADER.pack(MAGIC, 3, 1) + b"\x92\x63\x00",
    "absurd length": HEADER.pack(MAGIC, 0xFFFFFFFF, 1),
    "over-long": HEADER.pack(MAGIC, MAX_BODY_BYTES + 1, 1),
    "wrong type": HEADER.pack(MAGIC, 4, 1) + b"\x93\x03\x01\x02",
    "a reply": encode(1, m.Done()),
    "a second hello": _HELLO,
    "keys that are none": encode(1, m.Match("r", b"short")),
    "generations that do not fit": encode(1, m.Confirm("r", bytes(64), bytes(4), 0, 0)),
    "indexes without offsets": encode(1, m.Commit(1, bytes(8), bytes(8))),
}


@pytest.mark.parametrize("sent", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_gets_one_error_and_the_end(node: NodeProcess, sent: bytes) -> None:
    """Whoever breaks the wire contract gets one Failed and is cut off; the daemon lives."""
    with RawPeer(node, hello=True) as peer:
        peer.sock.sendall(sent)
        answers = peer.answers(5)
    assert [type(answer) for answer in answers] == [m.Failed]
    assert answers[0].code == "remote_protocol"  # type: ignore[union-attr]
    TinyEngine.connect(node.socket).client.close()


def test_truncated_frame_gets_one_error(node: NodeProcess) -> None:
    with RawPeer(node, hello=True) as peer:
        peer.sock.sendall(encode(1, m.Ping())[:-1])
        peer.sock.shutdown(socket.SHUT_WR)
        assert [type(answer) for answer in peer.answers(5)] == [m.Failed]


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage before anything else",
        encode(0, m.Ping()),
        HEADER.pack(MAGIC, 1 << 20, 0),
        _HELLO + encode(1, m.Ping()),
        _HELLO.replace(b"\x01\x01", b"\x01\x02", 1),  # its tag and version come first
    ],
    ids=["garbage", "no hello", "too long a hello", "more than a hello", "version 2"],
)
def test_bad_hello_gets_one_error(node: NodeProcess, sent: bytes) -> None:
    with RawPeer(node, hello=False) as peer:
        peer.sock.sendall(sent)
        assert [type(answer) for answer in peer.answers(5)] == [m.Failed]


def test_layout_without_parts_is_refused(node: NodeProcess) -> None:
    hello = tiny_hello().to_wire(session=b"", resumed=False)
    layout = m.WireLayout(1, 1, 1, "x", 16, 16, (), "", "", "", "", "")
    wrong = msgspec.structs.replace(hello, layout=layout)
    with RawPeer(node, hello=False) as peer:
        peer.sock.sendall(encode(0, wrong))
        assert [type(answer) for answer in peer.answers(5)] == [m.Failed]


def test_reader_that_never_reads_stops_being_served(node: NodeProcess) -> None:
    """Answers that nobody takes fill a bounded buffer; then the node stops reading that connection, and
    still serves the others.
    """
    with RawPeer(node, hello=True) as peer:
        peer.sock.setblocking(False)
        burst, sent = encode(1, m.Ping()) * 1000, 0
        while sent < 64 << 20:
            try:
                sent += peer.sock.send(burst)
            except BlockingIOError:
                if not select.select([], [peer.sock], [], 0.2)[1]:
                    break
        assert sent < 64 << 20
        TinyEngine.connect(node.socket).client.close()


# ---------------------------------------------------------------------- HTTP, start and stop


def test_metrics_name_what_happened(node: NodeProcess, engine: TinyEngine) -> None:
    keys = engine.open("r", "prompt", 2)
    engine.store("r", keys)
    engine.load("r", keys)
    values = node.metrics()
    assert values["blocks_stored_total"] >= 2
    assert values['blocks_matched_total{tier="host"}'] >= 2
    assert values["sessions"] >= 1
    assert values['requests_total{result="ok"}'] > 0


def test_health_and_readiness(node: NodeProcess) -> None:
    assert http_get(node, "/healthz") == (200, "ok\n")
    assert http_get(node, "/readyz") == (200, "ok\n")


def test_second_node_on_the_same_state_is_refused(node: NodeProcess) -> None:
    with pytest.raises(RuntimeError, match="another node runs on"):
        NodeProcess(node.state_dir).start()


@pytest.mark.slow
def test_stop_is_graceful_and_leaves_no_socket(tmp_path: Path) -> None:
    """SIGTERM: exit code 0, sockets gone, clients see the end at once."""
    node = NodeProcess(tmp_path).start()
    engine = TinyEngine.connect(node.socket)
    assert node.stop() == 0
    assert not node.socket.exists()
    with pytest.raises(PeerClosed):
        engine.client.ping(deadline_s=5)
    engine.client.close()


@pytest.mark.slow
def test_node_that_requires_handles_serves_nobody_without(tmp_path: Path) -> None:
    with NodeProcess(tmp_path, require_handle=True) as node:
        engine = TinyEngine.connect(node.socket)
        with pytest.raises(BadHandle, match="require_handle"):
            engine.open("r", "prompt", 1)
        engine.open("r", "prompt", 1, handle_for(node, engine))
        engine.client.close()
