"""Who still has an earlier daemon's arena, and what its record says."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.daemon.adoption import (
    ArenaIdentity,
    ArenaKeeper,
    ArenaRecord,
    ProcessId,
    has_memory,
    identity_of,
    start_time,
)
from kvfabric.tiers.arena import Arena

BOOT = bytes(16)


def this_process() -> ProcessId:
    started = start_time(os.getpid())
    assert started is not None
    return ProcessId(os.getpid(), started)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("test-arena", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 8192)
    yield descriptor
    os.close(descriptor)


def test_record_survives_a_round_trip(tmp_path: Path) -> None:
    record = ArenaRecord("ab", ArenaIdentity(1, 2, 3), (ProcessId(4, 5), ProcessId(6, 7)))
    record.save(tmp_path / "arena.json")
    assert ArenaRecord.load(tmp_path / "arena.json") == record
    assert (tmp_path / "arena.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"boot_id": "a"}', '{"boot_id": "a", "arena": [1], "processes": []}']
)
def test_record_that_does_not_read_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "arena.json").write_text(text)
    assert ArenaRecord.load(tmp_path / "arena.json") is None
    assert ArenaRecord.load(tmp_path / "absent.json") is None


def test_holder_of_a_descriptor_has_the_memory(memory: int) -> None:
    assert has_memory(this_process(), identity_of(memory))


def test_mapping_alone_is_having_the_memory() -> None:
    """A process that closed its descriptor and kept its mapping is not gone."""
    descriptor = os.memfd_create("test-arena", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 8192)
    identity = identity_of(descriptor)
    mapping = mmap.mmap(descriptor, 8192, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(descriptor)
    duplicates = [
        fd for fd in os.listdir("/proc/self/fd") if _inode(int(fd)) == identity.inode
    ]  # mmap keeps one of its own
    assert has_memory(this_process(), identity)
    mapping.close()
    assert duplicates
    assert not has_memory(this_process(), identity)


def _inode(descriptor: int) -> int:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return -1


def test_process_without_the_memory_is_none_of_its_holders(memory: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert started is not None
    assert not has_memory(ProcessId(child.pid, started), identity_of(memory))
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    assert start_time(child.pid) is None


def test_reused_process_number_is_another_process(memory: int) -> None:
    pid, started = this_process()
    assert not has_memory(ProcessId(pid, started + 1), identity_of(memory))


async def test_keeper_adopts_only_the_arena_it_waits_for(tmp_path: Path, memory: int) -> None:
    """Another memfd of the same size is not it; the right one is adopted once."""
    with Arena.create(1 << 20) as earlier:
        descriptor = earlier.read_only_fd()
        record = ArenaRecord("old", identity_of(descriptor), (this_process(),))
        record.save(tmp_path / "arena.json")
        keeper = ArenaKeeper(tmp_path / "arena.json", BOOT, 2 << 20)
        await keeper.refresh()
        assert keeper.waiting_for == {this_process()}
        assert keeper.adopt(memory) is None
        adopted = keeper.adopt(descriptor)
        assert adopted is not None
        assert adopted.identity() == earlier.identity()
        assert keeper.adopt(descriptor) is None
        keeper.save(set())
        document = json.loads((tmp_path / "arena.json").read_text())
        assert document["processes"] == [list(this_process())]  # it still maps the memory
        os.close(descriptor)
        keeper.close()


async def test_keeper_whose_holders_are_gone_makes_a_fresh_arena(tmp_path: Path) -> None:
    record = ArenaRecord("old", ArenaIdentity(1, 2, 3), (ProcessId(1, 0),))
    record.save(tmp_path / "arena.json")
    keeper = ArenaKeeper(tmp_path / "arena.json", BOOT, 1 << 20)
    assert keeper.waiting_for
    await keeper.refresh()
    assert not keeper.waiting_for
    assert keeper.create().size_bytes == 1 << 20
    keeper.close()
