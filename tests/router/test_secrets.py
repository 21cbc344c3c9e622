"""A tenant's whole life on real processes that log everything: rotations, the end, and no secret anywhere."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvfabric.demo.processes import Child, Children, free_addresses, run_command
from kvfabric.keyring import Keyring
from kvfabric.types import TenantId

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

READY_S = 60.0
PROMPT = "Which of all the words that you know is the best one to end this with? " * 3
HOLDERS_OF_SECRETS = {"keyring", "root.key"}


@dataclass
class Fleet:
    directory: Path
    url: str
    metrics_of: list[str]
    http: aiohttp.ClientSession
    children: list[Child]
    secrets: set[bytes] = field(default_factory=set)

    async def tenant(self, *arguments: str) -> Any:
        there = ["--admin-socket", str(self.directory / "admin.sock"), "--json"]
        return json.loads(await run_command(["tenant", *arguments, *there]))

    async def keyring(self, verb: str) -> Any:
        self.remember()
        there = ["--keyring-dir", str(self.directory), "--json"]
        found = json.loads(await run_command(["keyring", verb, *there]))
        self.remember()
        return found

    def remember(self) -> None:
        """Everything in the keyring that nobody may see, now."""
        contents = Keyring.open(self.directory)._contents
        for keys in (contents.tenant_secrets, contents.data_keys, contents.handle_keys):
            self.secrets.update(keys.values())
        self.secrets.add((self.directory / "root.key").read_bytes())

    async def ask(self, key: str, prompt: str = PROMPT) -> tuple[int, Any]:
        body = {"model": "reference", "prompt": prompt, "max_tokens": 2, "temperature": 0}
        headers = {"Authorization": f"Bearer {key}"}
        async with self.http.post(
            f"{self.url}/v1/completions", json=body, headers=headers
        ) as answer:
            return answer.status, await answer.json()

    async def cached(self, key: str) -> int:
        status, body = await self.ask(key)
        assert status == 200, body
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def shown(self) -> AsyncIterator[tuple[str, bytes]]:
        """(what, bytes) of everything that processes leave, show or were started with."""
        for path in sorted(self.directory.rglob("*")):
            if path.is_file() and path.name not in HOLDERS_OF_SECRETS:
                yield str(path), path.read_bytes()
        for url in self.metrics_of:
            async with self.http.get(f"{url}/metrics") as answer:
                yield url, await answer.read()
        for child in self.children:
            for name in ("cmdline", "environ"):
                path = Path(f"/proc/{child.pid}/{name}")
                yield str(path), path.read_bytes()

    async def leaks(self) -> list[str]:
        forms = {form for secret in self.secrets for form in forms_of(secret)}
        found = []
        async for what, data in self.shown():
            found += [what for form in forms if form in data]
        return found


def forms_of(secret: bytes) -> Iterator[bytes]:
    """As it is, and as logs and JSON would show it."""
    yield secret
    yield secret.hex().encode()
    yield repr(secret)[2:-1].encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(secret).rstrip(b"=")


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Fleet]:
    engine, router, node_http = free_addresses(3)
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children(directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        state = ["--state-dir", str(directory), "--log-level", "debug"]
        flags = ["--http", node_http, "--host-bytes", "32MiB", "--ssd-bytes", "64MiB"]
        node = await children.start("node", ["node", *state, *flags, "--ssd-encryption", "true"])
        flags = ["--listen", engine, "--engine-id", "e1", "--block-tokens", "16"]
        flags += ["--node-socket", str(directory / "node.sock"), "--max-model-tokens", "1024"]
        flags += ["--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64"]
        worker = await children.start("e1", ["engine", *flags, "--log-level", "debug"])
        front = await children.start("router", ["router", *state, "--listen", router])
        urls = [f"http://{address}" for address in (router, node_http)]
        fleet = Fleet(directory, urls[0], urls, http, [node, worker, front])

        async def ready() -> bool:
            try:
                async with http.get(f"{urls[0]}/readyz") as answer:
                    return bool((await answer.json()).get("epoch_lease")) and answer.status == 200
            except aiohttp.ClientError:
                return False

        await front.wait_ready(ready, READY_S)
        yield fleet


async def warm(fleet: Fleet, keys: Iterable[str]) -> None:
    for key in keys:
        found = 0
        async with asyncio.timeout(READY_S):
            while not found:
                found = await fleet.cached(key)


async def test_rotations_and_the_end_of_a_tenant_and_no_secret_anywhere(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet:
        created = {name: await fleet.tenant("create", name) for name in ("one", "two")}
        keys = {name: one["api_key"] for name, one in created.items()}
        fleet.secrets.update(key.encode() for key in keys.values())
        await warm(fleet, keys.values())

        # What a rotation leaves in force stays in force, and no process starts anew.
        rotated = (await fleet.tenant("key", "rotate", "one", "--grace", "600"))["api_key"]
        fleet.secrets.add(rotated.encode())
        assert await fleet.cached(keys["one"]) > 0
        assert await fleet.cached(rotated) > 0
        last = (await fleet.tenant("key", "rotate", "one"))["api_key"]
        fleet.secrets.add(last.encode())
        assert [(await fleet.ask(key))[0] for key in (keys["one"], rotated)] == [401, 401]
        for verb in ("rotate-root", "rotate-handle-key"):
            await fleet.keyring(verb)
            assert await fleet.cached(last) > 0, verb

        assert (await fleet.ask("kvf-" + "x" * 43))[0] == 401
        tenant_id = TenantId(created["one"]["tenant"]["tenant_id"])
        gone = await fleet.tenant("offboard", "one")
        assert gone["scope"] == f"tenant:{tenant_id}"
        assert {one["holder_kind"] for one in gone["acknowledgements"]} == {"node", "router"}
        assert gone["not_heard_from"] == []
        assert gone["bytes_reclaimed"] == gone["bytes_unreachable"] > 0
        [node] = gone["nodes"]
        assert gone["requested_at"] < node["keys_removed_at"] <= gone["destroyed_at"]
        assert gone["is_final"]
        status, body = await fleet.ask(last)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert await fleet.cached(keys["two"]) > 0, "nobody else notices"
        kept = Keyring.open(tmp_path)._contents
        assert tenant_id not in kept.tenant_secrets
        assert tenant_id not in kept.data_keys
        again = await fleet.tenant("offboard", "one")
        assert (again["is_final"], again["bytes_unreachable"]) == (True, 0)

        fleet.remember()
        assert len(fleet.secrets) >= 14
        assert await fleet.leaks() == []
        # The twin: the same search, and one secret where none may be.
        (tmp_path / "planted.log").write_text(f"DEBUG key {next(iter(fleet.secrets)).hex()}\n")
        assert await fleet.leaks() == [str(tmp_path / "planted.log")]
