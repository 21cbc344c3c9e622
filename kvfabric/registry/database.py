"""Registry state and audit log in an LMDB file: the embedded registry itself, or a holder's durable copy.

One database file holds rows and audit log, so a change and its link in the chain are one transaction:
both are there after a crash, or neither. Each commit is fsync'd. Everything here blocks, and all of it is
called in one thread.

    meta       registry_id, version (u64), audit_head, format, and what the owner notes down
    epochs     scope -> MessagePack (epoch, incarnation or empty)
    tenants    tenant id -> MessagePack Tenant
    templates  SHA-256 of MessagePack (name, version) -> MessagePack TemplateVersion
    audit      sequence (u64, big-endian) -> head (32 B), MessagePack AuditRecord
    receipts   SHA-256 of receipt id, of key -> MessagePack (receipt id, key, row of `receipts`)
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from kvfabric.errors import ConfigError, Conflict, KVFabricError, NoSpace
from kvfabric.failpoints import failpoint
from kvfabric.registry import audit, rows
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.changes import check_forward, initial_state
from kvfabric.registry.state import RegistryState

FORMAT = b"kvfabric-registry-1"
_MAP_BYTES = 1 << 30  # of address space: the file grows as needed
_U64 = struct.Struct(">Q")
_TABLES = ("meta", "epochs", "tenants", "templates", "audit")
_RECEIPTS = "receipts"

FLEET = "fleet"
"""Note: which fleet's registry this is a copy of; empty or absent where it is a node's own."""

Entry = tuple[bytes, bytes]
"""(encoded audit record, head after it)."""


_RECEIPT = msgspec.msgpack.Decoder(tuple[str, str, bytes])


def _receipt_key(receipt_id: str, key: str | None = None) -> bytes:
    """LMDB keys have at most 511 bytes: digests of both, or of the receipt alone as a prefix."""
    first = hashlib.sha256(receipt_id.encode()).digest()
    return first if key is None else first + hashlib.sha256(key.encode()).digest()


def open_environment(directory: Path) -> Any:
    """The LMDB file in `directory`, which is made. Raises OSError, lmdb.Error."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return lmdb.open(str(directory), map_size=_MAP_BYTES, max_dbs=8, mode=0o600, lock=True)


