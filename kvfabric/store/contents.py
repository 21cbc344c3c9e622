"""What the host tier holds and for whom, as data: what a daemon hands to its successor beside the arena.

Blocks are named by their position in the table, so nothing of how this process numbers its rows leaves it.
What is on SSD is not in it: the successor reads that from the medium. Rights do not survive: every block
that a request leases comes back as draining, until its session proves that nobody reads it.

Sync and without I/O. `describe` wants a store that is frozen (no reservation, no read, no write under way),
`restore` one that is empty and has the arena.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from kvfabric.errors import CapacityError, RemoteProtocolError
from kvfabric.store.cost import CostLevels
from kvfabric.store.index import HIT, HOST, NO_ROW, BlockIndex, Lineage, Rows, StoredLayout
from kvfabric.store.lease import LeaseBook, RequestGrant, Session
from kvfabric.store.residency import DetachedSlot, Residency
from kvfabric.tiers.arena import pages_of, slot_bytes
from kvfabric.tiers.segment_index import BudgetState
from kvfabric.types import PartSpec, SessionId, TenantId

_NO_PLACE = 0


class LayoutEntry(msgspec.Struct, frozen=True):
    fingerprint: bytes
    specs: tuple[PartSpec, ...]
    declared: bool
    cost_base: int
    cost_bounds: tuple[int, ...]


class LineageEntry(msgspec.Struct, frozen=True):
    tenant: str
    namespace_tag: bytes
    layout_fingerprint: bytes
    incarnations: tuple[bytes, ...]


class DetachedEntry(msgspec.Struct, frozen=True):
    """`place`: of the block whose readers keep it, 0 if it only waits to be zeroed."""

    place: int
    page: int
    num_bytes: int
    tenant: str
    wipe: bool


class RequestEntry(msgspec.Struct, frozen=True):
    """`places`: of the blocks it leases, u32."""

    request_id: str
    grant: RequestGrant
    places: bytes


class SessionEntry(msgspec.Struct, frozen=True):
    number: bytes
    layout_fingerprint: bytes
    block_tokens: int
    active: bool
    requests: tuple[RequestEntry, ...]


class BudgetEntry(msgspec.Struct, frozen=True):
    """What a tenant may still write to SSD: bytes, and when that was (seconds since 1970)."""

    tenant: str
    left: float
    at: float


class Contents(msgspec.Struct, frozen=True):
    """Columns are packed little-endian vectors. A place is a position in the block columns counted from 1.

    Blocks: keys 32 B; parents (place, 0: none), lineages (position from 1; 0: a stub, known as a parent
    only), block indexes, stored_at: u32; freq, flags, texts (none from an earlier release): u8. Parts: owner
    (place), page, generation: u32; ordinal u8; checksum 16 B. `started`: CLOCK_MONOTONIC seconds that
    `stored_at` counts from.
    """

    started: float
    generation: int
    num_reservations: int
    layouts: tuple[LayoutEntry, ...]
    lineage_entries: tuple[LineageEntry, ...]
    keys: bytes
    parents: bytes
    lineages: bytes
    block_indexes: bytes
    stored_at: bytes
    freq: bytes
    flags: bytes
    owners: bytes
    ordinals: bytes
    pages: bytes
    generations: bytes
    checksums: bytes
    detached: tuple[DetachedEntry, ...]
    sessions: tuple[SessionEntry, ...]
    texts: bytes = b""
    write_budgets: tuple[BudgetEntry, ...] = ()


# ---------------------------------------------------------------------- out


def describe(residency: Residency, leases: LeaseBook, *, started: float) -> Contents:
    """Blocks with bytes in the arena, blocks that requests hold, and the parents of both."""
    index, arena = residency.index, residency.arena
    assert arena is not None
    rows = _rows_to_keep(residency, leases)
    places = np.zeros(index.highest_row + 1, dtype="<u4")
    places[rows] = np.arange(1, len(rows) + 1, dtype="<u4")
    used = np.zeros(len(index.lineages), dtype=np.bool_)
    used[index.lineage.array[rows]] = True
    used[0] = False  # of stubs
    numbers = np.flatnonzero(used)
    lineage_places = np.zeros(len(index.lineages), dtype="<u4")
    lineage_places[numbers] = np.arange(1, len(numbers) + 1, dtype="<u4")
    return Contents(
        started=started,
        generation=arena.generation,
        num_reservations=leases.num_reservations,
        layouts=tuple(
            LayoutEntry(layout.fingerprint, tuple(layout.specs), layout.declared, *layout.levels)
            for layout in index.layouts.values()
        ),
        lineage_entries=tuple(
            LineageEntry(*index.lineage_of(number)) for number in numbers.tolist()
        ),
        keys=index.keys.array[rows].tobytes(),
        parents=places[index.parent.array[rows]].tobytes(),
        lineages=lineage_places[index.lineage.array[rows]].tobytes(),
        block_indexes=index.block_index.array[rows].tobytes(),
        stored_at=index.stored_at.array[rows].tobytes(),
        freq=index.freq.array[rows].tobytes(),
        flags=index.flags.array[rows].tobytes(),
        **_parts_of(index, rows),
        detached=_detached_of(residency, places),
        sessions=tuple(_session_of(session, places) for session in leases.sessions.values()),
        texts=index.texts.array[rows].tobytes(),
        write_budgets=tuple(
            BudgetEntry(tenant, *level)
            for tenant, level in residency.write_budgets.levels().items()
        ),
    )


def _rows_to_keep(residency: Residency, leases: LeaseBook) -> Rows:
    """By age, stubs of parents last."""
    index = residency.index
    keep = index.host_parts.array[: index.highest_row + 1] > 0
    for session in leases.sessions.values():
        for request in session.requests.values():
            keep[request.rows] = True
    for row, _ in residency.detached_slots():
        keep[row] = True
    keep[NO_ROW] = False
    rows = np.flatnonzero(keep).astype(np.uint32)
    rows = rows[np.argsort(index.stored_at.array[rows], kind="stable")]
    above = np.zeros_like(keep)
    above[index.parent.array[rows]] = True
    above[NO_ROW] = False
    parents = np.flatnonzero(above & ~keep).astype(np.uint32)
    return np.concatenate([rows, parents])


def _parts_of(index: BlockIndex, rows: Rows) -> dict[str, bytes]:
    owners, ordinals, found = [], [], []
    ordinal, of_ordinal = 0, index.first_part.array[rows]
    while of_ordinal.any():
        there = np.flatnonzero(index.part_state.array[of_ordinal] & HOST)
        owners.append((there + 1).astype("<u4"))
        ordinals.append(np.full(len(there), ordinal, dtype=np.uint8))
        found.append(of_ordinal[there])
        of_ordinal = index.part_next.array[of_ordinal]
        ordinal += 1
    parts = np.concatenate(found) if found else np.empty(0, dtype=np.uint32)
    return {
        "owners": b"".join(vector.tobytes() for vector in owners),
        "ordinals": b"".join(vector.tobytes() for vector in ordinals),
        "pages": index.part_page.array[parts].tobytes(),
        "generations": index.part_generation.array[parts].tobytes(),
        "checksums": index.part_checksum[parts].tobytes(),
    }


def _detached_of(residency: Residency, places: Rows) -> tuple[DetachedEntry, ...]:
    accounts = residency.host.accounts
    return tuple(
        DetachedEntry(
            int(places[row]) if row else _NO_PLACE,
            slot.page,
            slot.num_bytes,
            accounts[slot.tenant].tenant,
            slot.wipe,
        )
        for row, slot in residency.detached_slots()
    )


def _session_of(session: Session, places: Rows) -> SessionEntry:
    return SessionEntry(
        number=session.number,
        layout_fingerprint=session.layout.fingerprint,
        block_tokens=session.block_tokens,
        active=session.active,
        requests=tuple(
            RequestEntry(name, request.grant, places[request.rows].tobytes())
            for name, request in session.requests.items()
        ),
    )


# ---------------------------------------------------------------------- in


def restore(contents: Contents, residency: Residency, leases: LeaseBook) -> None:
    """Raises CapacityError if the index is too small for it and RemoteProtocolError if it contradicts
    itself; the store is of no use then."""
    try:
        _restore(contents, residency, leases)
    except (ValueError, IndexError, KeyError, AssertionError) as exc:
        raise RemoteProtocolError(f"the contents handed over contradict themselves: {exc}") from exc


def _restore(contents: Contents, residency: Residency, leases: LeaseBook) -> None:
    index = residency.index
    for entry in contents.layouts:
        layout = index.layouts[entry.fingerprint] = StoredLayout(entry.fingerprint)
        for spec in entry.specs:
            layout.add(spec)
        layout.declared = entry.declared
        layout.levels = CostLevels(entry.cost_base, entry.cost_bounds)
    rows = _restore_rows(contents, residency)
    owners = np.frombuffer(contents.owners, "<u4")
    _restore_slots(contents, residency, rows, owners)
    _restore_parts(contents, residency, rows, owners)
    present = rows[index.host_parts.array[rows] > 0]
    residency.restored(present)
    leases.num_reservations = contents.num_reservations
    for session in contents.sessions:
        _restore_session(session, index, leases, rows)
    _restore_detached(contents, residency, rows)
    residency.policy.offer(present)
    residency.write_budgets.resume(
        {TenantId(one.tenant): BudgetState(one.left, one.at) for one in contents.write_budgets}
    )


def _restore_rows(contents: Contents, residency: Residency) -> Rows:
    index = residency.index
    keys = np.frombuffer(contents.keys, dtype=np.uint64).reshape(-1, 4)
    lineages = np.frombuffer(contents.lineages, "<u4")
    places = np.frombuffer(contents.parents, "<u4")
    _require(index, len(keys), index.free_rows)
    rows = index.insert(keys)
    by_place = np.concatenate([np.zeros(1, dtype=np.uint32), rows])
    index.block_index.array[rows] = np.frombuffer(contents.block_indexes, "<u4")
    for position, entry in enumerate(contents.lineage_entries, start=1):
        own = np.flatnonzero(lineages == position)
        tenant = TenantId(entry.tenant)
        lineage = Lineage(tenant, *_rest_of(entry))
        number = index.intern_lineage(lineage, residency.tenant_slot(tenant))
        of_lineage = np.full(len(own), number, dtype=np.uint32)
        indexes = index.block_index.array[rows[own]]
        index.adopt(rows[own], by_place[places[own]], of_lineage, indexes)
    index.stored_at.array[rows] = np.frombuffer(contents.stored_at, "<u4")
    flags = np.frombuffer(contents.flags, np.uint8)
    index.freq.array[rows] = np.frombuffer(contents.freq, np.uint8)
    index.flags.array[rows] |= flags & HIT
    if contents.texts:
        index.texts.array[rows] = np.frombuffer(contents.texts, np.uint8)
    return rows


def _require(index: BlockIndex, needed: int, free: int) -> None:
    if needed > free:
        raise CapacityError(f"an index of {index.max_blocks} blocks does not hold {needed}")


def _rest_of(entry: LineageEntry) -> tuple[bytes, bytes, tuple[bytes, ...]]:
    return entry.namespace_tag, entry.layout_fingerprint, entry.incarnations


def _restore_slots(
    contents: Contents, residency: Residency, rows: Rows, owners: npt.NDArray[np.uint32]
) -> None:
    """The arena's allocator: what is in use, each slot once."""
    arena = residency.arena
    assert arena is not None
    sizes = _part_bytes(contents, residency.index, rows, owners)
    starts = [np.frombuffer(contents.pages, "<u4")]
    starts.append(np.array([entry.page for entry in contents.detached], dtype=np.uint32))
    counts = [np.array([pages_of(int(size)) for size in sizes.tolist()], dtype=np.int64)]
    counts.append(
        np.array([pages_of(entry.num_bytes) for entry in contents.detached], dtype=np.int64)
    )
    arena.resume(np.concatenate(starts), np.concatenate(counts), contents.generation)


