"""What an SSD directory holds when a daemon opens it. Blocking; runs once, before anything else.

With a sound index: the files it names; the rest is removed. Without: every file is scanned, and the index
made anew from the records that are found.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.tiers.base import Location
from kvfabric.tiers.records import PAGE_BYTES, RecordHeader
from kvfabric.tiers.segment_accounts import Segment
from kvfabric.tiers.segment_file import SegmentFile, numbers_in, path_of
from kvfabric.tiers.segment_index import Put, SegmentIndex

_LOG = logging.getLogger(__name__)
_BATCH = 1024
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Recovered:
    """`active`: the segment to fill further, if any; `spare`: an empty one, if any."""

    index: SegmentIndex
    segments: dict[int, Segment]
    active: Segment | None
    spare: Segment | None


def recover(directory: Path, capacity_bytes: int, *, direct: bool) -> Recovered:
    """Raises NoSpace or TransferError, and then holds nothing open."""
    # Sparse, so generous: half of the capacity is enough for the largest entries of the smallest records.
    map_bytes = (64 << 20) + capacity_bytes // 2
    segments: dict[int, Segment] = {}
    index = SegmentIndex.open(directory, map_bytes)
    is_rebuilt = index is None
    try:
        if index is None:
            index = SegmentIndex.create(directory, map_bytes)
            _rebuild(directory, index, segments, direct=direct)
        else:
            _load(directory, index, segments, direct=direct)
        for extent in index.extents():
            segments[extent.location.file].enter(extent)
        _give_up(_excess(segments, capacity_bytes, is_rebuilt=is_rebuilt), index, segments)
    except BaseException:
        for segment in segments.values():
            segment.file.retire()
        if index is not None:
            index.close()
        raise
    filled = [segment for segment in segments.values() if segment.tail > PAGE_BYTES]
    empty = [segment for segment in segments.values() if segment.tail == PAGE_BYTES]
    # After a rebuild no old file is filled further: behind the last record that was found there may be
    # others, that were not, with sequences that this opening uses again.
    active = filled[-1] if filled and not is_rebuilt else None
    return Recovered(index, segments, active, empty[0] if empty else None)


def _load(
    directory: Path, index: SegmentIndex, segments: dict[int, Segment], *, direct: bool
) -> None:
    """Open the files that the index knows; forget the ones that are missing."""
    on_disk = set(numbers_in(directory))
    for header in index.segments():
        try:
            segments[header.number] = Segment(SegmentFile.open(directory, header, direct=direct))
            on_disk.remove(header.number)
        except TransferError as exc:
            _raise_if_ours(exc)
            parts = index.drop_segment(header.number)
            _LOG.warning("segment %08x is lost with %d parts: %s", header.number, len(parts), exc)
    for number in on_disk:  # being made or reclaimed when the process died: nothing in it counts
        _remove(directory, number)


def _raise_if_ours(error: TransferError) -> None:
    """Raise again what says nothing about the file: that this process or machine has no more to give."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
        raise error


def _rebuild(
    directory: Path, index: SegmentIndex, segments: dict[int, Segment], *, direct: bool
) -> None:
    """Fill an empty index from the files themselves."""
    numbers = numbers_in(directory)
    if numbers:
        _LOG.warning("no sound index in %s: reading %d files", directory, len(numbers))
    last = 0
    for number in numbers:
        try:
            file = SegmentFile.open_by_itself(directory, number, direct=direct)
        except (CorruptBlock, TransferError) as exc:
            if isinstance(exc, TransferError):
                _raise_if_ours(exc)
            _LOG.warning("removing segment %08x: %s", number, exc)
            _remove(directory, number)
            continue
        segments[number] = Segment(file)
        index.add_segment(file.header)
        records = (
            Put(Location(number, header.offset), header.sequence, header.identity)
            for header in _readable(file)
        )
        while batch := list(islice(records, _BATCH)):
            index.apply(batch)
            last = max(last, batch[-1].sequence)
    index.raise_sequence(last)
    index.trust()


def _readable(file: SegmentFile) -> Iterator[RecordHeader]:
    """The records up to the first place where the disk fails."""
    try:
        yield from file.scan()
    except TransferError as exc:
        _raise_if_ours(exc)
        _LOG.warning("reading no further: %s", exc)


def _excess(
    segments: dict[int, Segment], capacity_bytes: int, *, is_rebuilt: bool
) -> list[Segment]:
    """What must go: empty files but one spare, then the oldest if the capacity shrank."""
    filled = [segment for segment in segments.values() if segment.tail > PAGE_BYTES]
    empty = [segment for segment in segments.values() if segment.tail == PAGE_BYTES]
    excess, spare = (empty, []) if is_rebuilt else (empty[1:], empty[:1])
    while sum(segment.file.header.num_bytes for segment in filled + spare) > capacity_bytes:
        excess.append(filled.pop(0) if filled else spare.pop())
    return excess


def _give_up(excess: list[Segment], index: SegmentIndex, segments: dict[int, Segment]) -> None:
    for segment in excess:
        number = segment.file.header.number
        index.drop_segment(number)
        segment.file.unlink()
        segment.file.retire()
        del segments[number]


def _remove(directory: Path, number: int) -> None:
    path = path_of(directory, number)
    try:
        path.unlink()
    except OSError as exc:  # it costs room on the disk and its number, nothing else
        _LOG.warning("cannot remove %s: %s", path, exc.strerror)
