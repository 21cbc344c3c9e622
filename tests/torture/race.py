"""Engines that ask a node for what may just be withdrawn, while it is withdrawn, killed and handed over.

Every answer is judged by what an administrator had been told before the question was sent (`ledger`):

    must be refused   opened under an epoch that is over; a version that does not serve; keys of a namespace
                      that was invalidated
    must be served    nothing of it changed while the question was under way: the control
    raced             a change was: neither answer is wrong. What is served must have the right bytes

A question is one request: a match, an opened handle and a match, a confirmation of what was located long
before, or the commit of what was reserved long before.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvfabric.client import NodeClient
from kvfabric.errors import KVFabricError
from kvfabric.handle import FORMAT_VERSION, Handle, from_segments, mint
from kvfabric.hashing import ROOT_PARENT, block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol.messages import (
    Commit,
    Committed,
    Confirm,
    Confirmed,
    HandleOpened,
    Load,
    Located,
    Match,
    Matched,
    OpenHandle,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from kvfabric.registry.state import scopes_of
from kvfabric.testing.engine import BLOCK_TOKENS, TinyEngine, payload_of, tiny_hello, tokens_of
from kvfabric.types import (
    BlockKey,
    GrantState,
    Segment,
    TenantId,
    model_scope,
    tenant_scope,
)
from tests.torture.ledger import Epochs, Ledger, View
from tests.torture.tenants import pipelined

BLOCKS = 4
PROMPTS = 4
PART = 1024
HELLO = tiny_hello(part_bytes=PART, window_bytes=1 << 20)
MODEL = model_scope(HELLO.model_revision)
PATIENCE_S = 60.0
HELD = 48
"""Open requests that a reader keeps, many of them under epochs that are over. A node looks at all of them for
each receipt that is not final, which is for each change since the oldest of them was opened."""
MATCHES, HANDLES, FRESH, CONFIRMS, COMMITS = 128, 6, 3, 4, 3
"""Questions of a round."""
HANDLE_S = 3600
REFUSE, SERVE, RACED = "refuse", "serve", "raced"
_COLD = frozenset(
    {
        "absent",  # not stored yet in this namespace, or lost with a node
        "evicted",
        "pending",
        "deadline",  # handed over: leases did not go along
        "no_handle",
        "no_epoch_lease",
        "lease_budget",
        "no_parent",
        "tier_down",  # not there yet, after a start
        "no_space",
        "over_quota",
    }
)
"""Why something live may not be served for once."""

payload = functools.lru_cache(maxsize=8192)(payload_of)


@dataclass(slots=True)
class Tally:
    """What was asked and answered. `refused`: what had to be, by kind; `stale`: what was served of it."""

    refused: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    cold: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # what was stale
    raced: int = 0
    wrong: int = 0

    @property
    def num_refused(self) -> int:
        return self.refused.total()

    @property
    def num_checks(self) -> int:
        """Questions with one right answer."""
        return self.num_refused + self.served.total()

    @property
    def num_stale(self) -> int:
        return self.stale.total()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.refused + other.refused,
            self.stale + other.stale,
            self.served + other.served,
            self.cold + other.cold,
            self.missed + other.missed,
            self.seen + other.seen,
            self.raced + other.raced,
            self.wrong + other.wrong,
        )


@dataclass(slots=True)
class Question:
    """`epochs`: under which the request was opened and its keys were made. `answer` gives how much was served
    and, if not all was, why."""

    kind: str
    epochs: Epochs
    segment: Segment | None
    messages: list[Request]
    answer: Callable[[Sequence[Reply]], tuple[int, str]]
    wanted: int = BLOCKS


@dataclass(slots=True, eq=False)
class Held:
    """An open request. `located`: since when bytes of it may be read, if they may."""

    request: str
    keys: tuple[BlockKey, ...]
    epochs: Epochs
    segment: Segment | None
    located: Located | None = None


@dataclass(slots=True, eq=False)
class Written:
    """A reservation whose bytes are in the window, and which is to be committed some time."""

    reservation: int
    keys: tuple[BlockKey, ...]
    start: int
    held: Held


@dataclass(frozen=True, slots=True)
class Space:
    """A tenant's namespace, as a node gave it under these epochs of tenant and model."""

    key: bytes
    epochs: Epochs


