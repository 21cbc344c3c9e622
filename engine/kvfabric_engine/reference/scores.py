"""What a forward says of the next tokens, and the likeliest of them without a copy of all of it.

On a GPU the tokens of the highest logits come to the host by a kernel's writes into page-locked memory: a
copy of the logits would wait behind the megabytes that are being saved at the end of every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvfabric_engine.kernels import HAS_KERNELS, copy_words
from kvfabric_engine.lanes import Fence, Passed, fence_here
from kvfabric_engine.reference.sampler import Sampler

WORDS = 4096
"""Results on their way to the host, at most; far more than an engine launches ahead."""


class Scores:
    """Of n rows. `logits`: float32 [n, vocab] on the model's device."""

    def __init__(
        self, logits: torch.Tensor, best: Sequence[int] | torch.Tensor, done: Fence
    ) -> None:
        """`best`: each row's token of the highest logit, the lowest such id, behind `done`; or empty."""
        self.logits = logits
        self._best = best
        self._done = done

    def pick(self, row: int, sampler: Sampler) -> int:
        """The next token of a row. Waits until it is computed."""
        if not sampler.is_greedy or not len(self._best):
            return sampler.pick(self.logits[row].cpu())
        self._done.wait()
        return int(self._best[row])


class Scorer:
    """Makes `Scores` of logits. For one thread, which launches on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next = 0
        self._words: torch.Tensor | None = None
        if device.type == "cuda" and HAS_KERNELS:
            self._words = torch.zeros(WORDS, dtype=torch.int64, pin_memory=True)

    def of(self, logits: torch.Tensor) -> Scores:
        """Launches only. `logits` as in `Scores`."""
        count = len(logits)
        if self._words is None or not 0 < count <= WORDS:
            return Scores(logits, (), Passed())
        start = self._next if self._next + count <= WORDS else 0
        self._next = start + count
        best = self._words[start : start + count]
        copy_words(logits.argmax(dim=-1), best)
        return Scores(logits, best, fence_here(self._device))
