"""Prefill and decode apart, on the reference engine: what a hand-off costs, and what it wins.

1. One prompt at a time, computed at one engine in 16 chunks and answered at another, in turns:

       apart     both are asked at the same moment: each chunk's blocks travel while the next is computed
       serial    the second is asked when the first has answered: all blocks travel then (by hand, without us)
       warm      the second is asked again: everything is in its HBM, so this is the tail's computation alone
       alone     the second computes the prompt itself

   `handoff_overlap` = 1 - exposed / transfer, where the transfer takes serial - warm, and what of it is not
   hidden behind the prefill is the time from the first engine's first token to the second's, in `apart`. Both
   engines compute the tail that is no full block, at the same time.

2. Requests of long prompts and long answers, as they come, through a router: to two engines that do both
   (together), and to one that computes and one that answers (apart). The same arrivals for both, in turns.
   Time to first token, and time per output token after it.

With `--device cuda` each pair of engines has two GPUs of one host, and all are at one node: blocks go through
its host memory or from GPU to GPU. On a CPU there are two nodes, and blocks go over UCX on loopback.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import harness

from kvfabric.testing.apart import Answer, ApartFleet, EngineHandles, apart_fleet, ask

GIB, MIB = 1 << 30, 1 << 20
NUM_CHUNKS = 16
WAIT_MS = 30_000
TOGETHER, APART = "together", "apart"


@dataclass(frozen=True)
class Sizes:
    """`model`: options of the engines. `chunk`: tokens that an engine computes at once for another.
    `load_*`: of the second part."""

    model: Mapping[str, object]
    chunk: int
    rounds: int
    host_bytes: int
    load_prompt: int
    load_answer: int
    load_requests: int
    load_every_s: float
    load_rounds: int

    @property
    def prompt(self) -> int:
        """Sixteen chunks, and a tail that is no full block."""
        return NUM_CHUNKS * self.chunk + 17


def cpu_sizes(*, quick: bool) -> Sizes:
    model = {
        "num_layers": 2 if quick else 6,
        "hidden_size": 128 if quick else 256,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
        "hbm_blocks": 1600,
        "max_batch": 16,
        "max_model_tokens": 4608,
        "deterministic": "off",
        "window_bytes": 128 * MIB,
    }
    return Sizes(
        model=model,
        chunk=128 if quick else 256,
        rounds=1 if quick else 3,
        host_bytes=2 * GIB if quick else 4 * GIB,
        load_prompt=300 if quick else 1000,
        load_answer=20 if quick else 150,
        load_requests=3 if quick else 14,
        load_every_s=0.5 if quick else 1.2,
        load_rounds=1,
    )


def cuda_sizes(*, quick: bool, layers: int) -> Sizes:
    model = {
        "num_layers": 4 if quick else layers,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "dtype": "bfloat16",
        "device": "cuda",
        "hbm_blocks": 5120,  # pages of 16 tokens: 11 GiB with 36 layers
        "max_batch": 16,
        "max_model_tokens": 17408,
        "window_bytes": 256 * MIB,
    }
    return Sizes(
        model=model,
        chunk=1024,
        rounds=2 if quick else 7,
        host_bytes=16 * GIB if quick else 56 * GIB,  # a tenth may be leased
        load_prompt=4000,
        load_answer=50 if quick else 200,
        load_requests=6 if quick else 24,
        load_every_s=0.25,
        load_rounds=1 if quick else 3,
    )


def engines(sizes: Sizes, device: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Two that do both, one for prompts, one for answers: the first two and the last two of a model each."""
    roles = {"t1": "both", "t2": "both", "p": "prefill", "d": "decode"}
    found = {}
    for number, (name, role) in enumerate(roles.items()):
        second = number % 2
        options = {
            **sizes.model,
            "role": role,
            "model": TOGETHER if role == "both" else APART,
            "log_level": "warning",
        }
        if device == "cuda":
            # Its own is the first that it sees; it sees the other too, to read that engine's HBM.
            options["environment"] = {"CUDA_VISIBLE_DEVICES": "1,0" if second else "0,1"}
        node = "a" if device == "cuda" or not second else "b"
        found[name] = (node, options)
    return found


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


# ---------------------------------------------------------------------- 1: one prompt at a time


@dataclass
class Handing:
    """Seconds of each side, a value a round."""

    prefill: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    serial: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    @property
    def transfer(self) -> list[float]:
        return [s - w for s, w in zip(self.serial, self.warm, strict=True)]

    @property
    def overlap(self) -> list[float]:
        return [1 - e / t for e, t in zip(self.exposed, self.transfer, strict=True)]


