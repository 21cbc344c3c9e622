from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvfabric import cli, doctor, pki
from kvfabric.config import NodeConfig
from kvfabric.doctor import FAIL, OK, WARN, Finding
from kvfabric.pki import Identity
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.redis import RedisServer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def node_files(tmp_path: Path) -> NodeConfig:
    return NodeConfig(state_dir=tmp_path, http="")


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_fit_machine_without_a_node_fails_nothing(node_files: NodeConfig) -> None:
    findings = by_subject(doctor.examine(node_files))
    assert {f.subject for f in findings.values() if f.result == FAIL} == set()
    for subject in ("python", "memfd", "pidfd", "state directory"):
        assert findings[subject].result == OK
    assert findings["node socket"].result == WARN
    assert "kvfabric node" in findings["node socket"].advice


def test_everything_that_is_not_ok_says_what_to_do(node_files: NodeConfig) -> None:
    assert all(f.advice for f in doctor.examine(node_files) if f.result != OK)


def test_an_old_python_fails() -> None:
    assert doctor._python((3, 10, 9)).result == FAIL
    assert doctor._python((3, 13, 0)).result == OK


def test_a_missing_extra_is_named_and_only_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = {"node": ("no_such_module", "no_such_package.part"), "engine": ("json",)}
    monkeypatch.setattr(doctor, "EXTRAS", extras)
    missing, there = doctor._extras()
    assert missing.result == WARN
    assert "no_such_module, no_such_package.part" in missing.text
    assert "kvfabric[node]" in missing.advice
    assert there.result == OK


def test_a_state_directory_that_others_may_change_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert doctor._state_directory(tmp_path).result == WARN
    tmp_path.chmod(0o700)
    assert doctor._state_directory(tmp_path).result == OK
    assert doctor._state_directory(tmp_path / "a" / "b").text.endswith("will be made")


def test_direct_io_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    doctor._direct_io(tmp_path / "ssd")
    assert list(tmp_path.iterdir()) == []
    assert doctor._direct_io(Path("/proc/self")).result == WARN


def test_limits_are_compared_with_what_a_node_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2048))
    assert doctor._locked_memory(4096).result == WARN
    assert doctor._locked_memory(1024).result == OK
    assert doctor._descriptors().result == WARN
    assert "2048" in doctor._descriptors().advice


def test_root_is_told_that_its_trust_domain_is_large() -> None:
    assert doctor._trust_domain(0).result == WARN
    assert doctor._trust_domain(1000).result == OK


def test_a_socket_open_to_others_and_a_file_in_its_place_fail(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    path.write_bytes(b"")
    assert "no socket" in doctor._socket(path).text
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        assert doctor._socket(path).result == FAIL
        path.chmod(0o600)
        assert doctor._socket(path).result == OK


@pytest.mark.slow
def test_an_admin_socket_that_nobody_serves_fails(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    found = doctor._admin(path)
    assert found.result == FAIL
    assert "no node answers" in found.text


@pytest.mark.parametrize(("code", "result"), [(200, OK), (503, WARN)])
def test_http_is_asked_whether_the_node_is_ready(code: int, result: str) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        found = doctor._http(f"127.0.0.1:{server.server_port}", running=True)
        thread.join()
    assert found.result == result


def test_http_that_is_silent_fails_only_beside_a_running_node() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert doctor._http(address, running=True).result == FAIL
        assert doctor._http(address, running=False).result == WARN
    assert doctor._http("", running=True).result == OK


def test_command_exits_with_1_only_for_a_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--state-dir", str(tmp_path), "--http", "", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (tmp_path / "node.sock").write_bytes(b"")
    assert cli.main(arguments[:-1]) == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if "node socket" in x)
    assert line.startswith("fail")
    assert "-> move it away" in line


@pytest.mark.slow
def test_doctor_runs_without_any_extra(tmp_path: Path) -> None:
    """In a process where none of the extras' modules can be imported."""
    script = f"""
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"grpc", "google", "grpc_health", "lmdb", "aiohttp",
                                   "cryptography", "torch", "prometheus_client", "ucxx"}}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Bare())
import argparse
from kvfabric.doctor import COMMAND
parser = argparse.ArgumentParser()
COMMAND.configure(parser)
sys.exit(COMMAND.run(parser.parse_args(["--state-dir", {str(tmp_path)!r}, "--http", ""])))
"""
    (tmp_path / "admin.sock").write_bytes(b"")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kvfabric[node]" in done.stdout
    assert "not asked: " in done.stdout


@pytest.mark.slow
def test_the_parts_of_a_fleet(tmp_path: Path) -> None:
    """Directory, lease and certificate, fit and unfit."""

    def findings(**options: Any) -> dict[str, Finding]:
        config = NodeConfig(state_dir=tmp_path / "node", http="", **options)
        return {finding.subject: finding for finding in doctor.examine(config)}

    assert not {"directory", "certificate", "insecure", "epoch lease"} & set(findings())
    server = RedisServer(tmp_path / "redis")
    unfit = findings(directory=server.url, insecure=True, tls_dir=str(tmp_path / "nothing"))
    assert "does not answer" in unfit["directory"].text
    assert unfit["certificate"].result == unfit["directory"].result == FAIL
    assert unfit["insecure"].result == WARN
    pki.init(tmp_path / "pki")
    short = pki.issue(tmp_path / "pki", Identity("node", "n1"), days=3)
    with server:
        server.call("CONFIG", "SET", "appendfsync", "everysec")
        found = findings(directory=server.url, tls_dir=str(short))
        assert "appendfsync" in found["directory"].text
        assert found["certificate"].result == WARN
        server.call("CONFIG", "SET", "appendfsync", "always")
        with NodeProcess(tmp_path / "node", directory=server.url, epoch_lease_s=0.3):
            config = findings(directory=server.url)
            assert config["directory"].result == OK
            until(lambda: findings(directory=server.url)["epoch lease"].result == OK)
            server.kill()
            until(lambda: findings(directory=server.url)["epoch lease"].result == WARN)
            lease = findings(directory=server.url)["epoch lease"]
            assert "no_lease" in lease.text
