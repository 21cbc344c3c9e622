"""The client's own parts: window regions, verified reads, and what it does when a node misbehaves."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.client import AsyncNodeClient, NodeClient, Window
from kvfabric.client.parts import PartReader
from kvfabric.client.window import WINDOW_ALIGN_BYTES
from kvfabric.errors import (
    ClosedError,
    ConnectError,
    DeadlineExceeded,
    LocalProtocolError,
    Overloaded,
    PeerClosed,
    RemoteProtocolError,
)
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import FrameReader, decode_request, encode
from kvfabric.protocol.messages import Located
from kvfabric.testing.engine import tiny_hello
from kvfabric.types import BlockKey

KEY = BlockKey(bytes(32))


def new_window(num_bytes: int = 4096) -> Window:
    return Window(memoryview(bytearray(num_bytes)))


# ---------------------------------------------------------------------- window


def test_window_region_can_be_written_and_used_again() -> None:
    window = new_window()
    first = window.allocate(1000)
    assert first is not None
    window.view(first, 1000)[:] = b"x" * 1000
    window.free(first)
    assert window.num_free_bytes == 4096
    assert window.allocate(4096) == 0


def test_window_refuses_what_does_not_fit() -> None:
    """No room is a value; a wrong size, offset or a second free is our own bug."""
    window = new_window()
    assert window.allocate(5000) is None
    start = window.allocate(100)
    assert start is not None
    for wrong in (
        lambda: window.allocate(0),
        lambda: window.view(start, 300),
        lambda: window.view(2048, 1),
        lambda: window.free(start + 1),
        lambda: window.hold([2048]),
    ):
        with pytest.raises(LocalProtocolError):
            wrong()
    window.free(start)
    with pytest.raises(LocalProtocolError):
        window.free(start)


def test_held_region_is_quarantined_until_the_answer() -> None:
    """Between commit and its answer a region is not handed out again, freed or not."""
    window = new_window()
    start = window.allocate(4096)
    assert start is not None
    held = window.hold([start, start + 1024])
    window.free(start)
    assert window.allocate(256) is None
    window.unhold(held)
    assert window.allocate(4096) == start


def test_region_of_two_commits_waits_for_both() -> None:
    window = new_window()
    start = window.allocate(4096)
    assert start is not None
    first, second = window.hold([start]), window.hold([start + 512])
    window.free(start)
    window.unhold(second)
    assert window.allocate(256) is None
    window.unhold(first)
    assert window.allocate(256) == start


@given(st.lists(st.tuples(st.sampled_from("afhu"), st.integers(0, 2000)), max_size=60))
@settings(max_examples=80)
def test_window_never_hands_out_a_byte_twice(steps: list[tuple[str, int]]) -> None:
    """Whatever is allocated, freed and held in whatever order: live regions do not overlap, and all
    bytes come back.
    """
    window = new_window(8192)
    owned: dict[int, int] = {}
    held: list[tuple[tuple[int, ...], dict[int, int]]] = []
    for verb, number in steps:
        if verb == "a":
            start = window.allocate(number + 1)
            if start is not None:
                size = -(-(number + 1) // WINDOW_ALIGN_BYTES) * WINDOW_ALIGN_BYTES
                busy = {**owned, **{s: n for _, regions in held for s, n in regions.items()}}
                assert all(start + size <= s or s + n <= start for s, n in busy.items())
                owned[start] = size
        elif verb == "f" and owned:
            start = sorted(owned)[number % len(owned)]
            window.free(start)
            del owned[start]
        elif verb == "h" and owned:
            start = sorted(owned)[number % len(owned)]
            held.append((window.hold([start]), {start: owned[start]}))
        elif verb == "u" and held:
            window.unhold(held.pop(number % len(held))[0])
    for starts, _ in held:
        window.unhold(starts)
    for start in owned:
        window.free(start)
    assert window.allocate(8192) == 0


# ---------------------------------------------------------------------- verified reads


def located_of(arena: npt.NDArray[np.uint8], offsets: list[int], size: int) -> Located:
    digests = [xxhash.xxh3_128_digest(arena[o : o + size].tobytes()) for o in offsets]
    packed = np.array(offsets, dtype="<u8").tobytes()
    return Located(len(offsets), size, packed, bytes(4 * len(offsets)), b"".join(digests), "none")


@pytest.mark.parametrize("size", [4096, 16384, 300_000, 1 << 20])
def test_read_copies_and_verifies(size: int) -> None:
    """Parts of every size arrive bit for bit, in any order of offsets."""
    arena = np.random.default_rng(1).integers(0, 256, 8 * size, dtype=np.uint8)
    offsets = [7 * size, 0, 3 * size, 5 * size]
    reader = PartReader(arena.data)
    buffers = [bytearray(size) for _ in offsets]
    try:
        good = reader.read(located_of(arena, offsets, size), [memoryview(b) for b in buffers])
    finally:
        reader.close()
    assert good == 4
    assert [bytes(b) for b in buffers] == [arena[o : o + size].tobytes() for o in offsets]


@pytest.mark.parametrize("size", [4096, 1 << 20])
@pytest.mark.parametrize("bad", [0, 2, 3])
def test_read_stops_at_the_first_part_that_does_not_verify(size: int, bad: int) -> None:
    arena = np.zeros(4 * size, dtype=np.uint8)
    located = located_of(arena, [0, size, 2 * size, 3 * size], size)
    arena[bad * size + size - 1] = 1
    reader = PartReader(arena.data)
    try:
        assert reader.read(located, [memoryview(bytearray(size)) for _ in range(4)]) == bad
    finally:
        reader.close()


def test_read_verifies_what_was_copied_and_not_its_source() -> None:
    """The checksum is of the destination: with a source that changes in the middle of the copy nothing
    wrong passes. Proved by a destination that differs from the source.
    """
    arena = np.zeros(8192, dtype=np.uint8)
    located = located_of(arena, [0, 4096], 4096)
    buffers = [bytearray(4096) for _ in range(2)]
    reader = PartReader(arena.data)
    assert reader.read(located, [memoryview(b) for b in buffers]) == 2
    arena[4096] = 1  # the daemon wrote the slot anew after Located was answered
    assert reader.read(located, [memoryview(b) for b in buffers]) == 1


def test_read_refuses_nonsense() -> None:
    arena = np.zeros(8192, dtype=np.uint8)
    located = located_of(arena, [0, 4096], 4096)
    reader = PartReader(arena.data)
    with pytest.raises(LocalProtocolError):
        reader.read(located, [memoryview(bytearray(4096))])
    with pytest.raises(LocalProtocolError):
        reader.read(located, [memoryview(bytearray(4095)), memoryview(bytearray(4096))])
    outside = Located(1, 4096, (4097).to_bytes(8, "little"), bytes(4), bytes(16), "none")
    with pytest.raises(RemoteProtocolError, match="outside"):
        reader.read(outside, [memoryview(bytearray(4096))])


# ---------------------------------------------------------------------- a node that misbehaves


@contextmanager
def scripted_node(path: Path, answers: list[bytes | None]) -> Iterator[list[m.Request]]:
    """A peer on a real socket: welcomes, then answers each request with the next of `answers` (raw
    bytes, correlation id 0 replaced; None: close). It hears everything, and answers in no other way.
    """
    heard: list[m.Request] = []
    accepted: list[socket.socket] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        accepted.append(connection)
        with connection:
            reader, script = FrameReader(), iter(answers)
            welcome = m.Welcome(1, b"s" * 16, b"b" * 16, "n", 0, 0, 1.0, 1.0, False)
            connection.sendall(encode(0, welcome))
            while data := connection.recv(65536):
                for correlation, body in reader.feed(data):
                    heard.append(decode_request(body))
                    if isinstance(heard[-1], m.Hello):
                        continue
                    answer = next(script, None)
                    if answer is None:
                        return
                    connection.sendall(
                        answer.replace(b"CORRELAT", correlation.to_bytes(8, "little"))
                    )

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    except BaseException:
        for connection in accepted:  # a test that fails leaves its client open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        raise
    finally:
        thread.join()
        listener.close()


def reply(message: m.Reply) -> bytes:
    frame = encode(0, message)
    return frame[:8] + b"CORRELAT" + frame[16:]


def connect(path: Path) -> NodeClient:
    return NodeClient.connect(path, tiny_hello(), deadline_s=5)


def test_unanswered_call_ends_at_its_deadline_and_the_late_answer_is_dropped(
    tmp_path: Path,
) -> None:
    """A call never outlasts its deadline; what arrives later is not taken for another's answer."""
    late = encode(1, m.Matched(9, b"\0" * 9, 1.0, "late"))
    with scripted_node(tmp_path / "s", [b"", late + reply(m.Pong(0, ()))]):
        client = connect(tmp_path / "s")
        with pytest.raises(DeadlineExceeded, match=r"Match was not answered in 0.05 s"):
            client.match("r", [KEY], deadline_s=0.05)
        client.ping(deadline_s=5)
        client.close()


