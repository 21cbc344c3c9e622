"""The expected state of a node, kept outside it: what was sealed, what was withdrawn, what was promised.

The oracle is an engine and an administrator of a real node, over its real sockets. It stores blocks whose
bytes follow from their keys, so that every byte it gets back can be checked, and remembers which of them
the node said were sealed. The node is killed again and again; the oracle lives on, keeps its arena and hands
it back, as engines do.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvfabric.client import NodeClient
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.daemon.adoption import start_time
from kvfabric.errors import ClosedError, Fenced, KVFabricError
from kvfabric.handle import FORMAT_VERSION, Handle, from_segments, mint
from kvfabric.hashing import block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.state import SERVING, scopes_of
from kvfabric.testing.engine import (
    BLOCK_TOKENS,
    DEADLINE_S,
    TinyEngine,
    payload_of,
    tiny_hello,
    tokens_of,
)
from kvfabric.types import DEFAULT_TENANT, BlockKey, Segment
from tests.torture.launcher import Launcher

CHAIN_BLOCKS = 8
CHAINS = 16
"""Remembered: together a quarter of what the SSD tier holds, so that none of them is reclaimed."""
CHECKED_CHAINS = 10
ROUNDS = 40
"""Of work in one life, each of four chains; a failpoint that is not reached by then is given up."""
AT_START = frozenset(
    {
        "index.created",
        "index.doubted",
        "index.trusted",
        "arena.recorded",
        "arena.replaced",
        "arena.adopted",
    }
)
"""Passed once in a life, if at all, before there is work."""
_OF_ADMINISTRATION = ("registry.", "keyring.", "store.purge.")
START_DEADLINE_S = 20.0
LIFE_S = 0.4
HELLO = tiny_hello(window_bytes=64 << 10)
OPTIONS = {
    "http": "",
    "host_bytes": 1 << 20,
    "ssd_bytes": 4 << 20,
    "max_blocks": 16384,
    "log_level": "warning",
    "epoch_lease_s": 0.2,
    "window_bytes": 1 << 20,
}


@dataclass(slots=True)
class Chain:
    """A stored prompt; `segment`: of the template it stands in, if any."""

    name: str
    segment: Segment | None
    keys: list[BlockKey]


@dataclass(slots=True)
class Tally:
    """What was seen. `sealed` and `warm` count parts that were looked for and found after a kill."""

    cycles: int = 0
    random_kills: int = 0
    kills_at: Counter[str] = field(default_factory=Counter)
    failed_starts: list[str] = field(default_factory=list)
    checked: int = 0
    wrong: int = 0
    sealed: int = 0
    warm: int = 0
    corrupt: int = 0
    stale: int = 0
    lost_changes: list[str] = field(default_factory=list)
    adopted: int = 0
    start_s: list[float] = field(default_factory=list)

    def line(self) -> str:
        start_ms = sorted(self.start_s)[len(self.start_s) // 2] * 1e3 if self.start_s else 0.0
        return (
            f"{self.random_kills} kills at random and {self.kills_at.total()} at "
            f"{len(self.kills_at)} failpoints (each {min(self.kills_at.values(), default=0)} times or "
            f"more); {self.checked} blocks checked, {self.wrong} wrong; {self.warm} of {self.sealed} "
            f"sealed parts warm; {len(self.failed_starts)} failed starts; {self.corrupt} corrupt; "
            f"{self.stale} withdrawn blocks served; {len(self.lost_changes)} acknowledged changes "
            f"lost; arena adopted {self.adopted} times; start {start_ms:.0f} ms (median)"
        )


class Dead(Exception):
    """The node is gone; what was asked of it may or may not have been done."""


class Oracle:
    """One state directory and the many lives of its node. A context manager.

    `changes`: of `guards`, to every node. `verifies`: an engine checks what it copied, as it should; without,
    the node alone stands between a torn record and the oracle.
    """

    def __init__(
        self,
        launcher: Launcher,
        directory: Path,
        *,
        seed: int = 0,
        changes: tuple[str, ...] = (),
        verifies: bool = True,
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally or Tally()
        self.directory = directory
        self._launcher = launcher
        self._random = random.Random(seed)
        self._changes = changes
        self._verifies = verifies
        self._chains: deque[Chain] = deque(maxlen=CHAINS)
        self._favourite: Chain | None = None  # in use all the time, so it outlives its segment
        self._sealed: set[BlockKey] = set()
        self._client: NodeClient | None = None
        self._pid = -1
        self._serial = 0
        self._segments: list[Segment] = []  # serving, as far as we know
        self._gone: deque[Segment] = deque(maxlen=8)  # withdrawn, acknowledged
        self._doubtful: set[str] = set()  # templates whose withdrawal was not answered
        self._tenants: deque[str] = deque(maxlen=8)
        self._handles: tuple[Keyring, tuple[tuple[str, int], ...]] | None = None

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._client is not None:
            self._client._break(ClosedError("the test is over"))
            self._client._give_up()

    # ------------------------------------------------------------------ one life of the node

    def look(self) -> None:
        """Start, check, and kill the node."""
        self.cycle(rounds=0)

    def cycle(self, failpoint: str = "", nth: int = 1, *, rounds: int = ROUNDS) -> None:
        """Start, check, work until the node dies: at the nth passing of `failpoint`, or at any time."""
        if failpoint == "index.created":
            shutil.rmtree(self.directory / "ssd" / "index", ignore_errors=True)
        spec = f"{failpoint}:{nth}" if failpoint else ""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        log = self.directory.with_name(self.directory.name + ".log")
        began = time.monotonic()
        self._pid = self._launcher.start(
            [f"--state-dir={self.directory}", *options],
            failpoint=spec,
            changes=self._changes,
            log=log,
        )
        life_s = self._random.uniform(0, LIFE_S)
        killer = threading.Timer(life_s, os.kill, (self._pid, signal.SIGKILL))
        if not failpoint and rounds:
            killer.start()
        try:
            self._live(began, failpoint, 0 if failpoint in AT_START else rounds)
            self._kill()  # the failpoint was not reached
            failpoint = ""
        except Dead:
            pass
        except BaseException:
            self._kill()
            raise
        finally:
            killer.cancel()
            if killer.ident is not None:
                killer.join()
            code = self._launcher.reap(self._pid)
        self.tally.cycles += 1
        if code != -signal.SIGKILL:
            last = log.read_text()[-500:] if log.exists() else ""
            self.tally.failed_starts.append(f"exit code {code} ({spec or 'random'}): {last}")
        elif failpoint:
            self.tally.kills_at[failpoint] += 1
        else:
            self.tally.random_kills += 1

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def _live(self, began: float, failpoint: str, rounds: int) -> None:
        engine = self._connect(began)
        try:
            with AdminClient(self.directory / "admin.sock", deadline_s=DEADLINE_S) as admin:
                self._learn(admin)
                self._check(engine)
                self.tally.corrupt += self._note_sealed(admin)
                for number in range(rounds):
                    # Each change of registry and keyring waits for the disk several times.
                    if number % 6 == (0 if failpoint.startswith(_OF_ADMINISTRATION) else 3):
                        self._administer(admin)
                    self._work(engine, admin)
        except KVFabricError as exc:
            self._dead_or(exc)

    def _dead_or(self, error: KVFabricError) -> None:
        """Raises Dead if the node is; else the error, which then nobody expected."""
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            if start_time(self._pid) is None:
                raise Dead from error
            time.sleep(0.002)
        raise error

    def _connect(self, began: float) -> TinyEngine:
        deadline = began + START_DEADLINE_S
        while True:
            try:
                client = NodeClient.connect(
                    self.directory / "node.sock",
                    HELLO,
                    deadline_s=DEADLINE_S,
                    resume_from=self._client,
                )
            except KVFabricError as exc:
                if start_time(self._pid) is None:
                    raise Dead from exc
                if time.monotonic() > deadline:
                    self.tally.failed_starts.append(f"not ready in {START_DEADLINE_S} s: {exc}")
                    self._kill()
                    raise Dead from exc
                time.sleep(0.002)
                continue
            self._client = client
            if client._arena_descriptor >= 0:
                break
            time.sleep(0.02)  # no host tier yet
        self.tally.start_s.append(time.monotonic() - began)
        self.tally.adopted += client.arena_adopted
        return TinyEngine(client, HELLO)

    # ------------------------------------------------------------------ what must hold

    def _learn(self, admin: AdminClient) -> None:
        """The registry as the new node has it: nothing that was acknowledged may be missing."""
        state = admin.state()
        keyring = Keyring.open(self.directory)
        known = {template.incarnation: template for template in state.templates.values()}
        for segment in self._gone:
            if known[segment.incarnation].state == SERVING:
                self.tally.lost_changes.append(f"withdrawal of {segment.template}")
        for segment in list(self._segments):
            found = known.get(segment.incarnation)
            if found is None:
                self.tally.lost_changes.append(f"template {segment.template}")
            elif found.state != SERVING:
                # Asked for, never answered, and done.
                assert segment.template in self._doubtful, f"{segment.template} withdrew itself"
                self._segments.remove(segment)
                self._gone.append(segment)
        names = {tenant.name: tenant.tenant_id for tenant in state.tenants.values()}
        for name in self._tenants:
            try:
                keyring.tenant_secret(names[name])
            except (KeyError, KVFabricError):
                self.tally.lost_changes.append(f"tenant {name}")
        self._take(admin)

    def _take(self, admin: AdminClient) -> None:
        state = admin.state()
        scopes = scopes_of(DEFAULT_TENANT, HELLO.model_revision)
        self._handles = (Keyring.open(self.directory), state.epochs_of(scopes))

    def _check(self, engine: TinyEngine) -> None:
        """Load what was stored in earlier lives: right bytes only, and all that was sealed."""
        sample = min(CHECKED_CHAINS, len(self._chains))
        for chain in [*self._random.sample(list(self._chains), sample), *self._favourites]:
            found = self._load(engine, chain)
            if chain.segment is not None and chain.segment in self._gone:
                self.tally.stale += len(found)
                continue
            sealed = [key in self._sealed for key in chain.keys]
            if any(sealed[len(found) :]) and not sealed[len(found)]:
                # Behind a block that was never sealed: to be had as soon as that one is stored again.
                self._store(engine, chain)
                found = self._load(engine, chain)
            self.tally.sealed += sum(sealed)
            self.tally.warm += sum(sealed[: len(found)])

    def _load(self, engine: TinyEngine, chain: Chain) -> list[bytes]:
        request = self._open(engine, chain)
        if request is None:
            return []
        found = (
            engine.load(request, chain.keys) if self._verifies else _believe(engine, request, chain)
        )
        engine.release(request)
        self.tally.checked += len(found)
        self.tally.wrong += sum(
            payload_of(key, len(data)) != data for key, data in zip(chain.keys, found, strict=False)
        )
        return found

    def _open(self, engine: TinyEngine, chain: Chain) -> str | None:
        """Open a request for a chain; None if its handle is refused, as of a withdrawn template."""
        self._serial += 1
        request = f"r{self._serial}"
        handle = self._mint(engine, request, chain.segment) if chain.segment else ""
        try:
            opened = engine.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        except Fenced:
            if chain.segment not in self._gone:
                raise
            return None
        segments = (chain.segment,) if chain.segment else ()
        tokens = tokens_of(chain.name, CHAIN_BLOCKS)
        keys = block_keys(tokens, BLOCK_TOKENS, opened.namespace_key, segments=segments)
        assert not chain.keys or keys == chain.keys, "the namespace moved"
        chain.keys = keys
        return request

    def _mint(self, engine: TinyEngine, request: str, segment: Segment) -> str:
        assert self._handles is not None
        keyring, epochs = self._handles
        key_id, key = keyring.current_handle_key()
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=DEFAULT_TENANT,
            model_revision=HELLO.model_revision,
            adapter="",
            adapter_revision="",
            layout_fingerprint=layout_fingerprint(HELLO.layout),
            segments=from_segments((segment,)),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=epochs,
            audience=engine.client.session,
            request_id=request,
            expires_at=int(time.time()) + 600,
        )
        return mint(handle, key)

    # ------------------------------------------------------------------ work

    def _work(self, engine: TinyEngine, admin: AdminClient) -> None:
        written = [self._new_chain() for _ in range(4)]
        for chain in written:
            self._store(engine, chain)
        # Second uses: these go to SSD now.
        for chain in written:
            self._load(engine, chain)
        keys = {key for chain in written for key in chain.keys}
        for _ in range(12):
            self._note_sealed(admin)
            if keys <= self._sealed:
                break
            time.sleep(0.01)
        self._load(engine, self._random.choice(self._chains))
        for chain in self._favourites:
            self._load(engine, chain)

    @property
    def _favourites(self) -> list[Chain]:
        if self._favourite is None:
            plain = (chain for chain in self._chains if chain.segment is None)
            self._favourite = next(plain, None)
        return [self._favourite] if self._favourite else []

    def _new_chain(self) -> Chain:
        self._serial += 1
        use_template = self._segments and self._random.random() < 0.4
        segment = self._random.choice(self._segments) if use_template else None
        chain = Chain(f"p{self._serial}", segment, [])
        self._chains.append(chain)
        return chain

    def _store(self, engine: TinyEngine, chain: Chain) -> None:
        request = self._open(engine, chain)
        assert request is not None
        engine.store(request, chain.keys)
        engine.release(request)

    def _note_sealed(self, admin: AdminClient) -> int:
        """Remember what the node says is sealed; returns how many parts it found corrupt so far."""
        status = admin.call(admin.admin.Status, pb.StatusRequest(sealed_keys=True))
        recent = {key for chain in [*self._chains, *self._favourites] for key in chain.keys}
        self._sealed = (self._sealed & recent) | (recent & set(status.sealed_keys))
        return int(status.counters["corrupt"])

    def _administer(self, admin: AdminClient) -> None:
        """A new tenant, a new template, and a withdrawal of an older one, each with its answer."""
        self._serial += 1
        name = f"n{self._serial}"
        admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name=name))
        self._tenants.append(name)
        template = admin.call(
            admin.registry.RegisterTemplate,
            pb.RegisterTemplateRequest(name=name, version="1", text=name.encode()),
        )
        self._segments.append(Segment(name, "1", template.incarnation, 0))
        if len(self._segments) > 3:
            self._withdraw(admin, self._segments[0])

    def _withdraw(self, admin: AdminClient, segment: Segment) -> None:
        self._doubtful.add(segment.template)
        purge = self._random.random() < 0.7
        # What this oracle has leased is not destroyed before it answers: no use in waiting for it here.
        request = pb.InvalidateRequest(
            scope="template", name=segment.template, version="1", purge=purge, wait_s=0
        )
        admin.call(admin.registry.Invalidate, request)
        self._segments.remove(segment)
        self._gone.append(segment)


def _believe(engine: TinyEngine, request: str, chain: Chain) -> list[bytes]:
    """Load without verifying: what an engine would use that trusts its node."""
    located = engine.locate(request, chain.keys)
    offsets: Sequence[int] = np.frombuffer(located.offsets, "<u8").tolist()
    arena = engine.client.arena
    return [bytes(arena[offset : offset + located.part_bytes]) for offset in offsets]
