"""A takeover and the addresses of a node: what its successor cannot have, and a fleet's Redis and TCP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvfabric import pki
from kvfabric.config import NodeConfig
from kvfabric.daemon.admin_client import LOCAL, AdminClient
from kvfabric.daemon.front import Front
from kvfabric.daemon.node import Node
from kvfabric.demo.processes import free_addresses
from kvfabric.errors import ConnectError, Fenced
from kvfabric.pki import Identity
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.engine import TinyEngine, wrong_blocks
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.redis import RedisServer
from kvfabric.tls import Security

pytestmark = [pytest.mark.fleet, pytest.mark.slow]


def taken() -> socket.socket:
    """Somebody else's port."""
    return socket.create_server(("127.0.0.1", 0))


def address_of(sock: socket.socket) -> str:
    return "{}:{}".format(*sock.getsockname())


def hits(engine: TinyEngine, request: str, prompt: str) -> int:
    keys = engine.open(request, prompt, 8)
    found = engine.load(request, keys)
    assert wrong_blocks(keys, found) == 0
    engine.release(request)
    return len(found)


@contextmanager
def running(node: NodeProcess) -> Iterator[NodeProcess]:
    try:
        yield node.start()
    finally:
        node.stop()


@contextmanager
def engine_of(node: NodeProcess) -> Iterator[TinyEngine]:
    """With a prompt stored."""
    engine = TinyEngine.connect(node.socket)
    with engine.client:
        until(lambda: _stored(engine))
        yield engine


def _stored(engine: TinyEngine) -> bool:
    request = f"store-{time.monotonic_ns()}"
    with contextlib.suppress(Fenced):  # as in `is_warm`
        engine.store(request, engine.open(request, "prompt", 8))
        engine.release(request)
    return is_warm(engine)


def is_warm(engine: TinyEngine) -> bool:
    """A member of a fleet whose lease just ended refuses, until it has the next one."""
    with contextlib.suppress(Fenced):
        return hits(engine, f"load-{time.monotonic_ns()}", "prompt") == 8
    return False


def status_of(where: Path | str, security: Security = LOCAL) -> pb.NodeStatus:
    with AdminClient(where, security=security) as admin:
        found: pb.NodeStatus = admin.call(admin.admin.Status, pb.StatusRequest())
        return found


def answers(where: Path | str, security: Security = LOCAL) -> bool:
    try:
        return bool(status_of(where, security).node_id)
    except ConnectError:
        return False


@pytest.mark.parametrize("what", ["http", "listen"])
def test_a_successor_that_cannot_have_its_address_changes_nothing(
    tmp_path: Path, what: str
) -> None:
    """It says why and ends; the daemon that is there serves on, and can be asked."""
    with (
        closing(taken()) as other,
        running(NodeProcess(tmp_path, http="127.0.0.1:0")) as old,
        engine_of(old) as engine,
    ):
        options: dict[str, Any] = {what: address_of(other), "insecure": "true"}
        with pytest.raises(RuntimeError, match=f"node.{what}: cannot listen on"):
            NodeProcess(tmp_path, takeover=True, **options).start()
        until(lambda: answers(tmp_path / "admin.sock"))
        assert old.metrics()["connections"] == 1
        assert hits(engine, "r2", "prompt") == 8
        with running(NodeProcess(tmp_path, takeover=True, http="127.0.0.1:0")) as new:
            assert old.wait() == 0
            assert hits(engine, "r3", "prompt") == 8
            assert new.metrics()["connections"] == 1


@pytest.mark.parametrize("is_checked", [True, False], ids=["guarded", "guard removed"])
async def test_an_address_lost_at_the_last_moment_costs_nothing_but_the_address(
    tmp_path: Path, is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes it after it was looked at: engines are served, and the node can be asked as soon as it
    has it. The twin takes that for an ordinary start, and then nobody serves."""
    monkeypatch.setattr(Front, "check", lambda _: None)
    if not is_checked:
        monkeypatch.setattr(Front, "reopen", Front.open)
    old = await asyncio.to_thread(NodeProcess(tmp_path).start)
    engine = await asyncio.to_thread(TinyEngine.connect, old.socket)
    keys = await asyncio.to_thread(engine.open, "r", "prompt", 8)
    assert await asyncio.to_thread(engine.store, "r", keys) == 8
    with closing(taken()) as other:
        config = NodeConfig(
            state_dir=tmp_path, host_bytes=64 << 20, ssd_bytes=0, http=address_of(other)
        )
        try:
            await _serve(Node(config, takeover=True), engine, other)
            served = True
        except Exception:  # noqa: BLE001 - the twin's, of whatever kind
            served = False
        assert await asyncio.to_thread(old.wait) == 0
        await asyncio.to_thread(engine.client.close)
    assert served == is_checked


async def _serve(node: Node, engine: TinyEngine, other: socket.socket) -> None:
    async with node:
        assert await asyncio.to_thread(hits, engine, "r2", "prompt") == 8
        assert await asyncio.to_thread(answers, node.config.admin_socket_path)
        assert "http shut" in repr(node.front)
        other.close()
        await asyncio.to_thread(until, lambda: node.front.http_address == node.config.http)
        assert await asyncio.to_thread(hits, engine, "r3", "prompt") == 8


def test_a_member_of_a_fleet_is_taken_over(tmp_path: Path) -> None:
    """With its registry in Redis and its own TCP port: the same port, the registry as it was, one holder
    of a lease afterwards, and a withdrawal reaches it."""
    (listen,) = free_addresses(1)
    pki.init(tmp_path / "pki")
    admin_of_all = Security("admin", pki.issue(tmp_path / "pki", Identity("admin", "a1")))

    def status() -> pb.NodeStatus:
        return status_of(listen, admin_of_all)

    with RedisServer(tmp_path / "redis") as redis:
        options: dict[str, Any] = {
            "directory": redis.url,
            "keyring_dir": str(tmp_path / "keys"),
            "tls_dir": str(pki.issue(tmp_path / "pki", Identity("node", "n1"))),
            "listen": listen,
            "node_id": "n1",
            "epoch_lease_s": 0.5,
        }
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(running(NodeProcess(tmp_path / "n", **options)))
            until(lambda: status().registry.state == "serving")
            engine = stack.enter_context(engine_of(old))
            with AdminClient(listen, security=admin_of_all) as admin:
                admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name="acme"))
            before = status()
            with running(NodeProcess(tmp_path / "n", takeover=True, **options)):
                assert old.wait() == 0
                until(lambda: is_warm(engine))
                until(lambda: answers(listen, admin_of_all))
                until(lambda: status().registry.num_holders == 1)
                until(lambda: status().registry.state == "serving")
                assert status().boot_id != before.boot_id
                with AdminClient(listen, security=admin_of_all) as admin:
                    names = {tenant.name for tenant in admin.state().tenants.values()}
                    assert "acme" in names
                    request = pb.InvalidateRequest(scope="tenant", name="default")
                    receipt = admin.call(admin.registry.Invalidate, request)
                assert [one.holder_kind for one in receipt.acknowledgements] == ["node"]
                assert hits(engine, "r3", "prompt") == 0
