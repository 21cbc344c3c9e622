"""Guards of the product, each taken out: some seed must find each of them missing.

A twin is a context: inside it one guard is gone. `expects` is what the ledger then says, in part. `needs`: of
a seed's plan, what the guard is there for; other seeds need not be run. `seed`: one that found it; after a
change of the product it may be another, which is then looked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from kvfabric.daemon import arriving, fetching
from kvfabric.events.index import NodeFeed
from kvfabric.registry.redis.copy import RegistryCopy
from kvfabric.registry.redis.registry import RedisRegistry
from kvfabric.registry.state import RegistryState
from kvfabric.store import store
from kvfabric.store.index import packed_keys
from kvfabric.store.lease import LeaseBook
from kvfabric.store.quota import TierAccounts
from kvfabric.store.reading import Reader
from kvfabric.types import MissReason
from tests.simulation.scenario import simulate
from tests.simulation.world import Plan, plan_of

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Twin:
    name: str
    seed: int
    without: Patch
    expects: str
    needs: Callable[[Plan], bool] = lambda _: True


def _leases_free_memory() -> Any:
    """A lease whose time is over lets go of its blocks, whoever still reads them."""
    lapse = LeaseBook._lapse

    def lapse_and_free(self: LeaseBook, request: Any) -> None:
        lapse(self, request)
        rows, request.rows = request.rows, request.rows[:0]
        if len(rows):
            self._drop_lapsed(rows)
            self._residency.unhold(rows)

    return patch.object(LeaseBook, "_lapse", lapse_and_free)


def _no_generations() -> Any:
    """Whatever a reader located counts as what is there now."""
    confirm = Reader.confirm

    def any_generation(
        self: Reader, session: Any, request: str, keys: bytes, _: bytes, part: Any
    ) -> Any:
        rows = self._index.lookup(packed_keys(keys))
        parts = self._index.parts(rows, part[1])
        now = self._index.part_generation.array[parts].tobytes()
        return confirm(self, session, request, keys, now, part)

    return patch.object(Reader, "confirm", any_generation)


def _no_fence() -> Any:
    return patch.object(RegistryState, "fence_reason", lambda *_: MissReason.NONE)


def _no_epoch_lease() -> Any:
    return patch.object(RedisRegistry, "usable", lambda self: self.state)


def _success_at_once() -> Any:
    async def reached(self: RedisRegistry, version: int) -> list[Any]:
        return []

    return patch.object(RedisRegistry, "reached", reached)


def _nobody_gives_back() -> Any:
    """A store that lost something is believed."""

    async def believe(self: RegistryCopy, store: Any, found: Any) -> bool:
        whole = await store.load(1)
        if whole is None:
            return False
        await self._replace(whole.state, whole.entries)
        return True

    return patch.object(RegistryCopy, "_give_back", believe)


def _no_gaps() -> Any:
    """A batch is taken in whatever its number."""

    def watch(self: NodeFeed, batch: Any) -> bool:
        first = batch.gap or batch.boot_id != self._boot_id
        self.needs_snapshot = self.needs_snapshot or first
        self._boot_id, self._next = batch.boot_id, batch.sequence + 1
        if self.needs_snapshot:
            self._kept.append(batch)
        else:
            self._take(batch)
        return not self.needs_snapshot

    return patch.object(NodeFeed, "watch", watch)


def _nothing_verified() -> Any:
    return patch.object(arriving, "verified", lambda _parts, checksums: checksums)


def _slots_given_back_early() -> Any:
    """What is received into is free once nobody waits, whatever UCX does."""

    async def at_once(_: Any) -> None:
        return

    return patch.object(fetching, "_quiet", at_once)


def _no_lineages() -> Any:
    """A key alone says whose block it is."""

    class Whatever:
        __array_ufunc__ = None

        def __eq__(self, other: object) -> Any:
            return np.ones(len(other), np.bool_)  # type: ignore[arg-type]

        __hash__ = None  # type: ignore[assignment]

    readable = Reader._readable

    def any_lineage(self: Reader, rows: Any, _: Any, *rest: Any, **more: Any) -> Any:
        return readable(self, rows, Whatever(), *rest, **more)  # type: ignore[arg-type]

    return patch.object(Reader, "_readable", any_lineage)


def _no_floors() -> Any:
    return patch.object(TierAccounts, "above_floor", lambda self, slot: self.accounts[slot].used)


def _reservations_stay() -> Any:
    """Nobody ends what its writer forgot."""
    return patch.object(LeaseBook, "sweep", lambda _: False)


def _purge_misses() -> Any:
    return patch.object(store, "is_made_of", lambda *_: False)


def _spoils(plan: Plan) -> bool:
    return "spoilt" in plan.kinds and plan.num_nodes == 2 and plan.num_requests == 40


def _delays(plan: Plan) -> bool:
    return "slow" in plan.kinds and plan.num_nodes == 2 and plan.num_requests == 40


TWINS = (
    Twin("leases free memory", 41, _leases_free_memory, "slot", lambda plan: plan.lease_s < 1),
    Twin(
        "no generations",
        212,
        _no_generations,
        "wrong bytes",
        lambda plan: "crash node" in plan.kinds and plan.confirm_elsewhere == 1,
    ),
    Twin("no fence", 29, _no_fence, "under"),
    Twin("no epoch lease", 191, _no_epoch_lease, "under", lambda plan: "partition" in plan.kinds),
    Twin("success at once", 29, _success_at_once, "under"),
    Twin(
        "nobody gives back", 34, _nobody_gives_back, "", lambda plan: "lose changes" in plan.kinds
    ),
    Twin("no gaps", 89, _no_gaps, "believes", lambda plan: "careless" in plan.kinds),
    Twin("nothing verified", 55, _nothing_verified, "wrong bytes", _spoils),
    Twin("slots given back early", 41, _slots_given_back_early, "slot", _delays),
    Twin("no lineages", 3, _no_lineages, "another tenant"),
    Twin("no floors", 35, _no_floors, "floor", lambda plan: "invalidate" not in plan.operations),
    Twin("reservations stay", 1, _reservations_stay, "keeps"),
    Twin("purge misses", 11, _purge_misses, "purged"),
)


def found_by(twin: Twin, seeds: Iterable[int]) -> tuple[int, str]:
    """(a seed of `seeds` that finds it, what it says); -1 if none does."""
    with twin.without():
        for seed in dict.fromkeys((twin.seed, *seeds)):
            if twin.needs(plan_of(seed)) and (violation := simulate(seed).violation):
                return seed, violation
    return -1, ""
