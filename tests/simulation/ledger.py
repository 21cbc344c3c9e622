"""What a simulated fleet must keep, watched while it runs; and the trace of what happened.

The ledger knows more than any process: what a block's bytes must be, who touches which slot, what was
withdrawn when. Nothing of the product asks it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from kvfabric.protocol.messages import Confirmed
from kvfabric.registry.state import RegistryState
from kvfabric.store.lease import RequestGrant
from kvfabric.testing.simulation.loop import SimulatedLoop
from kvfabric.tiers.arena import PAGE_BYTES, Arena, Slots
from kvfabric.types import Segment

SHOWN = 60


def content(
    owner: str, tokens: Sequence[int], segments: Iterable[Segment], part: int, size: int
) -> bytes:
    """What a block's part must hold: it follows from the prompt up to its end and whose it is, never from a
    key. `owner`: the tenant, or empty for a public block."""
    end = len(tokens)
    told = [
        (s.template, s.version, s.incarnation, s.first_token)
        for s in segments
        if s.first_token < end
    ]
    digest = blake2b(repr((owner, tuple(tokens), told, part)).encode(), digest_size=32).digest()
    return digest * (size // 32)


class Ledger:
    """`violation`: the first promise that was broken, empty as long as none was."""

    def __init__(self, loop: SimulatedLoop, *, verbose: bool = False) -> None:
        self.violation = ""
        self.failed = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self._loop = loop
        self._verbose = verbose
        self._digest = blake2b(digest_size=16)
        self._lines: deque[str] = deque(maxlen=SHOWN)
        self._touching: dict[tuple[int, int], int] = {}
        self._arenas: dict[int, WatchedArena] = {}
        self._valid_from: dict[str, tuple[int, float]] = {}
        self._highest: dict[str, dict[str, int]] = {}
        self.floored: dict[str, int] = {}
        self.seen: set[tuple[bytes, bytes]] = set()

    # ------------------------------------------------------------------ trace

    def note(self, who: str, what: str) -> None:
        line = f"{self._loop.time():12.6f} {who:10} {what}"
        self._digest.update(line.encode())
        self._lines.append(line)
        if self._verbose:
            print(line)

    @property
    def trace(self) -> str:
        """Digest of all that was noted."""
        return self._digest.copy().hexdigest()

    @property
    def tail(self) -> str:
        return "\n".join(self._lines)

    def broken(self, promise: str) -> None:
        """A promise was broken: the run ends."""
        if not self.violation:
            self.note("LEDGER", promise)
            self.violation = promise
        self.failed.set()

    # ------------------------------------------------------------------ bytes

    def used(self, who: str, data: bytes, expected: bytes) -> None:
        """An engine uses what it loaded."""
        self.counts["blocks used"] += 1
        if data != expected:
            self.broken(
                f"wrong bytes: {who} uses a block that is not what was stored for its prompt"
            )

    # ------------------------------------------------------------------ slots

    def own(self, arena: WatchedArena) -> None:
        self._arenas[arena.base] = arena
        arena.ledger = self

    def touched(self, buffer: memoryview, change: int) -> None:
        """Somebody may read or write this memory from now on (+1), or does no more (-1)."""
        address = np.frombuffer(buffer, np.uint8).ctypes.data
        for base, arena in self._arenas.items():
            if base <= address < base + arena.size_bytes:
                first = (address - base) // PAGE_BYTES
                last = (address - base + len(buffer) - 1) // PAGE_BYTES
                for page in range(first, last + 1):
                    self.touch(arena, page, change)

    def touch(self, arena: WatchedArena, page: int, change: int) -> None:
        place = (arena.base, page)
        self._touching[place] = self._touching.get(place, 0) + change

    def reads(
        self, who: str, arena: WatchedArena, pages: Sequence[int], generations: Sequence[int]
    ) -> None:
        """An engine learned where blocks lie and copies from now on; it says itself when it does no more."""
        for page, generation in zip(pages, generations, strict=True):
            self.touch(arena, page, +1)
            if arena.generations.get(page) != generation:
                self.broken(f"{who} is to read slot {page}, which was given out anew on the way")

    def allocated(self, arena: WatchedArena, slots: Slots) -> None:
        for page, generation in zip(*(one.tolist() for one in slots), strict=True):
            arena.generations[page] = generation
            if self._touching.get((arena.base, page), 0) > 0:
                self.broken(f"slot {page} is given out anew while somebody may still touch it")

    def gave_up(self, arena: WatchedArena) -> None:
        """Its daemon died: what readers had of it is void, by the protocol."""
        self._arenas.pop(arena.base, None)
        for place in [place for place in self._touching if place[0] == arena.base]:
            del self._touching[place]

    # ------------------------------------------------------------------ withdrawals

    def succeeded(self, scope: str, epoch: int) -> None:
        """A change was made and everybody was reached: what is older than `epoch` is served no more."""
        known = self._valid_from.get(scope, (0, 0.0))
        if epoch > known[0]:
            self._valid_from[scope] = (epoch, self._loop.time())

    def _stale(self, epochs: Iterable[tuple[str, int]]) -> str:
        for scope, epoch in epochs:
            valid, since = self._valid_from.get(scope, (0, 0.0))
            if epoch < valid:
                return f"{scope} at epoch {epoch}, which ended at {since:.6f} with epoch {valid}"
        return ""

    def dispatched(self, who: str, epochs: Iterable[tuple[str, int]]) -> None:
        self.counts["requests with a handle"] += 1
        if stale := self._stale(epochs):
            self.broken(f"{who} sends a request under {stale}")

    def confirmed(self, who: str, grant: RequestGrant, answer: Confirmed) -> None:
        if not answer.num_blocks:
            return
        self.counts["blocks confirmed"] += answer.num_blocks
        if stale := self._stale(grant.epochs):
            self.broken(f"{who} serves {answer.num_blocks} blocks under {stale}")

    def state(self, holder: str, state: RegistryState) -> None:
        """A holder acts on this from now on; what one has seen it never forgets, crashes included."""
        highest = self._highest.setdefault(holder, {})
        for scope, epoch in state.epochs.items():
            if epoch < highest.get(scope, 0):
                self.broken(f"{holder} goes back in {scope}: {highest[scope]} -> {epoch}")
            highest[scope] = epoch


class WatchedArena(Arena):
    """A node's real arena; the ledger hears what is given out. `base`: its address."""

    ledger: Ledger | None = None

    def __init__(self, fd: int, size_bytes: int) -> None:
        super().__init__(fd, size_bytes)
        self.base: int = np.frombuffer(self.view, np.uint8).ctypes.data
        self.generations: dict[int, int] = {}

    def allocate(self, num_slots: int, num_bytes: int) -> Slots | None:
        slots = super().allocate(num_slots, num_bytes)
        if slots is not None and self.ledger is not None:
            self.ledger.allocated(self, slots)
        return slots
