"""The node's auditor: asks, as an engine would, for what was withdrawn, and for what was not.

    change --> dead: a few chains per tier that end in what left       (looked for before anything is purged)
           --> each asked for in every way that an engine could, then a live chain of another lineage, which
               must hit: only then does the refusal count
           --> served: counted as stale, and loud. No live chain: counted as such, never as passed

It goes through the handlers that answer every engine, in a session that lives for one question: nobody is
told of it, it is no use of a block and in no statistics. Questions are bounded, and take turns with requests.

    a stale handle       minted under the epochs before the change
    a forged handle      minted under today's epochs, naming what was withdrawn
    an open request      opened before the change, asking after it
    today's handle       what a router mints now, asking for yesterday's keys

Every `EVERY_S` it also asks for a few of the chains that are dead by the registry's state, whenever they died
and whatever became of this node since: a restart, a takeover, an SSD tier that came late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from kvfabric.daemon.handlers import Services
from kvfabric.daemon.lookups import Lookups
from kvfabric.daemon.probing import ProbingEngine, Terms
from kvfabric.daemon.sessions import Session
from kvfabric.errors import KVFabricError
from kvfabric.hashing import namespace_key, namespace_tag
from kvfabric.metrics import Histogram
from kvfabric.registry.base import Registry
from kvfabric.registry.receipts import (
    BROUGHT_BACK,
    MADE,
    NO_CONTROL,
    NOTHING_HELD,
    PASSED,
    PENDING,
    STALE,
    AuditRow,
    ChangeRow,
)
from kvfabric.registry.state import RegistryState, namespace_of
from kvfabric.registry.withdrawn import Withdrawal
from kvfabric.store.sampling import Chain
from kvfabric.tiers.base import Lineage
from kvfabric.types import SessionId

log = logging.getLogger(__name__)

PROBES = 8
"""Chains of each tier asked for after one change."""
EVERY_S = 5.0
REPEATED = 2
"""Chains of each tier asked for at each of these times."""
CONTROL_S = 2.0
"""How long a live chain is looked for."""
COMMAND_S = 15.0
"""How long the row of whoever made the change is waited for: it says when it was asked for."""
VISIBLE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_POLL_S = 0.05
_LINEAGES = 64
"""Looked at when live ones are wanted, or those that died long ago."""
_MODELS = 16
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class AuditorParts:
    """What an auditor works with. `services` are those of every engine; `is_frozen`: the store may not be
    asked; `turn`: of the event loop; `alarm`: told how often something stale was served; `wall_clock`: Unix
    seconds."""

    registry: Registry
    services: Services
    is_frozen: Callable[[], bool]
    turn: Callable[[], Awaitable[None]]
    alarm: Callable[[int], None]
    wall_clock: Callable[[], float] = time.time


@dataclass(slots=True, eq=False)
class Audit:
    """One change under audit. `names`: incarnations, namespace tags or a tenant that died by it; `before`:
    under what they lived. `refused_at`: Unix seconds of the last refusal of its dead chains."""

    receipt_id: str
    names: frozenset[bytes]
    before: RegistryState | None
    dead: list[Chain]
    done: asyncio.Event = field(default_factory=asyncio.Event)
    counts: Counter[str] = field(default_factory=Counter)
    refused_at: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.done.is_set()

    def row(self) -> AuditRow:
        counts = self.counts
        worst = next((one for one in (STALE, NO_CONTROL, PASSED) if counts[one]), "")
        nothing = BROUGHT_BACK if self.dead else NOTHING_HELD
        return AuditRow(
            result=worst or nothing if self.is_done else PENDING,
            num_refused=counts[PASSED],
            num_uncontrolled=counts[NO_CONTROL],
            num_stale=counts[STALE],
            refused_at=self.refused_at,
        )


class Auditor:
    """See the module. `run` it until the node stops; `begin` and then `follow` for each change."""

    def __init__(self, parts: AuditorParts) -> None:
        self._parts = parts
        self._store = parts.services.store
        # Questions leave no trace among the lookups of engines, and send nobody for keys.
        self._services = replace(
            parts.services, lookups=Lookups(max_kept=1), fetches=None, key_unknown=lambda: None
        )
        self._models: OrderedDict[tuple[object, ...], Session] = OrderedDict()
        self._gone_tags: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._window = 0
        self._known = Terms(RegistryState())
        self.num_audits = 0
        self.results: Counter[str] = Counter()
        self.stale_serves = 0
        self.last_stale = ""
        self.visible_s = Histogram(VISIBLE_BUCKETS_S)

    def __repr__(self) -> str:
        return f"<Auditor {dict(self.results)}, {self.stale_serves} stale>"

    @property
    def alarm(self) -> str:
        """What must never be: empty while nothing withdrawn was served."""
        if not self.stale_serves:
            return ""
        return (
            f"the auditor was served withdrawn blocks {self.stale_serves} times: {self.last_stale}"
        )

    def session_opened(self, session: Session) -> None:
        """Engines like this one are here: the auditor asks as one of them."""
        hello = session.hello
        name = (hello.model_revision, session.fingerprint, hello.adapter, hello.adapter_revision)
        self._models[name] = Session(SessionId(b""), hello, session.layout, session.fingerprint)
        self._models.move_to_end(name)
        if len(self._models) > _MODELS:
            self._models.popitem(last=False)

    # ------------------------------------------------------------------ one change

    def begin(self, one: Withdrawal, names: frozenset[bytes], before: RegistryState) -> Audit:
        """Look for dead chains, one window of the index, before anything of them is purged."""
        sampler = self._store.sampler
        numbers = sampler.named(names)
        tags = {sampler.lineage(number).namespace_tag for number in numbers}
        self._gone_tags.extend(tags & names)
        return Audit(one.receipt_id, names, before, self._look(numbers, PROBES))

    async def follow(self, audit: Audit) -> None:
        """Probe, then wait until it is known when the change was asked for. On cancellation: unfinished."""
        try:
            await self._probe_all(audit)
        except Exception:
            log.exception("the audit of %s failed", audit.receipt_id)
            audit.counts[NO_CONTROL] += 1
        finally:
            audit.done.set()
            self.num_audits += 1
        if audit.refused_at and not audit.counts[STALE]:
            await self._observe(audit)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self._repeat()
            except Exception:
                log.exception("an audit failed")

    async def _repeat(self) -> None:
        """A few of what is dead by now, whenever it died."""
        if not await self._may_ask():
            return
        terms, sampler = self._terms(), self._store.sampler
        names = {*self._gone_tags}
        for lineage in sampler.some(_LINEAGES).values():
            names.update(terms.withdrawn(lineage))
        dead = self._look(sampler.named(names), REPEATED)
        if dead:
            await self._probe_all(Audit("", frozenset(names), None, dead))

    def _look(self, numbers: Collection[int], most: int) -> list[Chain]:
        self._window += 1
        return self._store.sampler.look(numbers, self._window, most)

    def _terms(self) -> Terms:
        """What the registry says now."""
        state = self._parts.registry.state
        if self._known.state is not state:
            self._known = Terms(state)
        return self._known

    async def _may_ask(self) -> bool:
        """In a turn of its own, and not while the store is handed over or knows nothing."""
        await self._parts.turn()
        return not self._parts.is_frozen() and self._parts.registry.usable() is not None

    async def _probe_all(self, audit: Audit) -> None:
        sampler = self._store.sampler
        for _ in range(sampler.num_windows if audit.names else 0):
            if audit.dead or not await self._may_ask():
                break
            audit.dead = self._look(sampler.named(audit.names), PROBES)
        ends = time.monotonic() + CONTROL_S
        for chain in audit.dead:
            result = NO_CONTROL
            while result == NO_CONTROL:
                if await self._may_ask():
                    result = await self._probe(audit, chain)
                if time.monotonic() > ends:
                    break
                if result == NO_CONTROL:
                    await asyncio.sleep(_POLL_S)
            audit.counts[result] += 1
            self.results[result] += 1

    async def _probe(self, audit: Audit, chain: Chain) -> str:
        """Ask for a dead chain and then for a live one."""
        terms = self._terms()
        first = terms.first_dead(chain, audit.names)
        if first == chain.num_blocks:
            return BROUGHT_BACK
        before = audit.before or terms.state
        lineage = chain.lineages[first]
        model = self._model_of(lineage, before) or self._like(lineage.layout_fingerprint)
        if model is None:
            return NO_CONTROL
        stale = self._ask_dead(audit, chain, first, model)
        if stale:
            self._is_stale(audit, chain, stale)
            return STALE
        refused_at = self._parts.wall_clock()
        if not await self._ask_live(chain):
            return NO_CONTROL
        audit.refused_at = refused_at
        return PASSED

    def _is_stale(self, audit: Audit, chain: Chain, ways: Sequence[str]) -> None:
        self.stale_serves += len(ways)
        what = audit.receipt_id or "withdrawn earlier"
        self.last_stale = f"{what}, from {chain.tier}, by {', '.join(ways)}"
        # The promise of the whole fabric is broken: whoever reads logs must see it.
        log.error("STALE SERVE: %s", self.last_stale)
        self._parts.alarm(self.stale_serves)

    async def _observe(self, audit: Audit) -> None:
        """How long it took from the command to the last refusal here."""
        ends = time.monotonic() + COMMAND_S
        while time.monotonic() < ends:
            try:
                rows = await self._parts.registry.receipt_rows(audit.receipt_id)
            except KVFabricError as exc:
                log.debug("receipt %s: %s", audit.receipt_id, exc)
                rows = {}
            if MADE in rows:
                made = msgspec.msgpack.decode(rows[MADE], type=ChangeRow)
                self.visible_s.observe(max(0.0, audit.refused_at - made.requested_at))
                return
            await asyncio.sleep(4 * _POLL_S)

    # ------------------------------------------------------------------ questions

    def _ask_dead(self, audit: Audit, chain: Chain, first: int, model: Session) -> list[str]:
        """In which ways blocks from the `first` dead one on were had; sync, so all under one state."""
        terms = self._terms()
        question = terms.question(chain, chain.num_blocks)
        bare = terms.question(chain, first)
        new = terms.epochs(question, model)
        old = tuple((scope, epoch - 1) for scope, epoch in new)
        if audit.before is not None:
            old = audit.before.epochs_of([scope for scope, _ in new])
        with ProbingEngine(self._services, model) as engine:
            ways = {
                "a stale handle": engine.by_handle(question, old),
                "a forged handle": engine.by_handle(question, new),
                "an open request": engine.by_grant(question, old),
                "today's handle": engine.by_handle(bare, terms.epochs(bare, model)),
            }
        return [way for way, num_blocks in ways.items() if num_blocks > first]

    async def _ask_live(self, near: Chain) -> bool:
        """Whether some chain that is not withdrawn hits now, of the same tier if there is one."""
        for _ in range(max(1, self._store.sampler.num_windows)):
            chains = self._look(self._live_lineages(), 2)
            chains.sort(key=lambda chain: chain.tier != near.tier)
            if any(self._hits(chain) for chain in chains):
                return True
            if not await self._may_ask():
                return False
        return False

    def _live_lineages(self) -> list[int]:
        terms = self._terms()
        return [
            number
            for number, lineage in self._store.sampler.some(_LINEAGES).items()
            if not terms.withdrawn(lineage) and self._model_of(lineage, terms.state) is not None
        ]

    def _hits(self, chain: Chain) -> bool:
        terms = self._terms()
        model = self._model_of(chain.lineages[-1], terms.state)
        if model is None:
            return False
        question = terms.question(chain, chain.num_blocks)
        with ProbingEngine(self._services, model) as engine:
            return engine.by_handle(question, terms.epochs(question, model)) == chain.num_blocks

    def _like(self, fingerprint: bytes) -> Session | None:
        """Of whatever model: an engine with this layout."""
        models = (model for model in reversed(self._models.values()))
        return next((model for model in models if model.fingerprint == fingerprint), None)

    def _model_of(self, lineage: Lineage, state: RegistryState) -> Session | None:
        """An engine's session in whose namespace, under this state, the lineage is; None if there was none
        in this life of the node."""
        for model in reversed(self._models.values()):
            if model.fingerprint != lineage.layout_fingerprint:
                continue
            hello = model.hello
            namespace = namespace_of(
                state,
                lineage.tenant,
                hello.model_revision,
                model.fingerprint,
                hello.adapter,
                hello.adapter_revision,
            )
            try:
                secret = self._services.keyring.tenant_secret(lineage.tenant)
            except KVFabricError:  # a tenant that is gone
                return None
            if namespace_tag(namespace_key(namespace, secret)) == lineage.namespace_tag:
                return model
        return None
