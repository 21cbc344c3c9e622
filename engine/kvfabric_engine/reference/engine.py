"""The reference engine: model, pool, scheduler and connector under one step loop in its own thread.

Everything below `submit` and `abort` happens on that thread; other threads (HTTP, connector) only post
closures to its inbox. Life of a request: open (keys, from the node or local) -> wait -> admit (pages, HBM
hit) -> match and load from the fabric -> prefill, saving blocks as they complete -> decode -> finish.

The fabric is optional at every step: no node, a slow node or a lying one ends in computing the prompt.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeVar

import torch

from kvfabric.config import EngineConfig
from kvfabric.errors import CapacityError, ClosedError
from kvfabric.hashing import layout_fingerprint
from kvfabric.types import MissReason, TierName
from kvfabric_engine.connector import (
    Connector,
    ConnectorOptions,
    Loaded,
    Opened,
    Saved,
)
from kvfabric_engine.layout import PoolShape, default_block_tokens
from kvfabric_engine.plan import FetchPlan, Planner, PrefixMatch, Prompt, Rates, Record
from kvfabric_engine.pool_events import PoolEvents
from kvfabric_engine.reference import decode
from kvfabric_engine.reference.block_manager import BlockManager, CachedBlock, PoolStatistics
from kvfabric_engine.reference.following import Following
from kvfabric_engine.reference.measure import measure_rates
from kvfabric_engine.reference.model import NOTHING, Model
from kvfabric_engine.reference.sampler import Sampler
from kvfabric_engine.reference.scheduler import (
    PREFILL_TOKENS_A_STEP,
    PREFILL_TOKENS_ON_GPU,
    Scheduler,
    SchedulerStatistics,
    Work,
)
from kvfabric_engine.reference.scores import Scorer, Scores
from kvfabric_engine.reference.sequence import (
    Finish,
    GenerationRequest,
    Output,
    Phase,
    Reused,
    Sequence,
)
from kvfabric_engine.reference.tokens import tokenizer_of
from kvfabric_engine.request_keys import LocalNamespaces, RequestKeys
from kvfabric_engine.shared_pools import SharedPool, create_shared
from kvfabric_engine.staging import LayerArrival, mover_for, prove_layout

R = TypeVar("R")

SAVE_TOKENS = 512
"""A save is handed over when this many tokens of blocks are ready, and at the end of the prompt."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since start, and what is where now."""

    pool: PoolStatistics
    scheduler: SchedulerStatistics
    prompt_tokens: int
    computed_prompt_tokens: int
    answer_tokens: int
    reused: Reused


_NOT_HELD = (MissReason.NONE, MissReason.ABSENT, MissReason.EVICTED, MissReason.OVER_QUOTA)
"""What a node says of blocks that it does not hold and may be given again."""


