"""Requests of the recorded traces, as the router's benchmark offers them. Pure but for reading the files.

A block id of a trace stands for its whole prefix. A prompt is the text of its ids one after the other: words
made from the id, one character a token as the byte tokenizer reads them; equal ids, equal text. What is
not covered by an id (the rest of a prompt of the RTP-LLM trace) is text of the request's own.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

TRACES = Path(__file__).resolve().parent / "traces"
ENGINE_BLOCK_TOKENS = 512
# The RTP-LLM log does not tell the length of 27.5 % of its answers; very long ones only lengthen a row.
_MEDIAN_OUTPUT, _MAX_OUTPUT = 131, 1_024
# The conversation trace's clock: its arrivals are spread over the tick they were noted at.
_TICK_S = 3.0
_WORDS = re.findall(
    r"\w+",
    "a and any are as be but by can day did do each find first for from get give go good has have he "
    "her him his how if in into is it its just know like look make man many may me more most my new no "
    "not now of on one only or other our out over people say see she so some take tell than that the "
    "their them then there these they thing think this time to two up use very want was way we well "
    "were what when which who will with work would year you your",
)


@dataclass(frozen=True, slots=True)
class Request:
    """`arrival_s` counts from the trace's start, noted to `tick_s`; an id for each `id_tokens` tokens."""

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ids: tuple[int, ...]
    id_tokens: int
    tick_s: float = 0.0

    def engine_blocks(self) -> tuple[int, ...]:
        """Numbers of the full engine blocks: equal numbers mean equal text from token 0 on."""
        split = self.id_tokens // ENGINE_BLOCK_TOKENS
        full = min(self.prompt_tokens // ENGINE_BLOCK_TOKENS, len(self.ids) * split)
        return tuple(self.ids[i // split] * split + i % split for i in range(full))


def load(trace: str, directory: Path = TRACES) -> list[Request]:
    """All requests of `conversation` or `rtp_llm`, in order of arrival."""
    if trace == "conversation":
        return [
            Request(
                number,
                row["timestamp"] / 1e3,
                row["input_length"],
                row["output_length"],
                tuple(row["hash_ids"]),
                512,
                _TICK_S,
            )
            for number, row in enumerate(_rows(directory / "mooncake_conversation.jsonl.gz"))
        ]
    rows = sorted(_rows(directory / "rtp_llm_online.jsonl.gz"), key=lambda row: row["ts"])
    first = rows[0]["ts"]
    return [
        Request(
            number,
            (row["ts"] - first) / 1e3,
            row["il"],
            min(row["ol"] or _MEDIAN_OUTPUT, _MAX_OUTPUT),
            tuple(int(i) for i in row["bh"]),
            1024,
        )
        for number, row in enumerate(rows)
        if row["il"] > 0
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True, slots=True)
class Offered:
    """Consecutive requests with arrivals scaled to a load; `arrivals_s` from 0, in trace time."""

    requests: tuple[Request, ...]
    arrivals_s: tuple[float, ...]


def offer(
    trace: Sequence[Request], *, count: int, seed: int, seeds: int, tokens_per_s: float
) -> Offered:
    """`count` consecutive requests that offer `tokens_per_s`. The seed says where in the trace they start."""
    first = (len(trace) - count) * seed // max(seeds - 1, 1)
    chosen = trace[first : first + count]
    rng = Random(f"{seed} {count}")
    spread = [r.arrival_s + rng.uniform(0, r.tick_s) for r in chosen]
    order = sorted(range(count), key=spread.__getitem__)
    begin, end = spread[order[0]], spread[order[-1]]
    scale = sum(r.prompt_tokens for r in chosen) / tokens_per_s / (end - begin)
    return Offered(
        tuple(chosen[i] for i in order), tuple((spread[i] - begin) * scale for i in order)
    )


def text(request: Request) -> str:
    """The prompt: ASCII, `prompt_tokens` characters."""
    parts = [_words(f"block {i}", request.id_tokens) for i in request.ids]
    made = "".join(parts)[: request.prompt_tokens]
    return made + _words(f"request {request.number}", request.prompt_tokens - len(made))


def _words(name: str, length: int) -> str:
    if length <= 0:
        return ""
    words = " ".join(Random(name).choices(_WORDS, k=length // 3 + 1))
    return words[: length - 1].ljust(length - 1) + "\n"
