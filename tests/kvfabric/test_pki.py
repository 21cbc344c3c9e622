"""Certificates: what is made, what is refused and why, and what each role may ask of a real node."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric import pki, tls
from kvfabric.cli import main
from kvfabric.config import NodeConfig
from kvfabric.daemon import peers
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.daemon.node import Node
from kvfabric.daemon.peers import is_allowed, tcp_listener
from kvfabric.demo.processes import free_addresses
from kvfabric.errors import AccessError, ConfigError, Conflict, ConnectError, KVFabricError
from kvfabric.pki import Identity
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.processes import NodeProcess
from kvfabric.tls import Reloaded, Security

DAY_S = 86400.0


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    pki.init(directory)
    return directory


def issue(authority: Path, role: str, name: str = "x", *, seconds: float = DAY_S) -> Path:
    return pki.issue(authority, Identity(role, name), days=seconds / DAY_S)


# ---------------------------------------------------------------------- files


def test_files_are_what_they_should_be(authority: Path) -> None:
    where = issue(authority, "node", "n1")
    assert where == authority / "node-n1"
    assert sorted(os.listdir(where)) == ["ca.crt", "tls.crt", "tls.key"]
    for secret in (authority / "ca" / "ca.key", where / "tls.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert str(tls.load(where).identity) == "node/n1"


def test_a_second_ca_is_not_made_over_the_first(authority: Path) -> None:
    before = (authority / "ca" / "ca.key").read_bytes()
    with pytest.raises(Conflict, match="issue"):
        pki.init(authority)
    assert (authority / "ca" / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    ("role", "name"),
    [("king", "x"), ("node", ""), ("node", "../x"), ("admin", "a/b"), ("node", "ü")],
)
def test_names_that_could_be_taken_for_others_are_refused(
    authority: Path, role: str, name: str
) -> None:
    with pytest.raises(ConfigError, match="role"):
        pki.issue(authority, Identity(role, name))


def test_no_certificate_without_a_ca(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pki init"):
        issue(tmp_path, "node")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "init", str(tmp_path / "pki"), "--host", "10.0.0.1"]) == 0
    assert "ca.key" in capsys.readouterr().out
    assert main(["pki", "issue", str(tmp_path / "pki"), "admin", "alice", "--days", "1"]) == 0
    assert str(tls.load(tmp_path / "pki" / "admin-alice").identity) == "admin/alice"
    assert main(["pki", "init", str(tmp_path / "pki")]) == 1
    assert "holds a CA already" in capsys.readouterr().err


def test_what_is_wrong_with_a_pair_is_said(authority: Path, tmp_path: Path) -> None:
    where = issue(authority, "node")
    pki.init(tmp_path / "other")
    stranger = issue(tmp_path / "other", "node")
    for name, source, match in (
        ("ca.crt", stranger / "ca.crt", "foreign"),
        ("tls.key", stranger / "tls.key", "not the key of"),
        ("tls.crt", authority / "ca" / "ca.key", "cannot be read"),
        ("tls.crt", tmp_path / "nothing", "cannot read"),
    ):
        copy = tmp_path / f"copy-{match}"
        shutil.copytree(where, copy)
        (copy / name).unlink()
        if source.exists():
            shutil.copy(source, copy / name)
        with pytest.raises(ConfigError, match=match):
            tls.load(copy)
    with pytest.raises(ConfigError, match=r"expired at .* UTC"):
        tls.load(issue(authority, "node", "late", seconds=-60))
    with pytest.raises(ConfigError, match="is of router/x, and a node needs"):
        Reloaded(issue(authority, "router"), "node")


def test_a_pair_that_does_not_fit_yet_leaves_the_old_one(authority: Path) -> None:
    where = issue(authority, "node")
    source = Reloaded(where, "node")
    first = source.material
    key = (issue(authority, "node", "y") / "tls.key").read_bytes()
    (where / "tls.key").write_bytes(key)
    assert not source.refresh()
    assert source.material is first
    issue(authority, "node")
    assert source.refresh()
    assert source.material.cert != first.cert
    assert not source.refresh()


# ---------------------------------------------------------------------- a node on TCP


def test_plain_tcp_is_served_only_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"tls_dir .* --insecure"):
        tcp_listener(NodeConfig(state_dir=tmp_path, listen="127.0.0.1:1"))
    with caplog.at_level(logging.WARNING):
        assert tcp_listener(NodeConfig(state_dir=tmp_path, listen="127.0.0.1:1", insecure=True))
    assert "INSECURE" in caplog.text
    with pytest.raises(ConfigError, match="needs --tls-dir"):
        AdminClient("127.0.0.1:1")


@pytest.fixture
def node(authority: Path, tmp_path: Path) -> Iterator[NodeProcess]:
    where = issue(authority, "node", "n1")
    with NodeProcess(tmp_path / "state", listen=free_addresses(1)[0], tls_dir=where) as process:
        yield process


def client(node: NodeProcess, directory: Path, role: str = "admin") -> AdminClient:
    return AdminClient(
        str(node.options["listen"]), security=Security(role, directory), deadline_s=5.0
    )


def meet(address: str, directory: Path, ca: Path) -> tuple[bytes, bytes]:
    """A handshake with the node, whatever our own checks say: (its certificate, its first byte)."""
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="node.kvfabric") as secured,
    ):
        certificate = secured.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate, secured.recv(1)


@pytest.mark.slow
def test_who_may_ask_what_of_a_node(node: NodeProcess, authority: Path, tmp_path: Path) -> None:
    """One story, because starting a node takes long."""
    address = str(node.options["listen"])
    alice = issue(authority, "admin", "alice")
    with client(node, alice) as admin:
        created = admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name="acme"))
        assert created.api_key
        assert admin.call(admin.admin.Status, pb.StatusRequest()).registry.state == "serving"

    # A router may read the registry, and change nothing; another node not even that.
    with client(node, issue(authority, "router"), "router") as router:
        assert "acme" in {tenant.name for tenant in router.state().tenants.values()}
        with pytest.raises(AccessError, match=r"router/x may not call .*CreateTenant"):
            router.call(router.registry.CreateTenant, pb.CreateTenantRequest(name="mine"))
    other_node = issue(authority, "node", "n2")
    with client(node, other_node, "node") as other, pytest.raises(AccessError, match="node/n2"):
        other.state()

    # A foreign one, an expired one, none, and no TLS at all.
    pki.init(tmp_path / "other")
    stranger = issue(tmp_path / "other", "admin")
    with client(node, stranger) as foreign, pytest.raises(ConnectError, match="is refused"):
        foreign.call(foreign.admin.Status, pb.StatusRequest())
    shutil.copy(authority / "ca" / "ca.crt", stranger / "ca.crt")
    with pytest.raises(ConfigError, match="foreign"):
        client(node, stranger)
    with pytest.raises(ConfigError, match="expired"):
        client(node, issue(authority, "admin", "late", seconds=-60))
    plain = AdminClient(address, security=Security("admin", insecure=True), deadline_s=5.0)
    with plain, pytest.raises(KVFabricError):
        plain.call(plain.admin.Status, pb.StatusRequest())

    # The node itself refuses them too: it is not left to who holds the certificate.
    ca = authority / "ca" / "ca.crt"
    assert meet(address, alice, ca)[1]
    assert meet(address, stranger, ca)[1] == b""
    assert meet(address, authority / "admin-late", ca)[1] == b""
    until = time.monotonic() + 10
    while "expired" not in "".join(node.log):  # read by a thread of ours
        assert time.monotonic() < until
        time.sleep(0.02)

    # One that expires under way is refused from then on.
    bob = issue(authority, "admin", "bob", seconds=4)
    with client(node, bob) as admin:
        admin.call(admin.admin.Status, pb.StatusRequest())
    time.sleep(4.1)
    assert meet(address, bob, ca)[1] == b""
    with pytest.raises(ConfigError, match="expired"):
        client(node, bob)

    # The node's own is renewed without a restart.
    before, _ = meet(address, alice, ca)
    assert meet(address, alice, ca)[0] == before
    issue(authority, "node", "n1")
    assert meet(address, alice, ca)[0] != before
    with client(node, alice) as admin:
        admin.call(admin.admin.Status, pb.StatusRequest())

    # The Unix socket is its user's own, and says who asked as before.
    with AdminClient(node.state_dir / "admin.sock") as local:
        local.call(local.admin.Status, pb.StatusRequest())


def test_roles() -> None:
    watch, change = "/kvfabric.v1.RegistryService/Watch", "/kvfabric.v1.RegistryService/Invalidate"
    events, hints = "/kvfabric.v1.NodeEvents/Watch", "/kvfabric.v1.NodeHints/Prefetch"
    load = "/kvfabric.v1.RegistryService/ShareLoad"
    allowed = {
        (role, method)
        for role in pki.ROLES
        for method in (watch, change, events, hints, load)
        if is_allowed(Identity(role, "x"), method)
    }
    assert allowed == {
        *(("admin", method) for method in (watch, change, events, hints, load)),
        *(("router", method) for method in (watch, events, hints, load)),
        ("node", events),
    }
    assert not is_allowed(None, events)


@pytest.mark.slow
async def test_without_the_check_a_router_could_change_the_registry(
    authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the story above."""
    monkeypatch.setattr(peers, "is_allowed", lambda identity, method: True)
    (address,) = free_addresses(1)
    config = NodeConfig(
        state_dir=tmp_path / "state",
        http="",
        host_bytes=1 << 20,
        ssd_bytes=0,
        max_blocks=64,
        listen=address,
        tls_dir=str(issue(authority, "node")),
    )
    router = issue(authority, "router")

    def create() -> str:
        with AdminClient(address, security=Security("router", router)) as one:
            made = one.call(one.registry.CreateTenant, pb.CreateTenantRequest(name="mine"))
            return str(made.tenant.name)

    async with Node(config) as running:
        assert await asyncio.to_thread(create) == "mine"
        (record,) = await running.registry.audit_log()
        assert record.who.startswith("router/x (")
