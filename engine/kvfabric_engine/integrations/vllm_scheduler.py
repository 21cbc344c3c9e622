"""The scheduler's half of the vLLM connector: which requests may use what, and the orders to the workers.

    new request --open, match (never waited for)--> matched --allocated--> loading --reported--> running

vLLM asks for a match again in every step until it can allocate, so each answer is a look at two futures. What
is claimed is leased at the node until every worker reported the load. When vLLM asks again after a load, the
load failed; the same answer would make it ask for ever, so the request is computed.

A request whose prompt another engine computes is matched again and again, until all is there, no more will
come or its time is up: vLLM has no blocks to load into before it is answered.

Every method is called on vLLM's scheduler thread and returns at once.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvfabric.handle import PARAMS_FIELD
from kvfabric.hashing import ROOT_PARENT
from kvfabric.types import MissReason, TierName
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.connector import Connector, Opened, PrefixMatch
from kvfabric_engine.integrations.vllm_identity import Groups
from kvfabric_engine.integrations.vllm_inputs import RequestInputs, salt_with
from kvfabric_engine.integrations.vllm_layout import NULL_BLOCK, SKIP
from kvfabric_engine.integrations.vllm_messages import (
    FabricMetadata,
    Join,
    LoadOrder,
    SaveOrder,
)
from kvfabric_engine.integrations.vllm_pool import PoolMirror
from kvfabric_engine.request_keys import RequestKeys

Answer = tuple[int | None, bool]
NOTHING: Answer = (0, False)
LATER: Answer = (None, False)
UNREACHED = (MissReason.NODE_DOWN, MissReason.DEADLINE)
"""Reasons of an open that say nothing about the handle."""


class _Phase(enum.Enum):
    NEW = enum.auto()
    OPENING = enum.auto()
    MATCHING = enum.auto()
    MATCHED = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()


@dataclass(slots=True)
class _Tracked:
    """One request. Counts of blocks are leading fabric blocks of its tokens."""

    request: Any
    handle: str
    inputs: RequestInputs
    may_load: bool
    phase: _Phase = _Phase.NEW
    name: str = ""
    num_names: int = 0
    opening: Future[Opened] | None = None
    matching: Future[PrefixMatch] | None = None
    keys: RequestKeys | None = None
    num_matched: int = 0
    tiers: tuple[TierName, ...] = ()
    num_saved: int = 0
    num_mirrored: int = 0
    num_local: int = 0  # tokens that vLLM found in HBM when it was last answered
    hands_over: bool = False  # another engine waits for its blocks
    wait_until: float = (
        0.0  # another engine computes it: worth waiting for until then (monotonic seconds)
    )
    num_seen: int = 0  # blocks of those that were there when last asked
    one_time_salt: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def next_name(self) -> str:
        """A name for the node that was not used before."""
        self.num_names += 1
        return f"{self.request.request_id}.{self.num_names}"


@dataclass(slots=True)
class _Orders:
    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)


class SchedulerSide:
    """Needs a started Connector of role SCHEDULER. `may_load` False: only store.

    `inputs_of`: what a request's KV depends on besides its tokens.
    """

    def __init__(
        self,
        connector: Connector,
        groups: Groups,
        mirror: PoolMirror,
        *,
        join: Join,
        may_load: bool,
        inputs_of: Callable[[Any], RequestInputs],
    ) -> None:
        self._connector = connector
        self._groups = groups
        self._mirror = mirror
        self._join = join
        self._may_load = may_load
        self._inputs_of = inputs_of
        self._boundary = Boundary()
        self._joined = b""
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[str, str] = {}  # request id -> name at the node
        self._orders = _Orders()
        self._pool: Any = None
        self._pool_map: object = None

    def __repr__(self) -> str:
        return f"<SchedulerSide {len(self._tracked)} requests, {len(self._loading)} loading>"

    def bind_pool(self, pool: Any) -> None:
        self._pool = pool
        self._pool_map = getattr(pool, "cached_block_hash_to_block", None)

    def new(self, request: Any) -> None:
        """Begin to open the request at the node."""
        self._mirror.busy()
        self._let_go()
        tracked = _Tracked(
            request,
            _handle_of(request),
            self._inputs_of(request),
            may_load=self._may_load and not request.skip_reading_prefix_cache,
        )
        self._tracked[request.request_id] = tracked
        self._open(tracked)

    def match(self, request: Any, num_computed: int) -> Answer:
        """How many tokens after `num_computed` can be loaded; LATER while the node has not answered."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return NOTHING
        if tracked.phase is _Phase.LOADING:  # the load failed: never again for this request
            tracked.may_load = False
            tracked.num_matched = tracked.num_saved = 0
            tracked.phase = _Phase.MATCHED
        elif tracked.phase is _Phase.RUNNING:  # preempted
            self._open(tracked)
        if tracked.phase is _Phase.OPENING and not self._opened(tracked):
            return LATER
        if tracked.phase is _Phase.MATCHING and not self._matched(tracked):
            return LATER
        return self._claim(tracked, num_computed)

    def allocated(self, request: Any, block_ids: Sequence[int], num_external: int) -> None:
        """vLLM gave the request its blocks; with `num_external` tokens it waits for our report."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.phase is not _Phase.MATCHED:
            return
        if num_external == 0:
            tracked.phase = _Phase.RUNNING
            self._done_loading(tracked)
            return
        tracked.phase = _Phase.LOADING
        self._loading[request.request_id] = tracked.name
        order = self._boundary.run(
            "allocate",
            lambda: self._load_order(tracked, block_ids),
            lambda _: self._lost_order(tracked, block_ids),
        )
        self._orders.loads.append(order)

    def tokens_on_ssd(self, request: Any, num_external: int) -> int:
        """How many of the tokens that the last answer claimed come from SSD; the rest from host memory."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0
        size = self._groups.block_tokens
        spans = [
            range(max(i * size, tracked.num_local), (i + 1) * size)
            for i, tier in enumerate(tracked.tiers)
            if tier is TierName.SSD
        ]
        return min(num_external, sum(len(span) for span in spans))

    def step(self, output: Any) -> FabricMetadata:
        """Orders for the step that `output` schedules. Loads are ordered whatever becomes of the rest."""
        self._boundary.run("plan", lambda: self._plan(output), lambda _: None)
        orders, self._orders = self._orders, _Orders()
        return FabricMetadata(self._new_join(), orders.loads, orders.saves, orders.reused)

    def _plan(self, output: Any) -> None:
        self._notice_reset()
        for new in output.scheduled_new_reqs:
            ids = new.block_ids[0][new.num_computed_tokens // self._groups.page_tokens :]
            self._reused(ids)
            self._scheduled(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            computed, fresh = cached.num_computed_tokens[i], cached.new_block_ids[i]
            if fresh:
                is_whole = request_id in cached.resumed_req_ids
                start = computed // self._groups.page_tokens if is_whole else 0
                self._reused(fresh[0][start:])
            self._scheduled(request_id, computed, output)
        self._let_go()

    def _let_go(self) -> None:
        if can_evict(self._pool):
            self._mirror.let_go(self._pool.evict_blocks)

    def _reused(self, pages: Sequence[int]) -> None:
        self._mirror.reused(pages)
        self._orders.reused += pages

    def loaded(self, request_ids: Sequence[str]) -> None:
        """Every worker reported these loads, failed or not."""
        for request_id in request_ids:
            name, tracked = self._loading.pop(request_id, None), self._tracked.get(request_id)
            if tracked is not None and tracked.name == name:
                self._done_loading(tracked)
            elif name is not None:
                self._connector.release(name)

    def _done_loading(self, tracked: _Tracked) -> None:
        """Nothing more is loaded. One that computes for another engine stays known as long as it does."""
        if not tracked.hands_over:
            self._connector.release(tracked.name)

    def finished(self, request: Any) -> None:
        """The request ended. Its load, if one is under way, keeps its lease until it is reported."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and request.request_id not in self._loading:
            self._connector.release(tracked.name)
        if not self._tracked:
            self._mirror.idle()

    def move_to(self, connector: Connector, mirror: PoolMirror, join: Join) -> None:
        """Another session: nothing that was opened in the old one counts any more."""
        self._connector, self._mirror, self._join = connector, mirror, join
        self._orders.saves.clear()
        for tracked in self._tracked.values():
            tracked.keys = None
            tracked.may_load = False
            if tracked.phase in (_Phase.OPENING, _Phase.MATCHING):
                tracked.phase = _Phase.MATCHED
            tracked.num_matched = 0

    # --- one request ---------------------------------------------------------------------------------

    def _open(self, tracked: _Tracked) -> None:
        if tracked.name:
            self._connector.release(tracked.name)
        tracked.name = tracked.next_name()
        tracked.num_mirrored = tracked.num_matched = 0
        salt = "" if tracked.handle else (tracked.request.cache_salt or "")
        tokens = list(tracked.request.all_token_ids)
        tracked.opening = self._connector.open(
            tracked.name, tracked.handle, salt, tokens, tracked.inputs
        )
        tracked.phase = _Phase.OPENING

    def _opened(self, tracked: _Tracked) -> bool:
        """Take the node's answer; False if it is not there, or if vLLM has to look in HBM anew."""
        assert tracked.opening is not None
        if not tracked.opening.done():
            return False
        opened, tracked.opening = tracked.opening.result(), None
        tracked.hands_over, tracked.num_seen = opened.hands_over, 0
        tracked.wait_until = time.monotonic() + opened.wait_s if opened.wait_s else 0.0
        was_identified = opened.in_fabric and self._identify(tracked)
        tracked.keys = opened.keys if opened.in_fabric and _is_known(tracked) else None
        if tracked.keys is None or tracked.keys.no_read or not tracked.may_load:
            tracked.phase = _Phase.MATCHED
        else:
            self._ask(tracked, tracked.keys)
        return not _rehash(tracked.request, _salt_for(tracked, opened), was_identified)

    def _identify(self, tracked: _Tracked) -> bool:
        """Only before vLLM ever scheduled the request: workers keep the names that they saw first."""
        is_new = tracked.num_names == 1
        return is_new and tracked.inputs.is_known and tracked.inputs.identify()

    def _ask(self, tracked: _Tracked, keys: RequestKeys) -> None:
        wanted = keys.first(tracked.request.num_tokens)
        if not wanted:
            tracked.phase = _Phase.MATCHED
            return
        if tracked.wait_until:
            tracked.matching = self._connector.follow(
                tracked.name,
                wanted,
                beyond=tracked.num_seen,
                wait_s=tracked.wait_until - time.monotonic(),
            )
        else:
            tracked.matching = self._connector.match(tracked.name, wanted)
        tracked.phase = _Phase.MATCHING

    def _matched(self, tracked: _Tracked) -> bool:
        assert tracked.matching is not None
        if not tracked.matching.done():
            return False
        match, tracked.matching = tracked.matching.result(), None
        is_late = tracked.wait_until > 0 and time.monotonic() >= tracked.wait_until
        if match.more and not is_late and tracked.keys is not None:
            tracked.num_seen = match.num_here
            self._ask(tracked, tracked.keys)
            return False
        # What is still on its way from a node that may hang is not waited for when it is late.
        tracked.num_matched = match.num_here if is_late else match.num_blocks
        tracked.tiers = match.tiers[: tracked.num_matched]
        tracked.num_saved = max(tracked.num_saved, match.num_blocks)
        tracked.phase = _Phase.MATCHED
        return True

    def _claim(self, tracked: _Tracked, num_computed: int) -> Answer:
        end = tracked.num_matched * self._groups.block_tokens
        tracked.num_local = num_computed
        if not tracked.may_load or end <= num_computed:
            return NOTHING
        return end - num_computed, True

    def _load_order(self, tracked: _Tracked, block_ids: Sequence[int]) -> LoadOrder:
        """Whole blocks; pages that vLLM has in HBM already are not written."""
        assert tracked.keys is not None
        k, local = self._groups.pages_per_block, tracked.num_local // self._groups.page_tokens
        first = tracked.num_local // self._groups.block_tokens
        self._reused(block_ids[local : tracked.num_matched * k])
        pages = [
            [block_ids[p] if p >= local else SKIP for p in range(i * k, i * k + k)]
            for i in range(first, tracked.num_matched)
        ]
        keys = tracked.keys.first(tracked.num_matched * self._groups.block_tokens)[first:]
        adapter = tracked.inputs.adapter
        return LoadOrder(tracked.request.request_id, tracked.name, keys, pages, adapter)

    def _lost_order(self, tracked: _Tracked, block_ids: Sequence[int]) -> LoadOrder:
        """A load of nothing: the worker reports every block of it as failed, and vLLM computes them."""
        pages = list(block_ids[tracked.num_local // self._groups.page_tokens :])
        return LoadOrder(tracked.request.request_id, tracked.name, [], [pages])

    def _scheduled(self, request_id: str, num_computed: int, output: Any) -> None:
        """This step computes some of the request's tokens: mirror and save the blocks that it completes."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        tracked.phase = _Phase.RUNNING
        keys, request = tracked.keys, tracked.request
        if keys is None or not tracked.inputs.is_trusted:
            return
        # The last sampled token is known before its KV is; drafts are computed before they are known.
        end = min(num_computed + output.num_scheduled_tokens[request_id], request.num_tokens)
        num_blocks = end // self._groups.block_tokens
        if num_blocks <= min(tracked.num_saved, tracked.num_mirrored):
            return
        keys.extend(request.all_token_ids)
        num_blocks = min(num_blocks, keys.num_blocks)
        table = output.kv_connector_block_state.get_block_ids(request_id)
        k = self._groups.pages_per_block
        pages = [list(table[0][i * k : i * k + k]) for i in range(num_blocks)]
        for i in range(tracked.num_mirrored, num_blocks):
            self._mirror.cached(keys.identity(i), pages[i])
        tracked.num_mirrored = max(tracked.num_mirrored, num_blocks)
        self._save(tracked, keys, pages)

    def _save(self, tracked: _Tracked, keys: RequestKeys, pages: list[list[int]]) -> None:
        first, end = tracked.num_saved, len(pages)
        if keys.no_store or end <= first or any(NULL_BLOCK in block for block in pages[first:]):
            return
        chain = keys.first(end * keys.block_tokens)
        parent = chain[first - 1] if first else ROOT_PARENT
        name = tracked.next_name()
        self._orders.saves.append(
            SaveOrder(
                name,
                tracked.handle,
                parent,
                chain[first:],
                pages[first:],
                tracked.inputs.adapter,
            )
        )
        tracked.num_saved = end

    # --- the session and the pool --------------------------------------------------------------------

    def _new_join(self) -> Join | None:
        session = self._connector.session
        if session == self._joined:
            return None
        self._joined = session
        return dataclasses.replace(self._join, session=session)

    def _notice_reset(self) -> None:
        """vLLM resets its prefix cache without a word to connectors: it makes a new map."""
        current = getattr(self._pool, "cached_block_hash_to_block", None)
        if current is not self._pool_map:
            self._pool_map = current
            self._mirror.reset()


def can_evict(pool: Any) -> bool:
    """Whether this vLLM lets a connector take single blocks out of its prefix cache."""
    return callable(getattr(pool, "evict_blocks", None))


def _handle_of(request: Any) -> str:
    """The router's handle. What a client may have put there instead is of any type."""
    params = request.kv_transfer_params
    handle = params.get(PARAMS_FIELD) if isinstance(params, dict) else None
    return handle if isinstance(handle, str) else ""


def _salt_for(tracked: _Tracked, opened: Opened) -> str | None:
    """The salt that the request must have in HBM; None to leave it as it is.

    With a handle it is that of the handle's namespace, whatever else came; an adapter in the fabric has one
    in any case. What the node refuses or may not cache in whole shares with nobody, nor does a handle
    without a salt while the node cannot be asked.
    """
    adapter = tracked.inputs.adapter if tracked.keys is not None else None
    if (
        tracked.handle
        and opened.in_fabric
        and opened.keys is not None
        and not opened.keys.is_limited
    ):
        return salt_with(opened.keys.salt, adapter)
    if not tracked.handle and opened.keys is not None:
        return salt_with(opened.keys.salt, adapter) if adapter is not None else None
    is_unreached = opened.reason in UNREACHED
    if is_unreached and (tracked.request.cache_salt or not tracked.handle):
        return None
    return tracked.one_time_salt


def _is_known(tracked: _Tracked) -> bool:
    """Whether the keys say all that the request's KV depends on, in vLLM's own cache too."""
    inputs = tracked.inputs
    return inputs.is_known and inputs.is_trusted and inputs.are_identified


def _rehash(request: Any, salt: str | None, was_identified: bool) -> bool:
    """Give the request a namespace of its own in HBM; True if that or its items' names changed anything."""
    if (salt is None or request.cache_salt == salt) and not was_identified:
        return False
    if salt is not None:
        request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
    return True
