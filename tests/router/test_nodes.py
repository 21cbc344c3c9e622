"""The link to a node, over real gRPC on a real Unix socket: index, engines, registry and lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
from kvfabric_router.app import running
from kvfabric_router.registry_view import RegistryView

from kvfabric.config import RouterConfig
from kvfabric.daemon.admin import AdminServer
from kvfabric.daemon.admin_sources import AdminSources, Runs
from kvfabric.daemon.fleet_models import FleetModels
from kvfabric.events.index import Holder
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.lease import boottime
from kvfabric.registry.state import RETIRED, RegistryState
from kvfabric.store.turns import Turns
from kvfabric.types import BlockKey, NodeId, TierName
from tests.router.standin import FINGERPRINT, StandInEngine, engines, until

TAG = b"tag-0001"
KEYS = [BlockKey(bytes([i]) * 32) for i in range(1, 5)]
PREFIXES = b"".join(key[:8] for key in KEYS)
HOST = Holder(NodeId("n1"), TierName.HOST)


class NodePart:
    """What a router sees of a node: the real admin server over a real registry and event stream."""

    def __init__(
        self, directory: Path, registry: EmbeddedRegistry, boot: bytes, lease_s: float
    ) -> None:
        self.registry = registry
        self.events = EventStream(boot_id=boot * 16)
        self.host: list[tuple[bytes, bytes, bytes]] = []
        sources = AdminSources(
            registry,
            Keyring.create_or_open(directory),
            self.events,
            lambda sealed_keys: pb.NodeStatus(),
            self._resident,
            Turns().wait,
            FleetModels(list),
        )
        ahead = 0.0
        self.server = AdminServer(
            directory / "admin.sock",
            sources,
            node_id="n1",
            epoch_lease_s=lease_s,
            clock=lambda: boottime() + ahead,
        )
        ahead = 10.0  # the leases of a life before this one are over

    def _resident(self, tier: TierName) -> Runs:
        yield self.host

    def join(self, engine: StandInEngine) -> None:
        self.events.engine_joined(
            pb.Engine(
                session=engine.session,
                engine_id="e1",
                endpoint=engine.url,
                model="reference",
                model_revision="revision-1",
                layout_fingerprint=FINGERPRINT,
                block_tokens=16,
                block_bytes=4096,
            )
        )


@asynccontextmanager
async def node_part(
    directory: Path, *, boot: bytes = b"a", lease_s: float = 2.0
) -> AsyncIterator[NodePart]:
    async with EmbeddedRegistry(directory / "registry") as registry:
        part = NodePart(directory, registry, boot, lease_s)
        async with part.server:
            yield part


def config(directory: Path) -> RouterConfig:
    return RouterConfig(listen="127.0.0.1:0", state_dir=directory, log_level="warning")


@pytest.fixture
async def engine() -> AsyncIterator[StandInEngine]:
    async with engines() as (one,):
        yield one


async def test_engines_of_a_node_take_requests(tmp_path: Path, engine: StandInEngine) -> None:
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        node.join(engine)
        await until(lambda: len(router.fleet.view().engines) == 1)
        (view,) = router.fleet.view().engines
        assert (view.engine_id, view.node_id, view.session) == ("e1", "n1", engine.session)
        assert view.model is not None
        assert view.model.layout_fingerprint == FINGERPRINT
        node.events.engine_gone(engine.session)
        await until(lambda: all(e.node_id is None for e in router.fleet.view().engines))


async def test_what_was_there_before_and_what_comes_after_is_in_the_index(
    tmp_path: Path, engine: StandInEngine
) -> None:
    async with node_part(tmp_path) as node:
        node.host = [(TAG, b"", PREFIXES[:16])]
        node.join(engine)
        run = BlockRun(namespace_tag=TAG, parent=b"", keys=PREFIXES[:8])
        node.events.engine_events(engine.session, EngineEvents((run,), (), cleared=False))
        async with running(config(tmp_path)) as router:
            hbm = Holder(NodeId("n1"), TierName.HBM, engine.session)
            await until(lambda: set(router.index.match(TAG, KEYS)) == {HOST, hbm})
            node.events.stored(TierName.HOST, TAG, PREFIXES[8:16], PREFIXES[16:24])
            await until(
                lambda: router.index.match(TAG, KEYS)[HOST].tolist() == [True] * 3 + [False]
            )
            node.events.removed(TierName.HOST, TAG, PREFIXES[:8])
            await until(
                lambda: router.index.match(TAG, KEYS)[HOST].tolist() == [False, True, True, False]
            )


@pytest.mark.slow
async def test_a_node_that_comes_back_is_learned_anew(
    tmp_path: Path, engine: StandInEngine
) -> None:
    """Another life holds other blocks; engines serve on meanwhile, without their sessions."""
    async with running(config(tmp_path)) as router:
        async with node_part(tmp_path, lease_s=0.2) as node:
            node.host = [(TAG, b"", PREFIXES)]
            node.join(engine)
            await until(lambda: len(router.fleet.view().engines) == 1)
            await until(lambda: HOST in router.index.match(TAG, KEYS))
        await until(lambda: router.index.match(TAG, KEYS) == {})
        (view,) = router.fleet.view().engines
        assert view.node_id is None
        await until(lambda: router.registry.usable() is None)
        async with node_part(tmp_path, boot=b"b") as node:
            node.host = [(TAG, b"", PREFIXES[:8])]
            node.join(engine)
            await until(lambda: HOST in router.index.match(TAG, KEYS))
            assert router.index.match(TAG, KEYS)[HOST].tolist() == [True, False, False, False]
            await until(lambda: router.registry.usable() is not None)
            await until(lambda: router.fleet.view().engines[0].node_id == "n1")


async def test_a_withdrawal_is_acknowledged_once_it_is_in_force(tmp_path: Path) -> None:
    """When the receipt comes back, this router already follows the new state."""
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        await node.registry.register_template("t", "1", b"hello", is_public=False)
        await until(lambda: _version(router.registry.usable()) == node.registry.state.version)
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/admin.sock") as channel:
            stub = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
            receipt = await stub.Invalidate(pb.InvalidateRequest(scope="template", name="t"))
        usable = router.registry.usable()
        assert usable is not None
        assert usable.templates["t", "1"].state == RETIRED
        acks = {ack.holder_kind: ack.waited_out for ack in receipt.acknowledgements}
        assert acks["router"] is False


async def test_no_withdrawal_succeeds_while_an_older_request_may_still_be_sent(
    tmp_path: Path,
) -> None:
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        await node.registry.register_template("t", "1", b"hello", is_public=False)
        await until(lambda: _version(router.registry.usable()) == node.registry.state.version)
        before = node.registry.state.version
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/admin.sock") as channel:
            stub = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
            with router.registry.sending(before) as sent:
                asking = stub.Invalidate(pb.InvalidateRequest(scope="template", name="t"))
                await until(lambda: _version(router.registry.state) > before)
                await asyncio.sleep(
                    0.1
                )  # nothing happens; the test below shows that it otherwise would
                assert not asking.done()
                sent()
                receipt = await asking
        assert [ack.waited_out for ack in receipt.acknowledgements] == [False, False]


async def test_acknowledging_at_once_would_let_it_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard removed: success is told while a request minted before it is still to be sent."""

    async def at_once(view: RegistryView) -> None:
        pass

    monkeypatch.setattr(RegistryView, "wait_sent", at_once)
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        await node.registry.register_template("t", "1", b"hello", is_public=False)
        await until(lambda: _version(router.registry.usable()) == node.registry.state.version)
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/admin.sock") as channel:
            stub = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
            with router.registry.sending(node.registry.state.version):
                receipt = await stub.Invalidate(pb.InvalidateRequest(scope="template", name="t"))
        acks = {ack.holder_kind: ack.waited_out for ack in receipt.acknowledgements}
        assert acks["router"] is False


