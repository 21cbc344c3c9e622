"""Over every test: nothing leaks out of a module, CI skips nothing silently, and timings run alone."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

SKIPS = Path(__file__).with_name("SKIPS")
_LEAK_GRACE_S = 2.0

_skipped = pytest.StashKey[dict[str, str]]()
_before = pytest.StashKey[Counter[str]]()
_held = pytest.StashKey[contextlib.ExitStack | None]()


# --- what CI may skip: only what tests/SKIPS lists, with its reason ---


def listed_skips() -> list[tuple[str, str]]:
    """(pattern of test ids, reason) of each line of tests/SKIPS."""
    rows = []
    for line in SKIPS.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.partition(" | ")
            if not reason.strip():
                raise pytest.UsageError(f"{SKIPS.name}: no reason given for {pattern.strip()!r}")
            rows.append((pattern.strip(), reason.strip()))
    return rows


def unlisted_skips(skipped: dict[str, str]) -> dict[str, str]:
    """Of `skipped` (test id -> why) those that no line of tests/SKIPS allows."""
    allowed = [pattern for pattern, _ in listed_skips()]
    return {
        test: why
        for test, why in skipped.items()
        if not any(fnmatch.fnmatchcase(test, pattern) for pattern in allowed)
    }


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped] = {}
    config.stash[_held] = None
    config.pluginmanager.register(_SkipsSeen(config))


class _SkipsSeen:
    """Reports reach this wherever they were made: with several worker processes, from all of them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._config.stash[_skipped][report.nodeid] = _why(report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._config.stash[_skipped][report.nodeid] = _why(report.longrepr)


def _why(longrepr: object) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def _is_ci() -> bool:
    return bool(os.environ.get("CI"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_ci() and session.exitstatus == 0 and unlisted_skips(session.config.stash[_skipped]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    unlisted = unlisted_skips(config.stash[_skipped]) if _is_ci() else {}
    if unlisted:
        terminalreporter.section("skipped without a line in tests/SKIPS", red=True)
    for test, why in unlisted.items():
        terminalreporter.line(f"{test}: {why}")


# --- the order: with several worker processes, none is left with a long file at the end ---

_LONG_FIRST = ("torture", "fleet", "simulation", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _LONG_FIRST.index(folder) if folder in _LONG_FIRST else len(_LONG_FIRST)

    items.sort(key=rank)


# --- what measures times runs alone, while other worker processes wait ---


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:
            # Closing is not enough: a forked child has it open too.
            fcntl.flock(file, fcntl.LOCK_UN)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    if not hasattr(item.config, "workerinput"):
        return (yield)  # one process runs everything
    machine, gate = Path(__file__), SKIPS  # any two files will do
    if _is_alone(item):
        held = item.config.stash[_held]
        if held is None:
            held = item.config.stash[_held] = contextlib.ExitStack()
            held.enter_context(_locked(gate, fcntl.LOCK_EX))
            held.enter_context(_locked(machine, fcntl.LOCK_EX))
        try:
            return (yield)
        finally:
            if not _is_alone(nextitem):  # else the others would be let in for one test each
                item.config.stash[_held] = None
                held.close()
    with _locked(gate, fcntl.LOCK_SH):
        pass  # who wants the machine for itself goes first
    with _locked(machine, fcntl.LOCK_SH):
        return (yield)


def _is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


# --- what a module may leave behind: no descriptor, no thread ---


def _resources() -> Counter[str]:
    """Open files, sockets and memory files by what they point to, and threads by name.

    Left out: what libraries keep for the life of the process (event polls and pipes of gRPC's and torch's
    own threads, /dev and /proc files) and daemon threads.
    """
    found: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue  # the listing's own descriptor
        kind = target.partition(":")[0]
        if kind == "socket" or target.startswith("/memfd:"):
            found[kind] += 1
        elif target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
            found[target] += 1
    for thread in threading.enumerate():
        if not thread.daemon:
            found[f"thread {thread.name}"] += 1
    return found


def _leaked(before: Counter[str]) -> Counter[str]:
    deadline = time.monotonic() + _LEAK_GRACE_S
    while (leaked := _resources() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    return leaked


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    module = item.getparent(pytest.Module)
    if module is not None and _before not in module.stash:
        module.stash[_before] = _resources()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    yield
    module = item.getparent(pytest.Module)
    if module is None or (nextitem and nextitem.getparent(pytest.Module) is module):
        return
    # Fixtures of the module have ended by now; one of the session may live on, so it must hold none.
    if leaked := _leaked(module.stash[_before]):
        pytest.fail(f"{module.nodeid} left open: {dict(leaked)}", pytrace=False)
