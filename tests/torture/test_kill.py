"""Proof 1: a node that is killed at any moment serves no wrong byte, starts again, and lost nothing sealed.

The oracle (`oracle.py`) is this process; nodes are processes of their own, killed by SIGKILL: half of them at
random times, half at the failpoints in turn. In every second run of lives the disk forgets what was not
synced (`guards.volatile`), as a power failure would make it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvfabric.failpoints import POINTS as EVERY_POINT
from tests.torture.launcher import Launcher
from tests.torture.oracle import AT_START, Oracle, Tally
from tests.torture.scale import FULL, at_most, count, record

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

POINTS = [point for point in EVERY_POINT if not point.startswith(("takeover.", "keyring.root."))]
"""Those take two daemons, or a rotation of the root key: `test_takeover` and `test_keyring` kill at them."""
CYCLES = count(100, 2000, "KVFABRIC_TORTURE_CYCLES")
LIVES_OF_A_DIRECTORY = 50
HITS = 10 if FULL else 1
"""Of each failpoint at least."""
WARM_SHARE = 0.99


def test_killed_nodes_serve_no_wrong_byte_and_lose_nothing_sealed(tmp_path: Path) -> None:
    """Zero wrong bytes, zero failed starts, zero acknowledged changes lost, nothing withdrawn is served,
    and at least 99 % of what was sealed is there after the start."""
    tally = Tally()
    try:
        _kill_and_kill_again(tmp_path, tally)
    finally:
        _publish(tally)  # also of a run that was cut short
    assert tally.wrong == 0
    assert tally.failed_starts == []
    assert tally.lost_changes == []
    assert tally.stale == 0
    assert tally.corrupt == 0
    assert tally.checked > 10 * tally.cycles
    assert tally.warm >= WARM_SHARE * tally.sealed > 0


def _kill_and_kill_again(tmp_path: Path, tally: Tally) -> None:
    chance, directory = random.Random(4), 0
    with Launcher() as launcher:
        while tally.cycles < CYCLES or min(tally.kills_at[point] for point in POINTS) < HITS:
            changes = ("volatile",) if directory % 2 else ()
            with Oracle(
                launcher, tmp_path / f"{directory}", seed=directory, changes=changes, tally=tally
            ) as oracle:
                for life in range(min(LIVES_OF_A_DIRECTORY, CYCLES // 4)):
                    if life % 2:
                        oracle.cycle()
                        continue
                    fewest = min(tally.kills_at[point] for point in POINTS)
                    point = chance.choice([p for p in POINTS if tally.kills_at[p] == fewest])
                    oracle.cycle(point, 1 if point in AT_START else 1 + chance.randrange(3))
            directory += 1
            never = [point for point in POINTS if not tally.kills_at[point]]
            assert not never or tally.cycles < 4 * CYCLES, f"no life comes past {never}"


def _publish(tally: Tally) -> None:
    record("1 kill -9, blocks with wrong bytes", tally.checked, at_most(tally.wrong, tally.checked))
    failed = len(tally.failed_starts)
    record("1 kill -9, failed starts", tally.cycles, at_most(failed, tally.cycles))
    cold = tally.sealed - tally.warm
    record("1 kill -9, sealed parts not warm", tally.sealed, at_most(cold, tally.sealed))
    record("1 kill -9, all that was counted", tally.cycles, tally.line())


def _lives(
    tmp_path: Path, changes: tuple[str, ...], *, failpoint: str, lives: int, verifies: bool = True
) -> Tally:
    """A few lives, each killed at `failpoint` and followed by one that is looked at."""
    with (
        Launcher() as launcher,
        Oracle(launcher, tmp_path / "state", changes=changes, verifies=verifies) as oracle,
    ):
        for life in range(lives):
            oracle.cycle(failpoint, nth=1 + 2 * life)
            oracle.look()
        return oracle.tally


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "no checksum"])
def test_a_torn_record_is_never_served(tmp_path: Path, guarded: bool) -> None:
    """The last page of every write is lost, and the oracle believes what its node hands out. Records that
    the node verifies are missed; with the checksum off, the oracle is served wrong bytes and sees it."""
    changes = ("torn",) if guarded else ("torn", "no_checksum")
    tally = _lives(tmp_path, changes, failpoint="store.sealed", lives=4, verifies=False)
    assert tally.checked > 0
    assert (tally.wrong == 0) == guarded
    assert not guarded or tally.corrupt > 0


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "index first"])
def test_the_index_speaks_of_nothing_that_is_not_written(tmp_path: Path, guarded: bool) -> None:
    """Killed right before the bytes are written, a node that commits its index first comes back with
    records that do not verify: found out, not served, and lost."""
    changes = () if guarded else ("index_first",)
    tally = _lives(tmp_path, changes, failpoint="segment.appended", lives=3)
    assert tally.wrong == 0
    assert (tally.corrupt == 0) == guarded


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "no sync"])
def test_sealed_means_synced(tmp_path: Path, guarded: bool) -> None:
    """When power fails, what was not synced is gone: a node that does not sync loses what it called
    sealed."""
    changes = ("volatile",) if guarded else ("volatile", "no_sync")
    tally = _lives(tmp_path, changes, failpoint="store.sealed", lives=2)
    assert tally.wrong == 0
    assert (tally.warm >= WARM_SHARE * tally.sealed > 0) == guarded
    assert (tally.corrupt == 0) == guarded
