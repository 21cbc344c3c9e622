"""Pins: blocks of a pinned template stay in the host tier, within budgets, and no longer than they may."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.registry.state import (
    RETIRED,
    RegistryState,
    TemplateVersion,
    Tenant,
    TenantLimits,
    TierQuota,
)
from kvfabric.store import pins, policy
from kvfabric.store.index import packed_keys
from kvfabric.store.lease import RequestGrant
from kvfabric.store.pins import PinDeadlines
from kvfabric.store.statistics import TenantUsage
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import (
    GRANT,
    PART_BYTES,
    SESSION,
    StoreRig,
    grant_of,
    make_keys,
    make_layout,
)
from kvfabric.types import (
    DEFAULT_TENANT,
    BlockKey,
    Incarnation,
    MissReason,
    Segment,
    TenantId,
    TierName,
)

TEXT = 4
"""Blocks that the template's text fills; one more holds its end."""
HEADER = 5
"""Tokens before it."""
SLOTS = 64
BUDGET = 8


def template(name: str = "t", version: str = "1", **fields: object) -> TemplateVersion:
    incarnation = Incarnation(f"{name} {version}".encode().ljust(16))
    made = TemplateVersion(name, version, incarnation, b"text of " + incarnation)
    return replace(made, **fields)  # type: ignore[arg-type]


def pinned(rig: StoreRig, one: TemplateVersion, seconds: float = 60.0) -> TemplateVersion:
    return replace(one, pinned_until=rig.wall() + seconds, pin_s=seconds)


def set_state(rig: StoreRig, *templates: TemplateVersion, **tenants: Tenant) -> None:
    budget = TenantLimits(pin_max_bytes=BUDGET * PART_BYTES)
    known = {DEFAULT_TENANT: Tenant(DEFAULT_TENANT, DEFAULT_TENANT, limits=budget)}
    known |= {TenantId(tenant.tenant_id): tenant for tenant in tenants.values()}
    version = rig.state.version + 1 if rig.state is not None else 1
    rig.state = RegistryState(
        version=version,
        tenants=MappingProxyType(known),
        templates=MappingProxyType({(one.name, one.version): one for one in templates}),
    )


def segment(one: TemplateVersion, first_token: int = HEADER, blocks: int = TEXT) -> Segment:
    """Ends half way through the block after `blocks`."""
    length = (blocks * 64 + 32) - first_token % 64
    return Segment(one.name, one.version, one.incarnation, first_token, length)


def using(*segments: Segment, grant: RequestGrant = GRANT) -> RequestGrant:
    return replace(grant, segments=segments)


def usage(rig: StoreRig, tenant: str = DEFAULT_TENANT) -> TenantUsage:
    rig.store._residency.check()
    (found,) = [one for one in rig.store.statistics().tenants if one.tenant == tenant]
    return found


def num_pinned(rig: StoreRig, tenant: str = DEFAULT_TENANT) -> int:
    return usage(rig, tenant).pinned_bytes // PART_BYTES


def here(rig: StoreRig, keys: list[BlockKey]) -> int:
    """How many of these are in the arena, whoever may read them."""
    rows = rig.store._index.lookup(packed_keys(b"".join(keys)))
    return int(np.count_nonzero(rig.store._index.host_parts.array[rows]))


