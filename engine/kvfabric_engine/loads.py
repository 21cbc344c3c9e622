"""Loads: parts from the arena into the pool, verified and confirmed, on the connector's load thread.

    by the CPU    locate -> read into staging, checksums -> confirm -> scatter          here
    on a GPU      DMA from the arena, verified where it lands                           `direct_load`

Only verified, confirmed bytes reach the pool, in the order of the chain, but for an engine that computes
layers as they come (`begun`). Knows no futures and no threads: the Connector calls `run` on its load thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvfabric.client import NodeClient
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.types import BlockKey, MissReason
from kvfabric_engine.audit import PartAudit
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.direct_load import LOCATE_BYTES, DirectLoads, NodeCalls, parts_of
from kvfabric_engine.node_link import NodeLink
from kvfabric_engine.options import GROUP, ConnectorOptions
from kvfabric_engine.staging import Fence, LayerArrival, Mover, Pages

STAGING_BYTES = 64 << 20
"""Read, verified and confirmed at once by a load that the CPU copies: each time asks the node once."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The first `num_blocks` blocks asked for are in the pool; what else was asked for is untouched."""

    num_blocks: int
    reason: MissReason
    seconds: float = 0.0
    """From when the load's turn came."""
    num_borrowed: int = 0
    """Of the blocks: out of another engine's HBM."""
    num_stale: int = 0
    """Looked for there in vain."""


@dataclass(slots=True)
class LoadTask:
    """`keys` of a request into the pool's `blocks`. `num_loaded` rises as they come, also if `run` raises."""

    request_id: str
    keys: Sequence[BlockKey]
    blocks: Sequence[Pages]
    fence: Fence
    """Behind what had the pages before."""
    in_place: bool = False
    """Blocks that are not loaded may hold anything after it."""
    begun: Callable[[LayerArrival], None] | None = None
    num_loaded: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """A task under way: on which connection, and until when (monotonic seconds)."""

    task: LoadTask
    client: NodeClient
    deadline: float

    def left_s(self) -> float:
        """Until the deadline, never quite zero: the call itself decides that it is late."""
        return max(0.001, self.deadline - time.monotonic())


