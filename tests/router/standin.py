"""A stand-in for an engine: a real HTTP server that speaks an engine's API and does as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from kvfabric_router.app import Router, running

from kvfabric.config import RouterConfig
from kvfabric.handle import SESSION_HEADER
from kvfabric.keyring import Keyring
from kvfabric.registry.state import RegistryState, TemplateVersion, Tenant
from kvfabric.types import Incarnation, TenantId

BLOCK_TOKENS = 16
FINGERPRINT = bytes(range(32))
REGISTRY_ID = b"r" * 16
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 2,
    "total_tokens": 42,
    "prompt_tokens_details": {
        "cached_tokens": 32,
        "kvfabric": {"hbm_tokens": 16, "host_tokens": 16, "ssd_tokens": 0},
    },
}


class StandInEngine:
    """`requests`: every body it got. `cancelled`: how many it saw given up by the router."""

    def __init__(self) -> None:
        self.url = ""
        self.session = b"s" * 16
        self.tokenizer = "byte"
        self.max_model_tokens = 4096
        self.model = "reference"
        self.is_fabric = True
        self.requests: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.cancelled = asyncio.Event()
        self.num_running = 0
        self.num_cancelled = 0
        self.arrived = asyncio.Event()
        self.checks_session = True
        self.misdirected = 0
        self.status = 200
        self.answer = b""
        """Instead of its own: JSON, or whole events for who streams."""
        self.break_after: int | None = None
        self.texts: tuple[str, ...] = ("a", "b")
        self.says_done = True
        self.gate = asyncio.Event()
        self.gate.set()
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self._report())

    def _report(self) -> dict[str, Any]:
        model: dict[str, Any] = {"id": self.model, "object": "model"}
        if self.is_fabric:
            model["kvfabric"] = {
                "session": self.session.hex(),
                "model_revision": "revision-1",
                "layout_fingerprint": FINGERPRINT.hex(),
                "block_tokens": BLOCK_TOKENS,
                "tokenizer": self.tokenizer,
                "max_model_tokens": self.max_model_tokens,
            }
        return {"object": "list", "data": [model]}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = msgspec.json.decode(raw)
        meant = request.headers.get(SESSION_HEADER, self.session.hex())
        if self.checks_session and meant != self.session.hex():
            self.misdirected += 1
            return web.json_response(self._report(), status=421)
        self.requests.append(body)
        self.raw.append(raw)
        self.headers.append(request.headers)
        self.arrived.set()
        self.num_running += 1
        try:
            if self.answer:
                is_stream = self.status == 200 and body.get("stream")
                content_type = "text/event-stream" if is_stream else "application/json"
                return web.Response(status=self.status, body=self.answer, content_type=content_type)
            if self.status != 200:
                error = {"error": {"message": "engine says no", "type": "x", "code": "y"}}
                return web.json_response(error, status=self.status)
            if body.get("stream"):
                return await self._stream(request, body)
            await self.gate.wait()
            if self.break_after is not None:
                return _break(request)
            return web.json_response({"choices": [{"index": 0, "text": "ab"}], "usage": USAGE})
        except asyncio.CancelledError:
            self.cancelled.set()
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.break_after == 0:
            return _break(request)
        await response.prepare(request)
        for number, text in enumerate(self.texts):
            if number == self.break_after:
                return _break(request)
            await response.write(_event({"choices": [{"index": 0, "text": text}]}))
            await self.gate.wait()
        if body.get("stream_options", {}).get("include_usage"):
            await response.write(_event({"choices": [], "usage": USAGE}))
        if self.says_done:
            await response.write(b"data: [DONE]\n\n")
        return response


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _break(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@contextlib.asynccontextmanager
async def engines(number: int = 1) -> AsyncIterator[list[StandInEngine]]:
    """That many stand-in engines, each on a port of its own."""
    found = [StandInEngine() for _ in range(number)]
    try:
        for one in found:
            await one.start()
        yield found
    finally:
        for one in found:
            one.gate.set()
            await one.stop()


def tenant(name: str, key: str = "", *, opted_out: bool = False) -> Tenant:
    digests = (hashlib.sha256(key.encode()).digest(),) if key else ()
    return Tenant(TenantId(name), name, api_key_digests=digests, opted_out=opted_out)


def template(
    name: str,
    version: str,
    text: str,
    *,
    state: str = "serving",
    is_public: bool = False,
    after: Sequence[str] = (),
) -> TemplateVersion:
    incarnation = Incarnation(f"{name}/{version}".encode().ljust(16, b".")[:16])
    return TemplateVersion(
        name, version, incarnation, text.encode(), is_public, state, after=tuple(after)
    )


def registry_state(
    tenants: Iterable[Tenant] = (), templates: Iterable[TemplateVersion] = (), *, version: int = 1
) -> RegistryState:
    return RegistryState(
        registry_id=REGISTRY_ID,
        version=version,
        tenants=MappingProxyType({t.tenant_id: t for t in tenants}),
        templates=MappingProxyType({(t.name, t.version): t for t in templates}),
    )


def keyring_with(directory: Path, tenants: Iterable[str] = ()) -> Keyring:
    """The keyring that a node would make in `directory`."""
    keyring = Keyring.create_or_open(directory)
    for name in tenants:
        keyring.add_tenant(TenantId(name))
    return keyring


def config_for(directory: Path, urls: Iterable[str], **keys: Any) -> RouterConfig:
    return RouterConfig(
        listen="127.0.0.1:0", state_dir=directory, engines=tuple(urls), log_level="warning", **keys
    )


def give_lease(router: Router, state: RegistryState, *, ttl_s: float = 60.0) -> None:
    """What the link to a node would do: the state, then a lease on it."""
    router.registry.apply(state)
    router.registry.lease.renewed(
        sent_at=router.registry.lease.now(),
        registry_id=state.registry_id,
        ttl_s=ttl_s,
        version=state.version,
    )


class Client:
    """An HTTP client of one router."""

    def __init__(self, http: aiohttp.ClientSession, router: Router) -> None:
        self._http = http
        self.router = router

    async def get(self, path: str, key: str = "") -> tuple[int, Any, Mapping[str, str]]:
        async with self._http.get(self.router.url + path, headers=_bearer(key)) as answer:
            return answer.status, _decoded(await answer.read()), answer.headers

    async def post(
        self,
        body: Any,
        *,
        key: str = "",
        path: str = "/v1/completions",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        sent = {**_bearer(key), **(headers or {})}
        async with self._http.post(
            self.router.url + path, data=io.BytesIO(raw), headers=sent
        ) as answer:
            return answer.status, _decoded(await answer.read()), answer.headers

    def open(self, body: Any, *, key: str = "") -> Any:
        """The answer as an async context manager, to be read piece by piece."""
        raw = msgspec.json.encode(body)
        return self._http.post(self.router.url + "/v1/completions", data=raw, headers=_bearer(key))


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return raw


async def until(condition: Callable[[], bool], *, within_s: float = 5) -> None:
    """Wait for what another task is about to do. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the parts under test set no event for tests
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def client_of(
    config: RouterConfig, state: RegistryState | None = None
) -> AsyncIterator[Client]:
    """A running router, its engines probed, with a lease on `state` if one is given."""
    async with running(config) as router, aiohttp.ClientSession() as http:
        if state is not None:
            give_lease(router, state)
        await until(lambda: len(router.fleet.view().engines) >= len(config.engines))
        yield Client(http, router)


def events(raw: bytes) -> Iterator[Any]:
    """The payloads of a server-sent event stream."""
    for event in raw.split(b"\n\n"):
        if event.startswith(b"data: "):
            data = event.removeprefix(b"data: ")
            yield data if data == b"[DONE]" else msgspec.json.decode(data)
