"""What a service manager is told, when: real nodes and a socket as systemd has it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.supervisor import notify
from kvfabric.testing.processes import NodeProcess, RouterProcess

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

DEADLINE_S = 20.0


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The receiving end; processes started meanwhile are told where it is."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield sock


def _hear(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def _silent(manager: socket.socket) -> bool:
    manager.setblocking(False)
    try:
        manager.recv(4096)
    except BlockingIOError:
        return True
    finally:
        manager.settimeout(DEADLINE_S)
    return False


def test_ready_once_it_serves(tmp_path: Path, manager: socket.socket) -> None:
    """A node and a router; when they are stopped there is nothing more to say."""
    with NodeProcess(tmp_path / "node"):
        assert _hear(manager) == "READY=1"
        with RouterProcess(tmp_path / "node"):
            assert _hear(manager) == "READY=1"
    assert _silent(manager)


def test_a_successor_is_named_before_the_old_one_ends(
    tmp_path: Path, manager: socket.socket
) -> None:
    """So the manager never sees the process that it watches go without knowing the next."""
    with NodeProcess(tmp_path / "node") as old:
        assert _hear(manager) == "READY=1"
        with NodeProcess(tmp_path / "node", takeover=True) as new:
            assert {_hear(manager), _hear(manager)} == {f"MAINPID={new.pid}", "READY=1"}
            assert old.wait() == 0
    assert _silent(manager)


def test_so_it_is_when_nothing_fits(tmp_path: Path, manager: socket.socket) -> None:
    """A smaller index takes nothing over: the old node ends, and the new one is the one to watch."""
    with NodeProcess(tmp_path / "node", max_blocks=4096) as old:
        assert _hear(manager) == "READY=1"
        with NodeProcess(tmp_path / "node", takeover=True, max_blocks=256) as new:
            heard = [_hear(manager), _hear(manager)]
            assert old.wait() == 0
            assert sorted(heard) == [f"MAINPID={new.pid}", "READY=1"]


def test_a_failed_takeover_changes_nothing(tmp_path: Path, manager: socket.socket) -> None:
    """The successor dies before it agrees: the old one serves on, and stays the one to watch."""
    with NodeProcess(tmp_path / "node") as old:
        assert _hear(manager) == "READY=1"
        with pytest.raises(RuntimeError):
            NodeProcess(tmp_path / "node", takeover=True, failpoint="takeover.restored").start()
        assert old.is_running()
        assert _silent(manager)


def test_a_manager_that_is_gone_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log; and without one, not even that."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")
    assert "does not hear READY=1" in caplog.text
    caplog.clear()
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
    assert not caplog.text


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with an @, as sd_notify(3) has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(b"")  # the kernel gives it an abstract address
        sock.settimeout(DEADLINE_S)
        name = sock.getsockname()
        assert isinstance(name, bytes)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        notify("READY=1")
        assert _hear(sock) == "READY=1"
