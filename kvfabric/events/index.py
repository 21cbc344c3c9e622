"""`FleetIndex`: who holds which block, from the event batches of many nodes. Pure; one owner thread.

Exact per namespace and holder: a block is there because its holder said `stored` and has not said
`removed`, `cleared` or gone since. It answers block by block, so it is right when a holder has gaps (the
head of a prompt evicted, the rest still there). Everything in it is a hint: keys are 8-byte prefixes and
news is late. Nothing may depend on it for correctness.

A block is one row of the `KeyTable` under (namespace tag XOR key prefix): up to four holder numbers (u16)
in place. A block with more holders (a shared prefix) has its first number at `_WIDE` and the number of a
row of a bit matrix in the last two.

`NodeFeed` puts one node's watch stream and its snapshots together in the right order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvfabric.errors import NoSpace, RemoteProtocolError
from kvfabric.events.table import Keys, KeyTable, Slots
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.types import BlockKey, TierName

PREFIX_BYTES = 8
MAX_BLOCKS = 1 << 24
"""0.7 GB at most: 128 nodes of 128 thousand blocks each."""
_INLINE = 4
_WIDE = 0xFFFF
_NARROW_AGAIN = 2  # holders at which a wide block fits in place again, with room to spare
_MAX_HOLDERS = 0xFFFE
_TIERS = {pb.HBM: TierName.HBM, pb.HOST: TierName.HOST, pb.SSD: TierName.SSD}

Present = npt.NDArray[np.bool_]


class Holder(NamedTuple):
    """One tier of one node; `engine` is the session whose HBM it is, empty for the node's own tiers."""

    node_id: str
    tier: TierName
    engine: bytes = b""


@dataclass(frozen=True, slots=True)
class FleetIndexStatistics:
    """`num_left_out`: blocks told of that did not fit, so far."""

    num_blocks: int
    num_holders: int
    num_bytes: int
    num_left_out: int = 0


