"""Which HTTP server and client the router stands on: what passing one streamed answer on costs with each.

    make .venv-routers && .venv-routers/bin/python benchmarks/bench_http.py [--quick]

A pass-through of 8 kB requests and answers of two pieces, 200 a second, as a process of its own between one
generator and one engine without work. `cpu_ms`: CPU time of the pass-through for a request. `httptools` is no
library but the bound: its parser under two bare protocols, no limits, no errors, no cancellation. Sides that
are not installed are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp
import harness
from aiohttp import web
from routers import free_ports

RATE = 200.0
BODY = json.dumps({"model": "m", "prompt": "x " * 4000, "stream": True}).encode()
NEEDS = {
    "aiohttp": (),
    "aiohttp-uvloop": ("uvloop",),
    "uvicorn-uvloop": ("uvloop", "uvicorn", "httptools"),
    "granian-uvloop": ("uvloop", "granian"),
    "pyreqwest-uvloop": ("uvloop", "pyreqwest"),
    "httptools-uvloop": ("uvloop", "httptools"),
}
_JSON = {"Content-Type": "application/json"}
_HEAD = {"Content-Type": "text/event-stream", "X-Request-Id": "1"}
_PIECE = b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"a"}]}\n\n'
_PAUSE_S = 0.002


# ---------------------------------------------------------------------- the pass-throughs


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def _aiohttp_server(port: int, handler: Callable[[web.Request], Awaitable[Any]]) -> None:
    app = web.Application()
    app.router.add_post("/", handler)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def _aiohttp(port: int, upstream: str) -> None:
    async with _session() as http:

        async def handle(request: web.Request) -> web.StreamResponse:
            answer = await http.post(upstream, data=await request.read(), headers=_JSON)
            response = web.StreamResponse(headers=_HEAD)
            await response.prepare(request)
            while piece := await answer.content.readany():
                await response.write(piece)
            await response.write_eof()
            return response

        await _aiohttp_server(port, handle)


async def _pyreqwest(port: int, upstream: str) -> None:
    client = import_module("pyreqwest.client").ClientBuilder().build()

    async def handle(request: web.Request) -> web.StreamResponse:
        ask = client.post(upstream).headers(_JSON).body_bytes(await request.read())
        async with ask.build_streamed() as answer:
            response = web.StreamResponse(headers=_HEAD)
            await response.prepare(request)
            while (piece := await answer.body_reader.read_chunk()) is not None:
                await response.write(bytes(piece))
            await response.write_eof()
            return response

    await _aiohttp_server(port, handle)


async def _uvicorn(port: int, upstream: str) -> None:
    head = [(name.lower().encode(), value.encode()) for name, value in _HEAD.items()]
    async with _session() as http:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            parts, more = [], True
            while more:
                message = await receive()
                parts.append(message["body"])
                more = message.get("more_body", False)
            answer = await http.post(upstream, data=b"".join(parts), headers=_JSON)
            await send({"type": "http.response.start", "status": 200, "headers": head})
            while piece := await answer.content.readany():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        uvicorn = import_module("uvicorn")
        flags = {"http": "httptools", "lifespan": "off", "log_level": "error", "access_log": False}
        await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **flags)).serve()


async def _granian(port: int, upstream: str) -> None:
    head = [(name.lower(), value) for name, value in _HEAD.items()]
    async with _session() as http:

        class App:
            async def __rsgi__(self, scope: Any, protocol: Any) -> None:
                answer = await http.post(upstream, data=await protocol(), headers=_JSON)
                out = protocol.response_stream(200, head)
                while piece := await answer.content.readany():
                    await out.send_bytes(piece)

        server = import_module("granian.server.embed").Server
        interface = import_module("granian.constants").Interfaces.RSGI
        await server(
            App(), address="127.0.0.1", port=port, interface=interface, log_enabled=False
        ).serve()


class _Raw(asyncio.Protocol):
    """Either side of the bound; `whole` is called with a request's body, `part` with each piece."""

    def __init__(self, parser: str) -> None:
        self._parser_name = parser
        self.whole: Callable[[bytes], None] = lambda body: None
        self.part: Callable[[bytes], None] | None = None
        self._parts: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = getattr(import_module("httptools"), self._parser_name)(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        (self.part or self._parts.append)(data)

    def on_message_complete(self) -> None:
        body, self._parts = b"".join(self._parts), []
        self.parser = getattr(import_module("httptools"), self._parser_name)(self)
        self.whole(body)


async def _httptools(port: int, upstream: str) -> None:
    loop, free = asyncio.get_running_loop(), list[_Raw]()
    to = int(upstream.rpartition(":")[2].rstrip("/"))

    async def pass_on(front: _Raw, body: bytes) -> None:
        back = free.pop() if free else None
        if back is None:
            made = lambda: _Raw("HttpResponseParser")  # noqa: E731
            _, back = await loop.create_connection(made, "127.0.0.1", to)
        is_first = True

        def part(piece: bytes) -> None:
            nonlocal is_first
            head = _ANSWER_HEAD if is_first else b""
            front.transport.write(b"%b%x\r\n%b\r\n" % (head, len(piece), piece))
            is_first = False

        def whole(_: bytes) -> None:
            front.transport.write(b"0\r\n\r\n")
            free.append(back)

        back.part, back.whole = part, whole
        back.transport.write(_ASK_HEAD % len(body) + body)

    async with asyncio.TaskGroup() as group:

        def accepted() -> _Raw:
            front = _Raw("HttpRequestParser")
            front.whole = lambda body: void(group.create_task(pass_on(front, body)))
            return front

        def void(_: object) -> None:
            return None

        await loop.create_server(accepted, "127.0.0.1", port)
        await asyncio.Event().wait()


_ASK_HEAD = (
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
_ANSWER_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_SIDES = {
    "aiohttp": _aiohttp,
    "pyreqwest": _pyreqwest,
    "uvicorn": _uvicorn,
    "granian": _granian,
    "httptools": _httptools,
}


async def _engine(port: int, _: str) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers=_HEAD)
        await response.prepare(request)
        await response.write(_PIECE)
        await asyncio.sleep(_PAUSE_S)
        await response.write(_PIECE + b"data: [DONE]\n\n")
        return response

    await _aiohttp_server(port, handle)


# ---------------------------------------------------------------------- measuring


@contextlib.asynccontextmanager
async def started(name: str, upstream: str = "-") -> AsyncIterator[tuple[str, int]]:
    """(URL, process id) of a side that answers."""
    (port,) = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", name, str(port), upstream
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    await (await http.post(url, data=BODY, headers=_JSON)).read()
                    break
                await asyncio.sleep(0.05)
        yield url, process.pid
    finally:
        process.kill()
        await process.wait()


async def send(url: str, count: int) -> list[float]:
    """Milliseconds to the first byte of each."""
    took = []
    loop = asyncio.get_running_loop()
    async with _session() as http, asyncio.TaskGroup() as group:

        async def one() -> None:
            began = time.perf_counter()
            async with http.post(url, data=BODY, headers=_JSON) as answer:
                await answer.content.readany()
                took.append((time.perf_counter() - began) * 1e3)
                await answer.read()

        began = loop.time()
        for number in range(count):
            await asyncio.sleep(began + number / RATE - loop.time())
            group.create_task(one())
    return took


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    names = [n for n, needs in NEEDS.items() if all(map(importlib.util.find_spec, needs))]
    count = 200 if args.quick else 1_000
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    async with started("engine") as (engine, _):
        for _ in range(1 if args.quick else 3):
            direct = harness.percentile(await send(engine, count // 2), 50)
            for name in names:
                async with started(name, engine) as (url, pid):
                    await send(url, count // 4)
                    before = _cpu_s(pid)
                    added = harness.percentile(await send(url, count), 50) - direct
                    row = {"cpu_ms": (_cpu_s(pid) - before) / count * 1e3, "added_ms_p50": added}
                rows[name].append(row)
                print(json.dumps({"side": name, **row}), flush=True)
    figures = {
        f"{name.replace('-', '_')}_{figure}": harness.median([row[figure] for row in found])
        for name, found in rows.items()
        for figure in ("cpu_ms", "added_ms_p50")
    }
    harness.report("http", args, figures, rows)


def _serve(name: str, port: int, upstream: str) -> None:
    kind, _, loop = name.partition("-")
    run = import_module("uvloop").run if loop else asyncio.run
    run((_engine if kind == "engine" else _SIDES[kind])(port, upstream))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        asyncio.run(main())
