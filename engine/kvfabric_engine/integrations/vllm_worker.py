"""A worker's half of the vLLM connector: moves bytes between vLLM's tensors and the node.

Loads run beside the step that orders them, on the connector's load thread. Nothing unverified touches the
tensors; what could not be loaded is zeroed and reported in the step that reports the load. Saves are of a
snapshot that is taken in the step that computed them, before vLLM may give the blocks to others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from kvfabric.protocol.messages import Role
from kvfabric.types import MissReason
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.connector import Connector, ConnectorOptions, Loaded, Saved
from kvfabric_engine.integrations.vllm_adapters import Adapter, LoadedAdapters, Weights
from kvfabric_engine.integrations.vllm_layout import NULL_BLOCK, VllmPool
from kvfabric_engine.integrations.vllm_messages import FabricMetadata, Join, LoadOrder, SaveOrder
from kvfabric_engine.pool_events import PoolEvents

_log = logging.getLogger("vllm.kvfabric")
WINDOW_BYTES = 256 << 20
_TOLD_ELSEWHERE = (MissReason.NODE_DOWN, MissReason.DEADLINE, MissReason.NO_PARENT)
JOIN_S = 1.0
"""Longest that the first step of a session waits for this worker's own connection."""


class Report(NamedTuple):
    """Loads that ended since the last report, and the blocks of them that hold nothing."""

    request_ids: set[str]
    failed_pages: set[int]


class WorkerSide:
    """`shard`: which part of a block these tensors hold; `is_writer`: whether this worker stores it."""

    def __init__(
        self,
        mover: VllmPool,
        *,
        shard: int,
        is_writer: bool,
        socket: str,
        audit_parts: str = "",
        adapters: LoadedAdapters | None = None,
    ) -> None:
        self._mover = mover
        self._adapters = adapters
        self._shard = shard
        self._is_writer = is_writer
        self._socket = socket
        self._audit_parts = audit_parts
        self._connector: Connector | None = None
        self._boundary = Boundary()
        self._told: set[MissReason] = set()
        self._done: queue.SimpleQueue[tuple[LoadOrder, int]] = queue.SimpleQueue()

    def __repr__(self) -> str:
        return f"<WorkerSide shard {self._shard}: {self._connector!r}>"

    @property
    def connector(self) -> Connector | None:
        return self._connector

    def begin(self, orders: FabricMetadata, *, is_before_step: bool) -> None:
        """Start this step's loads. Called once or more a step: orders are taken once."""
        reused, orders.reused = orders.reused, []
        self._mover.reused(reused)
        if self._adapters is not None:
            self._adapters.look()
        if orders.join is not None:
            join, orders.join = orders.join, None
            self._boundary.run("join", lambda: self._join(join), lambda _: None)
        if is_before_step and self._mover.loads_after_step:
            return
        loads, orders.loads = orders.loads, []
        for order in loads:
            self._load(order)

    def save(self, orders: FabricMetadata) -> None:
        """Store what this step computed, in the background."""
        saves, orders.saves = orders.saves, []
        if self._adapters is not None:
            self._adapters.look()
        if self._connector is None or not self._is_writer:
            return
        for order in saves:
            self._save(self._connector, order)

    def report(self) -> Report:
        """What ended since the last call. Each load is reported exactly once."""
        found = Report(set(), set())
        with contextlib.suppress(queue.Empty):
            while True:
                order, num_loaded = self._done.get_nowait()
                found.request_ids.add(order.request_id)
                failed = [page for pages in order.pages[num_loaded:] for page in pages]
                found.failed_pages.update(page for page in failed if page > NULL_BLOCK)
        if found.failed_pages:
            self._mover.zero(sorted(found.failed_pages))
        return found

    def loaded_adapters(self) -> dict[int, Weights] | None:
        """Those that vLLM holds, by id, if that is news."""
        return self._adapters.report() if self._adapters is not None else None

    def close(self) -> None:
        if self._adapters is not None:
            self._adapters.close()
        if self._connector is not None:
            self._connector.close()

    def _load(self, order: LoadOrder) -> None:
        """Whatever happens, the load is reported: vLLM would wait for it for ever."""
        self._boundary.run("load", lambda: self._begin_load(order), lambda _: self._fail(order))

    def _begin_load(self, order: LoadOrder) -> None:
        if self._connector is None or not order.keys or not self._has(order.adapter):
            self._fail(order)
            return
        future = self._connector.load(order.name, order.keys, order.pages)
        future.add_done_callback(self._on_loaded(order))
        self._connector.forget(order.name)

    def _fail(self, order: LoadOrder) -> None:
        self._done.put((order, 0))

    def _on_loaded(self, order: LoadOrder) -> Callable[[Future[Loaded]], None]:
        def ended(future: Future[Loaded]) -> None:
            loaded = future.result()
            if loaded.num_blocks < len(order.keys):
                self._tell("loaded", loaded.reason)
            self._done.put((order, loaded.num_blocks))

        return ended

    def _save(self, connector: Connector, order: SaveOrder) -> None:
        state = connector.statistics()
        if not state.is_up or state.saving_bytes > WINDOW_BYTES:
            return  # the cache is slower than the engine: not worth a copy
        if not self._has(order.adapter):
            return
        snapshot = self._mover.snapshot(order.pages)
        future = connector.save(
            order.name, order.parent, order.keys, order.pages, snapshot, handle=order.handle
        )

        def ended(future: Future[Saved]) -> None:
            self._mover.free(snapshot)
            saved = future.result()
            if saved.num_stored + saved.num_present < len(order.keys):
                self._tell("stored", saved.reason)

        future.add_done_callback(ended)
        connector.release(order.name)

    def _has(self, adapter: Adapter | None) -> bool:
        """Whether vLLM runs with the weights that the keys name."""
        if adapter is None:
            return True
        return self._adapters is not None and self._adapters.has(adapter)

    def _tell(self, what: str, reason: MissReason) -> None:
        """One line for each reason, but for what the connector said and for what follows from another."""
        if reason not in (*_TOLD_ELSEWHERE, *self._told):
            self._told.add(reason)
            _log.warning("fabric: blocks are not %s (%s); vLLM computes them", what, reason.value)

    def _join(self, join: Join) -> None:
        if self._connector is not None:  # what it was given ends in its own time
            threading.Thread(target=self._connector.close, name="kvf-end", daemon=True).start()
            self._connector = None
        if not join.session:
            return
        connector = Connector(
            ConnectorOptions(
                node_socket=self._socket,
                engine_id=join.engine_id,
                endpoint="",
                model=join.model,
                model_revision=join.model_revision,
                window_bytes=WINDOW_BYTES,
                shard=self._shard,
                role=Role.WORKER,
                session=join.session,
                audit_parts=self._audit_parts,
            ),
            layout=join.layout,
            mover=self._mover,
            events=PoolEvents(),
            on_thread=_use_all_cores,
        )
        connector.start()
        connector.wait_connected(JOIN_S)
        self._connector = connector


def _use_all_cores() -> None:
    """vLLM pins a worker's thread to one core, and what it starts inherits that."""
    with contextlib.suppress(
        OSError
    ):  # some systems forbid it: then copies share the worker's core
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
