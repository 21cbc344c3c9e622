"""Which blocks a pinned template keeps in the host tier, and for how long. Pure and sync.

A pin is an operator's word about a template version. Until it ends, the blocks of a prompt that lie in the
version's text are not evicted from the arena, whoever's they are, as far as their owner's pin budget goes
(`quota`). Chains are pinned from the front: a block is pinned only if its parent is, or if it has none. So
what stands before the text must be pinned too, or be part of the text's first block.

What a block should be follows from columns of the index: `texts` of the row, from the handles that name it,
and `lineage_pins`. What it is, is its flag PINNED, which keeps it out of the queues of `policy`. The two meet
where blocks arrive and are read (`extend`), and for all rows in `settle`, piece by piece, after the pins, the
budgets or a pinned block changed (`is_stale`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvfabric.registry.state import SERVING, TemplateVersion
from kvfabric.store.index import NO_ROW, PINNED, QUEUED, BlockIndex, Rows
from kvfabric.store.policy import EvictionPolicy
from kvfabric.store.quota import TierAccounts, distinct_values
from kvfabric.types import Incarnation

Flags = npt.NDArray[np.bool_]

_SLICE_ROWS = 4096
"""Rows of the index looked at in one piece."""
_PIECE = 256
"""Blocks pinned or unpinned in one."""
_ROWS_SHARE = 4
"""A fourth of the index at most is for pinned parts."""


class PinDeadlines:
    """When pins end, on a clock that does not jump.

    The registry has an end in Unix seconds and a length. Whoever hears of a pin keeps it until that end as
    his wall clock has it then, and no longer than its length; what the wall clock does afterwards is nothing.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[Incarnation, float], float] = {}

    def hear(self, templates: Iterable[TemplateVersion], *, now: float, wall: float) -> None:
        """What the registry says from now on. `now`: CLOCK_MONOTONIC, `wall`: Unix seconds."""
        ends = {}
        for one in templates:
            if one.state == SERVING and one.pinned_until:
                pin = (one.incarnation, one.pinned_until)
                left = max(0.0, min(one.pin_s, one.pinned_until - wall))
                ends[pin] = self._ends.get(pin, now + left)
        self._ends = ends

    def live(self, now: float) -> frozenset[bytes]:
        """Incarnations that are pinned: also by what was heard last, where nothing is heard any more."""
        return frozenset(one for (one, _), end in self._ends.items() if now < end)