async def flood(rig: StoreRig, grant: RequestGrant = GRANT, rounds: int = 6) -> None:
    """Prompts that nobody repeats, several times the tier."""
    for seed in range(1000, 1000 + rounds):
        await rig.put(make_keys(SLOTS // 2, seed), grant=grant)


# ---------------------------------------------------------------------- what stays, and how long


@pytest.mark.parametrize("guard", [True, False], ids=["pinned", "twin"])
@pytest.mark.parametrize("order", ["pin first", "store first"])
async def test_the_text_of_a_pinned_template_survives_a_flood(
    monkeypatch: pytest.MonkeyPatch, guard: bool, order: str
) -> None:
    if not guard:
        monkeypatch.setattr(policy, "PINNED", 0)
        monkeypatch.setattr(pins, "QUEUED", 0)
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT + 3)
        set_state(rig, pinned(rig, one) if order == "pin first" else one)
        await rig.put(keys, grant=using(segment(one)))
        set_state(rig, pinned(rig, one))
        await rig.store.settle_pins()
        for seed in range(6):
            await rig.put(make_keys(SLOTS // 2, 100 + seed))
        assert here(rig, keys) == (TEXT if guard else 0)
        if guard:
            assert num_pinned(rig) == TEXT
            assert rig.match("r", keys, using(segment(one))) == (TEXT, MissReason.EVICTED)
            assert rig.store.statistics().used_bytes[TierName.HOST] <= SLOTS * PART_BYTES


async def test_what_is_not_pinned_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, other, keys = template(), template("other"), make_keys(TEXT + 3)
        set_state(rig, one, pinned(rig, other))
        await rig.put(keys, grant=using(segment(one)))
        await rig.store.settle_pins()
        await flood(rig)
        assert (here(rig, keys), num_pinned(rig)) == (0, 0)


@pytest.mark.parametrize("how", ["ttl", "unpin", "retire"])
async def test_a_pin_ends(how: str) -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one, 60.0))
        await rig.put(keys, grant=using(segment(one)))
        await flood(rig)
        rig.clock.now += 59.0
        await rig.store.settle_pins()
        assert (here(rig, keys), num_pinned(rig)) == (TEXT, TEXT)
        if how == "ttl":
            rig.clock.now += 1.0
        else:
            set_state(rig, one if how == "unpin" else replace(one, state=RETIRED))
        await rig.store.settle_pins()
        assert num_pinned(rig) == 0
        assert here(rig, keys) == TEXT  # nothing is thrown away for it
        await flood(rig)
        assert here(rig, keys) == 0


async def test_a_purge_takes_pinned_blocks_as_any() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        await rig.put(keys, grant=using(segment(one)))
        assert num_pinned(rig) == TEXT
        assert await rig.store.purge([one.incarnation]) == TEXT
        assert (here(rig, keys), num_pinned(rig)) == (0, 0)


# ---------------------------------------------------------------------- clocks


def heard(*templates: TemplateVersion, now: float = 0.0, wall: float = 1000.0) -> PinDeadlines:
    deadlines = PinDeadlines()
    deadlines.hear(templates, now=now, wall=wall)
    return deadlines


def test_a_pin_heard_of_lasts_until_its_end_whatever_the_wall_clock_does() -> None:
    one = template(pinned_until=1060.0, pin_s=60.0)
    deadlines = heard(one, now=5.0)
    for wall in (0.0, 1e9):
        deadlines.hear([one], now=50.0, wall=wall)
        assert deadlines.live(64.9) == {one.incarnation}
        assert deadlines.live(65.0) == frozenset()


@pytest.mark.parametrize(
    ("wall", "lasts"), [(1000.0, 60.0), (1050.0, 10.0), (1060.0, 0.0), (9e9, 0.0), (-9e9, 60.0)]
)
def test_a_wrong_wall_clock_pins_no_longer_than_was_asked(wall: float, lasts: float) -> None:
    deadlines = heard(template(pinned_until=1060.0, pin_s=60.0), wall=wall)
    assert bool(deadlines.live(0.0)) == (lasts > 0)
    assert deadlines.live(lasts) == frozenset()


def test_pinned_again_the_new_end_counts() -> None:
    one = template(pinned_until=1060.0, pin_s=60.0)
    deadlines = heard(one)
    longer, sooner = (replace(one, pinned_until=1000.0 + s, pin_s=s) for s in (90.0, 30.0))
    deadlines.hear([longer], now=50.0, wall=1000.0)
    assert deadlines.live(139.0)
    deadlines.hear([sooner], now=70.0, wall=1000.0)
    assert deadlines.live(99.0)
    assert not deadlines.live(100.0)
    deadlines.hear([replace(longer, state=RETIRED)], now=0.0, wall=1000.0)
    assert not deadlines.live(0.0)


async def test_a_pin_ends_also_where_the_registry_is_not_heard_any_more() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one, 60.0))
        await rig.put(keys, grant=using(segment(one)))
        rig.state = None
        for seconds, expected in ((59.0, TEXT), (1.0, 0)):
            rig.clock.now += seconds
            await rig.store.settle_pins()
            assert num_pinned(rig) == expected