class Loads:
    """Of one Connector; one thread."""

    def __init__(
        self,
        options: ConnectorOptions,
        *,
        link: NodeLink,
        mover: Mover,
        num_layers: int,
        boundary: Boundary,
        audit: PartAudit | None,
    ) -> None:
        self._options = options
        self._link = link
        self._mover = mover
        self._num_layers = num_layers
        self._boundary = boundary
        self._audit = audit
        self._staging: list[memoryview] = []
        self.direct: DirectLoads | None = None
        """Of the connection; changes while nobody uses the client."""

    def run(self, task: LoadTask) -> Loaded:
        """Blocks until the pool has what can be had. Raises what ends the load early."""
        started, borrowed = time.monotonic(), (0, 0)
        with self._link.use() as client:
            task.fence.wait()
            call = _Call(task, client, started + self._options.deadlines.load_s)
            if self.direct is None:
                reason = self._copy(call)
            else:
                before = self.direct.landing.borrowed.counts
                reason = self._run_direct(self.direct, call)
                after = self.direct.landing.borrowed.counts
                borrowed = after[0] - before[0], after[1] - before[1]
                if task.num_loaded < len(task.keys):
                    self._boundary.count(reason)
            if reason is MissReason.CORRUPT and task.num_loaded < len(task.keys):
                self._recheck(call, task.keys[task.num_loaded])
        return Loaded(task.num_loaded, reason, time.monotonic() - started, *borrowed)

    def _run_direct(self, direct: DirectLoads, call: _Call) -> MissReason:
        task, size = call.task, self._mover.part_bytes
        calls = self._node_calls(direct, call)
        if not task.in_place:
            return direct.run(calls, task.blocks, size)
        return direct.run_in_place(calls, task.blocks, size, self._num_layers, task.begun)

    def _copy(self, call: _Call) -> MissReason:
        task = call.task
        reason, step = MissReason.NONE, max(1, LOCATE_BYTES // self._mover.part_bytes)
        while task.num_loaded < len(task.keys):
            done = task.num_loaded
            wanted = task.keys[done : done + step]
            located = self._locate(call, wanted)
            reason = MissReason(located.reason or MissReason.NONE)
            for count, found in self._read(call, done, located):
                self._record(call, task.num_loaded, count)
                task.num_loaded += count
                reason = found if found is not MissReason.NONE else reason
            if task.num_loaded < done + len(wanted):
                self._boundary.count(reason)
                break
        return reason

    def _read(self, call: _Call, first: int, located: Located) -> Iterator[tuple[int, MissReason]]:
        """Parts located for the blocks from `first` on -> pool by the CPU, as many at a time as staging
        holds; how many came each time, and why the last time not all did."""
        staging = self._staging_buffers()
        for start in range(0, located.num_blocks, len(staging)):
            part = parts_of(located, start, min(start + len(staging), located.num_blocks))
            usable, reason = self._take(call, first + start, part)
            places = call.task.blocks[first + start : first + start + usable]
            self._mover.scatter(staging[:usable], places)
            yield usable, reason
            if usable < part.num_blocks:
                return

    def _take(self, call: _Call, first: int, located: Located) -> tuple[int, MissReason]:
        """Parts -> staging; how many leading ones are verified, confirmed and so usable."""
        reason = MissReason.NONE
        good = call.client.read(located, self._staging) if located.num_blocks else 0
        if good < located.num_blocks:
            reason = MissReason.CORRUPT
        if good == 0:
            return 0, reason
        confirmed = self._confirm(call, call.task.keys[first : first + good], located)
        if confirmed.num_blocks < good:
            reason = MissReason(confirmed.reason or MissReason.EXPIRED)
        return min(good, confirmed.num_blocks), reason

    def _node_calls(self, direct: DirectLoads, call: _Call) -> NodeCalls:
        """What a direct load asks of the node, and what it tells us."""
        task = call.task

        def locate(first: int, count: int) -> Located:
            return self._locate(call, task.keys[first : first + count])

        def confirm(first: int, located: Located) -> Confirmed:
            return self._confirm(call, task.keys[first : first + located.num_blocks], located)

        def read(first: int, located: Located) -> tuple[int, MissReason]:
            found = list(self._read(call, first, located))
            return sum(count for count, _ in found), found[-1][1]

        def landed(first: int, count: int) -> None:
            task.num_loaded = first + count
            if self._audit is not None:
                direct.landing.wait()
                self._record(call, first, count)

        return NodeCalls(locate, confirm, read, landed)

    def _locate(self, call: _Call, keys: Sequence[BlockKey]) -> Located:
        return call.client.load(
            call.task.request_id,
            keys,
            group=GROUP,
            shard=self._options.shard,
            deadline_s=call.left_s(),
        )

    def _confirm(self, call: _Call, keys: Sequence[BlockKey], located: Located) -> Confirmed:
        return call.client.confirm(
            call.task.request_id,
            keys,
            located,
            group=GROUP,
            shard=self._options.shard,
            deadline_s=call.left_s(),
        )

    def _recheck(self, call: _Call, key: BlockKey) -> None:
        """Have the node look at a block that did not verify here, or every hit on it would fail."""
        self._boundary.run(
            "recheck",
            lambda: call.client.recheck(
                call.task.request_id,
                [key],
                group=GROUP,
                shard=self._options.shard,
                deadline_s=self._options.deadlines.control_s,
            ),
            lambda _: None,
        )

    def _record(self, call: _Call, first: int, count: int) -> None:
        if self._audit is None:
            return
        keys = call.task.keys[first : first + count]
        places = call.task.blocks[first : first + count]
        digests = self._audit.digests(places, after=self._mover.fence())
        self._audit.write("load", call.client.session, keys, self._options.shard, digests)

    def _staging_buffers(self) -> list[memoryview]:
        """Host buffers of one part each."""
        if not self._staging:
            size = self._mover.part_bytes
            count = max(1, STAGING_BYTES // size)
            whole = self._mover.host_buffer(count * size)
            self._staging = [whole[i * size : (i + 1) * size] for i in range(count)]
        return self._staging