class Pins:
    """`refused` counts, by tenant slot, blocks that found no budget at each use; `is_held` tells which rows
    are under somebody's right, past or present (`lease` says so)."""

    def __init__(self, index: BlockIndex, host: TierAccounts, policy: EvictionPolicy) -> None:
        self.refused: Counter[int] = Counter()
        self.is_held: Callable[[Rows], Flags] = lambda rows: np.zeros(len(rows), dtype=np.bool_)
        self._index = index
        self._host = host
        self._policy = policy
        self._num_parts = 0
        self._changes = 0
        self._settled = 0

    @property
    def is_stale(self) -> bool:
        """Whether there may be blocks that are pinned and should not be, or the other way round."""
        return self._changes != self._settled

    def configure(self, incarnations: frozenset[bytes]) -> None:
        """What is pinned from now on."""
        if self._index.set_pinned(incarnations):
            self._changes += 1

    def budgets_changed(self) -> None:
        if self._index.pinned or self._num_parts:
            self._changes += 1

    # -- blocks that arrive, are read, leave ---------------------------------------------------------

    def read(self, rows: Rows, texts: npt.NDArray[np.uint8]) -> None:
        """A handle says of a prompt's leading blocks in which texts they lie."""
        index = self._index
        own = index.block_index.array[rows] == np.arange(len(rows))
        index.texts.array[rows[own]] |= texts[own]
        self.extend(rows[own])

    def extend(self, rows: Rows) -> None:
        """Pin those of these (distinct) blocks that are to be, chains from the front."""
        index = self._index
        if not index.pinned:
            return
        rows = rows[self._wanted(rows)]
        rows = rows[index.flags.array[rows] & PINNED == 0]
        if not len(rows):
            return
        joined = index.parent.array[rows[1:]] == rows[:-1]
        starts = np.flatnonzero(np.append(True, ~joined)).tolist()
        for start, end in pairwise([*starts, len(rows)]):
            self._extend_chain(rows[start:end])

    def _extend_chain(self, chain: Rows) -> None:
        index = self._index
        count = 0
        if self._has_pinned_parent(chain[:1])[0]:
            fits = self._fits(chain)
            count = len(chain) if fits.all() else int(fits.argmin())
            self._pin(chain[:count])
            # Children that came before their parents wait for it.
            others = int(index.host_children.array[chain[:count]].sum()) - max(0, count - 1)
            self._changes += others > 0
        elif not self._wanted(index.parent.array[chain[:1]])[0]:
            return  # its place is behind something that is no template's, or not here
        self._refuse(chain[count:])

    def dropped(self, row: int) -> None:
        """A block is taken out, pinned or not."""
        if self._index.flags.cell[row] & PINNED:
            self._unpin(np.array([row], dtype=np.uint32))
            self._changes += 1

    def held(self, rows: Rows) -> None:
        """These blocks came under somebody's right and were under none."""
        self._count_idle(rows, -1)

    def let_go(self, rows: Rows) -> None:
        """The last right to these blocks, past or present, is gone."""
        self._count_idle(rows, +1)

    def _count_idle(self, rows: Rows, sign: int) -> None:
        if not self._num_parts:
            return
        index = self._index
        rows = rows[index.flags.array[rows] & PINNED != 0]
        self._host.add("pinned_idle", index.tenants_of(rows), sign * index.block_bytes_of(rows))

    # -- all of them ---------------------------------------------------------------------------------

    def settle(self) -> Iterator[None]:
        """Make every block what it should be; others may run where it yields. Given up half way, it is still
        to be done."""
        mark = self._changes
        found: dict[int, list[Rows]] = {}
        yield from self._collect(found)
        num_refused = sum(self.refused.values())
        num_freed = 0
        levels: list[Rows] = []
        for level in sorted(found):
            # Not left to the end: to free all these vectors at once takes milliseconds.
            levels.append(np.concatenate(found.pop(level)))
            for rows in _pieces(levels[-1]):
                num_freed += self._settle(rows)
                yield
        num_refused = sum(self.refused.values()) - num_refused
        for slot in range(len(self._host.accounts)):
            if self._host.over_pin_budget(slot) > 0:
                yield from self._trim(slot, levels)
                num_freed += 1
        self._settled = mark
        # What gave up its room late could not be had by those that came before it.
        self._changes += bool(num_freed and num_refused)

    def _collect(self, found: dict[int, list[Rows]]) -> Iterator[None]:
        """Blocks that are or should be pinned, by their place in the prompt."""
        index = self._index
        for start in range(1, index.highest_row + 1, _SLICE_ROWS):
            end = min(start + _SLICE_ROWS, index.highest_row + 1)
            rows = np.arange(start, end, dtype=np.uint32)
            rows = rows[self._wanted(rows) | (index.flags.array[rows] & PINNED != 0)]
            places = index.block_index.array[rows]
            order = np.argsort(places, kind="stable")
            rows, places = rows[order], places[order]
            starts = np.flatnonzero(np.append(True, places[1:] != places[:-1])).tolist()
            for first, following in pairwise([*starts, len(rows)]):
                if first < following:
                    found.setdefault(int(places[first]), []).append(rows[first:following])
            yield

    def _settle(self, rows: Rows) -> int:
        """Blocks of one level; those of the level before are settled. How many were unpinned."""
        index = self._index
        wanted = self._wanted(rows)
        should = wanted & self._has_pinned_parent(rows)
        is_pinned = index.flags.array[rows] & PINNED != 0
        self._unpin(rows[is_pinned & ~should])
        new = rows[should & ~is_pinned]
        fits = self._fits(new)
        self._pin(new[fits])
        self._refuse(new[~fits])
        # Below one that found no budget; below what is no template's nobody expects a pin.
        behind = wanted & ~should & self._wanted(index.parent.array[rows])
        self._refuse(rows[behind])
        return int(np.count_nonzero(is_pinned & ~should))

    def _trim(self, slot: int, levels: list[Rows]) -> Iterator[None]:
        """Unpin a tenant's blocks until they fit its budget, the last of the prompts first."""
        index = self._index
        for level in reversed(levels):
            for piece in _pieces(level):
                over = self._host.over_pin_budget(slot)
                if over <= 0:
                    return
                rows = piece[index.flags.array[piece] & PINNED != 0]
                rows = rows[index.tenants_of(rows) == slot]
                before = np.cumsum(index.block_bytes_of(rows)) - index.block_bytes_of(rows)
                self._unpin(rows[before < over])
                yield

    # -- what a block should be, and is --------------------------------------------------------------

    def _wanted(self, rows: Rows) -> Flags:
        """Whether each lies in the text of a pinned version and is whole in the arena."""
        index = self._index
        lineages = index.lineage.array[rows]
        wanted: Flags = (index.texts.array[rows] & index.lineage_pins.array[lineages]) != 0
        wanted &= index.host_parts.array[rows] == index.lineage_parts.array[lineages]
        return wanted

    def _has_pinned_parent(self, rows: Rows) -> Flags:
        """None counts as one: it is the prompt's first block."""
        index = self._index
        parents = index.parent.array[rows]
        has: Flags = (index.flags.array[parents] & PINNED != 0) | (
            (parents == NO_ROW) & (index.block_index.array[rows] == 0)
        )
        return has

    def _fits(self, rows: Rows) -> Flags:
        """For which of them, in this order, there is room in their owners' budgets and in the index."""
        index = self._index
        fits: Flags = np.zeros(len(rows), dtype=np.bool_)
        owners, sizes = index.tenants_of(rows), index.block_bytes_of(rows)
        for slot in distinct_values(owners):
            own = owners == slot
            fits[own] = np.cumsum(sizes[own]) <= self._host.room_to_pin(slot)
        parts = index.lineage_parts.array[index.lineage.array[rows]].astype(np.int64)
        fits &= self._num_parts + np.cumsum(parts) <= index.max_blocks // _ROWS_SHARE
        return fits

    def _pin(self, rows: Rows) -> None:
        if not len(rows):
            return
        flags = self._index.flags.array
        self._policy.withdraw(rows[flags[rows] & QUEUED != 0].tolist())
        flags[rows] |= PINNED
        self._count(rows, +1)

    def _unpin(self, rows: Rows) -> None:
        if not len(rows):
            return
        self._count(rows, -1)
        self._index.flags.array[rows] &= 0xFF & ~PINNED
        self._policy.offer(rows)

    def _count(self, rows: Rows, sign: int) -> None:
        index = self._index
        owners, sizes = index.tenants_of(rows), sign * index.block_bytes_of(rows)
        idle = ~self.is_held(rows)
        self._host.add("pinned", owners, sizes)
        self._host.add("pinned_idle", owners[idle], sizes[idle])
        parts = index.lineage_parts.array[index.lineage.array[rows]]
        self._num_parts += sign * int(parts.sum(dtype=np.int64))

    def _refuse(self, rows: Rows) -> None:
        self.refused.update(self._index.tenants_of(rows).tolist())

    # -- proof ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """AssertionError if a counter or a flag is not what it claims to be. For tests."""
        index = self._index
        rows = np.arange(1, index.highest_row + 1, dtype=np.uint32)
        rows = rows[index.flags.array[rows] & PINNED != 0]
        for slot, account in enumerate(self._host.accounts):
            own = rows[index.tenants_of(rows) == slot]
            sizes = index.block_bytes_of(own)
            assert account.pinned == int(sizes.sum()), "pinned bytes"
            assert account.pinned_idle == int(sizes[~self.is_held(own)].sum()), "idle pinned bytes"
            assert account.pinned <= account.used
        parts = index.lineage_parts.array[index.lineage.array[rows]]
        assert self._num_parts == int(parts.sum(dtype=np.int64))
        if not self.is_stale:
            assert self._wanted(rows).all(), "pinned, and no template says so"
            assert self._has_pinned_parent(rows).all(), "pinned without its parent"
            over = [self._host.over_pin_budget(slot) for slot in range(len(self._host.accounts))]
            assert max(over, default=0) <= 0, "pinned beyond a budget"


def _pieces(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows), _PIECE):
        yield rows[start : start + _PIECE]
