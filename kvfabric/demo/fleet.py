"""The demo's fleet: nodes, engines and a router, each a real process on loopback, and its tenants.

One node with two engines, or, around a directory, several nodes with an engine each, which stand for
machines: they share Redis, and what they ask of each other. Everything lives in one folder that ends with the
demo. A restarted process keeps its addresses; each start of an engine writes an audit file of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from kvfabric.demo.checks import AuditLine, parse_audit
from kvfabric.demo.processes import Child, Children, DemoError, free_addresses, run_command
from kvfabric.demo.slice import BLOCK_TOKENS, TEMPLATE_TEXT
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.kvfabric_pb2_grpc import NodeAdminStub

NUM_ENGINES = 2
TEMPLATE, VERSION = "helper", "1"
MODEL_FLAGS = {
    "--num-layers": 8,
    "--hidden-size": 256,
    "--intermediate-size": 1024,
    "--hbm-blocks": 256,  # 4,096 tokens: less than the slice needs, as a GPU's memory is in production
    "--max-model-tokens": 1024,
}
"""The engines' model and pool, the same in every run of the demo."""

_READY_S = 60.0
_SETTLE_S = 0.25
_SETTLE_DEADLINE_S = 20.0


class Fleet:
    """Starts, kills and asks the processes. The children belong to `children`, which stops them.

    `registry`: how nodes and the router reach their directory, as flags; empty: one node without.
    """

    def __init__(
        self,
        children: Children,
        directory: Path,
        http: aiohttp.ClientSession,
        *,
        num_nodes: int = 1,
        registry: Sequence[str] = (),
    ) -> None:
        self._children = children
        self._directory = directory
        self._http = http
        self._registry = registry
        self.num_nodes = num_nodes
        self.num_engines = num_nodes if registry else NUM_ENGINES
        addresses = free_addresses(1 + num_nodes + self.num_engines)
        self._router_address = addresses[0]
        self._node_addresses = addresses[1 : 1 + num_nodes]
        self._engine_addresses = addresses[1 + num_nodes :]
        self._nodes: dict[int, Child] = {}
        self._router: Child | None = None
        self._with_fabric = False
        self._engines: dict[int, Child] = {}
        self._audits: list[Path] = []
        self.keys: dict[str, str] = {}

    @property
    def router_url(self) -> str:
        return f"http://{self._router_address}"

    def state(self, node: int = 0) -> Path:
        """Of a node: what would be on its machine."""
        return self._directory / f"state-{node}"

    def admin_socket(self, node: int = 0) -> Path:
        return self.state(node) / "admin.sock"

    # --- processes ---

    async def start_nodes(self, *which: int) -> None:
        """Start nodes, or start them again, and wait until they serve."""
        for index in which:
            arguments = [
                *("node", "--node-id", f"node-{index}", "--state-dir", str(self.state(index))),
                *("--http", self._node_addresses[index], "--max-blocks", "65536"),
                *("--host-bytes", "256MiB", "--ssd-bytes", "512MiB", "--require-handle", "true"),
                *self._registry,
            ]
            if self._registry:
                arguments += ["--ucx-net-devices", "lo"]
            self._nodes[index] = await self._children.start(f"node-{index}", arguments)
        for index in which:
            address = self._node_addresses[index]
            await self._nodes[index].wait_ready(
                lambda address=address: self._is_ok(address, "/readyz"),  # type: ignore[misc]
                _READY_S,
            )

    async def kill_node(self, index: int = 0) -> None:
        await self._nodes[index].kill()

    async def start_engines(self, which: Sequence[int], *, fabric: bool) -> None:
        """Start engines, with or without the node, and wait until each serves."""
        for index in which:
            await self._start_engine(index, fabric=fabric)
        for index in which:
            address = self._engine_addresses[index]
            await self._engines[index].wait_ready(
                lambda address=address: self._is_ok(address, "/healthz"),  # type: ignore[misc]
                _READY_S,
            )

    async def _start_engine(self, index: int, *, fabric: bool) -> None:
        audit = self._directory / f"audit-{len(self._audits)}-engine-{index}.jsonl"
        self._audits.append(audit)
        flags = {
            "--listen": self._engine_addresses[index],
            "--engine-id": f"engine-{index}",
            "--engine-block-tokens": BLOCK_TOKENS,
            "--block-tokens": BLOCK_TOKENS,
            "--deterministic": "on",
            "--audit-parts": audit,
            **MODEL_FLAGS,
        }
        if fabric:
            flags["--node-socket"] = self.state(index % self.num_nodes) / "node.sock"
        arguments = [str(part) for flag in flags.items() for part in flag]
        self._engines[index] = await self._children.start(f"engine-{index}", ["engine", *arguments])

    async def kill_engines(self, which: Sequence[int]) -> None:
        for index in which:
            await self._engines[index].kill()

    async def start_router(self, *, fabric: bool) -> None:
        """Start the router and wait until it sends requests to every engine that runs."""
        state = self._directory / "router" if self._registry else self.state()
        arguments = ["router", "--listen", self._router_address, "--state-dir", str(state)]
        arguments += self._registry
        if not fabric:
            urls = ",".join(f"http://{address}" for address in self._engine_addresses)
            arguments += ["--fabric", "false", "--policy", "round_robin", "--engines", urls]
        self._with_fabric = fabric
        self._router = await self._children.start("router", arguments)
        await self._router.wait_ready(self._router_sees_engines, _READY_S)

    async def stop_router_and_engines(self) -> None:
        assert self._router is not None
        await self._router.stop()
        for engine in self._engines.values():
            await engine.stop()

    async def wait_engines_known(self) -> None:
        """Until the router sends requests to every engine that runs, and knows of no other."""
        assert self._router is not None
        await self._router.wait_ready(self._router_sees_engines, _READY_S)

    async def _router_sees_engines(self) -> bool:
        running = sum(engine.is_running for engine in self._engines.values())
        ready = [f'kvfabric_router_engines{{result="taking"}} {running:.1f}']
        if self._with_fabric:
            ready.append("kvfabric_router_epoch_lease_valid 1.0")
        if not await self._is_ok(self._router_address, "/readyz"):
            return False
        metrics = await self._get(self._router_address, "/metrics")
        return metrics is not None and set(ready) <= set(metrics.splitlines())

    async def _is_ok(self, address: str, path: str) -> bool:
        return await self._get(address, path) is not None

    async def _get(self, address: str, path: str) -> str | None:
        """The body of a 200 answer, None otherwise."""
        try:
            async with self._http.get(f"http://{address}{path}") as response:
                return await response.text() if response.status == 200 else None
        except aiohttp.ClientError:
            return None

    # --- what engines did with parts ---

    def audit_mark(self) -> int:
        """A mark: engines started from here on write audit files behind it."""
        return len(self._audits)

    def audit_lines(self, since: int = 0) -> list[AuditLine]:
        """What engines started since the mark stored and loaded."""
        return [
            line
            for path in self._audits[since:]
            if path.exists()
            for line in parse_audit(path.read_text())
        ]

    # --- administration, as an operator does it ---

    async def create_tenant(self, name: str) -> None:
        created = await self._admin("tenant", "create", name)
        self.keys[name] = created["api_key"]

    async def register_template(self) -> None:
        file = self._directory / "template.txt"
        file.write_text(TEMPLATE_TEXT)
        await self._admin(
            "template", "register", TEMPLATE, "--version", VERSION, "--file", str(file)
        )

    async def withdraw_template(self, *, at: int = 0) -> dict[str, Any]:
        """Take the version out of service, asked of one node; returns the receipt."""
        return await self._admin(
            "invalidate", "template", TEMPLATE, "--version", VERSION, "--retire", at=at
        )

    async def promote_template(self) -> dict[str, Any]:
        """Put the same version back into service; returns the receipt."""
        return await self._admin("template", "promote", TEMPLATE, "--version", VERSION)

    async def explain(self, tenant: str, request_id: str) -> dict[str, Any]:
        """What the router says of a tenant's own request. Raises DemoError when it says nothing."""
        url = f"{self.router_url}/v1/explain/{request_id}"
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        try:
            async with self._http.get(url, headers=headers) as response:
                told: dict[str, Any] = await response.json()
                if response.status == 200:
                    return told
        except aiohttp.ClientError as exc:
            raise DemoError(f"the router explains nothing: {exc}") from exc
        raise DemoError(f"the router does not explain {request_id}: {told}")

    async def _admin(self, *arguments: str, at: int = 0) -> dict[str, Any]:
        out = await run_command(
            [*arguments, "--admin-socket", str(self.admin_socket(at)), "--json"]
        )
        answer = json.loads(out)
        assert isinstance(answer, dict), arguments
        return answer

    async def status(self, node: int = 0, *, sealed_keys: bool = False) -> pb.NodeStatus:
        """A node's own account. Raises DemoError when it does not answer."""
        async with grpc.aio.insecure_channel(f"unix:{self.admin_socket(node)}") as channel:
            admin = NodeAdminStub(channel)  # type: ignore[no-untyped-call]
            request = pb.StatusRequest(sealed_keys=sealed_keys)
            try:
                status: pb.NodeStatus = await admin.Status(request, timeout=10, wait_for_ready=True)
            except grpc.aio.AioRpcError as exc:
                raise DemoError(f"the node does not tell its status: {exc.details()}") from exc
        return status

    async def settled(self, node: int = 0) -> pb.NodeStatus:
        """Wait until nothing more is stored or sealed there; returns the status with the sealed keys."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _SETTLE_DEADLINE_S
        before = await self.status(node, sealed_keys=True)
        while loop.time() < end:
            await asyncio.sleep(_SETTLE_S)
            now = await self.status(node, sealed_keys=True)
            if _blocks(now) == _blocks(before):
                return now
            before = now
        raise DemoError(f"node {node} did not come to rest in {_SETTLE_DEADLINE_S:.0f} s")

    async def adopted(self) -> pb.NodeStatus:
        """Wait until a restarted node took the old one's memory over, or gave up; returns its status."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _SETTLE_DEADLINE_S
        while True:
            status = await self.status(sealed_keys=True)
            if status.arena_adopted or loop.time() > end:
                return status
            await asyncio.sleep(_SETTLE_S)


def _blocks(status: pb.NodeStatus) -> tuple[int, ...]:
    return (len(status.sealed_keys), *(tier.num_blocks for tier in status.tiers))
