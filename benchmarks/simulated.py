"""Simulated engines: what an engine does, without a model. For benchmarks only.

`EngineModel` and `PrefixCache` are the arithmetic, in trace time; `python benchmarks/simulated.py PORT...`
are engines as real HTTP processes that take `--compression` times less wall time for it. The formula:

    prefill   first come, first served, one prompt at a time: uncached tokens / 8,000 s
    cached    the leading full blocks of 512 tokens that are among the 2,000 kept; the least recently
              used go first, of one prompt its last ones; the last token is always computed
    decode    beside the prefill: (0.006 + 0.00035 * answers in progress) s a token

Blocks are kept from the end of their prefill on. The first token is sent then, the rest of the answer in
one piece at its end: what routers and clients see of load is right, and an answer costs two events.

With `--node` the engine is a session of that node: it opens each request's handle, keys its blocks as any
engine does, and publishes what it keeps and drops, so a router's index hears of it as of a real engine.
With `--host-tier` it also loads from that node and stores there as a connector does, real calls, bytes and
checksums, but for the size of a block, which is 4 KiB; the model adds the time that 64 MiB take:

    fetch     blocks found in the host tier and not in HBM: 512 tokens / 150,000 s each (20 GB/s)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from kvfabric import hashing
from kvfabric.client.aio import AsyncNodeClient
from kvfabric.client.link import EngineHello
from kvfabric.handle import PARAMS_FIELD
from kvfabric.protocol.messages import BlockRun, EngineEvents, Role
from kvfabric.tokenizer import FIRST_BYTE_ID
from kvfabric.types import BlockKey, BlockLayout, GrantState, PartSpec

MODEL = "simulated"
_REVISION = "simulated-1"
_INFORMATION = (
    "/health",
    "/health_generate",
    "/get_model_info",
    "/model_info",
    "/get_server_info",
    "/server_info",
)
_MAX_MODEL_TOKENS = 1 << 20
_DEADLINE_S = 10.0
PART_BYTES = 4096
_WINDOW_BYTES = 1 << 20
_PREFIX_BYTES = 8
_REQUEST_ID = "X-Request-Id"


@dataclass(frozen=True, slots=True)
class EngineModel:
    """See the module; seconds of trace time."""

    block_tokens: int = 512
    hbm_blocks: int = 2_000
    prefill_tokens_per_s: float = 8_000.0
    fetch_tokens_per_s: float = 150_000.0
    decode_s: float = 0.006
    decode_s_per_answer: float = 0.00035

    def prefill_s(self, prompt_tokens: int, cached_tokens: int, fetched_tokens: int = 0) -> float:
        """`fetched_tokens`: those of the cached that come from the host tier."""
        computed = (prompt_tokens - cached_tokens) / self.prefill_tokens_per_s
        return computed + fetched_tokens / self.fetch_tokens_per_s

    def decode_s_of(self, output_tokens: int, num_decoding: int) -> float:
        return output_tokens * (self.decode_s + self.decode_s_per_answer * num_decoding)


class PrefixCache:
    """The blocks that an engine keeps. A key stands for its whole prefix; `tag` is kept with it."""

    def __init__(self, num_blocks: int) -> None:
        self._limit = num_blocks
        self._blocks: OrderedDict[Hashable, bytes] = OrderedDict()

    def match(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks are kept; they were used now."""
        found = 0
        while found < len(keys) and keys[found] in self._blocks:
            found += 1
        for key in reversed(keys[:found]):
            self._blocks.move_to_end(key)
        return found

    def keep(
        self, keys: Sequence[Hashable], tag: bytes = b""
    ) -> tuple[set[Hashable], list[tuple[Hashable, bytes]]]:
        """A prompt was computed: (its blocks that are new, what went for them, with tags)."""
        new = {key for key in keys if key not in self._blocks}
        for key in reversed(keys):
            self._blocks[key] = tag
            self._blocks.move_to_end(key)
        removed = []
        while len(self._blocks) > self._limit:
            removed.append(self._blocks.popitem(last=False))
        new.difference_update(key for key, _ in removed)
        return new, removed


