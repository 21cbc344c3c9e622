"""`kvfabric demo --nodes 3 --directory redis://...` as a process, with a real Redis; and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from kvfabric.cli import main
from kvfabric.demo.processes import free_addresses
from kvfabric.testing.redis import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

DEADLINE_S = 240


def test_three_machines(tmp_path: Path, short_path: Path) -> None:
    """Everything holds, blocks went from machine to machine, and nothing stays in Redis."""
    ((_, port),) = (one.split(":") for one in free_addresses(1))
    home = short_path
    with RedisServer(tmp_path / "redis", port=port, bind="127.0.0.1") as redis:
        url = f"redis://127.0.0.1:{port}"
        done = subprocess.run(
            [*_demo("--quick", "--nodes", "3", "--directory", url), "--report", "report.json"],
            cwd=home,
            env=os.environ | {"TMPDIR": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        with Redis(unix_socket_path=str(redis.socket)) as client:
            assert client.keys() == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert [entry.name for entry in home.iterdir()] == ["report.json"]
    report = json.loads((home / "report.json").read_text())
    assert report["passed"]
    assert report["figures"]["nodes"] == 3
    reuse, withdraw, survive = report["steps"]
    assert all(step["checks"] for step in report["steps"])
    assert reuse["figures"]["blocks_of_other_machines"] > 0
    assert len(withdraw["figures"]["receipt_withdrawn"]["acknowledgements"]) == 4
    assert survive["figures"]["explained_loss"]["miss"]["reason"] == "absent"


def _demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvfabric", "demo", *arguments]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nodes", "3"], "--directory redis://HOST:PORT"),
        (["--nodes", "0"], "it must be 1 to 16"),
        (["--nodes", "17", "--directory", "redis://h"], "it must be 1 to 16"),
        (["--directory", "redis://h"], "say --nodes 3"),
        (["--nodes", "3", "--directory", "http://h"], "'http' is none of redis"),
        (["--nodes", "3", "--directory", "redis://h?fabric=ours"], "leave out fabric="),
        (["--nodes", "3", "--directory", "redis://u:secret@h"], "shows in `ps`"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "secret" not in told


def test_a_redis_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said at once, before anything is started."""
    (address,) = free_addresses(1)
    report = tmp_path / "report.json"
    arguments = ["--nodes", "3", "--directory", f"redis://{address}", "--report", str(report)]
    assert main(["demo", *arguments]) == 1
    assert f"no Redis at redis://{address}" in capsys.readouterr().out
    assert json.loads(report.read_text())["error"]
