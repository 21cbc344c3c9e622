"""What a tier is: a medium on one node that keeps parts by identity and gives them back unchanged.

Owns the interface and its nouns, no I/O. The store calls it; `kvfabric.testing.tiers.TierTests` is its
conformance suite: a new tier is one file here and one subclass there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from kvfabric.types import BlockKey, Part, TenantId


@dataclass(frozen=True, slots=True)
class PartIdentity:
    """Everything that says whose bytes these are: stored beside them, compared at every read.

    `namespace_tag` 8 B, `layout_fingerprint` 32 B, `parent` 32 B (zeros for a first block);
    `incarnations`: 16 B each, of every segment that begins at or before this block, in prompt order;
    `num_bytes`: the payload's length; `checksum`: its XXH3-128 digest, 16 B.
    """

    part: Part
    namespace_tag: bytes
    tenant: TenantId
    layout_fingerprint: bytes
    parent: BlockKey
    block_index: int
    incarnations: tuple[bytes, ...]
    num_bytes: int
    checksum: bytes


class Location(NamedTuple):
    """Where a tier keeps a part. A location is never used for other bytes once it was given up."""

    file: int
    """Small number, fits a u32."""

    offset: int
    """Bytes, a multiple of 4096."""


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Bytes are what the medium holds, record headers and padding included.

    `live_bytes` + `dead_bytes` = `used_bytes` <= `capacity_bytes`. Dead: deleted, superseded,
    quarantined, or spent on the files themselves; still charged until the medium reclaims them.
    """

    capacity_bytes: int
    used_bytes: int
    live_bytes: int
    dead_bytes: int
    records: int
    quarantined: int
    tenant_live_bytes: Mapping[TenantId, int]
    tenant_dead_bytes: Mapping[TenantId, int]


class Tier(ABC):
    """An async context manager: entering recovers what the medium holds, leaving seals and closes.

    Used from one event loop. Sync methods are atomic there and do no file I/O of their own.
    """

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def records(self) -> Iterator[tuple[PartIdentity, Location]]:
        """What is sealed, newest version of each part, in no order. Lazy."""

    @abstractmethod
    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        """Keep `payload` (`identity.num_bytes` long); returns once it survives a crash.

        A part written again replaces the older one. The payload must not change until this returns.
        Raises NoSpace, TransferError (the medium failed), LocalProtocolError (a malformed identity).
        On cancellation: the payload is no longer in use when CancelledError leaves, and nothing of it
        stays stored.
        """

    @abstractmethod
    async def read_into(
        self, location: Location, identity: PartIdentity, buffer: memoryview
    ) -> None:
        """Fill `buffer[:identity.num_bytes]` with the part at `location`, verified.

        Anything else than exactly this identity with exactly its bytes raises CorruptBlock, and the
        part is quarantined: gone from the tier, counted. TransferError: the medium failed, or no
        longer has the location. After an error the buffer holds bytes of no meaning. On cancellation
        likewise, and it is no longer in use when CancelledError leaves.
        """

    @abstractmethod
    def delete(self, parts: list[Part]) -> None:
        """Forget parts; unknown ones are ignored. Their bytes are dead, and charged, until reclaimed.

        Durable with the next group of writes, or at close: a crash before that brings them back.
        """

    @abstractmethod
    def statistics(self) -> TierStatistics: ...
