"""What a tier is: a medium on one node that keeps parts by identity and gives them back unchanged.

Owns the interface and its nouns, no I/O. The store calls it; `kvfabric.testing.tiers.TierTests` is its
conformance suite: a new tier is one file here and one subclass there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from kvfabric.types import BlockKey, Part, TenantId

Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[Any]


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


class Lineage(NamedTuple):
    """What a block was stored under, beside its key: who owns it and what it was made of."""

    tenant: TenantId
    namespace_tag: bytes
    layout_fingerprint: bytes
    incarnations: tuple[bytes, ...]

    @property
    def names(self) -> tuple[bytes, ...]:
        """What a withdrawal may name it by: tenant, namespace, incarnations."""
        return (self.tenant.encode(), self.namespace_tag, *self.incarnations)


ROW = np.dtype(
    [
        ("offset", ">u8"),
        ("sequence", "<u8"),
        ("num_bytes", "<u8"),
        ("group", "<u4"),
        ("shard", "<u4"),
        ("block_index", "<u4"),
        ("lineage", "<u4"),
        ("is_live", "<u8"),
        ("key", "V32"),
        ("parent", "V32"),
        ("checksum", "V16"),
        ("check", "<u8"),
    ]
)
"""One record in a `RecordBatch`. `num_bytes` is the payload's; `check` is the index's own business."""


def distinct(numbers: npt.NDArray[Any]) -> set[int]:
    """The values in a vector that nearly always has one: a tenth of the time of np.unique then."""
    few = numbers[:1] if (numbers == numbers[:1]).all() else numbers
    return set(few.tolist())


@dataclass(frozen=True, slots=True, eq=False)
class RecordBatch:
    """Records of one file as a vector `rows` of `ROW`, by offset; `lineages` says what its numbers mean."""

    file: int
    rows: Rows
    lineages: Mapping[int, Lineage]

    def __len__(self) -> int:
        return len(self.rows)

    def used_lineages(self) -> set[int]:
        """Numbers of those that some record has."""
        return distinct(self.rows["lineage"])

    def chosen(self, which: npt.NDArray[Any] | slice) -> RecordBatch:
        """Those of a mask, an index vector or a slice."""
        return RecordBatch(self.file, self.rows[which], self.lineages)

    def location(self, at: int) -> Location:
        return Location(self.file, int(self.rows["offset"][at]))

    def part(self, at: int) -> Part:
        row = self.rows[at]
        return Part(BlockKey(row["key"].tobytes()), int(row["group"]), int(row["shard"]))

    def places(self) -> list[tuple[Part, Location]]:
        return [(self.part(at), self.location(at)) for at in range(len(self))]

    def identity(self, at: int) -> PartIdentity:
        row = self.rows[at]
        lineage = self.lineages[int(row["lineage"])]
        return PartIdentity(
            part=self.part(at),
            namespace_tag=lineage.namespace_tag,
            tenant=lineage.tenant,
            layout_fingerprint=lineage.layout_fingerprint,
            parent=BlockKey(row["parent"].tobytes()),
            block_index=int(row["block_index"]),
            incarnations=lineage.incarnations,
            num_bytes=int(row["num_bytes"]),
            checksum=row["checksum"].tobytes(),
        )


class Move(NamedTuple):
    """A record that was written anew elsewhere; the old place is about to be given up."""

    part: Part
    old: Location
    new: Location


class TierOwner(Protocol):
    """Who uses a tier, as the tier sees it. Called on the event loop; must not raise or block."""

    def hot(self, batch: RecordBatch) -> Flags:
        """Which of these live records are worth being written anew when their segment is reclaimed."""

    def moved(self, moves: Sequence[Move]) -> None:
        """Before the old places are given up. Parts that are no longer wanted are deleted by the owner."""

    def dropped(self, records: Sequence[tuple[Part, Location]]) -> None:
        """Gone with their segment, in slices; before its space is used again."""


class Scrubbed(NamedTuple):
    """Of one call of `Tier.scrub`: records and bytes that were read, records that could not be, the
    corrupt ones, and whether the end of the round was reached."""

    records: int
    num_bytes: int
    unreadable: int
    corrupt: tuple[tuple[Part, Location], ...]
    is_round: bool


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

    owner: TierOwner | None = None
    """Set once, before the first write."""

    @abstractmethod
    def batches(self) -> Iterator[RecordBatch]:
        """What is sealed and not deleted, in the order in which it was written. Lazy; each batch is as
        things stood when it was asked for. Of two records of one part the later has the higher sequence."""

    def records(self) -> Iterator[tuple[PartIdentity, Location]]:
        """As `batches`, one by one."""
        for batch in self.batches():
            for at in range(len(batch)):
                yield batch.identity(at), batch.location(at)

    @abstractmethod
    async def write(self, identity: PartIdentity, payload: memoryview) -> Location:
        """Keep `payload` (`identity.num_bytes` long); returns once it survives a crash.

        A part is not written again before it was deleted. The payload must not change until this returns.
        Raises NoSpace, QuotaExceeded (the write budget is spent), TransferError (the medium failed),
        LocalProtocolError (a malformed identity). On cancellation: the payload is no longer in use when
        CancelledError leaves, and nothing of it stays stored.
        """

    @abstractmethod
    async def read_into(
        self, location: Location, identity: PartIdentity, buffer: memoryview
    ) -> bytes:
        """Fill `buffer[:identity.num_bytes]` with the part at `location`, verified; its XXH3-128 digest.

        A medium that verifies otherwise may keep no checksum; then `records` have zeros for it, and so
        may `identity`.

        Anything else than exactly this identity with exactly its bytes raises CorruptBlock, and the
        part is quarantined: gone from the tier, counted. TransferError: the medium failed, or no
        longer has the location. After an error the buffer holds bytes of no meaning. On cancellation
        likewise, and it is no longer in use when CancelledError leaves.
        """

    @abstractmethod
    def delete(self, locations: Sequence[Location]) -> None:
        """Forget what lies there; unknown ones are ignored. Its bytes are dead, and charged, until
        reclaimed.

        Durable with the next group of writes, or at close: a crash before that brings them back.
        """

    @abstractmethod
    async def destroy(self, is_struck: Callable[[Lineage], bool]) -> int:
        """Have no byte left of what was ever written under such a lineage, deleted or not: whatever shares
        its place on the medium is written anew, as far as there is room, or told to be `dropped`.

        Returns the bytes of the medium that were given up, once that is durable. Nothing of such a lineage
        may be written meanwhile. Raises KVFabricError: something may be left. On cancellation it goes on.
        """

    @abstractmethod
    async def scrub(self, num_bytes: int, *, anew: bool = False) -> Scrubbed:
        """Verify about the next `num_bytes` at rest, from where the last call ended (`anew`: from the
        first on), to the end of the round at most. What is corrupt is quarantined. Raises KVFabricError.
        On cancellation: the rest of this call is not verified in this round.
        """

    @abstractmethod
    def statistics(self) -> TierStatistics: ...
