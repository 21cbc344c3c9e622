"""Proof 2: what one tenant stored changes the time of no call that another makes.

Each visit of the prober follows a store by the other tenant: of the very text it asks for, or of another one.
The order is random, so both arms meet the same load. Control: the same audit on a node that lacks isolation.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.hashing import ROOT_PARENT, namespace_tag
from kvfabric.protocol.messages import BlockRun, EngineEvents, Located
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.types import BlockKey
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode
from tests.torture.scale import FULL, count, record
from tests.torture.tenants import Tenants, create_tenants
from tests.torture.timing import ALPHA, Arms, audit, compare, holm, kolmogorov_smirnov

pytestmark = [pytest.mark.fleet, pytest.mark.slow, pytest.mark.alone]

SAMPLES = count(250, 5000)
OF_CONTROL = 100
"""Of each arm."""
BLOCKS = 16
Result = TypeVar("Result")


class Visits:
    """The prober's calls on one prompt, each with its time. Texts are never used twice."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._client = tenants.engine.client
        self._owner, self._prober = tenants.names
        self._tag = namespace_tag(tenants.namespace_key(self._prober))
        self._chance = random.Random(3)
        self._serial = 0

    def measure(self, samples: int = SAMPLES) -> dict[str, Arms]:
        arms: dict[str, tuple[list[float], list[float]]] = {}
        order = [True, False] * samples
        self._chance.shuffle(order)
        for was_stored in order:
            asked, other = self._text(), self._text()
            texts = {text: self._keys(self._owner, text) for text in (asked, other)}
            mine = self._keys(self._prober, asked)
            self._tenants.store(self._owner, texts[asked if was_stored else other])
            for call, seconds in self._visit(mine).items():
                arms.setdefault(call, ([], []))[not was_stored].append(seconds)
        return {call: Arms(*times) for call, times in arms.items()}

    def _text(self) -> str:
        self._serial += 1
        return f"text {self._serial}"

    def _keys(self, tenant: str, text: str) -> list[BlockKey]:
        return self._tenants.keys(tenant, text, BLOCKS)

    def _visit(self, keys: list[BlockKey]) -> dict[str, float]:
        """Everything that a request can make its engine ask a node."""
        times: dict[str, float] = {}

        def timed(name: str, call: Callable[[], Result]) -> Result:
            began = time.perf_counter()
            found = call()
            times[name] = time.perf_counter() - began
            return found

        client = self._client
        session: dict[str, Any] = {"deadline_s": DEADLINE_S}
        part: dict[str, Any] = {"group": 0, "shard": 0, **session}
        request, size = f"visit-{self._serial}", self._tenants.engine.part_bytes
        handle = self._tenants.handle(self._prober, request)
        start = client.window.allocate(size * BLOCKS)
        assert start is not None
        offsets = range(start, start + size * BLOCKS, size)
        timed("open_handle", lambda: client.open_handle(request, handle, **session))
        timed("match", lambda: client.match(request, keys, **session))
        located = timed("load", lambda: client.load(request, keys, **part))
        if not located.num_blocks:
            located = Located(0, size, b"", bytes(4 * BLOCKS), b"", "")
        timed("confirm", lambda: client.confirm(request, keys, located, **part))
        timed("recheck", lambda: client.recheck(request, keys, **part))
        first = timed("reserve", lambda: client.reserve(request, ROOT_PARENT, keys, **part))
        if first.reservation:  # not where isolation is off and the blocks are there
            timed("abort", lambda: client.abort(first.reservation, **session))
            reserved = client.reserve(request, ROOT_PARENT, keys, **part).reservation
            timed("commit", lambda: client.commit(reserved, range(BLOCKS), offsets, **session))
        client.window.free(start)
        timed("match, own", lambda: client.match(request, keys, **session))
        located = timed("load, own", lambda: client.load(request, keys, **part))
        timed("confirm, own", lambda: client.confirm(request, keys, located, **part))
        run = BlockRun(self._tag, bytes(8), b"".join(key[:8] for key in keys))
        timed("publish", lambda: client.publish(EngineEvents((run,), (), False), **session))
        client.publish(EngineEvents((), (run,), False), **session)
        timed("release", lambda: client.release([request], **session))
        return times


