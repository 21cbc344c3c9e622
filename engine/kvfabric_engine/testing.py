"""What tests of engines need: a model that answers in milliseconds, and requests run to their end."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvfabric.config import EngineConfig
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.sampler import SamplingParams
from kvfabric_engine.reference.sequence import Finish, GenerationRequest, Output, Reused

ANSWER_S = 30.0
_numbers = itertools.count()


def small_config(**changes: Any) -> EngineConfig:
    """Two layers, blocks of 16 tokens in two pages of 8. `changes` are EngineConfig fields."""
    small: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 300,
        "engine_block_tokens": 8,
        "block_tokens": 16,
        "hbm_blocks": 256,
        "max_model_tokens": 512,
        "window_bytes": 1 << 20,
    }
    return EngineConfig(**(small | changes))


@dataclass(frozen=True, slots=True)
class Answer:
    """One request that ended."""

    token_ids: tuple[int, ...]
    finish: Finish
    reused: Reused


class Pending:
    """A request under way."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.name = engine.submit(request, self._outputs.put)

    def next(self) -> Output:
        """The next output; raises queue.Empty if none comes."""
        return self._outputs.get(timeout=ANSWER_S)

    def skip(self) -> None:
        """Drop the outputs that are there already."""
        while not self._outputs.empty():
            self._outputs.get()

    def answer(self) -> Answer:
        """Wait for the end."""
        token_ids: list[int] = []
        while True:
            output = self.next()
            if output.token_id is not None:
                token_ids.append(output.token_id)
            if output.finish is not None:
                return Answer(tuple(token_ids), output.finish, output.reused)


def begin(
    engine: Engine,
    prompt: Sequence[int],
    *,
    handle: str | None = "",
    salt: str = "",
    request_id: str = "",
    **params: Any,
) -> Pending:
    """Submit one prompt. `params` are fields of SamplingParams; greedy unless they say otherwise."""
    params.setdefault("ignore_eos", True)
    request_id = request_id or f"r{next(_numbers)}"
    sampling = SamplingParams(**params)
    return Pending(
        engine, GenerationRequest(request_id, tuple(prompt), sampling, handle=handle, salt=salt)
    )


def ask(engine: Engine, prompt: Sequence[int], **options: Any) -> Answer:
    """`begin` and wait for the answer."""
    return begin(engine, prompt, **options).answer()