async def test_pinned_blocks_that_are_too_old_to_be_read_are_stored_anew() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT + 1)
        set_state(rig, pinned(rig, one, 1000.0), default=_default(BUDGET, max_age_s=100.0))
        grant = using(segment(one))
        assert await rig.put(keys, grant=grant) == TEXT + 1
        assert rig.match("reader", keys[:2], grant)[0] == 2
        rig.clock.now += 101.0
        assert rig.match("r", keys, grant) == (0, MissReason.EXPIRED)
        assert await rig.put(keys, grant=grant) == TEXT + 1
        await rig.store.settle_pins()
        assert num_pinned(rig) == TEXT
        assert len(await rig.get(keys, grant=grant)) == TEXT + 1
        # Another's keys are not his to replace.
        assert await rig.put(keys, grant=grant_of("t-o")) == 0
        assert len(await rig.get(keys, grant=grant)) == TEXT + 1


async def test_a_clock_that_is_set_back_pins_nothing_for_ever() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one, 60.0))
        await rig.put(keys, grant=using(segment(one)))
        for _ in range(6):
            rig.wall.now -= 86_400.0
            rig.clock.now += 10.0
            set_state(rig, replace(one, pinned_until=1060.0, pin_s=60.0))
            await rig.store.settle_pins()
        assert num_pinned(rig) == 0


# ---------------------------------------------------------------------- which blocks


@given(
    firsts=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    lengths=st.lists(st.integers(0, 300), min_size=3, max_size=3),
)
def test_a_block_lies_in_a_text_that_it_begins_in_or_after_and_ends_in(
    firsts: list[int], lengths: list[int]
) -> None:
    ordered = sorted(firsts)
    segments = [
        Segment("t", str(at), Incarnation(bytes([at] * 16)), first, length)
        for at, (first, length) in enumerate(zip(ordered, lengths, strict=False))
    ]
    grant = using(*reversed(segments))
    bits = grant.texts(np.arange(12))
    in_order = sorted(grant.segments, key=lambda one: one.first_token)
    for block in range(12):
        for place, one in enumerate(in_order):
            first, end = one.first_token, one.first_token + one.num_tokens
            within = first < (block + 1) * 64 and (block + 1) * 64 <= end
            assert bool(bits[block] >> place & 1) == within
    assert not bits[grant.text_blocks :].any()


@pytest.mark.parametrize(("first_token", "expected"), [(0, 4), (63, 4), (64, 0), (200, 0)])
async def test_a_text_behind_a_block_of_something_else_is_not_pinned(
    first_token: int, expected: int
) -> None:
    """Its parent could go, and would differ from prompt to prompt."""
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT + 4)
        set_state(rig, pinned(rig, one))
        end = segment(one, first_token)
        await rig.put(keys, grant=using(end))
        await rig.store.settle_pins()
        assert num_pinned(rig) == expected
        assert usage(rig).pins_refused == 0


async def test_a_second_text_is_pinned_where_the_first_is() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, two, keys = template(), template("two"), make_keys(6)
        first = Segment(one.name, one.version, one.incarnation, 0, 130)
        second = Segment(two.name, two.version, two.incarnation, 130, 5 * 64 - 130)
        for expected, pins_of in (
            (5, (one, two)),
            (0, (two,)),
            (2, (one,)),
            (0, ()),
            (5, (one, two)),
        ):
            live = [pinned(rig, each) if each in pins_of else each for each in (one, two)]
            set_state(rig, *live)
            await rig.put(keys, grant=using(second, first))
            await rig.store.settle_pins()
            assert num_pinned(rig) == expected


