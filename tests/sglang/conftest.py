"""Tests of the SGLang storage: run in SGLang's environment (`make test-sglang`); elsewhere none is."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfabric.testing.processes import NodeProcess

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]
PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"

os.environ |= {"HF_HUB_OFFLINE": "1", "SGLANG_LOGGING_LEVEL": "ERROR"}

# torchvision's wheel is built for CUDA and cannot be imported beside a torch that is not, unless the
# operators it describes are known. SGLang imports it for images; nothing here runs an operator of it.
_library: Any = torch.library
_operators: Any = None  # they are known for as long as this lives
if not collect_ignore_glob and torch.version.cuda is None:
    _operators = _library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node in the project's own environment."""
    with NodeProcess(tmp_path_factory.mktemp("node"), python=str(PYTHON)) as node:
        yield node


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., None]:
    """Publishes the configuration of a server, as its scheduler process does. `weights`: of the model."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    numbers = itertools.count()

    def publish(*, weights: bytes = b"weights", config: Any = LLAMA, **arguments: Any) -> None:
        folder = tmp_path / f"model{next(numbers)}"  # SGLang remembers what it read of a path
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights)
        args = ServerArgs(model_path=str(folder), device="cpu", **arguments)
        runtime_context.publish(args, role="scheduler")

    publish()
    return publish
