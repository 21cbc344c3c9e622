"""One segment file: made once at its full length, appended to, read, scanned, removed. Blocking.

Owns a descriptor and the bytes behind it, knows nothing of the index or of other files. `SegmentTier`
calls it from its pool, except `hold`/`drop`/`retire`, which belong to the event loop.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from kvfabric.errors import CorruptBlock, TransferError
from kvfabric.failpoints import failpoint
from kvfabric.tiers import direct_io
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import (
    FILE_ID_BYTES,
    NO_CHECKSUM,
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    decode_file_header,
    encode_file_header,
    encode_header,
    record_bytes,
    verify_header,
    verify_payload,
)

if TYPE_CHECKING:
    from kvfabric.tiers.record_cipher import RecordCipher

_PREFIX, _SUFFIX = "seg-", ".kvf"


class Appended(NamedTuple):
    """A record about to be written."""

    offset: int
    sequence: int
    identity: PartIdentity
    payload: memoryview


def path_of(directory: Path, number: int) -> Path:
    return directory / f"{_PREFIX}{number:08x}{_SUFFIX}"


def numbers_in(ops: FileOps, directory: Path) -> list[int]:
    """Numbers of the segment files there, ascending: the order in which they were made.

    Raises TransferError.
    """
    found = []
    with direct_io.translated(f"list {directory}"):
        names = ops.list_names(directory)
    for name in names:
        try:
            number = int(name.removeprefix(_PREFIX).removesuffix(_SUFFIX), 16)
        except ValueError:
            continue
        if name == path_of(directory, number).name:
            found.append(number)
    return sorted(found)


class SegmentFile:
    """Every method but the last three blocks and raises NoSpace or TransferError. Of a file of encrypted
    records without its `cipher` no record is read or written."""

    def __init__(
        self,
        ops: FileOps,
        path: Path,
        header: FileHeader,
        fd: int,
        *,
        direct: bool,
        cipher: RecordCipher | None = None,
    ) -> None:
        self._cipher = cipher
        self.path = path
        self.header = header
        self.direct = direct
        self._ops = ops
        self._fd = fd
        self._holders = 0
        self._retired = False

    def __repr__(self) -> str:
        return (
            f"<SegmentFile {self.path.name} {self.header.num_bytes} bytes, {self._holders} holders>"
        )

    @classmethod
    def create(
        cls,
        ops: FileOps,
        directory: Path,
        number: int,
        num_bytes: int,
        cipher: RecordCipher | None = None,
    ) -> Self:
        """A new file with all its blocks allocated, durable by the time this returns. If it raises, the
        file is gone, or its removal failed too."""
        path = path_of(directory, number)
        file_id = secrets.token_bytes(FILE_ID_BYTES)
        header = FileHeader(file_id, number, num_bytes, is_encrypted=cipher is not None)
        with direct_io.translated(f"create {path}"):
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            fd, is_direct = direct_io.open_file(ops, path, flags)
            try:
                ops.fallocate(fd, num_bytes)
                failpoint("segment.create.allocated")
                page = direct_io.aligned_buffer(PAGE_BYTES)
                page[:] = encode_file_header(header)
                try:
                    direct_io.write_all(ops, fd, [page], 0)
                except OSError as exc:
                    if not is_direct or exc.errno != errno.EINVAL:
                        raise
                    # Opened so, and refused when used: go on through the page cache.
                    fd, is_direct = _reopened(ops, fd, path), False
                    direct_io.write_all(ops, fd, [page], 0)
                ops.fsync(fd)
                failpoint("segment.create.synced")
                ops.sync_directory(directory)
                failpoint("segment.create.named")
            except BaseException:
                ops.close(fd)
                ops.unlink(path)
                raise
        return cls(ops, path, header, fd, direct=is_direct, cipher=cipher)

    @classmethod
    def open(
        cls, ops: FileOps, directory: Path, header: FileHeader, cipher: RecordCipher | None = None
    ) -> Self:
        """An existing file, as the index describes it."""
        path = path_of(directory, header.number)
        with direct_io.translated(f"open {path}"):
            fd, is_direct = direct_io.open_file(ops, path, os.O_RDWR)
        return cls(ops, path, header, fd, direct=is_direct, cipher=cipher)

    @classmethod
    def open_by_itself(
        cls, ops: FileOps, directory: Path, number: int, cipher: RecordCipher | None = None
    ) -> Self:
        """An existing file, as its own header describes it. Raises CorruptBlock if it has none."""
        path = path_of(directory, number)
        with direct_io.translated(f"open {path}"):
            fd, is_direct = direct_io.open_file(ops, path, os.O_RDWR)
            try:
                page = direct_io.aligned_buffer(PAGE_BYTES)
                got = direct_io.read_all(ops, fd, [page], 0)
                header = _header_of(page[:got], path, number)
            except BaseException:
                ops.close(fd)
                raise
        return cls(ops, path, header, fd, direct=is_direct, cipher=cipher)

    def append(self, records: Sequence[Appended]) -> None:
        """Write neighbouring records in one call to the kernel. Not durable before `sync`."""
        pages = direct_io.aligned_buffer(2 * PAGE_BYTES * len(records))
        buffers: list[memoryview] = []
        for index, record in enumerate(records):
            at = 2 * index * PAGE_BYTES
            head, tail = pages[at : at + PAGE_BYTES], pages[at + PAGE_BYTES : at + 2 * PAGE_BYTES]
            header = RecordHeader(
                self.header.file_id, record.offset, record.sequence, record.identity
            )
            payload = record.payload
            if self.header.is_encrypted:
                sealed = direct_io.aligned_buffer(len(payload))[: len(payload)]
                header = header._replace(tag=self._require_cipher().seal(header, payload, sealed))
                payload = sealed
            head[:] = encode_header(header)
            buffers += [head, *_aligned_payload(payload, tail)]
        with direct_io.translated(f"write {self.path}"):
            direct_io.write_all(self._ops, self._fd, buffers, records[0].offset)
            failpoint("segment.appended")

    def sync(self) -> None:
        with direct_io.translated(f"sync {self.path}"):
            self._ops.fdatasync(self._fd)
            failpoint("segment.synced")

    def read(self, offset: int, identity: PartIdentity, buffer: memoryview) -> memoryview:
        """Read the record's payload, straight into `buffer` where it is aligned and long enough.

        Returns a view of the payload, in `buffer` or in memory of its own, after the header was found
        to be this part's. Raises CorruptBlock. The payload itself is not verified yet, but decrypted and
        authenticated if the file is an encrypted one; whatever checksum is asked for then.
        """
        page = direct_io.scratch_page()
        padded = record_bytes(identity.num_bytes) - PAGE_BYTES
        target = buffer[:padded]
        if len(target) < padded or not direct_io.is_aligned(target):
            target = direct_io.aligned_buffer(padded)
        with direct_io.translated(f"read {self.path} at {offset}"):
            got = direct_io.read_all(self._ops, self._fd, [page, target], offset)
        if got < PAGE_BYTES + padded:
            raise CorruptBlock(f"{self.path} ends {got} bytes after {offset}")
        place, payload = Location(self.header.number, offset), target[: identity.num_bytes]
        if self.header.is_encrypted:
            written = replace(identity, checksum=NO_CHECKSUM)
            header = verify_header(page, self.header.file_id, place, written)
            self._require_cipher().open(header, payload)
        else:
            verify_header(page, self.header.file_id, place, identity)
        return payload

    def _require_cipher(self) -> RecordCipher:
        if self._cipher is None:
            raise CorruptBlock(f"{self.path} is encrypted, and nobody gave it keys")
        return self._cipher

    def verify(self, offset: int, identity: PartIdentity) -> None:
        """Read the record as it is on the medium and check all of it. Raises CorruptBlock."""
        num_bytes = record_bytes(identity.num_bytes)
        if not self.direct:
            with direct_io.translated(f"read {self.path} at {offset}"):
                self._ops.forget_cached(self._fd, offset, num_bytes)
        buffer = direct_io.aligned_buffer(num_bytes - PAGE_BYTES)
        payload = self.read(offset, identity, buffer)
        if not self.header.is_encrypted:
            verify_payload(payload, identity)

    def read_pages(self, places: Iterable[int], pages: Sequence[memoryview]) -> int:
        """Read the page at each offset into the next of `pages`, aligned; returns how many there are.

        Ends before a page that is cut off by the end of the file, or that cannot be read; raises only if
        that is the first.
        """
        # A million of these are read at a rebuild: nothing is done for each that can be done once.
        preadv, fd, got = self._ops.preadv, self._fd, 0
        with direct_io.translated(f"scan {self.path}"):
            for page, offset in zip(pages, places, strict=False):
                try:
                    if preadv(fd, (page,), offset) < PAGE_BYTES:
                        break
                except OSError:
                    if not got:
                        raise
                    break
                got += 1
            if not got:  # a short read may have been short by accident
                return (
                    direct_io.read_all(self._ops, fd, pages[:1], next(iter(places))) // PAGE_BYTES
                )
        return got

    def unlink(self) -> None:
        """Durably remove the name. Readers that hold the file finish undisturbed."""
        with direct_io.translated(f"remove {self.path}"):
            self._ops.unlink(self.path)
            failpoint("segment.unlinked")
            self._ops.sync_directory(self.path.parent)

    def hold(self) -> None:
        """Keep the descriptor open until `drop`, whatever happens to the name."""
        if self._retired:
            raise TransferError(f"{self.path.name} was reclaimed")
        self._holders += 1

    def drop(self) -> None:
        self._holders -= 1
        if self._retired and not self._holders:
            self._ops.close(self._fd)

    def retire(self) -> None:
        """No new holders; the descriptor closes with the last one."""
        if self._retired:
            return
        self._retired = True
        if not self._holders:
            self._ops.close(self._fd)


def _reopened(ops: FileOps, fd: int, path: Path) -> int:
    """The same file without O_DIRECT; `fd` is closed then."""
    buffered = ops.open(path, os.O_RDWR)
    ops.close(fd)
    return buffered


def _header_of(page: memoryview, path: Path, number: int) -> FileHeader:
    header = decode_file_header(page)
    if header.number != number:
        raise CorruptBlock(f"{path} says it is file {header.number}")
    return header


def _aligned_payload(payload: memoryview, tail: memoryview) -> list[memoryview]:
    """`payload` padded to whole pages, as aligned buffers; `tail` is a zeroed page to pad in."""
    if not direct_io.is_aligned(payload):
        copy = direct_io.aligned_buffer(len(payload))
        copy[: len(payload)] = payload
        return [copy]
    whole = len(payload) // PAGE_BYTES * PAGE_BYTES
    if whole == len(payload):
        return [payload]
    tail[: len(payload) - whole] = payload[whole:]
    return [payload[:whole], tail] if whole else [tail]