async def test_blocks_stored_out_of_order_are_pinned_once_their_parents_are_there() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        grant = using(segment(one))
        rig.open("r", grant)
        parts = [(keys[:2], keys[2:])]
        for first, rest in parts:
            early = rig.reserve("r", first)
            late = rig.reserve("r", rest, parent=first[-1])
            await rig.commit(late, rest)
            assert num_pinned(rig) == 0
            await rig.commit(early, first)
        await rig.store.settle_pins()
        assert num_pinned(rig) == TEXT


async def test_a_block_of_several_parts_is_pinned_when_it_is_whole() -> None:
    layout = make_layout(2)
    async with StoreRig(num_slots=SLOTS, layout=layout) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        await rig.put(keys, grant=using(segment(one)), shards=(0,))
        await rig.store.settle_pins()
        assert num_pinned(rig) == 0
        await rig.put(keys, grant=using(segment(one)), shards=(1,))
        assert num_pinned(rig) == 2 * TEXT == BUDGET


async def test_a_pinned_block_that_is_taken_out_takes_the_pins_behind_it_along() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        await rig.put(keys, grant=using(segment(one)))
        row = int(rig.store._index.lookup(packed_keys(keys[1]))[0])
        rig.store._drop(row)
        await rig.store.settle_pins()
        assert (num_pinned(rig), here(rig, keys)) == (1, TEXT - 1)
        await rig.put(keys, grant=using(segment(one)))
        await rig.store.settle_pins()
        assert num_pinned(rig) == TEXT


async def test_a_handle_that_tells_no_length_pins_nothing() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        old = Segment(one.name, one.version, one.incarnation, HEADER)
        await rig.put(keys, grant=using(old))
        assert num_pinned(rig) == 0
        rig.match("r", keys, using(segment(one)))  # a newer router's handle for the same blocks
        assert num_pinned(rig) == TEXT


# ---------------------------------------------------------------------- budgets


async def test_a_pin_budget_is_hard_and_what_it_refuses_is_counted() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one = template()
        set_state(rig, pinned(rig, one))
        chains = [make_keys(TEXT, seed) for seed in range(3)]
        for keys in chains:
            await rig.put(keys, grant=using(segment(one)))
        found = usage(rig)
        assert found.pinned_bytes == found.pin_max_bytes == BUDGET * PART_BYTES
        assert found.pins_refused == TEXT
        await flood(rig)
        assert [here(rig, keys) for keys in chains] == [TEXT, TEXT, 0]
        set_state(rig, pinned(rig, one), default=_default(3))
        await rig.store.settle_pins()
        assert num_pinned(rig) == 3  # and what is left is chains from the front: `check`
        set_state(rig, pinned(rig, one), default=_default(0))
        await rig.store.settle_pins()
        assert num_pinned(rig) == 0


def _default(slots: int | None, **fields: object) -> Tenant:
    budget = None if slots is None else slots * PART_BYTES
    made = Tenant(DEFAULT_TENANT, DEFAULT_TENANT, limits=TenantLimits(pin_max_bytes=budget))
    return replace(made, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quota", "own", "expected"),
    [
        (TierQuota(), None, 3),  # a twentieth of 64
        (TierQuota(floor_bytes=10 * PART_BYTES), None, 13),
        (TierQuota(20 * PART_BYTES, 20 * PART_BYTES), None, 10),  # half of its maximum
        (TierQuota(max_bytes=20 * PART_BYTES), 99, 20),
        (TierQuota(), 0, 0),
    ],
)
async def test_what_a_tenant_may_pin(quota: TierQuota, own: int | None, expected: int) -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        set_state(rig, default=_default(own, host=quota))
        await rig.put(make_keys(1))
        assert usage(rig).pin_max_bytes // PART_BYTES == expected


