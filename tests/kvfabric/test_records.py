"""Records: the bytes on disk are fixed, and nothing damaged or misplaced decodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import CorruptBlock, LocalProtocolError
from kvfabric.testing.tiers import make_part
from kvfabric.tiers import records
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.records import (
    MAX_INCARNATIONS,
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    decode_file_header,
    decode_header,
    decode_identity,
    encode_file_header,
    encode_header,
    encode_identity,
    record_bytes,
    verify_header,
    verify_payload,
)
from kvfabric.types import BlockKey, Part, TenantId

FILE_ID = bytes(range(16))
IDENTITY = PartIdentity(
    part=Part(BlockKey(bytes([0x11]) * 32), 2, 3),
    namespace_tag=bytes([0x22]) * 8,
    tenant=TenantId("t-0123456789abcdef"),
    layout_fingerprint=bytes([0x33]) * 32,
    parent=BlockKey(bytes([0x44]) * 32),
    block_index=5,
    incarnations=(bytes([0x55]) * 16, bytes([0x66]) * 16),
    num_bytes=262_144,
    checksum=bytes([0x77]) * 16,
)
HEADER = RecordHeader(FILE_ID, 8192, 7, IDENTITY)

GOLDEN_RECORD = (
    "4b56465245433031" "0100" "0000" "137563de"  # magic, version, zero, CRC
    "000102030405060708090a0b0c0d0e0f" "0020000000000000" "0700000000000000"  # file, place, sequence
    + "11" * 32 + "02000000" "03000000" "0000040000000000" + "77" * 16  # part, length, checksum
    + "33" * 32 + "44" * 32 + "05000000" "1200" "0200" + "22" * 8  # layout, parent, index, counts, tag
    + b"t-0123456789abcdef".hex() + "55" * 16 + "66" * 16
)  # fmt: skip


def test_record_header_is_these_bytes() -> None:
    """Golden vector: files written by one release are read by the next."""
    page = encode_header(HEADER)
    assert page.rstrip(b"\0").hex() == GOLDEN_RECORD
    assert len(page) == PAGE_BYTES


def test_file_header_is_these_bytes() -> None:
    page = encode_file_header(FileHeader(FILE_ID, 9, 1 << 20))
    assert page.rstrip(b"\0").hex() == (
        "4b56465345473031" "0100" "0000" "a5dbea38"
        "000102030405060708090a0b0c0d0e0f" "09000000" "00000000" "000010"
    )  # fmt: skip
    assert len(page) == PAGE_BYTES


def test_headers_decode_to_what_was_encoded() -> None:
    assert decode_header(encode_header(HEADER)) == HEADER
    file = FileHeader(FILE_ID, 9, 1 << 20)
    assert decode_file_header(encode_file_header(file)) == file


@given(st.integers(0, MAX_INCARNATIONS), st.text(max_size=16), st.integers(1, 2**63))
def test_every_identity_within_bounds_survives(count: int, tenant: str, num_bytes: int) -> None:
    identity = replace(
        IDENTITY,
        incarnations=tuple(i.to_bytes(16, "little") for i in range(count)),
        tenant=TenantId(tenant),
        num_bytes=num_bytes,
    )
    assert decode_identity(encode_identity(identity)) == identity
    header = RecordHeader(FILE_ID, 4096, 1, identity)
    assert decode_header(encode_header(header)) == header


@pytest.mark.parametrize(
    "change",
    [
        {"part": Part(BlockKey(b"short"), 0, 0)},
        {"part": Part(BlockKey(bytes(32)), -1, 0)},
        {"part": Part(BlockKey(bytes(32)), 0, 1 << 32)},
        {"namespace_tag": bytes(9)},
        {"tenant": TenantId("x" * 65)},
        {"layout_fingerprint": b""},
        {"parent": BlockKey(bytes(31))},
        {"block_index": 1 << 32},
        {"incarnations": (bytes(16),) * (MAX_INCARNATIONS + 1)},
        {"incarnations": (bytes(15),)},
        {"num_bytes": 0},
        {"checksum": bytes(8)},
    ],
)
def test_identity_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    """Refused when written, by name, rather than cut short and read as another part's."""
    with pytest.raises(LocalProtocolError, match="record"):
        encode_identity(replace(IDENTITY, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [*range(0, 226, 5), 300, 4095])
def test_any_flipped_bit_of_a_header_is_noticed(at: int) -> None:
    for encode, decode in (
        (encode_header(HEADER), decode_header),
        (encode_file_header(FileHeader(FILE_ID, 9, 4096)), decode_file_header),
    ):
        page = bytearray(encode)
        page[at] ^= 0x10
        with pytest.raises(CorruptBlock):
            decode(page)


def test_without_the_crc_a_flipped_bit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the test above is the CRC: without it a wrong header decodes."""
    page = bytearray(encode_header(HEADER))
    recorded = int.from_bytes(page[12:16], "little")
    page[60] ^= 0x10
    monkeypatch.setattr(records, "_page_crc", lambda _: recorded)
    assert decode_header(page) != HEADER


@pytest.mark.parametrize("length", [0, 100, 4095, 4097])
def test_page_of_another_length_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptBlock):
        decode_header((encode_header(HEADER) + bytes(4096))[:length])


def test_newer_format_is_not_misread() -> None:
    page = bytearray(encode_header(HEADER))
    page[8] = 2
    with pytest.raises(CorruptBlock, match="format 2"):
        decode_header(page)


def test_record_elsewhere_is_refused() -> None:
    """A misdirected write, or what another file left in these blocks, is not this record."""
    page = encode_header(HEADER)
    verify_header(page, FILE_ID, Location(9, 8192), IDENTITY)
    with pytest.raises(CorruptBlock, match="belongs to offset 8192"):
        verify_header(page, FILE_ID, Location(9, 4096), IDENTITY)
    with pytest.raises(CorruptBlock, match="belongs to"):
        verify_header(page, bytes(16), Location(9, 8192), IDENTITY)
    with pytest.raises(CorruptBlock, match="tenant differ"):
        verify_header(
            page, FILE_ID, Location(9, 8192), replace(IDENTITY, tenant=TenantId("t-other"))
        )


def test_payload_is_verified_by_length_and_checksum() -> None:
    identity, payload = make_part(1, 5000)
    verify_payload(payload, identity)
    with pytest.raises(CorruptBlock, match="4999 bytes"):
        verify_payload(payload[:-1], identity)
    payload[4999] ^= 1
    with pytest.raises(CorruptBlock, match="XXH3-128"):
        verify_payload(payload, identity)


@pytest.mark.parametrize(
    ("payload", "record"), [(1, 8192), (4096, 8192), (4097, 12_288), (1 << 20, (1 << 20) + 4096)]
)
def test_record_takes_whole_pages(payload: int, record: int) -> None:
    assert record_bytes(payload) == record
