"""Clients to be killed: forks them by the batch, and kills each at a time of its own.

    {"socket": "path", "count": n, "seed": n, "longest_s": s}  ->  {"killed": n, "holding": n}

Each leases what all share, reserves what is its own, and goes on storing and leasing without ever
releasing, until its end; `holding` counts those that had got so far. Half are killed as soon as they hold
something, half at a random time, which may be in the middle of their handshake.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Nursery:
    """The process that forks the clients; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

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

    def batch(self, socket: Path, count: int, seed: int, *, longest_s: float = 0.3) -> int:
        """Fork and kill `count` clients; how many of them held leases and reservations."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        document = {"socket": str(socket), "count": count, "seed": seed, "longest_s": longest_s}
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["killed"] == count
        holding: int = answer["holding"]
        return holding


def _serve() -> None:
    import kvfabric.testing.engine  # noqa: F401 - what a child would otherwise import

    for line in sys.stdin:
        request = json.loads(line)
        chance = random.Random(request["seed"])
        holding = [
            _live(request["socket"], chance, request["longest_s"], f"{request['seed']}.{number}")
            for number in range(request["count"])
        ]
        result = _kill(holding)
        print(json.dumps(result), flush=True)


def _live(
    socket: str, chance: random.Random, longest_s: float, name: str
) -> tuple[int, int, float]:
    """(pid, pipe that says when it holds something, when it dies; 0: at once then)."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        with contextlib.suppress(BaseException):
            _hold(socket, theirs, name)
        os._exit(0)
    os.close(theirs)
    dies_at = 0.0 if chance.random() < 0.5 else time.monotonic() + chance.random() * longest_s
    return pid, ours, dies_at


def _hold(socket: str, told: int, name: str) -> None:
    from kvfabric.hashing import ROOT_PARENT
    from kvfabric.testing.engine import TinyEngine, tiny_hello

    engine = TinyEngine.connect(socket, tiny_hello(window_bytes=64 << 10))
    engine.locate("shared", engine.open("shared", "shared", 8))
    own = engine.open("own", f"own {name}", 4)
    engine.client.reserve("own", ROOT_PARENT, own, group=0, shard=0, deadline_s=20)
    os.write(told, b"x")
    for number in itertools.count():
        request = f"more {number}"
        keys = engine.open(request, f"{request} of {name}", 4)
        engine.store(request, keys)
        engine.locate(request, keys)


def _kill(clients: list[tuple[int, int, float]]) -> dict[str, int]:
    holding, killed = 0, 0
    for pid, told, dies_at in clients:
        patience_s = max(0.0, dies_at - time.monotonic()) if dies_at else 30.0
        if dies_at:
            time.sleep(patience_s)
        holding += bool(select.select([told], [], [], 0.0 if dies_at else patience_s)[0])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        killed += 1
    return {"killed": killed, "holding": holding}


if __name__ == "__main__":
    _serve()
