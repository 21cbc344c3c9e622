"""What a directory's Redis is asked and told: one transaction a method. No decisions.

    PREFIX meta        hash: registry_id, version, audit_head, lease_ms
    PREFIX epochs      hashes, rows as in `registry.rows`
           tenants
           templates
    PREFIX audit       list of head (32 B) and MessagePack AuditRecord, oldest first
    PREFIX holders     set of holder ids; PREFIX holder:ID is the record of one
    PREFIX receipt:ID  hash: rows of `registry.receipts` by holder; kept for a year after the last
    PREFIX news, acks  channels

A holder's record does not time out by itself, because clocks jump. Its expiry lies a day ahead and is moved
at each renewal: that is the heartbeat which others watch, on their own clocks. Moving it needs no memory, so
leases are renewed even by a Redis that has none left.

No scripts, no KEYS, no SCAN: `ACL_RULES` is all that a Redis user needs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from redis import exceptions as failures

from kvfabric.errors import (
    AccessError,
    ConnectError,
    DeadlineExceeded,
    KVFabricError,
    NoSpace,
    RemoteProtocolError,
)
from kvfabric.registry import rows
from kvfabric.registry.database import Entry
from kvfabric.registry.redis.address import DirectoryAddress, Link
from kvfabric.registry.redis.outside import REAL, Outside
from kvfabric.registry.router_load import KEPT_S
from kvfabric.registry.state import RegistryState

ACL_RULES = (
    "-@all +multi +exec +watch +unwatch +discard +hset +hmget +hgetall +rpush +lrange +get +mget +set "
    "+del +pexpire +pexpiretime +sadd +srem +smembers +publish +subscribe +unsubscribe +wait +info +ping"
)
"""Of a user that may be a holder; beside `~kvfabric:*` and `&kvfabric:*`."""
MIN_TIMEOUT_S = 2.0
HEARTBEAT_MS = 86_400_000
RECEIPT_MS = 365 * 86_400_000
_HEAD_BYTES = 32


@dataclass(frozen=True, slots=True)
class Position:
    """Where a registry is: equal positions are equal registries."""

    registry_id: bytes
    version: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Renewal:
    """`position` None: the store has no registry. `record`: of the holder as the store has it.

    `store_id` is another one after a restart, a promotion, and on another server.
    """

    record: bytes | None
    position: Position | None
    lease_s: float
    store_id: bytes
    is_primary: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The registry and the audit entries from the one on that was asked for."""

    position: Position
    lease_s: float
    state: RegistryState
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class HolderRow:
    """`heartbeat` changes with each renewal."""

    holder_id: str
    record: bytes
    heartbeat: int


