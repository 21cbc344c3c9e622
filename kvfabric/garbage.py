"""When node and router collect cyclic garbage: often and little, in turns of the event loop.

Left alone, Python looks at young objects by the seven hundred, and every so often at all that survived: 3 to
6 ms of a busy node, in the middle of a request. Here young objects are looked at every `YOUNG_S`, while they
are few. What is there when the process has started is never looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Iterator

YOUNG_S = 0.1
MIDDLE_EVERY, ALL_EVERY = 10, 6000
"""Of the young collections one also takes in what survived once, and one everything (each ten minutes)."""
MAX_YOUNG = 20_000
"""Python collects by itself when so many were made meanwhile: a loop that has no turn to give."""


@contextlib.contextmanager
def own_schedule() -> Iterator[None]:
    """Python's own schedule comes back at the end. Enter it when everything long-lived is there."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(MAX_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def collect(turn: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled. `turn` is awaited before each collection."""
    count = 0
    while True:
        await asyncio.sleep(YOUNG_S)
        await turn()
        count += 1
        gc.collect(_generation(count))


def _generation(count: int) -> int:
    if count % ALL_EVERY == 0:
        return 2
    return 1 if count % MIDDLE_EVERY == 0 else 0
