"""Load: sends prompts through the router as an OpenAI client would, streaming, and notes what came back.

Open loop: every request leaves at its arrival time, whatever became of those before it. Closed loop: a
fixed number in flight, as fast as they are answered; that is how capacity is measured.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

REQUEST_S = 60.0
"""Longest that one answer may take."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send: `index` names the prompt, so that answers to it can be compared."""

    index: int
    tenant: str
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a job. `status` 0: no HTTP answer. Tokens are counts of prompt tokens."""

    job: Job
    status: int = 0
    error: str = ""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    hbm_tokens: int = 0
    host_tokens: int = 0
    ssd_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    request_id: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == 200 and not self.error and self.completion_tokens > 0


class Client:
    """An OpenAI client for several tenants. Use with `async with`."""

    def __init__(self, base_url: str, keys: Mapping[str, str], max_tokens: int) -> None:
        self._base_url = base_url
        self._keys = keys
        self._max_tokens = max_tokens
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_S),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, job: Job) -> Answer:
        """One greedy answer. A failure is an Answer that says so. Cancelling closes the connection."""
        assert self._session is not None, "use the client inside its `async with`"
        clock = asyncio.get_running_loop().time
        body = {
            "model": "reference",
            "prompt": list(job.prompt),
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {self._keys[job.tenant]}"}
        start = clock()
        answer = Answer(job)
        try:
            async with self._session.post(
                f"{self._base_url}/v1/completions", json=body, headers=headers
            ) as response:
                name = response.headers.get("X-Request-Id", "")
                answer = replace(answer, status=response.status, request_id=name)
                if response.status != 200:
                    return replace(answer, error=(await response.text())[:500])
                async for chunk in _chunks(response):
                    answer = merge(answer, chunk, clock() - start)
        except (aiohttp.ClientError, TimeoutError) as exc:
            return replace(answer, error=f"{type(exc).__name__}: {exc}")
        return replace(answer, total_s=clock() - start)


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data != b"[DONE]":
            yield json.loads(data)


def merge(answer: Answer, chunk: Mapping[str, Any], now_s: float) -> Answer:
    """`answer` with one streamed chunk added, which came `now_s` after the request was sent. Pure."""
    if error := chunk.get("error"):
        return replace(answer, error=json.dumps(error))
    for choice in chunk.get("choices", ()):
        answer = replace(
            answer,
            text=answer.text + (choice.get("text") or ""),
            token_ids=answer.token_ids + tuple(choice.get("token_ids") or ()),
            ttft_s=answer.ttft_s or now_s,
        )
    if usage := chunk.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        tiers = details.get("kvfabric") or {}
        answer = replace(
            answer,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=details.get("cached_tokens", 0),
            hbm_tokens=tiers.get("hbm_tokens", 0),
            host_tokens=tiers.get("host_tokens", 0),
            ssd_tokens=tiers.get("ssd_tokens", 0),
        )
    return answer


OnAnswer = Callable[[Answer], None]


async def open_loop(
    client: Client, jobs: Sequence[Job], arrivals_s: Sequence[float], on_answer: OnAnswer
) -> list[Answer]:
    """Send each job at its arrival, counted from now. Answers are in the order of `jobs`."""
    clock = asyncio.get_running_loop().time
    start = clock()

    async def one(job: Job) -> Answer:
        answer = await client.complete(job)
        on_answer(answer)
        return answer

    tasks = []
    async with asyncio.TaskGroup() as group:
        for job, arrival_s in zip(jobs, arrivals_s, strict=True):
            await asyncio.sleep(start + arrival_s - clock())
            tasks.append(group.create_task(one(job)))
    return [task.result() for task in tasks]


async def closed_loop(
    client: Client, jobs: Sequence[Job], concurrency: int, on_answer: OnAnswer
) -> list[Answer]:
    """Send `jobs` with `concurrency` in flight. Answers are in the order of `jobs`."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(jobs))

    async def worker() -> None:
        for position, job in waiting:
            answers[position] = await client.complete(job)
            on_answer(answers[position])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return [answers[position] for position in range(len(jobs))]


def arrivals_at_rate(arrivals_ms: Sequence[int], per_s: float) -> list[float]:
    """The arrivals of the slice, stretched so that `per_s` requests come a second on average."""
    span_s = (len(arrivals_ms) - 1) / per_s
    scale = span_s / max(arrivals_ms[-1] - arrivals_ms[0], 1)
    return [(arrival - arrivals_ms[0]) * scale for arrival in arrivals_ms]
