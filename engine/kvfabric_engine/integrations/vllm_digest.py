"""Digests of what vLLM holds: nested tensors, plain values, objects. Equal only for equal ones."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch

from kvfabric.hashing import tlv

Piece = bytes | memoryview


class Unknown(Exception):
    """What a request's KV depends on is not known. Says why, in words for a log line."""


def digest(person: bytes, pieces: Iterator[Piece]) -> bytes:
    """32 bytes."""
    state = hashlib.blake2b(digest_size=32, person=person)
    for piece in pieces:
        state.update(piece)
    return state.digest()


def head(kind: str, *values: str) -> bytes:
    """Prefix-free: says how long it is."""
    encoded = tlv(f"kvfabric/input-{kind}", [(1, value.encode()) for value in values])
    return struct.pack("<I", len(encoded)) + encoded


def canonical(value: object) -> Iterator[Piece]:
    """Bytes of nested tensors and plain values. Raises Unknown for others."""
    if isinstance(value, torch.Tensor):
        yield from _tensor(value)
    elif isinstance(value, list | tuple):
        yield head("list", str(len(value)))
        for part in value:
            yield from canonical(part)
    elif value is None or isinstance(value, bool | int | float | str):
        yield head("value", type(value).__name__, repr(value))
    else:
        raise Unknown(f"content with a {type(value).__name__} in it is not cached")


def canonical_object(value: object) -> Iterator[Piece]:
    """As `canonical`, also for dictionaries by name and for objects that have nothing but fields."""
    if isinstance(value, dict):
        yield head("names", str(len(value)))
        for name in sorted(value):
            yield head("name", name)
            yield from canonical_object(value[name])
    elif isinstance(value, list | tuple):
        yield head("list", str(len(value)))
        for part in value:
            yield from canonical_object(part)
    elif isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        yield from canonical(value)
    else:
        yield head("object", type(value).__name__)
        yield from canonical_object(vars(value))


def _tensor(tensor: torch.Tensor) -> Iterator[Piece]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise Unknown(f"content in a tensor of {tensor.layout} is not cached")
    yield head("tensor", str(tensor.dtype), str(tuple(tensor.shape)))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    yield flat.numpy().data
