"""Index of what lies in the segment files: LMDB. Blocking.

Four tables, changed together in one transaction, so that a crash shows all of a commit or nothing:

    parts     part (40 B)            -> sequence, file, offset, identity      newest version, live
    extents   file, offset (12 B)    -> bytes, live?, part, tenant            every record, dead ones too
    segments  file (4 B)             -> file id, bytes of the file
    facts     name                   -> format, highest file number, highest sequence

`parts` is what is served; `extents` says what a file's reclaim takes with it, and who is charged for the
dead bytes. Values carry a CRC: LMDB has none. Whatever is wrong here costs time or a part, never bytes:
readers verify the record itself, and an index that does not open is rebuilt from the files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple, Self

import lmdb

from kvfabric.errors import CorruptBlock, NoSpace, TransferError
from kvfabric.failpoints import failpoint
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.records import (
    FileHeader,
    decode_identity,
    encode_identity,
    record_bytes,
)
from kvfabric.types import BlockKey, Part, TenantId

_FORMAT = b"1"
_FORMAT_KEY = b"format"
_PART = struct.Struct(">32sII")
_FILE = struct.Struct(">I")
_PLACE = struct.Struct(">IQ")
_PART_VALUE = struct.Struct("<QIQ")
_EXTENT_VALUE = struct.Struct("<QB40s")
_SEGMENT_VALUE = struct.Struct("<16sQ")
_CRC = struct.Struct("<I")
_SLICE = 512
SEQUENCE_STEP = 1 << 32
"""Each opening starts at a multiple of this, above everything that an earlier one may have used."""


class Put(NamedTuple):
    """Index a record. An older version of its part becomes dead; if a newer is known, this one is."""

    location: Location
    sequence: int
    identity: PartIdentity


class Forget(NamedTuple):
    """Drop a part from what is served; with `only_at`, only that version."""

    part: Part
    only_at: Location | None = None


class Extent(NamedTuple):
    location: Location
    num_bytes: int
    tenant: TenantId
    is_live: bool


Change = Put | Forget


class _Tables(NamedTuple):
    env: lmdb.Environment
    parts: lmdb._Database
    extents: lmdb._Database
    segments: lmdb._Database
    facts: lmdb._Database


class _Open(NamedTuple):
    """A transaction and the tables to use in it."""

    txn: lmdb.Transaction[bytes]
    tables: _Tables


class SegmentIndex:
    """Methods raise NoSpace or TransferError, and then changed nothing."""

    def __init__(self, directory: Path, map_bytes: int) -> None:
        self._path = directory / "index"
        self._map_bytes = map_bytes
        # There while an index is read for the first time, which may end the process (LMDB is mapped
        # memory, and may be damaged), or while it is rebuilt: the start after that rebuilds.
        self._doubt = directory / "index.doubted"
        # One transaction at a time: an error of the disk closes the environment.
        self._lock = threading.Lock()
        self._tables: _Tables | None = None

    @classmethod
    def create(cls, directory: Path, map_bytes: int) -> Self:
        """An empty index in place of whatever is there; a later `open` ignores it before `trust`."""
        index = cls(directory, map_bytes)
        with direct_io.translated(f"create {index._path}"):
            index._doubt.touch(mode=0o600)
            direct_io.sync_directory(directory)
            if index._path.exists():
                shutil.rmtree(index._path)
            index._path.mkdir(mode=0o700)
        with index._transaction() as (txn, tables):
            txn.put(_FORMAT_KEY, _FORMAT, db=tables.facts)
        failpoint("index.created")
        return index

    @classmethod
    def open(cls, directory: Path, map_bytes: int) -> Self | None:
        """The index that is there, or None if there is none that can be trusted."""
        index = cls(directory, map_bytes)
        if index._doubt.exists() or not (index._path / "data.mdb").exists():
            return None
        index._doubt.touch(mode=0o600)
        failpoint("index.doubted")
        try:
            is_sound = index._is_sound()
        except (TransferError, NoSpace, CorruptBlock):
            is_sound = False
        if not is_sound:
            index.close()
            return None
        index.trust()
        return index

    def trust(self) -> None:
        """What is in the index is complete."""
        with direct_io.translated(f"remove {self._doubt}"):
            self._doubt.unlink()
        failpoint("index.trusted")

    def close(self) -> None:
        with self._lock:
            self._abandon()

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

    def add_segment(self, header: FileHeader) -> None:
        with self._transaction() as (txn, tables):
            value = _SEGMENT_VALUE.pack(header.file_id, header.num_bytes)
            _put(txn, tables.segments, _FILE.pack(header.number), value)
            txn.put(b"number", header.number.to_bytes(4, "little"), db=tables.facts)

    def drop_segment(self, number: int) -> list[Part]:
        """Forget a file and all in it; returns the parts that were served from it."""
        dropped = []
        with self._transaction() as (txn, tables):
            # A list: deleting moves the cursor.
            inside = takewhile(
                lambda row: _PLACE.unpack(row[0])[0] == number,
                _entries(txn, tables.extents, _PLACE.pack(number, 0)),
            )
            for key, value in list(inside):
                _, is_live, part = _EXTENT_VALUE.unpack_from(value)
                if is_live:
                    txn.delete(part, db=tables.parts)
                    dropped.append(_to_part(part))
                txn.delete(key, db=tables.extents)
            txn.delete(_FILE.pack(number), db=tables.segments)
        return dropped

    def segments(self) -> list[FileHeader]:
        """Registered files, in the order in which they were made."""
        with self._transaction(write=False) as (txn, tables):
            return [
                FileHeader(file_id, _FILE.unpack(key)[0], num_bytes)
                for key, value in _entries(txn, tables.segments)
                for file_id, num_bytes in [_SEGMENT_VALUE.unpack(value)]
            ]

    def apply(self, changes: Sequence[Change]) -> list[Extent]:
        """Make changes durable, in order; returns the extents whose liveness they decided.

        Of each `Put` its own extent; of each `Put` and `Forget` what it turned dead.
        """
        decided: list[Extent] = []
        with self._transaction() as opened:
            for change in changes:
                if isinstance(change, Put):
                    decided += _apply_put(opened, change)
                else:
                    decided += _apply_forget(opened, change)
            failpoint("index.changed")
        failpoint("index.committed")
        return decided

    def extents(self) -> Iterator[Extent]:
        """Every record that is not reclaimed, by file and offset. Lazy, in slices."""
        for key, value in self._rows("extents"):
            yield _to_extent(key, value)

    def records(self) -> Iterator[tuple[PartIdentity, Location]]:
        """Every part that is served. Lazy, in slices; a slice sees one moment."""
        for _, value in self._rows("parts"):
            _, file, offset = _PART_VALUE.unpack_from(value)
            yield decode_identity(value[_PART_VALUE.size :]), Location(file, offset)

    def _rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        after = b""
        while True:
            with self._transaction(write=False) as (txn, tables):
                rows = list(islice(_entries(txn, getattr(tables, table), after), _SLICE))
            yield from rows
            if len(rows) < _SLICE:
                return
            after = rows[-1][0] + b"\0"

    def _is_sound(self) -> bool:
        """Read everything once."""
        with self._transaction(write=False) as (txn, tables):
            if txn.get(_FORMAT_KEY, db=tables.facts) != _FORMAT:
                return False
            for table in (tables.parts, tables.extents, tables.segments):
                for _ in _entries(txn, table):
                    pass
        return True

    def _opened(self) -> _Tables:
        if self._tables is None:
            env = lmdb.open(
                str(self._path), map_size=self._map_bytes, mode=0o600, max_dbs=4, max_readers=16
            )
            if not self._is_whole(env):
                env.close()
                raise TransferError(f"index {self._path} was cut short")
            names = (b"parts", b"extents", b"segments", b"facts")
            self._tables = _Tables(env, *(env.open_db(name) for name in names))
        return self._tables

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
                with tables.env.begin(write=write) as txn:
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


def _apply_put(opened: _Open, put: Put) -> list[Extent]:
    txn, tables = opened
    identity = put.identity
    part = _PART.pack(*identity.part)
    extent = Extent(put.location, record_bytes(identity.num_bytes), identity.tenant, is_live=True)
    decided = []
    known = _get(txn, tables.parts, part)
    if known is not None:
        sequence, *place = _PART_VALUE.unpack_from(known)
        if sequence > put.sequence:
            extent = extent._replace(is_live=False)
        else:
            decided += _bury(opened, Location(*place))
    if extent.is_live:
        value = _PART_VALUE.pack(put.sequence, *put.location) + encode_identity(identity)
        _put(txn, tables.parts, part, value)
    fixed = _EXTENT_VALUE.pack(extent.num_bytes, extent.is_live, part)
    _put(txn, tables.extents, _PLACE.pack(*put.location), fixed + identity.tenant.encode())
    return [*decided, extent]


def _apply_forget(opened: _Open, forget: Forget) -> list[Extent]:
    txn, tables = opened
    part = _PART.pack(*forget.part)
    known = _get(txn, tables.parts, part)
    if known is None:
        return []
    _, *place = _PART_VALUE.unpack_from(known)
    if forget.only_at not in (None, Location(*place)):
        return []
    txn.delete(part, db=tables.parts)
    return _bury(opened, Location(*place))


def _bury(opened: _Open, location: Location) -> list[Extent]:
    """Turn an extent dead; it stays until its file goes."""
    txn, tables = opened
    key = _PLACE.pack(*location)
    value = _get(txn, tables.extents, key)
    if value is None:
        return []
    num_bytes, _, part = _EXTENT_VALUE.unpack_from(value)
    fixed = _EXTENT_VALUE.pack(num_bytes, False, part)
    _put(txn, tables.extents, key, fixed + value[_EXTENT_VALUE.size :])
    return [_to_extent(key, value)._replace(is_live=False)]


def _to_extent(key: bytes, value: bytes) -> Extent:
    num_bytes, is_live, _ = _EXTENT_VALUE.unpack_from(value)
    tenant = TenantId(value[_EXTENT_VALUE.size :].decode())
    return Extent(Location(*_PLACE.unpack(key)), num_bytes, tenant, bool(is_live))


def _to_part(packed: bytes) -> Part:
    key, group, shard = _PART.unpack(packed)
    return Part(BlockKey(key), group, shard)


def _put(txn: lmdb.Transaction[bytes], table: lmdb._Database, key: bytes, value: bytes) -> None:
    txn.put(key, _CRC.pack(zlib.crc32(value, zlib.crc32(key))) + value, db=table)


def _get(txn: lmdb.Transaction[bytes], table: lmdb._Database, key: bytes) -> bytes | None:
    stored = txn.get(key, db=table)
    return None if stored is None else _checked(key, stored)


def _entries(
    txn: lmdb.Transaction[bytes], table: lmdb._Database, start: bytes = b""
) -> Iterator[tuple[bytes, bytes]]:
    """Entries from `start` on, checked."""
    cursor = txn.cursor(db=table)
    if cursor.set_range(start) if start else cursor.first():
        for key, stored in cursor.iternext():
            yield key, _checked(key, stored)


def _checked(key: bytes, stored: bytes) -> bytes:
    value = stored[_CRC.size :]
    if stored[: _CRC.size] != _CRC.pack(zlib.crc32(value, zlib.crc32(key))):
        raise CorruptBlock(f"index entry {key.hex()} is damaged")
    return value
