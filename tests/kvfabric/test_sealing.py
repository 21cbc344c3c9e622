"""Messages between nodes sealed by AES-256-GCM."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from kvfabric.errors import CorruptBlock
from kvfabric.transfer import sealing

KEYS = bytes(range(64))
WHAT = {"hold": b"h" * 16, "group": 1, "shard": 2, "part_bytes": 300_000, "tag": 77, "keys": KEYS}
HEAD = sealing.header(**WHAT)  # type: ignore[arg-type]
KEY = bytes(range(32))


def sealed(number: int = 0) -> tuple[bytes, memoryview, bytes]:
    """Plain bytes, sealed ones, their tag: of two parts that do not lie together."""
    plain = np.random.default_rng(1).bytes(600_000)
    views = [memoryview(plain)[:300_000], memoryview(plain)[300_000:]]
    out = memoryview(bytearray(600_000))
    return plain, out, sealing.seal(KEY, number, HEAD, views, out)


def test_what_is_sealed_is_opened_where_it_lies() -> None:
    plain, memory, tag = sealed()
    assert bytes(memory) != plain
    sealing.open_in_place(KEY, 0, HEAD, tag, memory)
    assert bytes(memory) == plain


@pytest.mark.parametrize("at", [0, 299_999, 300_000, 599_999])
def test_a_changed_byte(at: int) -> None:
    _, memory, tag = sealed()
    memory[at] ^= 1
    with pytest.raises(CorruptBlock):
        sealing.open_in_place(KEY, 0, HEAD, tag, memory)


def test_twin_without_the_tag_a_changed_byte_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_check_tag", lambda *_: None)
    plain, memory, tag = sealed()
    memory[5] ^= 1
    sealing.open_in_place(KEY, 0, HEAD, tag, memory)
    assert [i for i, (a, b) in enumerate(zip(memory, plain, strict=True)) if a != b] == [5]


@pytest.mark.parametrize(
    "other", [{"hold": b"i" * 16}, {"group": 2}, {"shard": 1}, {"tag": 78}, {"keys": KEYS[::-1]}]
)
def test_another_header(other: dict[str, object]) -> None:
    _, memory, tag = sealed()
    with pytest.raises(CorruptBlock):
        sealing.open_in_place(KEY, 0, sealing.header(**WHAT | other), tag, memory)  # type: ignore[arg-type]


def test_another_key_number_or_tag() -> None:
    for key, number, wrong in ((secrets.token_bytes(32), 0, b""), (KEY, 1, b""), (KEY, 0, b"x")):
        _, memory, tag = sealed()
        with pytest.raises(CorruptBlock):
            sealing.open_in_place(key, number, HEAD, wrong or tag, memory)


def test_no_key_seals_twice() -> None:
    assert len({sealing.fresh_key() for _ in range(100)}) == 100
    assert sealed(0)[1] != sealed(1)[1]
