"""A directory that is slow, gone, old, full or closed: nothing stale is served, no epoch goes back.

Each promise stands beside its twin, in which one guard is taken out; the twin must break it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvfabric.demo.processes import free_addresses
from kvfabric.errors import AccessError, ConnectError, KVFabricError, NoSpace
from kvfabric.registry.base import Change
from kvfabric.registry.lease import EpochLease
from kvfabric.registry.redis import registry as module
from kvfabric.registry.redis import store as store_module
from kvfabric.registry.redis.address import parse
from kvfabric.registry.redis.registry import Holder, RedisRegistry
from kvfabric.registry.redis.store import ACL_RULES, Renewal, Store
from kvfabric.registry.state import RegistryState
from kvfabric.testing.redis import RedisServer, Way
from kvfabric.types import model_scope

pytestmark = pytest.mark.slow

LEASE_S, GRACE_S = 0.3, 0.1
SCOPE = model_scope("m1")
PATIENCE_S = 15.0


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which an answer does not come: how long it is waited for only makes them long."""
    monkeypatch.setattr(module, "FIRST_ANSWER_S", 0.5)
    monkeypatch.setattr(module, "LEAVE_S", 0.3)
    monkeypatch.setattr(store_module, "MIN_TIMEOUT_S", 0.5)


class Watch:
    """Looks at holders all the time: what they would serve by, and whether an epoch went back."""

    def __init__(self, *holders: RedisRegistry) -> None:
        self.holders = holders
        self.required = 0
        self.stale = 0
        self.regressed = 0
        self._highest = [0] * len(holders)

    async def run(self) -> None:
        while True:
            for number, holder in enumerate(self.holders):
                usable = holder.usable()
                if usable is not None:
                    self.stale += usable.epoch(SCOPE) < self.required
                epoch = holder.state.epoch(SCOPE)
                self.regressed += epoch < self._highest[number]
                self._highest[number] = max(epoch, self._highest[number])
            await asyncio.sleep(0.002)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Watch]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.run())
            try:
                yield self
            finally:
                task.cancel()


def holder_at(
    url: str,
    home: Path,
    name: str,
    kind: type[RedisRegistry] = RedisRegistry,
    *,
    lease_s: float = LEASE_S,
    grace_s: float = GRACE_S,
) -> RedisRegistry:
    address = parse(url, insecure=True)
    holder = kind(address, home / name, holder=Holder("node", name), lease_s=lease_s)
    holder.grace_s = grace_s
    return holder


