"""The audit log: every change of the registry, hash-chained. Pure.

    head 0      32 zero bytes
    head n      BLAKE2b-256(head n-1, record n)

A record is MessagePack; `head n` stands beside it and is printed in each receipt. Whoever changes, drops
or inserts a record has to change every head after it, and a receipt kept elsewhere then shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def records(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[AuditRecord]:
    return (decode(record) for record, _ in entries)


def _sequence(record: bytes) -> int:
    try:
        return decode(record).sequence
    except msgspec.DecodeError:
        return 0
