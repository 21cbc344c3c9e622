"""The auditor of a real node: what it asks after each change, and what it says when a guard is missing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvfabric.config import NodeConfig
from kvfabric.daemon import auditor as module
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.daemon.node import Node
from kvfabric.metrics import Histogram
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.state import RegistryState
from kvfabric.testing.engine import TinyEngine, tiny_hello
from kvfabric.testing.minting import Minter, keys_of, segment_of
from kvfabric.testing.processes import READY, until
from kvfabric.types import DEFAULT_TENANT, BlockKey, MissReason, TenantId
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

BLOCKS = 6


@dataclass
class Rig:
    directory: Path
    admin: AdminClient
    engine: TinyEngine
    minter: Minter
    node: ForkedNode | None = None
    num: int = 0
    tenants: dict[str, TenantId] = field(default_factory=dict)

    def open(
        self, prompt: str, template: str = "", version: str = "1", tenant: str = DEFAULT_TENANT
    ) -> tuple[str, list[BlockKey]]:
        """The template, if there is one, begins in the third block."""
        self.num += 1
        request, state = f"r{self.num}", self.admin.state()
        segments = (segment_of(state, template, version, 40),) if template else ()
        handle = self.minter.handle(
            self.engine, request, state, segments, tenant=self.tenants.get(tenant, DEFAULT_TENANT)
        )
        opened = self.engine.client.open_handle(request, handle, deadline_s=5)
        return request, keys_of(opened, prompt, BLOCKS)

    def store(self, prompt: str, *terms: str) -> None:
        """And use again, so that it goes to SSD."""
        for _ in range(2):
            request, keys = self.open(prompt, *terms)
            self.engine.store(request, keys)
            assert len(self.engine.load(request, keys)) == BLOCKS
            self.engine.release(request)

    def register(self, name: str, version: str = "1") -> None:
        text = pb.RegisterTemplateRequest(
            name=name, version=version, text=f"{name} {version}".encode()
        )
        self.admin.call(self.admin.registry.RegisterTemplate, text)

    def create_tenant(self, name: str) -> None:
        made = self.admin.call(self.admin.registry.CreateTenant, pb.CreateTenantRequest(name=name))
        self.tenants[name] = TenantId(made.tenant.tenant_id)

    def audited(self, receipt: pb.Receipt) -> pb.AuditReport:
        """As the final receipt has it."""
        request = pb.GetReceiptRequest(receipt_id=receipt.receipt_id, wait_s=10)
        [node] = self.admin.call(self.admin.registry.GetReceipt, request).nodes
        assert node.HasField("audit")
        report: pb.AuditReport = node.audit
        return report

    def invalidate(self, scope: str, name: str, **rest: Any) -> pb.AuditReport:
        message = pb.InvalidateRequest(scope=scope, name=name, **rest)
        return self.audited(self.admin.call(self.admin.registry.Invalidate, message))

    def promote(self, name: str, version: str) -> pb.AuditReport:
        message = pb.PromoteTemplateRequest(name=name, version=version)
        return self.audited(self.admin.call(self.admin.registry.PromoteTemplate, message))

    def status(self) -> pb.NodeStatus:
        request = pb.StatusRequest(sealed_keys=True)
        status: pb.NodeStatus = self.admin.call(self.admin.admin.Status, request)
        return status


@contextlib.contextmanager
def rig(launcher: Launcher, directory: Path, *changes: str) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(
            ForkedNode(launcher, directory, changes=changes, ssd_bytes=16 << 20, epoch_lease_s=0.1)
        )
        admin = stack.enter_context(AdminClient(directory / "admin.sock"))
        engine = TinyEngine.connect(node.socket)
        stack.callback(engine.client.close)
        yield Rig(directory, admin, engine, Minter(directory), node)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


def test_every_change_is_audited_with_something_live_beside_it(
    launcher: Launcher, tmp_path: Path
) -> None:
    with rig(launcher, tmp_path) as found:
        assert found.node is not None
        found.register("t")
        found.register("t", "2")
        found.register("other")
        found.create_tenant("acme")
        found.store("kept", "other")
        found.store("mine", "t")
        found.store("acme's", "", "", "acme")
        seen = [found.promote("t", "2")]
        found.store("next", "t", "2")
        seen.append(found.promote("t", "1"))  # warm again, and the other one is gone
        seen.append(found.invalidate("template", "t", version="1"))
        seen.append(found.invalidate("template", "t", version="2", purge=True))
        seen.append(found.invalidate("tenant", "acme"))
        assert [audit.result for audit in seen] == ["passed"] * 5
        # Six blocks of which the last four stand under the template: each was asked for.
        assert [audit.num_refused for audit in seen] == [4, 4, 4, 4, 6]
        assert all(audit.refused_at for audit in seen)

        found.store("of the model", "other")
        audit = found.invalidate("model", "rev")
        assert (audit.result, audit.num_refused) == ("no_control", 0)  # there is no other model
        assert audit.num_uncontrolled >= 6

        status = found.status().audit
        # One more: a version that is registered beside the serving one is out of reach from then on.
        assert (status.num_audits, status.stale_serves, status.alarm) == (7, 0, "")
        # These, and what it asked for again meanwhile: it does so every few seconds.
        assert status.num_refused >= 22
        metrics = found.node.metrics()
        assert metrics["stale_serves_total"] == 0
        assert metrics['audit_probes_total{result="passed"}'] >= 22
        until(lambda: _metric(found, "withdrawal_visible_seconds_count") == 5)
        assert 0 < _metric(found, "withdrawal_visible_seconds_sum") < 5


def test_adapters_and_public_prefixes_are_audited_too(launcher: Launcher, tmp_path: Path) -> None:
    with rig(launcher, tmp_path) as found:
        found.register("t")
        found.register("other")
        adapted = dataclasses.replace(tiny_hello(), adapter="a", adapter_revision="1")
        base = found.engine
        found.engine = TinyEngine.connect(tmp_path / "node.sock", adapted)
        found.store("adapted")
        found.engine.client.close()
        found.engine = base

        def public(template: str, public_blocks: int) -> None:
            """Stored by one tenant: these leading blocks are everybody's."""
            state = found.admin.state()
            handle = found.minter.handle(
                base,
                template,
                state,
                (segment_of(state, template, "1"),),
                tenant=DEFAULT_TENANT,
                public_tokens=public_blocks * 16,
            )
            opened = base.client.open_handle(template, handle, deadline_s=5)
            keys = keys_of(opened, template, BLOCKS)
            assert base.store(template, keys) == BLOCKS
            base.release(template)

        public("other", BLOCKS)  # the only thing live, and public as a whole
        audit = found.invalidate("adapter", "a")
        assert (audit.result, audit.num_refused) == ("passed", BLOCKS)
        public("t", 3)
        audit = found.invalidate("template", "t")
        assert (audit.result, audit.num_refused) == ("passed", BLOCKS)
        found.store("kept")
        audit = found.invalidate("tenant", "public")
        assert audit.result == "passed"
        assert audit.num_refused >= BLOCKS


