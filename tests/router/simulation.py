"""Simulated engines as processes, for tests of a real router in front of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from routers import free_ports

from kvfabric.testing.processes import STOP_DEADLINE_S, until

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "simulated.py"


class _Program:
    """One `benchmarks/simulated.py`: it forks an engine for each port."""

    def __init__(self, ports: Sequence[int], flags: Sequence[str]) -> None:
        command = [sys.executable, str(PROGRAM), *map(str, ports), *flags]
        self._process = subprocess.Popen(command, start_new_session=True)

    def engine(self, index: int) -> int:
        """Process id."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[index])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_DEADLINE_S)


class SimulatedEngines:
    """A context manager. `urls`: of its engines, each of which may be stopped, killed and started again."""

    def __init__(self, number: int, *, node: Path | None = None, compression: float = 8.0) -> None:
        self._ports = free_ports(number)
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._flags = ["--compression", str(compression), *(["--node", str(node)] if node else [])]
        self._programs: list[_Program] = []
        self._of_engine: dict[int, tuple[_Program, int]] = {}

    def __enter__(self) -> SimulatedEngines:
        self._start(range(len(self._ports)))
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.kill()

    def _start(self, indices: Sequence[int]) -> None:
        program = _Program([self._ports[index] for index in indices], self._flags)
        self._programs.append(program)
        self._of_engine |= {index: (program, place) for place, index in enumerate(indices)}
        until(lambda: all(_answers(self.urls[index]) for index in indices))

    def send(self, index: int, number: signal.Signals) -> None:
        program, place = self._of_engine[index]
        os.kill(program.engine(place), number)

    def restart(self, index: int) -> None:
        """SIGKILL, and another process at the same port, with an empty cache."""
        self.send(index, signal.SIGKILL)
        until(lambda: not _answers(self.urls[index]))
        self._start([index])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1.0):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def many_descriptors(number: int) -> Iterator[None]:
    """At least that many open files for this process, as far as its hard limit goes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, number), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
