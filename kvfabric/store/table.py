"""The hash table under the index: key -> row by open addressing, whole vectors at a time. Pure and sync.

Linear probing without tombstones: what follows a deleted entry up to the next empty place is put in
again, so the table never needs rebuilding and no lookup gets longer with age.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]

_SAME = 0x01010101
"""Four words that are equal, as the four booleans of their comparison."""


class RowTable:
    """`keys`: four words of each row, filled by the caller before `insert`; row 0 is no row.

    At most `max_rows` are in it at once; its places are 3.2 to 6.4 times as many: at half that, a lookup
    of 256 keys takes 15 rounds of probing instead of 5.
    """

    def __init__(self, keys: npt.NDArray[Any], max_rows: int) -> None:
        bits = max(4, (max_rows * 16 // 5).bit_length())
        self.places: Rows = np.zeros(1 << bits, dtype=np.uint32)
        self._keys = keys
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        # Keys are digests, but engines send them: a secret multiplier keeps probe sequences unguessable.
        self._multiplier = np.uint64(secrets.randbits(64) | 1)

    def lookup(self, wanted: Words) -> Rows:
        """Rows of a (n, 4) key vector; 0 where there is none."""
        places, position = self.places, self._homes(wanted[:, 0])
        rows = places.take(position)
        pending = np.flatnonzero((rows != 0) & self._differ(rows, wanted))
        while pending.size:
            position[pending] = (position[pending] + 1) & self._mask
            candidates = places.take(position[pending])
            rows[pending] = candidates
            differ = self._differ(candidates, wanted[pending])
            pending = pending[(candidates != 0) & differ]
        return rows

    def insert(self, rows: Rows) -> None:
        """Rows whose keys are distinct and not there."""
        places, pending = self.places, rows
        position = self._homes(self._keys[rows, 0])
        while pending.size:
            empty = places.take(position) == 0
            places[position[empty]] = pending[empty]  # of several at one place the last wins
            left = places.take(position) != pending
            pending = pending[left]
            position = (position[left] + 1) & self._mask

    def delete(self, rows: Rows) -> None:
        """Rows that are there; their keys must still be in place."""
        places, holes = self.places, self._places_of(rows)
        places[holes] = 0
        # Only an entry behind a hole may have been pushed there by what is gone.
        moved: list[_Places] = []
        position = (holes + 1) & self._mask
        while (position := position[places.take(position) != 0]).size:
            moved.append(position)
            position = (position + 1) & self._mask
        if moved:
            behind = np.unique(np.concatenate(moved))
            again = places.take(behind)
            places[behind] = 0
            self.insert(again)

    def _places_of(self, rows: Rows) -> _Places:
        position = self._homes(self._keys[rows, 0])
        pending = np.flatnonzero(self.places.take(position) != rows)
        while pending.size:
            position[pending] = (position[pending] + 1) & self._mask
            pending = pending[self.places.take(position[pending]) != rows[pending]]
        return position

    def _homes(self, first_words: Words) -> _Places:
        """Where the probe sequence of each key starts."""
        return ((first_words * self._multiplier) >> self._shift).view(np.int64)

    def _differ(self, rows: Rows, wanted: Words) -> npt.NDArray[np.bool_]:
        equal = self._keys.take(rows, axis=0) == wanted
        differ: npt.NDArray[np.bool_] = equal.view(np.uint32).reshape(-1) != _SAME
        return differ
