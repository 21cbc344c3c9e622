"""Handles: only what a key in force signed, for this engine, in time, is opened."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric import handle as handles
from kvfabric.errors import BadHandle, LocalProtocolError
from kvfabric.handle import Handle, HandleSegment, Handoff

KEYS = {1: bytes(range(32)), 2: bytes(range(1, 33))}
AUDIENCE = b"s" * 16
NOW = 1_000_000.0


def make_handle(**changes: object) -> Handle:
    base = Handle(
        version=handles.FORMAT_VERSION,
        key_id=2,
        tenant="t-0011",
        model_revision="sha256:aa",
        adapter="",
        adapter_revision="",
        layout_fingerprint=b"f" * 32,
        segments=(HandleSegment("system", "3", b"i" * 16, 16, 200),),
        public_tokens=0,
        cacheable_tokens=-1,
        epochs=(("fabric", 0), ("template:system", 4)),
        audience=AUDIENCE,
        request_id="req-1",
        expires_at=int(NOW) + 60,
        sources=("node-a",),
    )
    return msgspec.structs.replace(base, **changes)


def reopen(text: str, keys: dict[int, bytes] | None = None, now: float = NOW) -> Handle:
    return handles.open_handle(text, keys or KEYS, audience=AUDIENCE, now=now)


@pytest.mark.parametrize("key_id", [1, 2])
def test_opened_handle_is_what_was_minted(key_id: int) -> None:
    """Two generations of handle keys are valid at once."""
    handle = make_handle(key_id=key_id)
    text = handles.mint(handle, KEYS[key_id])
    assert reopen(text) == handle
    assert len(text) < handles.MAX_HANDLE_CHARS


def test_golden_handle() -> None:
    """The bytes of format version 1: routers and nodes of different releases meet here."""
    assert handles.mint(make_handle(handoff=Handoff("h1", "node-a", 1500)), KEYS[2]) == (
        "3AASAQKmdC0wMDExqXNoYTI1NjphYaCgxCBmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZpGV"
        "pnN5c3RlbaEzxBBpaWlpaWlpaWlpaWlpaWlpEMzIAP-SkqZmYWJyaWMAkq90ZW1wbGF0ZTpzeXN0ZW0E"
        "xBBzc3Nzc3Nzc3Nzc3Nzc3NzpXJlcS0xzgAPQnyRpm5vZGUtYcLCk6JoMaZub2RlLWHNBdyGW8lX5BB6"
        "MpxxjxedFHoEymEUkDjLV9LJZJDCDxaigA"
    )


def test_golden_handle_of_a_release_that_knew_no_handoffs() -> None:
    text = (
        "3AARAQKmdC0wMDExqXNoYTI1NjphYaCgxCBmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZpGV"
        "pnN5c3RlbaEzxBBpaWlpaWlpaWlpaWlpaWlpEMzIAP-SkqZmYWJyaWMAkq90ZW1wbGF0ZTpzeXN0ZW0E"
        "xBBzc3Nzc3Nzc3Nzc3Nzc3NzpXJlcS0xzgAPQnyRpm5vZGUtYcLCip2T1O-Ua2Gce_RYDtvrU55abxqK"
        "qfpcTVzS9Urh9OE"
    )
    assert reopen(text) == make_handle()


def test_golden_handle_of_a_release_that_told_no_length_of_texts() -> None:
    text = (
        "3AARAQKmdC0wMDExqXNoYTI1NjphYaCgxCBmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZpGU"
        "pnN5c3RlbaEzxBBpaWlpaWlpaWlpaWlpaWlpEAD_kpKmZmFicmljAJKvdGVtcGxhdGU6c3lzdGVtBMQQ"
        "c3Nzc3Nzc3Nzc3Nzc3Nzc6VyZXEtMc4AD0J8kaZub2RlLWHCwu9uF6i-H0gdCu4s325AvDY0tNKn1fjs"
        "qGRK1w6j5ZJY"
    )
    (segment,) = reopen(text).segments
    assert segment == HandleSegment("system", "3", b"i" * 16, 16, 0)


def test_such_a_release_ignores_the_length() -> None:
    older = msgspec.defstruct(
        "Segment",
        [("template", str), ("version", str), ("incarnation", bytes), ("first_token", int)],
        array_like=True,
    )
    told = msgspec.msgpack.encode(HandleSegment("system", "3", b"i" * 16, 16, 200))
    assert msgspec.msgpack.decode(told, type=older) == older("system", "3", b"i" * 16, 16)


@given(st.data())
def test_one_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    raw = bytearray(base64.urlsafe_b64decode(handles.mint(make_handle(), KEYS[2]) + "=="))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadHandle):
        reopen(base64.urlsafe_b64encode(raw).rstrip(b"=").decode())


def test_flipped_tenant_is_accepted_without_the_mac() -> None:
    """The guard taken out: decoding alone believes any tenant that a client writes."""
    forged = msgspec.msgpack.encode(make_handle(tenant="t-victim"))
    assert msgspec.msgpack.decode(forged, type=Handle).tenant == "t-victim"
    text = base64.urlsafe_b64encode(forged + bytes(32)).rstrip(b"=").decode()
    with pytest.raises(BadHandle, match="not signed"):
        reopen(text)


def test_handle_of_another_engine_is_refused() -> None:
    text = handles.mint(make_handle(audience=b"o" * 16), KEYS[2])
    with pytest.raises(BadHandle, match="another engine session"):
        reopen(text)


def test_expired_handle_is_refused() -> None:
    text = handles.mint(make_handle(), KEYS[2])
    with pytest.raises(BadHandle, match="expired"):
        reopen(text, now=NOW + 61)


def test_handle_of_a_retired_key_is_refused() -> None:
    text = handles.mint(make_handle(key_id=1), KEYS[1])
    with pytest.raises(BadHandle, match="not signed"):
        reopen(text, {2: KEYS[2]})


def test_handle_that_names_another_key_is_refused() -> None:
    text = handles.mint(make_handle(key_id=1), KEYS[2])
    with pytest.raises(BadHandle, match="another key"):
        reopen(text)


def test_handle_of_another_format_version_is_refused() -> None:
    text = handles.mint(make_handle(version=2), KEYS[2])
    with pytest.raises(BadHandle, match="format 2"):
        reopen(text)


@pytest.mark.parametrize("text", ["", "=", "*", "a" * 5000, "AAAA", "é"])
def test_text_that_is_no_handle_is_refused(text: str) -> None:
    with pytest.raises(BadHandle):
        reopen(text)


def test_handle_over_its_size_is_not_minted() -> None:
    segments = tuple(HandleSegment("t" * 100, str(n), bytes(16), n) for n in range(20))
    with pytest.raises(LocalProtocolError, match="2048"):
        handles.mint(make_handle(segments=segments), KEYS[2])


def test_segments_survive_the_trip() -> None:
    handle = make_handle()
    assert handles.from_segments(handle.to_segments()) == handle.segments
