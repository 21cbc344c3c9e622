"""One vLLM engine in a process of its own, for `vllm_process.py`: JSON lines over the socket that is given.

Scheduler, worker and caller share the process (VLLM_ENABLE_V1_MULTIPROCESSING=0). The first line holds the
arguments of `vllm.LLM`; then each line asks for one thing and gets one answer. Times are CLOCK_MONOTONIC, so
that those of two processes can be compared.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

POLL_S, ANSWER_S = 0.001, 0.0001
IDLE_STEP_S = 0.001
"""What vLLM's engine sleeps after a step that computed nothing, in a process of its own."""

# vLLM 0.32 asks everything that was imported for its __dict__; llvmlite, which LMCache imports, takes that
# for a function of its library.
importlib.import_module("llvmlite.binding.ffi").lib._fntab["__dict__"] = {}


class Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._llm = LLM(**arguments)
        self._num_requests = 0
        self._computed = 0.0
        if arguments.get("kv_transfer_config"):
            self._watch_saves(get_kv_transfer_group())

    def _watch_saves(self, worker: Any) -> None:
        """Note when a step had computed its tokens: then vLLM tells the worker's connector to save."""
        save = worker.wait_for_save

        def wait_for_save() -> None:
            self._computed = time.monotonic()
            save()

        worker.wait_for_save = wait_for_save

    def ask(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        handle: str = "",
        salt: str = "",
        request_id: str = "",
    ) -> dict[str, Any]:
        """Answer greedily. `first`: seconds from the request to that token. `handle`, `salt` and `request_id`
        are a router's.

        `computed` and `ended`: when the last step had computed its tokens, and when the answer was there.
        """
        engine = self._llm.llm_engine
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": {"kvfabric": handle}} if handle else None,
        )
        prompt = {"prompt_token_ids": list(tokens)} | ({"cache_salt": salt} if salt else {})
        self._num_requests += 1
        begun = time.monotonic()
        engine.add_request(request_id or f"ask-{self._num_requests}", prompt, params)
        first = 0.0
        while True:
            if not (outputs := engine.step()):
                time.sleep(IDLE_STEP_S)
            for output in outputs:
                now = time.monotonic()
                first = first or now
                if output.finished:
                    return {
                        "first": first - begun,
                        "computed": self._computed,
                        "ended": now,
                        "token_ids": list(output.outputs[0].token_ids),
                        "cached": output.num_cached_tokens or 0,
                    }

    def drop_hbm(self) -> dict[str, Any]:
        """Empty vLLM's own prefix cache; what lies outside stays. Waits until no block is in use."""
        begun = time.monotonic()
        while not self._llm.reset_prefix_cache():
            self._llm.llm_engine.step()  # a finished request whose blocks are still read
            if time.monotonic() - begun > 30:
                raise RuntimeError("vLLM did not reset its prefix cache")
        return {}

    def wait_match(
        self, tokens: Sequence[int], num_tokens: int, deadline_s: float
    ) -> dict[str, Any]:
        """Look `tokens` up outside, through the hooks that vLLM's scheduler calls, until so many are found.

        Nothing is loaded or computed.
        """
        begun = time.monotonic()
        looked = 0
        while True:
            found = self._look_up(tokens)
            looked += 1
            now = time.monotonic()
            if found >= num_tokens or now - begun > deadline_s:
                return {"at": now, "found": found, "looked": looked, "each": (now - begun) / looked}
            time.sleep(POLL_S)

    def _look_up(self, tokens: Sequence[int]) -> int:
        connector = self._llm.llm_engine.engine_core.engine_core.scheduler.connector
        self._num_requests += 1
        request = Request(
            f"look-{self._num_requests}", list(tokens), SamplingParams(max_tokens=1), None
        )
        connector.on_new_request(request)
        while (found := connector.get_num_new_matched_tokens(request, 0)[0]) is None:
            time.sleep(ANSWER_S)
        connector.update_state_after_alloc(request, KVCacheBlocks(([],)), 0)  # nothing to load
        connector.request_finished_all_groups(request, ([],))
        return int(found)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    with channel, channel.makefile("r") as lines, channel.makefile("w") as answers:
        engine = Engine(json.loads(lines.readline()))
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in lines:
            order = json.loads(line)
            done = getattr(engine, order.pop("do"))(**order)
            print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    main()
