"""The registry of a node of its own: LMDB in the state directory. No other process may change it.

What is in the file is in `database`. It is written in a pool of one thread; the state that everybody reads
is rebuilt at open and replaced on the event loop once a commit is durable.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from kvfabric.errors import ClosedError
from kvfabric.registry import audit
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.base import Change, Registry, RegistryStatus
from kvfabric.registry.changes import Draft
from kvfabric.registry.database import FLEET, Database
from kvfabric.registry.state import RegistryState

Result = TypeVar("Result")


class EmbeddedRegistry(Registry):
    """See the module. `wall_clock`: Unix seconds, for the audit log."""

    def __init__(self, directory: Path, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = Database(directory)
        self.wall_clock = wall_clock
        self._pool: ThreadPoolExecutor | None = None
        self._state = RegistryState()
        self._head = audit.FIRST_HEAD
        self._sequence = 0
        self._news = asyncio.Event()
        self._writing: asyncio.Future[bytes] | None = None

    def __repr__(self) -> str:
        state = self._state
        return f"<EmbeddedRegistry {state.registry_id.hex()[:8]} version {state.version}>"

    async def __aenter__(self) -> Self:
        """Open or make it. Raises ConfigError if it is not ours, Conflict if the audit log does not hold."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvfabric-registry")
        try:
            loop = asyncio.get_running_loop()
            opened = await loop.run_in_executor(self._pool, self._open)
        except BaseException:
            self._pool.shutdown(wait=True)
            raise
        self._state, self._head, self._sequence = opened
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Ends after the commit under way, if there is one."""
        assert self._pool is not None
        self._pool.submit(self._database.close)
        pool, self._pool = self._pool, None
        pool.shutdown(wait=True)

    @property
    def state(self) -> RegistryState:
        return self._state

    async def wait_newer(self, version: int) -> RegistryState:
        while self._state.version <= version:
            await self._news.wait()
        return self._state

    async def commit(
        self, decide: Callable[[RegistryState], Draft[Result]], requested_by: str
    ) -> tuple[Result, Change]:
        # One change at a time. The future belongs to nobody who could be cancelled: a change that was
        # handed to the disk is published when it is durable, whether or not its caller still waits.
        while self._writing is not None:
            await asyncio.wait([self._writing])
        if self._pool is None:
            raise ClosedError("the registry is closed")
        draft = decide(self._state)
        record = self._record(draft, requested_by)
        writing = asyncio.get_running_loop().run_in_executor(
            self._pool, self._database.write, self._state, draft.state, record
        )
        self._writing = writing
        writing.add_done_callback(lambda done: self._written(done, draft.state))
        await asyncio.wait([writing])
        head = writing.result()
        change = Change(
            draft.action, draft.scope, draft.old_epoch, draft.new_epoch, draft.state.version, head
        )
        return draft.result, change

    async def audit_log(self) -> list[AuditRecord]:
        if self._pool is None:
            raise ClosedError("the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._database.verified_audit_log
        )

    async def put_receipt_row(self, receipt_id: str, key: str, row: bytes) -> None:
        await self._in_pool(self._database.put_receipt_row, receipt_id, key, row)

    async def receipt_rows(self, receipt_id: str) -> dict[str, bytes]:
        return await self._in_pool(self._database.receipt_rows, receipt_id)

    async def _in_pool(self, work: Callable[..., Result], *arguments: object) -> Result:
        if self._pool is None:
            raise ClosedError("the registry is closed")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, work, *arguments)

    @property
    def status(self) -> RegistryStatus:
        return RegistryStatus("embedded", "serving")

    def _open(self) -> tuple[RegistryState, bytes, int]:
        opened = self._database.open(create=True)
        if self._database.note(FLEET):
            self._database.put_notes({FLEET: b""})
        return opened

    def _record(self, draft: Draft[Any], requested_by: str) -> AuditRecord:
        return AuditRecord(
            sequence=self._sequence + 1,
            at=self.wall_clock(),
            who=requested_by,
            action=draft.action,
            scope=draft.scope,
            detail=draft.detail,
            old_epoch=draft.old_epoch,
            new_epoch=draft.new_epoch,
            version=draft.state.version,
        )

    def _written(self, done: asyncio.Future[bytes], state: RegistryState) -> None:
        self._writing = None
        if done.cancelled() or done.exception() is not None:
            return
        self._state, self._head, self._sequence = state, done.result(), self._sequence + 1
        news, self._news = self._news, asyncio.Event()
        news.set()
