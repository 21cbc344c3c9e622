"""Index of what lies in the segment files: LMDB. Blocking.

Four tables, changed together in one transaction, so that a crash shows all of a commit or nothing:

    extents   file (4 B)             -> one row of `ROW` for every record of it, dead ones too, by offset
    lineages  number (4 B)           -> tenant, namespace tag, layout, incarnations
    segments  file (4 B)             -> file id, bytes of the file
    facts     name                   -> format, highest file number, highest sequence, write budget

Rows are of one length and lie packed in the pages of one file after the other: a million is read in a few
vectors, a commit dirties the pages at the end of one file only, and a file's reclaim frees its pages as they
are. There is no table by part: who deletes one knows where it is.

Every value carries a check of its own: LMDB has none. Whatever is wrong here costs time or a part, never
bytes: readers verify the record itself, and an index that does not open is rebuilt from the files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import lmdb
import numpy as np
import numpy.typing as npt

from kvfabric.errors import CorruptBlock, NoSpace, TransferError
from kvfabric.failpoints import failpoint
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import ROW, Lineage, Location, PartIdentity, RecordBatch, Rows
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import FileHeader, record_bytes
from kvfabric.types import TenantId

_FORMAT = b"3"
_FORMAT_KEY, _BUDGET_KEY = b"format", b"budget"
_NUMBER = struct.Struct(">I")
_OFFSET = struct.Struct(">Q")
_SEGMENT_VALUE = struct.Struct("<16sQB")
_LINEAGE = struct.Struct("<8s32sHH")
_BUDGET = struct.Struct("<dd")
_CRC = struct.Struct("<I")
_INCARNATION_BYTES = 16
_WORDS = ROW.itemsize // 8 - 1
"""64-bit words of a row that its check is of."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FOLD = np.uint64(29)
SEQUENCE_STEP = 1 << 32
"""Each opening starts at a multiple of this, above everything that an earlier one may have used."""


class Put(NamedTuple):
    """Index a record, as live."""

    location: Location
    sequence: int
    identity: PartIdentity


class Extent(NamedTuple):
    location: Location
    num_bytes: int
    tenant: TenantId


class BudgetState(NamedTuple):
    """What is left of the write budget in bytes, and when that was (seconds since 1970)."""

    left: float
    at: float


class _Tables(NamedTuple):
    env: lmdb.Environment
    extents: lmdb._Database
    lineages: lmdb._Database
    segments: lmdb._Database
    facts: lmdb._Database


class _Open(NamedTuple):
    """A transaction and the tables to use in it."""

    txn: lmdb.Transaction[bytes]
    tables: _Tables