class Store:
    """One process's access. Every method raises KVFabricErrors: see `translated`."""

    def __init__(
        self, address: DirectoryAddress, *, lease_s: float, outside: Outside = REAL
    ) -> None:
        """An answer to a renewal that comes after `lease_s` is of no use; others may take longer."""
        self._address = address
        self._timeout_s = max(lease_s, MIN_TIMEOUT_S)
        self._lease_link = outside.link(address, lease_s)
        self._work_link = outside.link(address, self._timeout_s)
        self._news_link = outside.link(address, self._timeout_s)
        self._lease_lock, self._work_lock = asyncio.Lock(), asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Store {self._address.shown}>"

    async def aclose(self) -> None:
        for link in (self._lease_link, self._work_link, self._news_link):
            with contextlib.suppress(failures.RedisError, OSError):
                await link.aclose()

    # ------------------------------------------------------------------ leases

    async def renew(self, holder_id: str) -> Renewal:
        """Move the heartbeat, then read what the registry is at."""
        # No transaction: a Redis without memory refuses all of them. The order is what counts: once the
        # heartbeat has moved nobody strikes this holder off, so a change after the last step finds it.
        async with self._lease_lock, self._pipeline(self._lease_link) as pipe:
            return await self._renewed(pipe, holder_id)

    async def register(self, holder_id: str, record: bytes) -> Renewal:
        """Write a holder's record; as `renew` beside that. Also how a change is acknowledged."""
        async with self._lease_lock, self._transaction(self._lease_link) as pipe:
            pipe.set(self._key(f"holder:{holder_id}"), record)
            pipe.sadd(self._key("holders"), holder_id)
            pipe.publish(self._key("acks"), holder_id)
            return await self._renewed(pipe, holder_id)

    async def lease_replicated(self) -> None:
        """Raises ConnectError unless enough replicas have the renewal: an isolated primary grants nothing."""
        if self._address.replicas:
            async with self._lease_lock:
                await self._replicated(self._lease_link)

    async def holder_ids(self) -> list[str]:
        """In order. One command, whatever their number."""
        async with self._work_lock, translated():
            found = await self._work_link.client.smembers(self._key("holders"))
        return sorted(bytes(one).decode() for one in found)

    async def holders(self, some: Sequence[str] | None = None) -> list[HolderRow]:
        """Of `some`, or everybody's: two commands a holder."""
        ids = await self.holder_ids() if some is None else some
        if not ids:
            return []
        key = self._key
        async with self._work_lock, self._transaction(self._work_link) as pipe:
            pipe.mget([key(f"holder:{one}") for one in ids])
            for one in ids:
                pipe.pexpiretime(key(f"holder:{one}"))
            records, *beats = await pipe.execute()
        return [
            HolderRow(one, record or b"", beat)
            for one, record, beat in zip(ids, records, beats, strict=True)
        ]

    async def remove_holder(self, holder_id: str, heartbeat: int | None = None) -> None:
        """Strike it off, unless its heartbeat is another one than that by now."""
        key = self._key(f"holder:{holder_id}")
        async with self._work_lock, self._transaction(self._work_link) as pipe:
            if heartbeat is not None:
                await pipe.watch(key)
                if await pipe.pexpiretime(key) != heartbeat:
                    return
                pipe.multi()
            pipe.delete(key)
            pipe.srem(self._key("holders"), holder_id)
            pipe.publish(self._key("acks"), holder_id)
            with contextlib.suppress(failures.WatchError):
                await pipe.execute()

    # ------------------------------------------------------------------ registry

    async def position(self) -> Position | None:
        async with self._work_lock, translated():
            meta = await self._work_link.client.hmget(self._key("meta"), _META)
        return _position(meta)

    async def load(self, first: int) -> Snapshot | None:
        """The registry, and its audit log from entry number `first` (from 1) on. None: there is none."""
        async with self._work_lock, self._transaction(self._work_link) as pipe:
            pipe.hmget(self._key("meta"), _META)
            for table in rows.TABLES:
                pipe.hgetall(self._key(table))
            pipe.lrange(self._key("audit"), max(0, first - 1), -1)
            meta, *tables, entries = await pipe.execute()
        position = _position(meta)
        if position is None:
            return None
        found = {name: table.items() for name, table in zip(rows.TABLES, tables, strict=True)}
        try:
            state = rows.to_state(position.registry_id, position.version, found)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RemoteProtocolError(f"the directory has rows that are none: {exc}") from exc
        return Snapshot(position, _lease_s(meta), state, [_entry(row) for row in entries])

    async def commit(
        self,
        expected: Position | None,
        after: Position,
        *,
        changed: Iterable[tuple[str, bytes, bytes]],
        entries: Sequence[Entry],
        lease_s: float,
    ) -> bool:
        """Write rows and entries if the registry is at `expected`; False if it is not, and nothing was."""
        meta = self._key("meta")
        async with self._work_lock, self._transaction(self._work_link) as pipe:
            await pipe.watch(meta)
            if _position(await pipe.hmget(meta, _META)) != expected:
                return False
            pipe.multi()
            by_table: dict[str, dict[bytes, bytes]] = {}
            for table, key, row in changed:
                by_table.setdefault(table, {})[key] = row
            for table, mapping in by_table.items():
                pipe.hset(self._key(table), mapping=mapping)
            if entries:
                pipe.rpush(self._key("audit"), *(head + record for record, head in entries))
            pipe.hset(meta, mapping=_to_meta(after, lease_s))
            pipe.publish(self._key("news"), after.version)
            try:
                await pipe.execute()
            except failures.WatchError:
                return False
        return True

    async def commit_replicated(self) -> None:
        """Raises DeadlineExceeded unless enough replicas have the last commit."""
        if self._address.replicas:
            async with self._work_lock:
                try:
                    await self._replicated(self._work_link)
                except ConnectError as exc:
                    raise DeadlineExceeded(
                        f"made, but it may be lost in a fail-over: {exc}"
                    ) from exc

    async def put_receipt_row(self, receipt_id: str, key: str, row: bytes) -> None:
        name = self._key(f"receipt:{receipt_id}")
        async with self._work_lock, self._transaction(self._work_link) as pipe:
            pipe.hset(name, key, row)
            pipe.pexpire(name, RECEIPT_MS)
            await pipe.execute()

    async def receipt_rows(self, receipt_id: str) -> dict[str, bytes]:
        async with self._work_lock, translated():
            found = await self._work_link.client.hgetall(self._key(f"receipt:{receipt_id}"))
        return {bytes(key).decode(): bytes(row) for key, row in found.items()}

    async def exchange_load(self, router: str, row: bytes) -> list[bytes]:
        """As `RouterLoads.exchange`, for all routers of the directory."""
        names, own = self._key("loads"), self._key(f"load:{router}")
        async with self._work_lock, self._pipeline(self._work_link) as pipe:
            pipe.set(own, row, px=int(KEPT_S * 1e3))
            pipe.sadd(names, router)
            pipe.smembers(names)
            *_, known = await pipe.execute()
            others = sorted(
                bytes(name).decode() for name in known if bytes(name) != router.encode()
            )
            if not others:
                return []
            pipe.mget([self._key(f"load:{name}") for name in others])
            (found,) = await pipe.execute()
            silent = [name for name, kept in zip(others, found, strict=True) if kept is None]
            if silent:
                pipe.srem(names, *silent)
                await pipe.execute()
        return [bytes(kept) for kept in found if kept is not None]

    async def durability(self) -> str:
        """What keeps this Redis from holding on to a change; empty if nothing does, as far as it says."""
        async with self._work_lock, translated():
            client = self._work_link.client
            persistence = await client.info("persistence")
            try:
                policy = await client.config_get("appendfsync")
            except failures.ResponseError:  # users of `ACL_RULES` may not ask
                policy = {}
        if not persistence.get("aof_enabled"):
            return "Redis keeps no append-only file: set appendonly yes and appendfsync always"
        policy = policy.get("appendfsync", policy.get(b"appendfsync", b"always"))
        if policy not in (b"always", "always"):
            return f"Redis has appendfsync {policy}: changes need always"
        return ""

    async def news(self) -> AsyncIterator[str]:
        """`news` and `acks` as they come; `news` first, whenever it listens anew. Ends by an error."""
        patience_s = self._timeout_s / 4
        async with translated(), self._news_link.client.pubsub() as listener:
            await listener.subscribe(self._key("news"), self._key("acks"))
            yield "news"
            while True:
                message = await listener.get_message(
                    ignore_subscribe_messages=True, timeout=patience_s
                )
                if message is None:
                    await listener.ping()
                elif message["type"] == "message":  # not the answer to a ping
                    yield bytes(message["channel"]).decode().removeprefix(self._address.prefix)

    # ------------------------------------------------------------------ inside

    def _key(self, name: str) -> str:
        return self._address.prefix + name

    def _transaction(self, link: Link) -> contextlib.AbstractAsyncContextManager[Any]:
        return self._pipeline(link, transaction=True)

    @contextlib.asynccontextmanager
    async def _pipeline(self, link: Link, *, transaction: bool = False) -> AsyncIterator[Any]:
        async with translated(), link.client.pipeline(transaction=transaction) as pipe:
            yield pipe

    async def _renewed(self, pipe: Any, holder_id: str) -> Renewal:
        key = self._key(f"holder:{holder_id}")
        pipe.pexpire(key, HEARTBEAT_MS)
        pipe.get(key)
        pipe.hmget(self._key("meta"), _META)
        pipe.info("server", "replication")
        *_, record, meta, info = await pipe.execute()
        run = f"{info['run_id']} {info['master_replid']}".encode()
        return Renewal(
            record=record,
            position=_position(meta),
            lease_s=_lease_s(meta),
            store_id=blake2b(run, digest_size=16).digest(),
            is_primary=info["role"] == "master",
        )

    async def _replicated(self, link: Link) -> None:
        wanted = self._address.replicas
        async with translated():
            # A quarter of the socket's patience: the answer must still come over it.
            have = await link.client.wait(wanted, int(link.timeout_s * 250))
        if have < wanted:
            raise ConnectError(f"{have} of {wanted} replicas of the directory have it")


