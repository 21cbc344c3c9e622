"""A holder's durable copy of the registry, and how copy and store become the same again.

Everything that is ever acted on is durable here first. `catch_up` takes what is new in the store; a store
that lost something gets it back from here before anybody acts on what it shows.

    store has no registry            it gets ours; if we have none either, a new one after two lease times
    its history holds all of ours    take the rest
    ours holds all of its            give it the rest (`merge.restored`)
    neither                          nothing that either side withdrew comes back (`merge.merged`)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvfabric.errors import ConfigError, Conflict, ConnectError, KVFabricError, Overloaded
from kvfabric.registry import audit, merge, rows
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.changes import Draft, initial_state
from kvfabric.registry.database import FLEET, Entry
from kvfabric.registry.redis.outside import REAL, Outside
from kvfabric.registry.redis.store import Position, Snapshot, Store
from kvfabric.registry.state import RegistryState

Value = TypeVar("Value")

NEVER = b"none"
TRIES = 32
_STORE_ID, _LEASE_MS = "store_id", "lease_ms"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """`fabric`: name of the fleet. `creates`: whether this holder may make a new registry. `who`: for the
    audit log of what is given back. `wall_clock`: Unix seconds.
    """

    fabric: str
    creates: bool
    who: str
    clock: Callable[[], float]
    wall_clock: Callable[[], float]


class RegistryCopy:
    """See the module. `changing` is held by whoever may change it; `state` is immutable and always whole.

    `is_own`: a registry that this node had for itself before it joined a fleet. `trusted`: the run of the
    store that was trusted last. `published` is called after each new state.
    """

    def __init__(
        self,
        home: Path,
        options: CopyOptions,
        *,
        lease_s: float,
        published: Callable[[], None],
        outside: Outside = REAL,
    ) -> None:
        self.database = outside.database(home)
        self.state = RegistryState()
        self.lease_s = lease_s
        self.trusted = NEVER
        self.is_own = False
        self.num_restores = 0
        self.misfit: ConfigError | None = None
        self.changing = asyncio.Lock()
        self._options = options
        self._published = published
        self._head = audit.FIRST_HEAD
        self._sequence = 0
        self._empty_since: float | None = None
        self._pool = outside.thread()

    def __repr__(self) -> str:
        return f"<RegistryCopy {self.database!r} at version {self.state.version}>"

    @property
    def position(self) -> Position:
        return Position(self.state.registry_id, self.state.version, self._head)

    async def open(self) -> None:
        """Raises ConfigError if it is not ours or another fleet's, Conflict if its log does not hold."""
        try:
            await self._in_pool(self._open)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """After the write that is under way."""
        self._pool.submit(self.database.close)
        self._pool.shutdown(wait=True)

    async def audit_log(self) -> list[AuditRecord]:
        return await self._in_pool(self.database.verified_audit_log)

    async def trust(self, store_id: bytes) -> None:
        """Note the store's run; only once two lease times are over: a restart must not cut them short."""
        notes = {
            _STORE_ID: store_id,
            FLEET: self._options.fabric.encode(),
            _LEASE_MS: str(round(self.lease_s * 1000)).encode(),
        }
        await self._in_pool(self.database.put_notes, notes)
        self.trusted, self.is_own = store_id, False

    def entry(self, draft: Draft[Any], requested_by: str) -> Entry:
        """The next link of the audit log."""
        encoded = audit.encode(self._record(draft, requested_by, self._sequence + 1))
        return encoded, audit.link(self._head, encoded)

    # ------------------------------------------------------------------ with the store

    async def write(self, store: Store, after: RegistryState, entries: list[Entry]) -> bool:
        """Commit to the store, find out whether it was made, then keep it. False: somebody was faster."""
        known = self.state.version > 0
        head = entries[-1][1] if entries else audit.FIRST_HEAD
        position = Position(after.registry_id, after.version, head)
        try:
            made = await store.commit(
                self.position if known else None,
                position,
                changed=rows.changed(self.state, after),
                entries=entries,
                lease_s=self.lease_s,
            )
        except ConnectError as exc:
            made = await _was_made(store, position, exc)
        if made and known:
            await self._append(after, entries)
        elif made:
            await self._replace(after, entries)
        return made

    async def catch_up(self, store: Store) -> None:
        """Make store and copy the same. Hold `changing`."""
        for _ in range(TRIES):
            found = await store.load(self._sequence)
            if found is None:
                settled = await self._fill_empty(store)
            elif found.state.registry_id != self.state.registry_id:
                settled = await self._meet_other(store, found)
            elif self._extends(found):
                await self._take(found)
                settled = True
            else:
                settled = await self._give_back(store, found)
            if settled:
                return
        raise Overloaded("the registry changes all the time: try again")

    def _extends(self, found: Snapshot) -> bool:
        """Whether the store's history holds all of ours."""
        if not self._sequence:
            return True
        return bool(found.entries) and found.entries[0][1] == self._head

    async def _take(self, found: Snapshot) -> None:
        entries = found.entries[1:] if self._sequence else found.entries
        head = self._head
        for record, claimed in entries:
            head = audit.link(head, record)
            if head != claimed:
                raise Conflict("the directory's audit log does not hold: it was changed by hand")
        if entries:
            await self._append(found.state, entries)

    async def _fill_empty(self, store: Store) -> bool:
        if self.state.version:
            return await self._restore(store, await self._entries(), None)
        now = self._options.clock()
        self._empty_since = now if self._empty_since is None else self._empty_since
        if not self._options.creates or now - self._empty_since < 2 * self.lease_s:
            raise Conflict("the directory is empty: waiting for a holder that knows better")
        return await self.write(store, initial_state(), [])

    async def _meet_other(self, store: Store, found: Snapshot) -> bool:
        """The registry of somebody else: the first one we see, or made while ours was away."""
        if self.is_own:
            self.misfit = ConfigError(
                f"{self.database!r} holds a registry of this node's own, and the directory another "
                "one: start this node with a new state_dir (its cache starts empty)"
            )
            raise self.misfit
        if self.state.version:
            return await self._give_back(store, found)
        whole = await store.load(1)
        if whole is None:
            return False
        await self._replace(whole.state, whole.entries)
        return True

    async def _give_back(self, store: Store, found: Snapshot) -> bool:
        whole = await store.load(1)
        if whole is None or whole.position != found.position:
            return False
        mine = await self._entries()
        common = merge.common_length(mine, whole.entries)
        same = whole.state.registry_id == self.state.registry_id
        if same and common == len(whole.entries):
            return await self._restore(store, mine[common:], whole.position)
        return await self._merge(store, mine[common:], whole)

    async def _restore(self, store: Store, lost: list[Entry], at: Position | None) -> bool:
        """The store has an older part of our history, or none: it gets the rest."""
        draft = merge.restored(self.state)
        entry = self.entry(draft, self._options.who)
        made = await store.commit(
            at,
            Position(draft.state.registry_id, draft.state.version, entry[1]),
            changed=rows.changed(RegistryState(), draft.state),
            entries=[*lost, entry],
            lease_s=self.lease_s,
        )
        if made:
            if self.is_own:
                _log.info("the directory was empty: this node's own registry is the fleet's now")
            else:
                _log.error("the directory had lost %d changes: they were given back", len(lost))
                self.num_restores += 1
            await self._append(draft.state, [entry])
        return made

    async def _merge(self, store: Store, lost: list[Entry], whole: Snapshot) -> bool:
        draft = merge.merged(self.state, whole.state)
        records = [
            msgspec.structs.replace(old, detail=f"{old.detail} (recovered)".strip())
            for old in map(audit.decode, (record for record, _ in lost))
        ]
        records.append(self._record(draft, self._options.who, 0))
        entries, head = list(whole.entries), whole.position.head
        for record in records:
            encoded = audit.encode(msgspec.structs.replace(record, sequence=len(entries) + 1))
            head = audit.link(head, encoded)
            entries.append((encoded, head))
        made = await store.commit(
            whole.position,
            Position(draft.state.registry_id, draft.state.version, head),
            changed=rows.changed(whole.state, draft.state),
            entries=entries[len(whole.entries) :],
            lease_s=self.lease_s,
        )
        if made:
            _log.error("the directory went on without %d changes: merged", len(lost))
            self.num_restores += 1
            await self._replace(draft.state, entries)
        return made

    # ------------------------------------------------------------------ the file

    async def _append(self, state: RegistryState, entries: Sequence[Entry]) -> None:
        try:
            await self._in_pool(self.database.append, self.state, state, entries)
        except Conflict:
            # The daemon that this one took over from may have written last: go on from there.
            self.state, self._head, self._sequence = await self._in_pool(self.database.load)
            self._published()
            raise
        if self.is_own:
            await self._in_pool(self.database.put_notes, {FLEET: self._options.fabric.encode()})
            self.is_own = False
        self._publish(state, self._sequence + len(entries), entries)

    async def _replace(self, state: RegistryState, entries: Sequence[Entry]) -> None:
        notes: Mapping[str, bytes] = {FLEET: self._options.fabric.encode(), _STORE_ID: self.trusted}
        await self._in_pool(self.database.replace, state, entries, notes)
        self._head = audit.FIRST_HEAD
        self._publish(state, len(entries), entries)

    def _publish(self, state: RegistryState, sequence: int, entries: Sequence[Entry]) -> None:
        self.state, self._sequence = state, sequence
        self._head = entries[-1][1] if entries else self._head
        self._empty_since = None
        self._published()

    def _open(self) -> None:
        self.state, self._head, self._sequence = self.database.open(create=False)
        fleet = self.database.note(FLEET) or b""
        self.is_own = not fleet and self.state.version > 0
        if fleet and fleet != self._options.fabric.encode():
            raise ConfigError(
                f"{self.database!r} belongs to fabric {fleet.decode()!r}, not to "
                f"{self._options.fabric!r}: a node that moves gets a new state_dir"
            )
        self.trusted = self.database.note(_STORE_ID) or NEVER
        self.lease_s = int(self.database.note(_LEASE_MS) or 0) / 1000 or self.lease_s

    async def _entries(self) -> list[Entry]:
        return await self._in_pool(self.database.entries)

    async def _in_pool(self, work: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _record(self, draft: Draft[Any], who: str, sequence: int) -> AuditRecord:
        return AuditRecord(
            sequence=sequence,
            at=self._options.wall_clock(),
            who=who,
            action=draft.action,
            scope=draft.scope,
            detail=draft.detail,
            old_epoch=draft.old_epoch,
            new_epoch=draft.new_epoch,
            version=draft.state.version,
        )


async def _was_made(store: Store, position: Position, cause: ConnectError) -> bool:
    """A commit got no answer. Raises if it cannot be known: it may still be made then."""
    try:
        found = await store.position()
    except KVFabricError:
        found = None
    if found == position:
        return True
    raise ConnectError(
        f"{cause}. The change may still be made: `kvfabric status` and the audit log show"
    ) from cause
