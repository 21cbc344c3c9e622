"""Blocks count as an engine's from the choice on, for as long as they are not told of."""

from __future__ import annotations

import pytest
from kvfabric_router.predicted import Predicted

from kvfabric.hashing import block_keys

KEYS = block_keys(list(range(8 * 16)), 16, bytes(32))
OTHERS = block_keys(list(range(1, 1 + 8 * 16)), 16, bytes(32))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_sibling_finds_the_blocks_of_a_request_under_way(clock: Clock) -> None:
    predicted = Predicted(clock=clock)
    predicted.expect("a", KEYS[:4])
    predicted.expect("b", KEYS[:2])
    found = predicted.of(KEYS)
    assert found["a"].tolist() == [True] * 4 + [False] * 4
    assert found["b"].tolist() == [True] * 2 + [False] * 6
    assert predicted.of(OTHERS) == {}


def test_two_requests_with_the_same_blocks_are_two_reasons(clock: Clock) -> None:
    predicted = Predicted(clock=clock)
    first, second = predicted.expect("a", KEYS), predicted.expect("a", KEYS[:2])
    predicted.failed(first)
    assert predicted.of(KEYS)["a"].tolist() == [True] * 2 + [False] * 6
    predicted.done(second, for_s=1.0)
    predicted.failed(second)  # ended both ways: counted once
    assert predicted.of(KEYS) == {}
    clock.now = 5.0
    assert predicted.of(KEYS) == {}
    assert len(predicted) == 0


def test_memory_is_bounded_oldest_first(clock: Clock) -> None:
    predicted = Predicted(clock=clock, max_blocks=12)
    first = predicted.expect("a", KEYS)
    predicted.expect("a", OTHERS)
    assert len(predicted) == 8
    assert predicted.of(KEYS) == {}
    assert predicted.of(OTHERS)["a"].all()
    predicted.done(first)  # forgotten already: nothing to end
    clock.now = 5.0
    assert predicted.of(OTHERS)["a"].all()
