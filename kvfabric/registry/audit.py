"""The audit log: every change of the registry, hash-chained. Pure.

    head 0      32 zero bytes
    head n      BLAKE2b-256(head n-1, record n)

A record is MessagePack; `head n` stands beside it and is printed in each receipt. Whoever changes, drops
or inserts a record has to change every head after it, and a receipt kept elsewhere then shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import msgspec

FIRST_HEAD = bytes(32)


class AuditRecord(msgspec.Struct, frozen=True, array_like=True):
    """`at`: Unix seconds. `version`: of the registry, after the change. No secret is ever in here."""

    sequence: int
    at: float
    who: str
    action: str
    scope: str
    detail: str
    old_epoch: int
    new_epoch: int
    version: int


def link(previous_head: bytes, record: bytes) -> bytes:
    """The head after an encoded record: 32 bytes."""
    # The head has a fixed length, so what follows it is unambiguous.
    return blake2b(previous_head + record, digest_size=32, person=b"kvf-audit-1").digest()


def encode(record: AuditRecord) -> bytes:
    return msgspec.msgpack.encode(record)


def decode(record: bytes) -> AuditRecord:
    return msgspec.msgpack.decode(record, type=AuditRecord)


def first_broken(entries: Iterable[tuple[bytes, bytes]], head: bytes) -> int | None:
    """Number (from 1) of the first entry (record, head) that does not hold; None if all do.

    The chain has to end at `head`: a log that was cut breaks after its last entry.
    """
    previous = FIRST_HEAD
    number = 0
    for number, (record, claimed) in enumerate(entries, start=1):
        if link(previous, record) != claimed or _sequence(record) != number:
            return number
        previous = claimed
    return None if previous == head else number + 1


def problem_with(
    entries: Sequence[tuple[bytes, bytes]], head: bytes, receipts: Iterable[bytes] = ()
) -> str:
    """What is wrong with a log that ends at `head`, by itself or by the heads of receipts; empty: nothing.

    Who can write the whole log can make one that holds. It lacks a receipt of the one before: each head
    depends on every record up to it.
    """
    broken = first_broken(entries, head)
    if broken is not None and broken > len(entries):
        return f"the log does not reach its head: what came after record {len(entries)} is missing"
    if broken is not None:
        return f"record {broken} does not hold: it or its place was changed"
    known = {claimed for _, claimed in entries}
    for receipt in receipts:
        if receipt not in known:
            return (
                f"no record has the head {receipt.hex()}: the log was cut before it, or a record up to it "
                "was changed, dropped or moved"
            )
    return ""


def records(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[AuditRecord]:
    return (decode(record) for record, _ in entries)


def _sequence(record: bytes) -> int:
    try:
        return decode(record).sequence
    except msgspec.DecodeError:
        return 0
