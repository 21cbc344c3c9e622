"""Records that are worth more than their segment, and records at rest: what reclaim saves, what scrubbing
checks. Decisions are pure; reading is blocking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import Flags, PartIdentity, RecordBatch, Rows
from kvfabric.tiers.records import PAGE_BYTES, verify_payload
from kvfabric.tiers.segment_file import SegmentFile

RESCUED_SHARE = 0.5
"""Of a segment, at most: so each reclaim gives back at least as much as it writes anew."""
_SLICE_BYTES = 8 << 20
_SLICE_RECORDS = 256


class Found(NamedTuple):
    """What reading a slice of records came to; places by their index in the batch."""

    intact: list[tuple[int, PartIdentity, memoryview]]
    corrupt: list[int]
    unreadable: list[int]


def sizes_of(batch: RecordBatch) -> Rows:
    """Bytes that each record takes."""
    payload = batch.rows["num_bytes"].astype(np.int64)
    sizes: Rows = PAGE_BYTES + -(-payload // PAGE_BYTES) * PAGE_BYTES
    return sizes


def to_rescue(batch: RecordBatch, hot: Flags, most: int) -> RecordBatch:
    """The hot ones, up to `most` bytes. Pure."""
    chosen = batch.chosen(hot)
    count = int(np.searchsorted(np.cumsum(sizes_of(chosen)), most, side="right"))
    return chosen.chosen(slice(count))


def slices_of(batch: RecordBatch, most_bytes: int = _SLICE_BYTES) -> Iterator[RecordBatch]:
    """One piece of work of a pool's thread each. Pure."""
    starts = np.cumsum(sizes_of(batch)) - sizes_of(batch)
    first = 0
    while first < len(batch):
        end = int(np.searchsorted(starts, starts[first] + most_bytes, side="left"))
        end = max(first + 1, min(end, first + _SLICE_RECORDS))
        yield batch.chosen(slice(first, end))
        first = end


def read_slice(
    file: SegmentFile,
    batch: RecordBatch,
    verify: Callable[[memoryview, PartIdentity], None] = verify_payload,
) -> Found:
    """Payloads of all records that verify, in memory of their own. Blocking."""
    found = Found([], [], [])
    for at in range(len(batch)):
        identity, offset = batch.identity(at), batch.location(at).offset
        buffer = direct_io.aligned_buffer(identity.num_bytes)
        try:
            payload = file.read(offset, identity, buffer)
            if not file.header.is_encrypted:
                verify(payload, identity)
        except CorruptBlock:
            found.corrupt.append(at)
        except TransferError as exc:
            direct_io.raise_if_exhausted(exc)
            found.unreadable.append(at)
        else:
            found.intact.append((at, identity, payload))
    return found


def check_slice(file: SegmentFile, batch: RecordBatch) -> Found:
    """As `read_slice`, from the medium itself and keeping nothing. Blocking."""
    found = Found([], [], [])
    for at in range(len(batch)):
        try:
            file.verify(batch.location(at).offset, batch.identity(at))
        except CorruptBlock:
            found.corrupt.append(at)
        except TransferError as exc:
            direct_io.raise_if_exhausted(exc)
            found.unreadable.append(at)
    return found


class ScrubCursor:
    """Where the round of a scrubber is. Files are visited by number; new ones wait for the next round."""

    def __init__(self) -> None:
        self._file = 0
        self._after = -1

    def next_file(self, numbers: list[int]) -> int | None:
        """The file to go on with, out of those there are; None at the end of the round."""
        ahead = [number for number in numbers if number >= self._file]
        if not ahead:
            self._file, self._after = 0, -1
            return None
        if ahead[0] != self._file:
            self._file, self._after = ahead[0], -1
        return self._file

    def next_records(self, live: RecordBatch, num_bytes: int) -> RecordBatch:
        """Of the file's live records the next, of about so many bytes; none when it is done."""
        rest = live.chosen(live.rows["offset"].astype(np.int64) > self._after)
        if not len(rest):
            self._file, self._after = self._file + 1, -1
            return rest
        count = 1 + int(np.searchsorted(np.cumsum(sizes_of(rest)), num_bytes, side="left"))
        chosen = rest.chosen(slice(count))
        self._after = chosen.location(len(chosen) - 1).offset
        return chosen
