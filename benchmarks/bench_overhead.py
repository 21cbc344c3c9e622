"""What the router itself adds to a request, beside a direct connection and smg.

    make .venv-routers && .venv-routers/bin/python benchmarks/bench_overhead.py [--quick]

Streams of 8k-token prompts at 200 requests a second, to simulated engines that take no time. Of each:
time to the first byte of the answer. Direct means to the engines in turn, without a router. Sides take
turns, each with processes of its own; added is a router's percentile less the direct one of the same round.
`rps_per_core`: requests over the router's CPU seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence

import aiohttp
import harness
import traffic
from bench_router import Answer, ask, body_of
from routers import PEERS, deployed

PROMPT_TOKENS = 8_000
RATE = 200.0
NUM_ENGINES = 4
NO_TIME = 1e6
SIDES = ("direct", "kvfabric", "smg")


async def send(urls: Sequence[str], bodies: Sequence[bytes]) -> list[Answer]:
    """One request every 1 / RATE s, to the URLs in turn."""
    answers = [Answer() for _ in bodies]
    connector = aiohttp.TCPConnector(limit=0)
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as group:
        began = loop.time()
        turns = itertools.cycle(urls)
        for number, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
            await asyncio.sleep(began + number / RATE - loop.time())
            group.create_task(ask(http, next(turns), body, answer))
    return answers


async def measure(side: str, bodies: Sequence[bytes]) -> dict[str, float]:
    router = "kvfabric" if side == "direct" else side
    async with deployed(router, num_engines=NUM_ENGINES, compression=NO_TIME) as fleet:
        urls = fleet.engines if side == "direct" else (fleet.url,)
        await send(urls, bodies[: len(bodies) // 5])
        before = fleet.cpu_s()
        answers = await send(urls, bodies)
        router_cpu_s, node_cpu_s = (b - a for a, b in zip(before, fleet.cpu_s(), strict=True))
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        raise RuntimeError(f"{side}: {len(errors)} of {len(answers)} failed: {errors[0]}")
    first_byte_ms = [answer.ttft_s * 1e3 for answer in answers]
    return {
        "p50_ms": harness.percentile(first_byte_ms, 50),
        "p99_ms": harness.percentile(first_byte_ms, 99),
        "router_cpu_s": router_cpu_s,
        "node_cpu_s": node_cpu_s,
        "num_requests": len(answers),
    }


def bodies_of(count: int) -> list[bytes]:
    """Prompts of which each ten share their first half."""
    prompts = [
        traffic.Request(
            number=number,
            arrival_s=0.0,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=2,
            ids=tuple(range(number // 10 * 8, number // 10 * 8 + 8)),
            id_tokens=traffic.ENGINE_BLOCK_TOKENS,
        )
        for number in range(count)
    ]
    return [body_of(prompt) for prompt in prompts]


async def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    sides = SIDES if PEERS.exists() else SIDES[:2]
    bodies = bodies_of(400 if args.quick else 4_000)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(1 if args.quick else 3):
        for side in sides:
            row = await measure(side, bodies)
            print(json.dumps({"side": side, **row}), flush=True)
            rows[side].append(row)
    figures: dict[str, float] = {}
    for side, name in (("kvfabric", "added_ms"), ("smg", "smg_added_ms")):
        for percent in ("p50", "p99"):
            added = [
                row[f"{percent}_ms"] - direct[f"{percent}_ms"]
                for row, direct in zip(rows.get(side, ()), rows["direct"], strict=False)
            ]
            if added:
                figures[f"{name}_{percent}"] = harness.median(added)
    for side, name in (("kvfabric", "rps_per_core"), ("smg", "smg_rps_per_core")):
        rates = [row["num_requests"] / max(row["router_cpu_s"], 1e-3) for row in rows.get(side, ())]
        if rates:
            figures[name] = harness.median(rates)
    harness.report("overhead", args, figures, rows)


if __name__ == "__main__":
    asyncio.run(main())