def _metric(found: Rig, name: str) -> float:
    assert found.node is not None
    return found.node.metrics()[name]


def test_without_anything_live_nothing_has_passed(launcher: Launcher, tmp_path: Path) -> None:
    with rig(launcher, tmp_path) as found:
        found.register("t")
        found.register("empty")
        audit = found.invalidate("template", "empty")
        assert (audit.result, audit.refused_at) == ("nothing_held", 0)
        # The only blocks there are: also the two before the template, which nobody may have with it.
        request, keys = found.open("mine", "t")
        found.engine.store(request, keys)
        found.engine.release(request)
        report = found.invalidate("tenant", "default")
        assert (report.result, report.num_refused) == ("no_control", 0)
        assert report.num_uncontrolled == BLOCKS


def test_what_is_asked_leaves_no_trace(launcher: Launcher, tmp_path: Path) -> None:
    with rig(launcher, tmp_path) as found:
        assert found.node is not None
        found.register("t")
        found.register("other")
        found.store("mine", "t")
        found.store("kept", "other")
        until(lambda: len(found.status().sealed_keys) == 2 * BLOCKS)
        names = ["requests_open", "sessions", "connections", "leased_bytes", "draining_bytes"]
        names += ['blocks_matched_total{tier="host"}', 'misses_total{reason="withdrawn"}']

        def seen() -> list[float]:
            assert found.node is not None
            metrics = found.node.metrics()
            return [metrics.get(name, 0.0) for name in names]

        before, engines = seen(), found.status().engines
        assert found.invalidate("template", "t").result == "passed"
        assert seen() == before
        assert found.status().engines == engines


def test_blocks_on_ssd_are_asked_for(launcher: Launcher, tmp_path: Path) -> None:
    """After a restart they are there alone."""
    with rig(launcher, tmp_path) as found:
        found.register("t")
        found.register("other")
        found.store("mine", "t")
        found.store("kept", "other")
        until(lambda: len(found.status().sealed_keys) == 2 * BLOCKS)
    with rig(launcher, tmp_path) as found:
        audit = found.invalidate("template", "t")
        assert (audit.result, audit.num_refused) == ("passed", 4)


