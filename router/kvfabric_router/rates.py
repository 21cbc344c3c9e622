"""How long an engine takes before its first token, learned from its own timings. Pure.

The model of one request, in milliseconds:

    token * n + context * n * (reused + n / 2) + answer * n * decoding + host * h + ssd * s

n tokens computed after `reused` others (attention makes the second half of a long prompt dearer: the
curvature), while `decoding` answers share the engine's steps; h and s tokens fetched from host and SSD. The
latency of the way there adds to that if the engine is idle; one that waits there follows the one before.
Coefficients are least squares over what was seen, older sights weighing less, each relative to its own
size (a long prompt is not more true than a short one). Until enough was seen they lean on a prior: the
other engines' rates. None is negative: one that would be is taken out.
"""

from __future__ import annotations

from statistics import median

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

DEFAULT_TOKEN_MS = 0.5
HOST_BYTES_PER_MS = 4e6
SSD_BYTES_PER_MS = 8e5
"""Before anything was measured: computing, memory and disk of a small machine."""

_FORGET = 0.99  # weight of all earlier sights at each new one: the last 100 count
_CONTEXT_UNIT, _ANSWER_UNIT = 8192.0, 16.0
_PRIOR_WEIGHT = 0.01
_FLEET_WEIGHT = 1.0  # engines of a fleet are most often alike: as good as one sight
_IDLE_WEIGHT = 0.2  # of a request that found the engine idle: it tells more of the way there
_LEARN_LATENCY = 0.1
_OUTLIER = 2.0  # a sight further off than this factor counts as one that far off
_OUTLIERS_FROM = 8  # sights before that is known
_LEARN_STEP = 0.2
_FIT_EACH, _FIT_EVERY = 16, 8

_Vector = npt.NDArray[np.float64]


class Work(msgspec.Struct, frozen=True, gc=False):
    """What one request asks of an engine before its first token, in tokens. `peer_ms`: for each of `peer`,
    until it is in the host memory of the engine's node."""

    computed: int
    hbm: int = 0
    host: int = 0
    ssd: int = 0
    peer: int = 0
    peer_ms: float = 0.0

    @property
    def reused(self) -> int:
        """Tokens that are not computed."""
        return self.hbm + self.host + self.ssd + self.peer


class Rates(msgspec.Struct, frozen=True, gc=False):
    """The coefficients, in milliseconds for each of what the module's formula multiplies them with.

    `latency_ms` is no work of the engine. `step_ms`: one token of a running answer.
    """

    latency_ms: float = 0.0
    token_ms: float = DEFAULT_TOKEN_MS
    context_ms: float = 0.0
    answer_ms: float = 0.0
    host_ms: float = 0.0
    ssd_ms: float = 0.0
    step_ms: float = 20.0

    def prefill_ms(self, work: Work) -> float:
        """Computing, on an engine that does nothing else."""
        n = work.computed
        context = work.reused + n / 2
        return n * (self.token_ms + self.context_ms * context)

    def decode_ms(self, work: Work, num_decoding: float) -> float:
        """What running answers take from the steps of this request's prefill."""
        return self.answer_ms * work.computed * num_decoding

    def fetch_ms(self, work: Work) -> float:
        from_host = self.host_ms * (work.host + work.peer)
        return from_host + self.ssd_ms * work.ssd + work.peer_ms * work.peer

    def fetch_by_tier(self, work: Work) -> dict[str, float]:
        """The same, by where it comes from."""
        return {
            "host": self.host_ms * work.host,
            "ssd": self.ssd_ms * work.ssd,
            "peer": (self.host_ms + work.peer_ms) * work.peer,
        }


UNKNOWN = Rates()


class NodeRates(msgspec.Struct, frozen=True, gc=False):
    """What a node measured of its own, in bytes a millisecond; 0: nothing yet. `host`: from its host memory
    to an engine; `ssd`: from SSD into host memory."""

    host: float = 0.0
    ssd: float = 0.0


UNMEASURED = NodeRates()


def fetch_prior(token_bytes: float, rates: Rates, measured: NodeRates = UNMEASURED) -> Rates:
    """`rates` for an engine whose KV takes `token_bytes` a token: what its node measured goes before what
    others of the fleet take, and that before a guess."""
    host_ms = rates.host_ms or token_bytes / HOST_BYTES_PER_MS
    ssd_ms = rates.ssd_ms or token_bytes / SSD_BYTES_PER_MS
    if measured.host:
        host_ms = token_bytes / measured.host
    if measured.ssd:  # from there it goes through host memory
        ssd_ms = token_bytes / measured.ssd + host_ms
    return replace(rates, host_ms=host_ms, ssd_ms=ssd_ms)


def typical(rates: list[Rates]) -> Rates:
    """The median engine, coefficient by coefficient."""
    if not rates:
        return Rates()
    names = ("latency_ms", "token_ms", "context_ms", "answer_ms", "host_ms", "ssd_ms", "step_ms")
    return Rates(**{name: median(getattr(one, name) for one in rates) for name in names})


