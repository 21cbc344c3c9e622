"""A log of checksums: what the engine handed over and what it got back, taken from its own tensors.

One JSON line a part: {"op": "store" | "load", "key", "group", "shard", "checksum", "session"}, hex where it
is bytes; checksum is XXH3-128 of the part's bytes in the pool. A proof compares: every load has a store of
the same part and checksum. For tests and demos; each part is gathered once more for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import xxhash

from kvfabric.types import BlockKey
from kvfabric_engine.staging import Fence, Mover, Pages


class PartAudit:
    """Appends to one file. Thread-safe; a line is written whole."""

    def __init__(self, path: str, mover: Mover) -> None:
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115 - lives as long as the connector
        self._lock = threading.Lock()
        self._mover = mover

    def digests(self, blocks: Sequence[Pages], *, after: Fence) -> list[str]:
        """Checksums of blocks as they lie in the pool now."""
        buffer = self._mover.host_buffer(self._mover.part_bytes)
        found = []
        for pages in blocks:
            self._mover.gather([pages], [buffer], after=after)
            found.append(xxhash.xxh3_128_hexdigest(buffer))
        return found

    def write(
        self, op: str, session: bytes, keys: Sequence[BlockKey], shard: int, digests: Sequence[str]
    ) -> None:
        lines = [
            json.dumps(
                {
                    "op": op,
                    "key": key.hex(),
                    "group": 0,
                    "shard": shard,
                    "checksum": digest,
                    "session": session.hex(),
                }
            )
            for key, digest in zip(keys, digests, strict=True)
        ]
        with self._lock:
            self._file.write("".join(line + "\n" for line in lines))

    def close(self) -> None:
        self._file.close()
