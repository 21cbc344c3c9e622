"""Real processes for tests and benchmarks: a node daemon and a tiny engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvfabric.failpoints import VARIABLE

READY = "kvfabric node ready"
STOP_DEADLINE_S = 20.0


class NodeProcess:
    """A `kvfabric node` on `state_dir`: a context manager that may be killed and started again."""

    verb = "node"

    def __init__(self, state_dir: Path, *, python: str = sys.executable, **options: object) -> None:
        """`options`: keys of NodeConfig. HTTP is off unless given; the host tier is 64 MiB, no SSD.

        `python`: of the environment that the node runs in. `takeover`: from the node that runs there.
        `failpoint`: where it dies, as `kvfabric.failpoints` reads it.
        """
        self.state_dir = state_dir
        self._python = python
        defaults = {"http": "", "host_bytes": 64 << 20, "ssd_bytes": 0, "max_blocks": 16384}
        self.options: dict[str, object] = defaults | options
        self._flags = ["--state-dir", str(state_dir)]
        self._flags += ["--takeover"] if self.options.pop("takeover", False) else []
        failpoint = str(self.options.pop("failpoint", ""))
        self._environment = os.environ | ({VARIABLE: failpoint} if failpoint else {})
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.log: list[str] = []

    @property
    def http(self) -> str:
        """Base URL of its metrics and health."""
        line = next(line for line in reversed(self.log) if line.startswith(READY))
        return f"http://{line.rsplit(' ', 1)[1].strip()}"

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name and labels. Needs the option `http`."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=STOP_DEADLINE_S) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("kvfabric_node_"): float(value) for name, value in rows}

    @property
    def socket(self) -> Path:
        return self.state_dir / "node.sock"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start and wait until it is ready. Raises RuntimeError with its last words if it is not."""
        command = [self._python, "-m", "kvfabric", self.verb, *self._flags]
        for name, value in self.options.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if line.startswith(f"kvfabric {self.verb} ready"):
                break
        else:
            self._process.stderr.close()
            code, self._process = self._process.wait(), None
            raise RuntimeError(f"{self.verb} ended with {code}:\n{''.join(self.log)}")
        self._reader = threading.Thread(target=self._drain, args=(self._process,))
        self._reader.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.send(signal.SIGCONT)
        self.stop()

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Wait for the end that something else brings; the exit code."""
        assert self._process is not None
        code = self._process.wait(STOP_DEADLINE_S)
        self._end(signal.SIGKILL)
        return code

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, and wait for the end; the exit code. 0 if it had ended before."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self.send(number)
        try:
            code = self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        assert self._reader is not None
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._process = None
        return code

    def _drain(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.log.extend(process.stderr)


class RouterProcess(NodeProcess):
    """A `kvfabric router`, likewise. `options`: keys of RouterConfig; any free port unless they say."""

    verb = "router"

    def __init__(self, state_dir: Path, *, python: str = sys.executable, **options: object) -> None:
        super().__init__(state_dir, python=python)
        self.options = {"listen": "127.0.0.1:0"} | options

    @property
    def url(self) -> str:
        return next(line for line in reversed(self.log) if " router ready" in line).split()[-1]


class ReferenceProcess(NodeProcess):
    """A `kvfabric engine`, likewise. `options`: keys of EngineConfig; any free port unless they say.

    `environment`: variables that it gets beside ours.
    """

    verb = "engine"

    def __init__(self, directory: Path, **options: object) -> None:
        super().__init__(directory)
        self._flags = []
        environment = options.pop("environment", {})
        assert isinstance(environment, dict)
        self._environment = self._environment | environment
        self.options = {"listen": "127.0.0.1:0"} | options

    @property
    def url(self) -> str:
        return next(line for line in self.log if " engine ready" in line).split()[-1]


@contextlib.contextmanager
def start_all(processes: Sequence[NodeProcess]) -> Iterator[None]:
    """Start them at the same time; stop them at the end, the last first."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(processes)) as pool:
        for process in processes:
            stack.push(process.__exit__)
        list(pool.map(lambda process: process.start(), processes))
        yield


def until(condition: Callable[[], bool], *, deadline_s: float = STOP_DEADLINE_S) -> None:
    """Wait for what another process does. Raises TimeoutError."""
    ends = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)


class EngineProcess:
    """A `kvfabric.testing.engine` in a process of its own; a context manager."""

    def __init__(self, socket: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvfabric.testing.engine", str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.session = bytes.fromhex(self._answer()["session"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.send(signal.SIGCONT)
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, command: str, **arguments: object) -> dict[str, Any]:
        """Have it do something and wait for the answer."""
        self.begin(command, **arguments)
        return self._answer()

    def begin(self, command: str, **arguments: object) -> None:
        """Send a command without waiting: the process may be stopped."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """The answer to what `begin` sent."""
        return self._answer()

    def send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
