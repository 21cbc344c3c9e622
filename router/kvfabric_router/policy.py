"""Which engine answers a request: pure functions over an immutable snapshot.

Cost of a candidate, in milliseconds:

    wait      work that waits for this engine before it, there or at the router
    fetch     bringing its cached blocks into HBM, by tier and link
    prefill   computing the tokens that are cached nowhere near
    decode    what the answers in progress there take from the steps of that prefill
    others    what it costs those who wait for this engine: its uncached work, for each of them
    handoff   of a prompt that another engine computes: until its blocks are here (`pairing`)
    stall     where that is a choice: what it takes from the answers in progress

Without the last term a busy fleet gives its reuse away: each request takes the emptiest engine and makes
all later ones on it wait longer than the reuse it gave up would have cost. Those behind it are as many as
wait for the engine now. What is wasted, work that another engine would not have to do, counts once more for
each who waits at a mean engine, as far as this one is that busy: the fleet is short of that work.

No I/O, no clock, no state: the same code ranks live requests, recorded ones and simulated ones. What is made
for each candidate is a msgspec struct: seven times as fast to make as a frozen dataclass, and without a part
in reference cycles, so the garbage collector does not look at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import msgspec
import numpy as np
from msgspec.structs import replace

from kvfabric.events.index import Holder, Present
from kvfabric.types import NodeId, TierName
from kvfabric_router import pairing
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.rates import UNKNOWN, Rates, Work

MAX_SOURCES = 2
"""Nodes that a handle names."""
TIE_SHARE = 0.01
"""Costs closer than this are the same cost: measured rates are no better than that."""


class EngineView(msgspec.Struct, frozen=True, gc=False):
    """One engine that takes requests, at one moment.

    `session` is empty if no node vouches for it: it gets no handle. `model` is None if the engine does
    not say what its KV depends on; `tokenizer` as the engine names it, empty if it does not.
    `serves`: prompts that others answer (`prefill`), answers to such prompts (`decode`), or both.
    `waiting_ms`: predicted work there before a newcomer's; `num_waiting` requests without a first byte yet,
    `num_decoding` with one. `held_ms` and `num_held`: the same of requests at the router that wait for it.
    `background_ms`: how much of `waiting_ms` other replicas of the router have there, as far as is known;
    numbers count theirs too, and are no whole ones then.
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
    rates: Rates = UNKNOWN
    waiting_ms: float = 0.0
    num_waiting: float = 0.0
    num_decoding: float = 0.0
    held_ms: float = 0.0
    num_held: float = 0.0
    background_ms: float = 0.0
    serves: str = "both"

    @property
    def queue(self) -> float:
        """Requests that wait for it."""
        return self.num_waiting + self.num_held


class FleetView(msgspec.Struct, frozen=True, gc=False):
    """The engines that take requests now. A snapshot: nothing in it changes."""

    engines: tuple[EngineView, ...] = ()


class PeerLink(msgspec.Struct, frozen=True, gc=False):
    """Between two nodes. `kind`: host, rack, zone or far; `basis`: measured at this link (`link`), at others
    of its kind (`class`), or nowhere (`default`)."""

    kind: str
    bytes_per_ms: float
    basis: str = "link"