async def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(patience_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def serving(*holders: RedisRegistry) -> None:
    await until(lambda: all(holder.usable() is not None for holder in holders))


async def withdraw(holder: RedisRegistry, watch: Watch | None = None) -> tuple[Change, list[str]]:
    """Invalidate the model and wait for everybody; also who had to be waited out."""
    change = await holder.invalidate("model", "m1", "", purge=False)
    acks = await holder.reached(change.version)
    if watch is not None:
        watch.required = change.new_epoch
    return change, sorted(ack.holder_id.partition(".")[0] for ack in acks if ack.waited_out)


# ---------------------------------------------------------------------- guards that twins lack


class NeverEnds(RedisRegistry):
    """No end of the lease."""

    def usable(self) -> RegistryState | None:
        return self.state if self.state.version else None


class FromTheAnswer(RedisRegistry):
    """The lease counts from when the answer came."""

    async def __aenter__(self) -> FromTheAnswer:
        await super().__aenter__()
        real = self.lease.renewed

        def renewed(*, sent_at: float, **rest: object) -> None:
            real(sent_at=self.lease.now(), **rest)  # type: ignore[arg-type]

        self.lease.renewed = renewed  # type: ignore[method-assign,method-assign]
        return self


class TakesAnything(RedisRegistry):
    """What the store shows is believed, whatever was seen before."""

    async def __aenter__(self) -> TakesAnything:
        async def catch_up(store: Store) -> None:
            whole = await store.load(1)
            if whole is not None:
                await self._copy._replace(whole.state, whole.entries)

        await super().__aenter__()
        self._copy.catch_up = catch_up  # type: ignore[method-assign]
        return self


class TrustsAtOnce(EpochLease):
    """Another run of the store is as good as the last one."""

    def renewed(self, *, store_id: bytes = b"", **rest: Any) -> None:
        super().renewed(store_id=self._store_id, **rest)


class WritesEachTime(RedisRegistry):
    """Each renewal writes the record, which needs memory."""

    async def __aenter__(self) -> WritesEachTime:
        await super().__aenter__()

        async def renew(holder_id: str) -> Renewal:
            return await self._there.register(holder_id, self._record())

        self._there.renew = renew  # type: ignore[method-assign]
        return self


class DeniedIsGranted(RedisRegistry):
    """An error counts as a renewal."""

    def _failed(self, error: KVFabricError) -> None:
        super()._failed(error)
        self.lease._ends = self.lease.now() + LEASE_S


Kind = TypeVar("Kind")
FaultTest = Callable[[Path, Kind], Coroutine[Any, Any, None]]


def beside_its_twin(
    kind: Kind, twin: Kind
) -> Callable[[FaultTest[Kind]], Callable[[Path], Coroutine[Any, Any, None]]]:
    """Run a test with the guard and without it, at the same time: both mostly wait."""

    def decorate(test: FaultTest[Kind]) -> Callable[[Path], Coroutine[Any, Any, None]]:
        async def both(tmp_path: Path) -> None:
            async with asyncio.TaskGroup() as group:
                for number, one in enumerate((kind, twin)):
                    home = tmp_path / str(number)
                    home.mkdir()
                    group.create_task(test(home, one), name=f"{test.__name__}[{one}]")

        both.__name__, both.__doc__ = test.__name__, test.__doc__
        return both

    return decorate


# ---------------------------------------------------------------------- slow


@pytest.mark.usefixtures("short_patience")
@beside_its_twin(RedisRegistry, FromTheAnswer)
async def test_slow(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    """Answers take two thirds of a lease: it serves on while it may, and nothing stale, to the moment."""
    lease_s = 0.6
    with RedisServer(tmp_path / "redis") as server:
        way = Way(tmp_path / "way", server.socket)
        async with (
            way.serving(),
            holder_at(way.url, tmp_path, "slow", kind, lease_s=lease_s) as slow,
            holder_at(server.url, tmp_path, "other", lease_s=lease_s, grace_s=0.0) as other,
            Watch(slow, other).watching() as watch,
        ):
            await serving(slow, other)
            way.delay_s = lease_s * 2 / 3
            await asyncio.sleep(2 * lease_s)
            await heard_from(other, slow)
            _, late = await withdraw(other, watch)
            assert late == ["slow"]
            await asyncio.sleep(lease_s)
            assert (watch.stale > 0) == (kind is FromTheAnswer)
            assert watch.regressed == 0
            way.delay_s = 0
            await until(lambda: slow.usable() == other.state)


async def heard_from(other: RedisRegistry, holder: RedisRegistry) -> None:
    """Until just after a renewal of `holder` was made."""

    async def beat() -> int:
        rows = await other._there.holders()
        return next(row.heartbeat for row in rows if row.holder_id == holder.holder_id)

    before = await beat()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await beat() != before:
                return
            await asyncio.sleep(0.002)


# ---------------------------------------------------------------------- restarted


@beside_its_twin(True, False)
async def test_restarted_empty_with_its_holders(tmp_path: Path, copies_kept: bool) -> None:
    """Everything was down at once, and Redis has lost all. Twin: the holders' copies are lost too."""
    server = RedisServer(tmp_path / "redis")
    with server:
        async with holder_at(server.url, tmp_path, "a") as a:
            await serving(a)
            await a.create_tenant("acme", *[a.state.tenants[next(iter(a.state.tenants))].host] * 2)
            for _ in range(3):
                await a.invalidate("model", "m1", "", purge=False)
            before, log = a.state, await a.audit_log()
        server.forget()
        if not copies_kept:
            shutil.rmtree(tmp_path / "a")
        server.start()
        async with holder_at(server.url, tmp_path, "a") as a:
            await serving(a)
            assert (a.state.epoch(SCOPE) == 3) == copies_kept
            if copies_kept:
                assert a.state.registry_id == before.registry_id
                assert a.state.tenants == before.tenants
                assert (await a.audit_log())[: len(log)] == log
                assert (await a.audit_log())[-1].action == "restore_registry"
                assert a.status.num_restores == 1


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("lease", [EpochLease, TrustsAtOnce])
async def test_who_knows_less_comes_back_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: type[EpochLease]
) -> None:
    """To a Redis as old as itself, which one who knows more has not reached yet."""
    server = RedisServer(tmp_path / "redis")
    with server:
        way = Way(tmp_path / "way", server.socket)
        async with way.serving(), holder_at(way.url, tmp_path, "late") as late:
            async with holder_at(server.url, tmp_path, "early") as early:
                await serving(early, late)
                await until(lambda: early._copy.trusted == late._copy.trusted != b"none")
            server.keep(tmp_path / "old")
            change, _ = await withdraw(late)
            server.bring_back(tmp_path / "old")
            way.cut()
            server.start()
            monkeypatch.setattr(module, "EpochLease", lease)
            early = holder_at(server.url, tmp_path, "early")
            async with early, Watch(early, late).watching() as watch:
                watch.required = change.new_epoch
                await asyncio.sleep(LEASE_S / 2)
                assert early.status.state == ("serving" if watch.stale else "new_store")
                way.mend()
                await until(lambda: early.state.epoch(SCOPE) >= change.new_epoch)
                await serving(early, late)
                assert (watch.stale > 0) == (lease is TrustsAtOnce)
                assert watch.regressed == 0


@beside_its_twin(RedisRegistry, TakesAnything)
async def test_restarted_with_an_old_snapshot(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    server = RedisServer(tmp_path / "redis")
    with server:
        async with (
            holder_at(server.url, tmp_path, "a", kind) as a,
            holder_at(server.url, tmp_path, "b", kind) as b,
            Watch(a, b).watching() as watch,
        ):
            await serving(a, b)
            await withdraw(a)
            server.keep(tmp_path / "old")
            await withdraw(b)
            _, late = await withdraw(b, watch)
            assert late == []
            version = a.state.version
            server.bring_back(tmp_path / "old")
            server.start()
            await until(lambda: a.usable() is None and b.usable() is None)
            if kind is TakesAnything:
                await until(lambda: watch.regressed > 0)
                return
            await serving(a, b)
            assert watch.regressed == watch.stale == 0
            await until(lambda: a.state == b.state)
            assert a.state.version > version
            assert a.status.num_restores + b.status.num_restores == 1
            assert await a.audit_log() == await b.audit_log()
            await withdraw(a, watch)
            assert watch.stale == 0


# ---------------------------------------------------------------------- not there


@pytest.mark.usefixtures("short_patience")
@beside_its_twin(RedisRegistry, NeverEnds)
async def test_paused(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with holder_at(server.url, tmp_path, "a", kind) as a:
            await serving(a)
            await withdraw(a)
            server.pause()
            try:
                await asyncio.sleep(0.5 * LEASE_S)
                assert a.usable() is not None  # as long as its lease lasts
                await asyncio.sleep(LEASE_S)
                assert (a.usable() is None) == (kind is RedisRegistry)
                assert a.status.state == ("no_lease" if kind is RedisRegistry else "serving")
                assert "does not answer" in a.status.detail
                assert a.status.num_errors["unreachable"] > 0
                with pytest.raises(ConnectError):
                    await a.invalidate("model", "m1", "", purge=False)
            finally:
                server.go_on()
            await serving(a)
            await until(lambda: a.status.detail == "")
            assert a.state.epoch(SCOPE) in (1, 2)  # what got no answer may have been made
            change, _ = await withdraw(a)
            assert change.new_epoch == a.state.epoch(SCOPE)


@pytest.mark.usefixtures("short_patience")
@beside_its_twin(RedisRegistry, NeverEnds)
async def test_partitioned_from_one(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    with RedisServer(tmp_path / "redis") as server:
        way = Way(tmp_path / "way", server.socket)
        async with (
            way.serving(),
            holder_at(way.url, tmp_path, "lonely", kind) as lonely,
            holder_at(server.url, tmp_path, "other") as other,
            Watch(lonely, other).watching() as watch,
        ):
            await serving(lonely, other)
            way.cut()
            _, late = await withdraw(other, watch)
            assert late == ["lonely"]
            assert other.usable() is not None
            await asyncio.sleep(LEASE_S / 2)
            assert (watch.stale > 0) == (kind is NeverEnds)
            way.mend()
            await until(lambda: lonely.state == other.state)
            await serving(lonely)
            _, late = await withdraw(other, watch)
            assert late == []


# ---------------------------------------------------------------------- fail-over


@pytest.mark.usefixtures("short_patience")
@beside_its_twin(RedisRegistry, TakesAnything)
async def test_fail_over_with_lost_writes(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    """The replica that takes over lacks a change that everybody acted on; then it gets another one."""
    port = free_addresses(1)[0].rpartition(":")[2]
    primary = RedisServer(tmp_path / "primary", port=port, bind="127.0.0.1")
    replica = RedisServer(tmp_path / "replica", replicaof=f"127.0.0.1 {port}")
    with primary, replica:
        await until(lambda: replica.info("replication")["master_link_status"] == "up")
        way = Way(tmp_path / "way", primary.socket)
        async with (
            way.serving(),
            holder_at(way.url, tmp_path, "a", kind) as a,
            holder_at(way.url, tmp_path, "b", kind) as b,
            Watch(a, b).watching() as watch,
        ):
            await serving(a, b)
            await withdraw(a)
            assert replica.caught_up_with(primary)
            replica.call("REPLICAOF", "NO", "ONE")
            _, late = await withdraw(a, watch)
            assert late == []
            way.cut()
            primary.kill()
            async with holder_at(replica.url, tmp_path, "new") as new:
                await until(lambda: bool(new.state.tenants))
                await new.create_tenant("acme", *[next(iter(new.state.tenants.values())).host] * 2)
                assert new.state.epoch(SCOPE) == 1  # it cannot know yet
                way.mend(replica.socket)
                await until(lambda: a.usable() is None and b.usable() is None)
                if kind is TakesAnything:
                    await until(lambda: watch.regressed > 0)
                    return
                await serving(a, b, new)
                assert watch.regressed == watch.stale == 0
                await until(lambda: a.state == b.state == new.state)
                assert a.state.epoch(SCOPE) >= watch.required
                assert "acme" in {tenant.name for tenant in a.state.tenants.values()}
                actions = [record.action for record in await new.audit_log()]
                assert actions[-1] == "merge_registry"
                assert await a.audit_log() == await new.audit_log()


@pytest.mark.usefixtures("short_patience")
@beside_its_twin(1, 0)
async def test_a_primary_without_its_replicas_grants_nothing(tmp_path: Path, replicas: int) -> None:
    """It may have been replaced long ago. Twin: no replica has to have a renewal."""
    port = free_addresses(1)[0].rpartition(":")[2]
    primary = RedisServer(tmp_path / "primary", port=port, bind="127.0.0.1")
    replica = RedisServer(tmp_path / "replica", replicaof=f"127.0.0.1 {port}")
    with primary, replica:
        await until(lambda: replica.info("replication")["master_link_status"] == "up")
        async with holder_at(f"{primary.url}?replicas={replicas}", tmp_path, "a") as a:
            await serving(a)
            replica.pause()
            try:
                await asyncio.sleep(2 * LEASE_S)
                assert (a.usable() is None) == bool(replicas)
                assert ("replicas" in a.status.detail) == bool(replicas)
            finally:
                replica.go_on()
            await serving(a)


# ---------------------------------------------------------------------- full, closed


@beside_its_twin(RedisRegistry, WritesEachTime)
async def test_out_of_memory(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    """Nothing can be changed, and leases are renewed all the same."""
    with RedisServer(tmp_path / "redis") as server:
        async with holder_at(server.url, tmp_path, "a", kind) as a:
            await serving(a)
            server.call("CONFIG", "SET", "maxmemory", 1)
            await asyncio.sleep(3 * LEASE_S)
            assert (a.usable() is not None) == (kind is RedisRegistry)
            with pytest.raises(NoSpace, match="out of memory"):
                await a.invalidate("model", "m1", "", purge=False)
            server.call("CONFIG", "SET", "maxmemory", 0)
            await serving(a)
            change, _ = await withdraw(a)
            assert change.new_epoch == 1


@beside_its_twin(RedisRegistry, DeniedIsGranted)
async def test_acl(tmp_path: Path, kind: type[RedisRegistry]) -> None:
    """A user with no more rights than needed; then with less."""
    with RedisServer(tmp_path / "redis") as server:
        server.call("ACL", "SETUSER", "fabric", "on", ">pw", "~kvfabric:*", "&kvfabric:*")
        server.call("ACL", "SETUSER", "fabric", *ACL_RULES.split())
        password = tmp_path / "password"
        password.write_text("pw\n")
        password.chmod(0o600)
        url = f"{server.url}?user=fabric&password_file={password}"
        async with (
            holder_at(url, tmp_path, "a", kind) as a,
            holder_at(url, tmp_path, "b") as b,
        ):
            await serving(a, b)
            _, late = await withdraw(a)
            assert late == []
            with pytest.raises(Exception, match="no permissions"):
                await a._there._work_link.client.execute_command("KEYS", "*")
            server.call("ACL", "SETUSER", "fabric", "-pexpire")
            await asyncio.sleep(1.5 * LEASE_S)
            assert (a.usable() is None) == (kind is RedisRegistry)
            assert "ACL denies" in a.status.detail
            assert a.status.num_errors["denied"] > 0
            server.call("ACL", "SETUSER", "fabric", "+pexpire", "-hset")
            await serving(a, b)
            with pytest.raises(AccessError):
                await a.invalidate("model", "m1", "", purge=False)
            server.call("ACL", "SETUSER", "fabric", "+hset")
            await withdraw(a)


async def test_a_store_that_forgets_takes_no_changes(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with holder_at(server.url, tmp_path, "a") as a:
            server.call("CONFIG", "SET", "appendfsync", "everysec")
            with pytest.raises(KVFabricError, match="appendfsync"):
                await a.invalidate("model", "m1", "", purge=False)
            server.call("CONFIG", "SET", "appendonly", "no")
            with pytest.raises(KVFabricError, match="append-only"):
                await a.invalidate("model", "m1", "", purge=False)


@pytest.mark.usefixtures("short_patience")
async def test_it_starts_without_a_directory_and_joins_when_there_is_one(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    async with holder_at(server.url, tmp_path, "a") as a:
        assert a.usable() is None
        assert a.status.state == "no_lease"
        with pytest.raises(ConnectError):
            await a.invalidate("model", "m1", "", purge=False)
        with server:
            await serving(a)
            await withdraw(a)
