"""What a segment file consists of: one file header page, then records. Pure: bytes in, bytes out.

A record is one header page and the payload, padded with zeros to the next page; it says by itself what
it is and where it belongs, so an index can be rebuilt from the files alone. Little-endian.

    file header             record header
     0  8 B  "KVFSEG01"      0  8 B  "KVFREC01"
     8  u16  version         8  u16  version
    10  u16  0              10  u16  0
    12  u32  CRC            12  u32  CRC
    16 16 B  file id        16 16 B  file id
    32  u32  file number    32  u64  offset of this page in the file
    36  u32  1: encrypted   40  u64  sequence
    40  u64  file bytes     48       identity

    identity
     0 32 B  block key           96 32 B  parent block key
    32  u32  KV group           128  u32  block index
    36  u32  shard              132  u16  bytes of the tenant's id
    40  u64  payload bytes      134  u16  incarnations
    48 16 B  XXH3-128           136  8 B  namespace tag
    64 32 B  layout fingerprint 144       tenant's id, then incarnations of 16 B

In a file of encrypted records the last 16 bytes of a record's header page are the tag of its payload, and
its checksum is zero; see `record_cipher`.

The CRC is CRC-32 (zlib) of the page with the CRC field zero. The file id is random and never used again:
a record that another file, or a file's former life, left behind never passes for one of this file.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvfabric.errors import CorruptBlock, LocalProtocolError
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.types import BlockKey, Part, TenantId

PAGE_BYTES = 4096
FORMAT_VERSION = 1
FILE_ID_BYTES = 16
MAX_TENANT_BYTES = 64
INCARNATION_BYTES = 16
TAG_BYTES = 16
NO_CHECKSUM = bytes(16)
"""Of an encrypted record: the tag says more."""

_FILE_MAGIC = b"KVFSEG01"
_RECORD_MAGIC = b"KVFREC01"
_PREFIX = struct.Struct("<8sHHI")
_FILE = struct.Struct("<16sIIQ")
_RECORD = struct.Struct("<16sQQ")
_IDENTITY = struct.Struct("<32sIIQ16s32s32sIHH8s")
_CRC_AT = 12
_IDENTITY_AT = _PREFIX.size + _RECORD.size

_AT = {
    "magic": (0, "V8"),
    "version": (8, "<u2"),
    "crc": (12, "<u4"),
    "file_id": (16, "V16"),
    "offset": (32, "<u8"),
    "sequence": (40, "<u8"),
    "key": (48, "V32"),
    "group": (80, "<u4"),
    "shard": (84, "<u4"),
    "num_bytes": (88, "<u8"),
    "checksum": (96, "V16"),
    "layout": (112, "V32"),
    "parent": (144, "V32"),
    "block_index": (176, "<u4"),
    "tenant_bytes": (180, "<u2"),
    "incarnations": (182, "<u2"),
}
HEADER_PAGE = np.dtype(
    {
        "names": list(_AT),
        "offsets": [at for at, _ in _AT.values()],
        "formats": [kind for _, kind in _AT.values()],
        "itemsize": PAGE_BYTES,
    }
)
"""A record's header page as an element of a vector."""

HeaderPages = npt.NDArray[Any]

MAX_INCARNATIONS = (
    PAGE_BYTES - _IDENTITY_AT - _IDENTITY.size - MAX_TENANT_BYTES - TAG_BYTES
) // INCARNATION_BYTES
"""Segments of a prompt that a record can name."""


class FileHeader(NamedTuple):
    file_id: bytes
    number: int
    num_bytes: int
    """Length of the whole file."""
    is_encrypted: bool = False


class RecordHeader(NamedTuple):
    file_id: bytes
    offset: int
    sequence: int
    identity: PartIdentity
    tag: bytes = bytes(TAG_BYTES)


