"""What this node does about each change that takes something out of reach, and what it reports of it.

    state newer --> what left --> bytes of it are read from accounts, requests under it are watched
                                  for good: purged from both tiers, engines told to let go, SSD files unlinked
                             --> a row of the receipt, written anew whenever something moved

The reach of what is withdrawn ended before any of this, by the registry's state alone. What is under way
is kept in a file, so that a daemon that starts anew finishes it and its receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvfabric.daemon.auditor import Audit, Auditor
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.errors import KVFabricError, TransferError
from kvfabric.hashing import namespace_key, namespace_tag
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import Ping, Pong
from kvfabric.registry.base import Registry
from kvfabric.registry.receipts import (
    GONE,
    NOT_RESET,
    PENDING,
    RESET,
    UNAFFECTED,
    AuditRow,
    EngineRow,
    NodeRow,
)
from kvfabric.registry.state import PURGED, RegistryState, namespace_of
from kvfabric.registry.withdrawn import (
    Withdrawal,
    offboarded_tenants,
    offboarding,
    withdrawals,
)
from kvfabric.store.store import BlockStore
from kvfabric.types import SessionId, TenantId, adapter_scope, model_scope, tenant_scope

log = logging.getLogger(__name__)

_POLL_S = 0.05
_RETRY_S = 1.0
_AUDIT_S = 0.25
"""How long destruction waits for the auditor: it asks for some 16 chains, about a millisecond each."""
_SILENCE_S = 1.5
"""An engine that keeps a cache says within this time what it let go of: it pings each quarter of a second."""
_TOLD_BYTES = (8, 16)
"""Namespace tags and incarnations: an engine's cache knows no tenants."""
SILENT = "this engine does not say what its own cache holds"


class Pending(msgspec.Struct, frozen=True):
    """A withdrawal that is not finished, as the file has it. `holder`: under whose key its row is."""

    receipt_id: str
    holder: str
    version: int
    names: tuple[bytes, ...]
    for_good: bool
    row: NodeRow
    offboarded: TenantId | None = None


@dataclass(slots=True, eq=False)
class _Matter:
    """One withdrawal under way. `names`: see `is_made_of`. `offboarded`: the tenant whose keys go first."""

    receipt_id: str
    holder: str
    version: int
    names: frozenset[bytes]
    for_good: bool
    applied_at: float
    bytes_unreachable: int
    engines: dict[bytes, EngineRow]
    bytes_reclaimed: int = 0
    is_destroyed: bool = False
    destroyed_at: float = 0.0
    offboarded: TenantId | None = None
    keys_removed_at: float = 0.0
    keyring_generation: int = 0
    audit: Audit | None = None
    audited: AuditRow | None = None  # by an earlier life
    failure: str = ""
    written: NodeRow | None = None

    @property
    def is_final(self) -> bool:
        if self.audit is not None and not self.audit.is_done:
            return False
        drained = all(engine.drained_at for engine in self.engines.values())
        return drained and (not self.for_good or bool(self.destroyed_at))


class _Model(msgspec.Struct, frozen=True):
    """What engines of this node compute or did, as far as it is in a namespace."""

    name: str
    revision: str
    fingerprint: bytes
    adapter: str
    adapter_revision: str


