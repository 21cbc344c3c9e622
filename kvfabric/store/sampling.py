"""Samples of what lies in the store, with all that is before it: for whoever asks about a lineage. Sync.

Reads the index and changes nothing. A look costs what its window of rows costs, however many blocks there
are: some 0.1 ms.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from kvfabric.store.index import BlockIndex, Lineage, Rows
from kvfabric.types import KEY_BYTES, TierName

WINDOW_ROWS = 32_768
MAX_CHAIN_BLOCKS = 256
"""Deeper blocks are passed over: a probe is to be short."""
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Chain:
    """A block and all before it, READY: `keys` packed, 32 B each, from the first block on; `lineages` of
    each; `tier`: where the last one is (HOST if it is in both)."""

    keys: bytes
    lineages: tuple[Lineage, ...]
    tier: TierName

    @property
    def num_blocks(self) -> int:
        return len(self.keys) // KEY_BYTES


class Sampler:
    """Of one index. `source`: which of many are taken."""

    def __init__(self, index: BlockIndex, source: random.Random | None = None) -> None:
        self._index = index
        self._source = source or random.Random()

    @property
    def num_windows(self) -> int:
        return -(-self._index.highest_row // WINDOW_ROWS)

    def named(self, names: Collection[bytes]) -> set[int]:
        """Numbers of the lineages that one of these names, as `BlockIndex.named` has it."""
        return self._index.named(names)

    def lineage(self, number: int) -> Lineage:
        return self._index.lineage_of(number)

    def some(self, most: int) -> Mapping[int, Lineage]:
        """Lineages under which something is stored, by their numbers; a random `most` of them."""
        known = list(self._index.numbered_lineages())
        chosen = known if len(known) <= most else self._source.sample(known, most)
        return {number: lineage for lineage, number in chosen}

    def look(self, numbers: Collection[int], window: int, most: int) -> list[Chain]:
        """At most `most` chains for each tier whose last block is of one of these lineages, from one window
        of rows (counted modulo `num_windows`). Empty: none there."""
        if not numbers or not self.num_windows:
            return []
        index = self._index
        start = 1 + window % self.num_windows * WINDOW_ROWS
        end = min(start + WINDOW_ROWS, index.highest_row + 1)
        wanted = np.zeros(len(index.lineages), dtype=np.bool_)
        wanted[list(numbers)] = True
        found = np.flatnonzero(wanted[index.lineage.array[start:end]])
        rows = (found + start).astype(np.uint32)
        rows = rows[self._ready(rows) & (index.block_index.array[rows] < MAX_CHAIN_BLOCKS)]
        in_host = (
            index.host_parts.array[rows] == index.lineage_parts.array[index.lineage.array[rows]]
        )
        return [
            *self._chains(rows[in_host], most, TierName.HOST),
            *self._chains(rows[~in_host], most, TierName.SSD),
        ]

    def _ready(self, rows: Rows) -> np.typing.NDArray[np.bool_]:
        index = self._index
        ready: np.typing.NDArray[np.bool_] = (
            index.available_parts.array[rows]
            == index.lineage_parts.array[index.lineage.array[rows]]
        )
        return ready

    def _chains(self, rows: Rows, most: int, tier: TierName) -> list[Chain]:
        chains: list[Chain] = []
        tries = min(len(rows), _TRIES * most)
        for at in self._source.sample(range(len(rows)), tries):
            chain = self._chain(int(rows[at]), tier)
            if chain is not None:
                chains.append(chain)
            if len(chains) == most:
                break
        return chains

    def _chain(self, row: int, tier: TierName) -> Chain | None:
        """None if not all before it is there: nobody could be promised it."""
        index, rows = self._index, []
        while row:
            rows.append(row)
            row = index.parent.cell[row]
        rows.reverse()
        whole = np.array(rows, dtype=np.uint32)
        if not index.lineage.array[whole].all() or not self._ready(whole).all():
            return None
        lineages = tuple(index.lineage_at(one) for one in rows)
        return Chain(index.keys.array[whole].tobytes(), lineages, tier)
