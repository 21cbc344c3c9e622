"""A fleet whose machines share no file system: how tenants' secrets get to every node, and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvfabric import doctor, pki
from kvfabric.cli import main
from kvfabric.config import NodeConfig
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.demo.processes import free_addresses
from kvfabric.errors import BadHandle, Fenced, NotFound
from kvfabric.keyring import Keyring
from kvfabric.pki import Identity
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.testing.engine import TinyEngine, payload_of, tiny_hello
from kvfabric.testing.minting import Minter, keys_of
from kvfabric.testing.processes import NodeProcess, RouterProcess, start_all, until
from kvfabric.testing.redis import RedisServer
from kvfabric.tls import Security, open_channel
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, BlockKey, TenantId

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

BLOCKS, BLOCK_BYTES = 4, 4096
LEASE_S = 1.0
NAMES = ("n1", "n2", "n3")


@dataclass
class Machine:
    """A node with files of its own, and an engine there."""

    node: NodeProcess
    admin: AdminClient
    engine: TinyEngine
    number: int = 0

    @property
    def keyring(self) -> Keyring:
        return Keyring.open(self.node.state_dir)

    def status(self) -> pb.NodeStatus:
        status: pb.NodeStatus = self.admin.call(
            self.admin.admin.Status, pb.StatusRequest(sealed_keys=True)
        )
        return status

    def has_all_keys(self) -> bool:
        registry = self.status().registry
        return registry.state == "serving" and not registry.tenants_without_keys

    def open(self, tenant: TenantId, minter: Minter | None = None) -> tuple[str, list[BlockKey]]:
        """As a router would on this machine, or on the one that `minter` has its keys from."""
        self.number += 1
        request = f"r{self.number}"
        minter = minter or Minter(self.node.state_dir)
        while True:
            made = minter.handle(self.engine, request, self.admin.state(), tenant=tenant)
            try:
                opened = self.engine.client.open_handle(request, made, deadline_s=5)
            except Fenced:  # a busy machine renewed its lease late
                until(lambda: self.status().registry.state == "serving")
            else:
                return request, keys_of(opened, "prompt", BLOCKS)

    def keys_of(self, tenant: TenantId, minter: Minter | None = None) -> list[BlockKey]:
        request, keys = self.open(tenant, minter)
        self.engine.release(request)
        return keys

    def store(self, tenant: TenantId) -> list[BlockKey]:
        """And load, so that it goes to SSD."""
        request, keys = self.open(tenant)
        assert self.engine.store(request, keys) == BLOCKS
        self.engine.release(request)
        request, keys = self.open(tenant)
        assert len(self.engine.load(request, keys)) == BLOCKS
        self.engine.release(request)
        until(lambda: {bytes(key) for key in keys} <= set(self.status().sealed_keys))
        return keys

    def on_disk(self, keys: list[BlockKey]) -> int:
        files = [p.read_bytes() for p in (self.node.state_dir / "ssd").iterdir() if p.is_file()]
        return sum(any(payload_of(key, BLOCK_BYTES) in data for data in files) for key in keys)


@dataclass
class Fleet:
    home: Path
    directory: str
    machines: dict[str, Machine]
    routers: list[RouterProcess] = field(default_factory=list)

    def create(self, name: str) -> TenantId:
        admin = self.machines["n1"].admin
        created = admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name=name))
        return TenantId(created.tenant.tenant_id)

    def receipt(self, receipt_id: str, *, at: str = "n1", wait_s: float = 10.0) -> pb.Receipt:
        admin = self.machines[at].admin
        request = pb.GetReceiptRequest(receipt_id=receipt_id, wait_s=wait_s)
        receipt: pb.Receipt = admin.call(admin.registry.GetReceipt, request)
        return receipt

    def certificate(self, role: str, name: str = "x") -> Path:
        return pki.issue(self.home / "pki", Identity(role, name))


@contextlib.contextmanager
def fleet(home: Path, *names: str, tls: bool = True, num_routers: int = 0) -> Iterator[Fleet]:
    pki.init(home / "pki")

    def security(role: str, name: str) -> dict[str, Any]:
        if not tls:
            return {"insecure": "true"}
        return {"tls_dir": pki.issue(home / "pki", Identity(role, name))}

    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(home / "redis"))
        nodes = [
            NodeProcess(
                home / name,
                node_id=name,
                directory=redis.url,
                listen=free_addresses(1)[0],
                epoch_lease_s=LEASE_S,
                ssd_bytes=16 << 20,
                **security("node", name),
            )
            for name in names
        ]
        routers = [
            RouterProcess(home / f"r{n}", directory=redis.url, **security("router", f"r{n}"))
            for n in range(num_routers)
        ]
        stack.enter_context(start_all([*nodes, *routers]))
        machines = {}
        for name, node in zip(names, nodes, strict=True):
            admin = stack.enter_context(AdminClient(node.state_dir / "admin.sock"))
            machine = machines[name] = Machine(node, admin, TinyEngine.connect(node.socket))
            stack.callback(machine.engine.client.close)
            until(lambda machine=machine: machine.status().registry.state == "serving")  # type: ignore[misc]
        yield Fleet(home, redis.url, machines, routers)


def offboard(found: Fleet, tenant: str, *, wait_s: float = 10.0) -> pb.Receipt:
    admin = found.machines["n1"].admin
    request = pb.OffboardTenantRequest(name=tenant, wait_s=wait_s)
    receipt: pb.Receipt = admin.call(admin.registry.OffboardTenant, request)
    return receipt


def only_nodes_and_routers_are_given_secrets(found: Fleet) -> None:
    first, *rest = found.machines.values()
    where = str(first.node.options["listen"])
    assert refused(where, Security("admin", found.certificate("admin"))) == "PERMISSION_DENIED"
    for role in ("node", "router"):
        assert refused(where, Security(role, found.certificate(role))) == ""
    # Of a keyring that is not the fleet's nobody is given anything.
    for machine in rest:
        machine.node.send(signal.SIGSTOP)
    first.keyring.remove_tenants([DEFAULT_TENANT])
    assert refused(where, Security("node", found.certificate("node"))) == "NOT_FOUND"
    for machine in rest:
        machine.node.send(signal.SIGCONT)
        until(machine.has_all_keys)
    until(first.has_all_keys)


def a_model_of_one_machine(found: Fleet) -> None:
    """Its engine is gone and its node started anew; another node is asked for it, by name."""
    where, asked = found.machines["n3"], found.machines["n1"]
    hello = dataclasses.replace(tiny_hello(revision="rev-2"), model="large")
    large = Machine(where.node, where.admin, TinyEngine.connect(where.node.socket, hello))
    keys = large.store(DEFAULT_TENANT)
    until(lambda: b"rev-2" in (where.node.state_dir / "models").read_bytes())
    large.engine.client.close()
    where.engine.client.close()
    where.node.stop()
    where.node.start()
    where.engine = TinyEngine.connect(where.node.socket)
    until(where.has_all_keys)
    assert where.on_disk(keys) == BLOCKS

    def invalidate(name: str) -> pb.Receipt:
        request = pb.InvalidateRequest(scope="model", name=name, wait_s=10)
        receipt: pb.Receipt = asked.admin.call(asked.admin.registry.Invalidate, request)
        return receipt

    with pytest.raises(NotFound, match="there are large, tiny"):
        invalidate("huge")
    where.node.send(signal.SIGSTOP)
    with pytest.raises(NotFound, match="do not answer: n3"):
        invalidate("large")
    where.node.send(signal.SIGCONT)
    until(where.has_all_keys)
    receipt = invalidate("large")
    assert (receipt.scope, receipt.is_final) == ("model:rev-2", True)
    assert {row.node_id: bool(row.bytes_reclaimed) for row in receipt.nodes} == {
        "n1": False,
        "n2": False,
        "n3": True,
    }
    assert where.on_disk(keys) == 0


def test_secrets_reach_every_node_and_end_on_every_node(tmp_path: Path) -> None:
    """One story, because starting processes takes long."""
    with fleet(tmp_path, *NAMES, num_routers=1) as found:
        machines = found.machines
        for machine in machines.values():
            until(machine.has_all_keys)
        only_nodes_and_routers_are_given_secrets(found)
        first = machines["n1"].keyring
        # Which of them began: all have that one's secrets, each its own root key and data keys.
        for machine in machines.values():
            assert machine.keyring.tenant_secret(DEFAULT_TENANT) == first.tenant_secret(
                DEFAULT_TENANT
            )
        data_keys = {machine.keyring.data_key(DEFAULT_TENANT) for machine in machines.values()}
        assert len(data_keys) == len(machines)

        tenant, other = found.create("acme"), found.create("other")
        for machine in machines.values():
            until(lambda machine=machine: machine.keyring.has_keys(tenant))  # type: ignore[misc]
            until(machine.has_all_keys)
        stored = {name: machine.store(tenant) for name, machine in machines.items()}
        assert stored["n1"] == stored["n2"] == stored["n3"], "one namespace, whoever made the keys"
        others = machines["n2"].store(other)
        minter = Minter(machines["n1"].node.state_dir)
        assert machines["n3"].keys_of(tenant, minter) == stored["n1"]

        a_model_of_one_machine(found)

        # A handle key that one machine rotated: the others ask for it when they are shown it first.
        machines["n1"].keyring.rotate_handle_key()
        minter = Minter(machines["n1"].node.state_dir)
        with pytest.raises(BadHandle):
            machines["n2"].open(tenant, minter)
        until(lambda: len(machines["n2"].keyring.handle_keys()) == 2)
        assert machines["n2"].keys_of(tenant, minter) == stored["n2"]

        # The end of a tenant, while one node is away.
        away = machines["n3"]
        away.engine.client.close()
        away.node.kill()
        receipt = offboard(found, "acme", wait_s=3 * LEASE_S)
        kinds = sorted(ack.holder_kind for ack in receipt.acknowledgements)
        assert kinds == ["node", "node", "node", "router"]
        assert [name.partition(".")[0] for name in receipt.not_heard_from] == ["n3"]
        assert not receipt.is_final
        rows = {row.node_id: row for row in receipt.nodes}
        assert set(rows) == {"n1", "n2"}
        for name, row in rows.items():
            machine = machines[name]
            assert receipt.requested_at < row.keys_removed_at <= row.destroyed_at
            assert row.bytes_reclaimed == row.bytes_unreachable > 0
            assert row.keyring_generation == machine.keyring.generation
            assert not machine.keyring.has_keys(tenant)
            assert machine.on_disk(stored[name]) == 0
        assert away.keyring.has_keys(tenant)
        assert away.on_disk(stored["n3"]) == BLOCKS
        assert machines["n2"].on_disk(others) == BLOCKS
        assert len(machines["n2"].engine.load(*machines["n2"].open(other))) == BLOCKS

        # It comes back, does the same, and gets no key of the tenant from anybody.
        away.node.start()
        receipt = found.receipt(receipt.receipt_id)
        assert receipt.is_final
        assert list(receipt.not_heard_from) == []
        assert {row.node_id for row in receipt.nodes} == set(NAMES)
        assert not away.keyring.has_keys(tenant)
        assert away.on_disk(stored["n3"]) == 0
        until(away.has_all_keys)
        for machine in machines.values():
            assert not machine.keyring.has_keys(tenant)
            assert machine.keyring.has_keys(other)


def test_without_a_way_for_secrets_it_is_said_loudly_and_nothing_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin: over plain TCP nobody gives keys. Requests of the tenant are misses where they are not."""
    with fleet(tmp_path, *NAMES, tls=False) as found:
        machines = found.machines
        tenant = found.create("acme")
        have = [m for m in machines.values() if m.keyring.has_keys(tenant)]
        assert have == [machines["n1"]]
        stored = machines["n1"].store(tenant)
        others = [machines["n2"], machines["n3"]]  # one of them at most was the first of the fleet
        until(
            lambda: any(PUBLIC_TENANT in m.status().registry.tenants_without_keys for m in others)
        )
        [lacking, *_] = [
            m for m in others if PUBLIC_TENANT in m.status().registry.tenants_without_keys
        ]
        until(lambda: tenant in lacking.status().registry.tenants_without_keys)
        until(lambda: any("no keys of tenants" in line for line in lacking.node.log))
        found_by_doctor = doctor.examine(
            NodeConfig(
                state_dir=lacking.node.state_dir, directory=found.directory, insecure=True, http=""
            )
        )
        [finding] = [one for one in found_by_doctor if one.subject == "keys of the fleet"]
        assert (finding.result, "keyring_dir" in finding.advice) == (doctor.WARN, True)
        there = ["--admin-socket", str(lacking.node.state_dir / "admin.sock")]
        assert main(["status", *there]) == 0
        assert "no keys of tenants" in capsys.readouterr().out
        with pytest.raises(BadHandle):
            lacking.open(tenant, Minter(machines["n1"].node.state_dir))
        assert machines["n1"].on_disk(stored) == BLOCKS
        # Nobody can ask for them either.
        where = str(machines["n1"].node.options["listen"])
        assert refused(where, Security("node", insecure=True)) == "PERMISSION_DENIED"
        # Whoever has keys of his own may say that those are the fleet's from now on.
        assert main(["tenant", "claim-keys", *there]) == 0
        claimed = lacking.status().registry.tenants_without_keys
        assert list(claimed) == [tenant], "it never had that one"


def refused(address: str, security: Security) -> str:
    """The code of the refusal; empty if keys were given."""
    with open_channel(address, security, (), blocking=True) as channel:
        stub = pb_grpc.KeyringServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            given = stub.Fetch(pb.FetchKeysRequest(tenant_ids=[DEFAULT_TENANT]), timeout=5)
        except grpc.RpcError as exc:
            return str(exc.code().name)
        assert len(given.tenant_secrets[DEFAULT_TENANT]) == 32
        return ""
