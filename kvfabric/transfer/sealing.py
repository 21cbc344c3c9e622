"""`wire = "aes-gcm"`: messages between nodes, sealed where their devices are no zone of trust. No I/O.

AES-256-GCM. Who seals draws a key for one answer to one request and gives it, with the tags, in that answer,
which is authenticated; the nonce is the number of the message under it. So no key and nonce ever seal twice,
whoever asks again. Associated data: `header`, which both sides make of what they agreed on.

The cipher holds the interpreter lock, hence `_STEP_BYTES`.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kvfabric.errors import CorruptBlock

SEAL_BYTES = 16
_KEY_BYTES = 32
_NONCE_BYTES = 12
_STEP_BYTES = 256 << 10
_HEADER = struct.Struct("<16sIIQQ")
_LABEL = b"kvfabric message 1"


def header(
    *, hold: bytes, group: int, shard: int, part_bytes: int, tag: int, keys: bytes | memoryview
) -> bytes:
    """Of the message under `tag`, which has one part of each block in `keys`."""
    fixed = _HEADER.pack(hold.ljust(16, b"\0")[:16], group, shard, part_bytes, tag)
    return b"".join((_LABEL, fixed, keys))


def fresh_key() -> bytes:
    return secrets.token_bytes(_KEY_BYTES)


def seal(
    key: bytes, number: int, head: bytes, views: Iterable[memoryview], out: memoryview
) -> bytes:
    """Encrypt `views`, one after the other, into `out`, as long; the tag. A `number` is used once."""
    sealer = _cipher(key, number).encryptor()
    sealer.authenticate_additional_data(head)
    at = 0
    for view in views:
        for step in _steps(view):
            sealer.update_into(step, out[at : at + len(step)])
            at += len(step)
    sealer.finalize()
    tag: bytes = sealer.tag
    return tag


def open_in_place(key: bytes, number: int, head: bytes, tag: bytes, memory: memoryview) -> None:
    """Raises CorruptBlock for any other key, number, header, tag or byte; `memory` is of no meaning then."""
    opener = _cipher(key, number).decryptor()
    opener.authenticate_additional_data(head)
    for step in _steps(memory):
        opener.update_into(step, step)
    _check_tag(opener, tag, number)


def _check_tag(opener: Any, tag: bytes, number: int) -> None:
    try:
        opener.finalize_with_tag(tag)
    except (InvalidTag, ValueError) as exc:
        raise CorruptBlock(f"message {number} of a peer fails its tag: {exc!r}") from exc


def _steps(memory: memoryview) -> Iterable[memoryview]:
    return (memory[at : at + _STEP_BYTES] for at in range(0, len(memory), _STEP_BYTES))


def _cipher(key: bytes, number: int) -> Cipher[Any]:
    return Cipher(algorithms.AES(key), modes.GCM(number.to_bytes(_NONCE_BYTES, "little")))
