"""Nodes, routers and engines cut off from their fleet's Redis: nothing withdrawn is served, from HBM neither.

Three islands, each a node, a reference engine and a router behind a way to Redis that is cut: one whose
router believes what it last heard for ever, one whose node does, and as the twin one where both do. Beside
them a node and a router that are not cut off. Each process is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.demo.processes import free_addresses
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.processes import until
from kvfabric.testing.redis import RedisServer, Way
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode, ForkedRouter
from tests.torture.scale import at_most, count, record

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

ROUNDS = count(1, 30, "KVFABRIC_TORTURE_PARTITIONS")
LEASE_S = 0.5
READY_S = 60.0
TEMPLATE = "You are a careful assistant. You answer in one word, and you never guess. "
OF_TEMPLATE = (
    TEMPLATE + "Which of all the words that you know is the best one to end this with? " * 2
)
PLAIN = "Nobody registered the text that this prompt begins with, and nobody ever will. " * 2
GUARDS = {
    "stale router": ((), ("no_lease",)),
    "stale node": (("no_lease",), ()),
    "both": (("no_lease",), ("no_lease",)),
}
"""Island -> guards taken out of its node and of its router."""
GUARDED = ("stale router", "stale node")


class Ways:
    """Ways to Redis that can be cut, on a thread of their own; a context manager."""

    def __init__(self, directory: Path, to: Path, names: tuple[str, ...]) -> None:
        self._ways = {
            name: Way(directory / f"{number}.way", to) for number, name in enumerate(names)
        }
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def url(self, name: str) -> str:
        return self._ways[name].url

    def cut(self, *names: str) -> None:
        self._tell(*(self._ways[name].cut for name in names))

    def mend(self, *names: str) -> None:
        self._tell(*(self._ways[name].mend for name in names))

    def _tell(self, *works: Any) -> None:
        done = threading.Event()
        for work in (*works, done.set):
            self._loop.call_soon_threadsafe(work)
        done.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for way in self._ways.values():
                await stack.enter_async_context(way.serving())
            self._serving.set()
            await self._ended.wait()

    def __enter__(self) -> Ways:
        self._thread.start()
        self._serving.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


@dataclass
class Island:
    """`engine_url`: what routers call its engine when no node speaks for it."""

    name: str
    node: ForkedNode
    router: ForkedRouter
    engine_url: str


@dataclass
class Sea:
    """All of it. `admin`: of the node that is never cut off."""

    ways: Ways
    islands: dict[str, Island]
    admin: AdminClient
    router: ForkedRouter
    key: str = ""
    model: str = ""
    numbers: list[int] = field(default_factory=lambda: [0])

    def ask(self, router: ForkedRouter, prompt: str) -> tuple[int, str]:
        """(prompt tokens that were not computed, engine that answered)."""
        body = {"model": "reference", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{router.url}/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=READY_S) as answer:
            found = json.loads(answer.read())
            engine = answer.headers["x-kvfabric-engine"]
        return int(found["usage"]["prompt_tokens_details"]["cached_tokens"]), engine

    def ask_at(self, island: Island, prompt: str) -> int:
        """As `ask`, of the island's own engine through its own router, which takes them in turn."""
        for _ in range(4 * len(GUARDS)):
            cached, engine = self.ask(island.router, prompt)
            if engine in (island.name, island.engine_url):
                return cached
        raise AssertionError(f"the router of {island.name} does not ask its engine")

    def cached(self, prompt: str) -> dict[str, int]:
        """Most tokens that were reused, by island."""
        return {
            name: max(self.ask_at(island, prompt) for _ in range(3))
            for name, island in self.islands.items()
        }

    def warm(self, *prompts: str) -> None:
        for prompt in prompts:
            for island in self.islands.values():
                until(
                    lambda island=island, prompt=prompt: self.ask_at(island, prompt) > 0,  # type: ignore[misc]
                    deadline_s=READY_S,
                )

    def withdraw(self, **request: Any) -> pb.Receipt:
        """Asked of the node that is not cut off; returns when it counts everywhere."""
        receipt: pb.Receipt = self.admin.call(
            self.admin.registry.Invalidate, pb.InvalidateRequest(wait_s=0, **request)
        )
        return receipt

    def waited_out(self, receipt: pb.Receipt) -> int:
        return sum(ack.waited_out for ack in receipt.acknowledgements)


def metric(url: str, line: str) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer,
    ):
        return line in answer.read().decode().splitlines()
    return False


def engine_at(node: ForkedNode, name: str, address: str, log: Path) -> subprocess.Popen[bytes]:
    flags = ["--listen", address, "--engine-id", name, "--block-tokens", "16"]
    flags += ["--node-socket", str(node.socket), "--max-model-tokens", "1024"]
    flags += ["--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "kvfabric", "engine", *flags], stdout=output, stderr=output
        )


