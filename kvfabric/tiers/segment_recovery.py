"""What an SSD directory holds when a daemon opens it. Blocking; runs once, before anything else.

With a sound index: the files it names; the rest is removed. Without: the headers of every file are read, by
several threads since that is many small reads, and the index is made anew from the records that are found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import RecordBatch
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import PAGE_BYTES
from kvfabric.tiers.segment_accounts import Segment
from kvfabric.tiers.segment_file import SegmentFile, numbers_in, path_of
from kvfabric.tiers.segment_index import SegmentIndex, live_of
from kvfabric.tiers.segment_scan import Scanned, scan

_LOG = logging.getLogger(__name__)
_SCANS = 16
"""Files whose headers are read side by side, since each is read one page after the other."""
KEPT_BYTES = 256 << 20
"""Of rows that are kept for whoever opens: of two million records."""
_COMMITTED = 64
"""Files that go into the index in one transaction."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """`active`: the segment to fill further, if any; `spare`: an empty one, if any. `is_rebuilt`: files were
    there, and no sound index. `unavailable`: bytes by number of files that the disk did not open: whatever is
    in them is there again at another opening, perhaps. `live`: what is live in each file, of the first files
    as far as it fits `KEPT_BYTES`, so that whoever opens needs not read it again."""

    index: SegmentIndex
    segments: dict[int, Segment]
    active: Segment | None
    spare: Segment | None
    is_rebuilt: bool
    unavailable: dict[int, int]
    live: dict[int, RecordBatch]


class _Kept:
    """`Recovered.live` in the making."""

    def __init__(self) -> None:
        self.batches: dict[int, RecordBatch] = {}
        self._left = KEPT_BYTES

    def add(self, batch: RecordBatch) -> None:
        self._left -= batch.rows.nbytes
        if self._left >= 0:
            self.batches[batch.file] = live_of(batch)


def recover(
    directory: Path, capacity_bytes: int, ops: FileOps, cipher: RecordCipher | None = None
) -> Recovered:
    """Files of the other kind, plain or encrypted, are removed: nobody may find plain ones there who asked
    for encryption. Raises NoSpace or TransferError, and then holds nothing open."""
    # Sparse, so generous: a row takes 136 bytes of the at least 8 KiB that its record has.
    map_bytes = (64 << 20) + capacity_bytes // 8
    segments: dict[int, Segment] = {}
    unavailable: dict[int, int] = {}
    kept = _Kept()
    index = SegmentIndex.open(directory, map_bytes, ops)
    is_rebuilt = index is None
    try:
        if index is not None:
            try:
                unavailable = _load(directory, index, segments, ops, cipher, kept)
            except CorruptBlock as exc:
                _LOG.warning("index in %s: %s", directory, exc)
                _close(index, segments)
                index, is_rebuilt, unavailable, kept = None, True, {}, _Kept()
        if index is None:
            index = SegmentIndex.create(directory, map_bytes, ops)
            _rebuild(directory, index, segments, ops, cipher, kept)
        index.trust()
        others = [
            segment
            for segment in segments.values()
            if segment.file.header.is_encrypted != (cipher is not None)
        ]
        if others:
            _LOG.warning("ssd_encryption changed: %d files of %s go", len(others), directory)
        _give_up(others, index, segments)
        _give_up(_excess(segments, capacity_bytes, is_rebuilt=is_rebuilt), index, segments)
    except BaseException:
        _close(index, segments)
        raise
    filled = [segment for segment in segments.values() if segment.tail > PAGE_BYTES]
    empty = [segment for segment in segments.values() if segment.tail == PAGE_BYTES]
    # After a rebuild no old file is filled further: behind the last record that was found there may be
    # others, that were not, with sequences that this opening uses again.
    active = filled[-1] if filled and not is_rebuilt else None
    spare = empty[0] if empty else None
    return Recovered(
        index,
        segments,
        active,
        spare,
        is_rebuilt and bool(filled),
        unavailable,
        live={number: batch for number, batch in kept.batches.items() if number in segments},
    )


def _close(index: SegmentIndex | None, segments: dict[int, Segment]) -> None:
    for segment in segments.values():
        segment.file.retire()
    segments.clear()
    if index is not None:
        index.close()


def _load(
    directory: Path,
    index: SegmentIndex,
    segments: dict[int, Segment],
    ops: FileOps,
    cipher: RecordCipher | None,
    kept: _Kept,
) -> dict[int, int]:
    """Open the files that the index knows, and read all of it; forget the ones that are missing. Returns
    the bytes of those that do not open."""
    on_disk = set(numbers_in(ops, directory))
    used: set[int] = set()
    unavailable: dict[int, int] = {}
    for header in index.segments():
        number = header.number
        try:
            segment = Segment(SegmentFile.open(ops, directory, header, cipher))
        except TransferError as exc:
            direct_io.raise_if_exhausted(exc)
            on_disk.discard(number)
            if direct_io.is_gone(exc):
                parts = index.drop_segment(number)
                _LOG.warning("segment %08x is lost with %d parts: %s", number, len(parts), exc)
            else:
                _LOG.warning("segment %08x is left alone: %s", number, exc)
                used |= index.batch(number).used_lineages()
                unavailable[number] = header.num_bytes
            continue
        segments[number] = segment
        on_disk.discard(number)
        batch = index.batch(number)
        segment.load(batch)
        kept.add(batch)
        used |= batch.used_lineages()
    index.keep_lineages(used)
    for number in on_disk:  # being made or reclaimed when the process died: nothing in it counts
        _remove(directory, number, ops)
    return unavailable


def _rebuild(
    directory: Path,
    index: SegmentIndex,
    segments: dict[int, Segment],
    ops: FileOps,
    cipher: RecordCipher | None,
    kept: _Kept,
) -> None:
    """Fill an empty index from the files themselves."""
    numbers = numbers_in(ops, directory)
    if numbers:
        _LOG.warning("no sound index in %s: reading %d files", directory, len(numbers))
    for number in numbers:
        try:
            file = SegmentFile.open_by_itself(ops, directory, number, cipher)
        except (CorruptBlock, TransferError) as exc:
            if isinstance(exc, TransferError) and not direct_io.is_gone(exc):
                raise  # not now; what is in it must not be lost by it
            _LOG.warning("removing segment %08x: %s", number, exc)
            _remove(directory, number, ops)
            continue
        segments[number] = Segment(file)
        index.add_segment(file.header)
    batches = [
        index.adopted(segment.file.header.number, found.rows, found.lineages)
        for segment, found in zip(segments.values(), _scanned(segments.values()), strict=True)
    ]
    bury_older(batches)
    for first in range(0, len(batches), _COMMITTED):
        index.load_rows(batches[first : first + _COMMITTED])
    for batch in batches:
        segments[batch.file].load(batch)
        kept.add(batch)
    last = max((int(batch.rows["sequence"][-1]) for batch in batches if len(batch)), default=0)
    index.raise_sequence(last)


def _scanned(segments: Iterable[Segment]) -> Iterator[Scanned]:
    """The records of each file, in the order of the files; a few are read ahead."""
    works = (partial(scan, segment.file) for segment in segments)
    with ThreadPoolExecutor(_SCANS, thread_name_prefix="kvfabric-rebuild") as pool:
        ahead: list[Future[Scanned]] = [pool.submit(work) for work in islice(works, 2 * _SCANS)]
        try:
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(work) for work in islice(works, 1)]
        finally:
            for future in ahead:
                future.cancel()


def bury_older(batches: list[RecordBatch]) -> None:
    """Of several records of one part all but the one with the highest sequence are dead. Pure."""
    if not batches:
        return
    firsts = np.concatenate([_first_words(batch) for batch in batches])
    order = np.argsort(firsts, kind="stable")
    same = np.flatnonzero(firsts[order][1:] == firsts[order][:-1])
    suspects = sorted({*order[same].tolist(), *order[same + 1].tolist()})
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    newest: dict[tuple[bytes, int, int], tuple[int, RecordBatch, int]] = {}
    for number in suspects:
        at_batch = int(np.searchsorted(starts, number, side="right")) - 1
        batch, at = batches[at_batch], number - int(starts[at_batch])
        row = batch.rows[at]
        part = (row["key"].tobytes(), int(row["group"]), int(row["shard"]))
        sequence = int(row["sequence"])
        if part not in newest:
            newest[part] = (sequence, batch, at)
        elif sequence > newest[part][0]:
            _, older, older_at = newest[part]
            older.rows["is_live"][older_at] = 0
            newest[part] = (sequence, batch, at)
        else:
            batch.rows["is_live"][at] = 0


def _first_words(batch: RecordBatch) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """64 bits that tell parts apart, nearly always."""
    rows = batch.rows
    words = rows["key"].copy().view(np.uint64).reshape(-1, 4)[:, 0]
    of_part = rows["group"].astype(np.uint64) << np.uint64(32) | rows["shard"].astype(np.uint64)
    return words + of_part * np.uint64(0x9E3779B97F4A7C15)


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


def _remove(directory: Path, number: int, ops: FileOps) -> None:
    path = path_of(directory, number)
    try:
        ops.unlink(path)
    except OSError as exc:  # it costs room on the disk and its number, nothing else
        _LOG.warning("cannot remove %s: %s", path, exc.strerror)