class Database:
    """See the module. `open_env`: an LMDB environment in a directory."""

    def __init__(self, directory: Path, open_env: Callable[[Path], Any] = open_environment) -> None:
        self._directory = directory
        self._open_env = open_env
        self._env: Any = None
        self._tables: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Database {self._directory}>"

    def open(self, *, create: bool) -> tuple[RegistryState, bytes, int]:
        """(state, audit head, number of audit records).

        `create`: make a new registry where there is none; otherwise that is an empty one of version 0.
        Raises ConfigError if it is not ours or damaged, Conflict if the audit log does not hold.
        """
        try:
            self._env = self._open_env(self._directory)
            for name in (*_TABLES, _RECEIPTS):
                self._tables[name] = self._env.open_db(name.encode())
        except (OSError, lmdb.Error) as exc:
            self.close()
            raise ConfigError(f"cannot open the registry in {self._directory}: {exc}") from exc
        try:
            if self.note("format") is None:
                if not create:
                    return RegistryState(), audit.FIRST_HEAD, 0
                self.replace(initial_state(), [])
            return self.load()
        except (msgspec.DecodeError, lmdb.Error) as exc:
            self.close()
            raise ConfigError(f"the registry in {self._directory} is damaged: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def load(self) -> tuple[RegistryState, bytes, int]:
        """As `open`, of what the file holds now."""
        return self._load(), self._must("audit_head"), len(self.verified_audit_log())

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def write(self, before: RegistryState, after: RegistryState, record: AuditRecord) -> bytes:
        """Make `after` durable if `before` is what the file holds; returns the new audit head."""
        encoded = audit.encode(record)
        head = audit.link(self._must("audit_head"), encoded)
        self.append(before, after, [(encoded, head)])
        return head

    def append(self, before: RegistryState, after: RegistryState, entries: Sequence[Entry]) -> None:
        """Make `after` durable, which follows on `before` by the changes in `entries`."""
        check_forward(before, after)
        with self._writing() as txn:
            self._check_unchanged(txn, before)
            self._put_rows(txn, before, after)
            self._put_entries(txn, entries, after)

    def replace(
        self, state: RegistryState, entries: Sequence[Entry], notes: Mapping[str, bytes] = {}
    ) -> None:
        """Make `state` with its whole audit log durable in place of whatever there is."""
        with self._writing() as txn:
            for name in _TABLES[1:]:
                txn.drop(self._tables[name], delete=False)
            self._put_rows(txn, RegistryState(), state)
            meta = self._tables["meta"]
            txn.put(b"registry_id", state.registry_id, db=meta)
            txn.put(b"audit_head", audit.FIRST_HEAD, db=meta)
            txn.put(b"format", FORMAT, db=meta)
            for name, value in notes.items():
                txn.put(name.encode(), value, db=meta)
            self._put_entries(txn, entries, state)

    def note(self, name: str) -> bytes | None:
        with self._env.begin() as txn:
            value = txn.get(name.encode(), db=self._tables["meta"])
            return None if value is None else bytes(value)

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        with self._writing() as txn:
            for name, value in notes.items():
                txn.put(name.encode(), value, db=self._tables["meta"])

    def entries(self) -> list[Entry]:
        """The whole audit log, oldest first."""
        with self._env.begin() as txn:
            return [
                (bytes(row[32:]), bytes(row[:32]))
                for _, row in txn.cursor(db=self._tables["audit"])
            ]

    def put_receipt_row(self, receipt_id: str, key: str, row: bytes) -> None:
        with self._writing() as txn:
            value = msgspec.msgpack.encode((receipt_id, key, row))
            txn.put(_receipt_key(receipt_id, key), value, db=self._tables[_RECEIPTS])

    def receipt_rows(self, receipt_id: str) -> dict[str, bytes]:
        prefix = _receipt_key(receipt_id)
        rows_: dict[str, bytes] = {}
        with self._env.begin() as txn, txn.cursor(db=self._tables[_RECEIPTS]) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                _, key, row = _RECEIPT.decode(cursor.value())
                rows_[key] = row
                found = cursor.next()
        return rows_

    def verified_audit_log(self) -> list[AuditRecord]:
        entries = self.entries()
        broken = audit.first_broken(entries, self._must("audit_head"))
        if broken is not None:
            raise Conflict(
                f"the audit log in {self._directory} does not hold at record {broken}: it was changed "
                "from outside. Keep the directory as evidence and restore the registry from a copy"
            )
        return list(audit.records(entries))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that is durable at the end of the block, or never was."""
        try:
            with self._env.begin(write=True) as txn:
                yield txn
                failpoint("registry.changed")
            failpoint("registry.committed")
        except (lmdb.MapFullError, lmdb.DiskError) as exc:
            raise NoSpace(f"the registry in {self._directory} is full: {exc}") from exc
        except (lmdb.Error, OSError) as exc:
            raise KVFabricError(f"cannot write the registry in {self._directory}: {exc}") from exc

    def _put_rows(self, txn: Any, before: RegistryState, after: RegistryState) -> None:
        for table, key, row in rows.changed(before, after):
            txn.put(key, row, db=self._tables[table])

    def _put_entries(self, txn: Any, entries: Sequence[Entry], after: RegistryState) -> None:
        for encoded, head in entries:
            sequence = audit.decode(encoded).sequence
            txn.put(_U64.pack(sequence), head + encoded, db=self._tables["audit"])
            txn.put(b"audit_head", head, db=self._tables["meta"])
        txn.put(b"version", _U64.pack(after.version), db=self._tables["meta"])

    def _check_unchanged(self, txn: Any, before: RegistryState) -> None:
        stored = txn.get(b"version", db=self._tables["meta"])
        if stored != _U64.pack(before.version):
            raise Conflict(
                f"the registry in {self._directory} was written by another process: "
                "two nodes must not share a state directory"
            )

    def _load(self) -> RegistryState:
        if self.note("format") != FORMAT:
            raise ConfigError(f"{self._directory} is not a registry of this version")
        with self._env.begin() as txn:
            tables = {name: list(txn.cursor(db=self._tables[name])) for name in rows.TABLES}
        return rows.to_state(
            self._must("registry_id"), _U64.unpack(self._must("version"))[0], tables
        )

    def _must(self, name: str) -> bytes:
        value = self.note(name)
        if value is None:
            raise ConfigError(f"the registry in {self._directory} has no {name}: it is damaged")
        return value


def read_audit_log(directory: Path) -> tuple[list[Entry], bytes]:
    """(entries, head), as they are; beside a process that has the registry open. Raises ConfigError."""
    try:
        with (
            lmdb.open(str(directory), max_dbs=8, readonly=True, create=False) as env,
            env.begin() as txn,
        ):
            tables = {
                name: env.open_db(name.encode(), txn, create=False) for name in ("meta", "audit")
            }
            head = txn.get(b"audit_head", audit.FIRST_HEAD, db=tables["meta"])
            rows_ = [
                (bytes(row[32:]), bytes(row[:32])) for _, row in txn.cursor(db=tables["audit"])
            ]
            return rows_, bytes(head)
    except lmdb.Error as exc:
        raise ConfigError(f"there is no registry to read in {directory}: {exc}") from exc
