"""`RedisRegistry`: one process's view of a fleet's registry, its epoch lease, and its share in keeping it.

    renew every quarter of a lease, and at once on news
       position in the store = ours? -- no --> `RegistryCopy.catch_up`
       record of the applied version there? -- no --> write it: that acknowledges the change
       lease, counted from before the renewal was sent

Nobody trusts another run of the store for two lease times: until then every holder that lives has been
there, and has given back what it saw. What a change waits for is in `reached`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from kvfabric.errors import (
    AccessError,
    CapacityError,
    ClosedError,
    Conflict,
    ConnectError,
    KVFabricError,
    Overloaded,
)
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.base import Change, Registry, RegistryStatus
from kvfabric.registry.changes import Draft, check_forward
from kvfabric.registry.holders import GRACE_S, Ack
from kvfabric.registry.lease import EpochLease
from kvfabric.registry.redis.address import DirectoryAddress
from kvfabric.registry.redis.copy import TRIES, CopyOptions, RegistryCopy
from kvfabric.registry.redis.outside import REAL, Outside
from kvfabric.registry.redis.store import HolderRow, Store
from kvfabric.registry.router_load import check_row
from kvfabric.registry.state import RegistryState

Result = TypeVar("Result")
Value = TypeVar("Value")

RENEWALS = 4
"""For each lease time."""
FIRST_ANSWER_S = 2.0
LEAVE_S = 1.0
FORGET_AFTER_LEASES = 5
"""A holder that has not renewed for so many lease times is struck off."""
WATCHED_NODES = 3
_POLL_S = 0.1

_REASONS = (
    (AccessError, "denied"),
    (CapacityError, "no_space"),
    (ConnectError, "unreachable"),
    (Conflict, "conflict"),
)

_log = logging.getLogger(__name__)


class HolderRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a holder says of itself. `address`: where its gRPC is, of a node: `unix:PATH` or `HOST:PORT`."""

    holder_id: str
    kind: str
    name: str
    address: str
    applied_version: int


@dataclass(frozen=True, slots=True)
class Holder:
    """Who this process is. `before_ack`: awaited before a newer version is acknowledged."""

    kind: str
    name: str
    address: str = ""
    before_ack: Callable[[], Awaitable[None]] | None = None


