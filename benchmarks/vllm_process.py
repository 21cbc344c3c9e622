"""vLLM in a process of its own (`vllm_engine.py`), and the model it runs, for benchmarks on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

BLOCK_TOKENS = 128  # vLLM's on the CPU
VOCAB = 512
ANSWER_TOKENS = 16
START_S, ANSWER_S = 300.0, 120.0
FABRIC = {
    "kv_connector": "KVFabricConnector",
    "kv_connector_module_path": "kvfabric_engine.integrations.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
Row = dict[str, Any]


def environment_of(node_socket: Path, core: int) -> dict[str, str]:
    """Of an engine that computes with one thread, on that core."""
    return QUIET | {
        "KVFABRIC_ENGINE_NODE_SOCKET": str(node_socket),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),  # for workers of their own; here it is these
        "OMP_NUM_THREADS": "1",
        "OMP_PLACES": f"{{{core}}}",
        "OMP_PROC_BIND": "true",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_NO_USAGE_STATS": "1",
}


def write_checkpoint(folder: Path, *, layers: int, hidden: int, kv_heads: int, seed: int) -> Path:
    """A Llama of random float32 weights whose answers depend on the KV; dummy weights' would not."""
    import torch
    from safetensors.torch import save_file

    kv = kv_heads * 64
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, deviation: float = 0.8) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return drawn.mul_(deviation / columns**0.5)

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, hidden, hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(VOCAB, hidden),
    }
    for layer in range(layers):
        shapes = {"self_attn.q_proj": hidden, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        shapes |= {"self_attn.o_proj": hidden, "mlp.gate_proj": hidden}
        shapes |= {"mlp.up_proj": hidden, "mlp.down_proj": hidden}
        name = f"model.layers.{layer}."
        weights |= {f"{name}{key}.weight": normal(rows, hidden) for key, rows in shapes.items()}
        weights[name + "input_layernorm.weight"] = torch.ones(hidden)
        weights[name + "post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class EngineProcess:
    """A `vllm_engine.py`: a context manager that starts it without waiting."""

    def __init__(
        self,
        name: str,
        arguments: Row,
        folder: Path,
        environment: dict[str, str],
        *,
        python: str = sys.executable,
    ) -> None:
        """`python`: of an environment that has vLLM. `folder`: where its output goes."""
        self.name = name
        self._log = folder / f"{name}.log"
        ours, theirs = socket.socketpair()
        ours.settimeout(START_S)
        with theirs, self._log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    python,
                    str(Path(__file__).with_name("vllm_engine.py")),
                    str(theirs.fileno()),
                ],
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        self._lines = ours.makefile("rw")
        self._send(arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self._socket.close()
        self._process.terminate()  # nothing of it is wanted any more
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_ready(self) -> None:
        self._answer()
        self._socket.settimeout(ANSWER_S)

    def do(self, order: str, **arguments: object) -> Row:
        self._send({"do": order, **arguments})
        return self._answer()

    def ask(self, tokens: Sequence[int], max_tokens: int = ANSWER_TOKENS, **fields: str) -> Row:
        """`fields`: handle and salt, of a request that comes through a router."""
        return self.do("ask", tokens=list(tokens), max_tokens=max_tokens, **fields)

    def _send(self, order: Row) -> None:
        self._lines.write(json.dumps(order) + "\n")
        self._lines.flush()

    def _answer(self) -> Row:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text()[-4000:]}")
        answer: Row = json.loads(line)
        return answer
