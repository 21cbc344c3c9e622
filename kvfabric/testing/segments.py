"""SSD tiers small enough to watch, and what reaches their files behind their back."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvfabric.testing.tiers import make_part, read_back
from kvfabric.tiers.base import Flags, Location, Move, PartIdentity, RecordBatch
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import PAGE_BYTES as PAGE_BYTES
from kvfabric.tiers.records import record_bytes
from kvfabric.tiers.segment_file import path_of
from kvfabric.tiers.segments import SegmentTier
from kvfabric.tiers.write_budget import WriteBudget
from kvfabric.types import Part

MIB = 1 << 20
RECORD = 12 << 10
SMALL = PAGE_BYTES + 4 * record_bytes(RECORD)
"""Segment length in which four records of RECORD bytes of payload fit."""


class Owner:
    """Hears of everything; `wanted` are the parts it calls hot."""

    def __init__(self) -> None:
        self.gone: list[list[Part]] = []
        self.places: dict[Part, Location] = {}
        self.wanted: set[Part] = set()

    def hot(self, batch: RecordBatch) -> Flags:
        return np.array([batch.part(at) in self.wanted for at in range(len(batch))], dtype=np.bool_)

    def moved(self, moves: Sequence[Move]) -> None:
        self.places |= {move.part: move.new for move in moves}

    def dropped(self, records: Sequence[tuple[Part, Location]]) -> None:
        self.gone.append([part for part, _ in records])


def make_tier(
    directory: Path,
    *,
    kind: type[SegmentTier] = SegmentTier,
    capacity_bytes: int = 32 * MIB,
    segment_bytes: int = 0,
    ops: FileOps | None = None,
    budget: WriteBudget | None = None,
) -> SegmentTier:
    return kind(
        directory,
        capacity_bytes=capacity_bytes,
        segment_bytes=segment_bytes,
        clock=time.monotonic,
        budget=budget,
        ops=ops,
    )


def small_tier(
    directory: Path,
    *,
    kind: type[SegmentTier] = SegmentTier,
    files: int = 4,
    owner: Owner | None = None,
    ops: FileOps | None = None,
    budget: WriteBudget | None = None,
) -> SegmentTier:
    tier = make_tier(
        directory,
        kind=kind,
        capacity_bytes=files * SMALL,
        segment_bytes=SMALL,
        ops=ops,
        budget=budget,
    )
    tier.owner = owner
    return tier


def flip_bit(directory: Path, location: Location, at: int) -> None:
    """Flip a bit in byte `at` of a record (header page first), behind the tier's back."""
    with path_of(directory, location.file).open("r+b") as file:
        [byte] = os.pread(file.fileno(), 1, location.offset + at)
        os.pwrite(file.fileno(), bytes([byte ^ 4]), location.offset + at)


async def write_parts(
    tier: SegmentTier, seeds: range, num_bytes: int = RECORD
) -> dict[PartIdentity, Location]:
    """Each in a group of its own."""
    return {
        identity: await tier.write(identity, payload)
        for identity, payload in (make_part(seed, num_bytes) for seed in seeds)
    }


async def readable(tier: SegmentTier, num_bytes: int = RECORD) -> list[int]:
    """Seeds of all parts that the tier lists; each must read back with the right bytes."""
    seeds = []
    for identity, location in list(tier.records()):
        seeds.append(identity.block_index)
        expected, payload = make_part(identity.block_index, num_bytes)
        assert identity == expected
        assert await read_back(tier, location, identity) == bytes(payload)
    return sorted(seeds)


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("seg-*"))
