"""Frames and messages: whatever arrives, the codec answers with messages or one RemoteProtocolError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.errors import LocalProtocolError, RemoteProtocolError
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import (
    HEADER,
    MAGIC,
    MAX_BODY_BYTES,
    FrameReader,
    decode_reply,
    decode_request,
    encode,
)

_LAYOUT = m.WireLayout(
    2, 2, 8, "float32", 64, 16, (m.WirePart(0, 0, 4096),), "none", "plain", "tp1", "", "full"
)
REQUESTS: tuple[m.Request, ...] = (
    m.Hello(1, 3, b"s" * 16, False, "e", "http://e", "m", "r", "", "", _LAYOUT, 0, 1 << 20),
    m.OpenHandle("r1", "handle"),
    m.Match("r1", b"k" * 64),
    m.Load("r1", b"k" * 64, 0, 0),
    m.Confirm("r1", b"k" * 64, b"g" * 8, 0, 0),
    m.Reserve("r1", bytes(32), b"k" * 64, 0, 0),
    m.Commit(7, b"\0" * 8, b"\0" * 16),
    m.Abort(7),
    m.Release(("r1", "r2")),
    m.EngineEvents((m.BlockRun(b"t" * 8, b"p" * 8, b"k" * 16),), (), True),
    m.Ping(),
    m.Bye(),
    m.Recheck("r1", b"k" * 64, 0, 0),
    m.Lend(m.PoolName(b"s" * 16, 0), 100, 4096),
    m.Borrow(b"b" * 16, m.PoolName(b"s" * 16, 0)),
    m.Placed(0, b"k" * 64, b"\0" * 16),
)
REPLIES: tuple[m.Reply, ...] = (
    m.Welcome(1, b"s" * 16, b"b" * 16, "node", 1 << 20, 1 << 20, 30.0, 30.0, False),
    m.HandleOpened(b"k" * 32, b"", 0, -1, (m.WireSegment("t", "1", b"i" * 16, 3),), False, False),
    m.Matched(2, b"\0\1", 30.0, "absent"),
    m.Located(1, 4096, b"\0" * 8, b"\0" * 4, b"\0" * 16, "absent"),
    m.Located(
        *(1, 4096, b"\0" * 8, b"\0" * 4, b"\0" * 16, ""),
        *((m.PoolName(b"s" * 16, 0),), b"\1", b"\0" * 8),
    ),
    m.Confirmed(1, "none"),
    m.Reserved(1, b"\0\0", 30.0, "none"),
    m.Committed(b"\1\1", "none"),
    m.Done(),
    m.Failed("bad_handle", "why"),
    m.Rechecked(1),
    m.Pong(9, (b"i" * 16, b"t" * 8), (m.PoolName(b"s" * 16, 0),)),
    m.Lent(100, 4096),
)


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_request_round_trips(message: m.Request) -> None:
    """What one side encodes is what the other decodes."""
    [(correlation, body)] = FrameReader().feed(encode(9, message))
    assert (correlation, decode_request(body)) == (9, message)


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_reply_round_trips(message: m.Reply) -> None:
    [(correlation, body)] = FrameReader().feed(encode(2**63, message))
    assert (correlation, decode_reply(body)) == (2**63, message)


def test_every_message_is_tried_here() -> None:
    """A message added to the unions is added to these tests."""
    assert {type(message) for message in REQUESTS} == set(m.Request.__args__)
    assert {type(message) for message in REPLIES} == set(m.Reply.__args__)


@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6), st.data())
def test_frames_do_not_depend_on_how_they_were_cut(
    sent: list[m.Request], data: st.DataObject
) -> None:
    """A stream is the same messages whatever pieces it arrives in."""
    stream = b"".join(encode(i, message) for i, message in enumerate(sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, received = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += reader.feed(stream[start:end])
    assert [decode_request(body) for _, body in received] == sent
    assert reader.num_pending_bytes == 0


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_wait(data: bytes) -> None:
    """Anything that does not start as a frame is refused at once; nothing else is raised."""
    try:
        frames = FrameReader().feed(data)
    except RemoteProtocolError:
        return
    assert frames == [] or data[:4] == MAGIC


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bodies_decode_or_are_refused(body: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            decode(body)
        except RemoteProtocolError:
            continue


@given(st.sampled_from(REQUESTS), st.data())
@settings(max_examples=300)
def test_damaged_bodies_decode_or_are_refused(message: m.Request, data: st.DataObject) -> None:
    """A flipped or missing byte gives another valid message or RemoteProtocolError, nothing else."""
    body = bytearray(encode(0, message)[HEADER.size :])
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(body), bytes(body[: data.draw(st.integers(0, len(body) - 1))])):
        try:
            decode_request(damaged)
        except RemoteProtocolError:
            continue


def test_over_long_frame_is_refused_before_it_is_read() -> None:
    """The length is checked when the header is there: nothing of the body need arrive."""
    reader = FrameReader(max_body_bytes=100)
    with pytest.raises(RemoteProtocolError, match="101 bytes; at most 100"):
        reader.feed(HEADER.pack(MAGIC, 101, 1))


def test_truncated_frame_is_pending() -> None:
    reader = FrameReader()
    assert reader.feed(encode(1, m.Ping())[:-1]) == []
    assert reader.num_pending_bytes == len(encode(1, m.Ping())) - 1


def test_unknown_tag_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="does not decode"):
        decode_request(msgspec.msgpack.encode([99, "x"]))


def test_reply_is_no_request() -> None:
    body = encode(0, m.Done())[HEADER.size :]
    with pytest.raises(RemoteProtocolError):
        decode_request(body)


def test_deep_nesting_is_refused() -> None:
    """A body that nests thousands deep neither crashes nor hangs the decoder."""
    with pytest.raises(RemoteProtocolError):
        decode_request(b"\x91" * 100_000 + b"\xc0")


def test_too_large_a_message_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError, match="a frame holds"):
        encode(1, m.Match("r", bytes(MAX_BODY_BYTES)))
