"""Scrubbing: rot at rest is found before somebody asks for it, by a running node and by `kvfabric doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfabric.store.store import StoreLimits
from kvfabric.testing.engine import TinyEngine, payload_of, tiny_hello
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.store import StoreRig, make_keys, part_bytes
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import TierName

KEYS = make_keys(6)
PART = 8192


def spoil(directory: Path, needle: bytes) -> None:
    """Flip a bit of the payload in whatever segment has it."""
    for path in directory.glob("seg-*"):
        data = path.read_bytes()
        if needle in data:
            with path.open("r+b") as file:
                file.seek(data.index(needle) + 100)
                file.write(bytes([data[data.index(needle) + 100] ^ 1]))
            return
    raise AssertionError("not on the medium")


def make_tier(directory: Path) -> SegmentTier:
    return SegmentTier(directory, capacity_bytes=8 << 20, segment_bytes=1 << 20, clock=lambda: 0.0)


async def test_the_store_takes_out_what_rots_in_either_tier(tmp_path: Path) -> None:
    limits = StoreLimits(host_bytes=32 * 4096, ssd_bytes=8 << 20, max_blocks=256, lease_share=1.0)
    async with make_tier(tmp_path) as tier, StoreRig(limits=limits, ssd=tier) as rig:
        await rig.put(KEYS)
        await rig.get(KEYS)
        await rig.store.seal()
        assert tuple(await rig.store.scrub_all()) == (6, 0, 6, 6 * PART, 0, 0)
        spoil(tmp_path, part_bytes(KEYS[4]))
        report = await rig.store.scrub_all()
        assert (report.ssd_corrupt, report.arena_corrupt) == (1, 0)
        assert rig.store.statistics().num_blocks[TierName.SSD] == 5
        assert await rig.get(KEYS) == [part_bytes(key) for key in KEYS]  # the host tier has it
        view = rig.arena.view
        at = bytes(view).index(part_bytes(KEYS[1]))
        view[at + 7] ^= 1
        report = await rig.store.scrub_all()
        assert (report.arena_parts, report.arena_corrupt) == (6, 1)
        assert rig.store.statistics().corrupt == 2
        rig.store._residency.check()


async def test_the_background_verifies_ssd_at_its_rate(tmp_path: Path) -> None:
    """A second's worth of bytes a second, in turns, without being asked."""
    limits = StoreLimits(
        host_bytes=32 * 4096,
        ssd_bytes=8 << 20,
        max_blocks=256,
        lease_share=1.0,
        ssd_scrub_bytes_per_s=4 * PART,
    )
    async with make_tier(tmp_path) as tier, StoreRig(limits=limits, ssd=tier) as rig:
        await rig.put(KEYS)
        await rig.get(KEYS)
        await rig.store.seal()
        ssd = rig.store._ssd
        assert ssd is not None
        seen = []
        for _ in range(4):
            await ssd.scrub_on(2 * PART)  # what half a second gives
            seen.append(tier.statistics().scrubbed_bytes)
        assert seen == [2 * PART, 4 * PART, 6 * PART, 6 * PART]
        async with ssd.scrubbing:  # an administrator scrubs: the background waits
            await ssd.scrub_on(2 * PART)
        assert tier.statistics().scrubbed_bytes == 6 * PART


def doctor(state: Path, *flags: str) -> tuple[int, str]:
    """Exit code and what it says of the scrub."""
    command = [sys.executable, "-m", "kvfabric", "doctor", "--json", "--scrub", *flags]
    command += ["--state-dir", str(state), "--http", "", "--ssd-bytes", str(16 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    findings = {one["subject"]: one for one in json.loads(done.stdout)["findings"]}
    return done.returncode, findings["scrub"]["text"]


@pytest.mark.fleet
@pytest.mark.slow
def test_doctor_scrubs_a_running_node_and_a_stopped_one(tmp_path: Path) -> None:
    """Exit code 0 while everything verifies, 1 when something does not, 0 again when it is out."""
    os.chmod(tmp_path, 0o700)
    ssd = tmp_path / "ssd"
    with NodeProcess(tmp_path, ssd_bytes=16 << 20, http="127.0.0.1:0") as node:
        engine = TinyEngine.connect(node.socket, tiny_hello(part_bytes=PART))
        with engine.client:
            keys = engine.open("r", "prompt", 6)
            engine.store("r", keys)
            engine.load("r", keys)
            engine.release("r")
        until(lambda: "6 ssd records" in doctor(tmp_path)[1])
        code, text = doctor(tmp_path)
        assert (code, "0 ssd corrupt" in text) == (0, True)
        spoil(ssd, payload_of(keys[2], PART))
        code, text = doctor(tmp_path)
        # The node may have found it by itself just before.
        assert (code, "1 ssd corrupt" in text) in ((1, True), (0, False))
        code, text = doctor(tmp_path)
        assert (code, "5 ssd records" in text) == (0, True)
        assert node.metrics()["corrupt_parts_total"] == 1
    spoil(ssd, payload_of(keys[3], PART))
    code, text = doctor(tmp_path)
    assert (code, "5 ssd records" in text, "1 ssd corrupt" in text) == (1, True, True)
    code, text = doctor(tmp_path)
    assert (code, "4 ssd records" in text) == (0, True)
