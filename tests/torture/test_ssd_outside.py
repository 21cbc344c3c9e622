"""Proof 3, the other half: what LMDB and the kernel do for the tiers fails, under a real node.

`strace` makes calls on the index's file fail, and those that ask for memory; a small tmpfs is full. The node
lives, an engine sees a miss at worst, and what was sealed before is there in the next life.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.testing.engine import TinyEngine, payload_of, tiny_hello
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.tiers.segment_groups import GROUP_S
from tests.torture.scale import FULL, at_most, count, record

BLOCKS, PROMPTS = 8, 3
PART = 16 << 10


def store_and_use(node: NodeProcess, prompts: list[str]) -> None:
    """Stored, and used once more, which is when they go to SSD. Refusals are the node's right."""
    engine = TinyEngine.connect(node.socket, tiny_hello(part_bytes=PART))
    with engine.client:
        for prompt in prompts:
            keys = engine.open(prompt, prompt, BLOCKS)
            engine.store(prompt, keys)
            engine.load(prompt, keys)
            engine.release(prompt)


def loaded(node: NodeProcess, prompt: str) -> tuple[int, int]:
    """How many of the prompt's blocks an engine gets, and how many of them are wrong."""
    engine = TinyEngine.connect(node.socket, tiny_hello(part_bytes=PART))
    with engine.client:
        keys = engine.open("load", prompt, BLOCKS)
        found = engine.load("load", keys)
        engine.release("load")
    wrong = sum(payload_of(key, PART) != data for key, data in zip(keys, found, strict=False))
    return len(found), wrong


def traced(place: Path, name: str, calls: str, fault: str, others: str = "") -> str:
    """A Python of which these calls fail. `others`: flags of strace, which say on what, for one."""
    script = place / f"python-{name}"
    script.write_text(
        "#!/bin/sh\n"
        f"exec strace -D -f -qq -o {place}/strace -e trace={calls} -e inject={calls}:{fault} {others} "
        f'{sys.executable} "$@"\n'
    )
    script.chmod(0o700)
    return str(script)


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], check=False)
    return tried.returncode == 0


@pytest.mark.fleet
@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="strace may not trace here")
def test_the_nth_call_on_the_index_fails(tmp_path: Path) -> None:
    calls = "pwrite64,writev,fdatasync,fsync,ftruncate,msync"
    # Each thread's Nth call, once; or all from there on.
    kinds = list(itertools.product(("EIO", "ENOSPC"), ("", "+")))
    tries, wrong, lost = 0, 0, 0
    for fault, following in kinds if FULL else [kinds[0], kinds[-1]]:
        for nth in range(1, count(2, 100)):
            name = f"{fault}-{nth}{following}"
            state = tmp_path / name
            with NodeProcess(state, ssd_bytes=16 << 20) as node:
                store_and_use(node, ["before"])
            index = state / "ssd" / "index" / "data.mdb"
            how = f"error={fault}:when={nth}{following}"
            python = traced(tmp_path, name, calls, how, f"-P {index}")
            with NodeProcess(state, ssd_bytes=16 << 20, python=python) as node:
                wrong += loaded(node, "before")[1]
                for number in range(PROMPTS):
                    store_and_use(node, [f"during {number}"])
                    time.sleep(2 * GROUP_S)  # each in a commit of its own
                for number in range(PROMPTS):
                    got, bad = loaded(node, f"during {number}")
                    wrong += bad
                    assert got == BLOCKS, "the host tier has them"
                assert node.is_running()
                assert node.stop() == 0
            was_injected = "INJECTED" in (tmp_path / "strace").read_text()
            with NodeProcess(state, ssd_bytes=16 << 20) as node:
                got, bad = loaded(node, "before")
                lost += BLOCKS - got
                wrong += bad
                wrong += sum(loaded(node, f"during {number}")[1] for number in range(PROMPTS))
            if not was_injected:
                break  # a run without a fault: it makes no Nth call
            tries += 1
    assert tries >= 2
    result = f"wrong {at_most(wrong, tries)}, sealed blocks lost {lost}"
    record("3 the Nth call on the index's file", tries, result)
    assert (wrong, lost) == (0, 0)


@pytest.mark.fleet
@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="strace may not trace here")
def test_memory_that_the_kernel_refuses_costs_its_part_of_the_tier_only(tmp_path: Path) -> None:
    """The node serves without it, says so, and has it when the kernel gives it."""
    python = traced(tmp_path, "madvise", "madvise", "error=ENOMEM")
    with NodeProcess(tmp_path / "state", http="127.0.0.1:0", python=python) as node:

        def host_bytes() -> float:
            return node.metrics()['tier_capacity_bytes{tier="host"}']

        until(lambda: host_bytes() == 0)
        store_and_use(node, ["refused"])
        assert loaded(node, "refused") == (0, 0)
        with urllib.request.urlopen(f"{node.http}/readyz", timeout=10) as answer:
            assert "the machine has no memory for the arena" in answer.read().decode()
        status = Path(f"/proc/{node.pid}/status").read_text()
        [tracer] = re.findall(r"TracerPid:\s*(\d+)", status)
        os.kill(int(tracer), signal.SIGKILL)  # which lets go
        until(lambda: host_bytes() == 64 << 20)
        store_and_use(node, ["given"])
        assert loaded(node, "given") == (BLOCKS, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.fleet
@pytest.mark.slow
def test_a_full_disk_costs_the_tier_only(tmp_path: Path, small_disk: Path) -> None:
    """The tier may take 8 MiB and the disk has 1.5: blocks are served on from the host tier, none wrong;
    when the disk has room the tier takes them."""
    prompts = [f"p{number}" for number in range(12)]

    def make_node() -> NodeProcess:
        directory = str(small_disk / "ssd")
        return NodeProcess(
            tmp_path / "state", ssd_bytes=8 << 20, ssd_dir=directory, http="127.0.0.1:0"
        )

    with make_node() as node:
        store_and_use(node, prompts)
        for prompt in prompts:
            assert loaded(node, prompt) == (BLOCKS, 0)
        assert node.metrics()['tier_blocks{tier="ssd"}'] < 12 * BLOCKS
        grow = ["mount", "-o", "remount,size=64m", str(small_disk)]
        subprocess.run(grow, check=True, capture_output=True)

        def all_sealed() -> bool:
            store_and_use(node, prompts)
            return node.metrics()['tier_blocks{tier="ssd"}'] == 12 * BLOCKS

        until(all_sealed, deadline_s=60)
    with make_node() as node:
        assert [loaded(node, prompt) for prompt in prompts] == [(BLOCKS, 0)] * 12
