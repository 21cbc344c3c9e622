"""What a file holds by its headers, read many at a time, against reading them one by one."""

from __future__ import annotations

import os
import random
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.testing.tiers import make_part
from kvfabric.tiers.base import Lineage, PartIdentity, RecordBatch
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import (
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    decode_header,
    encode_header,
    record_bytes,
)
from kvfabric.tiers.segment_file import SegmentFile, path_of
from kvfabric.tiers.segment_scan import scan
from kvfabric.types import TenantId

FILE_BYTES = 4 << 20


class Bad(FileOps):
    """Reads at some offsets fail."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def preadv(self, fd: int, buffers: object, offset: int) -> int:
        if offset in self.bad:
            raise OSError(5, os.strerror(5))
        return super().preadv(fd, buffers, offset)  # type: ignore[arg-type]


def identities(rng: random.Random, sizes: list[int]) -> list[PartIdentity]:
    """Of these payload sizes, under a few lineages."""
    made, first = [], make_part(0, 64)[0]
    for number, num_bytes in enumerate(sizes):
        part = make_part(number, 64)[0].part
        identity = replace(first, part=part, num_bytes=num_bytes, block_index=number)
        if rng.random() < 0.3:
            identity = replace(identity, tenant=TenantId("t" * rng.randint(1, 64)))
        if rng.random() < 0.3:
            names = tuple(rng.randbytes(16) for _ in range(rng.randint(1, 3)))
            identity = replace(identity, incarnations=names)
        made.append(identity)
    return made


def make_file(directory: Path, records: list[PartIdentity], ops: FileOps) -> SegmentFile:
    """Headers alone, with something else between them."""
    header = FileHeader(secrets.token_bytes(16), 1, FILE_BYTES)
    content, offset = bytearray(os.urandom(FILE_BYTES)), PAGE_BYTES
    for sequence, identity in enumerate(records):
        page = encode_header(RecordHeader(header.file_id, offset, sequence, identity))
        content[offset : offset + PAGE_BYTES] = page
        offset += record_bytes(identity.num_bytes)
    directory.mkdir(exist_ok=True)
    path_of(directory, 1).write_bytes(content)
    return SegmentFile.open(ops, directory, header)


def one_by_one(file: SegmentFile) -> list[tuple[int, int, PartIdentity]]:
    """Offset, sequence and identity of each record, read as simply as can be."""
    raw, found, offset, sequence = file.path.read_bytes(), [], PAGE_BYTES, -1
    while offset < FILE_BYTES:
        try:
            header = decode_header(raw[offset : offset + PAGE_BYTES])
        except CorruptBlock:
            break
        end = offset + record_bytes(header.identity.num_bytes)
        place = (header.file_id, header.offset)
        if place != (file.header.file_id, offset) or header.sequence <= sequence:
            break
        if end > FILE_BYTES:
            break
        found.append((offset, header.sequence, header.identity))
        offset, sequence = end, header.sequence
    return found


def scanned(file: SegmentFile) -> list[tuple[int, int, PartIdentity]]:
    rows, lineages = scan(file)
    batch = RecordBatch(1, rows, dict(enumerate(lineages)))
    return [
        (batch.location(at).offset, int(batch.rows["sequence"][at]), batch.identity(at))
        for at in range(len(batch))
    ]


def sizes_of(rng: random.Random) -> list[int]:
    """Mostly runs of one size."""
    sizes: list[int] = []
    while len(sizes) < 40:
        sizes += [rng.randint(1, 30_000)] * rng.choice((1, 1, 2, 12))
    return sizes


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_reading_one_by_one_finds(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    records = identities(rng, sizes_of(rng))
    file = make_file(tmp_path, records, FileOps())
    whole = one_by_one(file)
    assert [identity for *_, identity in whole] == records
    assert scanned(file) == whole
    with file.path.open("r+b") as spoilt:  # any byte of any header
        offset = rng.choice(whole)[0] + rng.randrange(PAGE_BYTES)
        spoilt.seek(offset)
        [byte] = spoilt.read(1)
        spoilt.seek(offset)
        spoilt.write(bytes([byte ^ 1 << rng.randrange(8)]))
    assert scanned(file) == one_by_one(file)
    assert len(scanned(file)) < len(whole)
    os.truncate(file.path, rng.randrange(FILE_BYTES))
    assert scanned(file) == one_by_one(file)
    file.retire()


def test_an_older_sequence_ends_it(tmp_path: Path) -> None:
    records = identities(random.Random(0), [5000] * 20)
    file = make_file(tmp_path, records, FileOps())
    offset = PAGE_BYTES + 9 * record_bytes(5000)
    for sequence, count in ((8, 9), (7, 9), (1 << 63, 10)):
        page = encode_header(RecordHeader(file.header.file_id, offset, sequence, records[9]))
        with file.path.open("r+b") as changed:
            changed.seek(offset)
            changed.write(page)
        assert len(scanned(file)) == count
    file.retire()


def test_only_a_header_that_cannot_be_read_ends_it(tmp_path: Path) -> None:
    """Reading ahead may come upon a bad place that holds no header: that is nobody's loss."""
    sizes = [5000] * 20 + [20_000] * 20
    records = identities(random.Random(0), sizes)
    second = PAGE_BYTES + 20 * record_bytes(5000)
    payload, header = second + record_bytes(5000), second + 3 * record_bytes(20_000)
    file = make_file(tmp_path, records, Bad(payload))
    assert len(scanned(file)) == 40
    file.retire()
    file = make_file(tmp_path, records, Bad(header))
    assert len(scanned(file)) == 23
    file.retire()
    file = make_file(tmp_path, records, Bad(PAGE_BYTES))
    assert scanned(file) == []
    with pytest.raises(TransferError):
        file.read_pages([PAGE_BYTES], [memoryview(bytearray(PAGE_BYTES))])
    file.retire()


def test_a_lineage_is_named_once(tmp_path: Path) -> None:
    records = [
        replace(one, tenant=TenantId("a"), incarnations=())
        for one in identities(random.Random(1), [9] * 8)
    ]
    file = make_file(tmp_path, records, FileOps())
    one = records[0]
    assert scan(file).lineages == [
        Lineage(TenantId("a"), one.namespace_tag, one.layout_fingerprint, ())
    ]
    file.retire()
