"""The least engine there can be: stores and loads blocks whose bytes follow from their keys.

`python -m kvfabric.testing.engine SOCKET` is one in a process of its own, driven by JSON lines: tests stop,
kill and starve that process to see what its node does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfabric.client import EngineHello, NodeClient
from kvfabric.client.pools import borrow, lend
from kvfabric.errors import KVFabricError, PeerClosed
from kvfabric.hashing import ROOT_PARENT, block_keys
from kvfabric.protocol.messages import HandleOpened, Lend, Located, PoolName, Role
from kvfabric.types import BlockKey, BlockLayout, GrantState, PartSpec

BLOCK_TOKENS = 16
DEADLINE_S = 20.0


def tiny_hello(
    *, part_bytes: int = 4096, window_bytes: int = 1 << 20, revision: str = "rev"
) -> EngineHello:
    """An engine whose blocks of 16 tokens have one part. `revision` keeps engines' blocks apart."""
    layout = BlockLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        engine_block_tokens=BLOCK_TOKENS,
        parts=(PartSpec(0, 0, part_bytes),),
    )
    return EngineHello(
        engine_id="tiny",
        endpoint="http://127.0.0.1:1",
        model="tiny",
        model_revision=revision,
        adapter="",
        adapter_revision="",
        layout=layout,
        shard=0,
        window_bytes=window_bytes,
        role=Role.SCHEDULER | Role.WORKER,
    )


def tokens_of(name: str, num_blocks: int) -> list[int]:
    """The prompt called `name`: equal names, equal tokens."""
    digest = hashlib.shake_128(name.encode()).digest(num_blocks * BLOCK_TOKENS)
    return list(digest)


def payload_of(key: BlockKey, num_bytes: int) -> bytes:
    """The bytes of a block: what any engine must find under this key, and nothing else."""
    return hashlib.shake_128(key).digest(num_bytes)


class TinyEngine:
    """One request at a time over one client. The client is the caller's to close."""

    def __init__(self, client: NodeClient, hello: EngineHello) -> None:
        self.client = client
        self.hello = hello
        self.part_bytes = hello.layout.parts[0].num_bytes
        self.opened: HandleOpened | None = None

    @classmethod
    def connect(cls, socket: str | Path, hello: EngineHello | None = None) -> TinyEngine:
        hello = hello or tiny_hello()
        return cls(NodeClient.connect(socket, hello, deadline_s=DEADLINE_S), hello)

    def open(self, request: str, prompt: str, num_blocks: int, handle: str = "") -> list[BlockKey]:
        """Open a request for a prompt; its keys."""
        self.opened = self.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        key = self.opened.namespace_key
        return block_keys(tokens_of(prompt, num_blocks), BLOCK_TOKENS, key)

    def write(self, keys: Sequence[BlockKey]) -> tuple[int, list[int]]:
        """Put the blocks' bytes into a window region: where it starts, and each block's offset."""
        start = self.client.window.allocate(self.part_bytes * len(keys))
        assert start is not None, "the window is too small for this test"
        view = self.client.window.view(start, self.part_bytes * len(keys))
        for index, key in enumerate(keys):
            first = index * self.part_bytes
            view[first : first + self.part_bytes] = payload_of(key, self.part_bytes)
        return start, [start + index * self.part_bytes for index in range(len(keys))]

    def store(self, request: str, keys: Sequence[BlockKey], parent: BlockKey = ROOT_PARENT) -> int:
        """Reserve, write, commit; how many blocks were stored."""
        reserved = self.client.reserve(
            request, parent, keys, group=0, shard=0, deadline_s=DEADLINE_S
        )
        granted = [i for i, state in enumerate(reserved.states) if state == GrantState.GRANTED]
        if not granted:
            return 0
        start, offsets = self.write([keys[i] for i in granted])
        try:
            committed = self.client.commit(
                reserved.reservation, granted, offsets, deadline_s=DEADLINE_S
            )
        finally:
            self.client.window.free(start)
        return sum(committed.states)

    def locate(self, request: str, keys: Sequence[BlockKey]) -> Located:
        """Match, then load what matched."""
        matched = self.client.match(request, keys, deadline_s=DEADLINE_S)
        if not matched.num_blocks:
            return Located(0, self.part_bytes, b"", b"", b"", matched.reason)
        found = keys[: matched.num_blocks]
        return self.client.load(request, found, group=0, shard=0, deadline_s=DEADLINE_S)

    def load(self, request: str, keys: Sequence[BlockKey]) -> list[bytes]:
        """Match, load, read, verify, confirm: the bytes of the leading blocks that may be used."""
        located = self.locate(request, keys)
        buffers = [bytearray(self.part_bytes) for _ in range(located.num_blocks)]
        good = self.client.read(located, [memoryview(buffer) for buffer in buffers])
        if not good:
            return []
        confirmed = self.client.confirm(
            request, keys[:good], located, group=0, shard=0, deadline_s=DEADLINE_S
        )
        return [bytes(buffer) for buffer in buffers[: confirmed.num_blocks]]

    def release(self, *requests: str) -> None:
        self.client.release(requests, deadline_s=DEADLINE_S)


