"""What a block is worth at its age: learned from when blocks of one tenant came back. Pure and sync.

A block is of a class, how often it was used (once, twice, three times, more), and of an age, how much its
tenant has stored since its last use. From the ages at which blocks of a class were used again, those that had
been evicted meanwhile included, follows the share F(a) that comes back by age a. Keeping a block of age a
for l more is expected to give F(a+l) - F(a) uses for the room of what survives meanwhile; its worth is the
best such ratio over all l:

    worth(a) = max over l of (F(a+l) - F(a)) / integral from a to a+l of (1 - F)

This is the Gittins index of a job that may be stopped at any time (Gittins, Glazebrook, Weber: Multi-armed
Bandit Allocation Indices, 2011); Least Hit Density (Beckmann, Chen, Cidon, NSDI 2018) ranks by a relative
of it. Where blocks come back late or never, as in chat logs, whose users type between two turns, it keeps
old blocks that have proved themselves.

Beside it stands what a block is worth surely: the best ratio that is left when each is taken for one standard
error less. Blocks come back together, those of one request at a time, so what varies is requests: the
variance of a count of uses is the sum of the squares of what each request added (clusters, each its own
weight). The longer the ages, the fewer requests speak of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NUM_CLASSES = 4
NUM_AGES = 100
"""Buckets of ages, four to an octave; the last begins above 2**26."""

REFIT_EVERY = 2_000
"""Uses between two looks at the statistics; fewer at the start."""
FIRST_REFIT = 64
KEPT_SHARE = 0.99
"""Of the statistics from one look to the next: half is forgotten after some 140,000 uses. It must take longer
than the ages that are measured: at half of that, ages in a large tier were judged by too few blocks."""

_PRIOR_REUSE = np.array([0.25, 0.45, 0.55, 0.65])
"""Shares of each class that are used again, as assumed at first: production logs are like that."""
_PRIOR_BLOCKS = 64
"""What that assumption weighs, in blocks seen."""
_PRIOR_AGES = slice(16, 80)
"""Ages it is spread over, evenly in the logarithm: from 60 on. Below, class alone decides."""

ERRORS = 1.0
"""Standard errors by which a worth is taken for less before it keeps a block against its age: of two
explanations within that of each other the simpler is kept (Breiman et al., CART, 1984), which is LRU."""

Floats = npt.NDArray[np.float64]


def age_bucket(age: int) -> int:
    """The bucket of an age."""
    shifted = age + 4
    octave = shifted.bit_length() - 3
    bucket = 4 * octave + (shifted >> octave & 3)
    return bucket if bucket < NUM_AGES else NUM_AGES - 1


def _first_age(bucket: int) -> int:
    return ((4 + bucket % 4) << bucket // 4) - 4


_EDGES: Floats = np.array([_first_age(bucket) for bucket in range(NUM_AGES + 1)], dtype=np.float64)


class Worth(NamedTuple):
    """Expected uses per unit of room and time, times cost; `surely`: with the error taken off."""

    value: float
    surely: float
    number: int  # of the class

    def surely_exceeds(self, other: Worth) -> bool:
        """Of one class both come from the same uses, right or wrong by the same share."""
        mine = self.value if self.number == other.number else self.surely
        return mine > other.value


class ReuseModel:
    """What one tenant's blocks are worth by class and age."""

    def __init__(self) -> None:
        self._worth: list[list[float]] = []
        self._surely: list[list[float]] = []
        self._hits: Floats = np.zeros((NUM_CLASSES, NUM_AGES))
        self._squares: Floats = np.zeros((NUM_CLASSES, NUM_AGES))
        self._seen: Floats = np.zeros(NUM_CLASSES)
        self._prior: Floats = np.zeros((NUM_CLASSES, NUM_AGES))
        width = _PRIOR_AGES.stop - _PRIOR_AGES.start
        self._prior[:, _PRIOR_AGES] = _PRIOR_REUSE[:, None] * _PRIOR_BLOCKS / width
        self._reused: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]] = []
        self._num_events = 0
        self._refit_after = FIRST_REFIT
        self._fit()

    def worth(self, number: int, age: int, cost: float = 1.0) -> Worth:
        """Of a block of class `number`, at an age in the tenant's ticks."""
        bucket = age_bucket(age)
        return Worth(
            self._worth[number][bucket] * cost, self._surely[number][bucket] * cost, number
        )

    def stored(self, count: int) -> None:
        """So many blocks came that had not been seen before."""
        self._seen[0] += count
        self._count(count)

    def reused(self, classes: npt.NDArray[np.uint8], ages: npt.NDArray[np.uint32]) -> None:
        """One request used blocks of these classes again, at these ages in the tenant's ticks."""
        self._reused.append((classes, ages))
        self._count(len(classes))

    def _count(self, count: int) -> None:
        self._num_events += count
        if self._num_events >= self._refit_after:
            self._refit_after = min(2 * self._refit_after, REFIT_EVERY)
            self._num_events = 0
            self._take_in()
            self._fit()
            if self._refit_after == REFIT_EVERY:
                self._hits *= KEPT_SHARE
                self._squares *= KEPT_SHARE * KEPT_SHARE
                self._seen *= KEPT_SHARE

    def _take_in(self) -> None:
        if not self._reused:
            return
        classes = np.concatenate([some for some, _ in self._reused]).astype(np.intp)
        ages = np.concatenate([some for _, some in self._reused]).astype(np.float64)
        of_request = np.repeat(
            np.arange(len(self._reused)), [len(some) for some, _ in self._reused]
        )
        self._reused.clear()
        buckets = np.searchsorted(_EDGES, ages, side="right") - 1
        places = classes * NUM_AGES + np.minimum(buckets, NUM_AGES - 1)
        counts = np.bincount(places, minlength=NUM_CLASSES * NUM_AGES)
        self._hits += counts.reshape(NUM_CLASSES, NUM_AGES)
        size = NUM_CLASSES * NUM_AGES
        groups, together = np.unique(of_request * size + places, return_counts=True)
        squares = np.bincount(
            groups % size, weights=together.astype(np.float64) ** 2, minlength=size
        )
        self._squares += squares.reshape(NUM_CLASSES, NUM_AGES)
        after = np.minimum(classes + 1, NUM_CLASSES - 1)
        self._seen += np.bincount(after, minlength=NUM_CLASSES)

    def _fit(self) -> None:
        share = (self._hits + self._prior) / (self._seen + _PRIOR_BLOCKS)[:, None]
        # Of a class that grows, more come back than were seen to enter it: then all but a few do.
        share *= np.minimum(1.0, 0.99 / share.sum(axis=1))[:, None]
        back = np.zeros((NUM_CLASSES, NUM_AGES + 1))
        np.cumsum(share, axis=1, out=back[:, 1:])
        alive = 1.0 - back
        room = np.zeros_like(back)
        np.cumsum((alive[:, 1:] + alive[:, :-1]) / 2 * np.diff(_EDGES), axis=1, out=room[:, 1:])
        uses = back[:, None, :] - back[:, :, None]
        rooms = room[:, None, :] - room[:, :, None]
        ratios = np.divide(uses, rooms, out=np.zeros_like(uses), where=rooms > 0)
        squares = np.zeros_like(back)
        np.cumsum(self._squares, axis=1, out=squares[:, 1:])
        spread = np.sqrt(np.maximum(squares[:, None, :] - squares[:, :, None], 0.0))
        spread /= (self._seen + _PRIOR_BLOCKS)[:, None, None]
        errors = np.divide(spread, rooms, out=np.zeros_like(uses), where=rooms > 0)
        self._worth = ratios.max(axis=2).tolist()
        self._surely = (ratios - ERRORS * errors).max(axis=2).tolist()
