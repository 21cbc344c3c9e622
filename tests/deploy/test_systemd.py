"""The units under a real service manager: a user's systemd, with mounts and a cgroup of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvfabric.testing.engine import TinyEngine, wrong_blocks
from kvfabric.testing.processes import until

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
MANAGER = Path("/lib/systemd/systemd")
PATIENCE_S = 30.0


def _cgroups() -> Path | None:
    """Where the unified hierarchy is mounted."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)


def _can_be_had() -> bool:
    if not MANAGER.exists() or not shutil.which("systemctl") or _cgroups() is None:
        return False
    tried = subprocess.run(["unshare", "--mount", "--cgroup", "true"], check=False)
    return tried.returncode == 0


@dataclass
class Systemd:
    """`call` is systemctl of this manager."""

    runtime: Path
    process: subprocess.Popen[bytes]

    def call(self, *arguments: str) -> str:
        command = ["systemctl", "--user", *arguments]
        environment = os.environ | {"XDG_RUNTIME_DIR": str(self.runtime)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3) and arguments[0] != "status":  # 3: a unit is not active
            print(self.call("status", *arguments[1:]))
        assert done.returncode in (0, 3), done.stderr
        return done.stdout.strip()

    def show(self, unit: str, what: str) -> str:
        return self.call("show", unit, "--value", "--property", what)


@contextmanager
def systemd(directory: Path) -> Iterator[Systemd]:
    """It reads units from `directory`/units. Its /run is its own, so that it believes in being booted, and so
    is its root of cgroups, because it moves whatever it finds there."""
    runtime = directory / "run"
    runtime.mkdir(mode=0o700)
    mounted = _cgroups()
    assert mounted is not None
    cgroup = mounted / f"kvfabric-test-{os.getpid()}-{directory.name}"
    cgroup.mkdir()
    script = textwrap.dedent(
        f"""
        mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 1
        mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system || exit 1
        exec {MANAGER} --user --unit=basic.target --log-level=warning --log-target=console
        """
    )
    join = f'echo $$ > {cgroup}/cgroup.procs && exec unshare --mount --cgroup sh -c "$0"'
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "XDG_RUNTIME_DIR": str(runtime),
        "SYSTEMD_UNIT_PATH": f"{directory}/units:/usr/lib/systemd/user",
    }
    before = Path("/proc/self/cgroup").read_text()
    with open(directory / "manager.log", "wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", join, script], env=environment, stdout=log, stderr=log
        )
    manager = Systemd(runtime, process)
    try:
        until(lambda: (runtime / "systemd" / "private").exists(), deadline_s=PATIENCE_S)
        yield manager
    finally:
        manager.call("exit", "--no-block")
        process.wait(PATIENCE_S)
        for folder, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(folder)
    assert Path("/proc/self/cgroup").read_text() == before, "the machine's own are as they were"


def _install(directory: Path) -> None:
    """The units as they are, but for user, paths and the directories that systemd would make."""
    (directory / "units").mkdir()
    config = (UNITS / "kvfabric.toml").read_text()
    for old, new in (
        ('"/var/lib/kvfabric"', f'"{directory}/state"'),
        ('"64GiB"', '"64MiB"'),
        ('"500GiB"', '"64MiB"'),
        ("127.0.0.1:9470", "127.0.0.1:0"),
        ("127.0.0.1:8000", "127.0.0.1:0"),
        (
            "require_handle = true",
            "require_handle = false",
        ),  # no router here vouches for the engine
    ):
        assert old in config
        config = config.replace(old, new)
    (directory / "kvfabric.toml").write_text(config)
    for unit in UNITS.glob("*.service"):
        text = unit.read_text()
        text = text.replace("/opt/kvfabric/bin/kvfabric", f"{sys.executable} -m kvfabric")
        text = text.replace("/etc/kvfabric/kvfabric.toml", f"{directory}/kvfabric.toml")
        text = re.sub(
            r"^(User|Group|StateDirectory\w*|ConfigurationDirectory)=.*\n", "", text, flags=re.M
        )
        # A manager in a namespace may make no further mounts. The other limits hold.
        text = re.sub(r"^(Protect|Private)\w+=.*\n", "", text, flags=re.M)
        output = f"StandardOutput=append:{directory}/{unit.stem}.log"
        text = text.replace("[Service]\n", f"[Service]\n{output}\n")
        (directory / "units" / unit.name).write_text(text)


@pytest.mark.skipif(not _can_be_had(), reason="needs systemd, and the right to make namespaces")
def test_reload_upgrades_and_keeps_everything(tmp_path: Path) -> None:
    """Another process is the service, the engine's connection and its blocks are where they were; the router
    comes up beside it; a stop ends both."""
    _install(tmp_path)
    node, router = "kvfabric-node.service", "kvfabric-router.service"
    with ExitStack() as stack:
        manager = stack.enter_context(systemd(tmp_path))
        manager.call("start", node, router)
        assert manager.show(node, "ActiveState") == manager.show(router, "ActiveState") == "active"
        first = manager.show(node, "MainPID")
        engine = TinyEngine.connect(tmp_path / "state" / "node.sock")
        stack.callback(engine.client.close)
        keys = engine.open("r", "prompt", 4)
        assert engine.store("r", keys) == 4
        engine.release("r")

        manager.call("reload", node)
        until(lambda: manager.show(node, "MainPID") != first, deadline_s=PATIENCE_S)
        until(lambda: not Path(f"/proc/{first}").exists(), deadline_s=PATIENCE_S)
        assert manager.show(node, "ActiveState") == "active"
        assert manager.show(node, "NRestarts") == "0"
        second = manager.show(node, "MainPID")
        assert b"--takeover" in Path(f"/proc/{second}/cmdline").read_bytes()
        keys = engine.open("again", "prompt", 4)
        found = engine.load("again", keys)
        assert (len(found), wrong_blocks(keys, found)) == (4, 0)
        engine.release("again")

        manager.call("kill", "--signal=SIGKILL", node)
        until(lambda: manager.show(node, "NRestarts") == "1", deadline_s=PATIENCE_S)
        until(lambda: manager.show(node, "ActiveState") == "active", deadline_s=PATIENCE_S)
        manager.call("stop", node, router)
        assert manager.show(node, "Result") == manager.show(router, "Result") == "success"


@pytest.mark.skipif(not _can_be_had(), reason="needs systemd, and the right to make namespaces")
def test_without_a_word_about_the_successor_the_service_is_over(tmp_path: Path) -> None:
    """The twin: systemd hears nothing, sees the process that it watches end, and ends the other."""
    _install(tmp_path)
    unit = tmp_path / "units" / "kvfabric-node.service"
    text = unit.read_text()
    unit.write_text(text.replace("Type=notify\nNotifyAccess=all", "Type=exec\nNotifyAccess=none"))
    with systemd(tmp_path) as manager:
        manager.call("start", unit.name)
        until((tmp_path / "state" / "node.sock").exists, deadline_s=PATIENCE_S)
        until((tmp_path / "state" / "takeover.sock").exists, deadline_s=PATIENCE_S)
        manager.call("reload", unit.name)
        until(lambda: manager.show(unit.name, "ActiveState") == "inactive", deadline_s=PATIENCE_S)
        until(lambda: manager.show(unit.name, "MainPID") == "0", deadline_s=PATIENCE_S)