class RedisRegistry(Registry):
    """See the module.

    `home`: directory of the durable copy. `lease_s` is that of a registry which is made here; otherwise the
    registry's own counts. A router never makes one.
    """

    grace_s = GRACE_S
    """Beyond a lease, before a holder that does not answer is believed to have stopped."""

    def __init__(
        self,
        address: DirectoryAddress,
        home: Path,
        *,
        holder: Holder,
        lease_s: float = 2.0,
        outside: Outside = REAL,
    ) -> None:
        self._address = address
        self._outside = outside
        self.wall_clock = outside.wall_clock
        self._holder = holder
        self.holder_id = f"{holder.name}.{secrets.token_hex(4)}"
        self._clock = outside.clock
        options = CopyOptions(
            fabric=address.fabric,
            creates=holder.kind == "node",
            who=self.holder_id,
            clock=outside.clock,
            wall_clock=outside.wall_clock,
        )
        self._copy = RegistryCopy(
            home, options, lease_s=lease_s, published=self._published, outside=outside
        )
        self.lease = EpochLease(self._clock)
        self._store: Store | None = None
        self._news, self._wake, self._heard = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._answered = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._holders: tuple[HolderRecord, ...] = ()
        self._beats: dict[str, tuple[int, float]] = {}
        self._problem = "it has not answered yet"
        self._errors: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<RedisRegistry {self.holder_id} at version {self._copy.state.version}>"

    async def __aenter__(self) -> Self:
        """Open the copy and ask the store, for at most 2 s; without an answer it starts without a lease.

        Raises ConfigError if the copy is not ours or of another fleet, Conflict if its audit log does not
        hold.
        """
        if self._address.is_plain_tcp:
            _log.warning(
                "INSECURE: %s is plain TCP: whoever is on the way changes epochs",
                self._address.shown,
            )
        await self._copy.open()
        self.lease = EpochLease(self._clock, store_id=self._copy.trusted)
        try:
            self._store = Store(self._address, lease_s=self._copy.lease_s, outside=self._outside)
        except BaseException:
            self._copy.close()
            raise
        await self._group.__aenter__()
        loops = (self._hold(), self._listen(), self._look_around())
        self._tasks = [self._group.create_task(one) for one in loops]
        try:
            await self._first_answer()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Gives the lease up first, so that nobody waits for this holder."""
        store, self._store = self._store, None
        if store is None:
            return
        running = set(self._tasks)
        while running:  # an answer of Redis that comes at the same time swallows a cancellation
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)
        try:
            # What else the block raised is not ours: it goes its own way.
            stopped = (
                exc[1] if len(exc) > 1 and isinstance(exc[1], asyncio.CancelledError) else None
            )
            await self._group.__aexit__(type(stopped) if stopped else None, stopped, None)
        finally:
            with contextlib.suppress(KVFabricError, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await store.remove_holder(self.holder_id)
            await store.aclose()
            self._copy.close()

    async def _first_answer(self) -> None:
        """Raises ConfigError if copy and store can never belong together."""
        patience_s = FIRST_ANSWER_S + (0 if self._copy.state.version else 2 * self._copy.lease_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._answered.wait()
        if self._copy.misfit is not None:
            raise self._copy.misfit

    def _published(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
        self._wake.set()

    # ------------------------------------------------------------------ what holders ask

    @property
    def state(self) -> RegistryState:
        return self._copy.state

    def usable(self) -> RegistryState | None:
        return self._copy.state if self.lease.allows(self._copy.state) else None

    async def wait_newer(self, version: int) -> RegistryState:
        while self._copy.state.version <= version:
            await self._news.wait()
        return self._copy.state

    @property
    def holders(self) -> tuple[HolderRecord, ...]:
        """Everybody registered within the last second, `applied_version` as it was when they were first seen:
        `everybody` asks."""
        return self._holders

    async def everybody(self) -> tuple[HolderRecord, ...]:
        """As `holders`, asked now. Raises KVFabricError if the store does not answer."""
        records = (_record(row) for row in await self._there.holders())
        return tuple(record for record in records if record is not None)

    @property
    def status(self) -> RegistryStatus:
        waits = self.lease.quiet_s > 0 and not self._problem
        return RegistryStatus(
            home=self._address.shown,
            state="serving" if self.usable() else "new_store" if waits else "no_lease",
            detail=self._problem,
            lease_left_s=self.lease.left_s,
            num_holders=len(self._holders),
            num_restores=self._copy.num_restores,
            num_errors=dict(self._errors),
        )

    # ------------------------------------------------------------------ changes

    async def commit(
        self, decide: Callable[[RegistryState], Draft[Result]], requested_by: str
    ) -> tuple[Result, Change]:
        if self._store is None:
            raise ClosedError("the registry is closed")
        # In a task of its own: a caller that goes away does not leave half a change behind.
        done: asyncio.Future[tuple[Result, Change]] = asyncio.get_running_loop().create_future()
        self._group.create_task(self._commit_into(done, decide, requested_by))
        await asyncio.wait([done])
        return done.result()

    async def _commit_into(
        self,
        done: asyncio.Future[tuple[Result, Change]],
        decide: Callable[[RegistryState], Draft[Result]],
        requested_by: str,
    ) -> None:
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            result = await self._commit(decide, requested_by)
        except asyncio.CancelledError:
            done.set_exception(
                ClosedError("the registry was closed: the change may be made or not")
            )
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the caller's
            done.set_exception(exc)
        else:
            done.set_result(result)

    async def _commit(
        self, decide: Callable[[RegistryState], Draft[Result]], requested_by: str
    ) -> tuple[Result, Change]:
        async with self._copy.changing:
            await self._check_durable()
            for _ in range(TRIES):
                if await self._there.position() != self._copy.position:
                    await self._copy.catch_up(self._there)
                draft = decide(self._copy.state)
                check_forward(self._copy.state, draft.state)
                entry = self._copy.entry(draft, requested_by)
                if await self._copy.write(self._there, draft.state, [entry]):
                    break
            else:
                raise Overloaded("the registry changes all the time: ask again")
        await self._there.commit_replicated()
        change = Change(
            draft.action,
            draft.scope,
            draft.old_epoch,
            draft.new_epoch,
            draft.state.version,
            entry[1],
        )
        return draft.result, change

    async def audit_log(self) -> list[AuditRecord]:
        """Of the copy, which is as new as `state`."""
        if self._store is None:
            raise ClosedError("the registry is closed")
        return await self._copy.audit_log()

    async def put_receipt_row(self, receipt_id: str, key: str, row: bytes) -> None:
        await self._there.put_receipt_row(receipt_id, key, row)

    async def receipt_rows(self, receipt_id: str) -> dict[str, bytes]:
        return await self._there.receipt_rows(receipt_id)

    async def exchange_load(self, router: str, row: bytes) -> list[bytes]:
        """Tell the other routers, and hear what they told last. Raises KVFabricError: then nobody heard."""
        check_row(router, row)
        return await self._there.exchange_load(router, row)

    @property
    def tracks_holders(self) -> bool:
        return True

    async def reached(self, version: int) -> list[Ack]:
        # A renewal under an older version came before the change, which came before this: whatever lease
        # it gave is over one lease time from now, on anybody's clock.
        ends = self._clock() + self._copy.lease_s + self.grace_s
        acks: dict[str, Ack] = {}
        pending: dict[str, str] = {"unknown": "holders that the directory did not name"}
        while True:
            self._heard.clear()
            with contextlib.suppress(KVFabricError):
                pending = await self._pending(version, acks)
            now = self._clock()
            if not pending:
                return list(acks.values())
            if now >= ends:
                late = (Ack(one, kind, now, waited_out=True) for one, kind in pending.items())
                return [*acks.values(), *late]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_POLL_S, ends - now)):
                    await self._heard.wait()

    async def _pending(self, version: int, acks: dict[str, Ack]) -> dict[str, str]:
        """Holder id -> kind of who has not applied `version`; the others go into `acks`."""
        pending = {}
        for row in await self._there.holders():
            record = _record(row)
            if record is None:
                pending[row.holder_id] = "unknown"
            elif record.applied_version < version:
                pending[row.holder_id] = record.kind
            else:
                ack = Ack(row.holder_id, record.kind, self._clock())
                acks.setdefault(row.holder_id, ack)
        return pending

    # ------------------------------------------------------------------ the lease

    async def _hold(self) -> None:
        """Renew for ever. Errors end no lease early and lengthen none."""
        failures = 0
        while self._store is not None:
            self._wake.clear()
            try:
                again = await self._renew()
            except KVFabricError as exc:
                self._failed(exc)
                failures += 1
                again = False
            else:
                failures = 0
            if again:
                continue
            pause = self._copy.lease_s / RENEWALS
            if failures:
                pause = min(pause, 0.02 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(pause)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _renew(self) -> bool:
        """One renewal; True if another is due at once."""
        sent_at = self._sent_at()
        renewal = await self._there.renew(self.holder_id)
        if not renewal.is_primary:
            raise ConnectError("the directory is a replica: its primary is elsewhere")
        if renewal.position is None or renewal.position != self._copy.position:
            async with self._copy.changing:
                await self._copy.catch_up(self._there)
            return True
        version, record = self._copy.state.version, self._record()
        if renewal.record != record:
            if self._holder.before_ack is not None:
                await self._holder.before_ack()
            if self._copy.state.version != version:
                return True
            sent_at = self._sent_at()
            renewal = await self._there.register(self.holder_id, record)
            if renewal.position != self._copy.position or self._copy.state.version != version:
                return True
        await self._there.lease_replicated()
        self._copy.lease_s = renewal.lease_s or self._copy.lease_s
        self.lease.renewed(
            sent_at=sent_at,
            registry_id=self._copy.state.registry_id,
            ttl_s=self._copy.lease_s,
            version=version,
            store_id=renewal.store_id,
        )
        self._succeeded()
        if renewal.store_id != self._copy.trusted and not self.lease.quiet_s:
            await self._copy.trust(renewal.store_id)
        return False

    def _sent_at(self) -> float:
        return self._clock()

    def _record(self) -> bytes:
        holder = self._holder
        record = HolderRecord(
            self.holder_id, holder.kind, holder.name, holder.address, self._copy.state.version
        )
        return msgspec.msgpack.encode(record)

    async def _listen(self) -> None:
        """News make renewals and acknowledgements prompt; the lease holds without them."""
        while self._store is not None:
            with contextlib.suppress(KVFabricError):
                async for channel in self._there.news():
                    (self._heard if channel == "acks" else self._wake).set()
            await asyncio.sleep(self._copy.lease_s / RENEWALS * random.uniform(0.5, 1.0))

    async def _look_around(self) -> None:
        """Who else is there. Nodes strike off who has not renewed for several lease times.

        Everybody asks for the names, which is one command, and for the records of those that are new; a node
        watches its neighbours' heartbeats: what a fleet asks of its directory grows with its size, not with
        the square of it.
        """
        known: dict[str, HolderRecord] = {}
        while self._store is not None:
            with contextlib.suppress(KVFabricError):
                ids = await self._there.holder_ids()
                for row in await self._there.holders([one for one in ids if one not in known]):
                    if (record := _record(row)) is not None:
                        known[row.holder_id] = record
                known = {one: known[one] for one in ids if one in known}
                self._holders = tuple(known.values())
                if self._holder.kind == "node":
                    watched = neighbours(ids, known, self.holder_id)
                    await self._forget_silent(await self._there.holders(watched))
            await asyncio.sleep(min(1.0, self._copy.lease_s / 2))

    async def _forget_silent(self, found: Sequence[HolderRow]) -> None:
        now = self._clock()
        before, self._beats = self._beats, {}
        for row in found:
            beat, since = before.get(row.holder_id, (row.heartbeat, now))
            self._beats[row.holder_id] = (row.heartbeat, since if beat == row.heartbeat else now)
        for row in found:
            if now - self._beats[row.holder_id][1] > FORGET_AFTER_LEASES * self._copy.lease_s:
                _log.info("holder %s has not renewed: struck off", row.holder_id)
                await self._there.remove_holder(row.holder_id, row.heartbeat)

    # ------------------------------------------------------------------ small things

    @property
    def _there(self) -> Store:
        if self._store is None:
            raise ClosedError("the registry is closed")
        return self._store

    async def _check_durable(self) -> None:
        """Raises Conflict if this Redis would forget a change at its next restart."""
        problem = await self._there.durability()
        if problem:
            raise Conflict(f"changes need a directory that keeps them: {problem}")

    def _failed(self, error: KVFabricError) -> None:
        reason = next((text for kind, text in _REASONS if isinstance(error, kind)), "failed")
        self._errors[reason] += 1
        if error is self._copy.misfit:
            self._answered.set()
        if str(error) != self._problem:
            _log.warning("registry: %s", error)
        self._problem = str(error)

    def _succeeded(self) -> None:
        if self._problem:
            _log.info(
                "registry: %s answers, version %d", self._address.shown, self._copy.state.version
            )
        self._problem = ""
        self._answered.set()


def neighbours(ids: Sequence[str], known: Mapping[str, HolderRecord], own: str) -> list[str]:
    """Whom a node watches: those that follow it in the order of `ids`, around the end, up to the
    `WATCHED_NODES`-th node among them. So each is watched by so many nodes, and all by fewer."""
    if own not in ids:
        return []
    at, nodes, watched = list(ids).index(own), 0, []
    for one in (*ids[at + 1 :], *ids[:at]):
        watched.append(one)
        nodes += one not in known or known[one].kind == "node"
        if nodes == WATCHED_NODES:
            break
    return watched


def _record(row: HolderRow) -> HolderRecord | None:
    """None for what is no record, or not there any more."""
    try:
        return msgspec.msgpack.decode(row.record, type=HolderRecord)
    except msgspec.DecodeError:
        return None
