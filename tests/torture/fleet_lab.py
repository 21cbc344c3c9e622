"""A fleet on machines of its own (network namespaces), a load that replays a trace, and what it saw.

Each node, engine and router, Redis and the client have a machine each, so each can be killed, stopped and cut
off alone. UCX and mTLS go over the machines' network; engines reach their node over its Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from kvfabric import pki
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.demo import slice as demo_slice
from kvfabric.demo.checks import AuditLine, parse_audit
from kvfabric.pki import Identity
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.netns import Network, within
from kvfabric.testing.processes import until
from kvfabric.testing.redis import RedisServer
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedEngine, ForkedNode, ForkedRouter

NUM_NODES, NUM_ROUTERS = 4, 2
NODES = tuple(f"node{n}" for n in range(NUM_NODES))
ENGINES = tuple(f"engine{n}" for n in range(NUM_NODES))
ROUTERS = tuple(f"router{n}" for n in range(NUM_ROUTERS))
NAMES = (*NODES, *ENGINES, *ROUTERS, "redis", "client")
READY_S = 60.0
NODE_PORT = 9400
LEASE_S = 1.0
ANSWER_TOKENS = 8
_MODEL: dict[str, object] = {
    "num_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hbm_blocks": 96,  # less than the trace needs, so that nodes are asked
    "max_model_tokens": 1024,
    "engine_block_tokens": demo_slice.BLOCK_TOKENS,
    "block_tokens": demo_slice.BLOCK_TOKENS,
    "deterministic": "on",
}


Prompts = Sequence[Sequence[int]]
"""Token ids."""


def prompts(count: int, *, other: int = 0) -> Prompts:
    """The first requests of the demo's slice of the Mooncake conversation trace, as token ids.

    `other`: not 0: others of the same shapes, which share nothing with those of another number.
    """
    return [
        demo_slice.prompt([block + (other << 32) for block in request.blocks])
        for request in demo_slice.load()[:count]
    ]


class Lab:
    """A context manager. `changes`: by kind (`node`, `engine`, `router`), of `guards`."""

    def __init__(
        self, directory: Path, *, changes: Mapping[str, tuple[str, ...]], slow: tuple[str, ...] = ()
    ) -> None:
        self.directory = directory
        self.switch = directory / "guards-out"
        self._changes = changes
        self._stack = contextlib.ExitStack()
        self._running: dict[str, ForkedNode] = {}
        self.network = Network(NAMES, slow=slow)
        self.key = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.network)
            self.launcher = stack.enter_context(
                Launcher(environment={"KVFABRIC_GUARDS_OUT": str(self.switch)})
            )
            stack.callback(self._end_processes)
            bind = f"{self.network.address('redis')}"
            self.redis = RedisServer(
                self.directory / "redis",
                namespace=self.network.namespace("redis"),
                bind=bind,
                port=6379,
                protected_mode="no",
            )
            stack.enter_context(self.redis)
            pki.init(self.directory / "pki")
            for name in (*NODES, *ROUTERS):
                pki.issue(self.directory / "pki", Identity(name.rstrip("0123456789"), name))
            for name in NODES:
                self.start(name)
            for name in NODES:
                self._running[name].wait_ready()
            for name in (*ENGINES, *ROUTERS):
                self.start(name)
            with AdminClient(self.directory / "node0" / "admin.sock") as admin:
                until(lambda: _is_serving(admin), deadline_s=READY_S)
                request = pb.CreateTenantRequest(name="acme")
                self.key = admin.call(admin.registry.CreateTenant, request).api_key
            for name in (*ENGINES, *ROUTERS):
                self._running[name].wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _end_processes(self) -> None:
        for name in list(self._running):
            self.kill(name)

    # -- processes -----------------------------------------------------------------------------------

    def start(self, name: str, *changes: str) -> None:
        """Start a process, or start it again as it was, but for `changes`. See `wait_well`."""
        kind = name.rstrip("0123456789")
        if kind == "redis":
            self.redis.start()
            return
        start = {"node": self._node, "engine": self._engine, "router": self._router}[kind]
        self._running[name] = start(name, changes or self._changes.get(kind, ()))

    def _node(self, name: str, changes: tuple[str, ...]) -> ForkedNode:
        address = self.network.address(name)
        return ForkedNode(
            self.launcher,
            self.directory / name,
            changes=changes,
            namespace=self.network.namespace(name),
            node_id=name,
            listen=f"{address}:{NODE_PORT}",
            http=f"{address}:9470",
            ucx_net_devices="eth0",
            epoch_lease_s=LEASE_S,
            host_bytes=32 << 20,
            require_handle="true",
            **self._fleet(name),
        )

    def _router(self, name: str, changes: tuple[str, ...]) -> ForkedNode:
        return ForkedRouter(
            self.launcher,
            self.directory / name,
            changes=changes,
            namespace=self.network.namespace(name),
            listen=f"{self.network.address(name)}:8000",
            # One spreads requests, so that much goes from node to node.
            policy="cost" if name == ROUTERS[0] else "round_robin",
            **self._fleet(name),
        )

    def _fleet(self, name: str) -> dict[str, Any]:
        role = name.rstrip("0123456789")
        return {
            "directory": f"redis://{self.network.address('redis')}",
            "insecure": "true",  # of Redis; nodes and routers speak mTLS
            "tls_dir": self.directory / "pki" / f"{role}-{name}",
            "log_level": "warning",
        }

    def _engine(self, name: str, changes: tuple[str, ...], *, at: str = "") -> ForkedNode:
        number = name.removeprefix("engine")
        options: dict[str, Any] = dict(_MODEL)
        if not at:
            options["node_socket"] = self.directory / f"node{number}" / "node.sock"
            options["audit_parts"] = self.directory / f"audit-{os.urandom(4).hex()}"
        return ForkedEngine(
            self.launcher,
            self.directory / name,
            changes=changes,
            namespace=self.network.namespace(at or name),
            listen=f"{self.network.address(at or name)}:8100",
            engine_id=name,
            log_level="warning",
            window_bytes=8 << 20,
            **options,
        )

    def reference(self, asked: Sequence[Prompts]) -> list[list[tuple[int, ...]]]:
        """What an engine without the fabric answers: what all later answers must be."""
        engine = self._running["alone"] = self._engine("alone", (), at="client")
        engine.wait_ready()
        url = f"http://{self.network.address('client')}:8100"

        async def ask() -> list[list[tuple[int, ...]]]:
            async with aiohttp.ClientSession() as http:
                return [
                    [(await _complete(http, url, "", one))[0] for one in some] for some in asked
                ]

        try:
            found: list[list[tuple[int, ...]]] = self.in_client(ask)
            return found
        finally:
            self.kill("alone")

    def kill(self, name: str) -> None:
        if name == "redis":
            self.redis.kill()
        else:
            self._running.pop(name).kill()

    def pause(self, name: str) -> None:
        if name == "redis":
            self.redis.pause()
        else:
            os.kill(self._running[name].pid, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        if name == "redis":
            self.redis.go_on()
        else:
            os.kill(self._running[name].pid, signal.SIGCONT)

    def logs(self) -> str:
        """For a test that fails: the last words of all."""
        return "\n".join(
            f"--- {name}\n" + "\n".join(process.log.splitlines()[-12:])
            for name, process in self._running.items()
        )

    # -- what can be seen of them --------------------------------------------------------------------

    def in_client(self, work: Any) -> Any:
        """The coroutine function's result, run on the client's machine."""
        return within(self.network.namespace("client"), lambda: asyncio.run(work()))

    def metrics(self, name: str) -> dict[str, float]:
        """Of a node or router that answers; empty for one that does not."""

        async def ask() -> dict[str, float]:
            async with aiohttp.ClientSession() as http:
                return await self.metrics_of(http, name)

        found: dict[str, float] = self.in_client(ask)
        return found

    async def metrics_of(self, http: aiohttp.ClientSession, name: str) -> dict[str, float]:
        port = 9470 if name in NODES else 8000
        url = f"http://{self.network.address(name)}:{port}/metrics"
        try:
            async with http.get(url, timeout=aiohttp.ClientTimeout(total=1)) as answer:
                lines = (await answer.text()).splitlines()
        except (aiohttp.ClientError, TimeoutError):
            return {}
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {key.removeprefix("kvfabric_"): float(value) for key, value in rows}

    async def is_well(self, http: aiohttp.ClientSession) -> bool:
        """All nodes and routers hold a lease, all nodes are listened to by both routers, and both routers
        send requests to all engines."""
        if any(self.listeners(name) != {*ROUTERS} for name in NODES):
            return False
        for name in (*NODES, *ROUTERS):
            found = await self.metrics_of(http, name)
            kind = "node" if name in NODES else "router"
            if not found.get(f"{kind}_epoch_lease_valid"):
                return False
            if kind == "router" and found['router_engines{result="taking"}'] != NUM_NODES:
                return False
        return True

    def listeners(self, node: str) -> set[str]:
        """Routers that have a connection to this node, as the node's machine knows."""

        def connections() -> list[list[str]]:
            files = [Path(f"/proc/thread-self/net/{name}") for name in ("tcp", "tcp6")]
            lines = [line for file in files for line in file.read_text().splitlines()[1:]]
            return [line.split() for line in lines]

        rows = within(self.network.namespace(node), connections)
        port, established = f":{NODE_PORT:04X}", "01"
        there = [row[2] for row in rows if row[1].endswith(port) and row[3] == established]
        ours = {name: map(int, self.network.address(name).split(".")) for name in ROUTERS}
        shown = {name: bytes(one)[::-1].hex().upper() for name, one in ours.items()}
        return {name for name, one in shown.items() if any(f"{one}:" in row for row in there)}

    def wait_well(self, deadline_s: float = READY_S) -> float:
        """Seconds until all is well. Raises TimeoutError."""
        began = time.monotonic()

        async def is_well() -> bool:
            async with aiohttp.ClientSession() as http:
                return await self.is_well(http)

        until(lambda: bool(self.in_client(is_well)), deadline_s=deadline_s)
        return time.monotonic() - began

    def audits(self) -> list[AuditLine]:
        """What engines stored and loaded, of all their lives."""
        files = sorted(self.directory.glob("audit-*"))
        return [line for file in files for line in parse_audit(file.read_text())]


