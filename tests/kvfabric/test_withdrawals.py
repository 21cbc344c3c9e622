"""Receipts: what becomes of bytes, requests and engines' own caches after a change, on a real node."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from kvfabric.daemon import withdrawals as module
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.daemon.withdrawals import NodeParts, Withdrawals
from kvfabric.errors import NotFound
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.base import Change
from kvfabric.registry.changes import invalidate_scope, promote_template, withdraw_template
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.receipts import NodeRow
from kvfabric.registry.state import RETIRED, SERVING, RegistryState, TemplateVersion
from kvfabric.registry.withdrawn import Withdrawal, withdrawals
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.engine import TinyEngine, payload_of, wrong_blocks
from kvfabric.testing.minting import Minter, keys_of, segment_of
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.store import RecordedEvents
from kvfabric.types import DEFAULT_TENANT, BlockKey, Incarnation, TenantId

BLOCKS = 6
BLOCK_BYTES = 4096
ON_SSD = 2 * 4096


@dataclass
class Rig:
    node: NodeProcess
    admin: AdminClient
    engine: TinyEngine
    minter: Minter
    num: int = 0
    tenant: TenantId = DEFAULT_TENANT

    def open(self, prompt: str, template: str = "t") -> tuple[str, list[BlockKey]]:
        self.num += 1
        request = f"r{self.num}"
        state = self.admin.state()
        segments = (segment_of(state, template, "1"),) if template else ()
        handle = self.minter.handle(self.engine, request, state, segments, tenant=self.tenant)
        opened = self.engine.client.open_handle(request, handle, deadline_s=5)
        return request, keys_of(opened, prompt, BLOCKS)

    def store(self, prompt: str, template: str = "t") -> list[BlockKey]:
        """Store and load again, so that it goes to SSD."""
        request, keys = self.open(prompt, template)
        self.engine.store(request, keys)
        self.engine.release(request)
        request, keys = self.open(prompt, template)
        found = self.engine.load(request, keys)
        assert (len(found), wrong_blocks(keys, found)) == (BLOCKS, 0)
        self.engine.release(request)
        return keys

    def invalidate(self, **request: Any) -> pb.Receipt:
        message = pb.InvalidateRequest(**request)
        receipt: pb.Receipt = self.admin.call(self.admin.registry.Invalidate, message)
        return receipt

    def receipt(self, name: str, wait_s: float = 10.0) -> pb.Receipt:
        message = pb.GetReceiptRequest(receipt_id=name, wait_s=wait_s)
        receipt: pb.Receipt = self.admin.call(self.admin.registry.GetReceipt, message)
        return receipt

    def on_disk(self, keys: list[BlockKey]) -> int:
        """How many of these blocks have their bytes in some file of the SSD tier."""
        tier = self.node.state_dir / "ssd"
        files = [path.read_bytes() for path in tier.iterdir() if path.is_file()]
        return sum(any(payload_of(key, BLOCK_BYTES) in data for data in files) for key in keys)

    def sealed(self, num_blocks: int) -> bool:
        status = self.admin.call(self.admin.admin.Status, pb.StatusRequest(sealed_keys=True))
        return len(status.sealed_keys) >= num_blocks


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with (
        NodeProcess(tmp_path, ssd_bytes=16 << 20, epoch_lease_s=0.5) as node,
        AdminClient(tmp_path / "admin.sock") as admin,
    ):
        text = pb.RegisterTemplateRequest(name="t", version="1", text=b"You are kind.")
        admin.call(admin.registry.RegisterTemplate, text)
        minter = Minter(tmp_path)
        engine = TinyEngine.connect(node.socket)
        yield Rig(node, admin, engine, minter)
        engine.client.close()


def test_a_purge_destroys_every_byte_and_says_when(rig: Rig) -> None:
    mine, others = rig.store("mine"), rig.store("other", template="")
    until(lambda: rig.sealed(2 * BLOCKS))
    assert rig.on_disk(mine) == BLOCKS
    reader, keys = rig.open("mine")
    located = rig.engine.locate(reader, keys)
    assert located.num_blocks == BLOCKS

    receipt = rig.invalidate(scope="template", name="t", purge=True)
    assert receipt.bytes_unreachable == BLOCKS * (BLOCK_BYTES + ON_SSD)
    assert not receipt.is_final
    assert receipt.destroyed_at == receipt.drained_at == 0
    [node] = receipt.nodes
    [engine] = node.engines
    assert (engine.engine_id, engine.running) == ("tiny", 1)
    buffers = [bytearray(BLOCK_BYTES) for _ in keys]
    assert rig.engine.client.read(located, [memoryview(one) for one in buffers]) == BLOCKS

    rig.engine.release(reader)
    receipt = rig.receipt(receipt.receipt_id)
    assert receipt.is_final
    assert receipt.requested_at < receipt.unreachable_at <= receipt.drained_at
    assert receipt.destroyed_at >= receipt.drained_at
    assert receipt.bytes_reclaimed == receipt.bytes_unreachable
    assert (
        receipt.nodes[0].engines[0].hbm == "not_reset"
    )  # TinyEngine keeps no cache and says nothing
    assert rig.on_disk(mine) == 0
    assert rig.engine.client.read(located, [memoryview(one) for one in buffers]) == 0  # zeroed
    # What shared its file is there.
    request, keys = rig.open("other", template="")
    assert keys == others
    assert wrong_blocks(keys, rig.engine.load(request, keys)) == 0
    assert len(rig.engine.load(request, keys)) == BLOCKS


def test_a_retired_version_keeps_its_bytes_for_a_rollback(rig: Rig) -> None:
    """The twin of the test above: what only left reach is on disk, and in the arena."""
    mine = rig.store("mine")
    until(lambda: rig.sealed(BLOCKS))
    receipt = rig.receipt(rig.invalidate(scope="template", name="t").receipt_id)
    assert receipt.is_final
    assert receipt.destroyed_at == receipt.bytes_reclaimed == 0
    assert receipt.bytes_unreachable == BLOCKS * (BLOCK_BYTES + ON_SSD)
    assert [engine.hbm for engine in receipt.nodes[0].engines] == ["unaffected"]
    assert rig.on_disk(mine) == BLOCKS
    promote = pb.PromoteTemplateRequest(name="t", version="1")
    back = rig.admin.call(rig.admin.registry.PromoteTemplate, promote)
    assert rig.receipt(back.receipt_id).is_final
    request, keys = rig.open("mine")
    assert len(rig.engine.load(request, keys)) == BLOCKS


def test_an_offboarded_tenants_keys_and_bytes_go(rig: Rig) -> None:
    created = rig.admin.call(rig.admin.registry.CreateTenant, pb.CreateTenantRequest(name="acme"))
    tenant = TenantId(created.tenant.tenant_id)
    of_default = rig.store("mine", template="")
    rig.tenant = tenant
    mine, template_too = rig.store("mine", template=""), rig.store("mine")
    until(lambda: rig.sealed(3 * BLOCKS))
    # The twin: an invalidation takes the bytes and leaves the keys.
    purged = rig.invalidate(scope="tenant", name="acme")
    assert rig.receipt(purged.receipt_id).destroyed_at
    assert rig.on_disk(mine) == rig.on_disk(template_too) == 0
    mine = rig.store("mine", template="")
    until(lambda: rig.sealed(2 * BLOCKS))
    reader, keys = rig.open("mine", template="")
    rig.engine.locate(reader, keys)
    before = Keyring.open(rig.node.state_dir)
    assert before.has_keys(tenant)

    request = pb.OffboardTenantRequest(name="acme", wait_s=0.3)
    receipt = rig.admin.call(rig.admin.registry.OffboardTenant, request)
    assert (receipt.scope, receipt.is_final) == (f"tenant:{tenant}", False)
    assert receipt.bytes_unreachable == BLOCKS * (BLOCK_BYTES + ON_SSD)
    assert receipt.nodes[0].engines[0].running == 1
    rig.engine.release(reader)
    receipt = rig.receipt(receipt.receipt_id)
    assert receipt.is_final
    assert receipt.not_heard_from == []
    assert receipt.bytes_reclaimed == receipt.bytes_unreachable
    [node] = receipt.nodes
    assert receipt.requested_at < node.keys_removed_at <= receipt.destroyed_at
    after = Keyring.open(rig.node.state_dir)
    assert after.generation == node.keyring_generation > before.generation
    assert not after.has_keys(tenant)
    assert rig.on_disk(mine) == 0
    rig.tenant = DEFAULT_TENANT
    request_id, keys = rig.open("mine", template="")
    assert keys == of_default
    assert len(rig.engine.load(request_id, keys)) == BLOCKS


def test_a_tenant_that_was_offboarded_while_a_node_died_is_gone_when_it_is_back(rig: Rig) -> None:
    created = rig.admin.call(rig.admin.registry.CreateTenant, pb.CreateTenantRequest(name="acme"))
    rig.tenant = TenantId(created.tenant.tenant_id)
    mine = rig.store("mine", template="")
    until(lambda: rig.sealed(BLOCKS))
    rig.node.stop()

    async def offboard() -> Change:
        async with EmbeddedRegistry(rig.node.state_dir / "registry") as registry:
            return await registry.offboard_tenant("acme")

    asyncio.run(offboard())
    rig.node.start()
    keyring = Keyring.open(rig.node.state_dir)
    until(lambda: not keyring.has_keys(rig.tenant))
    until(lambda: rig.on_disk(mine) == 0)


@pytest.mark.parametrize(("scope", "name"), [("tenant", "default"), ("model", "rev")])
def test_other_scopes_are_for_good(rig: Rig, scope: str, name: str) -> None:
    mine = rig.store("mine", template="")
    until(lambda: rig.sealed(BLOCKS))
    receipt = rig.receipt(rig.invalidate(scope=scope, name=name).receipt_id)
    assert receipt.is_final
    assert receipt.bytes_reclaimed == receipt.bytes_unreachable == BLOCKS * (BLOCK_BYTES + ON_SSD)
    assert receipt.destroyed_at
    assert rig.on_disk(mine) == 0


def test_a_node_that_dies_meanwhile_finishes_receipt_and_destruction(rig: Rig) -> None:
    mine = rig.store("mine")
    until(lambda: rig.sealed(BLOCKS))
    reader, keys = rig.open("mine")
    rig.engine.locate(reader, keys)
    receipt = rig.invalidate(scope="template", name="t", purge=True)
    assert not receipt.is_final
    rig.node.kill()
    rig.engine.client.close()
    rig.node.start()
    receipt = rig.receipt(receipt.receipt_id, wait_s=20)
    assert receipt.destroyed_at
    assert rig.on_disk(mine) == 0


@pytest.mark.parametrize("kept", ["", "it cannot"])
def test_a_receipt_says_what_an_engine_says_of_its_own_cache(rig: Rig, kept: str) -> None:
    rig.store("mine")
    pong = rig.engine.client.ping(deadline_s=5, dropped=0, kept=kept)
    receipt = rig.invalidate(scope="template", name="t", purge=True, wait_s=0.2)
    [engine] = receipt.nodes[0].engines
    if kept:
        assert (engine.hbm, engine.detail) == ("not_reset", kept)
        return
    assert engine.hbm == "pending"
    incarnation = rig.admin.state().templates["t", "1"].incarnation
    pong = rig.engine.client.ping(deadline_s=5, dropped=pong.version)
    assert bytes(incarnation) in pong.struck
    rig.engine.client.ping(deadline_s=5, dropped=pong.version)
    receipt = rig.receipt(receipt.receipt_id)
    assert receipt.is_final
    assert [one.hbm for one in receipt.nodes[0].engines] == ["reset"]


class _Nobody:
    def session_opened(self, session: Session) -> None: ...
    def session_ended(self, session: Session) -> None: ...
    def processes_changed(self) -> None: ...


async def test_nothing_is_called_destroyed_before_the_ssd_tier_is_there(tmp_path: Path) -> None:
    """It opens late after a takeover, or when its disk is back, with whatever it has of it."""
    limits, ready = StoreLimits(host_bytes=1 << 20, max_blocks=64), asyncio.Event()
    async with (
        EmbeddedRegistry(tmp_path / "registry") as registry,
        BlockStore(
            limits=limits,
            registry=lambda: registry.state,
            clock=time.monotonic,
            events=RecordedEvents(),
            ssd=None,
        ) as store,
    ):
        withdrawals = Withdrawals(
            NodeParts(
                registry=registry,
                store=store,
                sessions=Sessions(store, _Nobody()),
                keyring=Keyring.create_or_open(tmp_path),
                node_id="n1",
                changing=asyncio.Lock(),
                file=tmp_path / "withdrawals",
                models_file=tmp_path / "models",
                awaits_ssd=lambda: not ready.is_set(),
                wall_clock=time.time,
            )
        )
        await registry.register_template("t", "1", b"You are kind.", is_public=False)
        running = asyncio.create_task(withdrawals.run())  # noqa: TID251 - ended below
        await asyncio.sleep(0)
        await registry.invalidate("template", "t", "", purge=True)

        async def row(until: Callable[[NodeRow], bool]) -> NodeRow:
            async with asyncio.timeout(10):
                while True:
                    for found in (await registry.receipt_rows("template:t@2")).values():
                        decoded = msgspec.msgpack.decode(found, type=NodeRow)
                        if until(decoded):
                            return decoded
                    await asyncio.sleep(0.02)

        waits = await row(lambda one: bool(one.failure))
        assert "the SSD tier is not there yet" in waits.failure
        assert waits.destroyed_at == 0
        ready.set()
        done = await row(lambda one: bool(one.destroyed_at))
        assert done.failure == ""
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def test_an_unknown_receipt_is_said_to_be_none(rig: Rig) -> None:
    with pytest.raises(NotFound, match="SCOPE@EPOCH"):
        rig.receipt("template:t@99", wait_s=0)


# ---------------------------------------------------------------------- what left


def state_with(**states: str) -> RegistryState:
    rows = {
        ("t", version): TemplateVersion(
            "t", version, Incarnation(version.encode() * 16), b"x", False, state
        )
        for version, state in states.items()
    }
    return RegistryState(version=1, templates=MappingProxyType(rows))


def test_what_left_is_told_by_scope_and_epoch() -> None:
    before = state_with(a=SERVING, b=RETIRED)
    [gone] = withdrawals(before, promote_template(before, "t", "b").state)
    assert gone == Withdrawal("template:t", 1, frozenset({Incarnation(b"a" * 16)}), for_good=False)
    assert gone.receipt_id == "template:t@1"
    purged = withdraw_template(before, "t", "b", purge=True).state
    [gone] = withdrawals(before, purged)
    assert gone == Withdrawal("template:t", 1, frozenset({Incarnation(b"b" * 16)}), for_good=True)
    assert list(withdrawals(purged, replace(purged, version=9))) == []
    [gone] = withdrawals(before, invalidate_scope(before, "model:m", "retire_model").state)
    assert gone == Withdrawal("model:m", 1, frozenset(), for_good=True)


def test_changes_that_came_together_are_one_for_each_scope() -> None:
    before = state_with(a=SERVING, b=RETIRED)
    after = withdraw_template(before, "t", "a", purge=False).state
    after = withdraw_template(after, "t", "b", purge=True).state
    after = invalidate_scope(after, "model:m", "retire_model").state
    found = {one.receipt_id: one for one in withdrawals(before, after)}
    assert set(found) == {"template:t@2", "model:m@1"}
    assert found["template:t@2"].incarnations == {Incarnation(b"b" * 16)}


def test_a_disk_that_takes_a_part_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A write that ends short is no write: what is under way would be forgotten at the next start."""
    file = tmp_path / "withdrawals"
    module._replace(file, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            module._replace(file, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == b"before"
