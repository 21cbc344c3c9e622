"""Our router beside every router that people can install, on real traces, before the same simulated engines.

    make .venv-routers && .venv-routers/bin/python benchmarks/bench_router.py [--quick]

A row is one router, trace, load and seed: 2,000 consecutive requests, the first 500 to warm up, sent when
the trace says (time compressed 8 times, everything reported in trace time). Load is offered prompt tokens
over what the engines prefill without any reuse. The seed says where in the trace the row starts. Rows are
appended to `results/router.jsonl` as they finish; a run goes on where the last one stopped, and begins anew
once that file is removed. `--lanes N` measures N rows at a time, each with processes of its own: for machines
of at least four cores a lane.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import harness
import traffic
from routers import PEER_NAMES, PEERS, ROUTERS, NotReady, deployed
from simulated import MODEL, EngineModel

NUM_ENGINES = 8
COMPRESSION = 8.0
LOADS = (0.7, 1.0, 1.3)
TRACES = ("conversation", "rtp_llm")
SEEDS = 3
GOOD_S = 10.0
ROWS = harness.RESULTS / "router.jsonl"
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Case:
    """One row to measure."""

    trace: str
    load: float
    seed: int
    router: str
    num_requests: int = 2_000
    num_warm_up: int = 500


@dataclass(slots=True)
class Answer:
    """What a client saw of one request; seconds of wall time, `ttft_s` negative without an answer.

    `engine_s`: of it, from the engine's having read the head of the request to its first token.
    """

    engine: str = ""
    ttft_s: float = -1.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    engine_s: float = 0.0
    error: str = ""


async def ask(http: aiohttp.ClientSession, url: str, body: bytes, answer: Answer) -> None:
    """One streamed request, timed to the first byte of its stream."""
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    try:
        async with http.post(f"{url}/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:200]}"
                return
            first = await response.content.readany()
            answer.ttft_s = time.perf_counter() - began
            events = first + await response.content.read()
    except (aiohttp.ClientError, TimeoutError) as exc:
        answer.error = repr(exc)
        return
    for line in events.splitlines():
        if line.startswith(b"data: {") and b'"usage"' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            answer.prompt_tokens = usage.get("prompt_tokens", 0)
            answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            answer.engine_s = usage["engine_ms"] / 1e3
            answer.engine = json.loads(line[6:]).get("system_fingerprint", "")
    if not answer.prompt_tokens:
        answer.error = "the stream broke off"


async def replay(url: str, offered: traffic.Offered, bodies: Sequence[bytes]) -> list[Answer]:
    """Every request at its time, whatever became of those before it."""
    answers = [Answer() for _ in bodies]
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(timeout=timeout, connector=connector)
    async with session as http, asyncio.TaskGroup() as group:
        began = time.perf_counter()
        for at, body, answer in zip(offered.arrivals_s, bodies, answers, strict=True):
            await asyncio.sleep(began + at / COMPRESSION - time.perf_counter())
            group.create_task(ask(http, url, body, answer))
    return answers


def body_of(request: traffic.Request) -> bytes:
    fields = {
        "model": MODEL,
        "prompt": traffic.text(request),
        "max_tokens": request.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


async def measure(case: Case, trace: Sequence[traffic.Request]) -> dict[str, object]:
    """The row of one case."""
    capacity = NUM_ENGINES * EngineModel().prefill_tokens_per_s
    offered = traffic.offer(
        trace,
        count=case.num_requests,
        seed=case.seed,
        seeds=SEEDS,
        tokens_per_s=case.load * capacity,
    )
    bodies = [body_of(request) for request in offered.requests]
    async with deployed(case.router, num_engines=NUM_ENGINES, compression=COMPRESSION) as fleet:
        before = fleet.cpu_s()
        began = time.perf_counter()
        answers = await replay(fleet.url, offered, bodies)
        wall_s = time.perf_counter() - began
        router_cpu, node_cpu = (b - a for a, b in zip(before, fleet.cpu_s(), strict=True))
    row = summary(answers[case.num_warm_up :])
    return {
        **asdict(case),
        **row,
        "router_cpu_s": round(router_cpu, 2),
        "node_cpu_s": round(node_cpu, 2),
        "wall_s": round(wall_s, 1),
        "commit": harness.commit(),
    }


def summary(answers: Sequence[Answer]) -> dict[str, object]:
    """Figures of the requests that count, in trace time."""
    good = [answer for answer in answers if not answer.error]
    errors = [answer.error for answer in answers if answer.error]
    ttft_ms = [answer.ttft_s * COMPRESSION * 1e3 for answer in good] or [math.nan]
    work: dict[str, int] = defaultdict(int)
    for answer in good:
        work[answer.engine] += answer.prompt_tokens - answer.cached_tokens
    prompts = sum(answer.prompt_tokens for answer in good)
    return {
        "ttft_ms_mean": round(statistics.mean(ttft_ms), 1),
        **{f"ttft_ms_p{p}": round(harness.percentile(ttft_ms, p), 1) for p in (50, 95, 99)},
        "reused_share": round(sum(a.cached_tokens for a in good) / max(prompts, 1), 4),
        "imbalance": round(max(work.values(), default=0) * NUM_ENGINES / sum(work.values()), 3)
        if work
        else math.nan,
        "goodput": round(sum(t < GOOD_S * 1e3 for t in ttft_ms) / len(answers), 4),
        "errors": len(errors),
        **({"first_error": errors[0]} if errors else {}),
    }


# ---------------------------------------------------------------------- the table


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """In the order they run: routers take turns, so that a slow hour meets all of them."""
    routers = args.routers or ROUTERS
    if args.quick:
        for router in routers:
            yield Case("rtp_llm", 1.0, 0, router, num_requests=800, num_warm_up=200)
        return
    for seed in range(args.seeds):
        for trace in args.only:
            for load in LOADS:
                for router in routers:
                    yield Case(trace, load, seed, router)


def figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Ratios of our rows to those of the others at the same trace, load and seed, as geometric means."""
    by_case: dict[tuple[object, ...], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        by_case[row["trace"], row["load"], row["seed"]][str(row["router"])] = row
    ratios: dict[str, list[float]] = defaultdict(list)
    for (trace, *_), found in by_case.items():
        for name, ratio in _ratios(found, is_conversation=trace == "conversation"):
            ratios[name].append(ratio)
    made = {name: statistics.geometric_mean(values) for name, values in ratios.items()}
    for name in ("ttft_mean_over_best_peer", "ttft_p95_over_best_peer"):
        if name in ratios:
            made[f"{name}_worst"] = max(ratios[name])
    return made


def _ratios(
    found: dict[str, dict[str, float]], *, is_conversation: bool
) -> Iterator[tuple[str, float]]:
    """Of one case; `found`: its rows by router."""
    ours, turns, host = (found.get(name) for name in ("kvfabric", "round_robin", "kvfabric_host"))
    peers = [found[name] for name in PEER_NAMES if name in found]
    if ours and peers:
        for name in ("mean", "p95"):
            best = min(peer[f"ttft_ms_{name}"] for peer in peers)
            yield f"ttft_{name}_over_best_peer", ours[f"ttft_ms_{name}"] / best
    if ours and turns:
        yield "p95_over_round_robin", ours["ttft_ms_p95"] / turns["ttft_ms_p95"]
    if turns and is_conversation:
        for name, row in {"reuse": ours, "reuse_with_host_tier": host}.items():
            if row:
                yield f"{name}_over_round_robin", row["reused_share"] / turns["reused_share"]


def _read_rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row_of(case: Case, directory: Path) -> dict[str, object]:
    """One row, in a process of its own."""

    async def measured() -> dict[str, object]:
        this = asyncio.current_task()
        assert this is not None
        # Ended from outside it ends what it started.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        return await measure(case, traffic.load(case.trace, directory))

    return asyncio.run(measured())


def _end(*_: object) -> None:
    for lane in multiprocessing.active_children():
        lane.terminate()
    raise SystemExit(128 + signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--quick", action="store_true", help="one trace, load and seed; at most 4 min"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many of the three seeds")
    parser.add_argument("--routers", nargs="*", choices=ROUTERS, help="only these")
    parser.add_argument(
        "--only", nargs="*", choices=TRACES, default=TRACES, help="only these traces"
    )
    parser.add_argument("--traces", type=Path, default=traffic.TRACES, help="where the traces lie")
    parser.add_argument("--lanes", type=int, default=1, help="rows measured at a time")
    args = parser.parse_args()
    if not PEERS.exists():
        print(
            f"{PEERS.parent.name} is not there (make .venv-routers): our own rows only", flush=True
        )
        args.routers = [r for r in args.routers or ROUTERS if r not in PEER_NAMES]
    rows = [] if args.quick else _read_rows(ROWS)
    names = ("trace", "load", "seed", "router")
    done = {tuple(row[name] for name in names) for row in rows}
    asked = [c for c in cases(args) if tuple(getattr(c, name) for name in names) not in done]
    signal.signal(signal.SIGTERM, _end)
    spawn = multiprocessing.get_context("spawn")
    failures: list[str] = []
    with ProcessPoolExecutor(args.lanes, mp_context=spawn) as lanes:
        measured = {lanes.submit(row_of, case, args.traces): case for case in asked}
        for future in as_completed(measured):
            try:
                row = future.result()
            except NotReady as exc:  # the other rows are worth having all the same
                failures.append(f"{measured[future]}: {exc}")
                continue
            print(json.dumps(row), flush=True)
            rows.append(row)  # type: ignore[arg-type]
            if not args.quick:
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if failures:
        raise SystemExit("\n".join(failures))
    harness.report("router", args, figures(rows), rows)


if __name__ == "__main__":
    main()