@contextlib.asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Errors of Redis as ours: AccessError denied, NoSpace out of memory, else ConnectError."""
    try:
        yield
    except (failures.AuthenticationError, failures.AuthorizationError) as exc:
        raise AccessError(f"the directory denies access: {exc}") from exc
    except failures.NoPermissionError as exc:
        raise AccessError(f"the directory's ACL denies it: {exc}") from exc
    except failures.OutOfMemoryError as exc:
        raise NoSpace(f"the directory is out of memory: {exc}") from exc
    except (failures.ConnectionError, failures.TimeoutError, OSError) as exc:
        raise ConnectError(f"the directory does not answer: {exc}") from exc
    except failures.ResponseError as exc:
        if str(exc).startswith("MISCONF"):
            raise NoSpace(f"the directory cannot write: {exc}") from exc
        raise ConnectError(f"the directory refuses: {exc}") from exc
    except failures.RedisError as exc:
        raise KVFabricError(f"the directory failed: {exc}") from exc


_META = ("registry_id", "version", "audit_head", "lease_ms")


def _position(meta: Sequence[bytes | None]) -> Position | None:
    registry_id, version, head, _ = meta
    if registry_id is None or version is None or head is None:
        return None
    return Position(bytes(registry_id), int(version), bytes(head))


def _lease_s(meta: Sequence[bytes | None]) -> float:
    return int(meta[3] or 0) / 1000


def _to_meta(position: Position, lease_s: float) -> Mapping[str, bytes | int]:
    return {
        "registry_id": position.registry_id,
        "version": position.version,
        "audit_head": position.head,
        "lease_ms": round(lease_s * 1000),
    }


def _entry(row: bytes) -> Entry:
    return row[_HEAD_BYTES:], row[:_HEAD_BYTES]
