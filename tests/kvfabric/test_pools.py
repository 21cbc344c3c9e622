"""Engines that lend each other their HBM, as their node sees it: who may, what is told, when it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvfabric.client.pools import LentPool, borrow, lend
from kvfabric.errors import AccessError, KVFabricError, NotFound, RemoteProtocolError
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.protocol.messages import BlockRun, EngineEvents, Failed, Lend, Located, PoolName
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.testing.processes import EngineProcess, NodeProcess, until
from kvfabric.types import BlockKey

PAGE_BYTES = 2048
NUM_PAGES = 64
PAGES = [(5, 9), (1, 2), (63, 0)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node")) as node:
        yield node


@contextlib.contextmanager
def engine(node: NodeProcess, *, revision: str = "rev") -> Iterator[TinyEngine]:
    one = TinyEngine.connect(node.socket, tiny_hello(revision=revision))
    with contextlib.closing(one.client):
        yield one


def name_of(one: TinyEngine, shard: int = 0) -> PoolName:
    return PoolName(one.client.session, shard)


@contextlib.contextmanager
def lent(node: NodeProcess, one: TinyEngine) -> Iterator[int]:
    """Its pool is lent; the descriptor."""
    with _pool() as descriptor:
        _lend(node, Lend(name_of(one), NUM_PAGES, PAGE_BYTES), descriptor)
        yield descriptor


@contextlib.contextmanager
def _pool() -> Iterator[int]:
    descriptor = os.memfd_create("pool")
    try:
        os.ftruncate(descriptor, NUM_PAGES * PAGE_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)


def _lend(node: NodeProcess, message: Lend, descriptor: int) -> None:
    lend(node.socket, message, descriptor, deadline_s=DEADLINE_S)


def _borrow(node: NodeProcess, one: TinyEngine, name: PoolName) -> LentPool:
    return borrow(node.socket, one.client.session, name, deadline_s=DEADLINE_S)


def offered(one: TinyEngine) -> tuple[PoolName, ...]:
    return one.client.ping(deadline_s=DEADLINE_S).pools


def stored(one: TinyEngine, prompt: str) -> list[BlockKey]:
    """Three blocks that lie in `PAGES` of its pool."""
    keys = one.open(prompt, prompt, 3)
    assert one.store(prompt, keys) == 3
    one.client.place(0, keys, PAGES, deadline_s=DEADLINE_S)
    return keys


def locate(one: TinyEngine, prompt: str) -> Located:
    located = one.locate(prompt, one.open(prompt, prompt, 3))
    one.release(prompt)
    assert located.num_blocks == 3
    return located


def test_a_borrower_gets_the_lenders_memory(node: NodeProcess) -> None:
    """The same bytes, through a descriptor of its own; the node keeps one too, so the lender's may go."""
    with engine(node) as first, engine(node) as second:
        with lent(node, first) as descriptor:
            os.pwrite(descriptor, b"KV of a page", 3 * PAGE_BYTES)
        assert offered(second) == offered(first) == (name_of(first),)
        pool = _borrow(node, second, name_of(first))
        assert (pool.num_pages, pool.page_bytes) == (NUM_PAGES, PAGE_BYTES)
        assert os.pread(pool.descriptor, 12, 3 * PAGE_BYTES) == b"KV of a page"
        os.close(pool.descriptor)


def test_located_names_where_it_also_lies(node: NodeProcess) -> None:
    """To others; the lender knows. Pages come in the order of the blocks."""
    with engine(node) as first, engine(node) as second, lent(node, first):
        stored(first, "named")
        found = locate(second, "named")
        assert found.pools == (name_of(first),)
        assert found.pool_of == b"\1\1\1"
        pages = np.frombuffer(found.pool_pages, "<u4").reshape(3, 2)
        assert [tuple(row) for row in pages.tolist()] == PAGES
        assert locate(first, "named").pools == ()


@pytest.mark.parametrize("how", ["removed", "cleared", "written again", "never said"])
def test_what_is_not_there_any_more_is_not_named(node: NodeProcess, how: str) -> None:
    with engine(node) as first, engine(node) as second, lent(node, first):
        keys = stored(first, how)
        if how in ("removed", "cleared"):
            run = BlockRun(b"t" * 8, bytes(8), keys[1][:8])
            removed = (run,) if how == "removed" else ()
            events = EngineEvents((), removed, how == "cleared")
            first.client.publish(events, deadline_s=DEADLINE_S)
        elif how == "written again":
            others = first.open("other", "other", 1)
            first.client.place(0, others, [PAGES[1]], deadline_s=DEADLINE_S)
        expected = {"cleared": b"", "never said": b"\1\1\1"}.get(how, b"\1\0\1")
        assert locate(second, how).pool_of == expected


