"""The Nth file operation of the SSD tier fails, for N = 1, 2, ... until a run has no Nth: whatever was sealed
is served or was given up with an announcement, nothing leaks, and all numbers add up.

What LMDB and the kernel do is failed from outside: by a file system that is full, and by `strace`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.errors import CorruptBlock, KVFabricError
from kvfabric.testing.failing import FailingOps, Fault
from kvfabric.testing.segments import RECORD, Owner, readable, small_tier
from kvfabric.testing.tiers import make_part, read_back
from kvfabric.tiers import segment_groups
from kvfabric.tiers.base import PartIdentity
from kvfabric.tiers.segments import SegmentTier
from tests.torture.scale import count, record

LAST_N = 2000


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups close at once."""
    monkeypatch.setattr(segment_groups, "GROUP_S", 0.0)


class Life:
    """What was sealed over the lives of one directory, and what went wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed: dict[int, PartIdentity] = {}
        self.owner = Owner()
        self.problems: list[str] = []

    async def write(self, tier: SegmentTier, seeds: range) -> None:
        for seed in seeds:
            identity, payload = make_part(seed, RECORD)
            try:
                await tier.write(identity, payload)
            except CorruptBlock as exc:
                self.problems.append(f"write of {seed}: {exc}")
            except KVFabricError:
                continue
            self.sealed[seed] = identity

    async def read(self, tier: SegmentTier) -> None:
        """Everything that is listed is right, or the medium says why not."""
        for identity, location in list(tier.records()):
            try:
                data = await read_back(tier, location, identity)
            except CorruptBlock as exc:
                self.problems.append(f"sealed and corrupt: {exc}")
            except KVFabricError:
                continue
            else:
                if data != bytes(make_part(identity.block_index, RECORD)[1]):
                    self.problems.append("wrong bytes")

    def check_accounts(self, tier: SegmentTier) -> None:
        s = tier.statistics()
        on_disk = sum(path.stat().st_size for path in self.directory.glob("seg-*"))
        if not s.live_bytes + s.dead_bytes == s.used_bytes <= s.file_bytes <= s.capacity_bytes:
            self.problems.append(f"accounts do not add up: {s}")
        if on_disk > s.capacity_bytes:
            self.problems.append(f"{on_disk} bytes on disk of {s.capacity_bytes}")
        listed = sum(len(batch) for batch in tier.batches())
        if listed != s.records:
            self.problems.append(f"{listed} records listed, {s.records} counted")

    async def pass_(self, ops: FailingOps) -> None:
        """One life: write into the third round of segments, delete, scrub, read. Without a tier if it
        does not open."""
        first = 100 * (1 + max(self.sealed, default=-1) // 100)
        try:
            async with small_tier(self.directory, owner=self.owner, ops=ops) as tier:
                self.owner.wanted = {make_part(first, RECORD)[0].part}
                await self.write(tier, range(first, first + 11))
                places = {identity.block_index: at for identity, at in tier.records()}
                if first + 5 in places:
                    tier.delete([places[first + 5]])
                    del self.sealed[first + 5]
                try:
                    while not (await tier.scrub(1 << 20)).is_round:
                        pass
                except KVFabricError:
                    pass
                await self.write(tier, range(first + 11, first + 15))
                await self.read(tier)
                self.check_accounts(tier)
        except CorruptBlock as exc:
            self.problems.append(f"open: {exc}")
        except KVFabricError:
            pass
        if ops.open_fds:
            self.problems.append(f"descriptors left: {ops.open_fds}")

    async def settle(self) -> None:
        """A life without faults: what was sealed is there or was announced as gone."""
        clean = FailingOps()
        async with small_tier(self.directory, owner=self.owner, ops=clean) as tier:
            await self.read(tier)
            there = set(await readable(tier))
            gone = {part for parts in self.owner.gone for part in parts}
            lost = [
                seed
                for seed, identity in self.sealed.items()
                if seed not in there and identity.part not in gone
            ]
            if lost:
                self.problems.append(f"lost: {lost}")
            self.check_accounts(tier)
            in_files = sum(path.stat().st_size for path in self.directory.glob("seg-*"))
            if in_files != tier.statistics().file_bytes:
                self.problems.append(f"{in_files} bytes in files that nobody knows of")


class Lives:
    """Lives with one fault, each on a copy of the same directory that an earlier, good life left."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._first: Life | None = None

    async def run_with(self, fault: Fault, fail_at: int) -> tuple[FailingOps, list[str]]:
        if self._first is None:
            self._first = Life(self._place / "first")
            await self._first.pass_(FailingOps())
        first, directory = self._first, self._place / "ssd"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(first.directory, directory)
        life = Life(directory)
        life.sealed = dict(first.sealed)
        life.owner.gone = list(first.owner.gone)
        ops = FailingOps(fault, fail_at)
        await life.pass_(ops)
        await life.settle()
        return ops, life.problems


def numbers() -> Iterator[int]:
    """1, 2, ... ; a sample after the first ones at the small count, then all."""
    stride = count(13, 1)
    yield from (n for n in range(1, LAST_N) if n <= 6 or n % stride == 0)


@pytest.mark.parametrize("fault", [f for f in Fault if f is not Fault.SWALLOWED])
async def test_the_nth_operation_fails(tmp_path: Path, fault: Fault) -> None:
    failed: Counter[str] = Counter()
    lives = Lives(tmp_path)
    for number in numbers():
        ops, problems = await lives.run_with(fault, number)
        assert problems == [], f"{fault} at {number} ({ops.failed}): {problems}"
        if not ops.failed and ops.count < number:
            break
        failed[ops.failed] += 1
    else:
        pytest.fail("no run without a fault")
    record(
        f"3 the Nth file operation: {fault}", failed.total(), "engine-visible damage or leaks: 0"
    )
    assert failed.total() >= 12
    if fault not in (Fault.SHORT, Fault.TORN):
        assert {"open", "pwritev"} <= set(failed)


async def test_an_error_that_is_swallowed_is_seen(tmp_path: Path) -> None:
    """The twin: a write that did not happen and is said to have."""
    found: Counter[str] = Counter()
    lives = Lives(tmp_path)
    for number in range(1, LAST_N):
        ops, problems = await lives.run_with(Fault.SWALLOWED, number)
        found[ops.failed] += bool(problems)
        if found["pwritev"] or (not ops.failed and ops.count < number):
            break
    assert found["pwritev"], f"nothing was noticed: {found}"
