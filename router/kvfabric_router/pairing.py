"""When one engine computes a prompt for another to answer: pure functions over the costs of a snapshot.

An engine that computes a prompt keeps everybody there waiting: those in its queue, which the policy counts
(`others`), and the answers in progress, whose tokens come later by as long as the prefill takes (`stall`).
Apart, the prompt is computed where nobody waits for a token, and its blocks travel chunk by chunk while the
rest is computed. What cannot be hidden behind the prefill is the price (`handoff`):

    the last chunk's way, and whatever the way of all takes longer than the prefill
    computing what is no whole block, where the answer is given
    what the messages take

Engines say what they are for. Without one that says `prefill` or `decode` nothing is ever taken apart. An
engine for prompts answers itself only if there is no other; any other computes its prompts itself whenever
that costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from kvfabric.types import NodeId
from kvfabric_router.rates import Work

if TYPE_CHECKING:
    from kvfabric_router.policy import Candidate, CostTerms, EngineView

MESSAGES_MS = 10.0
CHUNK_TOKENS = 1024
"""Engines hand over at least this often."""
CONSIDERED = 4
"""Engines of each kind, the cheapest, that are considered together."""
WAIT_FACTOR, WAIT_LEAST_MS, WAIT_MOST_MS = 3.0, 1_000.0, 30_000.0
"""Blocks are waited for as many times as long as was predicted, at least and at most so long."""
_LEARN, _OUTLIER = 0.2, 4.0


class Lags:
    """How much longer blocks take from one node to another than was predicted, as a factor: learned from when
    the one engine had its first token and when the other had. Sync state."""

    def __init__(self) -> None:
        self._factors: dict[tuple[NodeId | None, NodeId | None], float] = {}

    def of(self, first: EngineView, second: EngineView) -> float:
        return self._factors.get((first.node_id, second.node_id), 1.0)

    def saw(self, pair: Candidate, took_ms: float) -> None:
        """The blocks of a hand-off were all there so long after they were all computed."""
        assert pair.prefill is not None
        key = (pair.prefill.engine.node_id, pair.engine.node_id)
        known = self._factors.get(key, 1.0)
        seen = max(took_ms - tail_ms(pair), 0.0) / _exposed_ms(pair)
        seen = min(max(seen, known / _OUTLIER), known * _OUTLIER)
        self._factors[key] = known + _LEARN * (seen - known)


class Way(NamedTuple):
    """The prompt's blocks from one engine to another: tokens, and milliseconds for each between the nodes."""

    num_tokens: int
    link_ms: float


WayOf = Callable[["EngineView", "EngineView"], Way | None]
"""None if the first cannot compute the prompt for the second."""


def candidates(alone: Sequence[Candidate], way_of: WayOf, lags: Lags) -> list[Candidate]:
    """Who may answer, and the pairs to consider."""
    able = answering(alone)
    if all(c.engine.serves == "both" for c in alone):
        return able
    computing = [c for c in alone if c.engine.serves != "decode"]
    return able + [
        pair
        for first in nsmallest(CONSIDERED, computing, key=_until_computed_ms)
        for second in nsmallest(CONSIDERED, able, key=_load)
        if (pair := _pair(first, second, way_of, lags)) is not None
    ]


def answering(alone: Sequence[Candidate]) -> list[Candidate]:
    """`alone` without engines for prompts, if there are others."""
    return [c for c in alone if c.engine.serves != "prefill"] or list(alone)


def _pair(first: Candidate, second: Candidate, way_of: WayOf, lags: Lags) -> Candidate | None:
    one, other = first.engine, second.engine
    if one.endpoint == other.endpoint or one.serves == other.serves:
        return None
    way = way_of(one, other)
    if way is None or way.num_tokens <= second.reuse.hbm_tokens:
        return None
    return replace(
        second,
        prefill=first,
        handed_tokens=way.num_tokens,
        link_ms=way.link_ms,
        lag=lags.of(one, other),
    )


def _until_computed_ms(candidate: Candidate) -> float:
    engine, work = candidate.engine, candidate.work
    rates = engine.rates
    waiting = engine.waiting_ms + engine.held_ms
    return waiting + rates.fetch_ms(work) + rates.prefill_ms(work) * (1 + engine.queue)


def _load(candidate: Candidate) -> tuple[float, int]:
    """Fewest answers first; of equals the one that has most of the prompt."""
    engine = candidate.engine
    return engine.num_decoding + engine.queue, -candidate.reuse.tokens


def work_after(pair: Candidate) -> Work:
    """What is left to the second engine: blocks from its node, and what is no whole block."""
    hbm = pair.reuse.hbm_tokens
    left = pair.prompt_tokens - pair.handed_tokens
    return Work(computed=max(left, 1), hbm=hbm, host=pair.handed_tokens - hbm)


def handoff_ms(pair: Candidate, computed_ms: float) -> float:
    """From the last chunk's end at the first engine to the first token at the second. `computed_ms`: until
    that end, from now."""
    left = max(pair.engine.waiting_ms + pair.engine.held_ms - computed_ms, 0.0)
    return left + pair.lag * _exposed_ms(pair) + tail_ms(pair)


def _exposed_ms(pair: Candidate) -> float:
    assert pair.prefill is not None
    first, rates, reuse = pair.prefill, pair.engine.rates, pair.reuse
    way = max(pair.handed_tokens - reuse.own_tokens, 0) * pair.link_ms
    way += (pair.handed_tokens - reuse.hbm_tokens) * rates.host_ms
    last = way / max(-(-first.work.computed // CHUNK_TOKENS), 1)
    hidden = first.engine.rates.prefill_ms(first.work)
    return MESSAGES_MS + last + max(way - last - hidden, 0.0)


def tail_ms(pair: Candidate) -> float:
    engine, work = pair.engine, work_after(pair)
    return engine.rates.prefill_ms(work) + engine.rates.decode_ms(work, engine.num_decoding)


def stall_ms(candidate: Candidate) -> float:
    """What the answers in progress lose by a prompt, all together."""
    if candidate.prefill is None:
        engine, work = candidate.engine, candidate.work
        return engine.rates.prefill_ms(work) * engine.num_decoding
    return stall_ms(candidate.prefill) + tail_ms(candidate) * candidate.engine.num_decoding


def wait_ms(terms: CostTerms) -> int:
    """How long the second engine may wait for the first."""
    return int(min(max(WAIT_FACTOR * terms.first_token, WAIT_LEAST_MS), WAIT_MOST_MS))
