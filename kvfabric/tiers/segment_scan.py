"""What a segment file holds, by the headers of its records alone. Blocking.

A record's header says where the next one is. Those of one layout have one length, so the next headers are
read on the guess that it stays the same, twice as many each time that it did; they are parsed as one vector.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import ROW, Lineage, Rows
from kvfabric.tiers.records import (
    HEADER_PAGE,
    PAGE_BYTES,
    HeaderPages,
    decode_header,
    lineage_words,
    num_intact,
    page_of,
)
from kvfabric.tiers.segment_file import SegmentFile

_LOG = logging.getLogger(__name__)
_AHEAD = 256
"""Headers read on a guess, at most."""
_SAME = [
    "offset",
    "sequence",
    "num_bytes",
    "group",
    "shard",
    "block_index",
    "key",
    "parent",
    "checksum",
]


class Scanned(NamedTuple):
    """`rows` of `ROW`, all live and without their check; their lineage is a place in `lineages`."""

    rows: Rows
    lineages: list[Lineage]


def scan(file: SegmentFile) -> Scanned:
    """The records up to the first page that is not one, or that the disk fails to read."""
    numbers: dict[Lineage, int] = {}
    found = [np.zeros(0, ROW)]
    try:
        for pages in chained(file):
            rows, is_whole = _rows_of(pages, numbers)
            found.append(rows)
            if not is_whole:
                break
    except TransferError as exc:
        direct_io.raise_if_exhausted(exc)
        _LOG.warning("reading no further: %s", exc)
    # Else the byte order of `offset` would become the machine's.
    return Scanned(np.concatenate(found, dtype=ROW), list(numbers))


def chained(file: SegmentFile) -> Iterator[HeaderPages]:
    """Intact headers from the first record on, some at a time; good until the next are asked for.

    Sequences must rise: what an abandoned write left behind the last record has an older one.
    """
    into = direct_io.aligned_buffer(_AHEAD * PAGE_BYTES)
    views = [into[at : at + PAGE_BYTES] for at in range(0, len(into), PAGE_BYTES)]
    offset, sequence, stride, ahead = PAGE_BYTES, -1, 2 * PAGE_BYTES, 1
    while offset < file.header.num_bytes:
        places = range(offset, file.header.num_bytes, stride)[:ahead]
        got = file.read_pages(places, views)
        if not got:
            return
        pages = np.frombuffer(into, HEADER_PAGE)[:got]
        ends = _ends(pages, file)
        count = _num_chained(pages, ends, np.array(places[:got], np.int64), file, sequence)
        if not count:
            return
        yield pages[:count]
        offset, sequence = int(ends[count - 1]), int(pages["sequence"][count - 1])
        stride, last = offset - int(pages["offset"][count - 1]), stride
        ahead = min(2 * count, _AHEAD) if count == got and stride == last else max(2, count)


def _ends(pages: HeaderPages, file: SegmentFile) -> Rows:
    """Where each record ends; 0 for one that is longer than the file."""
    payload = np.minimum(pages["num_bytes"], file.header.num_bytes).astype(np.int64)
    offsets = np.minimum(pages["offset"], file.header.num_bytes).astype(np.int64)
    ends: Rows = offsets + PAGE_BYTES + -(-payload // PAGE_BYTES) * PAGE_BYTES
    return np.where(ends <= file.header.num_bytes, ends, 0)


def _num_chained(
    pages: HeaderPages, ends: Rows, places: Rows, file: SegmentFile, sequence: int
) -> int:
    """How many are the header that belongs at its place, each right behind the record before it."""
    good = (pages["offset"] == places) & (pages["file_id"] == np.void(file.header.file_id))
    good &= ends > 0
    good[1:] &= (ends[:-1] == places[1:]) & (pages["sequence"][1:] > pages["sequence"][:-1])
    good[0] &= int(pages["sequence"][0]) > sequence
    count = len(good) if good.all() else int(np.argmin(good))
    return num_intact(pages[:count])


def _rows_of(pages: HeaderPages, numbers: dict[Lineage, int]) -> tuple[Rows, bool]:
    """The rows up to the first header that cannot be decoded, and whether that is all of them."""
    words = np.ascontiguousarray(lineage_words(pages))
    packed = words.view(f"V{words.shape[1]}").reshape(-1)
    places, own = np.zeros(1, np.int64), np.zeros(len(pages), np.int64)
    if not (packed == packed[0]).all():
        _, places, own = np.unique(packed, return_index=True, return_inverse=True)
    lineages = np.zeros(len(places), np.uint32)
    good = pages["num_bytes"] > 0
    for number, place in enumerate(places.tolist()):
        try:
            one = decode_header(page_of(pages, place)).identity
        except CorruptBlock:
            good &= own != number
            continue
        lineage = Lineage(one.tenant, one.namespace_tag, one.layout_fingerprint, one.incarnations)
        lineages[number] = numbers.setdefault(lineage, len(numbers))
    count = len(good) if good.all() else int(np.argmin(good))
    rows = np.zeros(count, ROW)
    for name in _SAME:
        rows[name] = pages[name][:count]
    rows["lineage"] = lineages[own[:count]]
    rows["is_live"] = 1
    return rows, count == len(pages)
