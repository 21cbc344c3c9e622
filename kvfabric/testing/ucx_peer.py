"""The other side of a UCX link, as a process of its own: `python -m kvfabric.testing.ucx_peer`.

Speaks lines of JSON: prints its address, then takes {"connect": hex},
{"send": [[tag, num_bytes, seed], ...]}, {"receive": [[tag, num_bytes], ...]} and answers each with
what became of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from kvfabric.transfer.ucx import Link, Message, Settings, Transport


def payload(num_bytes: int, seed: int) -> memoryview:
    """Bytes that both sides can make."""
    return memoryview(np.random.default_rng(seed).bytes(num_bytes))


def digest(memory: memoryview) -> str:
    return hashlib.blake2b(memory, digest_size=16).hexdigest()


class Peer:
    """The asking side. `process`: to be killed or stopped by its id."""

    def __init__(self, process: asyncio.subprocess.Process, address: bytes) -> None:
        self.process = process
        self.address = address

    async def ask(self, **command: Any) -> Any:
        self.tell(**command)
        return await self.answer()

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(await self.process.stdout.readline())


@asynccontextmanager
async def peer(settings: Settings) -> AsyncIterator[Peer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvfabric.testing.ucx_peer",
        settings.net_devices,
        settings.transports,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield Peer(process, bytes.fromhex(json.loads(await process.stdout.readline())))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    async with await Transport.start(settings) as transport:
        print(json.dumps(transport.address.hex()), flush=True)
        link: Link | None = None
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            (verb, asked), *_ = json.loads(line).items()
            if verb == "connect":
                link = await transport.connect(bytes.fromhex(asked))
                answer: Any = True
            elif verb == "send":
                assert link is not None
                messages = [Message(payload(size, seed), tag) for tag, size, seed in asked]
                answer = await link.send(messages).outcome()
            else:
                assert link is not None
                buffers = [memoryview(bytearray(size)) for _, size in asked]
                messages = [Message(b, tag) for b, (tag, _) in zip(buffers, asked, strict=True)]
                errors = await link.receive(messages).outcome()
                answer = [[e, digest(b)] for e, b in zip(errors, buffers, strict=True)]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(Settings(sys.argv[1], sys.argv[2])))
