"""The registry on a real Redis: the shipped suite, addresses, rights, TLS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.registry.base import Registry
from kvfabric.registry.redis.address import DirectoryAddress, parse
from kvfabric.registry.redis.registry import Holder, RedisRegistry
from kvfabric.testing.redis import RedisServer
from kvfabric.testing.registry import SharedRegistryTests

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
            wall_clock=lambda: 1000.0,
        )