def test_pools_of_other_models_and_layouts_are_not_offered(node: NodeProcess) -> None:
    with engine(node) as first, engine(node, revision="other") as other, lent(node, first):
        assert offered(other) == ()
        with pytest.raises(AccessError, match="another model"):
            _borrow(node, other, name_of(first))
        layout = tiny_hello(part_bytes=8192)
        larger = TinyEngine.connect(node.socket, layout)
        with contextlib.closing(larger.client):
            assert offered(larger) == ()
            with pytest.raises(AccessError, match="another layout"):
                _borrow(node, larger, name_of(first))


def test_only_a_sessions_own_processes_speak_for_it(node: NodeProcess) -> None:
    """Another process of the same user that knows the session's name neither lends nor borrows for it."""
    path = str(node.socket)
    with engine(node) as first, lent(node, first), EngineProcess(node.socket) as other:
        mine, its = first.client.session.hex(), other.session.hex()
        assert other.do("lend", socket=path, session=mine, num_pages=1) == {"error": "access"}
        stolen = other.do("borrow", socket=path, borrower=mine, owner=mine)
        assert stolen == {"error": "access"}
        honest = other.do("borrow", socket=path, borrower=its, owner=mine)
        assert honest == {"pages": NUM_PAGES}
        assert other.do("lend", socket=path, session=its, num_pages=1) == {}
        assert set(offered(first)) == {name_of(first), PoolName(other.session, 0)}


def test_a_lender_that_dies_is_not_offered(node: NodeProcess) -> None:
    """Its borrowers hear of it, or its memory would be held for ever."""
    with engine(node) as first, EngineProcess(node.socket) as other:
        its = other.session.hex()
        other.do("lend", socket=str(node.socket), session=its, num_pages=4)
        assert offered(first) == (PoolName(other.session, 0),)
        other.send(signal.SIGKILL)
        until(lambda: offered(first) == ())
        with pytest.raises(NotFound):
            _borrow(node, first, PoolName(other.session, 0))


def test_what_makes_no_sense_is_refused(node: NodeProcess) -> None:
    with engine(node) as first, lent(node, first) as descriptor:
        name = name_of(first)
        with pytest.raises(NotFound):
            _lend(node, Lend(PoolName(b"x" * 16, 0), 1, 1), descriptor)
        with pytest.raises(NotFound):
            _borrow(node, first, name_of(first, shard=1))
        for pages, size in ((0, 1), (1, -1), (1 << 32, 1), (1 << 30, 1 << 30)):
            with pytest.raises(RemoteProtocolError, match="no pool has"):
                _lend(node, Lend(name, pages, size), descriptor)
        assert offered(first) == (name,)  # what was lent before is lent
    bad: list[tuple[list[BlockKey], list[tuple[int, ...]]]] = [
        ([BlockKey(b"k" * 32)], [(NUM_PAGES,)]),
        ([BlockKey(b"k" * 31)], [(1,)]),
        ([BlockKey(b"k" * 32)], [()]),
        ([BlockKey(b"k" * 32)] * 2, [(1,), ()]),
    ]
    for keys, places in bad:
        with engine(node) as one, lent(node, one), pytest.raises(KVFabricError):
            one.client.place(0, keys, places, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("count", [0, 2])
def test_a_pool_comes_with_its_descriptor(node: NodeProcess, count: int) -> None:
    """With exactly one: what else a connection brings is closed with it."""
    with engine(node) as first, _pool() as descriptor, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(node.socket))
        frame = encode(7, Lend(name_of(first), 1, 1))
        socket.send_fds(sock, [frame], [descriptor] * count)
        [(_, body)] = FrameReader().feed(sock.recv(4096))
        refused = decode_reply(body)
        assert isinstance(refused, Failed)
        assert f"1 descriptor, not {count}" in refused.message
        assert sock.recv(4096) == b""
        assert offered(first) == ()