class Reader:
    """An engine at one node, with as many requests as it likes. It comes back when its node does."""

    def __init__(
        self,
        socket: Path,
        keys: Path,
        ledger: Ledger,
        tenants: Sequence[str],
        seed: int,
        sources: tuple[str, ...] = (),
    ) -> None:
        """`sources`: nodes that may have what this one lacks."""
        self.tally = Tally()
        self._sources = sources
        self._socket = socket
        self._ledger = ledger
        self._tenants = tenants
        self._chance = random.Random(seed)
        self._handle_key = Keyring.open(keys).current_handle_key()
        self._numbers = itertools.count()
        self._client = NodeClient.connect(socket, HELLO, deadline_s=PATIENCE_S)
        self._held: deque[Held] = deque()
        self._handles: deque[tuple[str, str, Held]] = deque(maxlen=64)
        self._written: deque[Written] = deque()
        self._spaces: dict[str, Space] = {}
        self._stolen: deque[Held] = deque(maxlen=64)
        self._to_store: list[Held] = []
        self._dropped: list[str] = []

    def close(self) -> None:
        self._client.close()

    # ------------------------------------------------------------------ rounds

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            try:
                self._round()
            except (KVFabricError, OSError):
                self._come_back(until)

    def _round(self) -> None:
        view = self._ledger.view()
        questions = self._questions(view)
        messages = [message for question in questions for message in question.messages]
        if self._dropped:
            messages.append(Release(tuple(self._dropped)))
            self._dropped = []
        view = self._ledger.view()  # all of them are sent after this
        replies = iter(pipelined(self._client, messages))
        for question in questions:
            answers = list(itertools.islice(replies, len(question.messages)))
            self._judge(question, answers, view)
        for held in self._to_store[:4]:
            self._store(held)
        self._to_store.clear()

    def _judge(self, question: Question, replies: Sequence[Reply], view: View) -> None:
        tally, kind = self.tally, question.kind
        num_served, reason = question.answer(replies)
        match self._verdict(question, view):
            case "refuse":
                tally.refused[kind] += 1
                if num_served:
                    tally.stale[kind] += 1
                    tally.seen.append(f"{question.epochs} {question.segment} under {view}")
            case "serve" if num_served >= question.wanted:
                tally.served[kind] += 1
            case "serve" if reason in _COLD:
                tally.cold[reason] += 1
            case "serve":
                tally.missed.append(f"{kind}: {num_served} of {question.wanted}, {reason}")
            case _:
                tally.raced += 1

    def _verdict(self, question: Question, view: View) -> str:
        if any(view.epoch(scope) > epoch for scope, epoch in question.epochs):
            return REFUSE
        segment = question.segment
        if segment is not None and segment.incarnation in view.purged:
            return REFUSE
        if any(self._ledger.is_touched(scope, view) for scope, _ in question.epochs):
            return RACED
        if any(view.epoch(scope) < epoch for scope, epoch in question.epochs):
            return RACED  # opened while the change was under way
        if segment is not None and view.serving.get(segment.template) != segment:
            return REFUSE
        return SERVE

    def _come_back(self, until: Callable[[], bool]) -> None:
        """The node is gone: whoever comes next knows nothing of our requests."""
        for pool in (self._held, self._written, self._to_store, self._dropped):
            pool.clear()
        ends = time.monotonic() + PATIENCE_S
        while not until():
            try:
                client = NodeClient.connect(
                    self._socket, HELLO, deadline_s=PATIENCE_S, resume_from=self._client
                )
            except (KVFabricError, OSError):
                if time.monotonic() > ends:
                    raise
                time.sleep(0.01)
                continue
            self._client = client
            self._handles.clear()
            if client.arena.nbytes:
                return

    # ------------------------------------------------------------------ questions

    def _questions(self, view: View) -> list[Question]:
        found: list[Question] = []
        chance = self._chance
        for tenant in self._tenants:
            space = self._spaces.get(tenant)
            if space is None or any(view.epoch(scope) != epoch for scope, epoch in space.epochs):
                found.append(self._ask_space(tenant, view))
        if self._held:
            older = [*self._held][: HELD // 2]  # twice as often
            found += [self._ask_match(chance.choice(older)) for _ in range(MATCHES // 2)]
            found += [self._ask_match(chance.choice(self._held)) for _ in range(MATCHES // 2)]
        if self._handles:
            found += [self._ask_handle(*chance.choice(self._handles)) for _ in range(HANDLES)]
        for _ in range(FRESH):
            found += self._ask_fresh(view)
        if self._stolen:
            found += self._ask_stolen(view)
        located = [held for held in self._held if held.located is not None]
        if len(located) > HELD // 4:  # the oldest of them, to be late
            found += [self._ask_confirm(held) for held in located[:CONFIRMS]]
        if self._held:
            self._locate(chance.sample(self._held, min(CONFIRMS, len(self._held))))
            self._write(chance.sample(self._held, min(COMMITS, len(self._held))))
        while len(self._written) > 8 * COMMITS or (self._written and chance.random() < 0.3):
            at = chance.randrange(len(self._written))
            written = self._written[at]
            del self._written[at]
            found.append(self._ask_commit(written))
        return found

    def _ask_space(self, tenant: str, view: View) -> Question:
        """What the tenant's namespace is now. A new one: keys of the old one are dead."""
        held = self._new(tenant, None, view, ())
        before = self._spaces.get(tenant)

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            opened = replies[0]
            if not isinstance(opened, HandleOpened):
                return 0, "no_handle"
            scopes = (tenant_scope(tenant), MODEL)
            if not any(self._ledger.is_touched(scope, view) for scope in scopes):
                if before is not None and before.key != opened.namespace_key:
                    old = [
                        one
                        for one in self._held
                        if one.epochs[: len(before.epochs)] == before.epochs
                    ]
                    self._stolen.extend(old[:8])
                epochs = tuple((scope, view.epoch(scope)) for scope in scopes)
                self._spaces[tenant] = Space(opened.namespace_key, epochs)
            return BLOCKS, ""

        messages: list[Request] = [
            OpenHandle(held.request, self._mint(held)),
            Release((held.request,)),
        ]
        return Question("space", held.epochs, None, messages, answer)

    def _ask_match(self, held: Held) -> Question:
        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            matched = replies[0]
            assert isinstance(matched, Matched)
            if matched.reason == "deadline":
                self._drop(held)
            return matched.num_blocks, matched.reason

        message = Match(held.request, b"".join(held.keys))
        return Question("match", held.epochs, held.segment, [message], answer)

    def _ask_handle(self, request: str, handle: str, held: Held) -> Question:
        """A handle that some router minted some time ago."""
        number = f"{request}-{next(self._numbers)}"

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            self._dropped.append(number)
            matched = replies[1]
            assert isinstance(matched, Matched)
            return matched.num_blocks, matched.reason

        # Released with the next round: a match that asks other nodes may be answered after what comes next.
        messages: list[Request] = [
            OpenHandle(number, handle),
            Match(number, b"".join(held.keys)),
        ]
        return Question("handle", held.epochs, held.segment, messages, answer)

    def _ask_fresh(self, view: View) -> list[Question]:
        """Under the newest epochs, of a version that may serve or not. What is served is kept open."""
        segment = self._pick(view)
        tenant = self._chance.choice(self._tenants)
        space = self._spaces.get(tenant)
        if space is None or any(view.epoch(scope) != epoch for scope, epoch in space.epochs):
            return []
        prompt = f"prompt {self._chance.randrange(PROMPTS)}"
        held = self._new(tenant, segment, view, _keys_of(space.key, segment, prompt))
        held.epochs = (*space.epochs, *held.epochs)
        handle = self._mint(held)

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            matched = replies[1]
            assert isinstance(matched, Matched)
            if isinstance(replies[0], HandleOpened):
                self._handles.append((held.request, handle, held))
                self._keep(held)
                if matched.num_blocks < BLOCKS:
                    self._to_store.append(held)
            return matched.num_blocks, matched.reason

        messages: list[Request] = [
            OpenHandle(held.request, handle),
            Match(held.request, b"".join(held.keys)),
        ]
        return [Question("fresh", held.epochs, segment, messages, answer)]

    def _ask_stolen(self, view: View) -> list[Question]:
        """Keys of a namespace that was invalidated, under a handle of today."""
        old = self._chance.choice(self._stolen)
        tenant = next(scope for scope, _ in old.epochs).removeprefix("tenant:")
        held = self._new(tenant, None, view, old.keys)

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            self._dropped.append(held.request)
            matched = replies[1]
            assert isinstance(matched, Matched)
            return matched.num_blocks, matched.reason

        messages: list[Request] = [
            OpenHandle(held.request, self._mint(held)),
            Match(held.request, b"".join(held.keys)),
        ]
        return [Question("stolen", (*held.epochs, *old.epochs[:2]), None, messages, answer)]

    def _ask_confirm(self, held: Held) -> Question:
        """Copy what was located some time ago, then ask whether it may be used."""
        located = held.located
        assert located is not None
        held.located = None
        offsets: list[int] = np.frombuffer(located.offsets, "<u8").tolist()
        copies = [bytes(self._client.arena[at : at + PART]) for at in offsets]

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            confirmed = replies[0]
            assert isinstance(confirmed, Confirmed)
            used = zip(held.keys, copies[: confirmed.num_blocks], strict=False)
            self.tally.wrong += any(payload(key, PART) != data for key, data in used)
            return confirmed.num_blocks, confirmed.reason

        keys = b"".join(held.keys[: located.num_blocks])
        message = Confirm(held.request, keys, located.generations, 0, 0)
        return Question(
            "confirm", held.epochs, held.segment, [message], answer, wanted=located.num_blocks
        )

    def _ask_commit(self, written: Written) -> Question:
        """What was reserved and written some time ago."""
        held, count = written.held, len(written.keys)

        def answer(replies: Sequence[Reply]) -> tuple[int, str]:
            committed = replies[0]
            self._client.window.free(written.start)
            assert isinstance(committed, Committed)
            return sum(committed.states), committed.reason

        indexes = np.arange(count, dtype="<u4")
        offsets = np.arange(count, dtype="<u8") * PART + written.start
        message = Commit(written.reservation, indexes.tobytes(), offsets.astype("<u8").tobytes())
        return Question("commit", held.epochs, held.segment, [message], answer, wanted=count)

    # ------------------------------------------------------------------ what comes before a question

    def _locate(self, some: Sequence[Held]) -> None:
        messages: list[Request] = []
        for held in some:
            keys = b"".join(held.keys)
            messages += [Match(held.request, keys), Load(held.request, keys, 0, 0)]
        for held, located in zip(some, pipelined(self._client, messages)[1::2], strict=True):
            if isinstance(located, Located) and located.num_blocks == BLOCKS:
                held.located = located

    def _write(self, some: Sequence[Held]) -> None:
        """Reserve a new prompt under the terms of each of these requests, and write its bytes."""
        window = self._client.window
        keys = [BlockKey(self._chance.randbytes(32)) for _ in some]
        messages = [
            Reserve(held.request, ROOT_PARENT, key, 0, 0)
            for held, key in zip(some, keys, strict=True)
        ]
        for held, key, reserved in zip(some, keys, pipelined(self._client, messages), strict=True):
            assert isinstance(reserved, Reserved)
            if set(reserved.states) != {GrantState.GRANTED}:
                continue
            start = window.allocate(PART)
            assert start is not None, "a window holds more than is written at once"
            window.view(start, PART)[:] = payload_of(key, PART)
            self._written.append(Written(reserved.reservation, (key,), start, held))

    def _store(self, held: Held) -> None:
        engine = TinyEngine(self._client, HELLO)
        engine.store(held.request, held.keys)

    def _pick(self, view: View) -> Segment | None:
        chance = self._chance.random()
        if chance < 0.55 and view.serving:
            return self._chance.choice(list(view.serving.values()))
        if chance < 0.9 and view.retired:
            return self._chance.choice(view.retired)
        return None

    def _new(
        self, tenant: str, segment: Segment | None, view: View, keys: tuple[BlockKey, ...]
    ) -> Held:
        templates = [segment.template] if segment is not None else []
        scopes = scopes_of(TenantId(tenant), HELLO.model_revision, "", templates)
        epochs = tuple((scope, view.epoch(scope)) for scope in scopes)
        return Held(f"r{next(self._numbers)}", keys, epochs, segment)

    def _mint(self, held: Held) -> str:
        key_id, key = self._handle_key
        tenant = next(scope for scope, _ in held.epochs if scope.startswith("tenant:"))
        segments = (held.segment,) if held.segment is not None else ()
        scopes = dict(held.epochs)
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=tenant.removeprefix("tenant:"),
            model_revision=HELLO.model_revision,
            adapter="",
            adapter_revision="",
            layout_fingerprint=layout_fingerprint(HELLO.layout),
            segments=from_segments(segments),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=tuple(scopes.items()),
            audience=self._client.session,
            request_id=held.request,
            expires_at=int(time.time()) + HANDLE_S,
            sources=self._sources,
        )
        return mint(handle, key)

    def _keep(self, held: Held) -> None:
        self._held.append(held)
        if len(self._held) > HELD:
            at = self._chance.randrange(HELD // 2)
            gone = self._held[at]
            del self._held[at]
            self._dropped.append(gone.request)

    def _drop(self, held: Held) -> None:
        if held in self._held:
            self._held.remove(held)
            self._dropped.append(held.request)


@functools.lru_cache(maxsize=4096)
def _keys_of(key: bytes, segment: Segment | None, prompt: str) -> tuple[BlockKey, ...]:
    segments = (segment,) if segment is not None else ()
    return tuple(block_keys(tokens_of(prompt, BLOCKS), BLOCK_TOKENS, key, segments=segments))
