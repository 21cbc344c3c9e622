"""A vectorised hash table from 64-bit keys to rows of small integers. Pure, no I/O, not thread-safe.

Open addressing in buckets of 8 slots (one cache line of keys): a lookup of n keys gathers n buckets at
once, so it takes a few numpy calls whatever the table holds. A key that finds its bucket full goes to the
next one, and `passed` counts that on each bucket it went by: a lookup goes on only past a bucket with a
count, and a deletion needs no tombstone.

Keys are multiplied by a random odd number first, so whoever chooses keys does not choose buckets. The
product is invertible: the table is exact. Product 0 marks an empty slot, and one key in 2**64 is taken
for its neighbour, which a hint may be.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.intp]

BUCKET = 8
_MAX_LOAD = 0.75
_EMPTY = np.uint64(0)
_ONE = np.uint64(1)


class KeyTable:
    """`values[slot]` is the row of the key in `slot`: zero for a new key, the owner's to write.

    Slots are valid until the next `insert`, which may grow the table and move everything.
    """

    __slots__ = ("_factor", "_inverse", "_keys", "_passed", "_shift", "num_keys", "values")

    def __init__(self, capacity: int = 1024, *, width: int = 0) -> None:
        """Room for `capacity` keys without growing; `width`: u16 values in a row."""
        factor = secrets.randbits(64) | 1
        self._factor = np.uint64(factor)
        self._inverse = np.uint64(pow(factor, -1, 1 << 64))
        self.num_keys = 0
        self._allocate(max(1, -(-int(capacity / _MAX_LOAD) // BUCKET)), width)

    def _allocate(self, num_buckets: int, width: int) -> None:
        bits = max(1, (num_buckets - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._keys = np.zeros((1 << bits, BUCKET), np.uint64)
        self._passed = np.zeros(1 << bits, np.uint32)
        self.values = np.zeros((BUCKET << bits, width), np.uint16)

    @property
    def num_slots(self) -> int:
        return self._keys.size

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._passed.nbytes + self.values.nbytes

    def keys(self) -> Keys:
        """All keys, in no order (a copy)."""
        mixed: Keys = self._keys[self._keys != _EMPTY]
        return np.multiply(mixed, self._inverse, out=mixed)

    def find(self, keys: Keys) -> Slots:
        """Slot of each key, -1 where it is not there."""
        return self._find(self._mix(keys))

    def insert(self, keys: Keys) -> Slots:
        """Slot of each key, new or not. `keys` holds no key twice."""
        mixed = self._mix(keys)
        slots = self._find(mixed)
        new = np.flatnonzero(slots < 0)
        if new.size == 0:
            return slots
        if self.num_keys + new.size > _MAX_LOAD * self.num_slots:
            self._grow(self.num_keys + new.size)
            slots = self._find(mixed)
        slots[new] = self._place(mixed[new])
        self.num_keys += int(new.size)
        return slots

    def delete(self, slots: Slots) -> None:
        """Forget what is in `slots` (none twice, none of them -1)."""
        if slots.size == 0:
            return
        flat = self._keys.reshape(-1)
        buckets = self._bucket(flat[slots])
        at = slots // BUCKET
        mask = len(self._passed) - 1
        away = buckets != at
        while away.any():
            np.subtract.at(self._passed, buckets[away], np.uint32(1))
            buckets[away] = (buckets[away] + 1) & mask
            away = buckets != at
        flat[slots] = _EMPTY
        self.values[slots] = 0
        self.num_keys -= int(slots.size)

    def _mix(self, keys: Keys) -> Keys:
        mixed: Keys = keys * self._factor
        return np.maximum(mixed, _ONE, out=mixed)

    def _bucket(self, mixed: Keys) -> Slots:
        return (mixed >> self._shift).astype(np.intp)

    def _find(self, mixed: Keys) -> Slots:
        slots = np.full(mixed.size, -1, np.intp)
        rows = np.arange(mixed.size)
        buckets = self._bucket(mixed)
        mask = len(self._passed) - 1
        while rows.size:
            equal = self._keys[buckets] == mixed[rows, None]
            column = equal.argmax(axis=1)
            hit = equal[np.arange(rows.size), column]
            slots[rows[hit]] = buckets[hit] * BUCKET + column[hit]
            further = ~hit & (self._passed[buckets] > 0)
            rows = rows[further]
            buckets = (buckets[further] + 1) & mask
        return slots

    def _place(self, mixed: Keys) -> Slots:
        """Put keys that are not in the table, all different, into free slots."""
        slots = np.empty(mixed.size, np.intp)
        rows = np.arange(mixed.size)
        buckets = self._bucket(mixed)
        flat = self._keys.reshape(-1)
        mask = len(self._passed) - 1
        while rows.size:
            # The r-th newcomer of a bucket takes its r-th free slot; those beyond go one bucket on.
            order = np.argsort(buckets, kind="stable")
            rows, buckets = rows[order], buckets[order]
            rank = np.arange(rows.size) - np.searchsorted(buckets, buckets)
            free = (self._keys[buckets] == _EMPTY).cumsum(axis=1)
            fits = rank < free[:, -1]
            column = (free[fits] == rank[fits, None] + 1).argmax(axis=1)
            target = buckets[fits] * BUCKET + column
            flat[target] = mixed[rows[fits]]
            slots[rows[fits]] = target
            np.add.at(self._passed, buckets[~fits], np.uint32(1))
            rows, buckets = rows[~fits], (buckets[~fits] + 1) & mask
        return slots

    def _grow(self, num_keys: int) -> None:
        old = np.flatnonzero(self._keys.reshape(-1) != _EMPTY)
        mixed, values = self._keys.reshape(-1)[old], self.values[old]
        self._allocate(-(-int(2 * num_keys / _MAX_LOAD) // (2 * BUCKET)) + 1, values.shape[1])
        self.values[self._place(mixed)] = values
