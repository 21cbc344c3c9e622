"""One request's way: what it is, which engine gets it, with which handle and salt. Sync decisions.

`Planner.rank` and `plan` are the whole decision, made anew for each attempt: over the engines that take
requests now, by the registry state of now. What `plan` returns is sent at once. `admission` decides when,
`proxy` sends.
"""

from __future__ import annotations

import functools
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from kvfabric.config import RouterConfig
from kvfabric.errors import KVFabricError
from kvfabric.events.index import FleetIndex, Holder, Present
from kvfabric.handle import PARAMS_FIELD, Handoff
from kvfabric.registry.state import Tenant
from kvfabric.types import BlockKey, MissReason, TenantId
from kvfabric_router import pairing, policy
from kvfabric_router.api import ApiError, ModelRequest
from kvfabric_router.decision import Decision, Outcome
from kvfabric_router.drift import Drift, DriftWatch, Seen
from kvfabric_router.fleet import Fleet
from kvfabric_router.flight import Sent
from kvfabric_router.hold import DemandOf
from kvfabric_router.identities import Identities
from kvfabric_router.identity import Addressee, PromptKeys, one_time_salt
from kvfabric_router.journal import BLOCK_ID_BYTES, Journal
from kvfabric_router.keyring_reader import KeyringReader
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.missed import why_missed
from kvfabric_router.policy import Candidate, EngineView, FleetView, Ranked, Reuse
from kvfabric_router.predicted import Predicted
from kvfabric_router.prefilling import Errand
from kvfabric_router.prompt import NO_LIMIT
from kvfabric_router.registry_view import RegistryView
from kvfabric_router.tokenizers import BYTES_PER_TOKEN, Tokens

KEPT_DECISIONS = 1024
REUSE_FRESH_S = 0.2
_FALSE = msgspec.Raw(b"false")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """A client's request with what was found out about it so far. Lives as long as the request.

    `result` is how it ended, where the status of the answer does not tell. `ttft_ms`: refuse it if its first
    token comes later than that after `arrived` (monotonic seconds).
    """

    request_id: str
    tenant: Tenant
    request: ModelRequest
    no_store: bool = False
    no_read: bool = False
    result: str = ""
    tried: set[str] = field(default_factory=set)
    tokens: dict[str, Tokens | None] = field(default_factory=dict)
    arrived: float = field(default_factory=time.monotonic)
    ttft_ms: float | None = None
    identities: Identities | None = None
    matches: _Matches | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Where a call would go now, best first: a `Plan` without what it would be sent with."""

    call: Call
    ranked: tuple[Ranked, ...]
    identities: Identities
    draw: int = 0

    @property
    def best(self) -> Ranked:
        return self.ranked[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send where, now. `fields`: what the body gets in place of the client's or beside them.

    `errand`: what goes to the engine that computes the prompt, if another one does.
    `version` is that of the registry state that it was made by; `keys` those blocks of the prompt that the
    engine will have for the next request that starts like this one.
    """

    decision: Decision
    fields: Mapping[str, Any]
    version: int
    keys: Sequence[BlockKey] = ()
    is_streamed: bool = True
    is_exact: bool = True
    errand: Errand | None = None

    @property
    def has_handle(self) -> bool:
        return "kv_transfer_params" in self.fields

    @property
    def choice(self) -> Candidate:
        return self.decision.ranked[0].candidate

    @property
    def engine(self) -> EngineView:
        return self.choice.engine

    @property
    def sent(self) -> Sent:
        """What the fleet's account needs to know of it."""
        chosen = self.decision.ranked[0]
        is_handed = self.errand is not None
        return Sent(
            chosen.candidate.work,
            pairing.tail_ms(chosen.candidate) if is_handed else chosen.terms.own_work,
            self.keys,
            self.is_streamed,
            self.is_exact,
            is_handed,
        )


