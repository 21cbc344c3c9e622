"""Bytes from windows into the arena, checksummed in the same pass, and checksums of what lies there.

The blocking functions run in the store's pool; numpy's copy and xxhash's update release the interpreter
lock. The checksum is taken of the slot's bytes, not of the window's: an engine that writes its window
while it is copied spoils its own block and is found out, not believed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from kvfabric.tiers.arena import PAGE_BYTES, slot_bytes

CHUNK_BYTES = 256 * 1024
"""Copied, then checksummed while the cache still has it."""

MIN_BATCH_BYTES = 1024 * 1024
"""Less work than this is not worth a second thread."""

Bytes = npt.NDArray[np.uint8]


def checksum(data: memoryview) -> bytes:
    """XXH3-128 of a part, 16 B big-endian."""
    digest: bytes = xxhash.xxh3_128_digest(data)
    return digest


def copy_parts(
    window: memoryview, arena: memoryview, offsets: list[int], pages: list[int], num_bytes: int
) -> bytes:
    """Copy parts of `num_bytes` from window `offsets` to slots; returns their checksums, packed.

    What a slot has beyond `num_bytes` is zeroed: it may hold another tenant's bytes, and goes to SSD.
    """
    source: Bytes = np.frombuffer(window, dtype=np.uint8)
    target: Bytes = np.frombuffer(arena, dtype=np.uint8)
    size = slot_bytes(num_bytes)
    sums = []
    for offset, page in zip(offsets, pages, strict=True):
        slot = target[page * PAGE_BYTES : page * PAGE_BYTES + size]
        sums.append(_copy(source[offset : offset + num_bytes], slot[:num_bytes]))
        if size > num_bytes:
            slot[num_bytes:] = 0
    return b"".join(sums)


def _copy(source: Bytes, target: Bytes) -> bytes:
    if len(source) <= CHUNK_BYTES:
        np.copyto(target, source)
        return checksum(target.data)
    state = xxhash.xxh3_128()
    for start in range(0, len(source), CHUNK_BYTES):
        chunk = target[start : start + CHUNK_BYTES]
        np.copyto(chunk, source[start : start + CHUNK_BYTES])
        state.update(chunk.data)
    digest: bytes = state.digest()
    return digest


def corrupt_parts(
    arena: memoryview, pages: list[int], lengths: list[int], checksums: bytes
) -> list[int]:
    """Positions of those parts whose bytes do not have their checksum (16 B each, packed) any more."""
    digest = xxhash.xxh3_128_digest
    return [
        position
        for position, (page, length) in enumerate(zip(pages, lengths, strict=True))
        if digest(arena[page * PAGE_BYTES : page * PAGE_BYTES + length])
        != checksums[16 * position : 16 * position + 16]
    ]


def zero_slots(arena: memoryview, slots: list[tuple[int, int]]) -> None:
    """Zero slots, each (first page, bytes)."""
    target: Bytes = np.frombuffer(arena, dtype=np.uint8)
    for page, num_bytes in slots:
        target[page * PAGE_BYTES : page * PAGE_BYTES + num_bytes] = 0


def batch_bounds(count: int, num_bytes: int, threads: int) -> list[int]:
    """Cut `count` parts of `num_bytes` into at most `threads` nearly equal ranges."""
    batches = max(1, min(threads, count, count * num_bytes // MIN_BATCH_BYTES))
    return [count * batch // batches for batch in range(batches + 1)]
