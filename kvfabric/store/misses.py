"""Why blocks missed: each counted under one reason. Pure and sync."""

from __future__ import annotations

from collections import Counter, OrderedDict

from kvfabric.types import MissReason

REMEMBERED = 16_384
"""Refused stores whose reason is known when somebody looks for the block."""


class Misses:
    """`counts`: blocks by reason, since start."""

    def __init__(self) -> None:
        self.counts: Counter[MissReason] = Counter()
        self._refused: OrderedDict[int, MissReason] = OrderedDict()

    def refused(self, key_word: int, reason: MissReason) -> None:
        """The block whose key starts with this word was not stored, and so none after it."""
        self._refused[key_word] = reason
        self._refused.move_to_end(key_word)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def why_absent(self, key_word: int) -> MissReason:
        """Of a block that left no other trace. May be wrong: a word is not a whole key."""
        return self._refused.get(key_word, MissReason.ABSENT)
