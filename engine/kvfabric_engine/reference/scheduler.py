"""Decides what each step computes: admission, chunked prefill, decoding, preemption. Sync; runs no model.

Deterministic mode makes the shape of every forward a function of a token's position alone, so that a hit, a
neighbour in the batch or a preemption changes no bit of an answer:

    prompt tokens      [0, B) [B, 2B) ... [kB, len)      one forward each, B = fabric block, one sequence each
    answered tokens    one forward each, also when a preempted sequence replays them

Hence only blocks that lie wholly in the prompt are cached there: the KV of an answered token was computed in
another shape than a prompt that repeats it would be. Otherwise all sequences go into one forward, prompts in
chunks of whatever the budget leaves, and every full block is cached.

Pages of a sequence with b cached blocks (k pages each) and n tokens:

    [0, b k)                         of the prefix cache, shared, referenced      -> unreference
    [b k, ceil(n / page_tokens))     its own                                      -> free
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Vector
from dataclasses import dataclass, replace

from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.block_manager import BlockManager
from kvfabric_engine.reference.model import Span
from kvfabric_engine.reference.sequence import Phase, Sequence

PREFILL_TOKENS_A_STEP = 256
"""Prompt tokens computed between two tokens of the sequences that decode."""
PREFILL_TOKENS_ON_GPU = 8192
"""Likewise on a GPU, which is not full with fewer."""

HAND_OVER_TOKENS = 1024
"""Of a prompt that another engine waits for: what is computed travels while the next so many are."""


@dataclass(frozen=True, slots=True)
class Work:
    """One span of one sequence."""

    sequence: Sequence
    span: Span


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    num_waiting: int
    num_fetching: int
    num_running: int
    preemptions: int  # since start


class Scheduler:
    """Owns the waiting, fetching and running sequences and, through them, every page in use."""

    def __init__(
        self,
        blocks: BlockManager,
        shape: PoolShape,
        *,
        max_batch: int,
        deterministic: bool,
        prefill_tokens: int = PREFILL_TOKENS_A_STEP,
    ) -> None:
        self._blocks = blocks
        self._shape = shape
        self._max_batch = max_batch
        self._deterministic = deterministic
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._fetching: list[Sequence] = []
        self._running: list[Sequence] = []
        self._preemptions = 0

    def __repr__(self) -> str:
        s = self.statistics()
        return (
            f"<Scheduler {s.num_running} running, {s.num_fetching} fetching, "
            f"{s.num_waiting} waiting>"
        )

    def add(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        self._waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Sequences that got pages for all their tokens now; each is FETCHING until `start`."""
        admitted = []
        while self._waiting and len(self._fetching) + len(self._running) < self._max_batch:
            sequence = self._waiting[0]
            if not self._give_pages(sequence):
                break
            self._waiting.popleft()
            sequence.phase = Phase.FETCHING
            self._fetching.append(sequence)
            admitted.append(sequence)
        return admitted

    def start(self, sequence: Sequence, num_fetched_blocks: int) -> None:
        """Fetching ended: the blocks after the cached ones hold loaded KV. Compute the rest."""
        for _ in range(num_fetched_blocks):
            self._register(sequence, is_computed=False)
        sequence.num_computed = len(sequence.cached) * self._shape.block_tokens
        self._fetching.remove(sequence)
        sequence.phase = Phase.RUNNING
        self._running.append(sequence)

    def plan(self) -> list[Work]:
        """What to compute next. In deterministic mode each item is a forward of its own, in order."""
        budget = self._prefill_tokens
        work: list[Work] = []
        for sequence in list(self._running):
            if sequence.phase is not Phase.RUNNING or not self._grow(sequence):
                continue  # preempted by an older sequence, or by itself
            limit = 1 if sequence.num_computed == len(sequence.tokens) - 1 else budget
            if sequence.hands_over:
                limit = min(limit, HAND_OVER_TOKENS)
            spans = self._cut(sequence, sequence.num_computed, limit)
            work += [Work(sequence, span) for span in spans]
            if limit > 1:
                budget -= sum(len(span.token_ids) for span in spans)
        return work

    def is_alone(self, sequence: Sequence) -> bool:
        """Whether it is being fetched, and nothing else is or runs."""
        return self._fetching == [sequence] and not self._running

    def ahead(self, sequence: Sequence, num_blocks: int) -> list[Work]:
        """What `plan` would say once this many of its blocks are loaded, if that is all the rest of the
        sequence; else nothing."""
        spans = self._cut(sequence, num_blocks * self._shape.block_tokens, self._prefill_tokens)
        if not spans or spans[-1].end < len(sequence.tokens):
            return []
        return [Work(sequence, span) for span in spans]

    def computed(self, work: Work) -> None:
        """The span's KV is in the pool: blocks that it completes enter the prefix cache."""
        sequence = work.sequence
        sequence.num_computed = work.span.end
        keys = sequence.keys
        if keys is None or keys.no_store:
            return
        if not self._deterministic and sequence.num_computed > sequence.num_prompt:
            keys.extend(sequence.tokens[: sequence.num_computed])
        while len(sequence.cached) < len(keys.first(sequence.num_computed)):
            self._register(sequence, is_computed=True)

    def remove(self, sequence: Sequence) -> None:
        """The sequence ended, in any phase: its pages go back. Nothing may load into them any more."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.FETCHING:
            self._fetching.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
        self._take_pages(sequence)
        sequence.phase = Phase.FINISHED

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            len(self._waiting), len(self._fetching), len(self._running), self._preemptions
        )

    def _give_pages(self, sequence: Sequence) -> bool:
        hits = self._blocks.match_prefix(sequence.usable_keys())
        self._blocks.reference(hits)
        needed = self._num_pages(len(sequence.tokens)) - len(hits) * self._shape.pages_per_block
        # A page to spare for each running sequence, or the newcomer is preempted right away.
        spare = len(self._running)
        pages = None
        if needed + spare <= self._blocks.num_available_pages:
            pages = self._blocks.allocate(needed)
        if pages is None:
            self._blocks.unreference(hits)
            return False
        sequence.cached = hits
        sequence.pages = [page for hit in hits for page in hit.pages] + pages
        sequence.num_computed = len(hits) * self._shape.block_tokens
        if not sequence.was_started:
            sequence.reused = replace(sequence.reused, hbm=sequence.num_computed)
        return True

    def _take_pages(self, sequence: Sequence) -> None:
        own = sequence.pages[len(sequence.cached) * self._shape.pages_per_block :]
        self._blocks.free(own)
        self._blocks.unreference(sequence.cached)
        self._blocks.unreference(sequence.unsaved)
        sequence.pages, sequence.cached, sequence.unsaved = [], [], []

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for every token so far, preempting the newest; False if that was this one."""
        while (missing := self._num_pages(len(sequence.tokens)) - len(sequence.pages)) > 0:
            pages = self._blocks.allocate(missing)
            if pages is not None:
                sequence.pages += pages
                break
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._take_pages(victim)
        victim.num_computed = 0
        victim.phase = Phase.WAITING
        self._waiting.appendleft(victim)
        self._preemptions += 1

    def _cut(self, sequence: Sequence, start: int, limit: int) -> list[Span]:
        """Spans of at most `limit` tokens together, from token `start`."""
        spans: list[Span] = []
        total = len(sequence.tokens)
        stop = min(total, start + limit)
        while start < stop:
            end = self._grid_end(sequence, start) if self._deterministic else stop
            if end > stop and spans:
                break
            spans.append(self._span(sequence.tokens[start:end], start, sequence))
            start = end
        return spans

    def _grid_end(self, sequence: Sequence, start: int) -> int:
        if start >= sequence.num_prompt:
            return start + 1
        grid = self._shape.block_tokens
        return min((start // grid + 1) * grid, sequence.num_prompt)

    def _span(self, token_ids: Vector[int], start: int, sequence: Sequence) -> Span:
        is_last = start + len(token_ids) == len(sequence.tokens)
        return Span(token_ids, start, sequence.pages, sample=is_last)

    def _register(self, sequence: Sequence, *, is_computed: bool) -> None:
        """The sequence's next own block becomes a cached one."""
        assert sequence.keys is not None
        number, k = len(sequence.cached), self._shape.pages_per_block
        own = tuple(sequence.pages[number * k : (number + 1) * k])
        block = self._blocks.register(sequence.keys.identity(number), own)
        sequence.pages[number * k : (number + 1) * k] = block.pages
        sequence.cached.append(block)
        if is_computed and sequence.in_fabric and block.pages == own:
            self._blocks.reference([block])
            sequence.unsaved.append(block)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._shape.page_tokens)
