"""One request inside the engine: its tokens, its pages, how far it is. State only; `scheduler` moves it.

OPENING -> WAITING -> FETCHING -> RUNNING -> FINISHED
              ^  \\________________^  |
              +------ preempted -----+
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from kvfabric.types import BlockKey, MissReason
from kvfabric_engine.plan import Choice
from kvfabric_engine.reference.block_manager import CachedBlock
from kvfabric_engine.reference.model import Span
from kvfabric_engine.reference.sampler import Sampler, SamplingParams
from kvfabric_engine.reference.scores import Scores
from kvfabric_engine.request_keys import RequestKeys


class Phase(enum.Enum):
    OPENING = "opening"  # its keys are being made
    WAITING = "waiting"  # for pages and a place in the batch
    FETCHING = "fetching"  # holds its pages; the fabric is asked or loads into them
    RUNNING = "running"
    FINISHED = "finished"


class Finish(enum.StrEnum):
    """Why an answer ended, as the OpenAI API says it (`abort` and `error` are ours)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Reused:
    """Prompt tokens that were not computed, by where their KV came from.

    `miss`: why the first block that could have come from the fabric did not.
    """

    hbm: int = 0
    host: int = 0
    ssd: int = 0
    peer: int = 0
    miss: MissReason = MissReason.NONE

    @property
    def total(self) -> int:
        return self.hbm + self.host + self.ssd + self.peer


@dataclass(frozen=True, slots=True)
class Output:
    """One step of an answer: at most one new token, and how it ended if it did."""

    token_id: int | None
    finish: Finish | None
    reused: Reused


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`handle` and `salt` are what the router put into the request; empty if it did not.

    `handle` None: whatever the node would allow, reuse and store nothing.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    handle: str | None = ""
    salt: str = ""


@dataclass(eq=False, slots=True)
class Sequence:
    """`emit` is called on the engine's thread, once a token and once at the end."""

    name: str
    request: GenerationRequest
    emit: Callable[[Output], None]
    sampler: Sampler
    tokens: list[int]
    phase: Phase = Phase.OPENING
    keys: RequestKeys | None = None
    """None until opened, and for requests that may reuse and store nothing."""

    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    cached: list[CachedBlock] = field(default_factory=list)
    """The blocks that the sequence's first pages are cached as; the rest of its pages are its own."""

    unsaved: list[CachedBlock] = field(default_factory=list)
    """Registered here since the last save, referenced once more for it."""

    reused: Reused = field(default_factory=Reused)
    was_started: bool = False
    in_fabric: bool = False
    """The node knows this request: blocks may be matched, loaded and saved."""

    hands_over: bool = False
    """Another engine waits for its blocks."""

    wait_until: float = 0.0
    """Another engine computes its prompt, worth waiting for until then (monotonic seconds); 0: none does."""

    choice: Choice | None = None
    """Fetch or recompute, once the fabric answered; `offered` blocks were to be had, at `chosen_at`."""

    offered: int = 0
    chosen_at: float = 0.0  # monotonic seconds, as the next
    started_at: float = 0.0
    started_tokens: int = 0
    """Computed or loaded when it last began to run."""

    is_alone: bool = False
    """Nothing else ran when it last began to."""

    is_matching: bool = False
    """The node was asked what it holds of the prompt, and has not answered yet."""

    ahead: list[tuple[Span, Scores]] = field(default_factory=list)
    """Computed behind a load that is not verified yet, with its scores; counts if all of the load does."""

    is_aborted: bool = False
    """To be ended when nothing loads into its pages any more."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prompt

    def usable_keys(self) -> list[BlockKey]:
        """Keys that a lookup may use: never the block of the last token, whose logits are needed."""
        if self.keys is None or self.keys.no_read:
            return []
        return self.keys.first(self.num_prompt - 1)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request_id} {self.phase.value}: "
            f"{self.num_computed}/{len(self.tokens)} tokens, {len(self.pages)} pages>"
        )