class Planner:
    """See the module."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        fleet: Fleet,
        index: FleetIndex,
        registry: RegistryView,
        metrics: RouterMetrics,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._tokenizers = registry.tokenizers
        self._fleet = fleet
        self._index = index
        self._registry = registry
        self._metrics = metrics
        self.keyring = KeyringReader(config.keyring_path, in_memory=bool(config.directory))
        self._rng = rng or random.Random()
        self._turn = 0
        # Without the fabric there is nothing to weigh.
        weighs = config.fabric or config.policy != "cost"
        self._policy = config.policy if weighs else "round_robin"
        self._drifts = DriftWatch()
        self.lags = pairing.Lags()
        self.journal: Journal | None = None
        self._decisions: OrderedDict[str, Decision] = OrderedDict()

    @property
    def holds(self) -> bool:
        """Whether the choice gets better by being made late."""
        return self._config.fabric and self._config.policy == "cost"

    async def prepare(self, call: Call) -> None:
        """Tokenize a long prompt beside the event loop, before anything is decided. Raises ApiError 400."""
        if not self._tokenizers.are_slow:
            return
        for engine in self._fleet.view().engines:
            tokenizer = self._tokenizers[engine.tokenizer]
            is_asked = engine.model_name == call.request.model and tokenizer.is_slow
            if is_asked and tokenizer.name not in call.tokens:
                made = await tokenizer.tokens_in_thread(call.request, call.tenant.tenant_id)
                call.tokens[tokenizer.name] = made

    def _tokens(self, call: Call, name: str) -> Tokens | None:
        """The prompt's tokens, or None if the router cannot know them. Raises ApiError 400."""
        if name not in call.tokens:
            call.tokens[name] = self._tokenizers[name].tokens(call.request, call.tenant.tenant_id)
        return call.tokens[name]

    def _length(self, call: Call, engine: EngineView) -> int | None:
        """Tokens of the prompt; None if only the engine can know."""
        if call.request.token_ids is not None:
            return len(call.request.token_ids)
        if not self._tokenizers[engine.tokenizer].is_exact:
            return None
        tokens = self._tokens(call, engine.tokenizer)
        return None if tokens is None else len(tokens)

    def rank(
        self, call: Call, demand: DemandOf | None = None, *, view: FleetView | None = None
    ) -> Ranking:
        """Who would answer it soonest, given who else waits. Raises ApiError 400, 404 or 503.

        Asked again for a call that waits, it reads the index again only after `REUSE_FRESH_S`, and tokenizes
        and hashes only for a newer registry state. `view`: the fleet's of now, if the caller has it.
        """
        began = time.perf_counter()
        engines = self._eligible(call, view or self._fleet.view())
        if demand is not None:
            engines = [demand(engine) for engine in engines]
        state = self._registry.usable() if self._config.fabric else None
        if call.identities is None or call.identities.state is not state:
            call.identities = Identities(
                call.tenant,
                call.request,
                state,
                tokens_of=functools.partial(self._tokens, call),
                keyring=self.keyring,
                registry=self._registry,
            )
            call.matches = None
        now = time.monotonic()
        if call.matches is None or now - call.matches.made_at > REUSE_FRESH_S:
            call.matches = _Matches(self._index, self._fleet.predicted, now)
        alone = [self._candidate(call, engine) for engine in engines]
        if self._policy == "cost":
            candidates = pairing.candidates(alone, functools.partial(self._way, call), self.lags)
        else:
            candidates = pairing.answering(alone)
        draw = self._draw(call)
        ranked = policy.choose(self._policy, candidates, draw)
        self._metrics.decision.observe(time.perf_counter() - began)
        return Ranking(call, ranked, call.identities, draw)

    def plan(self, ranking: Ranking) -> Plan:
        """What the best engine of a ranking made just now needs."""
        call, ranked, identities = ranking.call, ranking.ranked, ranking.identities
        handoff = _handoff_of(ranked[0])
        fields, reason = self._fields(call, ranked[0].candidate, identities, handoff)
        alone = reason or call.no_store or call.no_read
        keys = None if alone else identities.keys(ranked[0].candidate.engine)
        plan = Plan(
            self._decision(ranking, reason),
            fields,
            identities.state.version if identities.state else 0,
            keys.keys if keys is not None and not call.tenant.opted_out else (),
            call.request.stream,
            keys is None or keys.is_exact,
            self._errand(ranking, handoff) if handoff is not None and not reason else None,
        )
        self._remember(call.request_id, plan.decision)
        if self.journal is not None:
            made = None if reason else identities.keys(ranked[0].candidate.engine)
            blocks = b"".join(key[:BLOCK_ID_BYTES] for key in made.keys) if made else b""
            size = made.block_tokens if made else 0
            name = call.request.model
            self.journal.chosen(call.request_id, name, plan.decision, blocks, size)
        self._count(plan, identities)
        return plan

    def decision(self, request_id: str, tenant: TenantId) -> Decision | None:
        """The last decision on a tenant's own request, while it is remembered."""
        found = self._decisions.get(request_id)
        return found if found is not None and found.tenant == tenant else None

    def outcome(self, call: Call, outcome: Outcome) -> None:
        """What became of the last decision on a call."""
        decision = self._decisions.get(call.request_id)
        if decision is None:
            return
        self._count_tokens(call, decision, outcome)
        drift = self._drift(call, decision, outcome)
        decision = replace(decision, outcome=outcome, drift=drift)
        self._decisions[call.request_id] = decision
        if self.journal is not None:
            self.journal.answered(call.request_id, outcome)
        reason = why_missed(decision)
        if reason is not MissReason.NONE:
            self._metrics.misses.labels(reason=reason.value).inc()

    # ------------------------------------------------------------------ who could

    def _eligible(self, call: Call, view: FleetView) -> list[EngineView]:
        name = call.request.model
        taking = [e for e in view.engines if e.model_name == name and e.endpoint not in call.tried]
        if not taking:
            if not self._fleet.knows_model(name):
                raise ApiError(
                    404,
                    f"The model `{name}` does not exist.",
                    code="model_not_found",
                    param="model",
                )
            raise ApiError(503, f"No engine of `{name}` takes requests now.", code="no_engine")
        fitting = [e for e in taking if self._fits(call, e)]
        if not fitting:
            limit = max(e.max_model_tokens for e in taking)
            raise ApiError(
                400,
                f"The prompt and `max_tokens` ({call.request.max_tokens}) together exceed the "
                f"{limit} tokens that `{name}` takes.",
                code="context_length_exceeded",
                param="prompt",
            )
        return fitting

    def _fits(self, call: Call, engine: EngineView) -> bool:
        length = self._length(call, engine) if engine.max_model_tokens else None
        if length is None:
            return True  # the engine itself will say
        return length + call.request.max_tokens <= engine.max_model_tokens

    # ------------------------------------------------------------------ what it would cost

    def _candidate(self, call: Call, engine: EngineView) -> Candidate:
        assert call.matches is not None
        found = call.matches.reuse.get(engine.endpoint)
        if found is None:
            found = call.matches.reuse[engine.endpoint] = self._reuse(call, call.matches, engine)
        return Candidate(engine, self._prompt_tokens(call, engine), found)

    def _prompt_tokens(self, call: Call, engine: EngineView) -> int:
        length = self._length(call, engine)
        return _guess_tokens(call.request) if length is None else length

    def _reuse(self, call: Call, matches: _Matches, engine: EngineView) -> Reuse:
        assert call.identities is not None
        keys = call.identities.keys(engine)
        if keys is None or call.tenant.opted_out or call.no_read:
            return Reuse()
        present = matches.of(keys)
        own = policy.reuse_of(
            engine,
            present,
            matches.predicted(keys).get(engine.endpoint),
            num_blocks=len(keys.keys),
            block_tokens=keys.block_tokens,
            is_exact=keys.is_exact,
        )
        links = self._fleet.topology.links_of(engine.node_id)
        if not links:
            return own
        candidate = Candidate(engine, self._prompt_tokens(call, engine), own)
        return policy.with_peers(candidate, present, links, block_tokens=keys.block_tokens)

    def _draw(self, call: Call) -> int:
        """What decides between equals, or whose turn it is; another attempt is no turn of its own."""
        if self._policy != "round_robin":
            return self._rng.getrandbits(32)
        self._turn += not call.tried
        return self._turn

    # ------------------------------------------------------------------ what it gets

    def _fields(
        self,
        call: Call,
        chosen: Candidate,
        identities: Identities,
        handoff: Handoff | None = None,
    ) -> tuple[dict[str, Any], str]:
        """What the engine gets in place of the client's fields or beside them, and why it reuses nothing."""
        engine = chosen.engine
        fields: dict[str, Any] = {}
        request = call.request
        if request.stream and not request.usage_wanted:
            fields["stream_options"] = {**request.stream_options, "include_usage": True}
        if not self._config.fabric:
            return fields, ""
        fields |= self._tokenized(call, engine)
        keys = identities.keys(engine)
        if keys is None:
            return {**fields, "cache_salt": one_time_salt()}, identities.reason(engine)
        # Without its node an engine keeps what it computed under the salt, and finds what was: for nobody,
        # and nothing, if it must not.
        alone = call.no_store or call.no_read
        fields["cache_salt"] = one_time_salt() if alone else keys.salt
        if engine.session:
            try:
                handle = self._mint(call, chosen, identities, handoff)
            except KVFabricError as exc:
                _log.warning("request %s: no handle: %s", call.request_id, exc)
                return {**fields, "cache_salt": one_time_salt()}, "no_handle"
            fields["kv_transfer_params"] = {PARAMS_FIELD: handle}
        return fields, ""

    def _tokenized(self, call: Call, engine: EngineView) -> dict[str, Any]:
        """The prompt of a completion as the tokens that it was keyed by: the engine need not make them."""
        request = call.request
        if request.text is None or request.fields.get("echo", _FALSE) != _FALSE:
            return {}
        if not self._tokenizers[engine.tokenizer].is_slow:
            return {}
        tokens = self._tokens(call, engine.tokenizer)
        return {} if tokens is None else {"prompt": list(tokens)}

    def _mint(
        self,
        call: Call,
        chosen: Candidate,
        identities: Identities,
        handoff: Handoff | None = None,
    ) -> str:
        engine = chosen.engine
        identity, model = identities.of(engine.tokenizer), engine.model
        keys = identities.keys(engine)
        assert identity is not None
        assert model is not None
        assert keys is not None
        assert call.matches is not None
        sources = policy.sources_of(
            call.matches.of(keys),
            self._fleet.topology.links_of(engine.node_id),
            chosen.reuse,
            block_tokens=keys.block_tokens,
        )
        return identity.mint(
            model,
            to=Addressee(engine.session, sources, handoff),
            request_id=_request_id(call, handoff),
            expires_at=int(time.time() + self._config.handle_ttl_s),
            no_store=call.no_store,
            no_read=call.no_read,
        )

    # ------------------------------------------------------------------ what another computes

    def _way(self, call: Call, one: EngineView, other: EngineView) -> pairing.Way | None:
        """Of the prompt's blocks, if `one` may compute them for `other`."""
        assert call.identities is not None
        if one.model != other.model or one.node_id is None or other.node_id is None:
            return None
        if not (one.session and other.session) or not call.request.wants_one_answer:
            return None
        if call.no_store or call.no_read or call.tenant.opted_out:
            return None
        keys = call.identities.keys(other)
        if keys is None or not keys.is_exact:
            return None
        link_ms = 0.0
        if one.node_id != other.node_id:
            link = self._fleet.topology.links_of(other.node_id).get(one.node_id)
            if link is None:
                return None
            link_ms = other.block_bytes / keys.block_tokens / link.bytes_per_ms
        return pairing.Way(len(keys.keys) * keys.block_tokens, link_ms)

    def _errand(self, ranking: Ranking, handoff: Handoff) -> Errand | None:
        """What the engine gets that computes the prompt: one token is asked of it."""
        call, best, identities = ranking.call, ranking.best, ranking.identities
        first, second = best.candidate.computing, best.candidate.engine
        mine = replace(handoff, wait_ms=0)
        fields, reason = self._fields(call, first, identities, mine)
        keys = identities.keys(first.engine)
        if reason or keys is None or second.node_id is None:
            return None  # the other waits a moment in vain
        fields |= call.request.one_token()
        return Errand(
            name=handoff.name,
            to=second.node_id,
            engine=first.engine,
            path=call.request.path,
            body=call.request.with_fields(fields),
            request_id=_request_id(call, mine),
            sent=Sent(first.work, best.terms.own_work, keys.keys),
            version=identities.state.version if identities.state else 0,
        )

    # ------------------------------------------------------------------ what is told of it

    def _decision(self, ranking: Ranking, reason: str) -> Decision:
        call, engine = ranking.call, ranking.best.candidate.engine
        keys = None if reason else ranking.identities.keys(engine)
        identity = ranking.identities.of(engine.tokenizer)
        named = {ranked.candidate.engine.endpoint for ranked in ranking.ranked}
        tried = tuple((one, "tried before") for one in sorted(call.tried) if one not in named)
        return Decision(
            tenant=call.tenant.tenant_id,
            ranked=ranking.ranked,
            reason=reason,
            policy=self._policy,
            draw=ranking.draw,
            made_at=time.time(),
            waited_ms=(time.monotonic() - call.arrived) * 1e3,
            reusable_tokens=len(keys.keys) * keys.block_tokens if keys is not None else 0,
            is_cut=identity is not None and identity.recognised.cacheable_tokens != NO_LIMIT,
            no_read=call.no_read or call.tenant.opted_out,
            left_out=(*self._fleet.not_taking(call.request.model), *tried),
        )

    def _count_tokens(self, call: Call, decision: Decision, outcome: Outcome) -> None:
        engine = decision.ranked[0].candidate.engine
        length = self._length(call, engine)
        if length is not None and call.request.token_ids is None:
            self._fleet.counted(engine.endpoint, ours=length, its=outcome.prompt_tokens)

    def _drift(self, call: Call, decision: Decision, outcome: Outcome) -> Drift | None:
        engine = decision.ranked[0].candidate.engine
        templates = self._registry.templates(engine.tokenizer)
        identity = call.identities.of(engine.tokenizer) if call.identities is not None else None
        tokens = call.tokens.get(engine.tokenizer)
        is_exact = self._tokenizers[engine.tokenizer].is_exact
        if identity is None or tokens is None or not is_exact or engine.model is None:
            return None
        assert templates is not None
        segments = [one for one in identity.recognised.segments if templates.knows(one)]
        return self._drifts.judge(
            call.tenant.tenant_id,
            Seen(
                tokens=tokens,
                segments=tuple(segments),
                ends=tuple(one.first_token + one.num_tokens for one in segments),
                block_tokens=engine.model.block_tokens,
                reused_tokens=outcome.reused_tokens,
            ),
        )

    def _remember(self, request_id: str, decision: Decision) -> None:
        self._decisions[request_id] = decision
        while len(self._decisions) > KEPT_DECISIONS:
            self._decisions.popitem(last=False)
        _log.debug("request %s of %s: %s", request_id, decision.tenant, decision)

    def _count(self, plan: Plan, identities: Identities) -> None:
        decision = plan.decision
        if decision.reason:
            self._metrics.one_time_salts.labels(reason=decision.reason).inc()
        mine, reuse = self._metrics.of(decision.tenant), plan.choice.computing.reuse
        mine.predicted["hbm"].inc(reuse.hbm_tokens)
        mine.predicted["host"].inc(reuse.host_tokens)
        mine.predicted["ssd"].inc(reuse.ssd_tokens)
        mine.predicted["peer"].inc(reuse.peer_tokens)
        mine.reachable_tokens.inc(decision.reachable_tokens)
        mine.regret_tokens.inc(decision.regret_tokens)
        mine.regret_s.inc(decision.regret_ms / 1e3)
        if plan.choice.reuse.is_approximate:
            self._metrics.approximate.labels(tenant=decision.tenant).inc()
        identity = identities.of(plan.engine.tokenizer)
        if identity is not None:
            for segment in identity.recognised.segments:
                self._metrics.templates.labels(template=segment.template, result="used").inc()


