"""Warm start: the records of an SSD tier become blocks of the index, whole vectors at a time.

A million of them are to be indexed in about a second, so nothing here is done record by record. Blocks whose
parents are missing are indexed too: they are found when the parent is stored again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfabric.store.index import HOST, NO_ROW, RESERVED, SSD, BlockIndex, Lineage, Rows
from kvfabric.store.residency import Residency
from kvfabric.tiers.base import Flags, Location, RecordBatch, Tier, distinct
from kvfabric.types import PartSpec, TenantId


class Seeder:
    """`max_rows`: blocks that may be on SSD, so that there is room for new ones."""

    def __init__(self, residency: Residency, max_rows: int) -> None:
        self._residency = residency
        self._index = residency.index
        self._max_rows = max_rows

    async def seed(
        self, tier: Tier, purged: Collection[bytes], offboarded: Collection[TenantId] = ()
    ) -> None:
        """Index what the tier holds, file by file; blocks whose parents are missing too. What was made of
        `purged` incarnations or belongs to `offboarded` tenants is deleted: an index that was rebuilt from
        the files brings it back."""
        struck = set(purged)
        for batch in tier.batches():
            doomed = [
                n
                for n, one in batch.lineages.items()
                if struck.intersection(one.incarnations) or one.tenant in offboarded
            ]
            surplus = self._seed(batch, np.isin(batch.rows["lineage"], doomed))
            if surplus:
                tier.delete(surplus)
            await asyncio.sleep(0)

    def _seed(self, batch: RecordBatch, gone: Flags) -> list[Location]:
        """Returns places whose parts are of no use: `gone`, known already, or without room in the index."""
        room = min(self._index.free_parts, self._index.free_rows // 2)
        room = max(0, min(room, self._max_rows - self._residency.num_ssd_blocks))
        wanted = np.flatnonzero(~gone)[:room]
        fitting = batch if len(wanted) == len(batch) else batch.chosen(wanted)
        rows = self._place(fitting)
        refused = np.ones(len(batch), dtype=np.bool_)
        refused[wanted[self._seed_parts(fitting, rows)]] = False
        return [batch.location(at) for at in np.flatnonzero(refused).tolist()]

    def _place(self, batch: RecordBatch) -> Rows:
        """Rows of these blocks, made where they are new, below parents that may stay stubs."""
        index = self._index
        words, above = key_words(batch.rows["key"]), key_words(batch.rows["parent"])
        rows, places = self._rows_of(words), batch.rows["block_index"]
        parents, has_parent = np.zeros_like(rows), _is_any(above)
        # Nearly every record's parent is the record before it: these are not looked up again.
        follows = np.flatnonzero(has_parent[1:] & ~_is_any(above[1:] ^ words[:-1])) + 1
        parents[follows] = rows[follows - 1]
        has_parent[follows] = False
        looked_up = self._rows_of(above[has_parent])
        parents[has_parent] = looked_up
        unknown = index.lineage.array[looked_up] == 0
        index.block_index.array[looked_up[unknown]] = places[has_parent][unknown] - 1
        new = np.flatnonzero(index.lineage.array[rows] == 0)
        new = new[_firsts(rows[new])]
        if len(new):
            numbers = np.zeros(1 + max(batch.lineages), dtype=np.uint32)
            for number in distinct(batch.rows["lineage"][new]):
                lineage = batch.lineages[number]
                numbers[number] = index.intern_lineage(
                    lineage, self._residency.tenant_slot(lineage.tenant)
                )
            lineages = numbers[batch.rows["lineage"][new]]
            index.adopt(rows[new], parents[new], lineages, places[new])
        return rows

    def _rows_of(self, words: npt.NDArray[np.uint64]) -> Rows:
        """Of keys, with stubs for those that are not there."""
        rows = self._index.lookup(words)
        missing = np.flatnonzero(rows == NO_ROW)
        while len(missing):
            # Of keys that begin alike, which only somebody who tries makes, one a turn.
            new = missing[_firsts(words[missing, 0])]
            rows[new] = self._index.insert(words[new])
            missing = missing[rows[missing] == NO_ROW]
            rows[missing] = self._index.lookup(words[missing])
            missing = missing[rows[missing] == NO_ROW]
        return rows

    def _seed_parts(self, batch: RecordBatch, rows: Rows) -> npt.NDArray[np.intp]:
        """Which of the batch are sealed now: one record a part, of a block that is what it says."""
        index, taken = self._index, []
        for ordinal, own in self._by_ordinal(batch, rows):
            own = own[_firsts(rows[own])]
            index.ensure_parts(rows[own], ordinal + 1)
            parts = index.parts(rows[own], ordinal)
            fresh = self._may_seal(parts, batch.rows["checksum"][own])
            own, parts = own[fresh], parts[fresh]
            index.part_checksum[parts] = batch.rows["checksum"][own]
            self._residency.sealed(
                rows[own],
                parts,
                batch.rows["num_bytes"][own].astype(np.int64),
                batch.file,
                batch.rows["offset"][own].astype(np.int64),
            )
            taken.append(own)
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.intp)

    def _may_seal(self, parts: Rows, sums: npt.NDArray[np.void]) -> Flags:
        """Not those that are sealed already. One that came into the arena before the tier did may have other
        bytes, as right as these: the index has one checksum for both, so that is the one that counts."""
        state = self._index.part_state.array[parts]
        same = ((state & HOST) != 0) & (self._index.part_checksum[parts] == sums)
        may: Flags = ((state & SSD) == 0) & (((state & (HOST | RESERVED)) == 0) | same)
        return may

    def _by_ordinal(
        self, batch: RecordBatch, rows: Rows
    ) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
        """(ordinal in the layout, which of the batch), by kinds of part."""
        fields = ("lineage", "group", "shard", "num_bytes")
        kinds = np.stack([batch.rows[name].astype(np.uint64) for name in fields], axis=1)
        are_equal = bool((kinds == kinds[:1]).all())
        different = kinds[:1] if are_equal else np.unique(kinds, axis=0)
        by_ordinal: dict[int, list[npt.NDArray[np.intp]]] = {}
        for kind in different:
            lineage, group, shard, num_bytes = (int(value) for value in kind)
            own = np.arange(len(kinds)) if are_equal else np.flatnonzero(~_is_any(kinds ^ kind))
            # A key that names two lineages: the first that came counts.
            same = _lineage_is(self._index, rows[own], batch.lineages[lineage])
            layout = self._index.layouts[batch.lineages[lineage].layout_fingerprint]
            ordinal = layout.add(PartSpec(group, shard, num_bytes))
            by_ordinal.setdefault(ordinal, []).append(own[same])
        for ordinal, several in by_ordinal.items():
            yield ordinal, np.concatenate(several)


def key_words(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """A vector of 32-byte keys as (n, 4) words."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 4)


def _is_any(words: npt.NDArray[np.uint64]) -> Flags:
    """Of (n, 4) words: which rows are not zeros."""
    found: Flags = (words[:, 0] | words[:, 1] | words[:, 2] | words[:, 3]) != 0
    return found


def _firsts(values: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.intp]:
    """Where the first of each value is. Nearly always all differ: rows that are new ascend, and of others
    sorting alone tells fastest."""
    if (values[1:] > values[:-1]).all():
        return np.arange(len(values))
    ordered = np.sort(values)
    if (ordered[1:] != ordered[:-1]).all():
        return np.arange(len(values))
    first: npt.NDArray[np.intp] = np.unique(values, return_index=True)[1]
    return first


def _lineage_is(index: BlockIndex, rows: Rows, lineage: Lineage) -> Flags:
    is_same: Flags = index.lineage.array[rows] == index.find_lineage(lineage)
    return is_same
