"""BlockStore against a dictionary, under every order of calls hypothesis thinks of.

After each step: charges add up and stay within capacity, every queue and counter is what the rows say,
the events describe what is READY, no leased block is missing. At each read: never wrong bytes, a hit's bytes
are those stored, and nothing of a withdrawn template is served or stored.

What a pinned template keeps stays until the pin ends.

Beside it the same machine without one guard: without lease guard, fence or pin guard it must find a fault.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import Located, Reserved
from kvfabric.registry.state import (
    RETIRED,
    SERVING,
    RegistryState,
    TemplateVersion,
    Tenant,
    TenantLimits,
)
from kvfabric.store import policy
from kvfabric.store.index import Rows, packed_keys
from kvfabric.store.lease import RequestGrant
from kvfabric.store.residency import Residency
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import (
    PART_BYTES,
    SESSION,
    StoreRig,
    grant_of,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.types import (
    BlockKey,
    GrantState,
    Incarnation,
    MissReason,
    Segment,
    TenantId,
    TierName,
    template_scope,
)

CHAINS = [make_keys(6, seed) for seed in range(4)]
TENANTS = ("default", "t-1")
NUM_SLOTS = 16
LEASE_S = 10.0
TEMPLATED = 1
"""The chain whose prompts begin with a template that can be withdrawn."""

INCARNATION = Incarnation(b"incarnation-of-t")
TEXT_BLOCKS, PIN_BUDGET = 4, 3
PIN_S = 60.0

requests = st.sampled_from(["r1", "r2"])
chains = st.integers(0, len(CHAINS) - 1)
lengths = st.integers(1, 6)


def template_state(state: str, epoch: int, pinned_until: float = 0.0) -> RegistryState:
    version = TemplateVersion("t", "1", INCARNATION, b"text", state=state)
    if pinned_until:
        version = replace(version, pinned_until=pinned_until, pin_s=PIN_S)
    owner = TenantId(TENANTS[TEMPLATED % 2])
    budget = TenantLimits(pin_max_bytes=PIN_BUDGET * PART_BYTES)
    return RegistryState(
        tenants=MappingProxyType({owner: Tenant(owner, owner, limits=budget)}),
        templates=MappingProxyType({("t", "1"): version}),
        epochs=MappingProxyType({template_scope("t"): epoch}),
    )


class WrongBytes(Exception):
    pass


class LeasedBlockMissing(Exception):
    pass


class WithdrawnServed(Exception):
    pass


class PinnedBlockMissing(Exception):
    pass


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.rig = self.make_rig()
        self.runner.run(self.rig.__aenter__())
        self.reservations: list[tuple[Reserved, list[BlockKey]]] = []
        self.copies: dict[tuple[str, int], tuple[list[BlockKey], Located]] = {}
        self.epoch = 0
        self.rig.state = template_state(SERVING, self.epoch)
        self.dropped: set[BlockKey] = set()
        """Taken out on purpose since it was leased."""
        self.stored: set[BlockKey] = set()
        """Every key ever committed: what the store may answer with."""
        self.pin_ends = 0.0
        self.pinned: list[BlockKey] = []
        """What the pin kept when it was last looked at, the leading blocks of the chain."""

    def grant_for(self, chain: int) -> RequestGrant:
        grant = grant_of(TENANTS[chain % 2])
        if chain % len(CHAINS) != TEMPLATED:
            return grant
        segments = (Segment("t", "1", INCARNATION, 0, TEXT_BLOCKS * 64 + 7),)
        return replace(grant, segments=segments, epochs=((template_scope("t"), self.epoch),))

    @property
    def is_withdrawn(self) -> bool:
        state = self.rig.state
        return state is None or state.templates["t", "1"].state != SERVING

    def make_rig(self) -> StoreRig:
        limits = StoreLimits(
            host_bytes=NUM_SLOTS * PART_BYTES,
            max_blocks=24,
            lease_s=LEASE_S,
            reservation_s=LEASE_S,
            lease_share=0.6,
            copy_threads=1,
        )
        return StoreRig(layout=make_layout(), limits=limits)

    def teardown(self) -> None:
        self.rig.store.quiet(SESSION)
        self.rig.store.end_rights(SESSION)
        statistics = self.rig.store.statistics()
        assert statistics.leased_bytes == statistics.draining_bytes == 0
        assert statistics.reserved_bytes == statistics.num_requests == 0
        self.rig.store._residency.check()
        self.runner.run(self.rig.__aexit__(None, None, None))
        self.runner.close()

    @rule(request=requests, chain=chains, start=st.integers(0, 5), length=lengths)
    def reserve(self, request: str, chain: int, start: int, length: int) -> None:
        keys = CHAINS[chain][start : start + length]
        parent = CHAINS[chain][start - 1] if start else ROOT_PARENT
        name = f"{request}-{chain}"
        self.rig.open(name, self.grant_for(chain))
        reserved = self.rig.reserve(name, keys, parent=parent)
        states = list(reserved.states)
        refused = [at for at, state in enumerate(states) if state == GrantState.REFUSED]
        if refused:
            assert GrantState.GRANTED not in states[refused[0] :]
        if reserved.reservation:
            self.reservations.append((reserved, keys))

    @initialize(is_pinned=st.booleans())
    def begin_warm(self, is_pinned: bool) -> None:
        self.put(0)
        self.put(1)
        if is_pinned:
            self.pin()

    @rule(chain=chains)
    def put(self, chain: int) -> None:
        """A whole chain at once: pressure, so that others are evicted."""
        keys = CHAINS[chain]
        if self.runner.run(self.rig.put(keys, grant=self.grant_for(chain))):
            self.stored.update(keys)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if not self.reservations:
            return
        at = data.draw(st.integers(0, len(self.reservations) - 1))
        reserved, keys = self.reservations.pop(at)
        granted = [key for key, state in zip(keys, reserved.states, strict=True) if state == 0]
        committed = self.runner.run(self.rig.commit(reserved, keys))
        if any(committed.states) and self.is_withdrawn and keys[0] in CHAINS[TEMPLATED]:
            raise WithdrawnServed
        self.stored.update(
            key for key, state in zip(granted, committed.states, strict=True) if state
        )

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.reservations:
            at = data.draw(st.integers(0, len(self.reservations) - 1))
            reserved, _ = self.reservations.pop(at)
            self.rig.store.abort(SESSION, reserved.reservation)

    @rule(request=requests, chain=chains, length=lengths)
    def match_and_locate(self, request: str, chain: int, length: int) -> None:
        name, keys = f"{request}-{chain}", CHAINS[chain][:length]
        num_blocks, _ = self.rig.match(name, keys, self.grant_for(chain))
        if num_blocks and chain == TEMPLATED and self.is_withdrawn:
            raise WithdrawnServed
        located = self.runner.run(self.rig.load(name, keys[:num_blocks]))
        assert located.num_blocks == num_blocks
        if num_blocks:
            self.copies[request, chain] = (keys[:num_blocks], located)
            self.dropped.difference_update(keys[:num_blocks])

    @rule(request=requests, chain=chains)
    def confirm(self, request: str, chain: int) -> None:
        if (request, chain) in self.copies:
            keys, located = self.copies[request, chain]
            assert self.rig.confirm(f"{request}-{chain}", keys, located) <= len(keys)

    @invariant()
    def what_was_located_stays_until_it_is_released(self) -> None:
        """However late a reader copies."""
        for keys, located in self.copies.values():
            if self.rig.copy(located, verify=False) != [part_bytes(key) for key in keys]:
                raise WrongBytes
            assert self.stored.issuperset(keys)

    @invariant()
    def nothing_withdrawn_is_served(self) -> None:
        """Neither under the handle of before the withdrawal nor under one made since."""
        if self.is_withdrawn:
            for epoch in (self.epoch - 1, self.epoch):
                grant = replace(self.grant_for(TEMPLATED), epochs=((template_scope("t"), epoch),))
                num_blocks, _ = self.rig.match("late", CHAINS[TEMPLATED], grant)
                self.rig.store.release(SESSION, ["late"])
                if num_blocks:
                    raise WithdrawnServed

    @invariant()
    def no_leased_block_is_missing(self) -> None:
        """Lapsed or not: until its reader is done, a block stays findable, unless it was taken out."""
        index = self.rig.store._index
        for keys, _ in self.copies.values():
            kept = [key for key in keys if key not in self.dropped]
            rows = index.lookup(packed_keys(b"".join(kept)))
            if not (index.host_parts.array[rows] > 0).all():
                raise LeasedBlockMissing

    @rule(request=requests, chain=chains)
    def release(self, request: str, chain: int) -> None:
        self.copies.pop((request, chain), None)
        self.rig.store.release(SESSION, [f"{request}-{chain}"])

    @rule(chain=chains)
    def read_as_another_tenant(self, chain: int) -> None:
        num_blocks, _ = self.rig.match("spy", CHAINS[chain], self.grant_for(chain + 1))
        assert num_blocks == 0
        self.rig.store.release(SESSION, ["spy"])

    @rule(num_blocks=st.integers(1, NUM_SLOTS))
    def evict(self, num_blocks: int) -> None:
        """What may go, of whoever has most."""
        residency = self.rig.store._residency
        residency._evict(num_blocks * PART_BYTES, residency.host.by_excess, -1)

    def settle_pins(self) -> None:
        self.pinned = []
        self.runner.run(self.rig.store.settle_pins())

    @rule()
    def pin(self) -> None:
        if not self.is_withdrawn:
            self.pin_ends = self.rig.clock() + PIN_S
            end = self.rig.wall() + PIN_S
            self.rig.state = template_state(SERVING, self.epoch, end)
            self.settle_pins()

    @rule()
    def unpin(self) -> None:
        if not self.is_withdrawn:
            self.pin_ends = 0.0
            self.rig.state = template_state(SERVING, self.epoch)
            self.settle_pins()

    @rule(seconds=st.sampled_from([-86_400.0, 86_400.0]))
    def set_the_wall_clock(self, seconds: float) -> None:
        self.rig.wall.now += seconds

    @invariant()
    def what_is_pinned_stays_until_its_pin_ends(self) -> None:
        index = self.rig.store._index
        rows = index.lookup(packed_keys(b"".join(self.pinned)))
        if not (index.host_parts.array[rows] > 0).all():
            raise PinnedBlockMissing
        (num_bytes,) = (
            one.pinned_bytes
            for one in self.rig.store.statistics().tenants
            if one.tenant == TENANTS[TEMPLATED % 2]
        )
        num_pinned = num_bytes // PART_BYTES
        assert len(self.pinned) <= num_pinned <= PIN_BUDGET
        assert not num_pinned or self.rig.clock() < self.pin_ends
        self.pinned = CHAINS[TEMPLATED][:num_pinned]

    @rule()
    def withdraw(self) -> None:
        self.pin_ends = 0.0
        self.epoch += 1
        self.rig.state = template_state(RETIRED, self.epoch)
        self.settle_pins()

    @rule()
    def roll_back(self) -> None:
        self.pin_ends = 0.0
        self.epoch += 1
        self.rig.state = template_state(SERVING, self.epoch)
        self.settle_pins()

    @rule()
    def lose_the_epoch_lease(self) -> None:
        held, self.rig.state = self.rig.state, None
        assert self.rig.match("cut off", CHAINS[0], self.grant_for(0)) == (
            0,
            MissReason.NO_EPOCH_LEASE,
        )
        self.rig.store.release(SESSION, ["cut off"])
        self.rig.state = held

    @rule(seconds=st.sampled_from([1.0, LEASE_S + 1, 86_400.0]))
    def wait(self, seconds: float) -> None:
        self.rig.clock.now += seconds
        self.rig.store.statistics()  # ends what is overdue
        self.settle_pins()

    @rule()
    def lose_the_connections(self) -> None:
        """The engine comes back at once, without proof that its old copies have ended."""
        self.rig.store.end_rights(SESSION)
        self.rig.store.open_session(SESSION, self.rig.layout)

    @rule()
    def prove_quiet(self) -> None:
        self.rig.store.quiet(SESSION)
        self.copies.clear()
        self.rig.store.open_session(SESSION, self.rig.layout)

    @rule(chain=chains, position=st.integers(0, 5))
    def discard(self, chain: int, position: int) -> None:
        """As a scrubber or a purge does, without asking who holds it."""
        index = self.rig.store._index
        row = int(index.lookup(packed_keys(CHAINS[chain][position]))[0])
        if row and index.lineage.cell[row]:
            self.dropped.add(CHAINS[chain][position])
            self.rig.store._drop(row)
            self.settle_pins()

    @invariant()
    def everything_adds_up(self) -> None:
        store = self.rig.store
        store._residency.check()
        statistics = store.statistics()
        used = statistics.used_bytes[TierName.HOST]
        assert used == sum(tenant.host_bytes for tenant in statistics.tenants)
        assert used <= statistics.capacity_bytes[TierName.HOST]
        runs = [run for some in store.resident_runs(TierName.HOST, 5) for run in some]
        present = {
            (run.namespace_tag, run.keys[start : start + 8])
            for run in runs
            for start in range(0, len(run.keys), 8)
        }
        assert present == self.rig.events.present


class _NoHolds:
    """Residency as leases see it in the twin: nothing they hold is held."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def hold(self, rows: Rows) -> None:
        pass

    unhold = hold

    def __getattr__(self, name: str) -> object:
        return getattr(self._residency, name)