class Reuse(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one prompt that one engine would not have to compute, by where they are.

    `is_approximate`: no node told so; it follows from what was sent there before. `peer_tokens`: those that
    its node would fetch from the node `peer` over `link`, `peer_ms` for each.
    """

    hbm_tokens: int = 0
    host_tokens: int = 0
    ssd_tokens: int = 0
    is_approximate: bool = False
    peer_tokens: int = 0
    peer_ms: float = 0.0
    peer: str = ""
    link: PeerLink | None = None

    @property
    def tokens(self) -> int:
        return self.own_tokens + self.peer_tokens

    @property
    def own_tokens(self) -> int:
        """What the engine and its node have."""
        return self.hbm_tokens + self.host_tokens + self.ssd_tokens


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """`prefill`: who computes the prompt for it, if another does; then it hands over the first
    `handed_tokens`, at `link_ms` for each, `lag` times what is predicted.
    """

    engine: EngineView
    prompt_tokens: int
    reuse: Reuse = Reuse()
    prefill: Candidate | None = None
    handed_tokens: int = 0
    link_ms: float = 0.0
    lag: float = 1.0

    @property
    def computing(self) -> Candidate:
        """Who computes the prompt, and has it wait for that."""
        return self.prefill or self

    @property
    def work(self) -> Work:
        """An engine computes at least the last token."""
        if self.prefill is not None:
            return pairing.work_after(self)
        reuse = self.reuse
        return Work(
            computed=max(self.prompt_tokens - reuse.tokens, 1),
            hbm=reuse.hbm_tokens,
            host=reuse.host_tokens,
            ssd=reuse.ssd_tokens,
            peer=reuse.peer_tokens,
            peer_ms=reuse.peer_ms,
        )


class CostTerms(msgspec.Struct, frozen=True, gc=False):
    """Milliseconds; what they mean is in the module docstring."""

    wait: float = 0.0
    fetch: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    others: float = 0.0
    handoff: float = 0.0
    stall: float = 0.0

    @property
    def total(self) -> float:
        return self.first_token + self.others + self.stall

    @property
    def own_work(self) -> float:
        """What the engine that computes the prompt has to do for this request."""
        return self.fetch + self.prefill + self.decode

    @property
    def first_token(self) -> float:
        """When its first token is expected."""
        return self.wait + self.own_work + self.handoff


class Ranked(msgspec.Struct, frozen=True, gc=False):
    """A candidate with its cost, kept to explain the choice."""

    candidate: Candidate
    terms: CostTerms


def cost(candidate: Candidate, *, mean_queue: float = 0.0, least: Work | None = None) -> CostTerms:
    """See the module. `mean_queue`: requests that wait for a mean engine; `least`: the work of the prompt at
    the candidate that reuses most of it.
    """
    return _terms(candidate.engine, candidate.work, mean_queue, least)


def _terms(engine: EngineView, work: Work, mean_queue: float, least: Work | None) -> CostTerms:
    rates = engine.rates
    prefill = rates.prefill_ms(work)
    decode = rates.decode_ms(work, engine.num_decoding)
    wasted = max(prefill - rates.prefill_ms(least), 0.0) if least else 0.0
    return CostTerms(
        wait=engine.waiting_ms + engine.held_ms,
        fetch=rates.fetch_ms(work),
        prefill=prefill,
        decode=decode,
        others=(prefill + decode) * engine.queue + wasted * min(engine.queue, mean_queue),
    )


def costs(candidates: Sequence[Candidate]) -> list[Ranked]:
    """Each candidate with its cost, in the order given."""
    if not candidates:
        return []
    alone = [c.engine.queue for c in candidates if c.prefill is None]
    mean_queue = sum(alone) / len(alone) if alone else 0.0
    works = [c.computing.work for c in candidates]
    least = min(works, key=lambda work: work.computed)
    found = [
        Ranked(c, _terms(c.computing.engine, work, mean_queue, least))
        for c, work in zip(candidates, works, strict=True)
    ]
    if all(c.prefill is None for c in candidates):
        return found
    return [Ranked(r.candidate, _apart(r.candidate, r.terms)) for r in found]


def _apart(candidate: Candidate, terms: CostTerms) -> CostTerms:
    """Where prompts may be computed elsewhere: what that costs, and what it costs not to."""
    stall = pairing.stall_ms(candidate)
    if candidate.prefill is None:
        return replace(terms, stall=stall)
    handoff = pairing.handoff_ms(candidate, terms.wait + terms.own_work)
    return replace(terms, stall=stall, handoff=handoff)


def choose(policy: str, candidates: Sequence[Candidate], draw: int) -> tuple[Ranked, ...]:
    """Best first. `policy`: as configured; `draw`: seed of its ties, or for round robin whose turn it is.

    Live, recorded and simulated requests all come here: the same arguments give the same choice.
    """
    ordered = sorted(candidates, key=lambda c: c.engine.endpoint)
    if policy == "cost":
        return by_cost(ordered, draw)
    if policy == "least_loaded":
        return least_loaded(ordered, Random(draw))
    return round_robin(ordered, draw)


def by_cost(candidates: Sequence[Candidate], draw: int) -> tuple[Ranked, ...]:
    """Cheapest first; of equals the `draw`-th, counted around: equal routers do not all choose the same."""
    ranked = sorted(costs(candidates), key=lambda r: r.terms.total)
    if not ranked:
        return ()
    limit = ranked[0].terms.total * (1 + TIE_SHARE)
    ties = sum(r.terms.total <= limit for r in ranked)
    first = draw % ties
    return (*ranked[first:ties], *ranked[:first], *ranked[ties:])


def round_robin(candidates: Sequence[Candidate], turn: int) -> tuple[Ranked, ...]:
    """Each engine in its turn, whatever it holds or does."""
    ordered = sorted(candidates, key=lambda c: c.engine.endpoint)
    start = turn % len(ordered) if ordered else 0
    return tuple(costs((*ordered[start:], *ordered[:start])))


def least_loaded(candidates: Sequence[Candidate], rng: Random) -> tuple[Ranked, ...]:
    """Fewest requests first, whatever an engine holds; equals in random order."""
    load = {c.engine.endpoint: c.engine.num_waiting + c.engine.num_decoding for c in candidates}
    shuffled = rng.sample(list(candidates), len(candidates))
    ordered = sorted(shuffled, key=lambda c: load[c.engine.endpoint])
    return tuple(costs(ordered))


def reuse_of(
    engine: EngineView,
    present: Mapping[Holder, Present],
    predicted: Present | None,
    *,
    num_blocks: int,
    block_tokens: int,
    is_exact: bool = True,
) -> Reuse:
    """What `engine` could reuse of a prompt, given who holds its `num_blocks` cacheable blocks.

    An engine uses its own HBM up to the first gap, then what its node has from there, without a gap.
    `predicted`: blocks that it has or will have because of what was sent there. Not `is_exact`: no node tells
    of blocks like these.
    """
    if not num_blocks:
        return Reuse()
    node = engine.node_id
    if node is None or not engine.session or not is_exact:
        return Reuse(hbm_tokens=_leading(predicted) * block_tokens, is_approximate=True)
    if not present:  # most prompts are new to everybody
        return Reuse(hbm_tokens=_leading(predicted) * block_tokens)
    told = present.get(Holder(node, TierName.HBM, engine.session))
    from_hbm = _leading(_either(told, predicted))
    host, ssd = present.get(Holder(node, TierName.HOST)), present.get(Holder(node, TierName.SSD))
    host, ssd = (None if one is None else one[from_hbm:] for one in (host, ssd))
    from_node = _leading(_either(host, ssd))
    from_host = 0 if host is None else int(np.count_nonzero(host[:from_node]))
    return Reuse(
        hbm_tokens=from_hbm * block_tokens,
        host_tokens=from_host * block_tokens,
        ssd_tokens=(from_node - from_host) * block_tokens,
    )


def with_peers(
    candidate: Candidate,
    present: Mapping[Holder, Present],
    links: Mapping[NodeId, PeerLink],
    *,
    block_tokens: int,
) -> Reuse:
    """What the engine could reuse if its node fetched from another, where that is faster than computing.

    A node gives the prompt's blocks from the first on without a gap, and what is here does not travel. Of
    several nodes the one that saves most. `links`: from whom the engine's node can fetch.
    """
    engine, reuse = candidate.engine, candidate.reuse
    if not links or not present or not engine.session or not engine.block_bytes:
        return reuse
    token_bytes, rates = engine.block_bytes / block_tokens, engine.rates
    own = reuse.own_tokens
    least, best = _first_token_work(rates, candidate.work), reuse
    for holder, blocks in present.items():
        link = links.get(NodeId(holder.node_id)) if holder.tier is TierName.HOST else None
        tokens = _leading(blocks) * block_tokens - own if link is not None else 0
        if link is None or tokens <= 0:
            continue
        fetched = replace(
            reuse,
            peer_tokens=tokens,
            peer_ms=token_bytes / link.bytes_per_ms,
            peer=holder.node_id,
            link=link,
        )
        work = _first_token_work(rates, replace(candidate, reuse=fetched).work)
        if work < least:
            least, best = work, fetched
    return best


def _first_token_work(rates: Rates, work: Work) -> float:
    return rates.prefill_ms(work) + rates.fetch_ms(work)


def sources_of(
    present: Mapping[Holder, Present],
    links: Mapping[NodeId, PeerLink],
    reuse: Reuse,
    *,
    block_tokens: int,
) -> tuple[NodeId, ...]:
    """Whom the engine's node may ask: none if it is to fetch nothing, else the peer that was chosen and the
    one that holds most beside it, should that one not answer."""
    if not reuse.peer_tokens:
        return ()
    own = reuse.own_tokens // block_tokens
    held = {
        NodeId(holder.node_id): _leading(blocks)
        for holder, blocks in present.items()
        if holder.tier is TierName.HOST and holder.node_id in links
    }
    more = sorted((node != reuse.peer, -count, node) for node, count in held.items() if count > own)
    return tuple(node for *_, node in more[:MAX_SOURCES])


def _either(one: Present | None, other: Present | None) -> Present | None:
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _leading(present: Present | None) -> int:
    """Length of the run of True that it starts with; None stands for no True."""
    if present is None or not present.size:
        return 0
    first = int(present.argmin())
    return first if first or not present[0] else len(present)