@dataclass(frozen=True, slots=True)
class _Namespace:
    key: bytes = bytes(32)
    tag: bytes = b""


@dataclass(slots=True)
class _Ask:
    """One request at the engine."""

    prompt_tokens: int
    keys: list[BlockKey]
    namespace: _Namespace
    arrived_at: float
    first_token: asyncio.Event
    request_id: str = ""
    took_ms: float = 0.0
    host_blocks: int = 0
    cached_tokens: int = 0
    is_cancelled: bool = False


class SimulatedEngine:
    """One engine: `run` is its prefill loop, `application` its HTTP API."""

    def __init__(
        self, model: EngineModel, *, compression: float, name: str, has_host_tier: bool = False
    ) -> None:
        self._name = name
        self._has_host_tier = has_host_tier
        self._window = asyncio.Lock()  # of the one region that is the whole window
        self._region = 0
        self.client: AsyncNodeClient | None = None
        self._model = model
        self._compression = compression
        self._cache = PrefixCache(model.hbm_blocks)
        self._queue: asyncio.Queue[_Ask] = asyncio.Queue()
        self._num_decoding = 0

    # ------------------------------------------------------------------ the engine

    async def run(self) -> None:
        """Prefill one prompt after the other, until cancelled."""
        async with asyncio.TaskGroup() as stores:
            await self._prefill(stores)

    def join(self, client: AsyncNodeClient) -> None:
        """The node that this engine is a session of."""
        self.client = client
        region = client.window.allocate(_WINDOW_BYTES)
        assert region is not None, "the node gave a smaller window"
        self._region = region

    async def _prefill(self, stores: asyncio.TaskGroup) -> None:
        free_at = 0.0
        block_tokens = self._model.block_tokens
        while True:
            ask = await self._queue.get()
            if ask.is_cancelled:
                if self._has_host_tier and ask.namespace.tag:
                    stores.create_task(self._release(ask))
                continue
            usable = (ask.prompt_tokens - 1) // block_tokens
            from_hbm = self._cache.match(ask.keys[:usable])
            fetched = max(min(ask.host_blocks, usable) - from_hbm, 0)
            ask.cached_tokens = (from_hbm + fetched) * block_tokens
            work_s = self._model.prefill_s(
                ask.prompt_tokens, ask.cached_tokens, fetched * block_tokens
            )
            # From when the engine was free or asked: that this process woke late costs no model time.
            free_at = max(free_at, ask.arrived_at) + work_s / self._compression
            await asyncio.sleep(max(free_at - time.monotonic(), 0.0))
            new, removed = self._cache.keep(ask.keys, ask.namespace.tag)
            ask.first_token.set()
            if self.client is not None and ask.namespace.tag and (new or removed):
                await self.client.publish(_events(ask, new, removed), deadline_s=_DEADLINE_S)
            if self._has_host_tier and ask.namespace.tag:
                stores.create_task(self._store(ask))

    # ------------------------------------------------------------------ the host tier

    async def _load(self, request_id: str, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks came from the node's host tier, verified and confirmed."""
        assert self.client is not None
        matched = await self.client.match(request_id, keys, deadline_s=_DEADLINE_S)
        if not matched.num_blocks:
            return 0
        asked = keys[: matched.num_blocks]
        located = await self.client.load(
            request_id, asked, group=0, shard=0, deadline_s=_DEADLINE_S
        )
        memory = memoryview(bytearray(located.num_blocks * PART_BYTES))
        parts = [memory[i : i + PART_BYTES] for i in range(0, len(memory), PART_BYTES)]
        read = await self.client.read(located, parts)
        confirmed = await self.client.confirm(
            request_id, keys[:read], located, group=0, shard=0, deadline_s=_DEADLINE_S
        )
        return confirmed.num_blocks

    async def _store(self, ask: _Ask) -> None:
        """What was computed of a prompt, a window at a time; ends the request at the node."""
        assert self.client is not None
        parent = ask.keys[ask.host_blocks - 1] if ask.host_blocks else BlockKey(bytes(32))
        at_once = _WINDOW_BYTES // PART_BYTES
        async with self._window:
            for start in range(ask.host_blocks, len(ask.keys), at_once):
                keys = ask.keys[start : start + at_once]
                reserved = await self.client.reserve(
                    ask.request_id, parent, keys, group=0, shard=0, deadline_s=_DEADLINE_S
                )
                granted = [i for i, s in enumerate(reserved.states) if s == GrantState.GRANTED]
                if granted:
                    await self.client.commit(
                        reserved.reservation,
                        granted,
                        [self._region + i * PART_BYTES for i in granted],
                        deadline_s=_DEADLINE_S,
                    )
                parent = keys[-1]
        await self._release(ask)

    async def _release(self, ask: _Ask) -> None:
        assert self.client is not None
        await self.client.release([ask.request_id], deadline_s=_DEADLINE_S)

    # ------------------------------------------------------------------ its HTTP API

    def application(self) -> web.Application:
        """What routers ask of engines of vLLM's and SGLang's kind."""
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
                *(web.get(path, self._information) for path in _INFORMATION),
            ]
        )
        return app

    async def _models(self, request: web.Request) -> web.Response:
        model: dict[str, Any] = {"id": MODEL, "object": "model", "owned_by": "benchmark"}
        if self.client is not None:
            model["kvfabric"] = {
                "session": self.client.session.hex(),
                "model_revision": _REVISION,
                "layout_fingerprint": hashing.layout_fingerprint(_layout(self._model)).hex(),
                "block_tokens": self._model.block_tokens,
                "tokenizer": "byte",
                "max_model_tokens": _MAX_MODEL_TOKENS,
            }
        return web.json_response({"object": "list", "data": [model]})

    async def _information(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"status": "ok", "model_path": MODEL, "served_model_name": MODEL, "is_generation": True}
        )

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        body = msgspec.json.decode(await request.read())
        ask = await self._ask(body, request.headers.get(_REQUEST_ID, ""))
        self._queue.put_nowait(ask)
        is_stream = bool(body.get("stream"))
        output_tokens = max(int(body.get("max_tokens") or 16), 1)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await ask.first_token.wait()
            ask.took_ms = (time.perf_counter() - began) * 1e3
            if is_stream:
                await response.prepare(request)
                await response.write(self._event({"choices": [_choice("a")]}))
            await self._decode(output_tokens)
        finally:
            ask.is_cancelled = True
        usage = _usage(ask, output_tokens)
        if not is_stream:
            return web.json_response({"choices": [_choice("a" * output_tokens)], "usage": usage})
        rest = self._event({"choices": [_choice("a" * (output_tokens - 1), "length")]})
        if (body.get("stream_options") or {}).get("include_usage"):
            rest += self._event({"choices": [], "usage": usage})
        await response.write(rest + b"data: [DONE]\n\n")
        return response

    def _event(self, fields: dict[str, Any]) -> bytes:
        head = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": MODEL}
        named = {**head, "system_fingerprint": self._name, **fields}
        return b"data: " + msgspec.json.encode(named) + b"\n\n"

    async def _decode(self, output_tokens: int) -> None:
        self._num_decoding += 1
        try:
            decode_s = self._model.decode_s_of(output_tokens - 1, self._num_decoding)
            await asyncio.sleep(decode_s / self._compression)
        finally:
            self._num_decoding -= 1

    async def _ask(self, body: dict[str, Any], request_id: str) -> _Ask:
        arrived_at = time.monotonic()
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = np.frombuffer(prompt.encode(), np.uint8).astype(np.uint32) + FIRST_BYTE_ID
        namespace = await self._namespace(body, request_id)
        keys = hashing.block_keys(prompt, self._model.block_tokens, namespace.key)
        ask = _Ask(len(prompt), keys, namespace, arrived_at, asyncio.Event(), request_id)
        if self._has_host_tier and namespace.tag and keys:
            ask.host_blocks = await self._load(request_id, keys)
        return ask

    async def _namespace(self, body: dict[str, Any], request_id: str) -> _Namespace:
        handle = (body.get("kv_transfer_params") or {}).get(PARAMS_FIELD)
        if self.client is None or not handle:
            return _Namespace()
        opened = await self.client.open_handle(request_id, handle, deadline_s=_DEADLINE_S)
        if not self._has_host_tier:
            await self.client.release([request_id], deadline_s=_DEADLINE_S)
        return _Namespace(opened.namespace_key, hashing.namespace_tag(opened.namespace_key))