@contextlib.contextmanager
def visits(directory: Path, *changes: str) -> Iterator[Visits]:
    options: dict[str, Any] = {"host_bytes": 512 << 20 if FULL else 128 << 20}
    options["max_blocks"] = 1 << 19
    with (
        Launcher() as launcher,
        ForkedNode(launcher, directory, changes=changes, **options) as node,
        AdminClient(directory / "admin.sock") as admin,
    ):
        engine = TinyEngine.connect(node.socket, tiny_hello())
        try:
            found = Visits(Tenants(directory, engine, create_tenants(admin, 2)))
            found.measure(10)  # until everything was used once
            yield found
        finally:
            engine.client.close()


def test_no_call_takes_longer_or_shorter_for_what_another_stored(tmp_path: Path) -> None:
    with visits(tmp_path / "n") as found:
        p_values, detected = audit(found.measure)
    assert len(p_values) == 13
    assert not detected, p_values
    least = min(p_values, key=p_values.__getitem__)
    record(
        "tenants 2. time of a node's calls, two-sample Kolmogorov-Smirnov",
        SAMPLES,
        f"N samples an arm, {len(p_values)} calls, none told what another stored; least p after Holm's "
        f"correction {p_values[least]:.2g} ({least})",
    )


def test_without_isolation_it_is_seen(tmp_path: Path) -> None:
    """The positive control: keys without the tenant, which alone decide."""
    with visits(tmp_path / "n", "no_salt", "no_lineage") as found:
        samples = found.measure(OF_CONTROL)
    p_values = compare({name: samples[name] for name in ("match", "load", "recheck", "reserve")})
    assert p_values["match"] < 1e-6
    assert min(p_values["load"], p_values["recheck"]) < 1e-6


# ---------------------------------------------------------------------- the test itself


def test_the_statistic_against_published_values() -> None:
    """p = 0.05 where D is 1.358 times the square root of (n + m) / (n m); two examples done by hand."""
    assert kolmogorov_smirnov([1, 2, 3], [1, 2, 3]) == (0.0, 1.0)
    assert kolmogorov_smirnov([1, 2, 3], [4, 5, 6])[0] == 1.0
    many = np.arange(20_000.0)
    shifted = many + 20_000 * 1.358 * (2 / 20_000) ** 0.5
    statistic, p = kolmogorov_smirnov(many.tolist(), shifted.tolist())
    assert statistic == pytest.approx(0.01358, abs=1e-4)
    assert p == pytest.approx(0.05, abs=0.002)


def test_equal_distributions_are_rarely_suspected_and_shifted_ones_are() -> None:
    chance = np.random.default_rng(1)
    pairs = [chance.lognormal(size=(2, 250)) for _ in range(2000)]
    p_values = [kolmogorov_smirnov(one.tolist(), other.tolist())[1] for one, other in pairs]
    assert 0.005 < np.mean(np.array(p_values) < 0.05) < 0.06
    one, other = pairs[0]
    assert kolmogorov_smirnov(one.tolist(), (other * 2.5).tolist())[1] < 1e-6


def test_holms_correction() -> None:
    """The example of his paper's procedure: steps of m, m - 1, ..., never falling."""
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_a_detection_must_repeat() -> None:
    """An accident of one round is none; what is there in both is."""
    same, later = list(np.arange(250.0)), list(np.arange(250.0) + 200)
    rounds = iter([{"x": Arms(same, later)}, {"x": Arms(same, same)}])
    p_values, detected = audit(lambda: next(rounds))
    assert p_values["x"] < ALPHA
    assert not detected
    assert audit(lambda: {"x": Arms(same, later), "y": Arms(same, same)})[1] == {"x"}
