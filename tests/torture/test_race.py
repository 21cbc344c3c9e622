"""Proof 3 of invalidation: nothing withdrawn is served, whatever happens while it is withdrawn.

Readers and writers (`race`) against changes, kills, hand-overs, stops and wall clocks that jump
(`upheaval`), judged by what had been acknowledged before a question was sent (`ledger`): with a registry of
a node's own, and with two nodes on one Redis. Twins: nodes without one guard, which must be found out.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, payload_of
from kvfabric.testing.minting import Minter, keys_of, segment_of
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT, BlockKey, Segment
from tests.torture.launcher import Launcher
from tests.torture.ledger import Ledger
from tests.torture.nodes import ForkedNode
from tests.torture.race import Reader, Tally
from tests.torture.scale import at_most, count, record
from tests.torture.upheaval import LEASE_S, Changer, Upheaval, in_threads

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

CHECKS = count(100_000, 10_000_000, "KVFABRIC_TORTURE_RACE")
OF_A_FLEET = 1_000_000
"""Checks of one life of a registry, which keeps every version that it ever had."""
EVERY_S = count(2, 6)
"""Between two things that happen to a node."""
PATIENCE_S = count(400, 6 * 3600)


@dataclass
class Race:
    """Its parts while it runs, and what was seen."""

    readers: list[Reader]
    changer: Changer
    upheaval: Upheaval
    ledger: Ledger
    began: float = field(default_factory=time.monotonic)

    @property
    def tally(self) -> Tally:
        return reduce(add, (reader.tally for reader in self.readers))

    def run(self, is_enough: Callable[[Tally], bool], *, every_s: float = EVERY_S) -> Tally:
        ends = time.monotonic() + PATIENCE_S

        def is_over() -> bool:
            return is_enough(self.tally) or time.monotonic() > ends

        in_threads(
            *(lambda reader=reader: reader.run(is_over) for reader in self.readers),
            lambda: self.changer.run(is_over),
            lambda: self.upheaval.run(is_over, every_s),
            patience_s=PATIENCE_S + 60,
        )
        return self.tally


@contextlib.contextmanager
def race(directory: Path, *changes: str, fleet: bool, seed: int = 1) -> Iterator[Race]:
    directory.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        options: dict[str, object] = {"epoch_lease_s": LEASE_S, "log_level": "error"}
        options |= {"host_bytes": 16 << 20, "ssd_bytes": 32 << 20, "window_bytes": 1 << 20}
        redis, names = None, ["n1"]
        if fleet:
            redis, names = stack.enter_context(RedisServer(directory / "redis")), ["n1", "n2"]
            options |= {"directory": redis.url, "keyring_dir": directory / "keys"}
            options |= {"ucx_net_devices": "lo"}
        homes = [directory / name for name in names]
        upheaval = stack.enter_context(
            Upheaval(launcher, homes, changes=changes, seed=seed, redis=redis, **options)
        )
        ledger = Ledger()
        changer = Changer(homes, ledger, seed)
        stack.callback(changer.close)
        changer.prepare(2)
        keys = directory / "keys" if fleet else homes[0]
        readers = []
        for number, home in enumerate(homes):
            others = tuple(name for name in names if name != home.name)
            reader = Reader(
                home / "node.sock", keys, ledger, changer.tenants, seed + number, others
            )
            stack.callback(reader.close)
            readers.append(reader)
        yield Race(readers, changer, upheaval, ledger)


@dataclass
class Seen:
    """Of one life or of several. `fetched`: blocks from other nodes, by nodes that lived to tell."""

    tally: Tally = field(default_factory=Tally)
    deeds: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    fetched: int = 0
    stale_at_auditor: int = 0

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.tally + other.tally,
            self.deeds + other.deeds,
            self.changes + other.changes,
            self.fetched + other.fetched,
            self.stale_at_auditor + other.stale_at_auditor,
        )


def _live(directory: Path, seed: int, checks: int, *, fleet: bool) -> Seen:
    """One life of a registry, in which everything happens that may happen to a node."""
    with race(directory, "clocks_jump", fleet=fleet, seed=seed) as running:
        upheaval = running.upheaval
        tally = running.run(lambda seen: seen.num_checks >= checks and upheaval.met_all)
        assert tally.num_checks >= checks, f"it took too long: {tally}"
        seen = Seen(tally, upheaval.counts, running.changer.counts)
        for node in upheaval.nodes:
            metrics = node.metrics()
            seen.stale_at_auditor += int(metrics["stale_serves_total"])
            seen.fetched += int(metrics.get('transfers_total{result="fetched_blocks"}', 0))
    return seen


def _prove(directory: Path, checks: int, *, fleet: bool) -> None:
    seen, seeds = Seen(), itertools.count(1)
    at_once = 1 if fleet else 2  # a node takes one core
    with ThreadPoolExecutor(at_once) as pool:
        while (left := checks - seen.tally.num_checks) > 0:
            wanted = min(-(-left // at_once), OF_A_FLEET)
            lives = [
                pool.submit(_live, directory / f"{seed}", seed, wanted, fleet=fleet)
                for seed in itertools.islice(seeds, at_once)
            ]
            seen = reduce(add, (life.result() for life in lives), seen)
            found = seen.tally
            assert (found.num_stale, found.wrong, found.missed) == (0, 0, []), found
    tally = seen.tally
    assert seen.stale_at_auditor == 0
    # Refused is worth something only where others were served, by each way.
    for kind in ("match", "handle", "fresh", "confirm", "commit"):
        assert min(tally.refused[kind], tally.served[kind]) > checks // 5000, tally
    assert tally.refused["stolen"] > checks // 500
    assert (seen.fetched > 0) == fleet
    where = "two nodes on Redis" if fleet else "a node with its own registry"
    served, cold = tally.served.total(), tally.cold.total()
    record(
        f"invalidation race, {where}",
        tally.num_checks,
        f"{at_most(tally.num_stale, tally.num_refused)} stale of {tally.num_refused} that had to be "
        f"refused ({_told(tally.refused)}); {served} controls served, {cold} cold, "
        f"{len(tally.missed)} missed; {tally.raced} raced; {tally.wrong} with wrong bytes; "
        f"changes: {_told(seen.changes)}; meanwhile: {_told(seen.deeds)}"
        + (f"; {seen.fetched} blocks fetched" if fleet else ""),
    )


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))


@pytest.mark.parametrize("fleet", [False, True], ids=["embedded", "redis"])
def test_nothing_withdrawn_is_served(tmp_path: Path, fleet: bool) -> None:
    _prove(tmp_path, CHECKS // 2, fleet=fleet)


TWINS = {
    "no_fence": ("match", "handle", "fresh"),
    "no_store_fence": ("commit",),
    "no_confirmation": ("confirm",),
}


@pytest.mark.parametrize("guard", TWINS)
def test_a_missing_guard_is_found_out(tmp_path: Path, guard: str) -> None:
    kinds = TWINS[guard]
    with race(tmp_path / "r", guard, fleet=False) as running:
        tally = running.run(lambda seen: all(seen.stale[kind] > 3 for kind in kinds))
    assert all(tally.stale[kind] > 3 for kind in kinds), tally
    also = ("commit", "confirm") if guard == "no_fence" else ()
    assert set(+tally.stale) <= {*kinds, *also}, tally


# ---------------------------------------------------------------------- slots that were reused

PART_BYTES = 4096
LATE = count(3, 300)
"""Rounds of a reader that copies too late."""


@dataclass
class Late:
    """What was seen: slots that hold another block's bytes by the time they are read, and how many of these
    the node said may be used; of those, how many were a withdrawn version's."""

    reused: int = 0
    believed: int = 0
    stale: int = 0