def test_lost_node_fails_every_call_at_once(tmp_path: Path) -> None:
    with scripted_node(tmp_path / "s", [None]):
        client = connect(tmp_path / "s")
        for _ in range(2):
            with pytest.raises(PeerClosed):
                client.ping(deadline_s=5)
        assert client.closed
        client.close()
        with pytest.raises((ClosedError, PeerClosed)):
            client.ping(deadline_s=5)


@pytest.mark.parametrize(
    "answer", [b"nonsense" * 3, reply(m.Committed(b"", "none"))], ids=["garbage", "wrong type"]
)
def test_broken_answer_is_a_protocol_error(tmp_path: Path, answer: bytes) -> None:
    with scripted_node(tmp_path / "s", [answer]):
        client = connect(tmp_path / "s")
        with pytest.raises(RemoteProtocolError):
            client.match("r", [KEY], deadline_s=5)
        client.close()


def test_no_node_is_a_connect_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectError):
        connect(tmp_path / "nobody")


def test_silent_node_is_given_up(tmp_path: Path) -> None:
    """Somebody who listens and never says Welcome costs the deadline, not more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with pytest.raises(DeadlineExceeded):
            NodeClient.connect(tmp_path / "s", tiny_hello(), deadline_s=0.05)


def test_calls_of_many_threads_get_their_own_answers(tmp_path: Path) -> None:
    """Whoever reads hands each answer to the thread that asked."""
    answers: list[bytes | None] = [
        reply(m.Failed("not_found", "x")) if i % 2 else reply(m.Pong(0, ())) for i in range(40)
    ]
    with scripted_node(tmp_path / "s", [*answers, reply(m.Done())]):
        client = connect(tmp_path / "s")
        outcomes: list[str] = []

        def ask() -> None:
            for _ in range(10):
                try:
                    client.ping(deadline_s=5)
                    outcomes.append("ok")
                except Exception as exc:  # noqa: BLE001 - counted below
                    outcomes.append(type(exc).__name__)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    assert sorted(outcomes) == ["NotFound"] * 20 + ["ok"] * 20


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    """Connecting and closing leaves no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    with scripted_node(tmp_path / "s", [reply(m.Done())]):
        connect(tmp_path / "s").close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_calls_to_a_node_that_reads_nothing_do_not_pile_up(tmp_path: Path) -> None:
    """A late call's frame stays unsent; further calls are refused once many bytes are."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        ThreadPoolExecutor() as pool,
    ):
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)

        def welcome() -> socket.socket:
            peer, _ = listener.accept()
            peer.sendall(encode(0, m.Welcome(1, b"s" * 16, b"b" * 16, "n", 0, 0, 1.0, 1.0, False)))
            return peer

        accepted = pool.submit(welcome)
        client = await AsyncNodeClient.connect(tmp_path / "s", tiny_hello(), deadline_s=5)
        with accepted.result():
            keys = [KEY] * 65_536
            for _ in range(6):
                with pytest.raises((DeadlineExceeded, Overloaded)):
                    await client.match("r", keys, deadline_s=0.01)
            with pytest.raises(Overloaded):
                await client.match("r", keys, deadline_s=0.01)
        await client.close()


def test_nobody_writes_the_buffers_after_a_read_that_failed() -> None:
    """One of the two readers meets a buffer it cannot write; the other is waited for."""
    size, count = 1 << 20, 24
    reader = PartReader(memoryview(bytes(size)))
    sums = xxhash.xxh3_128_digest(bytes(size)) * count
    located = Located(count, size, bytes(8 * count), bytes(4 * count), sums, "none")
    for _ in range(5):
        buffers = [bytearray(b"\xee" * size) for _ in range(count)]
        views = [memoryview(bytes(size)), *(memoryview(buffer) for buffer in buffers[1:])]
        with pytest.raises(ValueError, match="read-only"):
            reader.read(located, views)
        written = sum(buffer[-1] == 0 for buffer in buffers)
        time.sleep(0.005)
        assert sum(buffer[-1] == 0 for buffer in buffers) == written
    reader.close()
