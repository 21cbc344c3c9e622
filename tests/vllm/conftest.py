"""Tests of the vLLM connector run in vLLM's environment (`make test-vllm`); elsewhere none is collected."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.testing.processes import NodeProcess

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Read when vLLM is imported: one compute thread on a core of its own, everything in the test's own process.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


PYTHON = str(Path(__file__).parents[2] / ".venv" / "bin" / "python")
"""Of the project's own environment, for its nodes and routers."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.vllm.checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch
) -> Iterator[NodeProcess]:
    """A node, which the engines of this module find by the variable."""
    with make_node(tmp_path_factory.mktemp("node")) as node:
        monkeypatch_module.setenv("KVFABRIC_ENGINE_NODE_SOCKET", str(node.socket))
        yield node


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def make_node(state_dir: Path, **options: object) -> NodeProcess:
    """A node in the project's own environment, with an SSD tier."""
    return NodeProcess(state_dir, python=PYTHON, ssd_bytes=256 << 20, **options)


class _Said(logging.Filter):
    """Not a handler: vLLM configures its loggers anew with its first engine, and that drops handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())
        return True


LOGGERS = ("vllm.kvfabric", "kvfabric_engine.boundary")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What a user of vLLM reads in its log of the fabric: warnings and errors."""
    seen, loggers = _Said(), [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(seen)
    yield seen.lines
    for logger in loggers:
        logger.removeFilter(seen)