async def test_a_pin_lets_nobody_past_a_maximum() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, maximum = template(), 6
        quota = TierQuota(max_bytes=maximum * PART_BYTES)
        set_state(rig, pinned(rig, one), default=_default(99, host=quota))
        for seed in range(3):
            await rig.put(make_keys(TEXT, seed), grant=using(segment(one)))
            assert usage(rig).host_bytes <= maximum * PART_BYTES
        assert num_pinned(rig) == maximum
        rig.open("r", GRANT)
        assert rig.reserve("r", make_keys(1, 99)).reason == MissReason.OVER_QUOTA
        set_state(rig, one, default=_default(99, host=quota))
        await rig.store.settle_pins()
        assert await rig.put(make_keys(5, 99)) == 5


async def test_pins_leave_the_floors_of_others_alone() -> None:
    """However much one may pin: another fills its floor, and the tier turns over."""
    async with StoreRig(num_slots=SLOTS) as rig:
        one, floor = template(), 40
        other = Tenant(TenantId("t-o"), "o", host=TierQuota(floor_bytes=floor * PART_BYTES))
        set_state(rig, pinned(rig, one), default=_default(SLOTS), other=other)
        for seed in range(8):
            await rig.put(make_keys(TEXT, seed), grant=using(segment(one)))
        assert num_pinned(rig) == (SLOTS - floor) // 2  # half of what the floors leave
        stored = sum(
            [await rig.put(make_keys(10, 50 + n), grant=grant_of("t-o")) for n in range(4)]
        )
        assert stored == floor
        assert usage(rig, "t-o").host_bytes == floor * PART_BYTES
        assert await rig.put(make_keys(8, 70)) == 8


async def test_a_floor_given_later_takes_pins_back() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one = template()
        set_state(rig, pinned(rig, one), default=_default(SLOTS))
        for seed in range(8):
            await rig.put(make_keys(TEXT, seed), grant=using(segment(one)))
        assert num_pinned(rig) == 32
        other = Tenant(TenantId("t-o"), "o", host=TierQuota(floor_bytes=52 * PART_BYTES))
        set_state(rig, pinned(rig, one), default=_default(SLOTS), other=other)
        await rig.store.settle_pins()
        assert num_pinned(rig) == 6
        stored = [await rig.put(make_keys(26, 50 + n), grant=grant_of("t-o")) for n in range(2)]
        assert sum(stored) == 52


async def test_a_tier_that_shrinks_takes_pins_back() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one = template()
        set_state(rig, pinned(rig, one), default=_default(SLOTS))
        for seed in range(6):
            await rig.put(make_keys(TEXT, seed), grant=using(segment(one)))
        assert num_pinned(rig) == 24
        rig.store._residency.resize(32 * PART_BYTES)
        await rig.store.settle_pins()
        assert num_pinned(rig) == 16


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "twin"])
async def test_what_is_pinned_counts_against_what_may_be_reserved(
    monkeypatch: pytest.MonkeyPatch, guard: bool
) -> None:
    """Else reservations above a floor and pins together would take what is another's by its floor."""
    if not guard:
        from kvfabric.store.quota import Account

        monkeypatch.setattr(
            Account, "unevictable", property(lambda self: self.reserved + self.held)
        )
    async with StoreRig(num_slots=SLOTS) as rig:
        one = template()
        other = Tenant(TenantId("t-o"), "o", host=TierQuota(floor_bytes=40 * PART_BYTES))
        set_state(rig, pinned(rig, one), default=_default(SLOTS), other=other)
        for seed in range(3):
            await rig.put(make_keys(TEXT, seed), grant=using(segment(one)))
        assert num_pinned(rig) == 12
        rig.open("r", GRANT)
        granted = rig.reserve("r", make_keys(SLOTS, 9)).states.count(0)
        assert (granted == 12) == guard
        rig.open("o", grant_of("t-o"))
        floor = rig.reserve("o", make_keys(40, 8)).states.count(0)
        assert (floor == 40) == guard


