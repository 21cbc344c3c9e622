"""What a fleet's registry reaches beyond its process: clocks, directory, durable copy, threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvfabric.registry.database import Database
from kvfabric.registry.lease import boottime
from kvfabric.registry.redis.address import DirectoryAddress, Link


def _open_link(address: DirectoryAddress, timeout_s: float) -> Link:
    return Link(address, timeout_s=timeout_s)


def _one_thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="kvfabric-registry")


@dataclass(frozen=True, slots=True)
class Outside:
    """The real ones; `kvfabric.testing.simulation` has others. `clock`: CLOCK_BOOTTIME; `wall_clock`: Unix
    seconds; `link` gets address and timeout in seconds."""

    clock: Callable[[], float] = boottime
    wall_clock: Callable[[], float] = time.time
    database: Callable[[Path], Database] = Database
    link: Callable[[DirectoryAddress, float], Link] = _open_link
    thread: Callable[[], Executor] = _one_thread


REAL = Outside()