def _choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}


def _usage(ask: _Ask, output_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": ask.prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": ask.cached_tokens},
        "engine_ms": round(ask.took_ms, 3),
    }


def _events(
    ask: _Ask, new: set[Hashable], removed: Sequence[tuple[Hashable, bytes]]
) -> EngineEvents:
    """As runs: the new blocks of one prompt are its last ones, those that went belong to any namespace."""
    stored = [key for key in ask.keys if key in new]
    gone: dict[bytes, list[bytes]] = {}
    for key, tag in removed:
        assert isinstance(key, bytes)
        if tag:  # of a request without a handle: nobody was told of it
            gone.setdefault(tag, []).append(key[:_PREFIX_BYTES])
    return EngineEvents(
        stored=(_run(ask.namespace.tag, stored),) if stored else (),
        removed=tuple(BlockRun(tag, b"", b"".join(keys)) for tag, keys in gone.items()),
        cleared=False,
    )


def _run(tag: bytes, keys: Sequence[BlockKey]) -> BlockRun:
    return BlockRun(tag, bytes(_PREFIX_BYTES), b"".join(key[:_PREFIX_BYTES] for key in keys))


def _layout(model: EngineModel) -> BlockLayout:
    return BlockLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype="float32",
        block_tokens=model.block_tokens,
        engine_block_tokens=model.block_tokens,
        parts=(PartSpec(0, 0, PART_BYTES),),
    )


