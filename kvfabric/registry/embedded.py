"""The registry of a node of its own: LMDB in the state directory. No other process may change it.

One database file holds rows and audit log, so a change and its link in the chain are one transaction:
both are there after a crash, or neither. Each commit is fsync'd, in a pool of one thread; the state that
everybody reads is rebuilt at open and replaced on the event loop once a commit is durable.

    meta       registry_id, version (u64), audit_head, format
    epochs     scope -> MessagePack (epoch, incarnation or empty)
    tenants    tenant id -> MessagePack Tenant
    templates  SHA-256 of MessagePack (name, version) -> MessagePack TemplateVersion
    audit      sequence (u64, big-endian) -> head (32 B), MessagePack AuditRecord
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import lmdb
import msgspec

from kvfabric.errors import ClosedError, ConfigError, Conflict, KVFabricError, NoSpace
from kvfabric.failpoints import failpoint
from kvfabric.registry import audit
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.base import Change, Registry
from kvfabric.registry.changes import Draft, initial_state
from kvfabric.registry.state import PURGED, RegistryState, TemplateVersion, Tenant
from kvfabric.types import Incarnation, TenantId

Result = TypeVar("Result")
Row = TypeVar("Row")

FORMAT = b"kvfabric-registry-1"
_MAP_BYTES = 1 << 30  # of address space: the file grows as needed
_U64 = struct.Struct(">Q")
_EPOCH = msgspec.msgpack.Decoder(tuple[int, bytes])
_TENANT = msgspec.msgpack.Decoder(Tenant)
_TEMPLATE = msgspec.msgpack.Decoder(TemplateVersion)


class EmbeddedRegistry(Registry):
    """See the module. `wall_clock`: Unix seconds, for the audit log."""

    def __init__(self, directory: Path, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = _Database(directory)
        self._wall_clock = wall_clock
        self._pool: ThreadPoolExecutor | None = None
        self._state = RegistryState()
        self._head = audit.FIRST_HEAD
        self._sequence = 0
        self._news = asyncio.Event()
        self._writing: asyncio.Future[bytes] | None = None

    def __repr__(self) -> str:
        state = self._state
        return f"<EmbeddedRegistry {state.registry_id.hex()[:8]} version {state.version}>"

    async def __aenter__(self) -> Self:
        """Open or make it. Raises ConfigError if it is not ours, Conflict if the audit log does not hold."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvfabric-registry")
        try:
            loop = asyncio.get_running_loop()
            opened = await loop.run_in_executor(self._pool, self._database.open)
        except BaseException:
            self._pool.shutdown(wait=True)
            raise
        self._state, self._head, self._sequence = opened
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Ends after the commit under way, if there is one."""
        assert self._pool is not None
        self._pool.submit(self._database.close)
        pool, self._pool = self._pool, None
        pool.shutdown(wait=True)

    @property
    def state(self) -> RegistryState:
        return self._state

    async def wait_newer(self, version: int) -> RegistryState:
        while self._state.version <= version:
            await self._news.wait()
        return self._state

    async def commit(
        self, decide: Callable[[RegistryState], Draft[Result]], requested_by: str
    ) -> tuple[Result, Change]:
        # One change at a time. The future belongs to nobody who could be cancelled: a change that was
        # handed to the disk is published when it is durable, whether or not its caller still waits.
        while self._writing is not None:
            await asyncio.wait([self._writing])
        if self._pool is None:
            raise ClosedError("the registry is closed")
        draft = decide(self._state)
        record = self._record(draft, requested_by)
        writing = asyncio.get_running_loop().run_in_executor(
            self._pool, self._database.write, self._state, draft.state, record
        )
        self._writing = writing
        writing.add_done_callback(lambda done: self._written(done, draft.state))
        await asyncio.wait([writing])
        head = writing.result()
        change = Change(
            draft.action, draft.scope, draft.old_epoch, draft.new_epoch, draft.state.version, head
        )
        return draft.result, change

    async def audit_log(self) -> list[AuditRecord]:
        if self._pool is None:
            raise ClosedError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._database.verified_audit_log
        )

    def _record(self, draft: Draft[Any], requested_by: str) -> AuditRecord:
        return AuditRecord(
            sequence=self._sequence + 1,
            at=self._wall_clock(),
            who=requested_by,
            action=draft.action,
            scope=draft.scope,
            detail=draft.detail,
            old_epoch=draft.old_epoch,
            new_epoch=draft.new_epoch,
            version=draft.state.version,
        )

    def _written(self, done: asyncio.Future[bytes], state: RegistryState) -> None:
        self._writing = None
        if done.cancelled() or done.exception() is not None:
            return
        self._state, self._head, self._sequence = state, done.result(), self._sequence + 1
        news, self._news = self._news, asyncio.Event()
        news.set()


class _Database:
    """The file. Every method blocks; all are called in one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._env: Any = None
        self._tables: dict[str, Any] = {}

    def open(self) -> tuple[RegistryState, bytes, int]:
        """(state, audit head, number of audit records)."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._env = lmdb.open(
                str(self._directory), map_size=_MAP_BYTES, max_dbs=8, mode=0o600, lock=True
            )
            for name in ("meta", "epochs", "tenants", "templates", "audit"):
                self._tables[name] = self._env.open_db(name.encode())
        except (OSError, lmdb.Error) as exc:
            self.close()
            raise ConfigError(f"cannot open the registry in {self._directory}: {exc}") from exc
        try:
            if self._meta("format") is None:
                self._create(initial_state())
            state = self._load()
            return state, self._must("audit_head"), len(self.verified_audit_log())
        except (msgspec.DecodeError, lmdb.Error) as exc:
            self.close()
            raise ConfigError(f"the registry in {self._directory} is damaged: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def write(self, before: RegistryState, after: RegistryState, record: AuditRecord) -> bytes:
        """Make `after` durable if `before` is what the file holds; returns the new audit head."""
        _check_forward(before, after)
        try:
            with self._env.begin(write=True) as txn:
                self._check_unchanged(txn, before)
                self._put_rows(txn, before, after)
                encoded = audit.encode(record)
                head = audit.link(txn.get(b"audit_head", db=self._tables["meta"]), encoded)
                txn.put(_U64.pack(record.sequence), head + encoded, db=self._tables["audit"])
                txn.put(b"audit_head", head, db=self._tables["meta"])
                txn.put(b"version", _U64.pack(after.version), db=self._tables["meta"])
                failpoint("registry.changed")
            failpoint("registry.committed")
        except (lmdb.MapFullError, lmdb.DiskError) as exc:
            raise NoSpace(f"the registry in {self._directory} is full: {exc}") from exc
        except (lmdb.Error, OSError) as exc:
            raise KVFabricError(f"cannot write the registry in {self._directory}: {exc}") from exc
        return head

    def verified_audit_log(self) -> list[AuditRecord]:
        entries = list(self._audit_entries())
        broken = audit.first_broken(entries, self._must("audit_head"))
        if broken is not None:
            raise Conflict(
                f"the audit log in {self._directory} does not hold at record {broken}: it was changed "
                "from outside. Keep the directory as evidence and restore the registry from a copy"
            )
        return list(audit.records(entries))

    def _create(self, state: RegistryState) -> None:
        with self._env.begin(write=True) as txn:
            self._put_rows(txn, RegistryState(), state)
            meta = self._tables["meta"]
            txn.put(b"registry_id", state.registry_id, db=meta)
            txn.put(b"version", _U64.pack(state.version), db=meta)
            txn.put(b"audit_head", audit.FIRST_HEAD, db=meta)
            txn.put(b"format", FORMAT, db=meta)

    def _put_rows(self, txn: Any, before: RegistryState, after: RegistryState) -> None:
        incarnations = after.scope_incarnations
        for scope, epoch in _changed(before.epochs, after.epochs):
            row = msgspec.msgpack.encode((epoch, incarnations.get(scope, b"")))
            txn.put(scope.encode(), row, db=self._tables["epochs"])
        for tenant_id, tenant in _changed(before.tenants, after.tenants):
            row = msgspec.msgpack.encode(tenant)
            txn.put(tenant_id.encode(), row, db=self._tables["tenants"])
        for name, template in _changed(before.templates, after.templates):
            row = msgspec.msgpack.encode(template)
            txn.put(_template_key(name), row, db=self._tables["templates"])

    def _check_unchanged(self, txn: Any, before: RegistryState) -> None:
        stored = txn.get(b"version", db=self._tables["meta"])
        if stored != _U64.pack(before.version):
            raise Conflict(
                f"the registry in {self._directory} was written by another process: "
                "two nodes must not share a state directory"
            )

    def _load(self) -> RegistryState:
        if self._meta("format") != FORMAT:
            raise ConfigError(f"{self._directory} is not a registry of this version")
        with self._env.begin() as txn:
            rows = {name: list(txn.cursor(db=self._tables[name])) for name in self._tables}
        epochs = {bytes(scope).decode(): _EPOCH.decode(row) for scope, row in rows["epochs"]}
        tenants = [_TENANT.decode(row) for _, row in rows["tenants"]]
        templates = [_TEMPLATE.decode(row) for _, row in rows["templates"]]
        return RegistryState(
            registry_id=self._must("registry_id"),
            version=_U64.unpack(self._must("version"))[0],
            epochs=MappingProxyType({scope: epoch for scope, (epoch, _) in epochs.items()}),
            tenants=MappingProxyType({TenantId(t.tenant_id): t for t in tenants}),
            templates=MappingProxyType({(t.name, t.version): t for t in templates}),
            scope_incarnations=MappingProxyType(
                {scope: Incarnation(value) for scope, (_, value) in epochs.items() if value}
            ),
        )

    def _audit_entries(self) -> Iterator[tuple[bytes, bytes]]:
        with self._env.begin() as txn:
            for _, row in txn.cursor(db=self._tables["audit"]):
                yield bytes(row[32:]), bytes(row[:32])

    def _meta(self, name: str) -> bytes | None:
        with self._env.begin() as txn:
            value = txn.get(name.encode(), db=self._tables["meta"])
            return None if value is None else bytes(value)

    def _must(self, name: str) -> bytes:
        value = self._meta(name)
        if value is None:
            raise ConfigError(f"the registry in {self._directory} has no {name}: it is damaged")
        return value


def _check_forward(before: RegistryState, after: RegistryState) -> None:
    """Whatever made `after`: no epoch and no version goes back, and what was purged stays purged."""
    back = [scope for scope, epoch in before.epochs.items() if after.epoch(scope) < epoch]
    if back or after.version <= before.version or after.registry_id != before.registry_id:
        raise Conflict(f"epochs never go back: {', '.join(back) or 'registry version'} would")
    for name, template in before.templates.items():
        if template.state == PURGED and after.templates.get(name) != template:
            raise Conflict(f"template {' '.join(name)} was purged for good")


def _changed(before: Mapping[Any, Row], after: Mapping[Any, Row]) -> Iterator[tuple[Any, Row]]:
    return ((key, row) for key, row in after.items() if before.get(key) != row)


def _template_key(name: tuple[str, str]) -> bytes:
    # LMDB keys have at most 511 bytes.
    return hashlib.sha256(msgspec.msgpack.encode(name)).digest()
