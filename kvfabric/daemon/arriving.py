"""From what a peer sent to what may be seen: every part opened, put where it belongs, and verified.

Pure functions over memory that the caller has; the slow ones are for a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvfabric.errors import CorruptBlock, PeerClosed
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.store.copying import checksum
from kvfabric.tiers.arena import slot_bytes
from kvfabric.transfer import sealing
from kvfabric.transfer.packing import cut, parts_per_message, scatter
from kvfabric.transfer.sealing import SEAL_BYTES
from kvfabric.types import KEY_BYTES


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive blocks from block `first` of the hold on, one part of each."""

    reservation: int
    first: int
    count: int
    group: int
    shard: int
    part_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.part_bytes


def check(sent: pb.Sent, chunk: Chunk, num_messages: int, *, is_sealed: bool) -> None:
    """Raises PeerClosed, CorruptBlock."""
    if not sent.there:
        raise PeerClosed(f"the peer does not have it any more: {sent.reason}")
    if sent.part_bytes != chunk.part_bytes or len(sent.checksums) != 16 * chunk.count:
        raise CorruptBlock(f"a peer sends parts of {sent.part_bytes} B")
    if is_sealed and not sent.key:
        raise CorruptBlock("a peer does not seal what it sends")
    if sent.key and len(sent.seals) != SEAL_BYTES * num_messages:
        raise CorruptBlock(f"a peer gives {len(sent.seals)} B of tags for {num_messages} messages")


def openers(
    hold: bytes,
    keys: bytes,
    chunk: Chunk,
    sent: pb.Sent,
    tags: Sequence[int],
    targets: Sequence[memoryview],
) -> Sequence[Callable[[], None]]:
    """What opens each message where it came. They raise CorruptBlock."""
    works = []
    step = parts_per_message(chunk.part_bytes) * KEY_BYTES
    first, end = chunk.first * KEY_BYTES, (chunk.first + chunk.count) * KEY_BYTES
    for number, (tag, target) in enumerate(zip(tags, targets, strict=True)):
        begin = first + number * step
        head = sealing.header(
            hold=hold,
            group=chunk.group,
            shard=chunk.shard,
            part_bytes=chunk.part_bytes,
            tag=tag,
            keys=keys[begin : min(begin + step, end)],
        )
        seal = sent.seals[SEAL_BYTES * number : SEAL_BYTES * (number + 1)]
        works.append(partial(sealing.open_in_place, sent.key, number, head, seal, target))
    return works


def settled(
    messages: Sequence[tuple[memoryview, Sequence[memoryview]]], part_bytes: int, checksums: bytes
) -> bytes:
    """Messages, each (where it came, where it belongs): to their places, and what lies there verified.
    Raises CorruptBlock."""
    parts: list[memoryview] = []
    for came, views in messages:
        if len(views) > 1:
            scatter(came, views)
        for view in views:
            parts += cut(view, [part_bytes] * (len(view) // part_bytes))
    return verified(parts, checksums)


def zero_rests(arena: memoryview, offsets: Sequence[int], part_bytes: int) -> None:
    """What a slot has beyond its part may be another tenant's, and goes to SSD."""
    rest = slot_bytes(part_bytes) - part_bytes
    if rest:
        for offset in offsets:
            arena[offset + part_bytes : offset + part_bytes + rest] = bytes(rest)


def verified(parts: Sequence[memoryview], checksums: bytes) -> bytes:
    """Raises CorruptBlock."""
    for at, part in enumerate(parts):
        if checksum(part) != checksums[16 * at : 16 * at + 16]:
            raise CorruptBlock(f"part {at} of {len(parts)} that a peer sent does not verify")
    return checksums