class SegmentIndex:
    """Methods raise NoSpace, TransferError or (a damaged value) CorruptBlock, and then changed nothing."""

    def __init__(self, directory: Path, map_bytes: int, ops: FileOps) -> None:
        self._path = directory / "index"
        self._map_bytes = map_bytes
        self._ops = ops
        # There while an index is read for the first time, which may end the process (LMDB is mapped
        # memory, and may be damaged), or while it is rebuilt: the start after that rebuilds.
        self._doubt = directory / "index.doubted"
        # One transaction at a time: an error of the disk closes the environment.
        self._lock = threading.Lock()
        self._tables: _Tables | None = None
        self._lineages: dict[int, Lineage] = {}
        self._numbers: dict[Lineage, int] = {}

    @classmethod
    def create(cls, directory: Path, map_bytes: int, ops: FileOps) -> Self:
        """An empty index in place of whatever is there; a later `open` ignores it before `trust`."""
        index = cls(directory, map_bytes, ops)
        with direct_io.translated(f"create {index._path}"):
            index.doubt()
            ops.sync_directory(directory)
            if index._path.exists():
                shutil.rmtree(index._path)
            index._path.mkdir(mode=0o700)
        with index._transaction() as (txn, tables):
            txn.put(_FORMAT_KEY, _FORMAT, db=tables.facts)
        failpoint("index.created")
        return index

    @classmethod
    def open(cls, directory: Path, map_bytes: int, ops: FileOps) -> Self | None:
        """The index that is there, or None if there is none that can be trusted. Under doubt until
        everything was read: then `trust` it."""
        index = cls(directory, map_bytes, ops)
        if index._doubt.exists() or not (index._path / "data.mdb").exists():
            return None
        with direct_io.translated(f"create {index._doubt}"):
            index.doubt()
        failpoint("index.doubted")
        try:
            is_known = index._load()
        except (TransferError, NoSpace, CorruptBlock) as exc:
            direct_io.raise_if_exhausted(exc)
            is_known = False
        if not is_known:
            index.close()
            return None
        return index

    def doubt(self) -> None:
        """Have the next opening rebuild, unless `trust` comes before it. Raises OSError."""
        self._ops.close(self._ops.open(self._doubt, os.O_CREAT | os.O_WRONLY))

    def trust(self) -> None:
        """What is in the index is complete."""
        with direct_io.translated(f"remove {self._doubt}"):
            self._ops.unlink(self._doubt)
        failpoint("index.trusted")

    def close(self) -> None:
        with self._lock:
            self._abandon()

    # -- facts ---------------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """A sequence above all that any earlier opening used or may have used; durable."""
        with self._transaction() as (txn, tables):
            last = int.from_bytes(txn.get(b"sequence", bytes(8), db=tables.facts), "little")
            first = (last // SEQUENCE_STEP + 1) * SEQUENCE_STEP
            txn.put(b"sequence", first.to_bytes(8, "little"), db=tables.facts)
        return first

    def raise_sequence(self, seen: int) -> None:
        """The index was rebuilt from records up to this sequence."""
        with self._transaction() as (txn, tables):
            txn.put(b"sequence", seen.to_bytes(8, "little"), db=tables.facts)

    def next_number(self) -> int:
        """A file number above every one that was ever registered."""
        with self._transaction(write=False) as (txn, tables):
            return int.from_bytes(txn.get(b"number", bytes(4), db=tables.facts), "little") + 1

    def budget(self) -> BudgetState | None:
        with self._transaction(write=False) as (txn, tables):
            value = _get(txn, tables.facts, _BUDGET_KEY)
        return BudgetState(*_BUDGET.unpack(value)) if value is not None else None

    def keep_budget(self, state: BudgetState) -> None:
        with self._transaction() as (txn, tables):
            _put(txn, tables.facts, _BUDGET_KEY, _BUDGET.pack(*state))

    # -- files ---------------------------------------------------------------------------------------

    def add_segment(self, header: FileHeader) -> None:
        with self._transaction() as (txn, tables):
            value = _SEGMENT_VALUE.pack(header.file_id, header.num_bytes, header.is_encrypted)
            _put(txn, tables.segments, _NUMBER.pack(header.number), value)
            txn.put(b"number", header.number.to_bytes(4, "little"), db=tables.facts)

    def drop_segment(self, number: int) -> RecordBatch:
        """Forget a file and all in it; returns what was live there, as far as it is readable."""
        key = _NUMBER.pack(number)
        with self._transaction() as (txn, tables):
            try:
                live = live_of(self._batch(txn, tables, number))
            except CorruptBlock:
                live = RecordBatch(number, np.zeros(0, ROW), {})
            txn.delete(key, db=tables.extents)
            txn.delete(key, db=tables.segments)
        return live

    def segments(self) -> list[FileHeader]:
        """Registered files, in the order in which they were made."""
        with self._transaction(write=False) as (txn, tables):
            return [
                FileHeader(file_id, _NUMBER.unpack(key)[0], num_bytes, bool(is_encrypted))
                for key, value in _entries(txn, tables.segments)
                for file_id, num_bytes, is_encrypted in [_SEGMENT_VALUE.unpack(value)]
            ]

    # -- records -------------------------------------------------------------------------------------

    def apply(
        self,
        puts: Sequence[Put],
        forgets: Sequence[Location] = (),
        budget: BudgetState | None = None,
    ) -> list[Extent]:
        """Make it durable: records that came, then places that are given up; returns the latter, as far as
        they were live."""
        buried: list[Extent] = []
        known = len(self._lineages)
        try:
            with self._transaction() as (txn, tables):
                for file in dict.fromkeys(put.location.file for put in puts):
                    own = [put for put in puts if put.location.file == file]
                    self._put_rows(txn, tables, file, self.rows_of(own))
                self._put_lineages(txn, tables, known)
                for location in forgets:
                    buried += self._bury(txn, tables, location)
                if budget is not None:
                    _put(txn, tables.facts, _BUDGET_KEY, _BUDGET.pack(*budget))
                failpoint("index.changed")
        except BaseException:
            self._unlearn(known)
            raise
        failpoint("index.committed")
        return buried

    def load_rows(self, batches: Sequence[RecordBatch]) -> None:
        """Put whole files into an empty index; their lineages are numbered by `adopted`."""
        with self._transaction() as (txn, tables):
            for batch in batches:
                self._put_rows(txn, tables, batch.file, batch.rows)
            self._put_lineages(txn, tables, 0)

    def rows_of(self, puts: Sequence[Put]) -> Rows:
        """As rows of the index, without their check."""
        rows = np.zeros(len(puts), ROW)
        for at, put in enumerate(puts):
            one = put.identity
            lineage = Lineage(
                one.tenant, one.namespace_tag, one.layout_fingerprint, one.incarnations
            )
            rows[at] = (
                put.location.offset,
                put.sequence,
                one.num_bytes,
                one.part.group,
                one.part.shard,
                one.block_index,
                self._number_of(lineage),
                1,
                one.part.key,
                one.parent,
                one.checksum,
                0,
            )
        return rows

    def adopted(self, file: int, rows: Rows, lineages: Sequence[Lineage]) -> RecordBatch:
        """Rows whose lineages are given by their place in `lineages`, as the index numbers them."""
        numbers = np.array([self._number_of(one) for one in lineages], np.uint32)
        if len(rows):
            rows["lineage"] = numbers[rows["lineage"]]
        return RecordBatch(file, rows, self._lineages)

    def batch(self, number: int) -> RecordBatch:
        """Every record of a file, dead ones too."""
        with self._transaction(write=False) as (txn, tables):
            return self._batch(txn, tables, number)

    def live(self, number: int) -> RecordBatch:
        return live_of(self.batch(number))

    @property
    def lineages(self) -> Mapping[int, Lineage]:
        return self._lineages

    def keep_lineages(self, numbers: Collection[int]) -> None:
        """Forget all others. Before anything is put."""
        with self._transaction() as (txn, tables):
            for number in self._lineages.keys() - set(numbers):
                txn.delete(_NUMBER.pack(number), db=tables.lineages)
                del self._numbers[self._lineages.pop(number)]

    # -- the inside ----------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Read the lineages; whether the index is of this format."""
        with self._transaction(write=False) as (txn, tables):
            if txn.get(_FORMAT_KEY, db=tables.facts) != _FORMAT:
                return False
            for key, value in _entries(txn, tables.lineages):
                self._learn(_NUMBER.unpack(key)[0], _decode_lineage(value))
        return True

    def _batch(self, txn: lmdb.Transaction[bytes], tables: _Tables, number: int) -> RecordBatch:
        key = _NUMBER.pack(number)
        with txn.cursor(db=tables.extents) as cursor:
            packed = cursor.getmulti(
                [key], dupdata=True, dupfixed_bytes=ROW.itemsize, keyfixed=True
            )
        pairs = np.frombuffer(packed, np.uint8).reshape(-1, len(key) + ROW.itemsize)
        rows = np.ascontiguousarray(pairs[:, len(key) :]).view(ROW).reshape(-1)
        if not np.array_equal(rows["check"], _checks(rows, number)):
            raise CorruptBlock(f"index rows of segment {number:08x} are damaged")
        batch = RecordBatch(number, rows, self._lineages)
        if not self._lineages.keys() >= batch.used_lineages():
            raise CorruptBlock(f"index rows of segment {number:08x} have unknown lineages")
        return batch

    def _put_rows(
        self, txn: lmdb.Transaction[bytes], tables: _Tables, file: int, rows: Rows
    ) -> None:
        rows["check"] = _checks(rows, file)
        key, packed = _NUMBER.pack(file), rows.tobytes()
        with txn.cursor(db=tables.extents) as cursor:
            # Appended, since their offsets are the file's highest: LMDB fills its pages then.
            _, added = cursor.putmulti(
                (
                    (key, packed[at : at + ROW.itemsize])
                    for at in range(0, len(packed), ROW.itemsize)
                ),
                append=True,
            )
        if added != len(rows):
            raise CorruptBlock(f"index rows of segment {file:08x} are not behind those before")

    def _bury(
        self, txn: lmdb.Transaction[bytes], tables: _Tables, location: Location
    ) -> list[Extent]:
        """Turn a row dead; it stays until its file goes."""
        key, offset = _NUMBER.pack(location.file), _OFFSET.pack(location.offset)
        with txn.cursor(db=tables.extents) as cursor:
            if not cursor.set_range_dup(key, offset) or cursor.value()[: len(offset)] != offset:
                return []
            row = np.frombuffer(cursor.value(), ROW).copy()
            if not np.array_equal(row["check"], _checks(row, location.file)):
                raise CorruptBlock(f"index row of {location} is damaged")
            if not row["is_live"][0]:
                return []
            cursor.delete()
            row["is_live"] = 0
            row["check"] = _checks(row, location.file)
            cursor.put(key, row.tobytes())
        tenant = self._lineages[int(row["lineage"][0])].tenant
        return [Extent(location, record_bytes(int(row["num_bytes"][0])), tenant)]

    def _number_of(self, lineage: Lineage) -> int:
        number = self._numbers.get(lineage)
        if number is None:
            number = max(self._lineages, default=0) + 1
            self._learn(number, lineage)
        return number

    def _learn(self, number: int, lineage: Lineage) -> None:
        self._lineages[number] = lineage
        self._numbers[lineage] = number

    def _unlearn(self, known: int) -> None:
        """All but the first `known`: their transaction failed."""
        for number in list(self._lineages)[known:]:
            del self._numbers[self._lineages.pop(number)]

    def _put_lineages(self, txn: lmdb.Transaction[bytes], tables: _Tables, known: int) -> None:
        for number in list(self._lineages)[known:]:
            value = _encode_lineage(self._lineages[number])
            _put(txn, tables.lineages, _NUMBER.pack(number), value)

    def _opened(self) -> _Tables:
        if self._tables is None:
            env = lmdb.open(
                str(self._path), map_size=self._map_bytes, mode=0o600, max_dbs=4, max_readers=16
            )
            try:
                self._tables = self._tables_of(env)
            except BaseException:
                env.close()
                raise
        return self._tables

    def _tables_of(self, env: lmdb.Environment) -> _Tables:
        if not self._is_whole(env):
            raise TransferError(f"index {self._path} was cut short")
        extents = env.open_db(b"extents", dupsort=True, dupfixed=True)
        others = [env.open_db(name) for name in (b"lineages", b"segments", b"facts")]
        return _Tables(env, extents, *others)

    def _is_whole(self, env: lmdb.Environment) -> bool:
        """Reading a mapped page behind the end of the file would end the process."""
        num_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        return (self._path / "data.mdb").stat().st_size >= num_bytes

    def _abandon(self) -> None:
        if self._tables is not None:
            self._tables.env.close()
            self._tables = None

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[_Open]:
        with self._lock:
            try:
                tables = self._opened()
                with tables.env.begin(db=tables.extents, write=write) as txn:
                    yield _Open(txn, tables)
            except lmdb.MapFullError as exc:
                raise NoSpace(f"index {self._path} is full at {self._map_bytes} bytes") from exc
            except lmdb.Error as exc:
                # LMDB may refuse all further work after a failed write: the next call opens it anew.
                self._abandon()
                # Of the system's errors it passes on the words only.
                is_full = any(os.strerror(code) in str(exc) for code in direct_io.NO_SPACE)
                kind = NoSpace if is_full else TransferError
                raise kind(f"index {self._path}: {exc}") from exc


def live_of(batch: RecordBatch) -> RecordBatch:
    """Of all records of a file those that count."""
    is_live = batch.rows["is_live"] != 0
    return batch if is_live.all() else batch.chosen(is_live)


def _checks(rows: Rows, file: int) -> npt.NDArray[np.uint64]:
    """64 bits over the rest of each row and its file: each step can be undone, so no change of a single word
    goes unseen, and any other with probability 2**-64."""
    words = np.ascontiguousarray(rows).view(np.uint64).reshape(-1, ROW.itemsize // 8)
    check = np.full(len(rows), file, np.uint64)
    for column in range(_WORDS):
        check ^= words[:, column]
        check *= _MULTIPLIER
        check ^= check >> _FOLD
    return check


def _encode_lineage(lineage: Lineage) -> bytes:
    tenant = lineage.tenant.encode()
    fixed = _LINEAGE.pack(
        lineage.namespace_tag, lineage.layout_fingerprint, len(tenant), len(lineage.incarnations)
    )
    return fixed + tenant + b"".join(lineage.incarnations)


def _decode_lineage(value: bytes) -> Lineage:
    tag, layout, length, count = _LINEAGE.unpack_from(value)
    end = _LINEAGE.size + length
    starts = range(end, end + count * _INCARNATION_BYTES, _INCARNATION_BYTES)
    return Lineage(
        TenantId(value[_LINEAGE.size : end].decode()),
        tag,
        layout,
        tuple(value[at : at + _INCARNATION_BYTES] for at in starts),
    )


def _put(txn: lmdb.Transaction[bytes], table: lmdb._Database, key: bytes, value: bytes) -> None:
    txn.put(key, _CRC.pack(zlib.crc32(value, zlib.crc32(key))) + value, db=table)


def _get(txn: lmdb.Transaction[bytes], table: lmdb._Database, key: bytes) -> bytes | None:
    stored = txn.get(key, db=table)
    return None if stored is None else _checked(key, stored)


def _entries(txn: lmdb.Transaction[bytes], table: lmdb._Database) -> Iterator[tuple[bytes, bytes]]:
    """All entries, checked."""
    with txn.cursor(db=table) as cursor:
        for key, stored in cursor:
            yield key, _checked(key, stored)


def _checked(key: bytes, stored: bytes) -> bytes:
    value = stored[_CRC.size :]
    if stored[: _CRC.size] != _CRC.pack(zlib.crc32(value, zlib.crc32(key))):
        raise CorruptBlock(f"index entry {key.hex()} is damaged")
    return value
