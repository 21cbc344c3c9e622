"""What the transport itself gives, for `bench_transfer`: two bare processes, no node between.

`measure(settings, ...)`: GB/s of messages from memory that was not touched just now into memory that was not,
without and with XXH3-128 of each as it comes, in a thread beside. `ucx_perftest` sends the same buffer again
and again, out of the processor's cache and into it, and looks at nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from kvfabric.transfer.ucx import Link, Message, Settings, Transport

ROTATED = 4
"""So many times the bytes of a round lie in memory, and are used in turn."""


def _pieces(memory: memoryview, number: int, size: int, count: int) -> list[memoryview]:
    start = number % ROTATED * size * count
    return [memory[start + i * size : start + (i + 1) * size] for i in range(count)]


def _memory(size: int, count: int) -> memoryview:
    memory = np.zeros(size * count * ROTATED, np.uint8)
    memory[::4096] = 1  # the kernel gives it now
    return memory.data


def measure(settings: Settings, *, size: int, count: int, rounds: int) -> tuple[float, float]:
    """GB/s: messages alone, and verified."""
    return asyncio.run(_measure(settings, size, count, rounds))


async def _measure(settings: Settings, size: int, count: int, rounds: int) -> tuple[float, float]:
    sender = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        settings.net_devices,
        str(size),
        str(count),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert sender.stdin is not None
    assert sender.stdout is not None
    memory = _memory(size, count)
    async with await Transport.start(settings) as transport:
        transport.register(memory)
        try:
            link = await transport.connect(bytes.fromhex((await sender.stdout.readline()).decode()))
            sender.stdin.write(transport.address.hex().encode() + b"\n")
            took: tuple[list[float], list[float]] = ([], [])
            for number in range(2 * rounds + ROTATED):
                pieces = _pieces(memory, number, size, count)
                tags = [secrets.randbits(64) for _ in pieces]
                began = time.perf_counter()
                sender.stdin.write(json.dumps([number, tags]).encode() + b"\n")
                await _arrive(link, pieces, tags, is_verified=bool(number % 2))
                if number >= ROTATED:
                    took[number % 2].append(time.perf_counter() - began)
        finally:
            sender.kill()
            await sender.wait()
    alone, verified = (size * count / statistics.median(times) / 1e9 for times in took)
    return alone, verified


async def _arrive(
    link: Link, pieces: list[memoryview], tags: list[int], *, is_verified: bool
) -> None:
    step = max(1, (16 << 20) // len(pieces[0]))
    loop = asyncio.get_running_loop()

    async def one(first: int) -> None:
        some = pieces[first : first + step]
        posted = link.receive(
            [Message(b, t) for b, t in zip(some, tags[first : first + step], strict=True)]
        )
        assert not any(await posted.outcome())
        if is_verified:
            await loop.run_in_executor(_POOL, lambda: [*map(xxhash.xxh3_128_digest, some)])

    await asyncio.gather(*(one(first) for first in range(0, len(pieces), step)))


_POOL = ThreadPoolExecutor(1)


async def _send(settings: Settings, size: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    memory = _memory(size, count)
    async with await Transport.start(settings) as transport:
        transport.register(memory)
        print(transport.address.hex(), flush=True)
        line = await loop.run_in_executor(None, sys.stdin.readline)
        link = await transport.connect(bytes.fromhex(line))
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            number, tags = json.loads(line)
            pieces = _pieces(memory, number, size, count)
            link.send([Message(b, t) for b, t in zip(pieces, tags, strict=True)])


if __name__ == "__main__":
    asyncio.run(_send(Settings(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
