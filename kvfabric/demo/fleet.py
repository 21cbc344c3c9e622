"""The demo's fleet: one node, two engines, one router, each a real process on loopback, and its tenants.

Everything lives in one directory that ends with the demo. A restarted process keeps its addresses; each
start of an engine writes an audit file of its own.
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
    """Starts, kills and asks the processes. The children belong to `children`, which stops them."""

    def __init__(self, children: Children, directory: Path, http: aiohttp.ClientSession) -> None:
        self._children = children
        self._directory = directory
        self._state = directory / "state"
        self._http = http
        self._node_address, self._router_address, *self._engine_addresses = free_addresses(
            2 + NUM_ENGINES
        )
        self._node: Child | None = None
        self._router: Child | None = None
        self._with_fabric = False
        self._engines: dict[int, Child] = {}
        self._audits: list[Path] = []
        self.keys: dict[str, str] = {}

    @property
    def router_url(self) -> str:
        return f"http://{self._router_address}"

    @property
    def admin_socket(self) -> Path:
        return self._state / "admin.sock"

    # --- processes ---

    async def start_node(self) -> None:
        """Start the node, or start it again, and wait until it serves."""
        self._node = await self._children.start(
            "node",
            [
                *("node", "--node-id", "demo", "--state-dir", str(self._state)),
                *("--http", self._node_address, "--host-bytes", "256MiB", "--ssd-bytes", "512MiB"),
                *("--max-blocks", "65536", "--require-handle", "true"),
            ],
        )
        await self._node.wait_ready(lambda: self._is_ok(self._node_address, "/readyz"), _READY_S)

    async def kill_node(self) -> None:
        assert self._node is not None
        await self._node.kill()

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
            flags["--node-socket"] = self._state / "node.sock"
        arguments = [str(part) for flag in flags.items() for part in flag]
        self._engines[index] = await self._children.start(f"engine-{index}", ["engine", *arguments])

    async def kill_engines(self, which: Sequence[int]) -> None:
        for index in which:
            await self._engines[index].kill()

    async def start_router(self, *, fabric: bool) -> None:
        """Start the router and wait until it sends requests to every engine."""
        arguments = ["router", "--listen", self._router_address, "--state-dir", str(self._state)]
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
        """Until the router sends requests to every engine (again)."""
        assert self._router is not None
        await self._router.wait_ready(self._router_sees_engines, _READY_S)

    async def _router_sees_engines(self) -> bool:
        ready = [f'kvfabric_router_engines{{result="taking"}} {NUM_ENGINES:.1f}']
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

    async def withdraw_template(self) -> dict[str, Any]:
        """Take the version out of service; returns the receipt."""
        return await self._admin(
            "invalidate", "template", TEMPLATE, "--version", VERSION, "--retire"
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

    async def _admin(self, *arguments: str) -> dict[str, Any]:
        out = await run_command([*arguments, "--admin-socket", str(self.admin_socket), "--json"])
        answer = json.loads(out)
        assert isinstance(answer, dict), arguments
        return answer

    async def status(self, *, sealed_keys: bool = False) -> pb.NodeStatus:
        """The node's own account. Raises DemoError when it does not answer."""
        async with grpc.aio.insecure_channel(f"unix:{self.admin_socket}") as channel:
            admin = NodeAdminStub(channel)  # type: ignore[no-untyped-call]
            request = pb.StatusRequest(sealed_keys=sealed_keys)
            try:
                status: pb.NodeStatus = await admin.Status(request, timeout=10, wait_for_ready=True)
            except grpc.aio.AioRpcError as exc:
                raise DemoError(f"the node does not tell its status: {exc.details()}") from exc
        return status

    async def settled(self) -> pb.NodeStatus:
        """Wait until nothing more is stored or sealed; returns the status with the sealed keys."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _SETTLE_DEADLINE_S
        before = await self.status(sealed_keys=True)
        while loop.time() < end:
            await asyncio.sleep(_SETTLE_S)
            now = await self.status(sealed_keys=True)
            if _blocks(now) == _blocks(before):
                return now
            before = now
        raise DemoError(f"the node did not come to rest in {_SETTLE_DEADLINE_S:.0f} s")

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