def record_bytes(payload_bytes: int) -> int:
    """What a record of so many payload bytes takes: header page and padding included."""
    return PAGE_BYTES + -(-payload_bytes // PAGE_BYTES) * PAGE_BYTES


def encode_identity(identity: PartIdentity) -> bytes:
    """Raises LocalProtocolError if a field does not fit."""
    tenant = identity.tenant.encode()
    _require(len(tenant) <= MAX_TENANT_BYTES, "tenant id", len(tenant))
    _require(
        len(identity.incarnations) <= MAX_INCARNATIONS, "incarnations", len(identity.incarnations)
    )
    _require(
        all(len(i) == INCARNATION_BYTES for i in identity.incarnations),
        "incarnation lengths",
        [len(i) for i in identity.incarnations],
    )
    for name, value, length in (
        ("block key", identity.part.key, 32),
        ("layout fingerprint", identity.layout_fingerprint, 32),
        ("parent", identity.parent, 32),
        ("namespace tag", identity.namespace_tag, 8),
        ("checksum", identity.checksum, 16),
    ):
        _require(len(value) == length, name, len(value))
    _require(identity.num_bytes > 0, "payload length", identity.num_bytes)
    try:
        fixed = _IDENTITY.pack(
            identity.part.key,
            identity.part.group,
            identity.part.shard,
            identity.num_bytes,
            identity.checksum,
            identity.layout_fingerprint,
            identity.parent,
            identity.block_index,
            len(tenant),
            len(identity.incarnations),
            identity.namespace_tag,
        )
    except struct.error as exc:
        raise LocalProtocolError(f"identity of a record out of range: {exc}") from exc
    return fixed + tenant + b"".join(identity.incarnations)


def _require(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise LocalProtocolError(f"{what} of a record out of bounds: {got}")


def decode_identity(data: bytes | memoryview) -> PartIdentity:
    """Reads as much of `data` as belongs to the identity. Raises CorruptBlock."""
    if len(data) < _IDENTITY.size:
        raise CorruptBlock(f"identity of {len(data)} bytes")
    fields = _IDENTITY.unpack_from(data)
    key, group, shard, num_bytes, checksum, layout, parent, index, tenant, count, tag = fields
    end = _IDENTITY.size + tenant
    if tenant > MAX_TENANT_BYTES or len(data) < end + count * INCARNATION_BYTES:
        raise CorruptBlock(f"identity with a tenant of {tenant} bytes and {count} incarnations")
    if not num_bytes or count > MAX_INCARNATIONS:
        raise CorruptBlock(f"identity of {num_bytes} payload bytes and {count} incarnations")
    try:
        tenant_id = TenantId(bytes(data[_IDENTITY.size : end]).decode())
    except UnicodeDecodeError as exc:
        raise CorruptBlock("identity with an undecodable tenant") from exc
    return PartIdentity(
        part=Part(BlockKey(key), group, shard),
        namespace_tag=tag,
        tenant=tenant_id,
        layout_fingerprint=layout,
        parent=BlockKey(parent),
        block_index=index,
        incarnations=tuple(
            bytes(data[at : at + INCARNATION_BYTES])
            for at in range(end, end + count * INCARNATION_BYTES, INCARNATION_BYTES)
        ),
        num_bytes=num_bytes,
        checksum=checksum,
    )


def encode_file_header(header: FileHeader) -> bytes:
    """One page."""
    return _page(
        _FILE_MAGIC,
        _FILE.pack(header.file_id, header.number, header.is_encrypted, header.num_bytes),
    )


def decode_file_header(page: bytes | bytearray | memoryview) -> FileHeader:
    """Raises CorruptBlock."""
    _check_page(page, _FILE_MAGIC)
    file_id, number, flags, num_bytes = _FILE.unpack_from(page, _PREFIX.size)
    if flags > 1:
        raise CorruptBlock(f"file header with unknown flags {flags:x}")
    return FileHeader(file_id, number, num_bytes, is_encrypted=bool(flags))


def encode_header(header: RecordHeader) -> bytes:
    """One page. Raises LocalProtocolError if a field does not fit."""
    return _page(_RECORD_MAGIC, associated_data(header), header.tag)


def associated_data(header: RecordHeader) -> bytes:
    """Where a record lies and whose it is: all of its header but the tag. Raises LocalProtocolError."""
    place = _RECORD.pack(header.file_id, header.offset, header.sequence)
    return place + encode_identity(header.identity)


def decode_header(page: bytes | bytearray | memoryview) -> RecordHeader:
    """Raises CorruptBlock. What it returns is intact, not yet what anybody asked for."""
    _check_page(page, _RECORD_MAGIC)
    file_id, offset, sequence = _RECORD.unpack_from(page, _PREFIX.size)
    identity = decode_identity(memoryview(page)[_IDENTITY_AT : PAGE_BYTES - TAG_BYTES])
    return RecordHeader(file_id, offset, sequence, identity, bytes(page[-TAG_BYTES:]))


def num_intact(pages: HeaderPages) -> int:
    """How many header pages of a vector are intact, from the first on; `decode_header` may yet refuse one."""
    raw = _raw(pages)
    good = (pages["magic"] == np.void(_RECORD_MAGIC)) & (pages["version"] == FORMAT_VERSION)
    likely = len(pages) if good.all() else int(np.argmin(good))
    for at in range(likely):
        if _page_crc(raw[at].data) != pages["crc"][at]:
            return at
    return likely


def lineage_words(pages: HeaderPages) -> npt.NDArray[np.uint8]:
    """(pages, bytes): what of an identity says who owns a part and what it was made of, and nothing else."""
    raw = _raw(pages)
    counts = pages["incarnations"].astype(np.int64)
    most = pages["tenant_bytes"] + counts * INCARNATION_BYTES
    lengths_at = _AT["tenant_bytes"][0]
    end = min(PAGE_BYTES, _IDENTITY_AT + _IDENTITY.size + int(most.max()))
    layout_at, layout_bytes = _AT["layout"][0], 32
    layouts = raw[:, layout_at : layout_at + layout_bytes]
    return np.concatenate([layouts, raw[:, lengths_at:end]], axis=1)


def _raw(pages: HeaderPages) -> npt.NDArray[np.uint8]:
    return pages.view(np.uint8).reshape(len(pages), PAGE_BYTES)


def page_of(pages: HeaderPages, at: int) -> memoryview:
    """One of a vector, for `decode_header`."""
    page: memoryview = _raw(pages)[at].data
    return page


def _page(magic: bytes, body: bytes, tag: bytes = b"") -> bytes:
    page = bytearray(PAGE_BYTES)
    page[PAGE_BYTES - len(tag) :] = tag
    _PREFIX.pack_into(page, 0, magic, FORMAT_VERSION, 0, 0)
    page[_PREFIX.size : _PREFIX.size + len(body)] = body
    struct.pack_into("<I", page, _CRC_AT, _page_crc(page))
    return bytes(page)


def _page_crc(page: bytes | bytearray | memoryview) -> int:
    """Of the page with the CRC field zero."""
    with_zero = zlib.crc32(bytes(4), zlib.crc32(page[:_CRC_AT]))
    return zlib.crc32(memoryview(page)[_CRC_AT + 4 :], with_zero)


def _check_page(page: bytes | bytearray | memoryview, magic: bytes) -> None:
    if len(page) != PAGE_BYTES:
        raise CorruptBlock(f"header page of {len(page)} bytes")
    found, version, _, crc = _PREFIX.unpack_from(page)
    if found != magic:
        raise CorruptBlock(f"no header here: starts with {found.hex()}, not {magic.hex()}")
    if version != FORMAT_VERSION:
        raise CorruptBlock(f"header of format {version}; this release reads {FORMAT_VERSION}")
    actual = _page_crc(page)
    if actual != crc:
        raise CorruptBlock(f"header CRC {actual:08x}, recorded {crc:08x}")


def verify_header(
    page: bytes | bytearray | memoryview, file_id: bytes, location: Location, identity: PartIdentity
) -> RecordHeader:
    """Raises CorruptBlock unless `page` is the intact header of exactly this part at this place."""
    header = decode_header(page)
    if header.file_id != file_id or header.offset != location.offset:
        raise CorruptBlock(
            f"record belongs to offset {header.offset} of file {header.file_id.hex()}, "
            f"found at offset {location.offset} of {file_id.hex()}"
        )
    if header.identity != identity:
        differing = [
            name
            for name in PartIdentity.__slots__
            if getattr(header.identity, name) != getattr(identity, name)
        ]
        raise CorruptBlock(
            f"record at {location} is of another part: {', '.join(differing)} differ"
        )
    return header


def verify_payload(payload: memoryview, identity: PartIdentity) -> None:
    """Raises CorruptBlock unless `payload` has the identity's length and checksum."""
    actual = xxhash.xxh3_128_digest(payload)
    if len(payload) != identity.num_bytes or actual != identity.checksum:
        raise CorruptBlock(
            f"{len(payload)} bytes with XXH3-128 {actual.hex()}; "
            f"recorded {identity.num_bytes} with {identity.checksum.hex()}"
        )
