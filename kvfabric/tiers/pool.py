"""Threads for blocking work on buffers that somebody else owns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def finished(*futures: asyncio.Future[T]) -> None:
    """Wait until all are done, whatever they return, putting cancellation off until then."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        for future in futures:
            with contextlib.suppress(asyncio.CancelledError):
                future.exception()  # seen: nobody else will look at it
        raise cancelled


class IoPool:
    """A bounded pool. A caller that is cancelled gets CancelledError only after its work ended, so
    that it can free the buffers it lent."""

    def __init__(self, threads: int, name: str, *, executor: Executor | None = None) -> None:
        """`executor`, if there is one, is the pool's own from now on, in place of threads."""
        self._executor = executor or ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        submitted = self._executor.submit(work)
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            if not submitted.cancel():  # a thread has it
                ended = asyncio.wrap_future(submitted)
                with contextlib.suppress(asyncio.CancelledError):
                    await finished(ended)
                ended.exception()  # seen: nobody else will look at it
            raise

    async def run_all(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Run side by side; when all have ended, returns the results or raises the first error."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._executor, work) for work in works]
        await finished(*futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    async def close(self) -> None:
        """Waits for work that is under way, on a thread of its own."""
        await finished(asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown))
