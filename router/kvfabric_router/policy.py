"""Which engine answers a request: pure functions over an immutable snapshot.

Cost of a candidate, in milliseconds:

    wait      work that waits on this engine before it
    fetch     bringing its cached blocks into HBM, by tier
    prefill   computing the tokens that are cached nowhere near
    decode    the answers in progress there, which share the engine's steps
    others    what it costs those it joins: its uncached work times the requests in that queue

Without the last term a busy fleet gives its reuse away: each request takes the emptiest engine and makes
all later ones on it wait longer than the reuse it gave up would have cost.

No I/O, no clock, no state: the same code ranks live requests and recorded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from kvfabric.events.index import Holder, Present
from kvfabric.types import NodeId, TierName
from kvfabric_router.identity import ModelIdentity

TIE_MS, TIE_SHARE = 1.0, 0.02
"""Costs closer than this are the same cost: measured rates are no better than that."""

DEFAULT_PREFILL_MS_PER_TOKEN = 0.5
DEFAULT_DECODE_MS = 20.0
HOST_BYTES_PER_MS = 4e6
SSD_BYTES_PER_MS = 8e5
"""Before anything was measured: memory and disk of a small machine."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What this engine was seen to need. `decode_ms`: one step of one running answer."""

    prefill_ms_per_token: float = DEFAULT_PREFILL_MS_PER_TOKEN
    decode_ms: float = DEFAULT_DECODE_MS


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine that takes requests, at one moment.

    `session` is empty if no node vouches for it: it gets no handle. `model` is None if the engine does
    not say what its KV depends on; `tokenizer` as the engine names it, empty if it does not.
    `waiting_ms`: predicted work before a newcomer's; `num_waiting` requests without a first byte yet,
    `num_decoding` with one.
    """

    endpoint: str
    engine_id: str
    model_name: str
    node_id: NodeId | None = None
    session: bytes = b""
    model: ModelIdentity | None = None
    block_bytes: int = 0
    tokenizer: str = ""
    max_model_tokens: int = 0
    rates: Rates = Rates()
    waiting_ms: float = 0.0
    num_waiting: int = 0
    num_decoding: int = 0


@dataclass(frozen=True, slots=True)
class FleetView:
    """The engines that take requests now. A snapshot: nothing in it changes."""

    engines: tuple[EngineView, ...] = ()


@dataclass(frozen=True, slots=True)
class Reuse:
    """Tokens of one prompt that one engine would not have to compute, by where they are."""

    hbm_tokens: int = 0
    host_tokens: int = 0
    ssd_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.hbm_tokens + self.host_tokens + self.ssd_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    engine: EngineView
    prompt_tokens: int
    reuse: Reuse = Reuse()


@dataclass(frozen=True, slots=True)
class CostTerms:
    """Milliseconds; what they mean is in the module docstring."""

    wait: float = 0.0
    fetch: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    others: float = 0.0

    @property
    def total(self) -> float:
        return self.wait + self.fetch + self.prefill + self.decode + self.others

    @property
    def own_work(self) -> float:
        """What the engine has to do for this request before its first token."""
        return self.fetch + self.prefill


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its cost, kept to explain the choice."""

    candidate: Candidate
    terms: CostTerms


def cost(candidate: Candidate) -> CostTerms:
    """See the module."""
    engine, reuse = candidate.engine, candidate.reuse
    rates = engine.rates
    prefill = (candidate.prompt_tokens - reuse.tokens) * rates.prefill_ms_per_token
    return CostTerms(
        wait=engine.waiting_ms,
        fetch=_fetch_ms(engine, reuse),
        prefill=prefill,
        decode=engine.num_decoding * rates.decode_ms,
        others=prefill * (engine.num_waiting + engine.num_decoding),
    )


def _fetch_ms(engine: EngineView, reuse: Reuse) -> float:
    if engine.model is None:
        return 0.0
    token_bytes = engine.block_bytes / engine.model.block_tokens
    host, ssd = reuse.host_tokens / HOST_BYTES_PER_MS, reuse.ssd_tokens / SSD_BYTES_PER_MS
    return token_bytes * (host + ssd)


def by_cost(candidates: Sequence[Candidate], rng: Random) -> tuple[Ranked, ...]:
    """Cheapest first; equals in random order, so that equal routers do not all choose the same."""
    ranked = sorted((Ranked(c, cost(c)) for c in candidates), key=lambda r: r.terms.total)
    if not ranked:
        return ()
    limit = ranked[0].terms.total * (1 + TIE_SHARE) + TIE_MS
    ties = [r for r in ranked if r.terms.total <= limit]
    rng.shuffle(ties)
    return (*ties, *ranked[len(ties) :])


def round_robin(candidates: Sequence[Candidate], turn: int) -> tuple[Ranked, ...]:
    """Each engine in its turn, whatever it holds or does."""
    ordered = sorted(candidates, key=lambda c: c.engine.endpoint)
    start = turn % len(ordered) if ordered else 0
    return tuple(Ranked(c, cost(c)) for c in (*ordered[start:], *ordered[:start]))


def reuse_of(
    engine: EngineView, present: dict[Holder, Present], num_blocks: int, block_tokens: int
) -> Reuse:
    """What `engine` could reuse of a prompt, given who holds its `num_blocks` cacheable blocks.

    An engine uses its own HBM up to the first gap, then what its node has from there, without a gap.
    """
    if engine.node_id is None or not engine.session or not num_blocks:
        return Reuse()
    nothing = np.zeros(num_blocks, np.bool_)
    node = engine.node_id
    from_hbm = _leading(present.get(Holder(node, TierName.HBM, engine.session), nothing))
    host = present.get(Holder(node, TierName.HOST), nothing)[from_hbm:]
    ssd = present.get(Holder(node, TierName.SSD), nothing)[from_hbm:]
    from_node = _leading(host | ssd)
    from_host = int(np.count_nonzero(host[:from_node]))
    return Reuse(
        hbm_tokens=from_hbm * block_tokens,
        host_tokens=from_host * block_tokens,
        ssd_tokens=(from_node - from_host) * block_tokens,
    )


def _leading(present: Present) -> int:
    """Length of the run of True that it starts with."""
    return len(present) if present.all() else int(present.argmin())
