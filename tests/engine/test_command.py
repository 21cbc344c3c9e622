"""`kvfabric engine` as a process: says when it is ready, serves, restarts warm, ends on SIGTERM."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvfabric.testing.processes import NodeProcess
from tests.engine import hf_folder

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
READY = "kvfabric engine ready: "
SMALL = {
    "--num-layers": 2,
    "--hidden-size": 64,
    "--num-heads": 4,
    "--num-kv-heads": 2,
    "--head-dim": 16,
    "--intermediate-size": 128,
    "--block-tokens": 16,
    "--hbm-blocks": 256,
    "--window-bytes": "1MiB",
    "--listen": "127.0.0.1:0",
}


OF_FOLDER = {
    "--max-model-tokens": 512,
    **{key: SMALL[key] for key in ("--block-tokens", "--hbm-blocks", "--window-bytes", "--listen")},
}


@contextmanager
def engine(settings: Mapping[str, object]) -> Iterator[str]:
    """A running engine; yields its base URL, ends it with SIGTERM and checks that it went in peace."""
    command = [sys.executable, "-m", "kvfabric", "engine"]
    for name, value in settings.items():
        command += [name, str(value)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: list[str] = []
    try:
        for line in process.stderr:
            log.append(line)
            if line.startswith(READY):
                break
        assert log, "the engine said nothing"
        assert log[-1].startswith(READY), "".join(log)
        yield log[-1].removeprefix(READY).strip()
        process.send_signal(signal.SIGTERM)
        log += process.stderr.readlines()
        assert process.wait(20) == 0, "".join(log)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def complete(base: str, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
    """Token ids and details of cached tokens of a greedy answer."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    with urllib.request.urlopen(f"{base}/v1/completions", data, timeout=30) as response:
        answer = json.load(response)
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]


def test_another_process_is_warm(tmp_path: Path) -> None:
    """Stopped with SIGTERM right after its answer, an engine leaves its blocks to the next one."""
    prompt = random.Random(1).choices(range(3, 259), k=70)
    with NodeProcess(tmp_path / "node") as node:
        settings = {**SMALL, "--node-socket": node.socket}
        with engine(settings) as base:
            first, details = complete(base, prompt)
            assert details["cached_tokens"] == 0
        with engine(settings) as base:
            second, details = complete(base, prompt)
    assert second == first
    reused = {
        "hbm_tokens": 0,
        "host_tokens": 64,
        "ssd_tokens": 0,
        "peer_tokens": 0,
        "miss_reason": "none",
    }
    assert details["kvfabric"] == reused


def test_a_folders_model_is_warm_in_another_process(tmp_path: Path) -> None:
    """Engines over the same folder find each other's blocks; another content of it is another model."""
    folder = hf_folder.write_folder(tmp_path / "small-llama", "llama")
    prompt = random.Random(2).choices(range(3, 259), k=70)
    with NodeProcess(tmp_path / "node") as node:
        settings = {**OF_FOLDER, "--node-socket": node.socket, "--model-path": folder}
        with engine(settings) as base:
            first, details = complete(base, prompt)
            assert details["cached_tokens"] == 0
        with engine(settings) as base:
            second, details = complete(base, prompt)
        assert second == first
        assert details["kvfabric"]["host_tokens"] == 64
        hf_folder.write_weights(folder, hf_folder.tensors("llama", seed=1))
        with engine(settings) as base:
            third, details = complete(base, prompt)
    assert details["cached_tokens"] == 0
    assert third != first


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    """It ends the command with the file that is missing and exit code 2."""
    command = [
        sys.executable,
        "-m",
        "kvfabric",
        "engine",
        "--model-path",
        str(tmp_path / "nothing"),
    ]
    command += ["--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("kvfabric: cannot read ")
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_address_is_one_line(tmp_path: Path) -> None:
    """An address that cannot be had ends the command with its name and exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        command = [sys.executable, "-m", "kvfabric", "engine", "--listen", taken]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("kvfabric: engine.listen")
    assert "Traceback" not in done.stderr
