"""Proof 8: tenants, templates, sessions and blocks come and go for a long time; the daemon does not grow."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from kvfabric.client import NodeClient
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.handle import FORMAT_VERSION, Handle, from_segments, mint
from kvfabric.hashing import block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.engine import (
    BLOCK_TOKENS,
    DEADLINE_S,
    TinyEngine,
    tiny_hello,
    tokens_of,
    wrong_blocks,
)
from kvfabric.types import Incarnation, Segment, TenantId
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode
from tests.torture.scale import FULL, count, record

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

SECONDS = count(6, 600, "KVFABRIC_TORTURE_SOAK_S")
ROUNDS = count(40, 400)
"""At least: on a busy machine it takes longer."""
WARM_UP = 0.4
"""Of the time: until the arena is touched, SSD is full and every pool has its threads."""
MOST_GROWTH_BYTES = (6 if FULL else 8) << 20
"""Each purged template version stays in the registry, since it must never serve again: 1.2 KiB of memory (and
3.5 of the registry's file, for the audit log and receipts above all), half a MiB in 300 s. The history of
events takes 16 MiB at most, which is 60,000 small batches and more."""
SAMPLE_S = 0.1
TENANTS, NAMES, REVISIONS, SESSIONS = 12, 4, 40, 4
OPTIONS: dict[str, Any] = {"host_bytes": 4 << 20, "ssd_bytes": 32 << 20, "max_blocks": 8192}


@dataclass(frozen=True, slots=True)
class Sample:
    """`rss_bytes`: without pages of files, which the kernel may take back."""

    rss_bytes: int
    threads: int
    descriptors: int


def sample(node: ForkedNode) -> Sample:
    status = Path(f"/proc/{node.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    rss = sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
    return Sample(rss, int(fields["Threads"]), node.descriptors())


class Churn:
    """One round after the other against a node."""

    def __init__(
        self, node: ForkedNode, directory: Path, admin: AdminClient, template_s: float
    ) -> None:
        """`template_s`: between two template versions."""
        self.rounds = 0
        self.wrong = 0
        self.checked = 0
        self.templates = 0
        self._node = node
        self._admin = admin
        self._keyring = Keyring.open(directory)
        self._chance = random.Random(8)
        self._tenants: list[str] = []
        self._serving: dict[str, pb.Template] = {}
        self._template_s = template_s
        self._template_due = 0.0
        self._engines: deque[TinyEngine] = deque()

    def round(self) -> None:
        number, self.rounds = self.rounds, self.rounds + 1
        self._change_tenant(number)
        if time.monotonic() > self._template_due:
            self._template_due = time.monotonic() + self._template_s
            self._change_template()
        if number % 3 == 0:
            self._change_session(number)
        for engine in self._engines:
            self._use(engine, f"r{number}", self._chance.randrange(400))

    def close(self) -> None:
        for engine in self._engines:
            engine.client.close()

    def _change_tenant(self, number: int) -> None:
        name = f"tenant-{number % TENANTS}"
        if number < TENANTS:
            request = pb.CreateTenantRequest(name=name)
            created = self._admin.call(self._admin.registry.CreateTenant, request)
            self._tenants.append(created.tenant.tenant_id)
        elif number % 5 == 0:
            change = pb.SetTenantRequest(name=name, max_age_s=float(60 + number % 7))
            self._admin.call(self._admin.registry.SetTenant, change)

    def _change_template(self) -> None:
        registry, name = self._admin.registry, f"template-{self.templates % NAMES}"
        version = f"v{self.templates}"
        self.templates += 1
        request = pb.RegisterTemplateRequest(
            name=name, version=version, text=f"text {name} {version}".encode()
        )
        fresh = self._admin.call(registry.RegisterTemplate, request)
        earlier = self._serving.get(name)
        if earlier is not None:
            promote = pb.PromoteTemplateRequest(name=name, version=version)
            self._admin.call(registry.PromoteTemplate, promote)
            purge = pb.InvalidateRequest(
                scope="template", name=name, version=earlier.version, purge=True
            )
            self._admin.call(registry.Invalidate, purge)
        self._serving[name] = fresh

    def _change_session(self, number: int) -> None:
        hello = tiny_hello(revision=f"{number % REVISIONS:032x}", window_bytes=256 << 10)
        client = NodeClient.connect(self._node.socket, hello, deadline_s=DEADLINE_S)
        self._engines.append(TinyEngine(client, hello))
        if len(self._engines) > SESSIONS:
            gone = self._engines.popleft()
            if number % 2:
                gone.client.close()
            else:  # without a word, and back at once
                resumed = NodeClient.connect(
                    self._node.socket, gone.hello, deadline_s=DEADLINE_S, resume_from=gone.client
                )
                resumed.close()

    def _use(self, engine: TinyEngine, request: str, prompt: int) -> None:
        template = self._chance.choice([*self._serving.values(), None])
        segments: tuple[Segment, ...] = ()
        if template is not None:
            one = Segment(
                template.name, template.version, Incarnation(template.incarnation), BLOCK_TOKENS
            )
            segments = (one,)
        handle = self._mint(engine, request, self._chance.choice(self._tenants), segments)
        opened = engine.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        tokens = tokens_of(f"prompt {prompt}", 8)
        keys = block_keys(tokens, BLOCK_TOKENS, opened.namespace_key, segments=segments)
        engine.store(request, keys)
        found = engine.load(request, keys)
        self.checked += len(found)
        self.wrong += wrong_blocks(keys, found)
        engine.release(request)

    def _mint(
        self, engine: TinyEngine, request: str, tenant: str, segments: tuple[Segment, ...]
    ) -> str:
        key_id, key = self._keyring.current_handle_key()
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=TenantId(tenant),
            model_revision=engine.hello.model_revision,
            adapter="",
            adapter_revision="",
            layout_fingerprint=layout_fingerprint(engine.hello.layout),
            segments=from_segments(segments),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=(),
            audience=engine.client.session,
            request_id=request,
            expires_at=int(time.time()) + 600,
        )
        return mint(handle, key)


def soak(
    directory: Path,
    seconds: float,
    rounds: int,
    *,
    template_s: float = 0.5,
    changes: tuple[str, ...] = (),
) -> tuple[list[Sample], Churn]:
    """Samples after the warm-up, until both the time and the rounds are over."""
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        node = stack.enter_context(ForkedNode(launcher, directory, changes=changes, **OPTIONS))
        admin = stack.enter_context(AdminClient(directory / "admin.sock"))
        churn = Churn(node, directory, admin, template_s)
        stack.callback(churn.close)
        began, due, done = time.monotonic(), 0.0, 0.0
        while done < 1:
            churn.round()
            passed = time.monotonic() - began
            done = min(passed / seconds, churn.rounds / rounds)
            if done > WARM_UP and passed > due:
                samples.append(sample(node))
                due = passed + SAMPLE_S
    return samples, churn


def growth(samples: list[Sample]) -> Sample:
    """From the first half to the second: of the median of RSS and threads, of the most descriptors."""
    half = len(samples) // 2
    first, second = samples[:half], samples[half:]
    return Sample(
        int(median(s.rss_bytes for s in second) - median(s.rss_bytes for s in first)),
        int(median(s.threads for s in second) - median(s.threads for s in first)),
        max(s.descriptors for s in second) - max(s.descriptors for s in first),
    )


def test_a_long_life_does_not_grow(tmp_path: Path) -> None:
    samples, churn = soak(tmp_path / "n", SECONDS, ROUNDS)
    grown = growth(samples)
    assert churn.wrong == 0
    assert churn.checked > 100
    assert churn.templates > NAMES
    assert grown.rss_bytes < MOST_GROWTH_BYTES
    assert grown.threads <= 0
    assert grown.descriptors <= 2  # a connection that is just coming or going
    record(
        "8. soak with churning tenants, templates and sessions",
        SECONDS,
        f"N seconds, {churn.rounds} rounds, {churn.templates} template versions, 0 of {churn.checked} "
        f"blocks wrong; grown from the first half to the second: RSS {grown.rss_bytes / 2**20:.1f} MiB of "
        f"{samples[-1].rss_bytes / 2**20:.0f}, threads {grown.threads}, descriptors {grown.descriptors}",
    )


def test_a_daemon_that_forgets_no_session_is_found_out(tmp_path: Path) -> None:
    """The twin: what a session needed is kept after its end. One template: a purge would wait for such a
    session."""
    changes = ("forgets_nothing",)
    samples, _ = soak(tmp_path / "n", 2, 80, template_s=math.inf, changes=changes)
    assert growth(samples).descriptors > 2
