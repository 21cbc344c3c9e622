"""Arena -> engine buffers: copy and verify in one pass over the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from kvfabric.errors import LocalProtocolError, RemoteProtocolError
from kvfabric.protocol.messages import Located

_CHUNK_BYTES = 512 << 10
"""Copied, then hashed while still in the core's own cache."""
_SHARED_PART_BYTES = 64 << 10
"""Parts at least this long are shared out between two threads; below, handing over costs more."""

Bytes1D = npt.NDArray[np.uint8]


class PartReader:
    """Copies parts out of the arena and verifies what was copied. Thread-safe.

    Long parts are shared out between the caller and one helper thread, each copying and hashing chunks
    that stay in its core's cache; whoever is free takes the next part, so a busy core slows nobody.
    """

    def __init__(self, arena: memoryview) -> None:
        self._view = arena
        self._arena: Bytes1D = np.frombuffer(arena, dtype=np.uint8)
        self._helper: ThreadPoolExecutor | None = None

    def close(self) -> None:
        if self._helper is not None:
            self._helper.shutdown(wait=True)

    def read(self, located: Located, destinations: Sequence[memoryview]) -> int:
        """Number of leading parts whose bytes in `destinations` (one each, `part_bytes`) verified.

        Destinations after that hold anything. Raises RemoteProtocolError for a part outside the arena.
        """
        count = located.num_blocks
        if len(destinations) < count:
            raise LocalProtocolError(f"{count} parts were located for {len(destinations)} buffers")
        if any(buffer.nbytes != located.part_bytes for buffer in destinations[:count]):
            raise LocalProtocolError(f"each buffer must have the {located.part_bytes} B of a part")
        offsets = self._checked_offsets(located)
        if located.part_bytes < _SHARED_PART_BYTES or count < 2:
            return self._read_some(located, offsets, destinations, iter(range(count)), count)
        order = iter(range(count))  # shared: `next` of a range iterator is one step under the GIL
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, thread_name_prefix="kvfabric-read")
        other = self._helper.submit(self._read_some, located, offsets, destinations, order, count)
        theirs = count
        try:
            mine = self._read_some(located, offsets, destinations, order, count)
        finally:
            # Cancelled: busy elsewhere (another load), so everything was done here. Whatever failed
            # here, nobody writes the buffers after this returns.
            if not other.cancel():
                theirs = other.result()
        return min(mine, theirs)

    def _checked_offsets(self, located: Located) -> list[int]:
        count = located.num_blocks
        offsets = np.frombuffer(located.offsets, dtype="<u8")
        if len(offsets) < count or len(located.checksums) < 16 * count:
            raise RemoteProtocolError(f"{count} parts located, but {len(offsets)} described")
        last = len(self._arena) - located.part_bytes
        if count and (last < 0 or int(offsets[:count].max()) > last):
            raise RemoteProtocolError("a located part lies outside the arena")
        found: list[int] = offsets[:count].tolist()
        return found

    def _read_some(
        self,
        located: Located,
        offsets: list[int],
        destinations: Sequence[memoryview],
        order: Iterator[int],
        count: int,
    ) -> int:
        """Read the parts that `order` yields; the first bad one, or `count`."""
        size = located.part_bytes
        checksums = located.checksums
        copy = self._copy_small if size < _SHARED_PART_BYTES else self._copy_chunks
        for index in order:
            digest = copy(offsets[index], size, destinations[index])
            if digest != checksums[16 * index : 16 * index + 16]:
                return index
        return count

    def _copy_small(self, offset: int, size: int, destination: memoryview) -> bytes:
        destination[:] = self._view[offset : offset + size]
        return xxhash.xxh3_128_digest(destination)

    def _copy_chunks(self, offset: int, size: int, destination: memoryview) -> bytes:
        target: Bytes1D = np.frombuffer(destination, dtype=np.uint8)
        source = self._arena[offset : offset + size]
        state = xxhash.xxh3_128()
        for start in range(0, size, _CHUNK_BYTES):
            chunk = target[start : start + _CHUNK_BYTES]
            np.copyto(chunk, source[start : start + _CHUNK_BYTES])  # releases the GIL
            state.update(chunk.data)
        return state.digest()
