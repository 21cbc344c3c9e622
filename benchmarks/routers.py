"""The routers that `bench_router.py` compares, each started as its users do, before simulated engines.

Ours runs from `.venv` with a real node that the engines join as sessions; the peers run from
`.venv-routers` with the engines' URLs. All else is equal: the same engines, the same requests, each
router's own defaults.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from simulated import PART_BYTES, EngineModel

ROOT = Path(__file__).resolve().parents[1]
OURS, PEERS = ROOT / ".venv" / "bin", ROOT / ".venv-routers" / "bin"
POLICIES = {
    "kvfabric": "cost",
    "kvfabric_host": "cost",  # with a host tier behind the engines
    "round_robin": "round_robin",
    "least_loaded": "least_loaded",
}
HOST_BLOCKS_PER_HBM_BLOCK = 4
PEER_NAMES = ("smg", "sglang-router", "vllm-router")
ROUTERS = (*POLICIES, *PEER_NAMES)

_READY_S = 60.0
_STOP_S = 10.0


class NotReady(RuntimeError):
    """A process ended or did not get ready; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A router before its engines. `routers`, `nodes`, `simulators`: process ids, for their CPU time."""

    url: str
    engines: tuple[str, ...]
    routers: tuple[int, ...]
    nodes: tuple[int, ...] = ()
    simulators: tuple[int, ...] = ()

    def simulators_cpu_s(self) -> float:
        """CPU seconds of the engines so far."""
        return sum(map(_cpu_s, self.simulators))

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: of the router, of the node (0 for a peer)."""
        return sum(map(_cpu_s, self.routers)), sum(map(_cpu_s, self.nodes))


class _Processes:
    """Owns what it starts: the block's end stops it, newest first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[tuple[asyncio.subprocess.Process, Path]] = []

    async def __aenter__(self) -> _Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process, _log in reversed(self._started):
            if process.returncode is None:
                process.terminate()
        for process, _log in reversed(self._started):
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def start(self, name: str, command: Sequence[str | Path]) -> int:
        log = self._directory / f"{name}.log"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'router'}"}
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *map(str, command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        self._started.append((process, log))
        return process.pid

    async def wait(self, check: Callable[[], Awaitable[bool]]) -> None:
        end = time.monotonic() + _READY_S
        while not await check():
            for process, log in self._started:
                if process.returncode is not None or time.monotonic() > end:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise NotReady(f"{log.stem} (exit {process.returncode}):\n{tail}")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def deployed(
    router: str, *, num_engines: int, compression: float
) -> AsyncIterator[Deployment]:
    """Engines with empty caches and a fresh router of this name before them. Raises NotReady."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-router-")))
        processes = await stack.enter_async_context(_Processes(directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        ports = free_ports(num_engines + 2)
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports[:num_engines])
        is_ours = router in POLICIES
        has_host = router == "kvfabric_host"
        nodes: tuple[int, ...] = ()
        node: list[str | Path] = []
        if is_ours:
            hbm = num_engines * EngineModel().hbm_blocks * PART_BYTES
            host = HOST_BLOCKS_PER_HBM_BLOCK * hbm if has_host else 32 << 20
            nodes = (await _node(processes, directory, host),)
            node = ["--node", directory / "node.sock", *(["--host-tier"] if has_host else [])]
        engine = ROOT / "benchmarks" / "simulated.py"
        flags = ["--compression", str(compression), *node]
        ports_given = [str(port) for port in ports[:num_engines]]
        parent = await processes.start("engines", [OURS / "python", engine, *ports_given, *flags])
        await processes.wait(lambda: _all_answer(http, [f"{url}/health" for url in urls]))
        own = ports[num_engines]
        command = (
            _our_router(router, directory, own)
            if is_ours
            else _peer(router, urls, own, ports[num_engines + 1])
        )
        pid = await processes.start("router", command)
        url = f"http://127.0.0.1:{own}"
        ready = _all_taking if is_ours else _models_answer
        await processes.wait(lambda: ready(http, url, num_engines))
        yield Deployment(url, urls, (pid,), nodes, _children(parent))


async def _node(processes: _Processes, directory: Path, host_bytes: int) -> int:
    command: list[str | Path] = [
        OURS / "python",
        "-m",
        "kvfabric",
        "node",
        "--state-dir",
        directory,
        "--http",
        "",
    ]
    pid = await processes.start(
        "node",
        [*command, "--host-bytes", str(host_bytes), "--ssd-bytes", "0", "--log-level", "warning"],
    )
    admin = directory / "admin.sock"

    async def there() -> bool:
        return admin.exists()

    await processes.wait(there)
    return pid


def _our_router(name: str, directory: Path, port: int) -> list[str | Path]:
    flags = ["--listen", f"127.0.0.1:{port}", "--policy", POLICIES[name], "--log-level", "warning"]
    return [OURS / "python", "-m", "kvfabric", "router", "--state-dir", directory, *flags]


def _peer(name: str, engines: Sequence[str], port: int, metrics_port: int) -> list[str | Path]:
    launch = [] if name == "vllm-router" else ["launch"]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    flags += ["--prometheus-port", str(metrics_port), "--log-level", "error"]
    return [PEERS / name, *launch, *flags, "--worker-urls", *engines]


async def _all_answer(http: aiohttp.ClientSession, urls: Sequence[str]) -> bool:
    return all([await _get(http, url) is not None for url in urls])


async def _all_taking(http: aiohttp.ClientSession, url: str, num_engines: int) -> bool:
    text = await _get(http, f"{url}/metrics") or ""
    wanted = {
        f'kvfabric_router_engines{{result="taking"}} {num_engines}.0',
        "kvfabric_router_epoch_lease_valid 1.0",
    }
    return wanted <= set(text.splitlines())


async def _models_answer(http: aiohttp.ClientSession, url: str, num_engines: int) -> bool:
    """A peer that found its engines passes a request on; each engine is asked for by its policy later."""
    body = {"model": "simulated", "prompt": "Are you there?", "max_tokens": 1}
    try:
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            await answer.read()
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def _get(http: aiohttp.ClientSession, url: str) -> str | None:
    try:
        async with http.get(url) as answer:
            return await answer.text() if answer.status == 200 else None
    except aiohttp.ClientError:
        return None


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _children(pid: int) -> tuple[int, ...]:
    return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process and of those children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
