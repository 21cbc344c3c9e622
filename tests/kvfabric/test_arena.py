"""The arena: who may write it, and that no two slots ever share a byte."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.errors import ConfigError, RemoteProtocolError
from kvfabric.tiers.arena import PAGE_BYTES, Arena, SlotAllocator, slot_bytes

SIZE = 16 * PAGE_BYTES


def test_the_descriptor_for_engines_can_not_be_mapped_for_writing() -> None:
    with Arena.create(SIZE) as arena:
        fd = arena.read_only_fd()
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
                arena.view[5:8] = b"abc"
                assert mapped[5:8] == b"abc"
        finally:
            os.close(fd)


def test_the_size_is_sealed() -> None:
    with Arena.create(SIZE) as arena:
        fd = os.open(f"/proc/self/fd/{arena._fd}", os.O_RDWR)
        try:
            for size in (SIZE // 2, SIZE * 2):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
        finally:
            os.close(fd)


def test_adopting_from_a_read_only_descriptor_gives_the_same_memory() -> None:
    with Arena.create(SIZE) as arena:
        fd = arena.read_only_fd()
        with Arena.adopt(fd) as adopted:
            assert adopted.identity() == arena.identity()
            assert adopted.size_bytes == SIZE
            adopted.view[0:3] = b"xyz"
            assert bytes(arena.view[0:3]) == b"xyz"
        os.close(fd)


def test_adopting_anything_else_is_refused(tmp_path: object) -> None:
    plain = os.memfd_create("other")
    os.ftruncate(plain, SIZE)
    reader, writer = os.pipe()
    for fd in (plain, reader):
        with pytest.raises(RemoteProtocolError):
            Arena.adopt(fd)
    for fd in (plain, reader, writer):
        os.close(fd)


@pytest.mark.parametrize("size", [0, -4096, 4097])
def test_a_wrong_size_is_a_configuration_error(size: int) -> None:
    with pytest.raises(ConfigError):
        Arena.create(size)


def test_touching_keeps_what_is_there() -> None:
    with Arena.create(SIZE) as arena:
        arena.view[0:4] = b"keep"
        arena.touch(0, SIZE)
        assert bytes(arena.view[0:4]) == b"keep"


def faults_of_first_writes(touch: Callable[[Arena], None]) -> int:
    with Arena.create(1024 * PAGE_BYTES) as arena:
        touch(arena)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.frombuffer(arena.view, dtype=np.uint8)[::PAGE_BYTES] = 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_touched_page_costs_its_first_write_no_fault() -> None:
    assert faults_of_first_writes(lambda arena: arena.touch(0, arena.size_bytes)) < 100
    # Provided and not mapped, as on kernels that can do no more:
    assert faults_of_first_writes(lambda arena: arena._provide(0, arena.size_bytes)) >= 1024


def test_generations_rise_with_every_use_of_a_slot() -> None:
    with Arena.create(4 * PAGE_BYTES) as arena:
        seen: dict[int, int] = {}
        for _ in range(5):
            slots = arena.allocate(4, PAGE_BYTES)
            assert slots is not None
            for page, generation in zip(
                slots.first_pages.tolist(), slots.generations.tolist(), strict=True
            ):
                assert generation > seen.get(page, -1)
                seen[page] = generation
            arena.free(slots.first_pages, PAGE_BYTES)


def test_a_batch_gets_neighbours() -> None:
    allocator = SlotAllocator(100)
    for _ in range(3):
        slots = allocator.allocate(10, 3)
        assert slots is not None
        assert np.diff(slots).tolist() == [3] * 9
        allocator.free(slots, 3)


def test_all_or_nothing() -> None:
    allocator = SlotAllocator(10)
    assert allocator.allocate(4, 3) is None
    assert allocator.free_pages == 10
    assert allocator.allocate(0, 3) is not None


def test_splinters_are_joined_for_a_larger_size() -> None:
    allocator = SlotAllocator(64)
    small = allocator.allocate(64, 1)
    assert small is not None
    allocator.free(small[::-1], 1)
    large = allocator.allocate(4, 16)
    assert large is not None
    assert large.tolist() == [0, 16, 32, 48]


def test_what_one_size_carved_ahead_serves_another() -> None:
    allocator = SlotAllocator(64)
    assert allocator.allocate(1, 1) is not None  # carves all there is
    assert allocator.allocate(3, 16) is not None
    assert allocator.free_pages == 15


def test_a_merge_that_found_nothing_is_not_repeated() -> None:
    allocator = SlotAllocator(64)
    pages = allocator.allocate(64, 1)
    assert pages is not None
    allocator.free(pages[::2], 1)
    assert allocator.allocate(1, 2) is None
    starts = allocator._run_starts
    assert allocator.allocate(1, 2) is None
    assert allocator._run_starts is starts
    allocator.free(pages[1:9:2], 1)
    assert allocator.allocate(1, 2) is not None


def test_slot_bytes_are_whole_pages() -> None:
    assert [slot_bytes(size) for size in (1, 4096, 4097)] == [4096, 4096, 8192]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 5), st.integers(1, 7), st.integers(0, 9)),
        max_size=60,
    )
)
def test_slots_never_overlap(steps: list[tuple[bool, int, int, int]]) -> None:
    allocator = SlotAllocator(97)
    taken: list[tuple[np.ndarray[tuple[int], np.dtype[np.uint32]], int]] = []
    for allocate, count, pages, which in steps:
        if allocate:
            slots = allocator.allocate(count, pages)
            if slots is not None:
                taken.append((slots, pages))
        elif taken:
            slots, pages = taken.pop(which % len(taken))
            allocator.free(slots, pages)
        used = [
            page
            for slots, size in taken
            for slot in slots.tolist()
            for page in range(slot, slot + size)
        ]
        assert len(set(used)) == len(used)
        assert all(0 <= page < 97 for page in used)
        assert allocator.free_pages == 97 - len(used)


def test_what_is_withheld_is_given_to_nobody_until_it_is_provided() -> None:
    allocator = SlotAllocator(100)
    used = allocator.allocate(10, 5)
    assert used is not None
    allocator.free(
        used[::2], 5
    )  # every second of the first half is free, and all of the other half
    allocator.withhold(30)
    assert (allocator.free_pages, allocator.withheld_pages) == (15, 60)
    first = allocator.allocate(3, 5)
    assert first is not None
    assert first.tolist() == [0, 10, 20]
    assert allocator.allocate(1, 1) is None
    allocator.free(used[1::2], 5)  # in use until now, so the memory is there
    assert allocator.free_pages == 25
    allocator.withhold(30)  # and once more: what is free behind it now goes too
    assert (allocator.free_pages, allocator.withheld_pages) == (15, 70)
    allocator.provide(62)
    assert (allocator.free_pages, allocator.withheld_pages) == (47, 38)
    allocator.provide(100)
    assert (allocator.free_pages, allocator.withheld_pages) == (85, 0)
    rest = allocator.allocate(14, 5)
    assert rest is not None
    assert len({*first.tolist(), *rest.tolist()}) == 17


def test_all_of_it_may_be_withheld() -> None:
    allocator = SlotAllocator(8)
    for _ in range(2):
        allocator.withhold(0)
        assert allocator.free_pages == 0
        assert allocator.allocate(1, 1) is None
    allocator.provide(8)
    assert allocator.allocate(1, 8) is not None
