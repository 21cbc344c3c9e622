"""Runs the demo: its directory of files, its processes, its registry, and whatever happens, their end."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import aiohttp

from kvfabric.demo.fleet import Fleet
from kvfabric.demo.machines import Machines
from kvfabric.demo.processes import Children, DemoError
from kvfabric.demo.progress import Progress
from kvfabric.demo.report import Report
from kvfabric.demo.story import Story
from kvfabric.errors import ConfigError

MAX_NODES = 16


async def tell(
    progress: Progress, *, quick: bool, num_nodes: int = 1, directory: str = ""
) -> Report:
    """Run the whole demo. Failed conditions and errors are in the report; only bugs raise, and ConfigError.

    `directory`: address of the Redis of a fleet; `num_nodes` above 1 needs one.
    """
    _check(num_nodes, directory)
    report = Report(quick=quick)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvfabric-demo-") as name:
        files = Path(name)
        try:
            async with contextlib.AsyncExitStack() as stack:
                registry: tuple[str, ...] = ()
                if directory:
                    from kvfabric.demo.directory import own_fabric  # needs redis

                    registry = await stack.enter_async_context(own_fabric(directory))
                http = await stack.enter_async_context(aiohttp.ClientSession())
                children = await stack.enter_async_context(Children(files))
                fleet = Fleet(children, files, http, num_nodes=num_nodes, registry=registry)
                story = Machines if registry else Story
                await story(fleet, progress, report).run()
        except DemoError as exc:
            report.error = str(exc)
            progress.line(f"\nthe demo cannot go on: {exc}")
    report.figures["duration_s"] = round(time.monotonic() - started, 1)
    return report


def _check(num_nodes: int, directory: str) -> None:
    """Raises ConfigError."""
    if not 1 <= num_nodes <= MAX_NODES:
        raise ConfigError(f"--nodes is {num_nodes}; it must be 1 to {MAX_NODES}")
    if num_nodes > 1 and not directory:
        raise ConfigError(
            f"--nodes {num_nodes} is a fleet, whose nodes meet in a Redis: name one with --directory "
            "redis://HOST:PORT (`redis-server --port 6379 --appendonly yes --appendfsync always` starts one)"
        )
    if directory and num_nodes == 1:
        raise ConfigError("--directory is for a fleet: say --nodes 3, or any number above 1")