def _handoff_of(best: Ranked) -> Handoff | None:
    """As the engine that waits is told of it."""
    first = best.candidate.prefill
    if first is None or first.engine.node_id is None:
        return None
    return Handoff(secrets.token_hex(8), first.engine.node_id, pairing.wait_ms(best.terms))


def _request_id(call: Call, handoff: Handoff | None) -> str:
    """Of two engines' requests each has its own: their nodes may be one."""
    computes = handoff is not None and not handoff.wait_ms
    return f"{call.request_id}-prefill" if computes else call.request_id


def _guess_tokens(request: ModelRequest) -> int:
    size = len(request.raw) if request.text is None else len(request.text)
    return size // BYTES_PER_TOKEN + 1


class _Matches:
    """The index's answers for one call: asked once for each namespace. `reuse`: by endpoint, what follows."""

    def __init__(self, index: FleetIndex, predicted: Predicted, made_at: float) -> None:
        self.made_at = made_at
        self.reuse: dict[str, Reuse] = {}
        self._index = index
        self._predicted = predicted
        self._answers: dict[tuple[bytes, bytes, int], dict[Holder, Present]] = {}
        self._expected: dict[tuple[bytes, bytes, int, bool], dict[str, Present]] = {}

    def of(self, keys: PromptKeys) -> dict[Holder, Present]:
        if not keys.is_exact:
            return {}
        name = (keys.tenant_tag, keys.public_tag, keys.block_tokens)
        if name not in self._answers:
            self._answers[name] = self._ask(keys)
        return self._answers[name]

    def predicted(self, keys: PromptKeys) -> dict[str, Present]:
        """What engines will have because of earlier requests, by endpoint."""
        name = (keys.tenant_tag, keys.public_tag, keys.block_tokens, keys.is_exact)
        if name not in self._expected:
            self._expected[name] = self._predicted.of(keys.keys)
        return self._expected[name]

    def _ask(self, keys: PromptKeys) -> dict[Holder, Present]:
        public, own = keys.keys[: keys.public_blocks], keys.keys[keys.public_blocks :]
        found: dict[Holder, Present] = {}
        parts = ((keys.public_tag, public, 0), (keys.tenant_tag, own, len(public)))
        for tag, some, first in parts:
            matched = self._index.match(tag, some) if some else {}
            for holder, present in matched.items():
                whole = found.setdefault(holder, np.zeros(len(keys.keys), np.bool_))
                whole[first : first + len(some)] = present
        return found
