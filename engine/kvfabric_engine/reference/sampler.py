"""Picks the next token from logits: greedy, or temperature and top-p with a seed per request. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GREEDY_BELOW = 1e-5
"""Temperatures below count as 0: logits divided by less may leave float32."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy. `seed` None draws one."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False


class Sampler:
    """One request's source of randomness: equal seeds and logits give equal tokens."""

    __slots__ = ("_generator", "_params")

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether `pick` always takes the highest logit."""
        return self._params.temperature < GREEDY_BELOW

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id. `logits`: float32 [vocab] on CPU. Ties go to the lowest id."""
        if self.is_greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self._params.temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # A token stays while what comes before it has less than top_p: the first always stays.
        kept = ordered.cumsum(-1) - ordered < self._params.top_p
        kept[0] = True
        choice = torch.multinomial(ordered * kept, 1, generator=self._generator)
        return int(ids[choice])