async def _serve(port: int, node: str, compression: float, has_host_tier: bool) -> None:
    model = EngineModel()
    name = f"simulated-{port}"
    engine = SimulatedEngine(model, compression=compression, name=name, has_host_tier=has_host_tier)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(
            engine.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        if node:
            hello = EngineHello(
                engine_id=name,
                endpoint=f"http://127.0.0.1:{port}",
                model=MODEL,
                model_revision=_REVISION,
                adapter="",
                adapter_revision="",
                layout=_layout(model),
                shard=0,
                window_bytes=_WINDOW_BYTES,
                role=Role.SCHEDULER | Role.WORKER,
            )
            connecting = AsyncNodeClient.connect(node, hello, deadline_s=_DEADLINE_S)
            engine.join(await stack.enter_async_context(await connecting))
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        async with asyncio.TaskGroup() as group:
            work = group.create_task(engine.run())
            await stop.wait()
            work.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="simulated engines, a process for each port")
    parser.add_argument("ports", type=int, nargs="+")
    parser.add_argument("--node", default="", help="a node's engine socket")
    parser.add_argument("--host-tier", action="store_true", help="load from that node, store there")
    parser.add_argument("--compression", type=float, default=1.0)
    args = parser.parse_args()
    # Forked before there is a loop or a thread: what they import is loaded once.
    engines = []
    for port in args.ports:
        engine = os.fork()
        if not engine:
            asyncio.run(_serve(port, args.node, args.compression, args.host_tier))
            return
        engines.append(engine)
    stop = [signal.SIGTERM, signal.SIGINT]
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    signal.sigwait(stop)
    for engine in engines:
        os.kill(engine, signal.SIGTERM)
    for engine in engines:
        os.waitpid(engine, 0)


if __name__ == "__main__":
    main()