@contextlib.contextmanager
def sea(directory: Path) -> Iterator[Sea]:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(directory / "redis"))
        ways = stack.enter_context(Ways(directory, redis.socket, tuple(GUARDS)))
        launcher = stack.enter_context(Launcher())
        keys = directory / "keys"
        shared: dict[str, Any] = {"keyring_dir": keys, "log_level": "error"}

        def node(name: str, url: str, changes: tuple[str, ...] = ()) -> ForkedNode:
            return stack.enter_context(
                ForkedNode(
                    launcher,
                    directory / name.replace(" ", "-"),
                    changes=changes,
                    directory=url,
                    node_id=name.replace(" ", "-"),
                    epoch_lease_s=LEASE_S,
                    **shared,
                )
            )

        def router(name: str, url: str, changes: tuple[str, ...] = ()) -> ForkedRouter:
            found = ForkedRouter(
                launcher,
                directory / f"router-{name.replace(' ', '-')}",
                changes=changes,
                directory=url,
                engines=",".join(urls.values()),
                policy="round_robin",
                **shared,
            )
            stack.enter_context(found)
            return found

        home = node("home", redis.url)
        addresses = free_addresses(len(GUARDS))
        nodes = {name: node(name, ways.url(name), out) for name, (out, _) in GUARDS.items()}
        urls = {name: f"http://{one}" for name, one in zip(GUARDS, addresses, strict=True)}
        for name, address in zip(GUARDS, addresses, strict=True):
            engine = engine_at(nodes[name], name, address, directory / f"{address}.log")
            stack.callback(engine.wait)
            stack.callback(engine.kill)
        islands = {
            name: Island(name, nodes[name], router(name, ways.url(name), out), urls[name])
            for name, (_, out) in GUARDS.items()
        }
        open_router = router("open", redis.url)
        admin = stack.enter_context(AdminClient(home.socket.parent / "admin.sock"))
        found = Sea(ways, islands, admin, open_router)
        created = admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name="acme"))
        found.key = created.api_key
        register(found)
        with AdminClient(nodes["both"].socket.parent / "admin.sock") as other:
            until(lambda: len(_engines(other)) == 1, deadline_s=READY_S)
            found.model = _engines(other)[0].model_revision
        line = 'kvfabric_router_engines{result="taking"} 3.0'
        for one in (open_router, *(island.router for island in islands.values())):
            until(lambda one=one: metric(one.url, line), deadline_s=READY_S)  # type: ignore[misc]
        yield found


def _engines(admin: AdminClient) -> list[pb.Engine]:
    return list(admin.call(admin.admin.Status, pb.StatusRequest()).engines)


def register(found: Sea) -> None:
    request = pb.RegisterTemplateRequest(name="t", version="1", text=TEMPLATE.encode())
    found.admin.call(found.admin.registry.RegisterTemplate, request)


def test_who_is_cut_off_serves_nothing_that_is_withdrawn(tmp_path: Path) -> None:
    """One story, because starting processes takes long."""
    asked = 0
    with sea(tmp_path) as found:
        for _ in range(ROUNDS):
            asked += _cut_off_and_healed(found)
        _without_nodes(found)
    record(
        "partition of nodes and routers from Redis while versions and models are withdrawn",
        asked,
        f"{at_most(0, asked)} requests reused a withdrawn block, in host memory or HBM, in {ROUNDS} rounds; "
        "with node and router both without their lease checks all reuse",
    )


def _cut_off_and_healed(found: Sea) -> int:
    """A version and a model are withdrawn elsewhere; how many requests asked for them."""
    found.warm(OF_TEMPLATE, PLAIN)
    until(lambda: found.ask(found.router, OF_TEMPLATE)[0] > 0)
    found.ways.cut(*GUARDS)
    receipt = found.withdraw(scope="template", name="t")
    assert found.waited_out(receipt) == 2 * len(GUARDS)  # a node and a router of each island
    cached = found.cached(OF_TEMPLATE)
    assert {name: cached[name] for name in GUARDED} == dict.fromkeys(GUARDED, 0)
    assert cached["both"] > 0  # the twin
    found.withdraw(scope="model", name=found.model)
    cached = found.cached(PLAIN)
    assert {name: cached[name] for name in GUARDED} == dict.fromkeys(GUARDED, 0)
    assert cached["both"] > 0

    # A router that heard of it asks engines whose nodes did not: by handles of today.
    asked = [found.ask(found.router, prompt) for prompt in (OF_TEMPLATE, PLAIN) * 6]
    assert {engine for _, engine in asked} == set(GUARDS)
    assert {cached for cached, engine in asked if engine == "stale router"} == {0}

    # What heals is warm again, without help.
    found.ways.mend(*GUARDS)
    promote = pb.PromoteTemplateRequest(name="t", version="1")
    until(lambda: _reaches_all(found, promote), deadline_s=READY_S)
    return 2 * 3 * len(GUARDED) + 4


def _without_nodes(found: Sea) -> None:
    """Without its node an engine reuses by salt alone: of a router that may not vouch for it, by none."""
    for island in found.islands.values():
        island.node.kill()
    found.warm(OF_TEMPLATE)
    found.ways.cut(*GUARDS)
    found.withdraw(scope="template", name="t")
    cached = found.cached(OF_TEMPLATE)
    assert cached["stale node"] == 0
    assert min(cached["stale router"], cached["both"]) > 0  # the twins


def _reaches_all(found: Sea, request: pb.PromoteTemplateRequest) -> bool:
    receipt = found.admin.call(found.admin.registry.PromoteTemplate, request)
    return not found.waited_out(receipt)