class RateLearner:
    """One engine's rates, and what is needed to better them."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.num_sights = 0
        self._num_clean = 0
        self._prior, self._is_fleets, self._measured = Rates(), False, UNMEASURED
        self._moments = np.zeros((5, 5))
        self._products = np.zeros(5)

    def prior(
        self, rates: Rates, *, is_fleets: bool = False, measured: NodeRates = UNMEASURED
    ) -> None:
        """What to lean on where this engine itself was not seen yet. `is_fleets`: as measured at others;
        `measured`: what its node told, of which `rates` are made."""
        self._prior, self._is_fleets, self._measured = rates, is_fleets, measured
        if not self.num_sights:
            self.rates = rates

    def node_measured(self, token_bytes: float, measured: NodeRates) -> None:
        """Its node has told how fast it fetches; for an engine that leans on its own sights."""
        self._prior = fetch_prior(token_bytes, self._prior, measured)
        self._measured = measured

    def saw_prefill(
        self, work: Work, num_decoding: int, took_ms: float, *, was_idle: bool = False
    ) -> None:
        """A request was the engine's next for `took_ms`, until its first token. `was_idle`: it found the
        engine without work.
        """
        expected = self.rates.prefill_ms(work) + self.rates.fetch_ms(work)
        expected += self.rates.decode_ms(work, num_decoding)
        if was_idle:
            took_ms = self._without_latency(took_ms, expected)
        # What came from a peer is by its link's rate, which the nodes measure.
        took_ms = max(took_ms - work.peer_ms * work.peer, took_ms / 4)
        expected -= work.peer_ms * work.peer
        if self.num_sights >= _OUTLIERS_FROM:
            took_ms = min(max(took_ms, expected / _OUTLIER), expected * _OUTLIER)
        features = _features(work, num_decoding)
        features /= 16.0 + work.computed + (work.host + work.ssd + work.peer) / 16
        took_ms /= 16.0 + work.computed + (work.host + work.ssd + work.peer) / 16
        weight = _IDLE_WEIGHT if was_idle else 1.0
        self._moments = _FORGET * self._moments + weight * np.outer(features, features)
        self._products = _FORGET * self._products + weight * took_ms * features
        self.num_sights += 1
        self._num_clean += not was_idle
        # A fit takes a third of a millisecond of the loop: often at first, then now and then.
        if self.num_sights <= _FIT_EACH or self.num_sights % _FIT_EVERY == 0:
            self.rates = _rates(self._solve(), self.rates)

    def _without_latency(self, took_ms: float, expected_ms: float) -> float:
        """Of a request that found the engine idle: what is work. Latency is what the rates, known from
        requests that waited there, leave unexplained.
        """
        if self._num_clean >= _OUTLIERS_FROM:
            more = max(took_ms - expected_ms, 0.0) - self.rates.latency_ms
            latency_ms = self.rates.latency_ms + _LEARN_LATENCY * more
            self.rates = replace(self.rates, latency_ms=latency_ms)
        return max(took_ms - self.rates.latency_ms, took_ms / 4)

    def saw_answer(self, num_tokens: int, took_ms: float) -> None:
        """So many tokens of one answer followed its first."""
        if num_tokens > 0:
            step = took_ms / num_tokens
            known = self.rates.step_ms
            self.rates = replace(self.rates, step_ms=known + _LEARN_STEP * (step - known))

    def _solve(self) -> _Vector:
        prior = _coefficients(self._prior)
        weights = np.full(5, _PRIOR_WEIGHT)
        if self._is_fleets:
            weights[0] = _FLEET_WEIGHT
        if self._measured.host:
            weights[3] = _FLEET_WEIGHT
        if self._measured.ssd:
            weights[4] = _FLEET_WEIGHT
        moments = self._moments + np.diag(weights)
        products = self._products + weights * prior
        kept = np.arange(5)
        while True:
            found = np.linalg.solve(moments[np.ix_(kept, kept)], products[kept])
            wrong = found < 0
            if not wrong.any() or len(kept) == 1:
                solution = np.zeros(5)
                solution[kept] = np.maximum(found, 0.0)
                return solution
            kept = np.delete(kept, int(found.argmin()))


def _features(work: Work, num_decoding: int) -> _Vector:
    n = work.computed
    context = work.reused + n / 2
    return np.array(
        [
            n,
            n * context / _CONTEXT_UNIT,
            n * num_decoding / _ANSWER_UNIT,
            work.host + work.peer,
            work.ssd,
        ]
    )


def _coefficients(rates: Rates) -> _Vector:
    return np.array(
        [
            rates.token_ms,
            rates.context_ms * _CONTEXT_UNIT,
            rates.answer_ms * _ANSWER_UNIT,
            rates.host_ms,
            rates.ssd_ms,
        ]
    )


def _rates(solution: _Vector, known: Rates) -> Rates:
    token, context, answer, host, ssd = solution.tolist()
    return Rates(
        latency_ms=known.latency_ms,
        token_ms=max(token, 1e-6),
        context_ms=context / _CONTEXT_UNIT,
        answer_ms=answer / _ANSWER_UNIT,
        host_ms=host,
        ssd_ms=ssd,
        step_ms=known.step_ms,
    )
