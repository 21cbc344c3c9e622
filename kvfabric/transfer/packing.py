"""Parts as messages. A message costs both sides 20 us and more, whatever its size, so small parts travel
together. Those that are neighbours in an arena, as those of one commit are, travel from there and to there as
they are; others through a buffer, with one copy at the side where they are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

PACK_BELOW_BYTES = 256 << 10
PACKED_BYTES = 2 << 20
"""Parts smaller than `PACK_BELOW_BYTES` travel in messages of about this size."""


def parts_per_message(part_bytes: int) -> int:
    return max(1, PACKED_BYTES // part_bytes) if part_bytes < PACK_BELOW_BYTES else 1


def messages_of(
    arena: memoryview, offsets: Sequence[int], part_bytes: int, together: int
) -> list[list[memoryview]]:
    """The memory of each message of `together` parts, one after the other: a single view where they are
    neighbours. `offsets`: where each part lies, in bytes."""
    messages = []
    for first in range(0, len(offsets), together):
        views: list[memoryview] = []
        begin = end = offsets[first]
        for offset in offsets[first : first + together]:
            if offset != end:
                views.append(arena[begin:end])
                begin = offset
            end = offset + part_bytes
        views.append(arena[begin:end])
        messages.append(views)
    return messages


def gather(views: Iterable[memoryview], buffer: memoryview) -> bytes:
    """Copy `views` into `buffer`, one after the other; as long as all of them. Blocks, without the
    interpreter lock. Returns nothing of interest."""
    at, target = 0, np.frombuffer(buffer, dtype=np.uint8)
    for view in views:
        np.copyto(target[at : at + len(view)], np.frombuffer(view, dtype=np.uint8))
        at += len(view)
    return b""


def scatter(buffer: memoryview, views: Iterable[memoryview]) -> None:
    """The way back."""
    at, source = 0, np.frombuffer(buffer, dtype=np.uint8)
    for view in views:
        np.copyto(np.frombuffer(view, dtype=np.uint8), source[at : at + len(view)])
        at += len(view)


def cut(memory: memoryview, sizes: Iterable[int]) -> list[memoryview]:
    """Consecutive pieces of `memory`."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(memory[at : at + size])
        at += size
    return pieces
