"""The index: BlockKey -> row of numpy arrays, and the parts of each block. Pure and sync.

Owns the rows, their tree of parents and the interned lineages. Does not decide anything: transitions
are `residency`'s, eviction `policy`'s, rights `lease`'s.

    ABSENT --reserve--> RESERVED --commit--> READY --evict--> EVICTING --> ABSENT
                           |                   ^ |                |
                           | abort, TTL        +-+ lease/release  | still leased
                           v                                      v
                        DRAINING  <-------------------------------+     --proof of quiet--> ABSENT

States live at the part, as bits, because each tier and each writer has its own: RESERVED (a reservation
owns its first store), LOADING (on its way from SSD into a slot), HOST (READY in the arena), SSD (sealed in
a segment). ABSENT is no bit. A block is READY in the host tier when `host_parts` equals the number of
parts its layout declares, and READY at all when `available_parts` does. EVICTING takes no time on the
event loop. DRAINING slots are no part of a row's state: the row is free to be stored anew while
`residency` keeps the old slots until the last hold on the row ends.

A row exists while anything needs it: bytes in a tier, a hold, or a child row. So a parent row is always
valid. A row made only because a child names it as parent is a stub: lineage 0, no parts.

Memory: no Python object a block. Arrays are allocated for `max_blocks` at once and are zero pages until
used, so nothing is ever grown or rehashed. Row 0 means "none" everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvfabric.errors import LocalProtocolError, RemoteProtocolError
from kvfabric.store.cost import NEUTRAL, CostLevels, cost_levels
from kvfabric.store.table import Rows as Rows
from kvfabric.store.table import RowTable
from kvfabric.tiers.arena import populate, slot_bytes
from kvfabric.tiers.base import Lineage as Lineage
from kvfabric.types import KEY_BYTES, UNKNOWN_COST, BlockKey, BlockLayout, PartSpec, RecomputeCost

Array = npt.NDArray[Any]

NO_ROW = 0

# Bits of a part's state.
RESERVED, LOADING, HOST, SSD = 1, 2, 4, 8

# Bits of a block's flags.
QUEUED = 1  # in an eviction queue
HIT = 4  # used a second time, and not yet tried on SSD for it
SPILLING = 8  # queued for or on its way to SSD
LIVE = 16  # the row is in use
USED = 32  # matched at least once since it was last written to SSD
PINNED = 64  # not to be evicted from the arena, see `pins`

MAX_PARTS = 254
"""Of one block; a count of 255 is never reached and marks a layout nobody has declared yet."""


MAX_TEXTS = 8
"""Templates of a prompt, the first ones, of which it is known whose text a block lies in."""


class Column(NamedTuple):
    """One field of all rows: `array` for vectors, `cell` for single values (faster, Python ints)."""

    array: Array
    cell: memoryview[int]


class StoredLayout:
    """Parts of the blocks of one layout, in the order the index keeps them.

    Records of an SSD tier may come before any engine has declared the layout; until then its parts are
    those seen, and no block of it is READY.
    """

    __slots__ = ("_ordinals", "declared", "fingerprint", "levels", "specs")

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.specs: list[PartSpec] = []
        self.declared = False
        self.levels = NEUTRAL
        self._ordinals: dict[tuple[int, int], int] = {}

    @property
    def num_parts(self) -> int:
        return len(self.specs)

    @property
    def block_slot_bytes(self) -> int:
        """What a whole block is charged in the host tier."""
        return sum(slot_bytes(spec.num_bytes) for spec in self.specs)

    def ordinal(self, group: int, shard: int) -> int | None:
        return self._ordinals.get((group, shard))

    def add(self, spec: PartSpec) -> int:
        """The ordinal of `spec`, new or known."""
        ordinal = self._ordinals.setdefault((spec.group, spec.shard), len(self.specs))
        if ordinal == len(self.specs):
            self.specs.append(spec)
        return ordinal


def packed_keys(keys: bytes) -> npt.NDArray[np.uint64]:
    """A packed key vector as (n, 4) words. Raises RemoteProtocolError if it is no such vector."""
    if len(keys) % KEY_BYTES:
        raise RemoteProtocolError(f"a key vector of {len(keys)} bytes")
    return np.frombuffer(keys, dtype=np.uint64).reshape(-1, 4)


class BlockIndex:
    """Rows for at most `max_blocks` blocks of one part each; a part more counts like a block more."""

    def __init__(self, max_blocks: int) -> None:
        if not 0 < max_blocks < 1 << 31:
            raise LocalProtocolError(f"max_blocks must be in (0, 2**31), not {max_blocks}")
        self.max_blocks = max_blocks
        self._arrays: list[Array] = []
        self.keys = self._words(max_blocks + 1)
        self.parent = self.column(np.uint32)
        self.lineage = self.column(np.uint32)
        self.block_index = self.column(np.uint32)
        self.first_part = self.column(np.uint32)
        self.child_rows = self.column(np.uint32)
        self.host_children = self.column(np.uint32)
        self.holds = self.column(np.uint32)
        self.stored_at = self.column(np.uint32)
        self.host_parts = self.column(np.uint8)
        self.ssd_parts = self.column(np.uint8)
        self.available_parts = self.column(np.uint8)
        self.freq = self.column(np.uint8)
        self.flags = self.column(np.uint8)
        # In which templates' texts a block lies: bit i for incarnation i of its lineage.
        self.texts = self.column(np.uint8)

        self.part_next = self.column(np.uint32)
        self.part_state = self.column(np.uint8)
        self.part_page = self.column(np.uint32)
        self.part_generation = self.column(np.uint32)
        self.part_checksum = self._digests(max_blocks + 1)
        self.part_ssd_file = self.column(np.uint32)
        self.part_ssd_page = self.column(np.uint32)

        self._rows = _FreeList(self._flat(np.uint32, max_blocks), max_blocks)
        self._parts = _FreeList(self._flat(np.uint32, max_blocks), max_blocks)
        self._table = RowTable(self.keys.array, max_blocks)
        self._arrays.append(self._table.places)

        self._make_lineages()

    def _make_lineages(self) -> None:
        self.lineages: list[Lineage | None] = [None]
        self.lineage_tenant = _column(np.uint32, 64)
        self.lineage_bytes = _column(np.int64, 64)
        self.lineage_parts = _column(np.uint8, 64)
        self.lineage_levels: list[CostLevels] = [NEUTRAL]
        # Which of its incarnations are pinned, as bits like those of `texts`.
        self.lineage_pins = _column(np.uint8, 64)
        self.pinned: frozenset[bytes] = frozenset()
        # READY bytes as charged, kept with every change: what a withdrawal takes is read, not counted.
        self.host_bytes = np.zeros(64, dtype=np.int64)
        self.ssd_bytes = np.zeros(64, dtype=np.int64)
        self._named: dict[bytes, set[int]] = {}
        self._lineage_rows = np.zeros(64, dtype=np.int64)
        self._lineage_ids: dict[Lineage, int] = {}
        self._free_lineages: list[int] = []
        self.layouts: dict[bytes, StoredLayout] = {}

    # -- memory --------------------------------------------------------------------------------------

    def column(self, dtype: type[np.unsignedinteger[Any]]) -> Column:
        """A further zeroed field of every row, counted into the size of the index."""
        array = self._flat(dtype, self.max_blocks + 1)
        return Column(array, array.data)

    def _flat(self, dtype: type[np.unsignedinteger[Any]], length: int) -> Array:
        array: Array = np.zeros(length, dtype=dtype)
        self._arrays.append(array)
        return array

    def _words(self, length: int) -> Column:
        array: Array = np.zeros((length, 4), dtype=np.uint64)
        self._arrays.append(array)
        return Column(array, array.reshape(-1).data)

    def _digests(self, length: int) -> npt.NDArray[np.void]:
        array = np.zeros(length, dtype="V16")
        self._arrays.append(array)
        return array

    def touch(self) -> None:
        """Have the kernel provide the memory of all rows now, contents kept; blocks, from any thread.

        A first touch on the event loop may have to wait for a huge page, which takes milliseconds.
        """
        for array in self._arrays:
            populate(array)

    @property
    def bytes_per_block(self) -> float:
        """All arrays, table and queues included, per block of one part."""
        return sum(array.nbytes for array in self._arrays) / self.max_blocks

    @property
    def free_rows(self) -> int:
        return self._rows.num_free

    @property
    def free_parts(self) -> int:
        return self._parts.num_free

    @property
    def highest_row(self) -> int:
        """No row above this was ever used."""
        return self._rows.highest

    # -- keys ----------------------------------------------------------------------------------------

    def lookup(self, wanted: npt.NDArray[np.uint64]) -> Rows:
        """Rows of a (n, 4) key vector; NO_ROW where there is none."""
        return self._table.lookup(wanted)

    def insert(self, new: npt.NDArray[np.uint64]) -> Rows:
        """Stub rows for keys that are distinct and not there; the caller checked `free_rows`."""
        rows = self._rows.take(len(new))
        self.keys.array[rows] = new
        self.flags.array[rows] = LIVE
        self._table.insert(rows)
        return rows

    def adopt(self, rows: Rows, parents: Rows, lineages: Rows, indexes: Rows) -> None:
        """Make stubs into blocks: their place in the tree and their lineage become known."""
        self.parent.array[rows] = parents
        self.lineage.array[rows] = lineages
        self.block_index.array[rows] = indexes
        np.add.at(self.child_rows.array, parents, np.uint32(1))  # 1 would be cast each time
        np.add.at(self._lineage_rows, lineages, 1)

    def key(self, row: int) -> BlockKey:
        return BlockKey(self.keys.array[row].tobytes())

    def prefixes(self, rows: Rows) -> bytes:
        """The first 8 bytes of each key, packed, as events carry them."""
        packed: bytes = self.keys.array[rows, 0].tobytes()
        return packed

    def drop_empty(self, rows: Iterable[int]) -> None:
        """Forget those of `rows` that nothing needs, then their parents, and so on up."""
        available, holds = self.available_parts.cell, self.holds.cell
        children, flags = self.child_rows.cell, self.flags.cell
        lineages, parents = self.lineage.cell, self.parent.cell
        gone: list[int] = []
        for start in rows:
            row = start
            while flags[row] and not (available[row] or holds[row] or children[row]):
                flags[row] = 0
                gone.append(row)
                if not lineages[row]:
                    break  # a stub has no parent
                row = parents[row]
                children[row] -= 1
        if gone:
            self._forget(gone)

    def _forget(self, gone: list[int]) -> None:
        rows = np.array(gone, dtype=np.uint32)
        self._table.delete(rows)
        parts = self.first_part.array[rows]
        while (parts := parts[parts != 0]).size:
            following = self.part_next.array[parts]
            self.part_next.array[parts] = 0
            self.part_state.array[parts] = 0
            self._parts.give(parts)
            parts = following
        lineages = self.lineage.array[rows]
        np.subtract.at(self._lineage_rows, lineages, 1)
        for column in (self.parent, self.lineage, self.block_index, self.first_part):
            column.array[rows] = 0
        self.freq.array[rows] = 0
        self.texts.array[rows] = 0
        self.keys.array[rows] = 0
        self._rows.give(rows)
        for lineage in set(lineages.tolist()):
            self._free_lineage_if_unused(lineage)

    # -- parts ---------------------------------------------------------------------------------------

    def ensure_parts(self, rows: Rows, num_parts: int) -> int:
        """Give every row its `num_parts` part rows; returns how many had to be made."""
        made = 0
        owner, previous = self.first_part.array, rows
        for _ in range(num_parts):
            lacking = previous[owner[previous] == 0]
            fresh = self._parts.take(len(lacking))
            owner[lacking] = fresh
            made += len(fresh)
            previous = owner[previous]
            owner = self.part_next.array
        return made

    def parts(self, rows: Rows, ordinal: int) -> Rows:
        """Part rows of ordinal `ordinal`; 0 where the block has none."""
        found: Rows = self.first_part.array[rows]
        for _ in range(ordinal):
            found = self.part_next.array[found]
        return found

    def parts_of(self, row: int) -> list[int]:
        """All part rows of one block, by ordinal."""
        found = []
        part = self.first_part.cell[row]
        while part:
            found.append(part)
            part = self.part_next.cell[part]
        return found

    # -- lineages and layouts ------------------------------------------------------------------------

    def declare(
        self, fingerprint: bytes, layout: BlockLayout, cost: RecomputeCost = UNKNOWN_COST
    ) -> StoredLayout:
        """The layout that an engine's `hello` declares; the last to say what recomputing costs is right,
        for what is queued from then on."""
        stored = self.layouts.setdefault(fingerprint, StoredLayout(fingerprint))
        levels = stored.levels
        if cost != UNKNOWN_COST:
            levels = cost_levels(cost, layout.block_tokens, layout.block_bytes)
        if not stored.declared or levels != stored.levels:
            for spec in layout.parts:
                stored.add(spec)
            stored.levels = levels
            stored.declared = True
            for lineage, number in self._lineage_ids.items():
                if lineage.layout_fingerprint == fingerprint:
                    self._describe(number, stored)
        return stored

    def find_lineage(self, lineage: Lineage) -> int:
        """Its id; 0 if nothing is stored under it."""
        return self._lineage_ids.get(lineage, 0)

    def intern_lineage(self, lineage: Lineage, tenant_slot: int) -> int:
        """Its id, until no row has it; `adopt` rows with it before anything else is interned."""
        number = self._lineage_ids.get(lineage)
        if number is not None:
            return number
        number = self._free_lineages.pop() if self._free_lineages else len(self.lineages)
        if number == len(self.lineages):
            self.lineages.append(None)
            self.lineage_levels.append(NEUTRAL)
            if number == len(self._lineage_rows):
                self._grow_lineages()
        self.lineages[number] = lineage
        self._lineage_ids[lineage] = number
        for name in lineage.names:
            self._named.setdefault(name, set()).add(number)
        self.lineage_tenant.cell[number] = tenant_slot
        self.lineage_pins.cell[number] = self._pin_bits(lineage)
        stored = self.layouts.setdefault(
            lineage.layout_fingerprint, StoredLayout(lineage.layout_fingerprint)
        )
        self._describe(number, stored)
        return number

    def named(self, names: Collection[bytes]) -> set[int]:
        """Lineages that have one of these names."""
        empty: set[int] = set()
        return empty.union(*(self._named.get(name, empty) for name in names))

    def set_pinned(self, incarnations: frozenset[bytes]) -> bool:
        """Templates that are pinned from now on; whether that changes anything for a lineage there is."""
        changed = self.named(incarnations ^ self.pinned)
        self.pinned = incarnations
        for number in changed:
            self.lineage_pins.cell[number] = self._pin_bits(self.lineage_of(number))
        return bool(changed)

    def _pin_bits(self, lineage: Lineage) -> int:
        if not self.pinned:
            return 0
        known = enumerate(lineage.incarnations[:MAX_TEXTS])
        return sum(1 << place for place, one in known if one in self.pinned)

    def known_lineages(self) -> Iterable[Lineage]:
        """Those that rows have."""
        return self._lineage_ids.keys()

    def numbered_lineages(self) -> Iterable[tuple[Lineage, int]]:
        """Those that rows have, with their ids."""
        return self._lineage_ids.items()

    def lineage_of(self, number: int) -> Lineage:
        lineage = self.lineages[number]
        assert lineage is not None, "a stub has no lineage"
        return lineage

    def lineage_at(self, row: int) -> Lineage:
        return self.lineage_of(self.lineage.cell[row])

    def layout_at(self, row: int) -> StoredLayout:
        return self.layouts[self.lineage_at(row).layout_fingerprint]

    def tenants_of(self, rows: Rows) -> npt.NDArray[np.uint32]:
        """Tenant slots (as interned with their lineages) of the owners of `rows`."""
        slots: npt.NDArray[np.uint32] = self.lineage_tenant.array[self.lineage.array[rows]]
        return slots

    def block_bytes_of(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Host bytes of each whole block, as charged."""
        sizes: npt.NDArray[np.int64] = self.lineage_bytes.array[self.lineage.array[rows]]
        return sizes

    def _describe(self, number: int, stored: StoredLayout) -> None:
        self.lineage_bytes.cell[number] = stored.block_slot_bytes
        self.lineage_levels[number] = stored.levels
        self.lineage_parts.cell[number] = stored.num_parts if stored.declared else MAX_PARTS + 1

    def _grow_lineages(self) -> None:
        # A few hundred bytes each and one per (tenant, template set): growing is no stall.
        size = 2 * len(self._lineage_rows)
        self.lineage_tenant = _longer(self.lineage_tenant, size)
        self.lineage_bytes = _longer(self.lineage_bytes, size)
        self.lineage_parts = _longer(self.lineage_parts, size)
        self.lineage_pins = _longer(self.lineage_pins, size)
        more = np.zeros(size // 2, dtype=np.int64)
        self._lineage_rows = np.append(self._lineage_rows, more)
        self.host_bytes = np.append(self.host_bytes, more)
        self.ssd_bytes = np.append(self.ssd_bytes, more)

    def _free_lineage_if_unused(self, number: int) -> None:
        if number and self._lineage_rows[number] == 0:
            lineage = self.lineages[number]
            assert lineage is not None
            del self._lineage_ids[lineage]
            for name in lineage.names:
                self._named[name].discard(number)
                if not self._named[name]:
                    del self._named[name]
            self.lineages[number] = None
            self._free_lineages.append(number)

    def __repr__(self) -> str:
        return f"<BlockIndex {self.max_blocks - self.free_rows} of {self.max_blocks} rows>"


def _column(dtype: type[np.integer[Any]], length: int) -> Column:
    array: Array = np.zeros(length, dtype=dtype)
    return Column(array, array.data)


def _longer(column: Column, length: int) -> Column:
    longer = _column(column.array.dtype.type, length)
    longer.array[: len(column.array)] = column.array
    return longer


class _FreeList:
    """Numbers 1..size: a stack of those given back over a frontier of those never taken."""

    __slots__ = ("_size", "_stack", "_top", "highest")

    def __init__(self, stack: Array, size: int) -> None:
        self._stack = stack
        self._top = 0
        self._size = size
        self.highest = 0

    @property
    def num_free(self) -> int:
        return self._size - self.highest + self._top

    def take(self, count: int) -> Rows:
        assert count <= self.num_free, f"{count} rows asked of {self.num_free}"
        reused = min(count, self._top)
        self._top -= reused
        recycled = self._stack[self._top : self._top + reused][::-1]
        fresh = np.arange(self.highest + 1, self.highest + 1 + count - reused, dtype=np.uint32)
        self.highest += count - reused
        rows: Rows = np.concatenate([recycled, fresh])
        return rows

    def give(self, numbers: Rows) -> None:
        self._stack[self._top : self._top + len(numbers)] = numbers
        self._top += len(numbers)
