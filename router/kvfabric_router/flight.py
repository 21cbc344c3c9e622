"""`Flight`: one request at one engine, from before it is sent until its `with` block ends. Sync state.

What an engine is doing is the set of its flights. A flight ends with its block, so a client that goes away,
a cancelled task and a failed engine all leave the account right. On its way it says what was seen:

    enter                 the request's blocks are expected at the engine
    stream_event          the first one: its prefill is over; how long that took
    answered              what the engine says it reused: the time teaches the rates, the tokens whether the
                          index can be believed
    exit                  without an answer: its blocks are not there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from kvfabric.types import BlockKey
from kvfabric_router.predicted import SILENT_S, TOLD_S, Expected, Predicted
from kvfabric_router.rates import RateLearner, Work

_LEAST_TOKENS = 16  # fewer computed tokens than this say more of overhead than of the rate
_JUDGED = 16  # requests that are looked at together
_SHORT_SHARE = 0.5


@dataclass(slots=True)
class Trust:
    """Whether an engine reuses what the index promises of it."""

    num_requests: int = 0
    predicted_tokens: int = 0
    missing_tokens: int = 0

    def saw(self, predicted: int, actual: int) -> bool:
        """Take one answer in. Returns whether the index is wrong about this engine again and again."""
        if not predicted:
            return False
        self.num_requests += 1
        self.predicted_tokens += predicted
        self.missing_tokens += max(predicted - actual, 0)
        if self.num_requests < _JUDGED:
            return False
        is_wrong = self.missing_tokens > _SHORT_SHARE * self.predicted_tokens
        self.num_requests = self.predicted_tokens = self.missing_tokens = 0
        return is_wrong


@dataclass(slots=True, eq=False)
class Activity:
    """What an engine is doing for this router, and what that taught.

    `clock`: monotonic seconds. `room`: called when the engine may have room for another request.
    """

    endpoint: str
    predicted: Predicted
    clock: Callable[[], float]
    room: Callable[[], None] = lambda: None
    learner: RateLearner = field(default_factory=RateLearner)
    trust: Trust = field(default_factory=Trust)
    flights: dict[int, Flight] = field(default_factory=dict)
    last_first_byte: float = 0.0

    def waiting(self) -> list[Flight]:
        """Flights whose prompts are not computed yet, in the order they were sent."""
        now = self.clock()
        return [flight for flight in self.flights.values() if flight.is_waiting(now)]

    def waiting_ms(self, waiting: Sequence[Flight]) -> float:
        """Predicted work of `waiting()` that a newcomer waits for."""
        if not waiting:
            return 0.0
        now = self.clock()
        # First come, first served: the engine has been at the oldest since it got it, or since it
        # finished the one before.
        head = waiting[0]
        done = min((now - max(head.sent_at, self.last_first_byte)) * 1e3, head.work_ms)
        return max(sum(flight.work_ms for flight in waiting) - max(done, 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Sent:
    """What is known of a request when it is sent. `work_ms`: predicted until its first token, once it is
    its turn; `is_streamed`: that token will be seen; `is_exact`: nodes tell of `keys`; `is_handed`: another
    engine computes the prompt, so what this one takes until then says nothing of it.
    """

    work: Work
    work_ms: float
    keys: Sequence[BlockKey] = ()
    is_streamed: bool = True
    is_exact: bool = True
    is_handed: bool = False


class Flight:
    """See the module. `is_told`: a node tells what the engine has; `wrong`: called when that was not so,
    again and again.
    """

    def __init__(
        self, activity: Activity, sent: Sent, *, is_told: bool, wrong: Callable[[], None]
    ) -> None:
        self._activity = activity
        self._predicted = activity.predicted
        self._clock = activity.clock
        self._told_s = TOLD_S if is_told else SILENT_S
        self._wrong = wrong
        self._sent = sent
        self._expected: Expected | None = None
        self.work_ms = sent.work_ms
        self.sent_at = activity.clock()
        self.first_byte_at: float | None = None
        self._prefilled_at = 0.0
        self._prefill_ms = 0.0
        self._was_idle = True
        self._num_decoding = 0
        self._is_answered = False
        self._lost = False
        self._on_lost: Callable[[], None] = lambda: None
        self._last_event_at = 0.0

    def is_waiting(self, now: float) -> bool:
        """Whether its prompt is still to be computed. Of an answer in one piece that can only be guessed."""
        if self.first_byte_at is not None or self._sent.is_handed:
            return False
        return self._sent.is_streamed or now < self._prefilled_at

    def __enter__(self) -> Self:
        self.sent_at = self._clock()
        before_ms = self._activity.waiting_ms(self._activity.waiting())
        self._prefilled_at = self.sent_at + (before_ms + self.work_ms) / 1e3
        self._activity.flights[id(self)] = self
        self._expected = self._predicted.expect(self._activity.endpoint, self._sent.keys)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._activity.flights.pop(id(self), None)
        if self.first_byte_at is not None:
            if not self._is_answered:
                self._teach(self._sent.work)
        else:
            self._end_without_first_byte()
        self._activity.room()

    def _end_without_first_byte(self) -> None:
        # Not streamed, or failed: the engine is done with it all the same.
        assert self._expected is not None
        if self._is_answered:
            self._activity.last_first_byte = max(
                self._activity.last_first_byte, min(self._prefilled_at, self._clock())
            )
            self._predicted.done(self._expected, for_s=self._told_s)
        else:
            self._activity.last_first_byte = self._clock()
            self._predicted.failed(self._expected)

    def when_lost(self, call: Callable[[], None]) -> bool:
        """`call` it once the engine is given up. Returns whether it is already; then nothing is called."""
        self._on_lost = call
        return self._lost

    def give_up(self) -> None:
        """The engine stopped answering probes: nobody need wait for it."""
        if not self._lost:
            self._lost = True
            self._on_lost()

    def stream_event(self) -> None:
        """A piece of a streamed answer arrived."""
        now = self._clock()
        self._last_event_at = now
        if self.first_byte_at is not None:
            return
        began = max(self.sent_at, self._activity.last_first_byte)
        self._was_idle = began == self.sent_at
        self._prefill_ms = (now - began) * 1e3
        self.first_byte_at = self._activity.last_first_byte = now
        self._num_decoding = len(self._activity.flights) - len(self._activity.waiting()) - 1
        assert self._expected is not None
        self._predicted.done(self._expected, for_s=self._told_s)
        self._activity.room()

    def answered(self, actual: Work | None, *, completion_tokens: int) -> None:
        """The answer is whole; `actual` is what the engine says of its prompt, None if it says nothing."""
        self._is_answered = True
        if self.first_byte_at is not None:
            self._teach(self._seen(actual))
            took_ms = (self._last_event_at - self.first_byte_at) * 1e3
            self._activity.learner.saw_answer(completion_tokens - 1, took_ms)
        if actual is not None and not self._sent.is_handed:
            promised, found = self._sent.work, actual.hbm + actual.host + actual.ssd
            if self._activity.trust.saw(promised.hbm + promised.host + promised.ssd, found):
                self._wrong()

    def _seen(self, actual: Work | None) -> Work:
        """What the engine says of it. How fast a peer is no engine tells."""
        return replace(actual, peer_ms=self._sent.work.peer_ms) if actual else self._sent.work

    def _teach(self, work: Work) -> None:
        if work.computed >= _LEAST_TOKENS and not self._sent.is_handed:
            learner = self._activity.learner
            learner.saw_prefill(work, self._num_decoding, self._prefill_ms, was_idle=self._was_idle)
