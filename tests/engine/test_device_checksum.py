"""The checksum that a device computes is the one that the node stored: xxhash's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash
from kvfabric_engine.device_checksum import DeviceChecksums, supports

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
SIZES = [256, 960, 1024, 1088, 2048, 16 * 1024, 33 * 1024 + 64, 147_456]


def _digests(data: bytes, part_bytes: int, device: str) -> list[bytes]:
    checksums = DeviceChecksums(torch.device(device), part_bytes)
    parts = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    return checksums.digests(checksums.accumulate(parts).cpu())


def _expected(data: bytes, part_bytes: int) -> list[bytes]:
    cut = range(0, len(data), part_bytes)
    return [xxhash.xxh3_128_digest(data[start : start + part_bytes]) for start in cut]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part_bytes", SIZES)
def test_it_is_xxh3(part_bytes: int, device: str) -> None:
    data = np.random.default_rng(part_bytes).integers(0, 256, 3 * part_bytes, np.uint8).tobytes()
    assert _digests(data, part_bytes, device) == _expected(data, part_bytes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80])
def test_it_is_xxh3_where_numbers_overflow(fill: int, device: str) -> None:
    data = bytes([fill]) * 9216
    assert _digests(data, 9216, device) == _expected(data, 9216)


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_counts(device: str) -> None:
    """One flipped bit at each kind of place: in a block, its last stripe, the last block, the last stripe."""
    size = 2048 + 192
    good = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    expected = _digests(good.tobytes(), size, device)
    for place in (0, 8, 63, 960, 1023, 1024, 2047, 2048, size - 65, size - 64, size - 1):
        bad = good.copy()
        bad[place] ^= 1
        assert _digests(bad.tobytes(), size, device) != expected, place


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_bytes", [1024, 3072, 64 * 1024])
def test_parts_in_pages_have_the_same(page_bytes: int, device: str) -> None:
    """Pages anywhere, in any order, with other bytes between them, that come in two pieces each."""
    whole = np.random.default_rng(2).integers(0, 256, (12, page_bytes + 512), np.uint8)
    region = torch.from_numpy(whole).to(device)[:, :page_bytes]
    pages = [7, 2, 11, 0, 3, 9]
    data = b"".join(whole[page, :page_bytes].tobytes() for page in pages)
    checksums = DeviceChecksums(torch.device(device), 3 * page_bytes)
    begun = checksums.begin_paged(region, torch.tensor(pages, device=device))
    cut = page_bytes // 2048 * 1024
    for start, stop in ((cut, page_bytes), (0, cut)):
        checksums.add_paged(begun, start, stop - start)
    found = checksums.accumulate_paged(begun)
    assert checksums.digests(found.cpu()) == _expected(data, 3 * page_bytes)


@pytest.mark.parametrize("part_bytes", [0, 64, 240, 1000, 1028])
def test_sizes_that_are_no_kv(part_bytes: int) -> None:
    assert not supports(part_bytes)
    with pytest.raises(ValueError, match="no checksum"):
        DeviceChecksums(torch.device("cpu"), part_bytes)
