"""The index against a dictionary, and what it costs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvfabric.errors import RemoteProtocolError
from kvfabric.hashing import layout_fingerprint
from kvfabric.store.index import BlockIndex, Lineage, packed_keys
from kvfabric.store.lease import LeaseBook
from kvfabric.store.quota import TierAccounts
from kvfabric.store.residency import Residency
from kvfabric.testing.store import FakeClock, RecordedEvents, make_keys, make_layout
from kvfabric.types import DEFAULT_TENANT, BlockKey


def rows_of(index: BlockIndex, keys: list[BlockKey]) -> list[int]:
    return [int(row) for row in index.lookup(packed_keys(b"".join(keys)))]


def numbers(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(values, dtype=np.uint32)


def add_chain(index: BlockIndex, keys: list[BlockKey], tag: bytes = b"12345678") -> list[int]:
    """Blocks of one lineage, each the child of the one before."""
    rows = index.insert(packed_keys(b"".join(keys)))
    lineage = Lineage(DEFAULT_TENANT, tag, layout_fingerprint(make_layout()), ())
    number = index.intern_lineage(lineage, 0)
    parents = np.concatenate([numbers(0), rows[:-1]])
    index.adopt(rows, parents, np.full_like(rows, number), np.arange(len(rows), dtype=np.uint32))
    return [int(row) for row in rows]


def test_rows_are_found_after_any_inserts_and_deletes() -> None:
    index, model, chooser = BlockIndex(200), dict[BlockKey, int](), random.Random(5)
    keys = make_keys(400)
    for _ in range(300):
        absent = [key for key in chooser.sample(keys, 8) if key not in model]
        absent = absent[: index.free_rows]
        rows = index.insert(packed_keys(b"".join(absent)))
        model.update(zip(absent, map(int, rows), strict=True))
        gone = chooser.sample(sorted(model), min(len(model), chooser.randrange(9)))
        index.drop_empty([model.pop(key) for key in gone])
        assert rows_of(index, keys) == [model.get(key, 0) for key in keys]
        assert len(set(model.values())) == len(model)
    assert index.free_rows == 200 - len(model)


def test_keys_that_share_a_home_are_told_apart() -> None:
    index = BlockIndex(64)
    keys = [BlockKey(b"same word" + bytes([n]) + bytes(22)) for n in range(60)]
    rows = index.insert(packed_keys(b"".join(keys)))
    assert rows_of(index, keys) == rows.tolist()
    index.drop_empty(rows[::2].tolist())
    expected = [0 if at % 2 == 0 else int(row) for at, row in enumerate(rows)]
    assert rows_of(index, keys) == expected


def test_a_row_lives_while_a_child_needs_it() -> None:
    index, keys = BlockIndex(16), make_keys(3)
    first, second, third = add_chain(index, keys)
    index.holds.cell[third] = 1
    index.drop_empty([first, second, third])
    assert rows_of(index, keys) == [first, second, third]
    index.holds.cell[third] = 0
    index.drop_empty([third])
    assert rows_of(index, keys) == [0, 0, 0]
    assert index.free_rows == 16


def test_a_lineage_is_forgotten_with_its_last_row() -> None:
    index, keys = BlockIndex(400), make_keys(300)
    for at, key in enumerate(keys):
        [row] = add_chain(index, [key], tag=at.to_bytes(8, "little"))
        assert index.lineage_at(row).namespace_tag == at.to_bytes(8, "little")
    index.drop_empty(rows_of(index, keys))
    add_chain(index, keys[:1])
    assert len(index.lineages) == 301
    assert sum(lineage is not None for lineage in index.lineages) == 1


def test_parts_are_chained_and_given_back() -> None:
    index, keys = BlockIndex(16), make_keys(4)
    rows = numbers(*add_chain(index, keys))
    index.ensure_parts(rows[:2], 1)
    index.ensure_parts(rows, 3)
    found = {int(part) for ordinal in range(3) for part in index.parts(rows, ordinal)}
    assert len(found) == 12
    assert 0 not in found
    assert index.parts_of(int(rows[0])) == [int(index.parts(rows[:1], n)[0]) for n in range(3)]
    index.drop_empty(rows[::-1].tolist())
    assert index.free_parts == 16


def test_half_a_key_is_a_protocol_error() -> None:
    with pytest.raises(RemoteProtocolError):
        packed_keys(bytes(33))


@pytest.mark.slow
def test_a_million_blocks_cost_at_most_160_bytes_each() -> None:
    index = BlockIndex(1 << 20)
    accounts = TierAccounts(1 << 40, lambda tenant: tenant.host)
    residency = Residency(
        index=index, host=accounts, ssd=accounts, events=RecordedEvents(), now=lambda: 1
    )
    LeaseBook(residency, clock=FakeClock(), lease_s=1, reservation_s=1, lease_share=1)
    assert index.bytes_per_block <= 160

    chooser = np.random.default_rng(1)
    lineage = Lineage(DEFAULT_TENANT, b"12345678", layout_fingerprint(make_layout()), ())
    rows = numbers()
    for _ in range(4096):
        words = chooser.integers(0, 1 << 63, size=(256, 4), dtype=np.uint64)
        rows = index.insert(words)
        number = np.full_like(rows, index.intern_lineage(lineage, 0))
        index.adopt(rows, np.zeros_like(rows), number, rows)
        index.ensure_parts(rows, 1)
        assert (index.lookup(words) == rows).all()
    assert index.free_rows == 0
    index.drop_empty(rows.tolist())
    assert index.free_rows == 256