def _read_late(directory: Path, *changes: str, rounds: int) -> Late:
    """A reader locates blocks and gives up its lease; a version's blocks take the slots, and are withdrawn.
    The reader copies now, opens its request anew, and asks whether what it located may be used."""
    found = Late()
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        node = ForkedNode(launcher, directory, changes=changes, host_bytes=256 << 10)
        stack.enter_context(node)
        admin = stack.enter_context(AdminClient(directory / "admin.sock"))
        text = pb.RegisterTemplateRequest(name="w", version="1", text=b"w")
        admin.call(admin.registry.RegisterTemplate, text)
        engine, minter = TinyEngine.connect(node.socket), Minter(directory)
        stack.callback(engine.client.close)

        def keys(request: str, prompt: str, segments: tuple[Segment, ...] = ()) -> list[BlockKey]:
            handle = minter.handle(engine, request, admin.state(), segments, tenant=DEFAULT_TENANT)
            opened = engine.client.open_handle(request, handle, deadline_s=DEADLINE_S)
            return keys_of(opened, prompt, 4)

        for number in range(rounds):
            promote = pb.PromoteTemplateRequest(name="w", version="1")
            admin.call(admin.registry.PromoteTemplate, promote)
            wanted = keys("late", f"late {number}")
            engine.store("late", wanted)
            located = engine.locate("late", wanted)
            assert located.num_blocks == 4
            engine.release("late")
            segment = (segment_of(admin.state(), "w", "1"),)
            flood = []
            for one in range(40):
                flood += keys(f"w{one}", f"w {number} {one}", segment)
                engine.store(f"w{one}", flood[-4:])
                engine.locate(f"w{one}", flood[-4:])  # of as much use as what is wanted
                engine.release(f"w{one}")
            retire = pb.InvalidateRequest(scope="template", name="w", wait_s=0)
            admin.call(admin.registry.Invalidate, retire)
            offsets: list[int] = np.frombuffer(located.offsets, "<u8").tolist()
            copies = [bytes(engine.client.arena[at : at + PART_BYTES]) for at in offsets]
            assert keys("late", f"late {number}") == wanted
            engine.store("late", wanted)  # what was evicted lies elsewhere now
            engine.client.match("late", wanted, deadline_s=DEADLINE_S)
            confirmed = engine.client.confirm(
                "late", wanted, located, group=0, shard=0, deadline_s=DEADLINE_S
            )
            engine.release("late")
            withdrawn = {payload_of(key, PART_BYTES) for key in flood}
            for place, (key, data) in enumerate(zip(wanted, copies, strict=True)):
                is_reused = data != payload_of(key, PART_BYTES)
                found.reused += is_reused
                found.believed += is_reused and place < confirmed.num_blocks
                found.stale += data in withdrawn and place < confirmed.num_blocks
    return found


def test_a_slot_that_was_reused_is_not_confirmed(tmp_path: Path) -> None:
    found = _read_late(tmp_path / "n", rounds=LATE)
    assert found.reused > LATE
    assert (found.believed, found.stale) == (0, 0)
    record(
        "invalidation race, slots that a withdrawn version took before a late reader copied",
        found.reused,
        f"{at_most(found.believed, found.reused)} confirmed",
    )


def test_without_the_generation_a_late_reader_uses_what_is_withdrawn(tmp_path: Path) -> None:
    """The twin: the lease is good, and the block is there, elsewhere."""
    found = _read_late(tmp_path / "n", "no_generation", rounds=2)
    assert found.stale > 3
