"""`Predicted`: blocks that an engine has, or will have, because of what this router sent there. Sync state.

A node tells of a block some 20 ms after it was computed, and a prompt may wait for seconds before that. The
next request with the same beginning must not wait that long to follow the first: from the moment of choice
its blocks count as the engine's, while the request is there and for a little longer than news takes.

For an engine that no node speaks for there is no news: what was sent there counts for `SILENT_S`. That is
an approximation, and `Reuse.is_approximate` says so.

Blocks of one request are forgotten together and oldest request first when there are more than `max_blocks`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvfabric.events.index import Present
from kvfabric.types import BlockKey

TOLD_S = 1.0
"""After the first token: by then the node has told."""
SILENT_S = 120.0


@dataclass(slots=True)
class Expected:
    """The blocks of one request at one engine."""

    endpoint: str
    keys: Sequence[BlockKey]
    is_counted: bool = True


class Predicted:
    """See the module. `clock`: monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float], max_blocks: int = 1 << 18) -> None:
        self._clock = clock
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._engines: dict[BlockKey, dict[str, int]] = {}
        self._ending: list[tuple[float, int, Expected]] = []
        self._order = itertools.count()
        self._requests: dict[int, Expected] = {}

    def __repr__(self) -> str:
        return f"<Predicted {self._num_blocks} blocks of {len(self._requests)} requests>"

    def __len__(self) -> int:
        return self._num_blocks

    def expect(self, endpoint: str, keys: Sequence[BlockKey]) -> Expected:
        """A request with these blocks is sent there; `done` or `failed` follows."""
        self._forget_ended()
        expected = Expected(endpoint, keys)
        self._requests[id(expected)] = expected
        self._num_blocks += len(keys)
        for key in keys:
            engines = self._engines.setdefault(key, {})
            engines[endpoint] = engines.get(endpoint, 0) + 1
        while self._num_blocks > self._max_blocks:
            self._forget(next(iter(self._requests.values())))
        return expected

    def done(self, expected: Expected, *, for_s: float = TOLD_S) -> None:
        """The engine has computed them: forget them `for_s` seconds from now."""
        if expected.is_counted:
            entry = (self._clock() + for_s, next(self._order), expected)
            heapq.heappush(self._ending, entry)

    def failed(self, expected: Expected) -> None:
        """The engine has not got them."""
        self._forget(expected)

    def forget(self, endpoint: str) -> None:
        """The engine has started anew, or may have: nothing that was sent there counts any more."""
        for expected in [one for one in self._requests.values() if one.endpoint == endpoint]:
            self._forget(expected)

    def of(self, keys: Sequence[BlockKey]) -> dict[str, Present]:
        """Endpoint -> which of `keys` it is expected to have, from the prompt's first block on."""
        self._forget_ended()
        found: dict[str, Present] = {}
        for index, key in enumerate(keys):
            engines = self._engines.get(key)
            if engines is None:
                break
            for endpoint in engines:
                if endpoint not in found:
                    found[endpoint] = np.zeros(len(keys), np.bool_)
                found[endpoint][index] = True
        return found

    def _forget_ended(self) -> None:
        now = self._clock()
        while self._ending and self._ending[0][0] <= now:
            self._forget(heapq.heappop(self._ending)[2])

    def _forget(self, expected: Expected) -> None:
        if not expected.is_counted:
            return
        expected.is_counted = False
        del self._requests[id(expected)]
        self._num_blocks -= len(expected.keys)
        for key in expected.keys:
            engines = self._engines[key]
            engines[expected.endpoint] -= 1
            if not engines[expected.endpoint]:
                del engines[expected.endpoint]
            if not engines:
                del self._engines[key]
