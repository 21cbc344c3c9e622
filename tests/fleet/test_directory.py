"""Two nodes, two engines and a router on one Redis, each a process of its own; mTLS between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from kvfabric import pki
from kvfabric.demo.processes import Children, free_addresses
from kvfabric.pki import Identity
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.testing.redis import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

READY_S = 60.0
LEASE_S = 1.0
BOUND_S = LEASE_S + 0.5  # of an invalidation: one lease and a grace
TEMPLATE = "You are a careful assistant. You answer in one word, and you never guess. "
PROMPT = TEMPLATE + "Which of all the words that you know is the best one to end this with? " * 2


@dataclass
class Fleet:
    url: str
    http: aiohttp.ClientSession
    registries: dict[str, Any]
    admins: dict[str, Any]
    key: str = ""

    async def cached(self) -> int:
        """Prompt tokens that the answer did not have to compute."""
        body = {"model": "reference", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.key}"}
        async with self.http.post(
            f"{self.url}/v1/completions", json=body, headers=headers
        ) as answer:
            found = await answer.json()
            assert answer.status == 200, found
        return int(found["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def warm(self) -> None:
        """Ask until what was computed is found again, many times over: on both engines."""
        run = 0
        async with asyncio.timeout(READY_S):
            while run < 6:
                run = run + 1 if await self.cached() else 0

    async def metric(self, line: str) -> bool:
        try:
            async with self.http.get(f"{self.url}/metrics") as answer:
                return line in (await answer.text()).splitlines()
        except aiohttp.ClientError:
            return False

    async def wait_metric(self, line: str) -> None:
        async with asyncio.timeout(READY_S):
            while True:
                if await self.metric(line):
                    return
                await asyncio.sleep(0.05)

    async def wait_serving(self, *nodes: str) -> None:
        async with asyncio.timeout(READY_S):
            while True:
                if {(await self.state_of(node)).state for node in nodes} == {"serving"}:
                    return
                await asyncio.sleep(0.05)

    async def state_of(self, node: str) -> pb.RegistryStatus:
        status: pb.NodeStatus = await self.admins[node].Status(pb.StatusRequest())
        return status.registry


@asynccontextmanager
async def fleet(directory: Path, redis: RedisServer) -> AsyncIterator[Fleet]:
    addresses = free_addresses(5)
    pki.init(directory / "pki")
    shared = [
        "--directory",
        redis.url,
    ]  # and no file: secrets go from node to node and to the router
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children(directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        registries, admins = {}, {}
        rows = zip(("n1", "n2"), addresses, addresses[3:], strict=False)
        for name, address, grpc_address in rows:
            home = directory / name
            flags = ["--state-dir", str(home), "--node-id", name, *shared, "--http", ""]
            flags += ["--host-bytes", "32MiB", "--ssd-bytes", "0", "--listen", grpc_address]
            flags += ["--epoch-lease-s", str(LEASE_S)]
            flags += ["--tls-dir", str(pki.issue(directory / "pki", Identity("node", name)))]
            await children.start(name, ["node", *flags])
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(f"unix:{home}/admin.sock")
            )
            registries[name] = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
            admins[name] = pb_grpc.NodeAdminStub(channel)  # type: ignore[no-untyped-call]
            flags = ["--listen", address, "--engine-id", f"e-{name}", "--block-tokens", "16"]
            flags += ["--node-socket", str(home / "node.sock"), "--max-model-tokens", "1024"]
            flags += ["--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64"]
            await children.start(f"e-{name}", ["engine", *flags])
        flags = ["--state-dir", str(directory / "router"), *shared, "--listen", addresses[2]]
        flags += ["--tls-dir", str(pki.issue(directory / "pki", Identity("router", "r1")))]
        await children.start("router", ["router", *flags, "--policy", "round_robin"])
        found = Fleet(f"http://{addresses[2]}", http, registries, admins)
        await found.wait_metric('kvfabric_router_engines{result="taking"} 2.0')
        await found.wait_metric("kvfabric_router_epoch_lease_valid 1.0")
        yield found


async def test_a_fleet_on_one_directory(tmp_path: Path) -> None:
    """One story, because starting processes takes long."""
    with RedisServer(tmp_path / "redis") as redis:
        async with fleet(tmp_path, redis) as found:
            one, other = found.registries["n1"], found.registries["n2"]
            created = await one.CreateTenant(pb.CreateTenantRequest(name="acme"))
            found.key = created.api_key
            request = pb.RegisterTemplateRequest(name="t", version="1", text=TEMPLATE.encode())
            await other.RegisterTemplate(request)
            await found.warm()

            # Withdrawn at one node: not served by the other one either, and everybody is in the receipt.
            receipt = await one.Invalidate(pb.InvalidateRequest(scope="template", name="t"))
            kinds = sorted(ack.holder_kind for ack in receipt.acknowledgements)
            assert kinds == ["node", "node", "router"]
            assert not any(ack.waited_out for ack in receipt.acknowledgements)
            assert receipt.unreachable_at - receipt.requested_at < BOUND_S
            assert [await found.cached() for _ in range(4)] == [0] * 4
            await other.PromoteTemplate(pb.PromoteTemplateRequest(name="t", version="1"))
            await found.warm()

            # Redis is gone: answers go on, nothing is reused, and it can be seen.
            redis.kill()
            await found.wait_metric("kvfabric_router_epoch_lease_valid 0.0")
            assert [await found.cached() for _ in range(4)] == [0] * 4
            assert (await found.state_of("n1")).state == "no_lease"
            assert "does not answer" in (await found.state_of("n2")).detail

            # It comes back empty: it gets everything back, and the cache is as warm as it was.
            redis.forget()
            redis.start()
            await found.wait_metric("kvfabric_router_epoch_lease_valid 1.0")
            await found.warm()
            await found.wait_serving("n1", "n2")
            receipt = await other.Invalidate(
                pb.InvalidateRequest(scope="template", name="t", purge=True)
            )
            assert len(receipt.acknowledgements) == 3
            assert [await found.cached() for _ in range(4)] == [0] * 4