def _is_serving(admin: AdminClient) -> bool:
    status: pb.NodeStatus = admin.call(admin.admin.Status, pb.StatusRequest())
    return status.registry.state == "serving"


# ---------------------------------------------------------------------- the load


@dataclass(slots=True)
class Seen:
    """One request. Seconds on the monotonic clock; `tries` at routers; `error` empty: answered."""

    number: int
    began: float
    ended: float = 0.0
    tries: int = 0
    error: str = ""
    tokens: tuple[int, ...] = ()
    cached: int = 0


@dataclass
class Load:
    """Clients that replay prompts, each its next when it has an answer, and note what they saw.

    A client asks a router, and the other one if that one does not answer; `fails_over`: the guard.
    `begins_at`: the router that all ask first; else each half its own.
    """

    lab: Lab
    asked: Prompts
    concurrency: int = 4
    attempt_s: float = 16.0
    fails_over: bool = True
    begins_at: int | None = None
    seen: list[Seen] = field(default_factory=list)
    under_way: dict[int, Seen] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        thread = threading.Thread(target=lambda: self.lab.in_client(self._run))
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    async def _run(self) -> None:
        numbers = iter(range(1 << 30))
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            for first in range(self.concurrency):
                group.create_task(self._client(http, first, numbers))

    async def _client(
        self, http: aiohttp.ClientSession, first: int, numbers: Iterator[int]
    ) -> None:
        first = first if self.begins_at is None else self.begins_at
        routers = [ROUTERS[(first + n) % NUM_ROUTERS] for n in range(NUM_ROUTERS)]
        while not self._ended.is_set():
            count = next(numbers)
            one = Seen(count % len(self.asked), time.monotonic())
            self.under_way[count] = one
            await self._ask(http, one, routers)
            one.ended = time.monotonic()
            self.seen.append(self.under_way.pop(count))

    async def _ask(self, http: aiohttp.ClientSession, one: Seen, routers: list[str]) -> None:
        """Of the first of `routers`, which goes to the end of them if it does not answer."""
        for router in routers[: NUM_ROUTERS if self.fails_over else 1]:
            one.tries += 1
            url = f"http://{self.lab.network.address(router)}:8000"
            try:
                async with asyncio.timeout(self.attempt_s):
                    one.tokens, one.cached = await _complete(
                        http, url, self.lab.key, self.asked[one.number]
                    )
            except (aiohttp.ClientError, TimeoutError) as exc:
                one.error = f"{router}: {type(exc).__name__} {exc}"
                if self.fails_over:
                    routers.append(routers.pop(0))
            else:
                one.error = ""
                return


async def _complete(
    http: aiohttp.ClientSession, url: str, key: str, prompt: Sequence[int]
) -> tuple[tuple[int, ...], int]:
    """(tokens of the answer, prompt tokens that were reused). Raises ClientError for any other answer."""
    body = {
        "model": "reference",
        "prompt": list(prompt),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0)
    async with http.post(
        f"{url}/v1/completions", json=body, headers=headers, timeout=timeout
    ) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise aiohttp.ClientPayloadError(f"status {answer.status}: {text[:200]}")
    found = json.loads(text)
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tuple(found["choices"][0]["token_ids"]), cached
