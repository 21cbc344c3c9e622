"""Does one thing change how long another takes? Two samples, compared by rank, so that load does not matter.

Two-sample Kolmogorov-Smirnov test (Kolmogorov 1933, Smirnov 1939) with Stephens' correction of its asymptotic
distribution for small samples (1970), and Holm's correction for many tests at once (1979). Pure, but for
`audit`, which calls for the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.01
"""How often a round of an audit may suspect what is innocent. It fails when two rounds do: 1 in 10,000."""


@dataclass(frozen=True, slots=True)
class Arms:
    """Times of one call, in seconds: where the other tenant had stored the same, and where it had not."""

    stored: Sequence[float]
    fresh: Sequence[float]


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(statistic, p): p is how likely samples of one distribution lie this far apart."""
    first, second = np.sort(one), np.sort(other)
    every = np.concatenate((first, second))
    below_first = np.searchsorted(first, every, side="right") / len(first)
    below_second = np.searchsorted(second, every, side="right") / len(second)
    statistic = float(np.abs(below_first - below_second).max())
    size = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    x = (size + 0.12 + 0.11 / size) * statistic
    if x < 0.2:
        return statistic, 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return statistic, min(1.0, max(0.0, 2 * math.fsum(terms)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each p corrected for there being many: at most ALPHA in all is a detection, of any of them."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = highest
    return corrected


def compare(samples: Mapping[str, Arms]) -> dict[str, float]:
    """Holm-corrected p of every call."""
    found = {name: kolmogorov_smirnov(arms.stored, arms.fresh)[1] for name, arms in samples.items()}
    return holm(found)


def audit(measure: Callable[[], Mapping[str, Arms]]) -> tuple[dict[str, float], set[str]]:
    """(p of the first round, calls detected twice). A second, fresh round only where the first suspects."""
    first = compare(measure())
    suspects = {name for name, p in first.items() if p < ALPHA}
    if not suspects:
        return first, set()
    fresh = measure()
    again = compare({name: fresh[name] for name in suspects})
    return first, {name for name, p in again.items() if p < ALPHA}
