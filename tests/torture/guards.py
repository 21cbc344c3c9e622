"""Changes to a node before it starts: a disk that lies, and guards taken out for the twins of a proof."""

from __future__ import annotations

import base64
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from kvfabric import handle as handles
from kvfabric.daemon import fetching, grants
from kvfabric.daemon.node import Node
from kvfabric.daemon.sessions import Process, Session, Sessions
from kvfabric.failpoints import failpoint
from kvfabric.handle import Handle
from kvfabric.protocol.messages import Confirmed
from kvfabric.registry.lease import EpochLease
from kvfabric.registry.state import RegistryState
from kvfabric.store import policy
from kvfabric.store.access import Access
from kvfabric.store.index import packed_keys
from kvfabric.store.lease import LeaseBook, Request
from kvfabric.store.reading import Reader
from kvfabric.tiers import direct_io
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import PAGE_BYTES
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import DEFAULT_TENANT, KEY_BYTES, MissReason


def volatile() -> None:
    """Power may fail: what is written reaches the file at the next sync of it, and not before."""
    pending: dict[int, list[tuple[memoryview, int]]] = {}
    pwritev, close = FileOps.pwritev, FileOps.close

    def keep(_: FileOps, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        num_bytes = sum(map(len, buffers))
        copy = direct_io.aligned_buffer(num_bytes)
        copy[:num_bytes] = b"".join(buffers)
        pending.setdefault(fd, []).append((copy[:num_bytes], offset))
        return num_bytes

    def flushed(sync: Callable[[FileOps, int], None]) -> Callable[[FileOps, int], None]:
        def flush_and_sync(ops: FileOps, fd: int) -> None:
            for data, offset in pending.pop(fd, ()):
                pwritev(ops, fd, [data], offset)
            sync(ops, fd)

        return flush_and_sync

    def forget_and_close(ops: FileOps, fd: int) -> None:
        pending.pop(fd, None)
        close(ops, fd)

    FileOps.pwritev = keep  # type: ignore[method-assign, assignment]
    FileOps.fdatasync = flushed(FileOps.fdatasync)  # type: ignore[method-assign, assignment]
    FileOps.fsync = flushed(FileOps.fsync)  # type: ignore[method-assign, assignment]
    FileOps.close = forget_and_close  # type: ignore[method-assign, assignment]


def torn() -> None:
    """Every write of records loses the last page that it should have written, and nobody is told."""
    pwritev = FileOps.pwritev

    def tear(ops: FileOps, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        whole = b"".join(buffers)
        kept = direct_io.aligned_buffer(max(len(whole) - PAGE_BYTES, PAGE_BYTES))
        kept[:] = whole[: len(kept)]
        pwritev(ops, fd, [kept], offset)
        return len(whole)

    FileOps.pwritev = tear  # type: ignore[method-assign, assignment]


def no_checksum() -> None:
    """Guard out: what comes from SSD is believed."""
    SegmentTier._verify = lambda *_: None  # type: ignore[method-assign]


def index_first() -> None:
    """Guard out: the index is committed before the bytes it speaks of are written."""

    async def make_durable(tier: SegmentTier, plan: Any) -> Any:
        decided = await tier._commit_index(plan)
        failpoint("segment.appended")
        await tier._write_data(plan)
        await tier._sync_data(plan)
        return decided

    SegmentTier._make_durable = make_durable  # type: ignore[method-assign, assignment]


def no_sync() -> None:
    """Guard out: bytes are not synced before the index speaks of them."""

    async def nothing(*_: Any) -> None: ...

    SegmentTier._sync_data = nothing  # type: ignore[method-assign, assignment]


def no_exit_watch() -> None:
    """Guard out: the exit of a process is no news."""

    def only_stop_watching(sessions: Sessions, _: Session, process: Process) -> None:
        sessions._unwatch(process)

    Sessions._exited = only_stop_watching  # type: ignore[method-assign, assignment]


def time_frees() -> None:
    """Guard out: a lease that has ended keeps nothing where it is."""
    lapse = LeaseBook._lapse

    def lapse_and_free(leases: LeaseBook, request: Request) -> None:
        rows = request.rows
        lapse(leases, request)
        if len(rows):
            leases._drop_lapsed(rows)
            leases._residency.unhold(rows)
            request.rows = rows[:0]

    LeaseBook._lapse = lapse_and_free  # type: ignore[method-assign, assignment]


def goes_on() -> None:
    """Guard out: a node that handed over serves its engines on."""

    def go_on(node: Node) -> None:
        node.store.thaw()
        node.engines.thaw()

    Node.hand_over = go_on  # type: ignore[method-assign, assignment]


def forgets_nothing() -> None:
    """Guard out: a session that has ended is kept, and what it has open."""
    Sessions._settle = lambda *_: None  # type: ignore[method-assign]


def no_salt() -> None:
    """Guard out: nothing of the tenant enters keys. All have the secret and the name of one."""
    key = grants._namespace_key
    grants._namespace_key = lambda services, tenant, weights: key(services, DEFAULT_TENANT, weights)


def no_lineage() -> None:
    """Guard out: a key alone decides who may have a block."""
    readable = Reader._readable

    def by_key_alone(reader: Reader, rows: Any, _: Any, *rest: Any) -> Any:
        return readable(reader, rows, reader._index.lineage.array[rows], *rest)

    Reader._readable = by_key_alone  # type: ignore[method-assign, assignment]


def no_fence() -> None:
    """Guard out: neither an epoch that moved nor a version that was withdrawn refuses anything."""
    RegistryState.fence_reason = lambda *_: MissReason.NONE  # type: ignore[method-assign]


def no_pins() -> None:
    """Guard out: which blocks could go is asked without regard to pins."""
    setattr(policy, "PINNED", 0)  # noqa: B010


def no_lease() -> None:
    """Guard out: what was last heard of the epochs is believed for ever."""
    EpochLease.allows = lambda _, state: state is not None  # type: ignore[method-assign, assignment]


def no_store_fence() -> None:
    """Guard out: what was reserved is committed, whatever changed since."""
    Access.to_store = lambda *_: ""  # type: ignore[method-assign]


def no_confirmation() -> None:
    """Guard out: what was located once may be used, if it is still there."""

    def confirm(reader: Reader, session: Any, request_id: str, keys: bytes, *_: Any) -> Confirmed:
        known = reader._leases.find(session, request_id) is not None
        return Confirmed(len(keys) // KEY_BYTES if known else 0, MissReason.NONE.value)

    Reader.confirm = confirm  # type: ignore[method-assign, assignment]


def no_generation() -> None:
    """Guard out: a confirmation does not look at whether the slot is still the one that was read."""
    confirm = Reader.confirm

    def by_rights_alone(
        reader: Reader, session: Any, request_id: str, keys: bytes, _: bytes, part: Any
    ) -> Confirmed:
        index = reader._index
        parts = index.parts(index.lookup(packed_keys(keys)), 0)
        now = index.part_generation.array[parts].astype("<u4").tobytes()
        return confirm(reader, session, request_id, keys, now, part)

    Reader.confirm = by_rights_alone  # type: ignore[method-assign, assignment]


def clocks_jump() -> None:
    """The wall clock is set again and again, by minutes, forward and back."""
    now, chance = time.time, random.Random(os.getpid())
    offset, until = 0.0, 0.0

    def jumping() -> float:
        nonlocal offset, until
        if time.monotonic() >= until:
            until = time.monotonic() + chance.uniform(0.05, 0.5)
            offset = chance.uniform(-300.0, 300.0)
        return now() + offset

    time.time = jumping


def no_signature() -> None:
    """Guard out: who signed a handle is not asked."""

    def believe(text: str, keys: Mapping[int, bytes]) -> tuple[bytes, int]:
        body = base64.urlsafe_b64decode(text + "==")[: -handles.MAC_BYTES]
        return body, msgspec.msgpack.decode(body)[1]

    handles._verify = believe


def _opened_with(change: Callable[[Handle], dict[str, Any]]) -> None:
    open_handle = handles.open_handle

    def opened(text: str, keys: Mapping[int, bytes], **asked: Any) -> Handle:
        body, _ = handles._verify(text, keys)
        return open_handle(text, keys, **asked | change(handles._DECODER.decode(body)))

    handles.open_handle = opened


def no_audience() -> None:
    """Guard out: a handle counts for whatever engine session shows it."""
    _opened_with(lambda handle: {"audience": handle.audience})


def no_expiry() -> None:
    """Guard out: a handle counts for ever."""
    _opened_with(lambda handle: {"now": handle.expires_at - 1})


def no_request() -> None:
    """Guard out: a handle counts for any request."""
    open_handle = handles.open_handle

    def opened(text: str, keys: Mapping[int, bytes], **asked: Any) -> Handle:
        return replace(open_handle(text, keys, **asked), request_id="")

    handles.open_handle = opened


def _is_out() -> bool:
    """Guards of a running fleet are taken out and put back: they are out while this file is there."""
    return Path(os.environ["KVFABRIC_GUARDS_OUT"]).exists()


def waits_for_peers() -> None:
    """Guard that can be taken out: a peer that does not say at once what it has is not waited for."""
    hold, answer_s = fetching.Fetches._hold, fetching.ANSWER_S

    async def held(fetches: Any, *asked: Any) -> Any:
        fetching.ANSWER_S = 60.0 if _is_out() else answer_s
        return await hold(fetches, *asked)

    fetching.Fetches._hold = held  # type: ignore[method-assign, assignment]


def asks_the_dead() -> None:
    """Guard that can be taken out: an engine that failed is asked no more, by this request nor by others."""
    from kvfabric_router import proxy
    from kvfabric_router.fleet import Fleet

    exclude, attempts, number = Fleet._exclude, proxy.Proxy._attempts, proxy.MAX_ATTEMPTS

    def excluded(fleet: Fleet, engine: Any) -> None:
        if not _is_out():
            exclude(fleet, engine)

    async def attempted(*call: Any) -> Any:
        proxy.MAX_ATTEMPTS = 1 if _is_out() else number
        return await attempts(*call)

    Fleet._exclude = excluded  # type: ignore[method-assign, assignment]
    proxy.Proxy._attempts = attempted  # type: ignore[method-assign, assignment]


def only_listens() -> None:
    """Guard out: a router that hears nothing of a node does not ask whether it is there."""
    from kvfabric_router import nodes

    kept = [one for one in nodes._CHANNEL_OPTIONS if "keepalive" not in one[0]]
    setattr(nodes, "_CHANNEL_OPTIONS", tuple(kept))  # noqa: B010


_OF_DISKS = (volatile, torn, no_checksum, index_first, no_sync)
_OF_DAEMONS = (no_exit_watch, time_frees, goes_on, forgets_nothing)
_OF_TENANTS = (no_salt, no_lineage, no_pins)
_OF_VERSIONS = (no_fence, no_lease, no_store_fence, no_confirmation, no_generation, clocks_jump)
_OF_HANDLES = (no_signature, no_audience, no_expiry, no_request)
_OF_FLEETS = (waits_for_peers, asks_the_dead, only_listens)
CHANGES: dict[str, Callable[[], None]] = {
    change.__name__: change
    for change in (
        *_OF_DISKS,
        *_OF_DAEMONS,
        *_OF_TENANTS,
        *_OF_VERSIONS,
        *_OF_HANDLES,
        *_OF_FLEETS,
    )
}