def _part_bytes(
    contents: Contents, index: BlockIndex, rows: Rows, owners: npt.NDArray[np.uint32]
) -> npt.NDArray[np.int64]:
    ordinals = np.frombuffer(contents.ordinals, np.uint8)
    lineages = index.lineage.array[rows[owners - 1]]
    sizes = np.zeros(len(owners), dtype=np.int64)
    for lineage in set(lineages.tolist()):
        specs = index.layouts[index.lineage_of(lineage).layout_fingerprint].specs
        for ordinal, spec in enumerate(specs):
            sizes[(lineages == lineage) & (ordinals == ordinal)] = spec.num_bytes
    if not sizes.all():
        raise RemoteProtocolError("a part of an ordinal that its layout does not have")
    return sizes


def _restore_parts(
    contents: Contents, residency: Residency, rows: Rows, owners: npt.NDArray[np.uint32]
) -> None:
    index = residency.index
    ordinals = np.frombuffer(contents.ordinals, np.uint8)
    pages = np.frombuffer(contents.pages, "<u4")
    generations = np.frombuffer(contents.generations, "<u4")
    sums = np.frombuffer(contents.checksums, dtype="V16")
    sizes = _part_bytes(contents, index, rows, owners)
    for fingerprint, layout in index.layouts.items():
        own = _rows_of_layout(index, rows, fingerprint)
        _require(index, len(own) * layout.num_parts, index.free_parts)
        index.ensure_parts(own, layout.num_parts)
    for ordinal in sorted(set(ordinals.tolist())):
        chosen = np.flatnonzero(ordinals == ordinal)
        of_rows = rows[owners[chosen] - 1]
        parts = index.parts(of_rows, ordinal)
        index.part_page.array[parts] = pages[chosen]
        index.part_generation.array[parts] = generations[chosen]
        index.part_checksum[parts] = sums[chosen]
        index.part_state.array[parts] = HOST
        index.host_parts.array[of_rows] += 1
        index.available_parts.array[of_rows] += 1
        slot_sizes = -(-sizes[chosen] // slot_bytes(1)) * slot_bytes(1)
        residency.host.add("ready", index.tenants_of(of_rows), slot_sizes)
        np.add.at(index.host_bytes, index.lineage.array[of_rows], slot_sizes)


def _rows_of_layout(index: BlockIndex, rows: Rows, fingerprint: bytes) -> Rows:
    numbers = [
        number
        for number in set(index.lineage.array[rows].tolist())
        if number and index.lineage_of(number).layout_fingerprint == fingerprint
    ]
    own: Rows = rows[np.isin(index.lineage.array[rows], numbers)]
    return own


def _restore_session(entry: SessionEntry, index: BlockIndex, leases: LeaseBook, rows: Rows) -> None:
    number = SessionId(entry.number)
    layout = index.layouts[entry.layout_fingerprint]
    session = Session(number, layout, entry.block_tokens, active=entry.active)
    leases.sessions[number] = session
    for request in entry.requests:
        places = np.frombuffer(request.places, "<u4")
        leases.restore_request(
            session, request.request_id, request.grant, np.sort(rows[places - 1])
        )


def _restore_detached(contents: Contents, residency: Residency, rows: Rows) -> None:
    for entry in contents.detached:
        tenant = residency.tenant_slot(TenantId(entry.tenant))
        slot = DetachedSlot(entry.page, entry.num_bytes, tenant, entry.wipe)
        residency.restore_detached(int(rows[entry.place - 1]) if entry.place else NO_ROW, slot)