@dataclass(slots=True)
class _Hbm:
    """What a session last said of its cache."""

    dropped: int = -1
    kept: str = ""


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What the withdrawals of a node work with. `changing`: held while store or keyring are changed in the
    background. `awaits_ssd`: whether there is to be an SSD tier that is not there yet. `wall_clock`: Unix
    seconds."""

    registry: Registry
    store: BlockStore
    sessions: Sessions
    keyring: Keyring
    node_id: str
    changing: asyncio.Lock
    file: Path
    models_file: Path
    awaits_ssd: Callable[[], bool]
    wall_clock: Callable[[], float]


@dataclass(slots=True)
class Withdrawals:
    """See the module. `run` it until the node stops; the server calls `heard` and `session_opened`.

    `auditor`: hears of each change that took something out of reach, before it is destroyed."""

    parts: NodeParts
    auditor: Auditor | None = None
    _matters: list[_Matter] = field(default_factory=list)
    _struck: list[tuple[int, frozenset[bytes]]] = field(default_factory=list)
    _version: int = 0
    _models: set[_Model] = field(default_factory=set)
    _hbm: dict[bytes, _Hbm] = field(default_factory=dict)
    _keeping: asyncio.Lock = field(default_factory=asyncio.Lock)
    _model_came: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._models = _read_models(self.parts.models_file)  # before anybody asks

    async def run(self) -> None:
        """Until cancelled. Then what is under way goes on with the next life."""
        parts = self.parts
        state = parts.registry.state
        purged = frozenset(t.incarnation for t in state.templates.values() if t.state == PURGED)
        self._struck.append((state.version, frozenset[bytes](purged)))
        self._version = state.version
        async with asyncio.TaskGroup() as group:
            self._resume(group)
            self._catch_up(group, state, purged)
            group.create_task(self._keep_models())
            while True:
                newer = await parts.registry.wait_newer(state.version)
                # Sync up to here: nothing can have been stored under the new state yet.
                for one in withdrawals(state, newer):
                    self._begin(group, one, state, newer.version)
                self._version, state = newer.version, newer

    # ------------------------------------------------------------------ what engines say

    def models(self) -> list[pb.Model]:
        """What engines of this node compute, or did as far as its file goes."""
        return [
            pb.Model(name=one.name, revision=one.revision, adapter=one.adapter)
            for one in self._models
        ]

    def session_opened(self, session: Session) -> None:
        hello = session.hello
        model = _Model(
            hello.model,
            hello.model_revision,
            session.fingerprint,
            hello.adapter,
            hello.adapter_revision,
        )
        if model not in self._models:
            self._models.add(model)
            self._model_came.set()

    def heard(self, session: bytes, ping: Ping) -> Pong:
        """An engine says what it let go of, and is told what else was struck off."""
        if ping.dropped < 0:
            return Pong(0, ())
        self._hbm[session] = _Hbm(ping.dropped, ping.kept)
        names = {name for at, names in self._struck if at > ping.dropped for name in names}
        return Pong(self._version, tuple(name for name in names if len(name) in _TOLD_BYTES))

    # ------------------------------------------------------------------ one withdrawal

    def _begin(
        self, group: asyncio.TaskGroup, one: Withdrawal, before: RegistryState, version: int
    ) -> None:
        parts = self.parts
        names = frozenset[bytes](one.incarnations) or frozenset(self._names(one, before))
        now = parts.wall_clock()
        running = parts.store.running(names)
        for_good = one.for_good
        matter = _Matter(
            receipt_id=one.receipt_id,
            holder=parts.registry.holder_id or parts.node_id,
            version=version,
            names=names,
            for_good=for_good,
            offboarded=one.offboarded,
            applied_at=now,
            bytes_unreachable=parts.store.bytes_of(names),
            engines={
                session.id: EngineRow(
                    session=session.id.hex()[:8],
                    engine_id=session.hello.engine_id,
                    running=running.get(session.id, 0),
                    drained_at=0.0 if session.id in running else now,
                    hbm=PENDING if for_good and names else UNAFFECTED,
                    detail="",
                )
                for session in parts.sessions.live()
            },
        )
        if self.auditor is not None and (one.incarnations or for_good):
            matter.audit = self.auditor.begin(one, names, before)
        self._start(group, matter)

    def _start(self, group: asyncio.TaskGroup, matter: _Matter) -> None:
        if matter.for_good and matter.names:
            self._struck.append((matter.version, matter.names))
        self._matters.append(matter)
        if self.auditor is not None and matter.audit is not None:
            group.create_task(self.auditor.follow(matter.audit))
        group.create_task(self._follow(matter))
        if matter.for_good:
            group.create_task(self._destroy(matter))

    def _catch_up(
        self, group: asyncio.TaskGroup, state: RegistryState, purged: frozenset[bytes]
    ) -> None:
        """What was withdrawn for good while this node was away: its reach ended. A tenant whose keys are here
        has a receipt that waits for this node's row; the rest nobody waits for."""
        rest = set(purged)
        resumed = {matter.offboarded for matter in self._matters}
        for tenant in offboarded_tenants(state) - resumed:
            if self.parts.keyring.has_keys(tenant):
                self._begin(group, offboarding(state, tenant), state, state.version)
            else:
                rest.add(tenant.encode())
        if rest:
            group.create_task(self._destroy_quietly(frozenset(rest)))

    def _names(self, one: Withdrawal, before: RegistryState) -> Iterable[bytes]:
        """Of a tenant, model or adapter: the namespaces in it, of whatever was or is computed here; as long
        as there are keys to tell them by."""
        if not one.for_good:
            return
        if one.offboarded is not None:
            yield one.offboarded.encode()
        for lineage in self.parts.store.lineages():
            if one.scope == tenant_scope(lineage.tenant):
                yield lineage.namespace_tag
        # 5 us each: an engine's own cache may hold what the tiers do not, and so may dead bytes on SSD.
        for model in self._models:
            is_whole = one.scope in (model_scope(model.revision), adapter_scope(model.adapter))
            for tenant in before.tenants:
                if is_whole or one.scope == tenant_scope(tenant):
                    with contextlib.suppress(KVFabricError):  # a tenant that is gone
                        yield self._tag(tenant, model, before)

    def _tag(self, tenant: TenantId, model: _Model, state: RegistryState) -> bytes:
        namespace = namespace_of(
            state,
            tenant,
            model.revision,
            model.fingerprint,
            model.adapter,
            model.adapter_revision,
        )
        return namespace_tag(namespace_key(namespace, self.parts.keyring.tenant_secret(tenant)))

    async def _follow(self, matter: _Matter) -> None:
        """Look until all of it has ended; write the row whenever something moved."""
        while True:
            self._look(matter)
            is_final = matter.is_final  # by what is written now: an audit may end meanwhile
            if await self._write(matter) and is_final:
                self._matters.remove(matter)
                await self._keep()
                return
            await asyncio.sleep(_POLL_S)

    def _look(self, matter: _Matter) -> None:
        parts = self.parts
        now = parts.wall_clock()
        running = parts.store.running(matter.names)
        live = {session.id for session in parts.sessions.live()}
        for session, row in list(matter.engines.items()):
            hbm, detail = self._hbm_of(matter, session, row, session in live, now)
            count = running.get(SessionId(session), 0)
            matter.engines[session] = msgspec.structs.replace(
                row,
                running=count,
                drained_at=row.drained_at or (0.0 if count else now),
                hbm=hbm,
                detail=detail,
            )
        left = parts.store.bytes_of(matter.names)
        matter.bytes_reclaimed = max(matter.bytes_reclaimed, matter.bytes_unreachable - left)
        is_told = all(row.hbm != PENDING for row in matter.engines.values())
        if matter.is_destroyed and is_told and not matter.destroyed_at:
            matter.destroyed_at = now

    def _hbm_of(
        self, matter: _Matter, session: bytes, row: EngineRow, is_live: bool, now: float
    ) -> tuple[str, str]:
        if row.hbm != PENDING:
            return row.hbm, row.detail
        if not is_live:
            return GONE, ""
        said = self._hbm.get(session, _Hbm())
        if said.dropped >= matter.version:
            return RESET, ""
        if said.kept:
            return NOT_RESET, said.kept
        if said.dropped < 0 and now > matter.applied_at + _SILENCE_S:
            return NOT_RESET, SILENT
        return PENDING, ""

    async def _destroy(self, matter: _Matter) -> None:
        if matter.audit is not None:  # it asks for what is there; what is not there proves little
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AUDIT_S):
                    await matter.audit.done.wait()
        while True:
            try:
                if matter.offboarded is not None and not matter.keys_removed_at:
                    await self._remove_keys(matter, matter.offboarded)
                await self._destroy_all(matter.names)
            except KVFabricError as exc:
                matter.failure = str(exc)
                await asyncio.sleep(_RETRY_S)
            else:
                matter.failure, matter.is_destroyed = "", True
                return

    async def _remove_keys(self, matter: _Matter, tenant: TenantId) -> None:
        """Before its bytes: what is encrypted on SSD cannot be read from here on."""
        keyring = self.parts.keyring
        async with self.parts.changing:
            await asyncio.to_thread(keyring.remove_tenants, [tenant])
        matter.keyring_generation = keyring.generation
        matter.keys_removed_at = self.parts.wall_clock()

    async def _destroy_all(self, names: frozenset[bytes]) -> None:
        """Both tiers, whoever reads; returns when it is durable. Raises KVFabricError."""
        store, is_left = self.parts.store, bool(names)
        while is_left:
            async with self.parts.changing:
                is_left = await store.purge_more(names)
            if is_left:
                await asyncio.sleep(_POLL_S)
        if self.parts.awaits_ssd():
            raise TransferError("the SSD tier is not there yet, and may hold bytes of it")
        if names:
            async with self.parts.changing:
                await store.destroy_sealed(names)

    async def _destroy_quietly(self, purged: Iterable[bytes]) -> None:
        """What was purged while this node was away: its reach ended, nobody waits for it."""
        said = ""
        while True:
            try:
                await self._destroy_all(frozenset(purged))
            except KVFabricError as exc:
                if str(exc) != said:
                    said = str(exc)
                    log.warning("purged blocks are left: %s", said)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    # ------------------------------------------------------------------ rows, and the file

    async def _write(self, matter: _Matter) -> bool:
        """Whether the registry has the row as it was at the call."""
        row = _row(matter, self.parts.node_id)
        if row == matter.written:
            return True
        try:
            await self.parts.registry.put_receipt_row(
                matter.receipt_id, matter.holder, msgspec.msgpack.encode(row)
            )
        except KVFabricError as exc:  # told again at the next look
            log.debug("receipt %s: %s", matter.receipt_id, exc)
            return False
        matter.written = row
        await self._keep()
        return True

    async def _keep(self) -> None:
        """On disk what is not final. A disk that refuses costs what a crash would cost: the receipt stays
        open, and what is purged is destroyed at the next start all the same."""
        async with self._keeping:
            pending = [
                Pending(
                    matter.receipt_id,
                    matter.holder,
                    matter.version,
                    tuple(sorted(matter.names)),
                    matter.for_good,
                    _row(matter, self.parts.node_id),
                    matter.offboarded,
                )
                for matter in self._matters
                if not matter.is_final
            ]
            try:
                await asyncio.to_thread(_replace, self.parts.file, msgspec.msgpack.encode(pending))
            except OSError as exc:
                log.warning("cannot write %s: %s", self.parts.file, exc.strerror)

    async def _keep_models(self) -> None:
        """Blocks of a model outlive its engines on SSD, and are to be found when it is withdrawn then."""
        try:
            while True:
                await self._model_came.wait()
                self._model_came.clear()
                await asyncio.to_thread(self._write_models, list(self._models))
        finally:
            if self._model_came.is_set():  # at the stop: it came just now
                self._write_models(list(self._models))

    def _write_models(self, known: list[_Model]) -> None:
        try:
            _replace(self.parts.models_file, msgspec.msgpack.encode(known))
        except OSError as exc:
            log.warning("cannot write %s: %s", self.parts.models_file, exc.strerror)

    def _resume(self, group: asyncio.TaskGroup) -> None:
        try:
            pending = msgspec.msgpack.decode(self.parts.file.read_bytes(), type=list[Pending])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as exc:
            log.warning("%s is of no use: %s", self.parts.file, exc)
            return
        for one in pending:
            row = one.row
            matter = _Matter(
                one.receipt_id,
                one.holder,
                one.version,
                frozenset(one.names),
                one.for_good,
                row.applied_at,
                row.bytes_unreachable,
                # Of an earlier life: who comes back is another session, and was told what is struck off.
                {engine.session.encode(): engine for engine in row.engines},
                row.bytes_reclaimed,
                offboarded=one.offboarded,
                keys_removed_at=row.keys_removed_at,
                keyring_generation=row.keyring_generation,
                audited=row.audit if row.audit and row.audit.result != PENDING else None,
            )
            self._start(group, matter)


def _row(matter: _Matter, node_id: str) -> NodeRow:
    return NodeRow(
        node_id=node_id,
        applied_at=matter.applied_at,
        bytes_unreachable=matter.bytes_unreachable,
        bytes_reclaimed=matter.bytes_reclaimed,
        destroyed_at=matter.destroyed_at,
        engines=tuple(matter.engines.values()),
        failure=matter.failure,
        keys_removed_at=matter.keys_removed_at,
        keyring_generation=matter.keyring_generation,
        audit=matter.audited if matter.audit is None else matter.audit.row(),
    )


def _read_models(path: Path) -> set[_Model]:
    """Blocking. Without the file, or with one of no use, models are known from their next engine on."""
    try:
        return set(msgspec.msgpack.decode(path.read_bytes(), type=list[_Model]))
    except FileNotFoundError:
        return set()
    except (OSError, msgspec.DecodeError) as exc:
        log.warning("%s is of no use: %s", path, exc)
        return set()


def _replace(path: Path, data: bytes) -> None:
    """Blocking: the file has these bytes, or those before. Raises OSError."""
    new = path.with_suffix(".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)  # all of it: a disk that becomes full takes a part first
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
