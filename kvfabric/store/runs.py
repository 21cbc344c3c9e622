"""How routers are told what lies in the host tier: blocks as runs of parents and children, 8 bytes a key."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvfabric.store.index import BlockIndex, Rows
from kvfabric.types import TierName

SNAPSHOT_ROWS, SNAPSHOT_RUNS = 512, 64
"""Of one step of a snapshot at most: in an index that has seen much, runs are short and many."""


class EventSink(Protocol):
    """Where residency is announced; `kvfabric.events.stream` is one. Prefixes are 8 bytes a key."""

    def stored(
        self,
        tier: TierName,
        namespace_tag: bytes,
        parent: bytes,
        keys: bytes,
        *,
        engine: bytes = b"",
    ) -> None: ...

    def removed(
        self, tier: TierName, namespace_tag: bytes, keys: bytes, *, engine: bytes = b""
    ) -> None: ...

    def cleared(self, tier: TierName, *, engine: bytes = b"") -> None: ...


class Run(NamedTuple):
    """Consecutive blocks of a chain, as events carry them."""

    namespace_tag: bytes
    parent: bytes
    keys: bytes


def complete(index: BlockIndex, rows: Rows) -> Rows:
    """Those of `rows` whose every part is in the host tier."""
    declared = index.lineage_parts.array[index.lineage.array[rows]]
    found: Rows = rows[index.host_parts.array[rows] == declared]
    return found


def runs(index: BlockIndex, rows: Rows) -> Iterator[Run]:
    """`rows` as runs of parent and children, in their order."""
    for start, end in pairwise([*_starts(index, rows).tolist(), len(rows)]):
        first = int(rows[start])
        parent = index.keys.array[index.parent.cell[first], 0].tobytes()
        yield Run(index.lineage_at(first).namespace_tag, parent, index.prefixes(rows[start:end]))


def host_runs(index: BlockIndex, limit: int) -> Iterator[list[Run]]:
    """All READY blocks of the host tier, from `limit` rows at a time or fewer; others may run between."""
    start = 1
    while start <= index.highest_row:
        end = min(start + min(limit, SNAPSHOT_ROWS), index.highest_row + 1)
        rows = np.arange(start, end, dtype=np.uint32)
        present = complete(index, rows[index.host_parts.array[rows] > 0])
        starts = _starts(index, present)
        if len(starts) > SNAPSHOT_RUNS:
            present = present[: starts[SNAPSHOT_RUNS]]
            end = int(present[-1]) + 1
        yield list(runs(index, present))
        start = end


def _starts(index: BlockIndex, rows: Rows) -> npt.NDArray[np.intp]:
    lineages = index.lineage.array[rows]
    joined = (index.parent.array[rows[1:]] == rows[:-1]) & (lineages[1:] == lineages[:-1])
    return np.flatnonzero(np.append(True, ~joined)) if len(rows) else np.empty(0, np.intp)