class Engine:
    """`with Engine(config) as engine:` serves between enter and exit. Weights are made in the constructor."""

    def __init__(self, config: EngineConfig, model: Model | None = None) -> None:
        """`model`: one that was made for `config`, instead of making it."""
        torch.set_num_threads(config.num_threads)
        self.config = config
        self.model = model or Model(config)
        self.tokenizer = tokenizer_of(config, self.model.shape.vocab_size)
        self.shape = PoolShape(
            num_pages=config.hbm_blocks,
            num_layers=self.model.shape.num_layers,
            page_tokens=config.engine_block_tokens,
            num_kv_heads=self.model.shape.num_kv_heads,
            head_dim=self.model.shape.head_dim,
            dtype=self.model.dtype,
            block_tokens=config.block_tokens or default_block_tokens(config.engine_block_tokens),
        )
        self.is_deterministic = config.deterministic == "on" or (
            config.deterministic == "auto" and config.device == "cpu"
        )
        self.layout = self.shape.block_layout(rope=self.model.rope, packing=self._packing())
        self.pool, shared = self._create_pool()
        self.connector: Connector | None = None
        self._following: Following | None = None
        self._mover = mover_for(self.pool, self.shape, shared)
        self._events = PoolEvents()
        self._events.strike = self._strike
        self._blocks = BlockManager(self.shape.num_pages, self.shape.pages_per_block, self._events)
        self._scheduler = Scheduler(
            self._blocks,
            self.shape,
            max_batch=config.max_batch,
            deterministic=self.is_deterministic,
            prefill_tokens=self._prefill_tokens(),
        )
        # The CPU engine is for tests and the demo, in which fetching is the point: it never cuts a hit.
        self._decides = self.model.device.type == "cuda" and not self.is_deterministic
        self._planner = Planner(Rates(), may_cut=self._decides)
        self._scorer = Scorer(self.model.device)
        self._graphs: decode.DecodeGraphs | None = None
        self._local = LocalNamespaces(self.model.revision, layout_fingerprint(self.layout))
        self._sequences: dict[str, Sequence] = {}
        self._strikes: list[Future[None]] = []
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvf-engine", daemon=True)
        self._is_stopping = False
        self._num_prompt = self._num_computed_prompt = self._num_answered = 0
        self._reused = Reused()

    def _create_pool(self) -> tuple[torch.Tensor, SharedPool | None]:
        if self.model.device.type == "cuda":
            return create_shared(self.shape, self.model.device)
        return self.shape.create(self.model.device), None  # others are as fast by the arena

    def _packing(self) -> str:
        # KV computed with another instruction set differs in the last bits, so it is another layout.
        if self.config.device == "cpu":
            return f"page-major torch-cpu-{torch.backends.cpu.get_cpu_capability()}"
        return "page-major"

    def _prefill_tokens(self) -> int:
        if self.model.device.type == "cuda" and not self.is_deterministic:
            return PREFILL_TOKENS_ON_GPU
        return PREFILL_TOKENS_A_STEP

    def __repr__(self) -> str:
        return f"<Engine {self.config.model_name}: {self._scheduler!r} {self._blocks!r}>"

    def __enter__(self) -> Self:
        self.start(endpoint="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, *, endpoint: str) -> None:
        """Prove the layout, connect to the node (if one is configured) and begin to serve.

        `endpoint` is the base URL of the API, for the node to announce.
        """
        prove_layout(self.pool, self.shape, self._mover)
        if self._decides and decode.supports(self.model):
            self._graphs = decode.DecodeGraphs(
                self.model, self.pool, max_batch=self.config.max_batch
            )
        if self._decides:
            rates = measure_rates(self.model, self.pool, self.shape, self._mover)
            self._planner = Planner(rates, may_cut=True)
        if self.config.node_socket:
            self.connector = Connector(
                ConnectorOptions(
                    node_socket=self.config.node_socket,
                    engine_id=self.config.engine_id or endpoint,
                    endpoint=endpoint,
                    model=self.config.model_name,
                    model_revision=self.model.revision,
                    window_bytes=self.config.window_bytes,
                    audit_parts=self.config.audit_parts,
                    recompute=self._planner.rates.recompute_cost(),
                    serves=self.config.role,
                ),
                layout=self.layout,
                mover=self._mover,
                events=self._events,
            )
            self._following = Following(
                self.connector, self.shape, when_done=self._when_done, start=self._start
            )
            self.connector.start()
        self._thread.start()

    def stop(self) -> None:
        """End every running request with ABORT, then the thread, then the connection. Idempotent."""
        if self._thread.is_alive():
            self._post(self._begin_stop)
            self._thread.join()
        if self.connector is not None:
            self.connector.close()
        if self._mover.shared is not None:
            self._mover.shared.memory.close()

    def _strike(self, names: tuple[bytes, ...]) -> Future[None]:
        """Any thread: the pool lets go of these; done when nobody uses one any more."""
        gone: Future[None] = Future()

        def strike() -> None:
            self._blocks.strike(names)
            self._strikes.append(gone)

        self._post(strike)
        return gone

    def _settle_strikes(self) -> None:
        if self._strikes and not self._blocks.holds_struck:
            for gone in self._strikes:
                gone.set_result(None)
            self._strikes.clear()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive()

    def check_size(self, num_prompt: int, max_tokens: int) -> None:
        """Raises CapacityError if such a request can never run here."""
        total = num_prompt + max_tokens
        if total > self.config.max_model_tokens:
            raise CapacityError(
                f"prompt of {num_prompt} tokens and {max_tokens} to come are more than this model's "
                f"{self.config.max_model_tokens}"
            )
        if total > self.shape.num_pages * self.shape.page_tokens:
            raise CapacityError(f"{total} tokens do not fit the KV pool")

    def submit(self, request: GenerationRequest, emit: Callable[[Output], None]) -> str:
        """Begin a request from any thread; returns the name to `abort` it by.

        `emit` is called on the engine's thread for each token and once with a finish reason. It must not
        block. Raises CapacityError (see `check_size`) and ClosedError.
        """
        self.check_size(len(request.prompt), request.params.max_tokens)
        if not self._thread.is_alive():
            raise ClosedError("the engine is not running")
        name = f"{request.request_id}/{next(self._numbers)}"
        sampler = Sampler(request.params)
        sequence = Sequence(name, request, emit, sampler, list(request.prompt))
        self._post(partial(self._open, sequence))
        return name

    def abort(self, name: str) -> None:
        """End a request early; its last output says ABORT. Nothing happens if it ended already."""
        self._post(partial(self._abort, name))

    def clear_prefix_cache(self) -> None:
        """Forget every cached block that nobody uses now."""
        self._post(self._blocks.clear)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            pool=self._blocks.statistics(),
            scheduler=self._scheduler.statistics(),
            prompt_tokens=self._num_prompt,
            computed_prompt_tokens=self._num_computed_prompt,
            answer_tokens=self._num_answered,
            reused=self._reused,
        )

    def fetch_records(self) -> list[Record]:
        """The last choices between fetching and recomputing, and what came of them."""
        return list(self._planner.records)

    def fetch_rates(self) -> Rates:
        """What loading and computing take here, as known now."""
        return self._planner.rates

    # --- everything below runs on the engine's thread ------------------------------------------------

    def _post(self, action: Callable[[], object]) -> None:
        self._inbox.put(action)

    def _run(self) -> None:
        try:
            is_idle = True
            while not self._is_stopping:
                self._drain(wait=is_idle)
                self._settle_strikes()
                for sequence in self._scheduler.admit():
                    self._fetch(sequence)
                work = self._scheduler.plan()
                is_idle = not work
                self._step(work)
                for sequence in {item.sequence for item in work if item.sequence.hands_over}:
                    self._hand_over_unsaved(sequence)
        finally:
            last = Finish.ABORT if self._is_stopping else Finish.ERROR
            for sequence in list(self._sequences.values()):
                self._end(sequence, last)

    def _drain(self, *, wait: bool) -> None:
        """Run what was posted; `wait` for the first of it."""
        if wait:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _begin_stop(self) -> None:
        self._is_stopping = True

    def _when_done(self, future: Future[R], then: Callable[[R], None]) -> None:
        future.add_done_callback(lambda done: self._post(lambda: then(done.result())))

    def _open(self, sequence: Sequence) -> None:
        self._sequences[sequence.name] = sequence
        self._num_prompt += sequence.num_prompt
        request = sequence.request
        if request.handle is None:
            self._scheduler.add(sequence)
        elif self.connector is None:
            sequence.keys = RequestKeys(self._local.open(request.salt), self.shape.block_tokens)
            sequence.keys.extend(request.prompt)
            self._scheduler.add(sequence)
        else:
            opened = self.connector.open(
                request.request_id, request.handle, request.salt, request.prompt
            )
            self._when_done(opened, partial(self._opened, sequence))

    def _opened(self, sequence: Sequence, opened: Opened) -> None:
        if sequence.phase is Phase.OPENING:
            sequence.keys, sequence.in_fabric = opened.keys, opened.in_fabric
            sequence.reused = Reused(miss=opened.reason)
            sequence.hands_over = opened.hands_over
            if opened.wait_s and self._following is not None:
                self._following.opened(sequence, opened.wait_s)
            self._scheduler.add(sequence)

    def _abort(self, name: str) -> None:
        sequence = self._sequences.get(name)
        if sequence is None:
            return
        if sequence.phase is Phase.FETCHING:
            sequence.is_aborted = True  # its pages may be written until the load ends
        else:
            self._end(sequence, Finish.ABORT)

    def _fetch(self, sequence: Sequence) -> None:
        """Admitted: ask the fabric what it has beyond the HBM hit, or start at once."""
        keys = sequence.usable_keys()
        if self.connector is None or not sequence.in_fabric or not keys:
            self._start(sequence, 0)
            return
        if sequence.wait_until and self._following is not None:
            self._following.begin(sequence)
            return
        matched = self.connector.match(sequence.request_id, keys)
        if len(sequence.cached) < len(keys):
            self._when_done(matched, partial(self._matched, sequence))
            return
        # Nothing to fetch, so nothing to wait for; but perhaps something to save again.
        held = list(sequence.cached)
        self._blocks.reference(held)
        sequence.is_matching = True
        self._when_done(matched, partial(self._matched_late, sequence, held))
        self._start(sequence, 0)

    def _matched_late(
        self, sequence: Sequence, held: list[CachedBlock], match: PrefixMatch
    ) -> None:
        missing = self._missing(sequence, held, match)
        self._blocks.unreference(held[: len(held) - len(missing)])
        self._hand_over(sequence, missing)
        sequence.is_matching = False
        if sequence.phase is Phase.FINISHED:
            self._leave_fabric(sequence)

    def _matched(self, sequence: Sequence, match: PrefixMatch) -> None:
        if sequence.phase is not Phase.FETCHING:
            return  # the engine stopped
        assert self.connector is not None
        sequence.unsaved = self._missing(sequence, sequence.cached, match)
        self._blocks.reference(sequence.unsaved)
        keys = sequence.usable_keys()
        sequence.choice = self._planner.choose(
            match,
            Prompt(
                num_tokens=sequence.num_prompt,
                num_cached=len(sequence.cached),
                num_usable=len(keys),
                block_tokens=self.shape.block_tokens,
                block_bytes=self.shape.part_bytes,
            ),
        )
        sequence.offered = max(0, min(match.num_blocks, len(keys)) - len(sequence.cached))
        sequence.chosen_at = time.monotonic()
        plan = sequence.choice.plan
        is_cut = plan.num_blocks < sequence.offered
        if is_cut:
            self.connector.count(MissReason.TOO_SLOW)
        if not sequence.was_started:
            miss = MissReason.TOO_SLOW if is_cut else match.reason
            sequence.reused = replace(sequence.reused, miss=miss)
        if plan.num_blocks == 0 or sequence.is_aborted:
            self._start(sequence, 0)
            return
        k = self.shape.pages_per_block
        blocks = range(plan.first, plan.first + plan.num_blocks)
        in_host = all(match.tiers[block] is TierName.HOST for block in blocks)
        computes_behind = in_host and self._is_free(sequence)
        loaded = self.connector.load(
            sequence.request_id,
            [keys[block] for block in blocks],
            [tuple(sequence.pages[block * k : (block + 1) * k]) for block in blocks],
            in_place=True,  # what does not come is computed, over whatever lies there
            begun=partial(self._begun, sequence, plan) if computes_behind else None,
        )
        self._when_done(loaded, partial(self._loaded, sequence, match, plan))

    def _is_free(self, sequence: Sequence) -> bool:
        """Whether computing behind its load would keep nobody else waiting."""
        return not sequence.is_aborted and self._scheduler.is_alone(sequence)

    def _begun(self, sequence: Sequence, plan: FetchPlan, arrival: LayerArrival) -> None:
        """Called on the load's thread: its layers are on their way, one after the other."""
        self._post(lambda: self._compute_behind(sequence, plan, arrival))

    def _compute_behind(self, sequence: Sequence, plan: FetchPlan, arrival: LayerArrival) -> None:
        """Compute the rest of the prompt behind the load, layer by layer; `_loaded` says if it counts."""
        if sequence.phase is not Phase.FETCHING or not self._is_free(sequence):
            return
        before = arrival.before
        for work in self._scheduler.ahead(sequence, plan.first + plan.num_blocks):
            logits = self.model.forward(self.pool, [work.span], before)
            sequence.ahead.append((work.span, self._scorer.of(logits)))
            before = NOTHING

    def _loaded(
        self, sequence: Sequence, match: PrefixMatch, plan: FetchPlan, loaded: Loaded
    ) -> None:
        if sequence.phase is not Phase.FETCHING:
            return  # the engine stopped
        tiers = match.tiers[plan.first : plan.first + loaded.num_blocks]
        self._planner.loaded(tiers, self.shape.part_bytes, loaded.seconds)
        size = self.shape.block_tokens
        if not sequence.was_started:  # else preempted since: what its first start said stands
            sequence.reused = Reused(
                hbm=sequence.reused.hbm,
                host=size * tiers.count(TierName.HOST),
                ssd=size * tiers.count(TierName.SSD),
                peer=size * tiers.count(TierName.PEER),
                miss=sequence.reused.miss
                if loaded.num_blocks == plan.num_blocks
                else loaded.reason,
            )
        ahead, sequence.ahead = sequence.ahead, []
        counts = loaded.num_blocks == plan.num_blocks and not sequence.is_aborted
        self._start(sequence, loaded.num_blocks)
        if ahead and counts:
            sequence.is_alone = False  # its time to the first token says nothing of a prefill's
            for span, scores in ahead:
                self._advance(Work(sequence, span), scores, 0)

    def _start(self, sequence: Sequence, num_fetched_blocks: int) -> None:
        if sequence.is_aborted:
            self._end(sequence, Finish.ABORT)
            return
        self._scheduler.start(sequence, num_fetched_blocks)
        sequence.started_at = time.monotonic()
        sequence.started_tokens = sequence.num_computed
        sequence.is_alone = self._scheduler.statistics().num_running == 1
        if not sequence.was_started:
            sequence.was_started = True
            r, total = sequence.reused, self._reused
            self._reused = Reused(
                total.hbm + r.hbm, total.host + r.host, total.ssd + r.ssd, total.peer + r.peer
            )

    def _missing(
        self, sequence: Sequence, cached: list[CachedBlock], match: PrefixMatch
    ) -> list[CachedBlock]:
        """Of the leading blocks `cached` here those that the node does not hold: it restarted, or
        evicted them. None if it does not say so."""
        is_told = match.reason in _NOT_HELD
        may_store = sequence.keys is not None and not sequence.keys.no_store
        return cached[match.num_blocks :] if is_told and may_store else []

    def _step(self, work: list[Work]) -> None:
        if self.is_deterministic:
            for item in work:
                logits = self.model.forward(self.pool, [item.span])
                self._advance(item, self._scorer.of(logits), 0)
        elif work:
            spans, row = [item.span for item in work], 0
            if self._graphs is not None and self._graphs.takes(spans):
                scores = self._graphs.step(spans)
            else:
                scores = self._scorer.of(self.model.forward(self.pool, spans))
            for item in work:
                self._advance(item, scores, row)
                row += item.span.sample

    def _advance(self, item: Work, scores: Scores, row: int) -> None:
        """The span was computed; `row` of `scores` is what it asked for, if it did."""
        sequence = item.sequence
        in_prompt = min(item.span.end, sequence.num_prompt) - item.span.start
        self._num_computed_prompt += max(0, in_prompt)
        self._scheduler.computed(item)
        is_ready = len(sequence.unsaved) * self.shape.block_tokens >= SAVE_TOKENS
        if is_ready or not sequence.is_prefilling:
            self._hand_over_unsaved(sequence)
        if self.is_deterministic and sequence.in_fabric and not sequence.is_prefilling:
            self._leave_fabric(sequence)  # answered tokens are not cached in this mode
        if not item.span.sample:
            return
        token_id = scores.pick(row, sequence.sampler)
        sequence.tokens.append(token_id)
        self._num_answered += 1
        if sequence.num_answered == 1:
            self._learn(sequence)
        finish = self._finish_of(sequence, token_id)
        sequence.emit(Output(token_id, finish, sequence.reused))
        if finish is not None:
            self._forget(sequence)

    def _learn(self, sequence: Sequence) -> None:
        """The first token: what the prefill took, and what came of the choice before it."""
        now = time.monotonic()
        if sequence.is_alone and self._scheduler.statistics().num_running == 1:
            took = now - sequence.started_at
            self._planner.computed(sequence.started_tokens, sequence.num_prompt, took)
        if sequence.choice is not None and sequence.offered:
            self._planner.record(
                sequence.choice,
                offered_blocks=sequence.offered,
                loaded_blocks=sequence.started_tokens // self.shape.block_tokens
                - sequence.choice.plan.first,
                outcome_s=now - sequence.chosen_at,
            )

    def _finish_of(self, sequence: Sequence, token_id: int) -> Finish | None:
        params = sequence.request.params
        if token_id in self.tokenizer.end_ids and not params.ignore_eos:
            return Finish.STOP
        return Finish.LENGTH if sequence.num_answered >= params.max_tokens else None

    def _hand_over_unsaved(self, sequence: Sequence) -> None:
        unsaved, sequence.unsaved = sequence.unsaved, []
        self._hand_over(sequence, unsaved)

    def _hand_over(self, sequence: Sequence, blocks: list[CachedBlock]) -> None:
        """Save `blocks`, each referenced for it, run by run: a reservation is of consecutive ones."""
        rest = deque(blocks)
        while rest:
            run = [rest.popleft()]
            while rest and rest[0].identity.parent == run[-1].key:
                run.append(rest.popleft())
            assert self.connector is not None
            saved = self.connector.save(
                sequence.request_id,
                run[0].identity.parent,
                [block.key for block in run],
                [block.pages for block in run],
                self._mover.fence(),
            )
            self._when_done(saved, partial(self._saved, run))

    def _saved(self, run: list[CachedBlock], _: Saved) -> None:
        self._blocks.unreference(run)

    def _leave_fabric(self, sequence: Sequence) -> None:
        """Nothing more will be loaded or saved for this request, but what is being asked for still."""
        if self.connector is not None and not sequence.is_matching:
            self.connector.release(sequence.request_id)
            sequence.in_fabric = False

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._forget(sequence)
        sequence.emit(Output(None, finish, sequence.reused))

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.name]
        self._scheduler.remove(sequence)
        self._leave_fabric(sequence)
