from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvfabric.errors import ClosedError, ConfigError, Conflict, NoSpace, RemoteProtocolError
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry import database
from kvfabric.registry.base import Registry
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.state import RegistryState, TierQuota, namespace_of, scopes_of
from kvfabric.registry.wire import state_from_pb, state_to_pb
from kvfabric.testing.registry import RegistryTests
from kvfabric.types import DEFAULT_TENANT, model_scope


class TestEmbeddedRegistry(RegistryTests):
    def open_registry(self, home: Path) -> Registry:
        return EmbeddedRegistry(home, wall_clock=lambda: 1000.0)


async def tamper(home: Path, table: str, change: Callable[[Any, Any], object]) -> None:
    """Change rows behind the registry's back. `change`: (transaction, table) -> None."""
    env = lmdb.open(str(home), max_dbs=8)
    database = env.open_db(table.encode())
    with env.begin(write=True) as txn:
        change(txn, database)
    env.close()


async def filled(home: Path) -> None:
    async with EmbeddedRegistry(home) as registry:
        for _ in range(3):
            await registry.invalidate("model", "m1", "", purge=False)


async def test_a_changed_audit_log_stops_the_registry_from_opening(tmp_path: Path) -> None:
    await filled(tmp_path)

    def forge(txn: Any, database: Any) -> None:
        key, row = next(iter(txn.cursor(db=database)))
        txn.put(key, row[:-1] + bytes([row[-1] ^ 1]), db=database)

    await tamper(tmp_path, "audit", forge)
    with pytest.raises(Conflict, match="does not hold at record 1"):
        async with EmbeddedRegistry(tmp_path):
            pass


async def test_a_cut_audit_log_stops_the_registry_from_opening(tmp_path: Path) -> None:
    await filled(tmp_path)

    def cut(txn: Any, database: Any) -> None:
        txn.delete((3).to_bytes(8, "big"), db=database)

    await tamper(tmp_path, "audit", cut)
    with pytest.raises(Conflict, match="record 3"):
        async with EmbeddedRegistry(tmp_path):
            pass


async def test_two_processes_never_both_write_one_registry(tmp_path: Path) -> None:
    async with EmbeddedRegistry(tmp_path) as registry:
        before = registry.state

        def bump(txn: Any, database: Any) -> None:
            txn.put(b"version", (99).to_bytes(8, "big"), db=database)

        table = registry._database._tables["meta"]
        with registry._database._env.begin(write=True) as txn:
            bump(txn, table)
        with pytest.raises(Conflict, match="another process"):
            await registry.invalidate("model", "m1", "", purge=False)
        assert registry.state is before


async def test_a_commit_that_fails_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_MAP_BYTES", 256 << 10)
    async with EmbeddedRegistry(tmp_path) as registry:
        before = registry.state
        with pytest.raises(NoSpace, match="full"):
            await registry.register_template("big", "1", b"x" * (250 << 10), is_public=False)
        assert registry.state is before
        change = await registry.invalidate("model", "m1", "", purge=False)
        assert change.new_epoch == 1


async def test_what_is_no_registry_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path)
    await tamper(tmp_path, "meta", lambda txn, db: txn.put(b"format", b"other-9", db=db))
    with pytest.raises(ConfigError, match="not a registry of this version"):
        async with EmbeddedRegistry(tmp_path):
            pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot open"):
        async with EmbeddedRegistry(tmp_path / "file"):
            pass
    await filled(tmp_path / "rows")
    garbage = b"\xc1 no MessagePack"
    await tamper(tmp_path / "rows", "epochs", lambda txn, db: txn.put(b"x", garbage, db=db))
    with pytest.raises(ConfigError, match="damaged"):
        async with EmbeddedRegistry(tmp_path / "rows"):
            pass


async def test_a_closed_registry_takes_no_change(tmp_path: Path) -> None:
    async with EmbeddedRegistry(tmp_path) as registry:
        pass
    with pytest.raises(ClosedError):
        await registry.invalidate("model", "m1", "", purge=False)


async def test_leaving_waits_for_the_commit_under_way(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group, EmbeddedRegistry(tmp_path) as registry:
        task = group.create_task(registry.invalidate("model", "m1", "", purge=False))
        await asyncio.sleep(0)
    assert task.result().new_epoch == 1
    async with EmbeddedRegistry(tmp_path) as registry:
        assert registry.state.epoch(model_scope("m1")) == 1


async def test_state_is_the_same_on_the_other_side_of_the_wire(tmp_path: Path) -> None:
    async with EmbeddedRegistry(tmp_path) as registry:
        await registry.create_tenant("acme", TierQuota(100, 10), TierQuota(7, 0))
        await registry.register_template("greeting", "v1", b"hello", is_public=True)
        await registry.invalidate("template", "greeting", "", purge=True)
        await registry.invalidate("model", "m1", "", purge=False)
        state = registry.state
    received = state_from_pb(pb.RegistryState.FromString(state_to_pb(state).SerializeToString()))
    assert received == state
    args = (DEFAULT_TENANT, "m1", bytes(32))
    assert namespace_of(received, *args) == namespace_of(state, *args)
    assert len(namespace_of(received, *args).incarnations) == 1


def test_a_state_that_is_not_understood_is_never_served_by() -> None:
    bad_state = pb.Template(name="t", version="1", incarnation=bytes(16), state="paused")
    bad_incarnation = pb.EpochEntry(scope="model:x", epoch=1, incarnation=b"short")
    for message in (
        pb.RegistryState(templates=[bad_state]),
        pb.RegistryState(epochs=[bad_incarnation]),
    ):
        with pytest.raises(RemoteProtocolError):
            state_from_pb(message)


def test_scopes_of_a_request_are_each_once_and_the_adapter_only_if_there_is_one() -> None:
    assert scopes_of("t-1", "m1") == ("fabric", "tenant:t-1", "model:m1")
    assert scopes_of("t-1", "m1", "a1", ["x", "y", "x"])[3:] == (
        "adapter:a1",
        "template:x",
        "template:y",
    )
    assert namespace_of(RegistryState(), DEFAULT_TENANT, "m", b"").incarnations == ()
