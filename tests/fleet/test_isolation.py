"""Two tenants behind a router, an engine and a node: what one has cached shows to the other nowhere.

Each assertion is a pair: the same tenant hits, the other one misses. Then the timing audit of first tokens,
and its control: a router that isolates nothing in front of the same engine.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import msgspec
import pytest
from kvfabric_router.journal import BLOCK_ID_BYTES, Answered, Chosen, Reading, Record

from kvfabric.demo.processes import Child, Children, free_addresses
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from tests.torture.timing import ALPHA, Arms, compare

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

READY_S = 60.0
BLOCK_TOKENS = 16
LENGTH = 240
SAMPLES = 250
OF_CONTROL = 100
TEMPLATES = {
    "known": "Say what you would say to old friends. ",
    "new": "Say what no one would say to anybody!! ",
}
TIERS = ("hbm", "host", "ssd")


def prompt(number: int, length: int = LENGTH) -> str:
    """Always the same text for a number, with nothing in common with another's."""
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz ", k=length))


@dataclass
class Deployment:
    """`urls`: of the router with the fabric and of the one without it."""

    urls: dict[str, str]
    http: aiohttp.ClientSession
    children: Children
    admin: Any
    engine: Child
    engine_flags: list[str]
    journal: Path
    num_asked: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    async def ask(
        self, who: str, text: str, *, via: str = "fabric", **fields: Any
    ) -> tuple[Any, str]:
        """(usage, request id)."""
        body = {"model": "reference", "prompt": text, "max_tokens": 1, "temperature": 0, **fields}
        headers = {"Authorization": f"Bearer {self.keys[who]}"}
        url = f"{self.urls[via]}/v1/completions"
        async with self.http.post(url, json=body, headers=headers) as answer:
            found = await answer.json()
            assert answer.status == 200, found
            self.num_asked += via == "fabric"
            return found["usage"]["prompt_tokens_details"], answer.headers["x-request-id"]

    async def reused(self, who: str, text: str, **fields: Any) -> dict[str, int]:
        """Tokens that were not computed, by tier; only tiers that gave some."""
        details, _ = await self.ask(who, text, **fields)
        by_tier = {tier: int(details["kvfabric"][f"{tier}_tokens"]) for tier in TIERS}
        assert sum(by_tier.values()) == details["cached_tokens"]
        return {tier: tokens for tier, tokens in by_tier.items() if tokens}

    async def explained(self, who: str, request_id: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.keys[who]}"}
        url = f"{self.urls['fabric']}/v1/explain/{request_id}"
        async with self.http.get(url, headers=headers) as answer:
            return answer.status, await answer.json()

    async def metric(self, line: str, via: str = "fabric") -> bool:
        try:
            async with self.http.get(f"{self.urls[via]}/metrics") as answer:
                return line in (await answer.text()).splitlines()
        except aiohttp.ClientError:
            return False

    async def wait_taking(self) -> None:
        for via in self.urls:
            await self.engine.wait_ready(
                lambda via=via: self.metric('kvfabric_router_engines{result="taking"} 1.0', via),  # type: ignore[misc]
                READY_S,
            )

    async def restart_engine(self) -> None:
        """Its HBM is empty afterwards."""
        await self.engine.stop()
        await self.engine_gone()
        self.engine = await self.children.start("engine", self.engine_flags)
        await self.wait_taking()

    async def engine_gone(self) -> None:
        line = 'kvfabric_router_engines{result="taking"} 1.0'
        while await self.metric(line):
            pass

    async def status(self) -> pb.NodeStatus:
        found: pb.NodeStatus = await self.admin.Status(pb.StatusRequest())
        return found


@asynccontextmanager
async def deployment(directory: Path) -> AsyncIterator[Deployment]:
    engine_at, *routers_at = free_addresses(3)
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children(directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        state = ["--state-dir", str(directory)]
        flags = ["node", *state, "--http", "", "--host-bytes", "256MiB", "--ssd-bytes", "0"]
        node = await children.start("node", flags)
        flags = ["engine", "--listen", engine_at, "--block-tokens", str(BLOCK_TOKENS)]
        flags += ["--node-socket", str(directory / "node.sock"), "--max-model-tokens", "1024"]
        flags += ["--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64"]
        engine = await children.start("engine", flags)
        urls = {}
        for via, address in zip(("fabric", "none"), routers_at, strict=True):
            journal = ["--journal-dir", str(directory / "journal")]
            extra = journal if via == "fabric" else ["--fabric", "false"]
            extra += [] if via == "fabric" else ["--engines", f"http://{engine_at}"]
            await children.start(via, ["router", *state, "--listen", address, *extra])
            urls[via] = f"http://{address}"
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"unix:{directory}/admin.sock")
        )
        registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
        admin = pb_grpc.NodeAdminStub(channel)  # type: ignore[no-untyped-call]
        found = Deployment(urls, http, children, admin, engine, flags, directory / "journal")
        await found.wait_taking()
        await node.wait_ready(
            lambda: found.metric("kvfabric_router_epoch_lease_valid 1.0"), READY_S
        )
        for name in ("one", "two"):
            created = await registry.CreateTenant(pb.CreateTenantRequest(name=name))
            found.keys[name] = created.api_key
        for name, text in TEMPLATES.items():
            request = pb.RegisterTemplateRequest(name=name, version="1", text=text.encode())
            await registry.RegisterTemplate(request)
        yield found


async def paired(fleet: Deployment, number: int, tier: str, store: Callable[[], Any]) -> None:
    """`one` stored a prompt and finds it in a tier; `two` does not, and finds its own afterwards."""
    text, tokens = prompt(number), (LENGTH - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert await fleet.reused("one", text) == {}
    await store()
    assert await fleet.reused("one", text) == {tier: tokens}
    assert await fleet.reused("two", text) == {}
    assert await fleet.reused("two", text) == {"hbm": tokens}


async def claims(fleet: Deployment) -> None:
    """What a client says of itself, or of segments, decides nothing."""
    fabric = {"tenant": "one", "public_tokens": LENGTH, "segments": [["t", "1", "00" * 16, 0]]}
    made_up: list[dict[str, Any]] = [
        {"user": "one", "tenant": "one"},
        {"cache_salt": ""},
        {"kv_transfer_params": {"kvfabric": fabric}},
        {"kv_transfer_params": {"kvfabric": "x" * 100}},
    ]
    for number, claim in enumerate(made_up, 50):
        await fleet.ask("one", prompt(number))
        assert await fleet.reused("two", prompt(number), **claim) == {}
        assert await fleet.reused("one", prompt(number), **claim)


def without_times(explained: dict[str, Any]) -> dict[str, Any]:
    """All that an explanation says of reuse and misses."""
    kept = ("reason", "miss", "node", "reusable_tokens", "reachable_tokens", "selected_tokens")
    actual = {
        name: value for name, value in explained["actual"].items() if not name.endswith("_ms")
    }
    reuse = [candidate["reuse_tokens"] for candidate in explained["candidates"]]
    return {name: explained[name] for name in kept} | {"actual": actual, "reuse": reuse}


async def explanations(fleet: Deployment) -> None:
    """Of a prompt that the other tenant has cached, and whose template hit for it; and of one all new."""
    known, new = TEMPLATES["known"] + prompt(3), TEMPLATES["new"] + prompt(4)
    await fleet.ask("one", known)
    _, own = await fleet.ask("one", known)
    status, hit = await fleet.explained("one", own)
    assert status == 200
    assert sum(hit["actual"]["reuse_tokens"].values()) > 0
    told = []
    for text in (known, new):
        _, other = await fleet.ask("two", text)
        status, found = await fleet.explained("two", other)
        assert status == 200
        told.append(without_times(found))
    assert told[0] == told[1] != without_times(hit)
    hidden = await fleet.explained("two", own)
    unknown = await fleet.explained("two", "req-" + "0" * 32)
    assert hidden == unknown
    assert hidden[0] == 404


def block_ids(record: Chosen) -> list[bytes]:
    starts = range(0, len(record.blocks), BLOCK_ID_BYTES)
    return [record.blocks[at : at + BLOCK_ID_BYTES] for at in starts]


def shared_ids(records: list[Chosen]) -> tuple[int, int]:
    """Blocks that prompts of one tenant have in common, and that those of two have."""
    own = others = 0
    for first, second in itertools.combinations(records, 2):
        common = len(set(block_ids(first)) & set(block_ids(second)))
        own += common if first.tenant == second.tenant else 0
        others += common if first.tenant != second.tenant else 0
    return own, others


def reused(records: list[Record], chosen: Chosen) -> int:
    """Tokens that the engine did not compute, as the journal has it."""
    [outcome] = [r.outcome for r in records if isinstance(r, Answered) and r.id == chosen.id]
    return outcome.reused_tokens


async def journals(fleet: Deployment) -> None:
    """The same prompt twice by each: what is recorded joins a tenant's own requests, and no others."""
    text = prompt(5)
    for who in ("one", "one", "two", "two"):
        await fleet.ask(who, text)
    records: list[Record] = []
    async with asyncio.timeout(READY_S):
        while sum(isinstance(record, Answered) for record in records) < fleet.num_asked:
            records = await asyncio.to_thread(list, Reading(fleet.journal))
    chosen = [record for record in records if isinstance(record, Chosen)][-4:]
    one, two = {record.tenant for record in chosen[:2]}, {record.tenant for record in chosen[2:]}
    assert (len(one), len(two), one & two) == (1, 1, set())
    num_blocks = (LENGTH - 1) // BLOCK_TOKENS
    own, others = shared_ids(chosen)
    assert (own, others) == (2 * num_blocks, 0)
    # Promised and got: nothing the first time, by whoever, and all of one's own the second time.
    promised = [max(c.reuse.tokens for c in record.candidates) for record in chosen]
    tokens = num_blocks * BLOCK_TOKENS
    assert promised == [0, tokens, 0, tokens]
    assert [reused(records, record) for record in chosen] == [0, tokens, 0, tokens]
    # Neither who nor what.
    told = b"".join(path.read_bytes() for path in fleet.journal.iterdir() if path.is_file())
    tenants = {row.tenant_id for row in (await fleet.status()).usage}
    for secret in (text, *fleet.keys.values(), *tenants):
        assert secret.encode() not in told
    # The twin: a router that made one tenant's keys of both would be seen.
    twin = [msgspec.structs.replace(chosen[0], tenant=chosen[2].tenant), *chosen[1:]]
    assert shared_ids(twin)[1] == num_blocks


async def first_tokens(
    fleet: Deployment, *, via: str, first: int, samples: int = SAMPLES
) -> Mapping[str, Arms]:
    """Time to the first token of `two`, of what `one` asked just before and of what nobody did.

    Two prompts a round, in random order.
    """
    chance = random.Random(first)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(first, first + samples):
        asked, fresh = prompt(2 * number), prompt(2 * number + 1)
        await fleet.ask("one", asked, via=via)
        for was_stored in chance.sample([True, False], 2):
            began = time.perf_counter()
            await fleet.ask("two", asked if was_stored else fresh, via=via)
            times[not was_stored].append(time.perf_counter() - began)
    return {"first token": Arms(*times)}


async def test_what_one_tenant_has_cached_shows_to_the_other_nowhere(tmp_path: Path) -> None:
    """One story, because starting processes takes long."""
    async with deployment(tmp_path) as fleet:

        async def nothing() -> None: ...

        await paired(fleet, 1, "hbm", nothing)
        await paired(fleet, 2, "host", fleet.restart_engine)
        await claims(fleet)
        await explanations(fleet)
        await journals(fleet)
        usage = {row.tenant_id: row.host_bytes for row in (await fleet.status()).usage}
        assert len([num_bytes for num_bytes in usage.values() if num_bytes]) == 2

        # The first token of one comes neither sooner nor later for what the other asked before.
        samples = await first_tokens(fleet, via="fabric", first=1000)
        if compare(samples)["first token"] < ALPHA:
            again = await first_tokens(fleet, via="fabric", first=2000)
            assert compare(again)["first token"] >= ALPHA

        # Twin and control: without the fabric both share the engine's own cache, and it is seen.
        await fleet.ask("one", prompt(7), via="none")
        details, _ = await fleet.ask("two", prompt(7), via="none")
        assert details["cached_tokens"] > 0
        samples = await first_tokens(fleet, via="none", first=3000, samples=OF_CONTROL)
        assert compare(samples)["first token"] < 1e-6
