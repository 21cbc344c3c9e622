"""The index of an SSD tier as a file: how full its pages are, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.errors import CorruptBlock
from kvfabric.testing.tiers import make_part
from kvfabric.tiers.base import Location
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import PAGE_BYTES, FileHeader
from kvfabric.tiers.segment_index import Put, SegmentIndex

ROW_BYTES = 136


@pytest.fixture
def index(tmp_path: Path) -> Iterator[SegmentIndex]:
    made = SegmentIndex.create(tmp_path, 64 << 20, FileOps())
    for number in (1, 2):
        made.add_segment(FileHeader(bytes(16), number, 1 << 30))
    yield made
    made.close()


def puts(numbers: range, file: int = 1) -> list[Put]:
    identity = make_part(0, 64)[0]
    return [Put(Location(file, PAGE_BYTES * number), number, identity) for number in numbers]


def test_pages_are_full(index: SegmentIndex, tmp_path: Path) -> None:
    """Rows come in order, group by group; splitting pages in the middle would leave half of each empty."""
    for first in range(1, 20_000, 500):
        index.apply(puts(range(first, first + 500)))
    assert len(index.batch(1)) == 20_000
    assert (tmp_path / "index" / "data.mdb").stat().st_size < 1.15 * 20_000 * ROW_BYTES


def test_a_row_that_is_not_behind_the_others_is_refused_with_its_group(index: SegmentIndex) -> None:
    index.apply(puts(range(1, 10)))
    for late in (puts(range(5, 6)), puts(range(10, 12)) + puts(range(3, 4))):
        with pytest.raises(CorruptBlock, match="not behind"):
            index.apply(late)
    assert index.batch(1).rows["sequence"].tolist() == list(range(1, 10))
    index.apply(puts(range(2, 4), file=2))  # each file by itself
    index.apply(puts(range(10, 11)))
    assert len(index.batch(1)) == 10
    assert len(index.batch(2)) == 2
