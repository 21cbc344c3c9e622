"""Recorded choices made again, by the code that makes them live; and what another fleet would have made of
the same requests. Pure.

`check` asks the policy the recorded question: same snapshot, same draw. `Model.run` serves the recorded
requests in their order on simulated engines: first come, first served, at the rates that the router had
learned when each was sent; HBM an LRU of blocks for each engine, host memory one for each node, as large as
the node said. The size of HBM, and of host memory where no node told, is not recorded: `fitted` takes that
with which the model reuses what was reused. SSD and peers are not modelled, nor is waiting at the router:
compare the model with itself, and its first row with what happened.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType

from msgspec import structs

from kvfabric_router import policy
from kvfabric_router.decision import Outcome
from kvfabric_router.journal import BLOCK_ID_BYTES, Chosen, Record
from kvfabric_router.policy import Candidate, EngineView, Reuse

_SIZES = tuple(1 << n for n in range(4, 21))
_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request with its answer, if one was recorded."""

    chosen: Chosen
    outcome: Outcome | None


def exchanges(records: Iterable[Record]) -> list[Exchange]:
    """In the order they were sent. Of a request that was sent again each attempt is one; its answer is the
    last one's."""
    found: list[Exchange] = []
    last: dict[str, int] = {}
    for record in records:
        if isinstance(record, Chosen):
            last[record.id] = len(found)
            found.append(Exchange(record, None))
        elif record.id in last:
            place = last[record.id]
            found[place] = replace(found[place], outcome=record.outcome)
    return found


@dataclass(frozen=True, slots=True)
class Checked:
    """`different`: ids of choices that came out otherwise."""

    num: int
    different: tuple[str, ...]


def check(found: Sequence[Exchange]) -> Checked:
    """Every recorded choice made again: equal only if the whole order is."""
    different = []
    for one in found:
        chosen = one.chosen
        again = policy.choose(chosen.policy, chosen.candidates, chosen.draw)
        if [ranked.candidate for ranked in again] != list(chosen.candidates):
            different.append(chosen.id)
    return Checked(len(found), tuple(different))


@dataclass(frozen=True, slots=True)
class Row:
    """Times in milliseconds; shares of prompt tokens."""

    name: str
    num: int
    ttft_ms_mean: float
    ttft_ms_p95: float
    reused_share: float


def happened(found: Sequence[Exchange]) -> Row | None:
    """From the engines' own reports; None if there are none."""
    outcomes = [one.outcome for one in found if one.outcome is not None]
    return _row("happened", outcomes) if outcomes else None


