"""What the router itself adds to a request, beside a direct connection and smg.

    make .venv-routers && .venv-routers/bin/python benchmarks/bench_overhead.py [--quick]

Streams of 8k-token prompts at 200 requests a second, to simulated engines that take no time. Direct means to
the engines in turn, without a router. Sides take turns, each with processes of its own. Of each request: time
to the first byte of the answer, less what its engine says it took itself, from the request's head to the
first token. What is left is the way there and back. `added_ms` is a router's percentile of it less the direct
one of the same round; `added_whole_ms` is the same with the engine's time left in: ours also opens the handle
at its node, two round trips of a socket, which a direct request does not.

`rps_per_core`: requests over the router's CPU seconds. Rows tell the CPU time a request took of each process:
with both cores busy the time would be that of the generator and the engines, not of the router.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence

import aiohttp
import harness
import traffic
from bench_router import Answer, ask, body_of
from routers import PEERS, deployed

PROMPT_TOKENS = 8_000
RATE = 200.0
NUM_REQUESTS, NUM_QUICK, ROUNDS = 2_500, 400, 3
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
        before = (*fleet.cpu_s(), fleet.simulators_cpu_s(), time.process_time())
        began = time.perf_counter()
        answers = await send(urls, bodies)
        took_s = time.perf_counter() - began
        after = (*fleet.cpu_s(), fleet.simulators_cpu_s(), time.process_time())
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        raise RuntimeError(f"{side}: {len(errors)} of {len(answers)} failed: {errors[0]}")
    cpu_s = [b - a for a, b in zip(before, after, strict=True)]
    names = ("router", "node", "engines", "generator")
    each = zip(names, cpu_s, strict=True)
    whole_ms = [answer.ttft_s * 1e3 for answer in answers]
    way_ms = [(answer.ttft_s - answer.engine_s) * 1e3 for answer in answers]
    return {
        "p50_ms": harness.percentile(way_ms, 50),
        "p99_ms": harness.percentile(way_ms, 99),
        "whole_p50_ms": harness.percentile(whole_ms, 50),
        "whole_p99_ms": harness.percentile(whole_ms, 99),
        **{f"{name}_cpu_ms": round(used / len(answers) * 1e3, 3) for name, used in each},
        "busy_cores": round(sum(cpu_s) / took_s, 2),
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
    bodies = bodies_of(NUM_QUICK if args.quick else NUM_REQUESTS)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(1 if args.quick else ROUNDS):
        for side in sides:
            row = await measure(side, bodies)
            print(json.dumps({"side": side, **row}), flush=True)
            rows[side].append(row)
    figures: dict[str, float] = {}
    for side, prefix in (("kvfabric", ""), ("smg", "smg_")):
        pairs = list(zip(rows.get(side, ()), rows["direct"], strict=False))
        for name, of in (("added_ms", ""), ("added_whole_ms", "whole_")):
            for p in ("p50", "p99"):
                added = [row[f"{of}{p}_ms"] - direct[f"{of}{p}_ms"] for row, direct in pairs]
                if added:
                    figures[f"{prefix}{name}_{p}"] = harness.median(added)
        if pairs:
            used_ms = harness.median([row["router_cpu_ms"] for row, _ in pairs])
            figures[f"{prefix}rps_per_core"] = 1e3 / max(used_ms, 1e-3)
    harness.report("overhead", args, figures, rows)


if __name__ == "__main__":
    asyncio.run(main())
