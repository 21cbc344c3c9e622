"""vLLM in the test's own process, and the gate for "the same answer"."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvfabric_engine.connector import Connector, ConnectorStatistics
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvfabric.handle import Handle, mint
from kvfabric.hashing import layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import DEFAULT_TENANT

FLAG = {
    "kv_connector": "KVFabricConnector",
    "kv_connector_module_path": "kvfabric_engine.integrations.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
ANSWER_TOKENS = 16
TIE = 1e-4
"""Two best logits nearer than this may change places by the rounding of another batch shape."""
MAX_TIES = 1 / 200
WAIT_S = 30.0
RANK_TRIES = 6


class Answer(NamedTuple):
    """Greedy. `gaps`: between the two best logits, a token each; empty unless asked for."""

    token_ids: tuple[int, ...]
    num_cached: int
    gaps: tuple[float, ...] = ()


def prompt(num_tokens: int, *, seed: int, start: Sequence[int] = ()) -> list[int]:
    """Random tokens after `start`."""
    fresh = random.Random(seed).choices(range(3, 500), k=num_tokens - len(start))
    return [*start, *fresh]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Vllm:
    """One engine. `fabric` False: without a connector."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        fabric: bool = True,
        extra: Mapping[str, Any] | None = None,
        **args: Any,
    ) -> None:
        transfer = KVTransferConfig(**FLAG, kv_connector_extra_config=dict(extra or {}))
        defaults: dict[str, Any] = {
            "model": str(checkpoint),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_batched_tokens": 512,  # longer prompts are computed in chunks
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 128,
            "seed": 0,
        }
        if fabric:
            defaults["kv_transfer_config"] = transfer
        self.llm = LLM(**(defaults | args))
        self._core = self.llm.llm_engine.engine_core.engine_core
        if fabric:
            self.ask([prompt(8, seed=0)])  # the first step joins the workers to the session

    @property
    def scheduler(self) -> Any:
        return self._core.scheduler

    @property
    def fabric(self) -> Connector:
        """The scheduler's."""
        found = self.scheduler.connector.fabric
        assert isinstance(found, Connector)
        return found

    @property
    def worker(self) -> Any:
        """The worker's KVFabricConnector."""
        return get_kv_transfer_group()

    def statistics(self) -> ConnectorStatistics:
        found: ConnectorStatistics = self.worker.fabric.statistics()
        return found

    def ask(
        self, prompts: Sequence[Sequence[int]], *, logits: bool = False, **fields: Any
    ) -> list[Answer]:
        """Answer a batch. `fields` are added to every prompt (cache_salt, items) or, `handles`, one to each.

        `lora`: the LoRARequest of all of them. `embeddings`: what stands for the tokens.
        """
        handles = fields.pop("handles", [None] * len(prompts))
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=fields.get("max_tokens", ANSWER_TOKENS),
                ignore_eos=True,
                logprobs=2 if logits else None,
                extra_args={"kv_transfer_params": {"kvfabric": handle}} if handle else None,
            )
            for handle in handles
        ]
        more: dict[str, Any] = (
            {"cache_salt": fields["cache_salt"]} if "cache_salt" in fields else {}
        )
        more |= {"multi_modal_data": fields["items"]} if "items" in fields else {}
        more |= {"multi_modal_uuids": fields["uuids"]} if "uuids" in fields else {}
        inputs: list[Any] = [{"prompt_token_ids": list(p), **more} for p in prompts]
        if "embeddings" in fields:
            inputs = [{"prompt_embeds": rows, **more} for rows in fields["embeddings"]]
        outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=fields.get("lora"))
        return [_answer(output) for output in outputs]

    def answer(self, tokens: Sequence[int], **fields: Any) -> Answer:
        return self.ask([tokens], **fields)[0]

    def wait_saved(self) -> None:
        """Until nothing is being saved."""
        wait_for(lambda: self.statistics().saving_bytes == 0)

    def store(self, prompts: Sequence[Sequence[int]], **fields: Any) -> list[Answer]:
        """Answer, and wait until the node has the blocks."""
        answers = self.ask(prompts, **fields)
        self.wait_saved()
        return answers

    def num_matched(self, tokens: Sequence[int]) -> int:
        """Leading blocks of `tokens` that the node holds for requests without a handle."""
        opened = self.fabric.open("probe", "", "", tokens).result()
        assert opened.keys is not None
        match = self.fabric.match("probe", opened.keys.first(len(tokens))).result()
        self.fabric.release("probe")
        return match.num_blocks

    def wait_matched(self, prompts: Sequence[Sequence[int]], blocks: Sequence[int]) -> None:
        """Until the node holds so many leading blocks of each prompt."""
        wait_for(lambda: [self.num_matched(p) for p in prompts] == list(blocks))

    def wait_matched_by_ranks(
        self, prompts: Sequence[Sequence[int]], blocks: Sequence[int]
    ) -> None:
        """As `wait_matched`, with workers in processes of their own: a rank that saves after the scheduler
        has released a finished request stores nothing, and what is missing is stored when computed again."""
        for _ in range(RANK_TRIES):
            until = time.monotonic() + WAIT_S / RANK_TRIES
            while time.monotonic() < until:
                if [self.num_matched(p) for p in prompts] == list(blocks):
                    return
                time.sleep(0.005)
            self.drop_hbm()
            self.ask(prompts)
        self.wait_matched(prompts, blocks)

    def drop_hbm(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self._core, self.llm
        cleanup_dist_env_and_memory()


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    gaps = []
    for step in completion.logprobs or ():
        best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
        gaps.append(best - second)
    return Answer(tuple(completion.token_ids), output.num_cached_tokens or 0, tuple(gaps))


@contextmanager
def running(checkpoint: Path, **args: Any) -> Iterator[Vllm]:
    engine = Vllm(checkpoint, **args)
    try:
        yield engine
    finally:
        engine.stop()


class Minter:
    """What a router would mint for this engine now."""

    def __init__(self, engine: Vllm, node: NodeProcess) -> None:
        self._engine = engine
        self._keyring = Keyring.open(node.state_dir)

    @property
    def session(self) -> bytes:
        return self._engine.fabric.session

    def __call__(self, request_id: str = "", **fields: object) -> str:
        key_id, key = self._keyring.current_handle_key()
        connector = self._engine.fabric
        values: dict[str, object] = {
            "version": 1,
            "key_id": key_id,
            "tenant": DEFAULT_TENANT,
            "model_revision": connector._options.model_revision,
            "adapter": "",
            "adapter_revision": "",
            "layout_fingerprint": layout_fingerprint(connector._layout),
            "segments": (),
            "public_tokens": 0,
            "cacheable_tokens": -1,
            "epochs": (),
            "audience": connector.session,
            "request_id": request_id,
            "expires_at": int(time.time()) + 600,
        }
        return mint(Handle(**(values | fields)), key)  # type: ignore[arg-type]


class Gate:
    """Right answers of prompts, from an engine without the fabric."""

    def __init__(self) -> None:
        self._right: dict[tuple[int, ...], Answer] = {}
        self.num_checked = self.num_ties = 0

    def learn(self, engine: Vllm, prompts: Sequence[Sequence[int]], **fields: Any) -> None:
        """`engine` has no fabric; each prompt is computed alone and cold."""
        for tokens in prompts:
            engine.drop_hbm()
            self._right[tuple(tokens)] = engine.answer(tokens, logits=True, **fields)

    def right(self, tokens: Sequence[int]) -> Answer:
        return self._right[tuple(tokens)]

    def differing(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> int:
        """How many answers differ from the right ones by more than a tie; ties are counted."""
        wrong = 0
        for tokens, answer in zip(prompts, answers, strict=True):
            right = self._right[tuple(tokens)]
            length = min(len(right.token_ids), len(answer.token_ids))
            first = next(
                (i for i in range(length) if right.token_ids[i] != answer.token_ids[i]), None
            )
            self.num_checked += 1
            if first is not None and right.gaps[first] < TIE:
                self.num_ties += 1
                print(f"tie at token {first}: gap {right.gaps[first]:.2e}")
            elif first is not None:
                print(f"another token at {first}: gap {right.gaps[first]:.2e}")
                wrong += 1
        return wrong

    def check(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> None:
        """Assert that the answers are right."""
        assert self.differing(prompts, answers) == 0
        assert self.num_ties <= max(1, MAX_TIES * self.num_checked)


def parts_of(audit: Path, rank: int, op: str) -> set[tuple[str, str]]:
    """(key, checksum) of every part that a rank stored or loaded."""
    entries = [json.loads(line) for line in Path(f"{audit}.{rank}").read_text().splitlines()]
    return {(e["key"], e["checksum"]) for e in entries if e["op"] == op}


@contextmanager
def first_block_for_all(engine: Vllm) -> Iterator[None]:
    """Meanwhile every load gets the first block that was loaded in place of its own first one."""
    mover = engine.worker._worker._mover
    scatter, kept = mover.scatter, []

    def swapped(data: Sequence[memoryview], blocks: Sequence[Sequence[int]]) -> None:
        kept.append(bytes(data[0]))
        scatter([memoryview(kept[0]), *data[1:]], blocks)

    mover.scatter = swapped
    try:
        yield
    finally:
        del mover.scatter


def in_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread
