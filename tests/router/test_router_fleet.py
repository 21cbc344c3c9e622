"""A router in front of real engines on a real node, each a process of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from kvfabric.demo.processes import Child, Children, free_addresses, run_command
from kvfabric.hf_tokenizer import FolderTokenizer
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from tests.engine import hf_folder

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

READY_S = 60.0
TEMPLATE = "You are a careful assistant. You answer in one word, and you never guess. "
PROMPT = TEMPLATE + "Which of all the words that you know is the best one to end this with? " * 2


@dataclass
class Deployment:
    """Node, engines and router, with a tenant's key each."""

    url: str
    http: aiohttp.ClientSession
    registry: Any
    node: Child
    router: Child
    engines: dict[str, Child]
    keys: dict[str, str] = field(default_factory=dict)

    async def ask(self, who: str, **fields: Any) -> tuple[int, Any, Mapping[str, str]]:
        body = {"model": "reference", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, **fields}
        headers = {"Authorization": f"Bearer {self.keys[who]}"}
        async with self.http.post(
            f"{self.url}/v1/completions", json=body, headers=headers
        ) as answer:
            return answer.status, await answer.json(), answer.headers

    async def cached(self, who: str, **fields: Any) -> int:
        """Prompt tokens that the answer did not have to compute."""
        status, body, _ = await self.ask(who, **fields)
        assert status == 200, body
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def metric(self, line: str) -> bool:
        try:
            async with self.http.get(f"{self.url}/metrics") as answer:
                return line in (await answer.text()).splitlines()
        except aiohttp.ClientError:
            return False

    async def wait_metric(self, line: str) -> None:
        await self.router.wait_ready(lambda: self.metric(line), READY_S)


RANDOM_MODEL = ("--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64")


@asynccontextmanager
async def deployment(
    directory: Path, *, model: Sequence[str] = RANDOM_MODEL, router: Sequence[str] = ()
) -> AsyncIterator[Deployment]:
    """`model`, `router`: flags of the engines and of the router."""
    addresses = free_addresses(3)
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children(directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        state = ["--state-dir", str(directory)]
        node = await children.start(
            "node",
            ["node", *state, "--http", "", "--host-bytes", "32MiB", "--ssd-bytes", "0"],
        )
        engines = {}
        for name, address in zip(("e1", "e2"), addresses, strict=False):
            flags = ["--listen", address, "--engine-id", name, "--block-tokens", "16"]
            flags += ["--node-socket", str(directory / "node.sock"), "--max-model-tokens", "1024"]
            engines[name] = await children.start(name, ["engine", *flags, *model])
        flags = ["--listen", addresses[2], "--journal-dir", str(directory / "journal")]
        process = await children.start("router", ["router", *state, *flags, *router])
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"unix:{directory}/admin.sock")
        )
        registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
        found = Deployment(f"http://{addresses[2]}", http, registry, node, process, engines)
        await found.wait_metric('kvfabric_router_engines{result="taking"} 2.0')
        await found.wait_metric("kvfabric_router_epoch_lease_valid 1.0")
        for name in ("one", "two"):
            created = await registry.CreateTenant(pb.CreateTenantRequest(name=name))
            found.keys[name] = created.api_key
        yield found


async def settled(fleet: Deployment, prompt: str, tokens: int) -> bool:
    """Ask until at least `tokens` are reused: what was stored is in the index some 20 ms later."""
    for _ in range(50):
        if await fleet.cached("one", prompt=prompt) >= tokens:
            return True
        await asyncio.sleep(0.02)
    return False


async def explain(fleet: Deployment, who: str, request_id: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {fleet.keys[who]}"}
    async with fleet.http.get(f"{fleet.url}/v1/explain/{request_id}", headers=headers) as answer:
        return answer.status, await answer.json()


async def miss_of(fleet: Deployment, prompt: str) -> tuple[str, Any]:
    """Ask once; why it missed, and where it drifted."""
    _, _, headers = await fleet.ask("one", prompt=prompt)
    status, told = await explain(fleet, "one", headers["X-Request-Id"])
    assert status == 200
    return told["miss"]["reason"], told["miss"]["drift"]


async def explained(fleet: Deployment, key_file: Path) -> None:
    """A miss and a hit, told by router, engine and node, to their tenant and nobody else."""
    _, body, headers = await fleet.ask("one", prompt="Something that nobody asked before? " * 4)
    request_id = headers["X-Request-Id"]
    status, told = await explain(fleet, "one", request_id)
    assert status == 200
    assert (told["miss"]["reason"], told["miss"]["first_missing_token"]) == ("absent", 0)
    assert told["node"] == {
        "asked_blocks": 8,
        "host_blocks": 0,
        "ssd_blocks": 0,
        "peer_blocks": 0,
        "reason": "absent",
    }
    assert {one["engine"] for one in told["candidates"]} == {"e1", "e2"}
    assert told["actual"]["prompt_tokens"] == body["usage"]["prompt_tokens"]

    foreign = await explain(fleet, "two", request_id)
    assert foreign == await explain(fleet, "two", "req-" + "0" * 32)
    assert foreign[0] == 404

    _, _, headers = await fleet.ask("one")
    _, told = await explain(fleet, "one", headers["X-Request-Id"])
    assert told["miss"]["reason"] == "none"
    reused = sum(told["actual"]["reuse_tokens"].values())
    assert reused == told["reusable_tokens"] == told["selected_tokens"] > 0

    await asyncio.to_thread(key_file.write_text, fleet.keys["one"])
    command = ["explain", headers["X-Request-Id"], "--router", fleet.url]
    out = await run_command([*command, "--key-file", str(key_file)])
    assert f"reused {reused} of" in out


async def streamed(fleet: Deployment) -> int:
    """Completion tokens of a streamed chat, as its usage has them."""
    body = {
        "model": "reference",
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 5,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {fleet.keys['one']}"}
    async with fleet.http.post(
        f"{fleet.url}/v1/chat/completions", json=body, headers=headers
    ) as answer:
        *_, usage, done = [line for line in (await answer.text()).splitlines() if line]
    assert done == "data: [DONE]"
    return int(json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"])


async def test_reuse_is_found_and_kept_apart(tmp_path: Path) -> None:
    """One story, because starting processes takes long: reuse, tenants, templates, failures."""
    async with deployment(tmp_path) as fleet:
        assert (await fleet.http.post(f"{fleet.url}/v1/completions", json={})).status == 401

        # A stream passes through whole, with its usage.
        assert await streamed(fleet) == 5

        # The same tenant's prompt is reused; another tenant's same prompt is not.
        assert await fleet.cached("one") == 0
        assert await settled(fleet, PROMPT, (len(PROMPT) - 1) // 16 * 16)
        assert await fleet.cached("two") == 0
        await explained(fleet, tmp_path / "key")

        # A registered template has keys of its own; withdrawn, only what stands before it is reused.
        await fleet.registry.RegisterTemplate(
            pb.RegisterTemplateRequest(name="careful", version="1", text=TEMPLATE.encode())
        )
        ahead = "x" * 40  # two whole blocks
        assert await fleet.cached("one", prompt=ahead + PROMPT) == 0
        assert await settled(fleet, ahead + PROMPT, 100)
        await fleet.registry.Invalidate(pb.InvalidateRequest(scope="template", name="careful"))
        assert await fleet.cached("one", prompt=ahead + PROMPT) == 32
        assert await miss_of(fleet, ahead + PROMPT) == ("withdrawn", None)
        await fleet.registry.PromoteTemplate(pb.PromoteTemplateRequest(name="careful", version="1"))
        assert await fleet.cached("one", prompt=ahead + PROMPT) > 100
        changed = TEMPLATE.replace("careful", "reckless")
        drift = {"template": "careful", "version": "1", "segment": "careful", "token": 50}
        assert await miss_of(fleet, ahead + changed + PROMPT) == ("drifted", drift)

        # Nothing is wrong that nobody would notice.
        told = json.loads(await run_command(["doctor", fleet.url, "--json"]))
        assert {finding["result"] for finding in told["findings"]} == {"ok"}, told

        # An engine dies: nobody notices, and what it computed is still there.
        _, _, headers = await fleet.ask("one", prompt=ahead + PROMPT)
        await fleet.engines[headers["x-kvfabric-engine"]].kill()
        for _ in range(4):
            assert await fleet.cached("one", prompt=ahead + PROMPT) > 100

        # The node dies: requests are answered, and after the lease nothing is reused at all.
        await fleet.node.kill()
        assert (await fleet.ask("one"))[0] == 200
        await fleet.wait_metric("kvfabric_router_epoch_lease_valid 0.0")
        for _ in range(3):
            assert await fleet.cached("one", prompt=ahead + PROMPT) == 0

        # Every choice of this story comes out again from what the router wrote.
        await fleet.router.stop()
        replayed = ["replay", str(tmp_path / "journal"), "--json", "--host-times", "2"]
        told = json.loads(await run_command(replayed))
        assert told["choices"] == told["reproduced"] > 20
        assert told["damaged_lines"] == 0
        assert [row["name"] for row in told["rows"]] == [
            "happened",
            "model, as it was",
            "model, what if",
        ]


async def test_a_models_own_tokenizer(tmp_path: Path) -> None:
    """A Hugging Face folder: prompts, chats and templates in them are keyed here as by the engine."""
    folder = hf_folder.write_folder(tmp_path / "tiny", "llama")
    flags = ["--tokenizers", f"tiny={folder}"]
    model = ["--model-path", str(folder)]
    async with deployment(tmp_path, model=model, router=flags) as fleet:
        assert await fleet.cached("one", model="tiny", prompt="the lazy dog jumps " * 40) == 0
        asked = {"model": "tiny", "prompt": "the lazy dog jumps " * 40 + "over the fox"}
        await kept(fleet, asked, least=100)

        # What stands in a chat, where its template puts it, is known to the token.
        await fleet.registry.RegisterTemplate(
            pb.RegisterTemplateRequest(name="careful", version="1", text=TEMPLATE.encode())
        )
        messages = [
            {"role": "user", "content": "the quick fox " * 12},
            {"role": "system", "content": TEMPLATE + "the fox jumps over the lazy dog " * 8},
        ]
        chat = {"model": "tiny", "messages": messages}
        told = await kept(fleet, chat, least=100)
        whole = told["actual"]["prompt_tokens"]
        await fleet.registry.Invalidate(pb.InvalidateRequest(scope="template", name="careful"))
        ours = FolderTokenizer(folder)
        before = ours.encode_chat(messages)
        at = ours.render(messages).index(TEMPLATE)
        first = len(ours.fast.encode(ours.render(messages)[:at], add_special_tokens=False).ids)
        told = await kept(fleet, chat, least=16)
        assert sum(told["actual"]["reuse_tokens"].values()) == first // 16 * 16
        assert whole == len(before)

        found = json.loads(await run_command(["doctor", fleet.url, "--json"]))
        assert {finding["result"] for finding in found["findings"]} == {"ok"}, found


async def kept(fleet: Deployment, body: dict[str, Any], *, least: int) -> Any:
    """Ask until at least so many tokens are reused: as many as were promised, and not by approximation."""
    path = "chat/completions" if "messages" in body else "completions"
    headers = {"Authorization": f"Bearer {fleet.keys['one']}"}
    for _ in range(50):
        async with fleet.http.post(
            f"{fleet.url}/v1/{path}", json={**body, "max_tokens": 2}, headers=headers
        ) as answer:
            assert answer.status == 200, await answer.text()
            request_id = answer.headers["X-Request-Id"]
        _, told = await explain(fleet, "one", request_id)
        reused = sum(told["actual"]["reuse_tokens"].values())
        chosen = told["candidates"][0]
        assert chosen["prompt_tokens"] == told["actual"]["prompt_tokens"]
        if reused >= least and told["selected_tokens"] == reused:
            assert not chosen["reuse_tokens"]["is_approximate"]
            return told
        await asyncio.sleep(0.02)
    raise AssertionError(told)