def _store_two(found: Rig) -> None:
    found.register("t")
    found.register("other")
    found.create_tenant("acme")
    found.store("mine", "t")
    found.store("acme's", "", "", "acme")
    found.store("kept", "other")


@pytest.mark.parametrize("on_ssd", [False, True], ids=["host", "ssd"])
def test_without_the_fence_it_is_served_and_loud(
    launcher: Launcher, tmp_path: Path, on_ssd: bool
) -> None:
    """The twin: a node that lets everything pass."""
    with contextlib.ExitStack() as stack:
        if on_ssd:
            with rig(launcher, tmp_path) as found:
                _store_two(found)
                until(lambda: len(found.status().sealed_keys) == 3 * BLOCKS)
                tenants = found.tenants
        found = stack.enter_context(rig(launcher, tmp_path, "no_fence"))
        if on_ssd:
            found.tenants = tenants
        else:
            _store_two(found)
        assert found.node is not None
        audit = found.invalidate("template", "t")
        assert (audit.result, audit.num_refused, audit.num_stale) == ("stale", 0, 4)
        stale = _metric(found, "stale_serves_total")
        assert stale == 4 * 3  # by each handle, and by the request that was open
        audit = found.invalidate("tenant", "acme")
        assert (audit.result, audit.num_stale) == ("stale", BLOCKS)
        assert _metric(found, "stale_serves_total") == stale + BLOCKS  # by the open request
        tier = "ssd" if on_ssd else "host"
        assert f"STALE SERVE: template:t@2, from {tier}, by a stale handle" in found.node.log
        status = found.status().audit
        assert status.stale_serves == stale + BLOCKS
        assert f"tenant:{found.tenants['acme']}@2, from {tier}, by an open request" in status.alarm
        assert _told(found) == (stale + BLOCKS, stale + BLOCKS)
        line = next(line for line in found.node.log.splitlines() if line.startswith(READY))
        with urllib.request.urlopen(f"http://{line.rsplit(' ', 1)[1]}/readyz") as answer:
            assert "the auditor was served withdrawn blocks" in answer.read().decode()


def _told(found: Rig) -> tuple[int, int]:
    """What routers hear: at first contact, and in the newest batch."""
    with grpc.insecure_channel(f"unix:{found.directory}/admin.sock") as channel:
        events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        node = events.Describe(pb.DescribeRequest(), timeout=5)
        request = pb.WatchEventsRequest(boot_id=node.boot_id, from_sequence=node.sequence)
        batch = next(iter(events.Watch(request, timeout=5)))
    return node.stale_serves, batch.stale_serves


def test_without_the_lineage_a_key_is_enough(launcher: Launcher, tmp_path: Path) -> None:
    """The twin of the second guard: today's handle finds yesterday's keys."""
    with rig(launcher, tmp_path, "no_lineage") as found:
        assert found.node is not None
        _store_two(found)
        assert found.invalidate("template", "t").result == "stale"
        assert "by today's handle" in found.node.log
        assert "by a stale handle" not in found.node.log
        assert found.invalidate("tenant", "acme").result == "stale"


async def test_what_died_before_this_life_is_asked_for_all_the_time(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SSD since an earlier life, its version withdrawn then. Beside its twin, in one story."""

    def first_life() -> None:
        with rig(launcher, tmp_path) as found:
            _store_two(found)
            until(lambda: len(found.status().sealed_keys) == 3 * BLOCKS)
            assert found.invalidate("template", "t").result == "passed"

    await asyncio.to_thread(first_life)
    monkeypatch.setattr(module, "EVERY_S", 0.05)
    config = NodeConfig(state_dir=tmp_path, http="", host_bytes=8 << 20, ssd_bytes=16 << 20)
    async with Node(config) as node:
        engine = await asyncio.to_thread(TinyEngine.connect, config.socket_path, tiny_hello())
        await asyncio.to_thread(until, lambda: node.auditor.results["passed"] >= 4)
        assert node.auditor.stale_serves == 0
        monkeypatch.setattr(RegistryState, "fence_reason", lambda *_: MissReason.NONE)
        await asyncio.to_thread(until, lambda: node.auditor.stale_serves > 0)
        assert "withdrawn earlier, from ssd" in node.auditor.alarm
        await asyncio.to_thread(engine.client.close)


def test_a_histogram_counts_at_most_and_sums() -> None:
    seen = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.2, 5.0):
        seen.observe(value)
    assert seen.buckets() == [("0.1", 2.0), ("1", 3.0), ("+Inf", 4.0)]
    assert seen.count == 4
    assert seen.total == pytest.approx(5.35)
