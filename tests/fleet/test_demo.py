"""`kvfabric demo --quick` from the wheel, without the checkout: it passes, and its report is complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.wheels import EVERYTHING, bare_environment, build, make_environment

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

DEADLINE_S = 300

Demo = tuple[subprocess.CompletedProcess[str], dict[str, Any]]
"""The finished process and its report."""


@pytest.fixture(scope="module")
def quick_demo(
    tmp_path_factory: pytest.TempPathFactory,
) -> Demo:
    directory = tmp_path_factory.mktemp("d")
    wheel = build(tmp_path_factory.mktemp("wheel"))
    python = make_environment(tmp_path_factory.mktemp("full") / "venv", wheel, EVERYTHING)
    done = subprocess.run(
        [python.with_name("kvfabric"), "demo", "--quick", "--report", "report.json"],
        cwd=directory,
        # Where it keeps its fleet: see the last test.
        env=bare_environment() | {"TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert [entry.name for entry in directory.iterdir()] == ["report.json"]  # it cleans up
    return done, json.loads((directory / "report.json").read_text()) | {"directory": directory}


def test_everything_holds(
    quick_demo: Demo,
) -> None:
    """Exit code 0, and no condition failed; if one did, the output says which."""
    done, report = quick_demo
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["passed"]
    assert report["error"] == ""
    assert done.stderr == ""


def test_each_step_checked_something(
    quick_demo: Demo,
) -> None:
    """Five steps, none without conditions, and nothing that only looks like a pass."""
    _, report = quick_demo
    assert [step["title"][0] for step in report["steps"]] == list("12345")
    assert all(step["checks"] for step in report["steps"])
    assert all(check["seen"] for step in report["steps"] for check in step["checks"])


def test_the_report_has_every_figure(
    quick_demo: Demo,
) -> None:
    """What the demo prints can be read from the report, and the sums agree with the rows."""
    done, report = quick_demo
    figures, compare = report["figures"], report["steps"][0]["figures"]
    assert figures["ideal_share_of_whole_log_blocks"] == 0.3664
    assert figures["load_requests_per_s"] == pytest.approx(
        0.7 * figures["capacity_requests_per_s"], rel=0.02
    )
    for run in ("baseline", "fabric"):
        rows = compare[f"{run}_requests"]
        assert len(rows) == figures["requests"]
        reused = sum(row["hbm_tokens"] + row["host_tokens"] + row["ssd_tokens"] for row in rows)
        assert compare[run]["reused_tokens"] == reused
        assert compare[run]["ttft_ms_p50"] > 0
    assert compare["fabric"]["reused_tokens"] >= 0.8 * figures["ideal_tokens"]
    assert compare["baseline"]["host_tokens"] == compare["baseline"]["ssd_tokens"] == 0
    assert "ideal of this slice" in done.stdout
    assert report["steps"][2]["figures"]["receipt_withdrawn"]["audit_head"]


def test_no_process_outlives_the_demo(quick_demo: Demo) -> None:
    """Killed and restarted children included: none is left."""
    assert _processes_that_name(quick_demo[1]["directory"]) == []


def test_a_demo_that_is_stopped_takes_its_processes_with_it(short_path: Path) -> None:
    """SIGTERM in the middle: children and files are gone when it is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfabric", "demo", "--quick"],
        cwd=short_path,
        env=os.environ | {"TMPDIR": str(short_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if "creating tenants" in line:  # the node runs
                break
        assert len(_processes_that_name(short_path)) > 0
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert _processes_that_name(short_path) == []
    assert list(short_path.iterdir()) == []


def _processes_that_name(directory: Path) -> list[list[bytes]]:
    """Command lines that mention it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            if any(part.startswith(os.fsencode(directory)) for part in command):
                found.append(command)
    return found