class WithoutLeaseGuard(StoreMachine):
    """What is leased may go."""

    def make_rig(self) -> StoreRig:
        rig = super().make_rig()
        setattr(rig.store._leases, "_residency", _NoHolds(rig.store._residency))  # noqa: B010
        return rig

    @invariant()
    def everything_adds_up(self) -> None:
        pass

    def teardown(self) -> None:
        self.runner.run(self.rig.__aexit__(None, None, None))
        self.runner.close()


class WithoutFence(StoreMachine):
    """Rights are not compared with what the registry says now."""

    def make_rig(self) -> StoreRig:
        rig = super().make_rig()
        setattr(rig.store._reader._access, "_fence", lambda grant: MissReason.NONE)  # noqa: B010
        return rig

    def lose_the_epoch_lease(self) -> None:
        pass


class WithoutPinGuard(StoreMachine):
    """Of a policy that knows no pins: nothing adds up then, but that is not what is looked for."""

    @invariant()
    def everything_adds_up(self) -> None:
        pass

    def teardown(self) -> None:
        self.runner.run(self.rig.__aexit__(None, None, None))
        self.runner.close()


STEPS = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


SEARCH = settings(STEPS, max_examples=200, phases=[Phase.generate], report_multiple_bugs=False)


@pytest.mark.slow
def test_no_order_of_calls_gives_wrong_bytes() -> None:
    run_state_machine_as_test(StoreMachine, settings=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "fault"),
    [(WithoutLeaseGuard, LeasedBlockMissing), (WithoutFence, WithdrawnServed)],
)
def test_without_one_guard_the_fault_is_found(
    machine: type[StoreMachine], fault: type[Exception]
) -> None:
    with pytest.raises(fault):
        run_state_machine_as_test(machine, settings=SEARCH)


@pytest.mark.slow
def test_without_the_pin_guard_what_is_pinned_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "PINNED", 0)
    with pytest.raises(PinnedBlockMissing):
        run_state_machine_as_test(WithoutPinGuard, settings=SEARCH)