class Hands:
    """Asks the two engines themselves, each with its handle: what is measured is not the router's choice."""

    def __init__(self, fleet: ApartFleet, sizes: Sizes) -> None:
        self._first, self._second = fleet.engines["p"].url, fleet.engines["d"].url
        self._handles = EngineHandles(fleet, node="a")
        self._sizes = sizes
        self._number = 0
        self.num_short = 0

    def measure(self, rounds: int, seed: int) -> Handing:
        found = Handing()
        for number in range(rounds + 1):
            one = Handing()
            self._round(one, seed + 10 * number)
            if number:  # the first meets cold caches and connections
                for name, values in vars(one).items():
                    getattr(found, name).extend(values)
        return found

    def _round(self, found: Handing, seed: int) -> None:
        size = self._sizes.prompt
        prompt = tokens(size, seed)
        first, second = self._apart(prompt, is_serial=False)
        found.prefill.append(first.ttft_s)
        found.apart.append(second.ttft_s)
        found.exposed.append(second.ttft_s - first.ttft_s)
        self._check(second)
        prompt = tokens(size, seed + 1)
        _, second = self._apart(prompt, is_serial=True)
        found.serial.append(second.ttft_s)
        self._check(second)
        found.warm.append(self._ask(self._second, prompt, self._handles.plain("d")).ttft_s)
        alone = self._ask(self._second, tokens(size, seed + 2), self._handles.plain("d"))
        found.alone.append(alone.ttft_s)

    def _check(self, answer: Answer) -> None:
        """Whether all was handed over; else the round says nothing."""
        self.num_short += answer.cached_tokens < NUM_CHUNKS * self._sizes.chunk

    def _apart(self, prompt: Sequence[int], *, is_serial: bool) -> tuple[Answer, Answer]:
        self._number += 1
        name = f"hand-off-{self._number}"
        first = self._handles.prefill("p", name)
        answers: list[Answer] = []

        def compute() -> None:
            answers.append(self._ask(self._first, prompt, first, max_tokens=1))

        thread = threading.Thread(target=compute)
        thread.start()
        if is_serial:
            thread.join()
            time.sleep(0.2)  # the last block is stored by then
        second = self._ask(self._second, prompt, self._handles.decode("d", name, WAIT_MS))
        thread.join()
        return answers[0], second

    def _ask(
        self, url: str, prompt: Sequence[int], handle: tuple[str, str], max_tokens: int = 2
    ) -> Answer:
        request_id, text = handle
        return ask(
            url,
            prompt,
            model=APART,
            request_id=request_id,
            kv_transfer_params={"kvfabric": text},
            max_tokens=max_tokens,
        )


# ---------------------------------------------------------------------- 2: requests as they come


@dataclass
class Load:
    """Milliseconds of every request of all rounds."""

    ttft: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    num_failed: int = 0
    num_apart: int = 0


def run_load(fleet: ApartFleet, sizes: Sizes, model: str, seed: int, found: Load) -> None:
    """Poisson arrivals; each request a thread."""
    rng = random.Random(seed)
    answers: list[Answer] = []
    failed: list[Exception] = []

    def request(number: int) -> None:
        # The same arrivals for both, other tokens: all engines are at the same nodes.
        prompt = tokens(sizes.load_prompt, hash((model == APART, seed, number)))
        try:
            answer = ask(
                fleet.router.url,
                prompt,
                key=fleet.key,
                model=model,
                max_tokens=sizes.load_answer,
            )
            answers.append(answer)
        except (OSError, HTTPException, RuntimeError) as exc:
            failed.append(exc)

    threads = []
    for number in range(sizes.load_requests):
        thread = threading.Thread(target=request, args=(number,))
        thread.start()
        threads.append(thread)
        time.sleep(rng.expovariate(1 / sizes.load_every_s))
    for thread in threads:
        thread.join()
    whole = [answer for answer in answers if not answer.error and answer.at]
    found.num_failed += len(failed) + len(answers) - len(whole)
    for answer in whole:
        found.ttft.append(answer.ttft_s * 1e3)
        span = answer.at[-1] - answer.at[0]
        found.per_token.append(span / max(len(answer.at) - 1, 1) * 1e3)
        told = fleet.explain(answer.request_id)
        found.num_apart += told["prefill_engine"] is not None


