"""The registry on a real Redis: the shipped suite, addresses, rights, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfabric import pki
from kvfabric.errors import ConfigError
from kvfabric.pki import Identity
from kvfabric.registry.base import Registry
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.redis import registry as registry_module
from kvfabric.registry.redis.address import DirectoryAddress, Link, parse
from kvfabric.registry.redis.outside import Outside
from kvfabric.registry.redis.registry import Holder, RedisRegistry
from kvfabric.registry.state import TierQuota
from kvfabric.testing.redis import RedisSentinel, RedisServer
from kvfabric.testing.registry import SharedRegistryTests
from kvfabric.types import model_scope

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


def address_of(server: RedisServer, home: Path) -> DirectoryAddress:
    fabric = hashlib.sha256(str(home).encode()).hexdigest()[:16]
    return parse(f"{server.url}?fabric={fabric}", insecure=False)


class TestRedisRegistry(SharedRegistryTests):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.server = server

    def open_holder(self, home: Path, name: str) -> Registry:
        return RedisRegistry(
            address_of(self.server, home),
            home / f"copy-{name}",
            holder=Holder("node", name),
            lease_s=0.1,
            outside=Outside(wall_clock=lambda: 1000.0),
        )


# ---------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("unix:///run/redis.sock", "unix:///run/redis.sock fabric default"),
        ("rediss://u:secret@r1:7000/2?fabric=prod", "rediss://r1:7000 fabric prod"),
        ("rediss://[::1]", "rediss://::1:6379 fabric default"),
        (
            "rediss+sentinel://s1,s2:7/main?replicas=1",
            "rediss+sentinel://s1:26379,s2:7/main fabric default",
        ),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    address = parse(text, insecure=False)
    assert address.shown == shown
    assert "secret" not in repr(address) + shown


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "none of redis"),
        ("http://r1", "'http' is none of"),
        ("redis://r1", "--insecure"),
        ("redis+sentinel://r1/main", "--insecure"),
        ("rediss://", "no HOST"),
        ("rediss://r1:x", "no HOST"),
        ("rediss://r1/x", "db is 'x'"),
        ("rediss://r1?colour=red", "unknown option colour"),
        ("rediss://r1?fabric=a:b", "fabric"),
        ("unix://", "path of a socket"),
        ("unix:///s?ca=/x", "are for rediss"),
        ("rediss+sentinel://s1", "which primary"),
        ("rediss://u:secret@r1?replicas=many", "replicas is 'many'"),
    ],
)
def test_addresses_that_cannot_be_meant(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        parse(text, insecure=False)
    assert "secret" not in str(error.value)


def test_a_password_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("pw")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Link(parse(f"unix:///s?password_file={file}", insecure=False), timeout_s=1.0)
    with pytest.raises(ConfigError, match="cannot read"):
        Link(parse(f"unix:///s?password_file={file}-", insecure=False), timeout_s=1.0)


# ---------------------------------------------------------------------- joining


def holder_at(url: str, home: Path, *, lease_s: float = 0.2) -> RedisRegistry:
    return RedisRegistry(
        parse(url, insecure=True), home, holder=Holder("node", "n"), lease_s=lease_s
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_a_nodes_own_registry_becomes_the_fleets(server: RedisServer, tmp_path: Path) -> None:
    url = f"{server.url}?fabric=moved"
    async with EmbeddedRegistry(tmp_path / "one") as own:
        await own.create_tenant("acme", TierQuota(), TierQuota())
        before = own.state
    async with holder_at(url, tmp_path / "one") as first:
        await until(lambda: first.usable() is not None)
        assert first.state.registry_id == before.registry_id
        assert first.state.tenants == before.tenants
    # Another node with a registry of its own cannot be mixed with it.
    async with EmbeddedRegistry(tmp_path / "two"):
        pass
    with pytest.raises(ConfigError, match="new state_dir"):
        async with holder_at(url, tmp_path / "two"):
            pass
    with pytest.raises(ConfigError, match="belongs to fabric 'moved'"):
        async with holder_at(f"{server.url}?fabric=other", tmp_path / "one"):
            pass


async def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "FIRST_ANSWER_S", 0.1)
    monkeypatch.setattr(registry_module, "LEAVE_S", 0.2)
    pki.init(tmp_path / "pki")
    of_redis = pki.issue(tmp_path / "pki", Identity("redis", "r1"))
    of_node = pki.issue(tmp_path / "pki", Identity("node", "n1"))
    pki.init(tmp_path / "other")
    stranger = pki.issue(tmp_path / "other", Identity("node", "n1"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = {"tls_cert_file": "tls.crt", "tls_key_file": "tls.key", "tls_ca_cert_file": "ca.crt"}
    settings = {name: of_redis / file for name, file in files.items()}

    def url(who: Path, ca: Path) -> str:
        return (
            f"rediss://localhost:{port}?ca={ca / 'ca.crt'}"
            f"&cert={who / 'tls.crt'}&key={who / 'tls.key'}"
        )

    with RedisServer(tmp_path / "redis", tls_port=port, bind="127.0.0.1", **settings):
        async with holder_at(url(of_node, of_node), tmp_path / "a") as registry:
            await until(lambda: registry.usable() is not None)
            await registry.invalidate("model", "m1", "", purge=False)
        for who, ca, match in (
            (of_node, stranger, "CERTIFICATE_VERIFY_FAILED"),
            (stranger, of_node, "UNKNOWN_CA|unknown ca"),
        ):
            async with holder_at(url(who, ca), tmp_path / "b") as registry:
                await until(lambda: re.search(match, registry.status.detail) is not None)  # noqa: B023
                assert registry.usable() is None


async def test_sentinels_name_the_next_primary(tmp_path: Path) -> None:
    """A real fail-over: nothing is lost, because a change counts once a replica has it."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(4)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        main, *others, sentinel = [probe.getsockname()[1] for probe in probes]
    first = RedisServer(tmp_path / "first", port=main, bind="127.0.0.1")
    replicas = [
        RedisServer(
            tmp_path / f"replica-{port}",
            port=port,
            bind="127.0.0.1",
            replicaof=f"127.0.0.1 {main}",
        )
        for port in others
    ]
    watcher = RedisSentinel(tmp_path / "sentinel", port=sentinel, primary=("main", main))
    url = f"redis+sentinel://127.0.0.1:{sentinel}/main?replicas=1"
    with first, replicas[0], replicas[1], watcher:
        async with holder_at(url, tmp_path / "copy", lease_s=0.4) as registry:
            await until(lambda: registry.usable() is not None)
            await until(lambda: watcher.num_replicas("main") == 2)
            await registry.invalidate("model", "m1", "", purge=False)
            first.kill()
            await until(lambda: registry.usable() is None)
            await until(lambda: registry.usable() is not None)
            assert registry.state.epoch(model_scope("m1")) == 1
            await registry.invalidate("model", "m1", "", purge=False)
            assert registry.status.num_restores == 0
            assert sorted(str(server.info("replication")["role"]) for server in replicas) == [
                "master",
                "slave",
            ]


async def test_a_copy_that_another_daemon_wrote_last_is_read_again(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a takeover, in which the one before follows a change while the next one starts."""
    url = f"{server.url}?fabric=takeover"
    async with holder_at(url, tmp_path / "a") as one, holder_at(url, tmp_path / "b") as other:
        await until(lambda: one.usable() is not None and other.usable() is not None)
        database = one._copy.database
        write = database.append

        def behind_its_back(*change: Any) -> None:
            monkeypatch.undo()
            write(*change)
            write(*change)

        monkeypatch.setattr(database, "append", behind_its_back)
        await other.invalidate("model", "m1", "", purge=False)
        await until(lambda: one.status.num_errors.get("conflict", 0) > 0)
        await until(lambda: one.usable() == other.state)
        await other.invalidate("model", "m1", "", purge=False)
        await until(lambda: one.usable() == other.state)
        assert await one.audit_log() == await other.audit_log()
