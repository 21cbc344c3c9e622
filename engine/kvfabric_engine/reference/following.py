"""The decode engine's half of a hand-off: a prompt that another engine computes is loaded as it comes.

    follow --more is here--> load it --more is to come--> follow again
       |                        |
       +-- all, no more, late --+--> start: what did not come is computed

Each load is of whole chunks, verified and confirmed like any other, while the next chunk is being computed
elsewhere. Nothing is waited for past the time that the request's handle gives. Runs on the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from kvfabric.types import MissReason
from kvfabric_engine.connector import Connector, Loaded, PrefixMatch
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.sequence import Phase, Sequence


class WhenDone(Protocol):
    def __call__(self, future: Future[Any], then: Callable[[Any], None], /) -> None:
        """`then` on the engine's thread."""


class Following:
    """`start(sequence, n)`: what can be had is there, `n` blocks after those cached in HBM."""

    def __init__(
        self,
        connector: Connector,
        shape: PoolShape,
        *,
        when_done: WhenDone,
        start: Callable[[Sequence, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connector = connector
        self._shape = shape
        self._when_done = when_done
        self._start = start
        self._clock = clock

    def opened(self, sequence: Sequence, wait_s: float) -> None:
        """Its blocks may come from now on, whenever the sequence is admitted."""
        sequence.wait_until = self._clock() + wait_s
        if keys := sequence.usable_keys():
            self._connector.follow(sequence.request_id, keys, beyond=0, wait_s=0.0)

    def begin(self, sequence: Sequence) -> None:
        """Admitted: it has its pages."""
        self._ask(sequence, 0)

    def _ask(self, sequence: Sequence, num_loaded: int) -> None:
        told = self._connector.follow(
            sequence.request_id,
            sequence.usable_keys(),
            beyond=len(sequence.cached) + num_loaded,
            wait_s=sequence.wait_until - self._clock(),
        )
        self._when_done(told, partial(self._told, sequence, num_loaded))

    def _told(self, sequence: Sequence, num_loaded: int, match: PrefixMatch) -> None:
        if sequence.phase is not Phase.FETCHING:
            return  # the engine stopped
        keys, first = sequence.usable_keys(), len(sequence.cached) + num_loaded
        # What is still on its way from a node that may hang is waited for only while there is time.
        is_late = self._clock() >= sequence.wait_until
        there = match.num_here if match.more or is_late else match.num_blocks
        end = min(there, len(keys))
        is_last = is_late or not match.more or end == len(keys) or sequence.is_aborted
        if end <= first or sequence.is_aborted:
            if is_last:
                self._end(sequence, num_loaded, match.reason)
            else:
                self._ask(sequence, num_loaded)
            return
        k = self._shape.pages_per_block
        loaded = self._connector.load(
            sequence.request_id,
            keys[first:end],
            [tuple(sequence.pages[block * k : (block + 1) * k]) for block in range(first, end)],
        )
        self._when_done(loaded, partial(self._loaded, sequence, num_loaded, end - first, is_last))

    def _loaded(
        self, sequence: Sequence, before: int, wanted: int, is_last: bool, loaded: Loaded
    ) -> None:
        if sequence.phase is not Phase.FETCHING:
            return
        num_loaded = before + loaded.num_blocks
        if is_last or loaded.num_blocks < wanted:
            self._end(sequence, num_loaded, loaded.reason)
        else:
            self._ask(sequence, num_loaded)

    def _end(self, sequence: Sequence, num_loaded: int, reason: MissReason) -> None:
        if not sequence.was_started:
            is_whole = len(sequence.cached) + num_loaded == len(sequence.usable_keys())
            sequence.reused = replace(
                sequence.reused,
                host=num_loaded * self._shape.block_tokens,
                miss=MissReason.NONE if is_whole else reason,
            )
        self._start(sequence, num_loaded)
