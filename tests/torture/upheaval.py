"""What happens to nodes while readers ask: changes without end, kills, hand-overs, pauses.

`Changer` is the only administrator, so it knows what was acknowledged. A change that was not answered is
asked for again until it is: so long its scope counts as under way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import KVFabricError
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.redis import RedisServer
from kvfabric.types import Segment, model_scope, template_scope, tenant_scope
from tests.torture.launcher import Launcher
from tests.torture.ledger import Ledger
from tests.torture.nodes import ForkedNode
from tests.torture.race import HELLO

TEMPLATES = 5
LEASE_S = 0.2


class Changer:
    """Withdraws, promotes, purges and invalidates, at whichever node answers."""

    def __init__(self, directories: Sequence[Path], ledger: Ledger, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.tenants: list[str] = []
        self._sockets = [directory / "admin.sock" for directory in directories]
        self._admins = [AdminClient(one, deadline_s=10) for one in self._sockets]
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._numbers = itertools.count()

    def close(self) -> None:
        for admin in self._admins:
            admin.__exit__(None, None, None)

    def prepare(self, num_tenants: int) -> None:
        admin = self._admins[0]
        for number in range(num_tenants):
            create = pb.CreateTenantRequest(name=f"tenant-{number}")
            made = admin.call(admin.registry.CreateTenant, create)
            self.tenants.append(str(made.tenant.tenant_id))
        for number in range(TEMPLATES):
            for _ in range(2):
                self._register(f"t{number}")
        self._ledger.learn(admin.state())

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self._change(until)
            time.sleep(self._chance.uniform(0, 0.06))

    def _change(self, until: Callable[[], bool]) -> None:
        chance, ledger = self._chance.random(), self._ledger
        with contextlib.suppress(_Ended):
            if chance < 0.03:
                scope = tenant_scope(self._chance.choice(self.tenants))
                self._invalidate("tenant", scope, scope.removeprefix("tenant:"), until)
                return
            if chance < 0.04:
                self._invalidate(
                    "model", model_scope(HELLO.model_revision), HELLO.model_revision, until
                )
                return
            name = f"t{self._chance.randrange(TEMPLATES)}"
            serving, retired = ledger.serving.get(name), ledger.retired.get(name, [])
            if chance < 0.07 and serving is not None:
                self._purge(serving, until)
            elif serving is None or (retired and chance < 0.6):
                self._promote(self._chance.choice(retired), until)
            else:
                self._withdraw(serving, until)

    def _promote(self, segment: Segment, until: Callable[[], bool]) -> None:
        with self._ledger.changing(template_scope(segment.template)):
            request = pb.PromoteTemplateRequest(name=segment.template, version=segment.version)
            receipt = self._ask("PromoteTemplate", request, until)
            self._ledger.promoted(segment, receipt.new_epoch)
        self.counts["promote"] += 1

    def _withdraw(self, segment: Segment, until: Callable[[], bool]) -> None:
        with self._ledger.changing(template_scope(segment.template)):
            receipt = self._ask("Invalidate", _request(segment, purge=False), until)
            self._ledger.withdrawn(segment, receipt.new_epoch, purge=False)
        self.counts["retire"] += 1

    def _purge(self, segment: Segment, until: Callable[[], bool]) -> None:
        """And have a new version in its place."""
        with self._ledger.changing(template_scope(segment.template)):
            receipt = self._ask("Invalidate", _request(segment, purge=True), until)
            self._ledger.withdrawn(segment, receipt.new_epoch, purge=True)
            fresh = self._register(segment.template, until)
            request = pb.PromoteTemplateRequest(name=fresh.template, version=fresh.version)
            receipt = self._ask("PromoteTemplate", request, until)
            self._ledger.promoted(fresh, receipt.new_epoch)
        self.counts["purge"] += 1

    def _invalidate(self, kind: str, scope: str, name: str, until: Callable[[], bool]) -> None:
        with self._ledger.changing(scope):
            request = pb.InvalidateRequest(scope=kind, name=name, wait_s=0)
            receipt = self._ask("Invalidate", request, until)
            self._ledger.raised(scope, receipt.new_epoch)
        self.counts[kind] += 1

    def _register(self, name: str, until: Callable[[], bool] = lambda: False) -> Segment:
        """Under a number that was never used: one that was not answered may exist."""
        while True:
            version = str(next(self._numbers))
            text = pb.RegisterTemplateRequest(name=name, version=version, text=version.encode())
            at = self._chance.randrange(len(self._admins))
            admin = self._admins[at]
            try:
                made = admin.call(admin.registry.RegisterTemplate, text)
            except (KVFabricError, grpc.RpcError):
                self._pause(at, until)
            else:
                return Segment(name, version, made.incarnation, 0)

    def _ask(self, verb: str, request: Any, until: Callable[[], bool]) -> pb.Receipt:
        while True:
            at = self._chance.randrange(len(self._admins))
            admin = self._admins[at]
            try:
                receipt: pb.Receipt = admin.call(getattr(admin.registry, verb), request)
            except (KVFabricError, grpc.RpcError):
                self._pause(at, until)
            else:
                return receipt

    def _pause(self, at: int, until: Callable[[], bool]) -> None:
        """Raises _Ended at the end: what is under way stays so."""
        self.counts["unanswered"] += 1
        if until():
            raise _Ended
        time.sleep(0.02)
        self._admins[at].__exit__(
            None, None, None
        )  # gRPC would wait a second before it tries again
        self._admins[at] = AdminClient(self._sockets[at], deadline_s=10)


class _Ended(Exception):
    """The race is over while a change is under way."""


def _request(segment: Segment, *, purge: bool) -> pb.InvalidateRequest:
    return pb.InvalidateRequest(
        scope="template", name=segment.template, version=segment.version, purge=purge, wait_s=0
    )


class Upheaval:
    """Nodes that are killed, started, taken over and stopped for a while; a context manager."""

    def __init__(
        self,
        launcher: Launcher,
        directories: Sequence[Path],
        *,
        changes: tuple[str, ...],
        seed: int,
        redis: RedisServer | None = None,
        **options: object,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._launcher = launcher
        self._directories = directories
        self._changes = changes
        self._chance = random.Random(seed)
        self._redis = redis
        self._options = options
        self.nodes: list[ForkedNode] = []

    def __enter__(self) -> Upheaval:
        for directory in self._directories:
            self.nodes.append(self._start(directory))
            self.nodes[-1].wait_ready()
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGCONT)
            node.__exit__()

    def _start(self, directory: Path, *, takeover: bool = False) -> ForkedNode:
        changes = self._changes
        return ForkedNode(
            self._launcher,
            directory,
            changes=changes,
            takeover=takeover,
            node_id=directory.name,
            **self._options,  # type: ignore[arg-type]
        )

    @property
    def _deeds(self) -> list[Callable[[int], None]]:
        of_redis = [self._stop_redis] if self._redis is not None else []
        return [self._kill, self._take_over, self._stop, *of_redis]

    @property
    def met_all(self) -> bool:
        """Whether each thing that may happen has happened."""
        return len(self.counts) == len(self._deeds)

    def run(self, until: Callable[[], bool], every_s: float) -> None:
        for deed in itertools.cycle(self._chance.sample(self._deeds, len(self._deeds))):
            ends = time.monotonic() + self._chance.uniform(0.5, 1.5) * every_s
            while time.monotonic() < ends:
                if until():
                    return
                time.sleep(0.02)
            deed(self._chance.randrange(len(self.nodes)))
            self.counts[getattr(deed, "__name__", "").strip("_")] += 1

    def _kill(self, at: int) -> None:
        self.nodes[at].kill()
        time.sleep(self._chance.uniform(0, 0.1))
        self.nodes[at] = self._start(self._directories[at])
        self.nodes[at].wait_ready()

    def _take_over(self, at: int) -> None:
        before = self.nodes[at]
        self.nodes[at] = self._start(self._directories[at], takeover=True)
        self.nodes[at].wait_ready()
        before.reap()

    def _stop(self, at: int) -> None:
        """Long enough for its lease to end and to be waited out, or not."""
        os.kill(self.nodes[at].pid, signal.SIGSTOP)
        try:
            time.sleep(self._chance.uniform(0.1, 6 * LEASE_S))
        finally:
            os.kill(self.nodes[at].pid, signal.SIGCONT)

    def _stop_redis(self, _: int) -> None:
        assert self._redis is not None
        self._redis.pause()
        try:
            time.sleep(self._chance.uniform(0.1, 4 * LEASE_S))
        finally:
            self._redis.go_on()


def in_threads(*works: Callable[[], None], patience_s: float) -> None:
    """Run all of them side by side; what one raises is raised here, when all have ended."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - of a thread: told to whoever waits for it
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "it does not end"