def _row(name: str, outcomes: Sequence[Outcome]) -> Row:
    times = sorted(o.ttft_ms for o in outcomes if o.ttft_ms is not None)
    tokens = sum(o.prompt_tokens for o in outcomes)
    return Row(
        name,
        len(outcomes),
        fmean(times) if times else 0.0,
        times[min(int(len(times) * 0.95), len(times) - 1)] if times else 0.0,
        sum(o.reused_tokens for o in outcomes) / tokens if tokens else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Blocks of one engine's HBM and of one node's host memory."""

    hbm: int
    host: int


@dataclass(slots=True)
class _Lru:
    capacity: int
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def leading(self, blocks: Sequence[bytes], start: int = 0) -> int:
        """How many of `blocks` from `start` on it holds without a gap."""
        end = start
        while end < len(blocks) and blocks[end] in self.blocks:
            end += 1
        return end - start

    def use(self, blocks: Sequence[bytes]) -> None:
        for block in reversed(blocks):  # the first of a prompt stays longest
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


@dataclass(slots=True)
class _Engine:
    hbm: _Lru
    host: _Lru
    free_at: float = 0.0
    first_tokens: list[tuple[float, float]] = field(default_factory=list)  # (first, last) token

    def seen(self, view: EngineView, now: float) -> EngineView:
        self.first_tokens = [one for one in self.first_tokens if one[1] > now]
        waiting = sum(first > now for first, _ in self.first_tokens)
        return structs.replace(
            view,
            waiting_ms=max(self.free_at - now, 0.0) * 1e3,
            num_waiting=waiting,
            num_decoding=len(self.first_tokens) - waiting,
            held_ms=0.0,
            num_held=0,
        )

    def reuse(self, blocks: Sequence[bytes], block_tokens: int) -> Reuse:
        hbm = self.hbm.leading(blocks)
        host = self.host.leading(blocks, hbm)
        return Reuse(hbm_tokens=hbm * block_tokens, host_tokens=host * block_tokens)


class Model:
    """See the module. `policy_name`: empty for the recorded one; `without`: engine ids that are not there;
    `hosts`: blocks of the host memory of each node, in place of what `sizes` says of all.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        policy_name: str = "",
        without: Sequence[str] = (),
        hosts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._sizes = sizes
        self._sizes_of_hosts = hosts
        self._policy = policy_name
        self._without = frozenset(without)
        self._engines: dict[str, _Engine] = {}
        self._hosts: dict[str, _Lru] = {}

    def run(self, name: str, found: Sequence[Exchange]) -> Row | None:
        """The requests that were answered, served again; None if no engine is left for any."""
        answers = []
        for turn, one in enumerate(found):
            candidates = [
                candidate
                for candidate in one.chosen.candidates
                if candidate.engine.engine_id not in self._without
                and candidate.computing.engine.engine_id not in self._without
            ]
            if one.outcome is not None and candidates:
                answers.append(self._serve(one.chosen, one.outcome, candidates, turn))
        return _row(name, answers) if answers else None

    def _serve(
        self, chosen: Chosen, told: Outcome, candidates: Sequence[Candidate], turn: int
    ) -> Outcome:
        now, blocks = chosen.at, _blocks(chosen.blocks)

        def seen_now(one: Candidate) -> Candidate:
            engine = self._engine(one.engine)
            return structs.replace(
                one,
                engine=engine.seen(one.engine, now),
                prompt_tokens=told.prompt_tokens,
                reuse=engine.reuse(blocks, chosen.block_tokens),
                prefill=seen_now(one.prefill) if one.prefill is not None else None,
            )

        seen = [seen_now(one) for one in candidates]
        name = self._policy or chosen.policy
        draw = turn if name == "round_robin" != chosen.policy else chosen.draw
        best = policy.choose(name, seen, draw)[0]
        computing = self._engine(best.candidate.computing.engine)
        computing.free_at = max(computing.free_at, now) + best.terms.own_work / 1e3
        first = computing.free_at + best.terms.handoff / 1e3
        step_s = best.candidate.engine.rates.step_ms / 1e3
        answering = self._engine(best.candidate.engine)
        answering.first_tokens.append((first, first + told.completion_tokens * step_s))
        for engine in {id(one): one for one in (computing, answering)}.values():
            engine.hbm.use(blocks)
            engine.host.use(blocks)
        return Outcome(told.prompt_tokens, best.candidate.work, (first - now) * 1e3)

    def _engine(self, view: EngineView) -> _Engine:
        if view.endpoint not in self._engines:
            node = view.node_id or view.endpoint
            size = self._sizes_of_hosts.get(node, self._sizes.host) if view.node_id else 0
            host = self._hosts.setdefault(node, _Lru(size))
            self._engines[view.endpoint] = _Engine(_Lru(self._sizes.hbm), host)
        return self._engines[view.endpoint]


def _blocks(packed: bytes) -> list[bytes]:
    size = BLOCK_ID_BYTES
    return [packed[start : start + size] for start in range(0, len(packed), size)]


def recorded_hosts(found: Sequence[Exchange], times: float = 1.0) -> dict[str, int]:
    """Blocks that `times` the host memory of each node holds, by what it said last; of those that did."""
    hosts: dict[str, int] = {}
    for one in found:
        for candidate in one.chosen.candidates:
            engine, node = candidate.engine, candidate.engine.node_id
            capacity = one.chosen.capacity.get(node) if node else None
            if node and capacity is not None and engine.block_bytes:
                hosts[node] = int(times * capacity.host / engine.block_bytes)
    return hosts


def fitted(found: Sequence[Exchange]) -> Sizes:
    """The sizes with which the model comes closest to the tokens that came from HBM and from host memory.

    HBM first, with host memory without bound, then that; powers of two, and of equal ones the smallest.
    """
    hbm = min(_SIZES, key=lambda size: _error(found, Sizes(size, _UNBOUNDED), "hbm"))
    host = min(_SIZES, key=lambda size: _error(found, Sizes(hbm, size), "host"))
    return Sizes(hbm, host)


def _error(found: Sequence[Exchange], sizes: Sizes, tier: str) -> int:
    """Between tokens reused in the model and in truth, each request at the engine where it was."""
    model, error = Model(sizes), 0
    for one in found:
        if one.outcome is None or one.chosen.candidates[0].prefill is not None:
            continue  # what was handed over was no reuse
        engine = model._engine(one.chosen.candidates[0].engine)
        blocks = _blocks(one.chosen.blocks)
        reuse = engine.reuse(blocks, one.chosen.block_tokens)
        error += abs(getattr(reuse, f"{tier}_tokens") - getattr(one.outcome.reused, tier))
        engine.hbm.use(blocks)
        engine.host.use(blocks)
    return error