def wrong_blocks(keys: Sequence[BlockKey], found: Sequence[bytes]) -> int:
    """How many of the leading blocks hold other bytes than their keys demand. Must always be 0."""
    return sum(payload_of(key, len(data)) != data for key, data in zip(keys, found, strict=False))


class _Commands:
    """What the process does with one JSON line; each answer is one JSON line."""

    def __init__(self, engine: TinyEngine) -> None:
        self.engine = engine
        self.reserved: tuple[int, list[int], int] | None = None
        self.leased: tuple[str, list[BlockKey], Located] | None = None

    def store(self, request: str, prompt: str, num_blocks: int) -> dict[str, Any]:
        keys = self.engine.open(request, prompt, num_blocks)
        return {"stored": self.engine.store(request, keys)}

    def load(self, request: str, prompt: str, num_blocks: int) -> dict[str, Any]:
        keys = self.engine.open(request, prompt, num_blocks)
        found = self.engine.load(request, keys)
        return {"loaded": len(found), "wrong": wrong_blocks(keys, found)}

    def lease(self, request: str, prompt: str, num_blocks: int) -> dict[str, Any]:
        """Match and locate, and keep that."""
        keys = self.engine.open(request, prompt, num_blocks)
        located = self.engine.locate(request, keys)
        self.leased = (request, keys[: located.num_blocks], located)
        return {"leased": located.num_blocks}

    def read_leased(self) -> dict[str, Any]:
        """Read what `lease` located: how many verify, are wrong, and may be used."""
        assert self.leased is not None
        request, keys, located = self.leased
        buffers = [bytearray(self.engine.part_bytes) for _ in keys]
        good = self.engine.client.read(located, [memoryview(buffer) for buffer in buffers])
        confirmed = self.engine.client.confirm(
            request, keys, located, group=0, shard=0, deadline_s=DEADLINE_S
        )
        wrong = wrong_blocks(keys, [bytes(buffer) for buffer in buffers[:good]])
        return {"good": good, "wrong": wrong, "confirmed": confirmed.num_blocks}

    def lend(self, socket: str, session: str, num_pages: int) -> dict[str, Any]:
        """Lend a pool of pages of a part's size as that session's."""
        size = self.engine.part_bytes
        pool = os.memfd_create("pool")
        os.ftruncate(pool, num_pages * size)
        name = PoolName(bytes.fromhex(session), 0)
        lend(socket, Lend(name, num_pages, size), pool, deadline_s=DEADLINE_S)
        return {}

    def borrow(self, socket: str, borrower: str, owner: str) -> dict[str, Any]:
        """Borrow the pool of session `owner` for session `borrower`."""
        name = PoolName(bytes.fromhex(owner), 0)
        lent = borrow(socket, bytes.fromhex(borrower), name, deadline_s=DEADLINE_S)
        os.close(lent.descriptor)
        return {"pages": lent.num_pages}

    def hang_up(self) -> dict[str, Any]:
        """Lose the connection without a word, and live on."""
        self.engine.client._break(PeerClosed("hung up"))
        return {}

    def resume(self, socket: str) -> dict[str, Any]:
        """Come back after the node was lost."""
        earlier = self.engine
        client = NodeClient.connect(
            socket, earlier.hello, deadline_s=DEADLINE_S, resume_from=earlier.client
        )
        self.engine = TinyEngine(client, earlier.hello)
        return {"adopted": client.arena_adopted}

    def reserve(self, request: str, prompt: str, num_blocks: int) -> dict[str, Any]:
        """Reserve and write the window, without committing."""
        keys = self.engine.open(request, prompt, num_blocks)
        reserved = self.engine.client.reserve(
            request, ROOT_PARENT, keys, group=0, shard=0, deadline_s=DEADLINE_S
        )
        start, offsets = self.engine.write(keys)
        self.reserved = (reserved.reservation, offsets, start)
        return {"states": list(reserved.states)}

    def scribble(self) -> dict[str, Any]:
        """Write garbage over the whole window, whatever the node still reads of it."""
        assert self.reserved is not None
        length = len(self.reserved[1]) * self.engine.part_bytes
        view = self.engine.client.window.view(self.reserved[2], length)
        view[:] = b"\xee" * length
        return {}

    def commit(self) -> dict[str, Any]:
        assert self.reserved is not None
        reservation, offsets, _ = self.reserved
        committed = self.engine.client.commit(
            reservation, range(len(offsets)), offsets, deadline_s=DEADLINE_S
        )
        return {"states": list(committed.states), "reason": committed.reason}


def main() -> None:
    engine = TinyEngine.connect(sys.argv[1])
    commands = _Commands(engine)
    print(json.dumps({"session": engine.client.session.hex()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(commands, request.pop("do"))(**request)
        except KVFabricError as exc:
            answer = {"error": exc.code}
        print(json.dumps(answer), flush=True)
    commands.engine.client.close()


if __name__ == "__main__":
    main()