class FleetIndex:
    """See the module. `capacity` blocks fit before the table grows, which stalls for 0.4 s a million.

    It never holds more than `max_blocks`, at most 44 bytes each: what is told of beyond is left out and
    counted. A block left out looks like one that nobody holds.
    """

    def __init__(self, *, capacity: int = 1 << 20, max_blocks: int = MAX_BLOCKS) -> None:
        self._table = KeyTable(min(capacity, max_blocks), width=_INLINE)
        self._max_blocks = max_blocks
        self._num_left_out = 0
        self._wide = np.zeros((64, 1), np.uint64)
        self._wide_free = list(range(64))
        self._numbers: dict[Holder, int] = {}
        self._holders: dict[int, Holder] = {}
        self._number_free: list[int] = []

    def __repr__(self) -> str:
        return f"<FleetIndex {self._table.num_keys} blocks, {len(self._numbers)} holders>"

    def statistics(self) -> FleetIndexStatistics:
        return FleetIndexStatistics(
            num_blocks=self._table.num_keys,
            num_holders=len(self._numbers),
            num_bytes=self._table.num_bytes + self._wide.nbytes,
            num_left_out=self._num_left_out,
        )

    # ------------------------------------------------------------------ what happened

    def apply(self, node_id: str, batch: pb.EventBatch) -> None:
        """Take a node's batch in: engines that left, then what its runs come to.

        The order of batches is the caller's business (`NodeFeed`). Raises RemoteProtocolError for a run
        that no node may send; then none of the batch's runs is in.
        """
        for engine in batch.engines:
            if engine.gone:
                self.drop_engine(node_id, engine.session)
        for kind, holder, keys in _last_words(node_id, batch.runs):
            if kind == pb.STORED:
                self._store(holder, keys)
            elif kind == pb.REMOVED:
                self._remove(holder, keys)
            else:
                self._drop([holder])

    def drop_node(self, node_id: str) -> None:
        """The node is gone, or what it holds must be learned anew."""
        self._drop([holder for holder in self._numbers if holder.node_id == node_id])

    def drop_engine(self, node_id: str, session: bytes) -> None:
        self._drop([Holder(node_id, TierName.HBM, session)])

    # ------------------------------------------------------------------ who has it

    def match(self, namespace_tag: bytes, keys: Sequence[BlockKey]) -> dict[Holder, Present]:
        """For each holder of any of `keys`: which of them it holds, in their order.

        Blocks of a public prefix lie under the public tag: match them in a call of their own.
        """
        prefixes = b"".join([key[:PREFIX_BYTES] for key in keys])
        slots = self._table.find(_mixed(namespace_tag, prefixes))
        at = np.flatnonzero(slots >= 0)
        if not at.size:
            return {}
        rows = self._table.values[slots[at]]
        wide = rows[:, 0] == _WIDE
        present: Present = np.zeros((max(self._holders, default=0) + 1, len(keys)), np.bool_)
        for column in range(_INLINE):
            present[np.where(wide, 0, rows[:, column]), at] = True
        if wide.any():
            bits = self._wide_bits(_wide_rows(rows[wide]))[:, : len(present)]
            present[: bits.shape[1], at[wide]] = bits.T
        present[0] = False  # where holder number 0, which is none, was noted
        found = np.flatnonzero(present.any(axis=1)).tolist()
        return {self._holders[number]: present[number] for number in found}

    # ------------------------------------------------------------------ holder numbers

    def _number(self, holder: Holder) -> int:
        number = self._numbers.get(holder)
        if number is None:
            number = self._number_free.pop() if self._number_free else len(self._numbers) + 1
            if number > _MAX_HOLDERS:
                raise NoSpace(f"a fleet index tells at most {_MAX_HOLDERS} holders apart")
            self._numbers[holder] = number
            self._holders[number] = holder
            words = number // 64 + 1
            if words > self._wide.shape[1]:
                self._wide = np.pad(self._wide, ((0, 0), (0, words - self._wide.shape[1])))
        return number

    def _drop(self, holders: list[Holder]) -> None:
        known = [self._numbers[holder] for holder in holders if holder in self._numbers]
        if not known:
            return
        # Wide blocks first: one that gets narrow again holds its other holders in place from then on.
        for number in known:
            self._clear_wide(np.flatnonzero(self._table.values[:, 0] == _WIDE), number)
        table = self._table.values
        wide = table[:, 0] == _WIDE
        for number in known:
            here = table == number
            here[wide] = False  # what stands there is a row number
            touched = np.flatnonzero(here.any(axis=1))
            table[here] = 0
            self._delete_empty(touched)
        for number in known:
            del self._numbers[self._holders.pop(number)]
            self._number_free.append(number)

    # ------------------------------------------------------------------ one holder's blocks

    def _store(self, holder: Holder, keys: Keys) -> None:
        """None of `keys` is there twice."""
        number = self._number(holder)
        slots = self._table.insert(self._that_fit(keys))
        rows = self._table.values[slots]
        wide = rows[:, 0] == _WIDE
        if wide.any():
            self._set_wide(_wide_rows(rows[wide]), number)
        todo = np.flatnonzero(~wide & ~(rows == number).any(axis=1))
        free = rows[todo] == 0
        room = free.any(axis=1)
        fits = todo[room]
        self._table.values[slots[fits], free[room].argmax(axis=1)] = number
        full = todo[~room]
        if full.size:
            self._widen(slots[full])
            self._set_wide(_wide_rows(self._table.values[slots[full]]), number)

    def _that_fit(self, keys: Keys) -> Keys:
        room = self._max_blocks - self._table.num_keys
        if keys.size <= room:
            return keys
        known = self._table.find(keys) >= 0
        new = keys[~known]
        self._num_left_out += max(int(new.size) - room, 0)
        return np.concatenate([keys[known], new[:room]])

    def _remove(self, holder: Holder, keys: Keys) -> None:
        number = self._numbers.get(holder)
        if number is None:
            return
        slots = self._table.find(keys)
        slots = slots[slots >= 0]
        rows = self._table.values[slots]
        wide = rows[:, 0] == _WIDE
        here = (rows == number) & ~wide[:, None]
        rows[here] = 0
        self._table.values[slots] = rows
        self._delete_empty(slots[here.any(axis=1)])
        self._clear_wide(slots[wide], number)

    def _delete_empty(self, slots: Slots) -> None:
        self._table.delete(slots[~self._table.values[slots].any(axis=1)])

    # ------------------------------------------------------------------ blocks with many holders

    def _wide_bits(self, rows: Slots) -> Present:
        """(row, holder number) -> held."""
        packed = self._wide[rows].astype("<u8").view(np.uint8)
        return np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)

    def _set_wide(self, rows: Slots, number: int) -> None:
        self._wide[rows, number // 64] |= np.uint64(1 << number % 64)

    def _widen(self, slots: Slots) -> None:
        """Move the holders of `slots` from their place into rows of bits."""
        while len(self._wide_free) < slots.size:
            size = len(self._wide)
            self._wide = np.pad(self._wide, ((0, size), (0, 0)))
            self._wide_free += range(size, 2 * size)
        fresh = np.array([self._wide_free.pop() for _ in range(slots.size)], np.intp)
        rows = self._table.values[slots]
        self._wide[fresh] = 0
        for column in range(_INLINE):
            numbers = rows[:, column].astype(np.intp)
            self._wide[fresh, numbers // 64] |= np.uint64(1) << (numbers % 64).astype(np.uint64)
        self._table.values[slots, 0] = _WIDE
        self._table.values[slots, 1] = 0
        self._table.values[slots, 2] = fresh & 0xFFFF
        self._table.values[slots, 3] = fresh >> 16

    def _clear_wide(self, slots: Slots, number: int) -> None:
        """Take one holder from wide blocks; those with few left go back into their place."""
        if slots.size == 0:
            return
        rows = _wide_rows(self._table.values[slots])
        self._wide[rows, number // 64] &= ~np.uint64(1 << number % 64)
        bits = self._wide_bits(rows)
        few = np.flatnonzero(bits.sum(axis=1) <= _NARROW_AGAIN)
        for index in few.tolist():
            numbers = np.flatnonzero(bits[index])
            self._table.values[slots[index]] = 0
            self._table.values[slots[index], : numbers.size] = numbers
        self._wide_free += rows[few].tolist()
        self._delete_empty(slots[few])


def _wide_rows(rows: npt.NDArray[np.uint16]) -> Slots:
    return rows[:, 2].astype(np.intp) | rows[:, 3].astype(np.intp) << 16


def _mixed(namespace_tag: bytes, prefixes: bytes) -> Keys:
    tag = np.frombuffer(namespace_tag, "<u8").astype(np.uint64)
    return np.bitwise_xor(np.frombuffer(prefixes, "<u8").astype(np.uint64, copy=False), tag)


def _last_words(node_id: str, runs: Sequence[pb.Run]) -> list[tuple[int, Holder, Keys]]:
    """What the runs come to: for each holder at most one of each kind, cleared first, no key twice.

    A busy node tells of several engines in turn and of the same block more than once; work on the table costs
    by the call, not by the key.
    """
    told: dict[Holder, list[tuple[int, Keys]]] = {}
    for run in runs:
        holder = _holder(node_id, run)
        if run.kind == pb.CLEARED:
            told[holder] = [(pb.CLEARED, _keys(run))]
        else:
            told.setdefault(holder, []).append((run.kind, _keys(run)))
    found: list[tuple[int, Holder, Keys]] = []
    for holder, words in told.items():
        if words[0][0] == pb.CLEARED:
            found.append((pb.CLEARED, holder, words.pop(0)[1]))
        if not words:
            continue
        keys = np.concatenate([some for _, some in words])
        is_stored = np.repeat([kind == pb.STORED for kind, _ in words], [k.size for _, k in words])
        keys, last = np.unique(keys[::-1], return_index=True)
        is_stored = is_stored[::-1][last]
        removed, stored = keys[~is_stored], keys[is_stored]
        if removed.size:
            found.append((pb.REMOVED, holder, removed))  # first: they make room
        if stored.size:
            found.append((pb.STORED, holder, stored))
    return found


def _holder(node_id: str, run: pb.Run) -> Holder:
    tier = _TIERS.get(run.tier)
    if tier is None or run.kind not in (pb.STORED, pb.REMOVED, pb.CLEARED):
        raise RemoteProtocolError(f"node {node_id}: event {run.kind} of tier {run.tier} is unknown")
    return Holder(node_id, tier, run.engine)


def _keys(run: pb.Run) -> Keys:
    if run.kind == pb.CLEARED:
        return np.empty(0, np.uint64)
    if len(run.namespace_tag) != PREFIX_BYTES or len(run.keys) % PREFIX_BYTES:
        raise RemoteProtocolError(
            f"a run has a tag of {PREFIX_BYTES} bytes and keys of {PREFIX_BYTES} each, "
            f"not {len(run.namespace_tag)} and {len(run.keys)} bytes"
        )
    return _mixed(run.namespace_tag, run.keys)


class NodeFeed:
    """One node's events, in order, into a `FleetIndex`.

    The reader's loop: open Watch from `position`, give each batch to `watch`. Once that returns False,
    and until a `snapshot` succeeded, batches are kept, not applied: call Snapshot (while Watch stays
    open), collect all of it, give it to `snapshot`; then what was kept follows. When Watch breaks, open it
    again from `position`. A failed snapshot changes nothing: it is never an empty one.
    """

    def __init__(self, index: FleetIndex, node_id: str, *, max_kept: int = 4096) -> None:
        self._index = index
        self._node_id = node_id
        self._max_kept = max_kept
        self._boot_id = b""
        self._next = 0
        self._kept: list[pb.EventBatch] = []
        self.engines: dict[bytes, pb.Engine] = {}
        """Engine sessions of this node that live, by session id."""
        self.needs_snapshot = True

    @property
    def position(self) -> tuple[bytes, int]:
        """(boot_id, from_sequence) for WatchEventsRequest."""
        return self._boot_id, self._next

    def watch(self, batch: pb.EventBatch) -> bool:
        """Take the next batch of Watch. Returns whether the index is exact; if not, take a snapshot."""
        if batch.gap or batch.boot_id != self._boot_id or batch.sequence != self._next:
            self.needs_snapshot = True
            self._kept.clear()
        self._boot_id, self._next = batch.boot_id, batch.sequence + 1
        if not self.needs_snapshot:
            self._take(batch)
        else:
            if len(self._kept) >= self._max_kept:
                self._kept.clear()  # a snapshot under way then fails as too old, and is taken anew
            self._kept.append(batch)
        return not self.needs_snapshot

    def snapshot(self, batches: Sequence[pb.EventBatch]) -> None:
        """Replace what is known of the node by a whole snapshot, then catch up with what was kept.

        Raises RemoteProtocolError, and changes nothing, if the snapshot has no end, is of another life of
        the node, or is older than the first batch kept. It may be newer than the last: a batch applied
        again changes nothing in the end, because the last word on each block is the same.
        """
        if not batches or not batches[-1].snapshot_end:
            raise RemoteProtocolError(f"node {self._node_id}: the snapshot broke off")
        base, first_kept = batches[0].sequence, self._next - len(self._kept)
        if batches[0].boot_id != self._boot_id or first_kept > base + 1:
            raise RemoteProtocolError(
                f"node {self._node_id}: the snapshot at {base} is too old for the watch at {first_kept}"
            )
        kept = [batch for batch in self._kept if batch.sequence > base]
        self._index.drop_node(self._node_id)
        self.engines.clear()
        self._kept.clear()
        for batch in (*batches, *kept):
            self._take(batch)
        self.needs_snapshot = False

    def distrust(self) -> None:
        """What is known may be wrong although no batch is missing: a snapshot is to replace it."""
        self.needs_snapshot = True
        self._kept.clear()

    def lost(self) -> None:
        """The node is gone: so is all it held, until a snapshot says otherwise."""
        self._index.drop_node(self._node_id)
        self.engines.clear()
        self._kept.clear()
        self._boot_id, self._next, self.needs_snapshot = b"", 0, True

    def _take(self, batch: pb.EventBatch) -> None:
        for engine in batch.engines:
            if engine.gone:
                self.engines.pop(engine.session, None)
            else:
                self.engines[engine.session] = engine
        self._index.apply(self._node_id, batch)
