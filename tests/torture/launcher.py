"""Starts `kvfabric node` processes fast: imports everything once, then forks one for each line it reads.

    {"argv": ["node", ...], "failpoint": "name:n", "changes": [...], "log": "path", "namespace": ""}
        ->   {"pid": n}
    {"reap": pid}   ->   {"status": wait status}

Routers and engines likewise: what they import is imported when the first is asked for. `namespace`: of the
network that the process is in.

What a child runs is the command itself, `kvfabric.cli.main`, on a state directory like any other. A test
process must not fork nodes of its own: it has threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PR_SET_PDEATHSIG = 1


class Launcher:
    """The process that forks nodes; a context manager."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: variables of the processes, besides ours."""
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(
        self,
        argv: list[str],
        *,
        failpoint: str,
        changes: tuple[str, ...],
        log: Path,
        verb: str = "node",
        namespace: str = "",
    ) -> int:
        """The process id of a new node, or of another command."""
        argv = [verb, *argv]
        document = {
            "argv": argv,
            "failpoint": failpoint,
            "changes": changes,
            "log": str(log),
            "namespace": namespace,
        }
        pid: int = self._ask(document)["pid"]
        return pid

    def reap(self, pid: int) -> int:
        """Wait for the end of a node: its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(self._ask({"reap": pid})["status"])

    def _ask(self, document: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _serve() -> None:
    import guards  # type: ignore[import-not-found]  # noqa: F401 - beside this script

    import kvfabric.daemon.command
    import kvfabric.daemon.node  # noqa: F401 - what a child would otherwise import

    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer = {"status": status}
        else:
            if request["argv"][0] == "router":
                import kvfabric_router.app
                import kvfabric_router.command  # noqa: F401
            if request["argv"][0] == "engine":
                import kvfabric_engine.reference.serve  # noqa: F401
            pid = os.fork()
            if not pid:
                _become(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any]) -> None:
    from guards import CHANGES

    from kvfabric.cli import main
    from kvfabric.failpoints import arm
    from kvfabric.testing.netns import enter_for_good

    code = 70
    try:
        # Whatever becomes of the test and of the launcher, nothing runs on.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        if request["namespace"]:
            enter_for_good(request["namespace"])
        for name in request["changes"]:
            CHANGES[name]()
        arm(request["failpoint"])
        code = main(request["argv"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