def measure_load(fleet: ApartFleet, sizes: Sizes, seed: int) -> dict[str, Load]:
    loads = {TOGETHER: Load(), APART: Load()}
    for name in loads:  # rates are learned, kernels compiled
        run_load(fleet, sizes, name, seed + 99, Load())
    for number in range(sizes.load_rounds):
        for name, load in loads.items():
            run_load(fleet, sizes, name, seed + number, load)
    return loads


# ---------------------------------------------------------------------- all of it


def hardware(device: str) -> str:
    if device != "cuda":
        return harness.hardware()
    import torch

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}"


def has_devices(device: str) -> bool:
    if device != "cuda":
        return True
    import torch

    return torch.cuda.device_count() >= 2


def main() -> int:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--layers", type=int, default=36, help="with cuda")
    args = harness.parse_arguments(__doc__ or "", [options])
    if not has_devices(args.device):
        print("bench_pd --device cuda needs two CUDA devices")
        return 1
    is_cuda = args.device == "cuda"
    sizes = (
        cuda_sizes(quick=args.quick, layers=args.layers) if is_cuda else cpu_sizes(quick=args.quick)
    )
    with tempfile.TemporaryDirectory(prefix="bench-pd-") as name:
        fleet_of = apart_fleet(
            Path(name), engines(sizes, args.device), node={"host_bytes": sizes.host_bytes}
        )
        with fleet_of as fleet:
            hands = Hands(fleet, sizes)
            handing = hands.measure(sizes.rounds, args.seed)
            show_handing(handing, hands.num_short)
            loads = measure_load(fleet, sizes, args.seed)
            show_loads(loads)
    figures = figures_of(handing, loads) | {"handoffs_short": hands.num_short}
    rows = {
        "handing_s": {**vars(handing), "transfer": handing.transfer, "overlap": handing.overlap},
        "load": {name: vars(load) for name, load in loads.items()},
        "prompt_tokens": sizes.prompt,
        "model": {str(k): str(v) for k, v in sizes.model.items()},
    }
    subject = "pd_cuda" if is_cuda else "pd"
    harness.report(subject, args, figures, rows, on=hardware(args.device))
    return 0


def figures_of(handing: Handing, loads: Mapping[str, Load]) -> dict[str, float]:
    figures: dict[str, float] = {
        "handoff_overlap": harness.median(handing.overlap),
        "transfer_ms": harness.median(handing.transfer) * 1e3,
        "exposed_ms": harness.median(handing.exposed) * 1e3,
        "prefill_ms": harness.median(handing.prefill) * 1e3,
        "apart_ttft_ms": harness.median(handing.apart) * 1e3,
        "alone_ttft_ms": harness.median(handing.alone) * 1e3,
    }
    for name, load in loads.items():
        figures[f"ttft_{name}_ms_p50"] = harness.median(load.ttft)
        figures[f"ttft_{name}_ms_p95"] = harness.percentile(load.ttft, 95)
        figures[f"token_{name}_ms_p50"] = harness.median(load.per_token)
        figures[f"token_{name}_ms_p95"] = harness.percentile(load.per_token, 95)
    together, apart = loads[TOGETHER], loads[APART]
    figures["token_apart_over_together"] = harness.median(apart.per_token) / harness.median(
        together.per_token
    )
    figures["ttft_apart_over_together"] = harness.median(apart.ttft) / harness.median(together.ttft)
    figures["share_apart"] = apart.num_apart / max(len(apart.ttft), 1)
    figures["requests_failed"] = together.num_failed + apart.num_failed
    return figures


def show_handing(found: Handing, num_short: int) -> None:
    shown: dict[str, Any] = {**vars(found), "transfer": found.transfer}
    for name, values in shown.items():
        print(f"{name:10}" + " ".join(f"{value * 1e3:9.1f}" for value in values) + " ms")
    print("overlap   " + " ".join(f"{value:9.2f}" for value in found.overlap), flush=True)
    if num_short:
        print(f"{num_short} answers computed more than their tail")


def show_loads(loads: Mapping[str, Load]) -> None:
    for name, load in loads.items():
        print(
            f"{name:10} TTFT p50 {harness.median(load.ttft):8.1f} ms, p95 "
            f"{harness.percentile(load.ttft, 95):8.1f}; a token p50 "
            f"{harness.median(load.per_token):7.2f} ms, p95 "
            f"{harness.percentile(load.per_token, 95):7.2f}; apart {load.num_apart}, "
            f"failed {load.num_failed}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
