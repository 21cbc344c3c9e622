"""A simulated engine: what it computes follows from the prompt, and it verifies nothing by itself.

A real one also compares checksums; this one does not, so whatever the store lets happen to a slot is seen. It
is as careless as the protocol allows: it stores late, gives up halfway, forgets to abort, asks again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfabric.errors import KVFabricError, PeerClosed
from kvfabric.hashing import ROOT_PARENT, BlockHasher, namespace_tag
from kvfabric.protocol.messages import (
    Abort,
    BlockRun,
    Commit,
    Committed,
    Confirm,
    Confirmed,
    EngineEvents,
    HandleOpened,
    Load,
    Located,
    Match,
    Matched,
    OpenHandle,
    Release,
    Reserve,
    Reserved,
)
from kvfabric.testing.simulation.network import Unreachable
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.types import BlockKey, GrantState, Incarnation, Segment, SessionId
from tests.simulation.ledger import WatchedArena, content
from tests.simulation.node import BLOCK_TOKENS, Connection, Life, SimulatedNode, make_hello

if TYPE_CHECKING:
    from tests.simulation.world import World

ASK_S = 0.6
_GONE = (Unreachable, TimeoutError, KVFabricError)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a router sends. `handle` empty: nothing may be reused. `owner`: whose prompt it is."""

    request_id: str
    owner: str
    tokens: tuple[int, ...]
    handle: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Blocks of a prompt as the handle allows them. `tags`: the namespace tag of each."""

    keys: list[BlockKey]
    tags: list[bytes]
    segments: tuple[Segment, ...]
    num_public: int
    asked: Asked

    def bytes_of(self, block: int, part: int) -> bytes:
        end = (block + 1) * BLOCK_TOKENS
        owner = "" if block < self.num_public else self.asked.owner
        return content(owner, self.asked.tokens[:end], self.segments, part, PAGE_BYTES)


class SimulatedEngine:
    """One engine on a node's machine. `pool`: its HBM, (tag, key) -> parts, least recently used first."""

    def __init__(self, world: World, node: SimulatedNode, name: str) -> None:
        self.world = world
        self.node = node
        self.name = name
        self.endpoint = f"http://{name}"
        self.num_lives = 0
        self.session: SessionId | None = None
        self.pool: OrderedDict[tuple[bytes, BlockKey], list[bytes]] = OrderedDict()
        self._rng = world.rng

    def start(self) -> None:
        self.num_lives += 1
        self.process = self.world.spawn(f"{self.name}.{self.num_lives}", self.node.name)
        self.node.engines.append(self.process)
        self.pool.clear()
        self.session = None
        self._life: Life | None = None
        self._connection: Connection | None = None
        self._copies = 0
        self._others: _Prompt | None = None
        self._copying: list[tuple[WatchedArena, list[int]]] = []
        self._window = memoryview(bytearray(self.world.plan.window_blocks * PAGE_BYTES))
        self._window_at = 0
        self.num_serving = 0
        self.world.network.serve(self.endpoint, self.process, self._serve)
        self.process.start(self._stay_connected())

    def kill(self) -> None:
        """The node hears of it by the process's descriptor, at once or a little later."""
        if not self.process.is_alive:
            return
        session, life = self.session, self._life
        self.world.kill(self.process)
        self.pool.clear()
        for arena, pages in self._copying:
            for page in pages:
                self.world.ledger.touch(arena, page, -1)
        self._copying.clear()
        node = self.node
        if session is not None and life is not None and life.process.is_alive:
            life.process.call_later(
                self._rng.expovariate(20), lambda: node.disconnected(session, exited=True)
            )

    def disconnect(self) -> None:
        """The connection breaks; the process lives, and may still copy."""
        if self.session is not None and self._life is not None and self._life.process.is_alive:
            self.node.disconnected(self.session, exited=False)

    @property
    def is_copying(self) -> bool:
        return self.process.is_alive and bool(self._copying)

    # ------------------------------------------------------------------ connection

    async def _stay_connected(self) -> None:
        while True:
            life = self._life
            is_up = (
                life is not None
                and life is self.node.life
                and self._connection is not None
                and self._connection.is_open
            )
            if not is_up and not self._copies:
                self._connect()
            await asyncio.sleep(0.1 + self._rng.random() * 0.2)

    def _connect(self) -> None:
        """Said by `resumed`: no copy of ours is under way."""
        self._window = memoryview(bytearray(len(self._window)))
        self._window_at = 0
        hello = make_hello(self.name, self.endpoint, self.world.layout)
        try:
            self._life, self._connection = self.node.connect(
                self.process, hello, self._window, self.session
            )
        except PeerClosed:
            return
        self.session = self._connection.session.id
        self._told: set[tuple[bytes, BlockKey]] = set()
        self._tell(list(self.pool), [])

    async def _node(self, message: Any) -> Any:
        """Ask this life of the node. Raises one of `_GONE`."""
        connection = self._connection
        if connection is None or not connection.is_open or self._life is not self.node.life:
            raise PeerClosed("not connected")
        return await self.world.network.call(
            f"{self.node.name}/engines",
            type(message).__name__,
            (connection.session.id, message),
            timeout=ASK_S * 4,
            in_order=True,
        )

    # ------------------------------------------------------------------ requests

    async def _serve(self, method: str, payload: Any) -> Any:
        if method == "probe":
            return self.session or b""
        asked: Asked = payload
        self.num_serving += 1
        try:
            return await self._answer(asked)
        finally:
            self.num_serving -= 1

    async def _answer(self, asked: Asked) -> tuple[int, int]:
        """(blocks reused from HBM, from the node)."""
        prompt = await self._open(asked) if asked.handle else None
        num_blocks = len(asked.tokens) // BLOCK_TOKENS
        if prompt is None:
            if asked.handle:  # it may have been opened all the same
                self.process.start(self._release(asked.request_id))
            await asyncio.sleep(self.world.plan.block_s * num_blocks)
            self.world.ledger.note(self.name, f"{asked.request_id} computed alone")
            return 0, 0
        in_hbm = self._in_hbm(prompt)
        loaded = 0
        try:
            loaded = await self._load(prompt, in_hbm)
        except _GONE as exc:
            self.world.ledger.note(self.name, f"{asked.request_id} no load: {type(exc).__name__}")
        have = in_hbm + loaded
        await asyncio.sleep(self.world.plan.block_s * (num_blocks - have))
        self._keep(prompt, have)
        self.world.ledger.note(
            self.name, f"{asked.request_id} hbm {in_hbm} host {loaded} of {len(prompt.keys)}"
        )
        self.process.start(self._save(prompt))
        return in_hbm, loaded

    async def _open(self, asked: Asked) -> _Prompt | None:
        try:
            opened: HandleOpened = await self._node(OpenHandle(asked.request_id, asked.handle))
        except _GONE as exc:
            self.world.ledger.note(self.name, f"{asked.request_id} no handle: {type(exc).__name__}")
            return None
        segments = tuple(
            Segment(s.template, s.version, Incarnation(s.incarnation), s.first_token)
            for s in opened.segments
        )
        hasher = BlockHasher(
            opened.namespace_key,
            BLOCK_TOKENS,
            segments=segments,
            public_key=opened.public_key or None,
            public_tokens=opened.public_tokens,
        )
        limit = opened.cacheable_tokens if opened.cacheable_tokens >= 0 else len(asked.tokens)
        keys = hasher.extend(asked.tokens[: min(limit, len(asked.tokens) - 1)])
        num_public = opened.public_tokens // BLOCK_TOKENS
        tag = namespace_tag(opened.namespace_key)
        public = namespace_tag(opened.public_key) if opened.public_key else b""
        tags = [public if at < num_public else tag for at in range(len(keys))]
        return _Prompt(keys, tags, segments, num_public, asked)

    def _in_hbm(self, prompt: _Prompt) -> int:
        count = 0
        for place in zip(prompt.tags, prompt.keys, strict=True):
            held = self.pool.get(place)
            if held is None:
                break
            self.pool.move_to_end(place)
            for part, data in enumerate(held):
                self.world.ledger.used(self.name, data, prompt.bytes_of(count, part))
            count += 1
        return count

    async def _load(self, prompt: _Prompt, first: int) -> int:
        """Blocks from `first` on that the node has; copied, confirmed, and only then used."""
        request, plan = prompt.asked.request_id, self.world.plan
        others, self._others = self._others, prompt
        if others is not None and self._rng.random() < plan.confused:
            await self._ask_for_another(prompt, others)
        if first == len(prompt.keys):
            return 0
        matched: Matched = await self._node(Match(request, b"".join(prompt.keys)))
        if self._rng.random() < plan.ask_again:
            matched = await self._node(Match(request, b"".join(prompt.keys)))
        keys = prompt.keys[first : matched.num_blocks]
        if not keys:
            return 0
        copied: list[list[bytes]] = []
        count = len(keys)
        asked = b"".join(keys)
        for spec in self.world.layout.parts:
            copies, located, life = await self._copy(request, asked, spec.group, spec.shard)
            if self._rng.random() < plan.confirm_elsewhere and life is not self.node.life:
                await self._reopen(prompt)
            confirmed: Confirmed = await self._node(
                Confirm(
                    request,
                    asked[: 32 * located.num_blocks],
                    located.generations,
                    spec.group,
                    spec.shard,
                )
                if located.num_blocks
                else Match(request, asked)
            )
            count = min(count, located.num_blocks and confirmed.num_blocks)
            copied.append(copies)
        for at in range(count):
            parts = [copies[at] for copies in copied]
            for part, data in enumerate(parts):
                self.world.ledger.used(self.name, data, prompt.bytes_of(first + at, part))
            self._put(prompt.tags[first + at], prompt.keys[first + at], parts)
        return count

    async def _ask_for_another(self, prompt: _Prompt, others: _Prompt) -> None:
        """A connector that mixes requests up asks with the keys of one under the handle of the other."""
        request, keys = prompt.asked.request_id, b"".join(others.keys)
        if not keys:
            return
        matched: Matched = await self._node(Match(request, keys))
        for at in range(matched.num_blocks):
            owner = "" if at < others.num_public else others.asked.owner
            if owner not in ("", prompt.asked.owner):
                self.world.ledger.broken(
                    f"{self.name} is given a block of another tenant under {prompt.asked.owner}'s handle"
                )

    async def _reopen(self, prompt: _Prompt) -> None:
        """The daemon is another one by now: an engine that asks it about what the last one located."""
        for _ in range(40):
            connection = self._connection
            if connection is not None and connection.is_open and self._life is self.node.life:
                break
            await asyncio.sleep(0.1)
        request = prompt.asked.request_id
        await self._node(OpenHandle(request, prompt.asked.handle))
        await self._node(Match(request, b"".join(prompt.keys)))

    async def _copy(
        self, request: str, keys: bytes, group: int, shard: int
    ) -> tuple[list[bytes], Located, Life]:
        """Copies, one by one, which takes time."""
        life, ledger = self._life, self.world.ledger
        assert life is not None
        self._copies += 1
        try:
            located: Located = await self._node(Load(request, keys, group, shard))
            pages = [o // PAGE_BYTES for o in np.frombuffer(located.offsets, "<u8").tolist()]
            if life is self.node.life:
                generations = np.frombuffer(located.generations, "<u4").tolist()
                ledger.reads(self.name, life.arena, pages, generations)
            reading = (life.arena, pages)
            self._copying.append(reading)
            copies = []
            try:
                for page in pages:
                    # One whose daemon died takes its time: the memory is another's meanwhile.
                    slow = 1 if life is self.node.life else 20
                    await asyncio.sleep(self._rng.expovariate(1 / (slow * self.world.plan.copy_s)))
                    copies.append(bytes(life.arena.part(page, PAGE_BYTES)))
            finally:
                self._copying.remove(reading)
                for page in pages:
                    ledger.touch(life.arena, page, -1)
        finally:
            self._copies -= 1
        return copies, located, life

    # ------------------------------------------------------------------ what is kept

    def _keep(self, prompt: _Prompt, first: int) -> None:
        """What was computed."""
        for at in range(first, len(prompt.keys)):
            parts = [prompt.bytes_of(at, part) for part in range(len(self.world.layout.parts))]
            self._put(prompt.tags[at], prompt.keys[at], parts)

    def _put(self, tag: bytes, key: BlockKey, parts: list[bytes]) -> None:
        place = (tag, key)
        fresh = place not in self.pool
        self.pool[place] = parts
        self.pool.move_to_end(place)
        gone = []
        while len(self.pool) > self.world.plan.hbm_blocks:
            gone.append(self.pool.popitem(last=False)[0])
        if place in gone:  # a message's removals come before what it stored
            gone, fresh = [], False
        self._tell([place] if fresh else [], gone)

    def _tell(
        self, stored: list[tuple[bytes, BlockKey]], removed: list[tuple[bytes, BlockKey]]
    ) -> None:
        """To the node, in order; lost with the connection."""
        connection = self._connection
        if connection is None or not (stored or removed):
            return
        message = EngineEvents(
            stored=tuple(BlockRun(tag, bytes(8), key[:8]) for tag, key in stored),
            removed=tuple(BlockRun(tag, bytes(8), key[:8]) for tag, key in removed),
            cleared=False,
        )
        self.process.start(self._quietly(message))

    async def _quietly(self, message: Any) -> None:
        try:
            await self._node(message)
        except _GONE:
            return

    # ------------------------------------------------------------------ saving

    async def _save(self, prompt: _Prompt) -> None:
        request, rng, plan = prompt.asked.request_id, self._rng, self.world.plan
        try:
            if rng.random() < plan.forget_to_save:
                return
            await asyncio.sleep(rng.expovariate(1 / plan.save_after_s))
            for spec in self.world.layout.parts:
                await self._save_part(prompt, spec.group, spec.shard)
        except _GONE as exc:
            self.world.ledger.note(self.name, f"{request} no save: {type(exc).__name__}")
        finally:
            await self._release(request)

    async def _save_part(self, prompt: _Prompt, group: int, shard: int) -> None:
        rng, plan = self._rng, self.world.plan
        request = prompt.asked.request_id
        keys = prompt.keys
        if not keys:
            return
        reserved: Reserved = await self._node(
            Reserve(request, ROOT_PARENT, b"".join(keys), group, shard)
        )
        granted = [at for at, s in enumerate(reserved.states) if s == GrantState.GRANTED]
        if not granted:
            return
        if rng.random() < plan.give_up:
            if rng.random() < 0.5:
                await self._node(Abort(reserved.reservation))
            return  # or not even that
        if rng.random() < plan.commit_late:
            await asyncio.sleep(rng.random() * 2)
        window, offsets = self._window, []
        for at in granted:
            offset = self._window_at % len(window)
            self._window_at += PAGE_BYTES
            window[offset : offset + PAGE_BYTES] = prompt.bytes_of(at, shard)
            offsets.append(offset)
        if window is not self._window:
            return
        committed: Committed = await self._node(
            Commit(
                reserved.reservation,
                np.array(granted, "<u4").tobytes(),
                np.array(offsets, "<u8").tobytes(),
            )
        )
        stored = sum(committed.states)
        self.world.ledger.counts["parts stored"] += stored
        self.world.ledger.note(
            self.name, f"{request} stored {stored} of {len(granted)} {committed.reason}"
        )

    async def _release(self, request: str) -> None:
        """Until it was heard, or the connection is another one."""
        connection = self._connection
        while connection is self._connection and connection is not None and connection.is_open:
            try:
                await self._node(Release((request,)))
            except _GONE:
                await asyncio.sleep(0.2)
            else:
                return