async def test_a_request_counts_as_sent_before_it_is_answered(
    tmp_path: Path, engine: StandInEngine
) -> None:
    engine.gate.clear()
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        node.join(engine)
        await until(lambda: len(router.fleet.view().engines) == 1)
        await until(lambda: router.registry.usable() is not None)
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            body = {"model": "reference", "prompt": "hello"}
            asking = group.create_task(http.post(f"{router.url}/v1/completions", json=body))
            await engine.arrived.wait()
            version = router.registry.state.version if router.registry.state else 0
            await node.registry.register_template("t", "1", b"x", is_public=False)
            await until(lambda: _version(router.registry.state) > version)
            await asyncio.wait_for(router.registry.wait_sent(), 1)
            engine.gate.set()
            answer = await asking
            assert answer.status == 200
            answer.release()


async def test_a_node_that_falls_silent_ends_the_lease(tmp_path: Path) -> None:
    """No renewal is answered any more, the connection stays: only the clock can tell."""
    async with node_part(tmp_path) as node, running(config(tmp_path)) as router:
        await until(lambda: router.registry.usable() is not None)
        late = router.registry.lease.now() + 2.0
        router.registry.lease._clock = lambda: late
        assert router.registry.usable() is None
        assert router.links.num_connected
        assert node.registry.state is not None


async def test_without_its_node_a_router_says_that_it_is_not_ready(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as router:
        assert router.registry.state is None
        assert not router.links.num_connected


def _version(state: RegistryState | None) -> int:
    return state.version if state is not None else -1
