"""What `bench_policy.py` holds the store's policy against: LRU, ARC and a clairvoyant over prefix blocks.

A tier stores every block of every prompt it serves. All but `PlainLru` are prefix-aware in the same way: only
a block without a child in the tier, and not of the running request, may go.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

Prompt = Sequence[int]
_NEVER = 1 << 60


class PrefixTier:
    """`capacity` blocks out of `num_distinct`, as a tree. Subclasses say which leaf goes."""

    def __init__(self, capacity: int, num_distinct: int) -> None:
        self.capacity = capacity
        self.present: set[int] = set()
        self.children = [0] * num_distinct
        self.parent = [-1] * num_distinct
        self.running: set[int] = set()

    def serve(self, prompt: Prompt) -> int:
        """How many leading blocks of this prompt were there; then all of it is, as far as it fits."""
        num_hit = leading(prompt, self.present)
        self.running = set(prompt)
        self.used(prompt, num_hit)
        previous = prompt[num_hit - 1] if num_hit else -1
        for block in prompt[num_hit:]:
            self.comes(block)
            if len(self.present) >= self.capacity and not self.evict():
                break
            self.present.add(block)
            self.parent[block] = previous
            if previous >= 0:
                self.children[previous] += 1
            previous = block
        self.running = set()
        self.ends(prompt, num_hit)
        return num_hit

    def is_leaf(self, block: int) -> bool:
        return block in self.present and not self.children[block]

    def remove(self, block: int) -> int:
        """Its parent, if that is a leaf now; else -1."""
        self.present.discard(block)
        parent = self.parent[block]
        if parent >= 0:
            self.children[parent] -= 1
        return parent if parent >= 0 and not self.children[parent] else -1

    def used(self, prompt: Prompt, num_hit: int) -> None:
        """This prompt is served now; `num_hit` of its blocks are there."""

    def comes(self, block: int) -> None:
        """This block is stored next, after one `evict` if the tier is full."""

    def evict(self) -> bool:
        """Remove one leaf that is not of the running prompt; False if there is none."""
        raise NotImplementedError

    def ends(self, prompt: Prompt, num_hit: int) -> None:
        """The prompt was served."""


class Ranked(PrefixTier):
    """The leaf of lowest rank goes; a block's rank is set at each use."""

    def __init__(self, capacity: int, num_distinct: int) -> None:
        super().__init__(capacity, num_distinct)
        self._ranks = [0] * num_distinct
        self._heap: list[tuple[int, int]] = []

    def rank(self, block: int) -> int:
        raise NotImplementedError

    def used(self, prompt: Prompt, num_hit: int) -> None:
        for block in prompt:
            self._ranks[block] = self.rank(block)

    def evict(self) -> bool:
        passed, gone = [], False
        while self._heap and not gone:
            entry = heapq.heappop(self._heap)
            value, block = entry
            if value != self._ranks[block] or not self.is_leaf(block):
                continue
            if block in self.running:
                passed.append(entry)
                continue
            freed, gone = self.remove(block), True
            if freed >= 0:
                heapq.heappush(self._heap, (self._ranks[freed], freed))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return gone

    def ends(self, prompt: Prompt, num_hit: int) -> None:
        for block in prompt:
            if self.is_leaf(block):
                heapq.heappush(self._heap, (self._ranks[block], block))


class Lru(Ranked):
    def __init__(self, capacity: int, num_distinct: int) -> None:
        super().__init__(capacity, num_distinct)
        self._time = 0

    def rank(self, block: int) -> int:
        return self._time

    def ends(self, prompt: Prompt, num_hit: int) -> None:
        super().ends(prompt, num_hit)
        self._time += 1


class Clairvoyant(Ranked):
    """Knows all prompts, and that each is served once, in order."""

    def __init__(self, capacity: int, num_distinct: int, prompts: Sequence[Prompt]) -> None:
        super().__init__(capacity, num_distinct)
        self._uses: list[list[int]] = [[] for _ in range(num_distinct)]
        for time in reversed(range(len(prompts))):
            for block in prompts[time]:
                self._uses[block].append(time)

    def rank(self, block: int) -> int:
        uses = self._uses[block]
        uses.pop()
        return -(uses[-1] if uses else _NEVER)


class PlainLru:
    """vLLM's free queue: blocks of the running request are out of it, and go in from the tail on."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue: OrderedDict[int, None] = OrderedDict()

    def serve(self, prompt: Prompt) -> int:
        num_hit = leading(prompt, self._queue)
        for block in prompt:
            self._queue.pop(block, None)
        while self._queue and len(self._queue) + len(prompt) > self._capacity:
            self._queue.popitem(last=False)
        for block in reversed(prompt[: self._capacity]):
            self._queue[block] = None
        return num_hit


class Arc(PrefixTier):
    """Adaptive replacement (Megiddo and Modha, FAST 2003) over leaves: the list to take from is chosen as
    there, its least recently used leaf goes, or if it has none one of the other list.

    `once`, `again`: in the tier, used once and more often; each with the ghosts of what left it.
    """

    def __init__(self, capacity: int, num_distinct: int) -> None:
        super().__init__(capacity, num_distinct)
        self._once, self._again, self._once_ghosts, self._again_ghosts = (
            OrderedDict[int, None]() for _ in range(4)
        )
        self._target = 0.0
        self._came_again: set[int] = set()
        self._last_was_again_ghost = False

    def used(self, prompt: Prompt, num_hit: int) -> None:
        for block in reversed(prompt[:num_hit]):
            self._once.pop(block, None)
            self._again.pop(block, None)
            self._again[block] = None

    def comes(self, block: int) -> None:
        once, again = self._once_ghosts, self._again_ghosts
        self._last_was_again_ghost = block in again
        if block in once:
            rise = max(1.0, len(again) / len(once))
            self._target = min(float(self.capacity), self._target + rise)
        elif block in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
        else:
            return
        once.pop(block, None)
        again.pop(block, None)
        self._came_again.add(block)

    def evict(self) -> bool:
        held = len(self._once)
        from_once = held > self._target or (self._last_was_again_ghost and held == self._target > 0)
        lists = [(self._once, self._once_ghosts), (self._again, self._again_ghosts)]
        for cached, ghosts in lists if from_once else lists[::-1]:
            for block in cached:
                if self.is_leaf(block) and block not in self.running:
                    del cached[block]
                    ghosts[block] = None
                    self.remove(block)
                    return True
        return False

    def ends(self, prompt: Prompt, num_hit: int) -> None:
        for block in reversed(prompt[num_hit:]):
            if block in self.present:
                (self._again if block in self._came_again else self._once)[block] = None
        self._came_again.clear()
        once, again = self._once_ghosts, self._again_ghosts
        while once and len(self._once) + len(once) > self.capacity:
            once.popitem(last=False)
        while len(once) + len(again) > self.capacity:
            (again or once).popitem(last=False)


def leading(prompt: Prompt, present: set[int] | OrderedDict[int, None]) -> int:
    """How many of the first blocks are there."""
    for position, block in enumerate(prompt):
        if block not in present:
            return position
    return len(prompt)
