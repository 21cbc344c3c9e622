"""What lies where: every transition of a block, kept consistent over index, queues, accounts and arena.

Owns the slots. Callers are the store's verbs; all methods are sync, hence atomic on the event loop, and
each leaves these true (`check` proves them in tests):

    bytes charged = reserved + ready + detached of all accounts <= capacity
    what is pinned is READY here, and so is what it hangs on; no queue has it (`pins`)
    every allocated slot belongs to one HOST part, one write under way, or one detached entry
    a slot is freed only when no hold is on its row: a hold is a reader, a writer or the SSD tier's reader
    the host tier's events say exactly which blocks are READY there
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvfabric.failpoints import failpoint
from kvfabric.registry.state import Tenant
from kvfabric.store.index import (
    HIT,
    HOST,
    LOADING,
    PINNED,
    QUEUED,
    RESERVED,
    SSD,
    BlockIndex,
    Rows,
)
from kvfabric.store.misses import Misses
from kvfabric.store.pins import Pins
from kvfabric.store.policy import EvictionPolicy
from kvfabric.store.quota import AHEAD_SHARE, TierAccounts
from kvfabric.store.runs import EventSink, complete, runs
from kvfabric.tiers.arena import PAGE_BYTES, Arena, Slots, slot_bytes
from kvfabric.tiers.write_budget import TenantBudgets
from kvfabric.types import TenantId, TierName

MAX_EVICTIONS = 256
"""Blocks one call evicts at most, which bounds its stay on the event loop: 4 us a block, 12 on a slow
machine. What a reserve does not get by that, and not from the room kept ahead, is refused."""

_ROUND = 128
"""Blocks taken from one tenant before the tenants are ranked anew."""

_ROWS_ROUND = 16
"""Blocks evicted for their rows before counting again: a block may give several parts, or stay on SSD."""


_AHEAD_BLOCKS = 16
"""Evicted ahead before others run."""
_NOBODY = -1


class DetachedSlot(NamedTuple):
    """A slot that left READY and is not free yet; `wipe`: to be zeroed before it is."""

    page: int
    num_bytes: int
    tenant: int
    wipe: bool


class _Removal:
    """Slots and events of one call, handed on together."""

    def __init__(self, *, wipe: bool = False) -> None:
        self.wipe = wipe
        self.pages: dict[int, list[int]] = {}
        self.prefixes: dict[bytes, bytearray] = {}


class Residency:
    """`save` is asked before a block that was hit is evicted: True if it is being written to SSD now.
    `room_is_low` is called when `evict_ahead` should be, until it returns False; `stored` when blocks became
    READY.
    """

    def __init__(
        self,
        *,
        index: BlockIndex,
        host: TierAccounts,
        ssd: TierAccounts,
        events: EventSink,
        now: Callable[[], int],
    ) -> None:
        self.index = index
        self.host = host
        self.ssd = ssd
        self.policy = EvictionPolicy(index)
        self.pins = Pins(index, host, self.policy)
        self.misses = Misses()
        self.arena: Arena | None = None
        self.save: Callable[[int], bool] = lambda _row: False
        self.room_is_low: Callable[[], None] = lambda: None
        self.stored: Callable[[], None] = lambda: None
        self.evictions = 0
        self.num_host_blocks = 0
        self.num_ssd_blocks = 0
        self.write_budgets = TenantBudgets()
        self._events = events
        self._now = now
        self.unwiped: deque[DetachedSlot] = deque()
        self.overdue_bytes = 0
        self._detached: dict[int, list[DetachedSlot]] = {}

    def configure(self, tenants: Mapping[TenantId, Tenant]) -> None:
        """The registry's tenants and what each may have, from now on."""
        before = self.host.pin_budgets()
        self.host.configure(tenants)
        self.ssd.configure(tenants)
        if self.host.pin_budgets() != before:
            self.pins.budgets_changed()
        self.write_budgets.configure(
            {tenant.tenant_id: tenant.limits.ssd_write_bytes_per_day for tenant in tenants.values()}
        )

    def resize(self, host_bytes: int) -> None:
        """What the host tier really has."""
        self.host.resize(host_bytes)
        self.pins.budgets_changed()

    def tenant_slot(self, tenant: TenantId) -> int:
        """The tenant's slot number, the same in both tiers' accounts."""
        slot = self.host.slot(tenant)
        assert self.ssd.slot(tenant) == slot
        return slot

    # -- holds ---------------------------------------------------------------------------------------

    def hold(self, rows: Rows) -> None:
        """Nothing of these (distinct) rows is freed or reused until `unhold`."""
        index = self.index
        queued = rows[(index.flags.array[rows] & QUEUED) != 0]
        if len(queued):
            self.policy.withdraw(queued.tolist())
        index.holds.array[rows] += 1

    def unhold(self, rows: Rows) -> None:
        index = self.index
        index.holds.array[rows] -= 1
        idle = rows[index.holds.array[rows] == 0]
        if not len(idle):
            return
        if self._detached:
            self._free_detached(idle)
        self.policy.offer(idle)
        empty = idle[(index.available_parts.array[idle] == 0) & (index.child_rows.array[idle] == 0)]
        if len(empty):
            index.drop_empty(empty.tolist())

    def _free_detached(self, rows: Rows) -> None:
        removal = _Removal()
        for row in rows.tolist():
            for slot in self._detached.pop(row, ()):
                if slot.wipe:
                    self.unwiped.append(slot)
                    continue
                removal.pages.setdefault(slot.num_bytes, []).append(slot.page)
                self.host.accounts[slot.tenant].detached -= slot.num_bytes
        self._finish(removal)

    def wiped(self, count: int) -> None:
        """The first `count` of `unwiped` are zeroed: free."""
        removal = _Removal()
        for _ in range(count):
            slot = self.unwiped.popleft()
            removal.pages.setdefault(slot.num_bytes, []).append(slot.page)
            self.host.accounts[slot.tenant].detached -= slot.num_bytes
        self._finish(removal)

    # -- room ----------------------------------------------------------------------------------------

    def make_room(self, tenant: int, num_bytes: int, count: int, *, leased: bool = False) -> int:
        """How many of `count` slots of `num_bytes` the tenant may be charged now, after evictions.

        `leased`: for blocks that are leased, and so bounded and counted as such already.
        """
        host, account = self.host, self.host.accounts[tenant]
        wanted = count if leased else min(count, host.room_to_reserve(tenant) // num_bytes)
        over = host.over_maximum(tenant, wanted * num_bytes)
        if over > 0:
            self._evict(over, lambda: [tenant], tenant)
            wanted = min(wanted, (account.max_bytes - account.used) // num_bytes)
        over = host.over_capacity(wanted * num_bytes)
        if over > 0:
            self._evict(over, host.by_excess, tenant)
            wanted = min(wanted, (host.capacity_bytes - host.used) // num_bytes)
        if host.over_capacity(wanted * num_bytes + self._ahead_bytes) > 0:
            self.room_is_low()
        return max(0, wanted)

    def evict_ahead(self) -> bool:
        """Evict a few blocks for those that come next; False if there is room, or nothing may go."""
        over = self.host.over_capacity(self._ahead_bytes)
        if over <= 0:
            return False
        return self._evict(over, self.host.by_excess, _NOBODY, _AHEAD_BLOCKS) > 0

    @property
    def _ahead_bytes(self) -> int:
        """Whole blocks; none in an arena too small to spare them."""
        largest = max(1, int(self.index.lineage_bytes.array.max()))
        return int(self.host.capacity_bytes * AHEAD_SHARE) // largest * largest

    def free_rows(self, tenant: int, wanted_rows: int) -> None:
        """Evict until the index has room for so many rows and parts, if evicting can give it."""
        looked_at, took = 0, 1
        while took and looked_at < MAX_EVICTIONS:
            if min(self.index.free_rows, self.index.free_parts) >= wanted_rows:
                return
            took = self._evict(self.host.capacity_bytes, self.host.by_excess, tenant, _ROWS_ROUND)
            looked_at += took

    def allocate(self, tenant: int, count: int, num_bytes: int) -> Slots | None:
        """Slots for bytes that are charged already. Splinters cost evictions, within bounds."""
        assert self.arena is not None
        slots = self.arena.allocate(count, num_bytes)
        if slots is None:
            self._evict(4 * count * num_bytes, self.host.by_excess, tenant)
            slots = self.arena.allocate(count, num_bytes)
        return slots

    def give_back(self, slots: Slots, num_bytes: int) -> None:
        """Slots that were allocated and never published."""
        assert self.arena is not None
        self.arena.free(slots.first_pages, num_bytes)

    def _evict(
        self,
        num_bytes: int,
        victims: Callable[[], list[int]],
        requester: int,
        limit: int | None = None,
    ) -> int:
        """Evict `num_bytes`, or until `limit` (MAX_EVICTIONS) blocks were looked at; how many were."""
        limit = MAX_EVICTIONS if limit is None else limit
        removal, freed, blocks = _Removal(), 0, 0
        while freed < num_bytes and blocks < limit:
            took = 0
            for tenant in victims():
                most = min(_ROUND, limit - blocks)
                got, took = self._evict_from(tenant, num_bytes - freed, most, requester, removal)
                freed += got
                if took:
                    break
            if not took:
                break
            blocks += took
        self._finish(removal)
        failpoint("store.evicted")
        return blocks

    def _evict_from(
        self, tenant: int, num_bytes: int, most: int, requester: int, removal: _Removal
    ) -> tuple[int, int]:
        """(bytes freed, blocks looked at), `most` at most."""
        if tenant != requester:
            # The last block taken may pass the aim by less than the largest block there is.
            largest = int(
                self.index.lineage_bytes.array[self.index.lineage_tenant.array == tenant].max()
            )
            num_bytes = min(num_bytes, self.host.above_floor(tenant) - largest + 1)
        victims = self.policy.take_victims(tenant, num_bytes, most)
        rows = self._going(np.array(victims, dtype=np.uint32))
        self.evictions += len(rows)
        freed = self._remove(rows, tenant, removal, ghosts=True) if len(rows) else 0
        return freed, len(victims)

    def _going(self, victims: Rows) -> Rows:
        """Those that do not stay. Only one that was hit may, and then so do the ancestors after it."""
        hit = np.flatnonzero(self.index.flags.array[victims] & HIT)
        if not len(hit):
            return victims
        first = int(hit[0])
        later = [row for row in victims[first:].tolist() if not self._stays(row)]
        return np.concatenate([victims[:first], np.array(later, dtype=np.uint32)])

    def _stays(self, row: int) -> bool:
        """Whether a victim is being written to SSD now, or waits for a child that is."""
        index = self.index
        child_stays = index.host_children.cell[row]
        if child_stays or (index.flags.cell[row] & HIT and self.save(row)):
            self.policy.put_back(row)
            return True
        return False

    def _host_bytes(self, row: int) -> int:
        specs = self.index.layout_at(row).specs
        states = self.index.part_state.cell
        return sum(
            slot_bytes(specs[ordinal].num_bytes)
            for ordinal, part in enumerate(self.index.parts_of(row))
            if states[part] & HOST
        )

    # -- host tier -----------------------------------------------------------------------------------

    def begin(self, rows: Rows, parts: Rows, num_bytes: int, state: int) -> None:
        """Charge parts that are going to be filled, RESERVED or LOADING, and hold their rows."""
        self.index.part_state.array[parts] |= state
        self.host.add("reserved", self.index.tenants_of(rows), num_bytes)
        self.hold(rows)

    def cancel(self, rows: Rows, parts: Rows, num_bytes: int) -> None:
        """Undo `begin` for parts that stay empty."""
        index = self.index
        index.part_state.array[parts] &= np.uint8(0xFF & ~(RESERVED | LOADING))
        self.host.add("reserved", index.tenants_of(rows), -num_bytes)
        self.unhold(rows)

    def begin_overdue(self, rows: Rows, num_bytes: int) -> None:
        """Begun parts, of `num_bytes` each, are not filled in time: nobody waits for them, and their slots
        drain."""
        tenants = self.index.tenants_of(rows)
        self.overdue_bytes += len(rows) * num_bytes
        self.host.add("reserved", tenants, -num_bytes)
        self.host.add("detached", tenants, num_bytes)

    def end_overdue(self, rows: Rows, num_bytes: int) -> None:
        """They have ended after all: `publish` or `cancel` comes next."""
        tenants = self.index.tenants_of(rows)
        self.overdue_bytes -= len(rows) * num_bytes
        self.host.add("detached", tenants, -num_bytes)
        self.host.add("reserved", tenants, num_bytes)

    def publish(
        self, rows: Rows, parts: Rows, num_bytes: int, slots: Slots, checksums: bytes
    ) -> int:
        """The bytes of begun parts are in their slots and verified: READY. `checksums`: 16 B a part.

        Returns how many blocks were completed by it.
        """
        index = self.index
        state = index.part_state.array[parts]
        index.part_page.array[parts] = slots.first_pages
        index.part_generation.array[parts] = slots.generations
        index.part_checksum[parts] = np.frombuffer(checksums, dtype="V16")
        index.part_state.array[parts] = (state | HOST) & ~np.uint8(RESERVED | LOADING)
        index.available_parts.array[rows] += (state & SSD) == 0
        arrived = rows[index.host_parts.array[rows] == 0]
        index.host_parts.array[rows] += 1
        # A block that was on SSD keeps the time it was stored at.
        index.stored_at.array[rows[(state & SSD) == 0]] = self._now()
        tenants = index.tenants_of(rows)
        self.host.add("reserved", tenants, -num_bytes)
        self.host.add("ready", tenants, num_bytes)
        np.add.at(index.host_bytes, index.lineage.array[rows], num_bytes)
        if len(arrived):
            parents = index.parent.array[arrived]
            np.add.at(index.host_children.array, parents, np.uint32(1))
            self.policy.withdraw(parents[(index.flags.array[parents] & QUEUED) != 0].tolist())
            self.policy.arrive(arrived)
        num_complete = self._announce(rows)
        self.unhold(rows)
        return num_complete

    def _announce(self, rows: Rows) -> int:
        whole = complete(self.index, rows)
        self.num_host_blocks += len(whole)
        for run in runs(self.index, whole):
            self._events.stored(TierName.HOST, run.namespace_tag, run.parent, run.keys)
        self.pins.extend(whole)
        if len(whole):
            self.stored()
        return len(whole)

    def discard(self, row: int, *, wipe: bool = False) -> None:
        """Take a block out of the host tier, held or not: corrupt or withdrawn. Held slots drain; with
        `wipe` all do, until they are zeroed."""
        index = self.index
        if not index.host_parts.cell[row]:
            return
        self.pins.dropped(row)
        removal = _Removal(wipe=wipe)
        tenant = index.lineage_tenant.cell[index.lineage.cell[row]]
        parent = index.parent.cell[row]
        index.host_children.cell[parent] -= 1
        self._remove(np.array([row], dtype=np.uint32), tenant, removal, ghosts=False)
        self._finish(removal)
        if parent:
            self.policy.offer(np.array([parent], dtype=np.uint32))

    def _remove(self, rows: Rows, tenant: int, removal: _Removal, *, ghosts: bool) -> int:
        """Take blocks of one tenant out of the host tier; returns the bytes they had. Their parents
        know already."""
        index = self.index
        whole = complete(index, rows)
        self.num_host_blocks -= len(whole)
        for lineage in set(index.lineage.array[whole].tolist()):
            prefixes = index.prefixes(whole[index.lineage.array[whole] == lineage])
            tag = index.lineage_of(lineage).namespace_tag
            removal.prefixes.setdefault(tag, bytearray()).extend(prefixes)
        freed = 0
        for lineage in set(index.lineage.array[rows].tolist()):
            specs = index.layouts[index.lineage_of(lineage).layout_fingerprint].specs
            own = rows[index.lineage.array[rows] == lineage]
            before = freed
            for ordinal, spec in enumerate(specs):
                freed += self._take_slots(own, ordinal, slot_bytes(spec.num_bytes), removal)
            index.host_bytes[lineage] -= freed - before
        account = self.host.accounts[tenant]
        account.ready -= freed
        index.host_parts.array[rows] = 0
        self.policy.leave(rows, ghosts=ghosts)
        index.drop_empty(rows.tolist())
        return freed

    def _take_slots(self, rows: Rows, ordinal: int, num_bytes: int, removal: _Removal) -> int:
        """Free one part of each block, or set it apart while the block is held; bytes of all."""
        index = self.index
        parts = index.parts(rows, ordinal)
        state = index.part_state.array[parts]
        there = (state & HOST) != 0
        rows, parts, state = rows[there], parts[there], state[there]
        held = index.holds.array[rows] != 0
        drains = held | removal.wipe
        pages = index.part_page.array[parts]
        for row, page in zip(rows[drains].tolist(), pages[drains].tolist(), strict=True):
            tenant = index.lineage_tenant.cell[index.lineage.cell[row]]
            self.host.accounts[tenant].detached += num_bytes
            slot = DetachedSlot(page, num_bytes, tenant, removal.wipe)
            waits = self._detached.setdefault(row, []) if index.holds.cell[row] else self.unwiped
            waits.append(slot)
        removal.pages.setdefault(num_bytes, []).extend(pages[~drains].tolist())
        index.part_state.array[parts] = state & np.uint8(0xFF & ~HOST)
        index.available_parts.array[rows] -= (state & SSD) == 0
        return len(rows) * num_bytes

    def _finish(self, removal: _Removal) -> None:
        for num_bytes, pages in removal.pages.items():
            assert self.arena is not None
            self.arena.free(np.array(pages, dtype=np.uint32), num_bytes)
        for tag, prefixes in removal.prefixes.items():
            self._events.removed(TierName.HOST, tag, bytes(prefixes))

    # -- SSD tier ------------------------------------------------------------------------------------

    def sealed(
        self,
        rows: Rows,
        parts: Rows,
        num_bytes: npt.NDArray[np.int64],
        file: int,
        offsets: npt.NDArray[np.int64],
    ) -> None:
        """One part of each of these (distinct) blocks is durable in `file`."""
        index = self.index
        state = index.part_state.array[parts]
        assert not (state & SSD).any()
        index.part_ssd_file.array[parts] = file
        index.part_ssd_page.array[parts] = offsets // PAGE_BYTES
        index.part_state.array[parts] = state | SSD
        index.available_parts.array[rows] += (state & HOST) == 0
        self.num_ssd_blocks += int(np.count_nonzero(index.ssd_parts.array[rows] == 0))
        index.ssd_parts.array[rows] += 1
        charges = slot_bytes_of(num_bytes) + PAGE_BYTES
        self.ssd.add("ready", index.tenants_of(rows), charges)
        np.add.at(index.ssd_bytes, index.lineage.array[rows], charges)

    def moved(self, part: int, location: tuple[int, int]) -> None:
        """A sealed part is durable elsewhere now."""
        self.index.part_ssd_file.cell[part] = location[0]
        self.index.part_ssd_page.cell[part] = location[1] // PAGE_BYTES

    def is_sealed_at(self, part: int, location: tuple[int, int]) -> bool:
        index = self.index
        place = (index.part_ssd_file.cell[part], index.part_ssd_page.cell[part] * PAGE_BYTES)
        return bool(index.part_state.cell[part] & SSD) and place == tuple(location)

    def forget_sealed(self, row: int, part: int, num_bytes: int) -> None:
        """A part is no more on SSD. The caller then has the index drop what is empty."""
        index = self.index
        state = index.part_state.cell[part]
        if not state & SSD:
            return
        index.part_state.cell[part] = state & ~SSD
        if not state & HOST:
            index.available_parts.cell[row] -= 1
        index.ssd_parts.cell[row] -= 1
        if not index.ssd_parts.cell[row]:
            self.num_ssd_blocks -= 1
        tenant = index.lineage_tenant.cell[index.lineage.cell[row]]
        self.ssd.accounts[tenant].ready -= record_bytes(num_bytes)
        index.ssd_bytes[index.lineage.cell[row]] -= record_bytes(num_bytes)

    # -- handing over ---------------------------------------------------------------------------------

    def detached_slots(self) -> Iterator[tuple[int, DetachedSlot]]:
        """(row whose readers keep it, slot); row 0 for those that only wait to be zeroed."""
        for row, slots in self._detached.items():
            for slot in slots:
                yield row, slot
        for slot in self.unwiped:
            yield 0, slot

    def restored(self, rows: Rows) -> None:
        """These rows were filled in with parts in the arena by hand: count them, queue nothing yet."""
        index = self.index
        np.add.at(index.host_children.array, index.parent.array[rows], np.uint32(1))
        self.policy.restored(rows)
        self.num_host_blocks += len(complete(self.index, rows))

    def restore_detached(self, row: int, slot: DetachedSlot) -> None:
        """As `detached_slots` gave it; the row is held already."""
        self.host.add_one("detached", slot.tenant, slot.num_bytes)
        if row:
            assert self.index.holds.cell[row], "a slot drains for a reader"
            self._detached.setdefault(row, []).append(slot)
        else:
            self.unwiped.append(slot)

    # -- proof ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recompute what the accounts and counters claim from the rows; AssertionError if they differ.

        For tests: takes time in proportion to the index.
        """
        index, ssd_blocks = self.index, 0
        by_lineage = np.zeros_like(index.host_bytes)
        rows = np.arange(1, index.highest_row + 1, dtype=np.uint32)
        live = rows[index.flags.array[rows] != 0]
        for row in live[index.lineage.array[live] != 0].tolist():
            by_lineage[index.lineage.cell[row]] += self._host_bytes(row)
            ssd_blocks += index.ssd_parts.cell[row] > 0
            evictable = (
                index.host_parts.cell[row] > 0
                and not index.holds.cell[row]
                and not index.host_children.cell[row]
                and not index.flags.cell[row] & PINNED
            )
            assert bool(index.flags.cell[row] & QUEUED) == evictable, f"queue of row {row}"
        host = self.host
        ready = int(by_lineage.sum())
        assert (by_lineage == index.host_bytes).all(), "bytes of a lineage"
        assert int(index.ssd_bytes.sum()) == sum(account.ready for account in self.ssd.accounts)
        assert ready == sum(account.ready for account in host.accounts)
        slots = [slot for slots in self._detached.values() for slot in slots]
        detached = sum(slot.num_bytes for slot in (*slots, *self.unwiped)) + self.overdue_bytes
        assert detached == sum(account.detached for account in host.accounts)
        assert host.used <= host.capacity_bytes
        self.pins.check()
        assert len(complete(index, live[index.lineage.array[live] != 0])) == self.num_host_blocks
        assert ssd_blocks == self.num_ssd_blocks
        if self.arena is not None:
            in_use = self.arena.size_bytes - self.arena.free_bytes - self.arena.withheld_bytes
            assert ready + detached <= in_use <= host.used


def slot_bytes_of(num_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As `slot_bytes`, of a vector."""
    rounded: npt.NDArray[np.int64] = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    return rounded


def record_bytes(num_bytes: int) -> int:
    """What a part is charged on SSD: its pages and one for the record's header."""
    return slot_bytes(num_bytes) + PAGE_BYTES