async def test_public_blocks_count_for_the_public_tenant() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT + 2)
        set_state(rig, pinned(rig, one), public=Tenant(TenantId("public"), "public"))
        grant = replace(using(segment(one, 0)), public_tag=b"public\0\0", public_blocks=TEXT)
        await rig.put(keys, grant=grant)
        assert num_pinned(rig) == 0
        assert num_pinned(rig, "public") == 3
        assert usage(rig, "public").pins_refused == 1


# ---------------------------------------------------------------------- with rights, on the move


async def test_bytes_that_are_pinned_and_leased_count_once() -> None:
    async with StoreRig(num_slots=SLOTS) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, pinned(rig, one))
        await rig.put(keys, grant=using(segment(one)))
        (account,) = [a for a in rig.store._host.accounts if a.tenant == DEFAULT_TENANT]
        for name in ("a", "b"):
            rig.match(name, keys[:3], using(segment(one)))
            assert account.unevictable == TEXT * PART_BYTES
        set_state(rig, one)
        await rig.store.settle_pins()
        assert account.unevictable == 3 * PART_BYTES
        set_state(rig, pinned(rig, one))
        await rig.store.settle_pins()
        rig.clock.now += 31.0  # the leases lapse, the pin does not
        assert account.unevictable == TEXT * PART_BYTES
        for name in ("a", "b"):
            rig.store.release(SESSION, [name])
            rig.store._residency.check()
        assert (account.unevictable, account.pinned_idle) == (TEXT * PART_BYTES,) * 2


async def test_pins_survive_the_move_to_another_process() -> None:
    one, keys, now = template(), make_keys(TEXT + 3), 0.0
    async with StoreRig(num_slots=SLOTS) as rig, StoreRig(num_slots=SLOTS) as other:
        set_state(rig, pinned(rig, one))
        await rig.put(keys, grant=using(segment(one)))
        await rig.store.freeze()
        contents = rig.store.contents()
        now = rig.clock()
        assert contents.texts.count(0) == 3
        other.clock.now, other.state = now, rig.state
        other.store.restore(contents)
        other.events.present |= rig.events.present
        assert num_pinned(other) == TEXT
        for seed in range(6):
            await other.put(make_keys(SLOTS // 2, 100 + seed))
        assert here(other, keys) == TEXT


async def test_a_pass_given_up_half_way_is_made_again() -> None:
    limits = StoreLimits(host_bytes=SLOTS * PART_BYTES, max_blocks=1024, lease_share=1.0)
    async with StoreRig(limits=limits) as rig:
        one, keys = template(), make_keys(TEXT)
        set_state(rig, one)
        await rig.put(keys, grant=using(segment(one)))
        set_state(rig, pinned(rig, one))
        found = rig.store._residency.pins
        rig.match("r", make_keys(1, 9))  # the store hears of the new state
        steps = found.settle()
        next(steps)
        next(steps)
        del steps
        assert num_pinned(rig) == 1
        await rig.store.settle_pins()
        assert num_pinned(rig) == TEXT
        assert not found.is_stale


async def test_a_pass_over_everything_lets_others_run() -> None:
    count = 600
    limits = StoreLimits(host_bytes=2048 * PART_BYTES, max_blocks=8192, lease_share=1.0)
    async with StoreRig(limits=limits) as rig:
        one = template()
        chains = [make_keys(1, seed) for seed in range(count)]
        for state in (one, pinned(rig, one)):
            set_state(rig, state, default=_default(2048))
            for keys in chains if state is one else ():
                await rig.put(keys, grant=using(segment(one, blocks=1)))
        rig.match("r", make_keys(1, 9999))  # the store hears of the new state
        before, steps = 0, 0
        for _ in rig.store._residency.pins.settle():
            now = num_pinned(rig)
            assert now - before <= 256
            before, steps = now, steps + 1
        assert num_pinned(rig) == count
        assert steps > 3
