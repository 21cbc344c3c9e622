"""Pins on real nodes: what `kvfabric template pin` keeps, whatever comes, until it ends."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfabric import cli
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import Fenced
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, TinyEngine, wrong_blocks
from kvfabric.testing.minting import Minter, keys_of, segment_of
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT, BlockKey
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode

SLOTS = 256
TEXT, BLOCKS = 6, 8
"""Blocks that a template's text fills, and those of a whole prompt. By default a tenant may pin 12."""
OPTIONS: dict[str, Any] = {"host_bytes": SLOTS * 4096}


class Rig:
    """A node that runs in `directory`, an engine on it, and what its router and administrator do."""

    def __init__(
        self, directory: Path, keyring: Path, engine: TinyEngine, admin: AdminClient
    ) -> None:
        self.directory = directory
        self.engine = engine
        self.admin = admin
        self._minter = Minter(keyring)
        self._num = 0

    def register(self, name: str) -> None:
        text = f"You are {name}.".encode()
        request = pb.RegisterTemplateRequest(name=name, version="1", text=text)
        self.admin.call(self.admin.registry.RegisterTemplate, request)

    def command(self, *arguments: str) -> str:
        """`kvfabric template ...`; what it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            socket = str(self.directory / "admin.sock")
            assert cli.main(["template", *arguments, "--admin-socket", socket]) == 0
        return out.getvalue()

    def open(self, prompt: str, template: str) -> tuple[str, list[BlockKey]]:
        self._num += 1
        request, state = f"r{self._num}-{time.monotonic_ns()}", self.admin.state()
        length = TEXT * BLOCK_TOKENS + 3
        segments = (segment_of(state, template, "1", 0, length),) if template else ()
        handle = self._minter.handle(self.engine, request, state, segments, tenant=DEFAULT_TENANT)
        opened = self.engine.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        return request, keys_of(opened, prompt, BLOCKS)

    def serves(self) -> bool:
        """Whether it has an epoch lease by now."""
        with contextlib.suppress(Fenced):
            return bool(self.open("any", ""))
        return False

    def store(self, prompt: str, template: str = "") -> int:
        request, keys = self.open(prompt, template)
        stored = self.engine.store(request, keys)
        self.engine.release(request)
        return stored

    def found(self, prompt: str, template: str = "") -> int:
        """How many leading blocks are there, with the right bytes."""
        request, keys = self.open(prompt, template)
        blocks = self.engine.load(request, keys)
        assert wrong_blocks(keys, blocks) == 0
        self.engine.release(request)
        return len(blocks)

    def flood(self) -> None:
        """Unique prompts, twice as many as there is room for."""
        state, hello = self.admin.state(), self.engine
        for _ in range(2 * SLOTS // BLOCKS):
            self._num += 1
            request = f"f{self._num}"
            handle = self._minter.handle(hello, request, state, (), tenant=DEFAULT_TENANT)
            opened = hello.client.open_handle(request, handle, deadline_s=DEADLINE_S)
            unique = keys_of(opened, f"unique {request} {time.monotonic_ns()}", BLOCKS)
            assert hello.store(request, unique) == BLOCKS
            hello.release(request)

    def pinned(self) -> int:
        """Bytes, in blocks."""
        status = self.admin.call(self.admin.admin.Status, pb.StatusRequest())
        return sum(int(one.pinned_bytes) for one in status.usage) // 4096


@contextlib.contextmanager
def at(directory: Path, keyring: Path | None = None) -> Iterator[Rig]:
    """Of the node that runs there."""
    with AdminClient(directory / "admin.sock") as admin:
        engine = TinyEngine.connect(directory / "node.sock")
        with contextlib.closing(engine.client):
            yield Rig(directory, keyring or directory, engine, admin)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with NodeProcess(tmp_path, **OPTIONS), at(tmp_path) as rig:
        yield rig


@pytest.mark.parametrize("changes", [(), ("no_pins",)], ids=["pinned", "twin"])
def test_a_pinned_template_survives_a_flood(tmp_path: Path, changes: tuple[str, ...]) -> None:
    directory = tmp_path / "n"
    with (
        Launcher() as launcher,
        ForkedNode(launcher, directory, changes=changes, **OPTIONS) as node,
        at(directory) as rig,
    ):
        # Each is used once, by which alone the policy has no reason to keep it.
        for name in ("kind", "other"):
            rig.register(name)
            rig.store(name, name)
        # Stored before it was pinned: the node looks through what it has.
        rig.command("pin", "kind", "--ttl", "600")
        until(lambda: rig.pinned() == TEXT)
        for _ in range(2):
            rig.flood()
            assert rig.found("other", "other") == 0, "the flood takes all that is not pinned"
            assert rig.found("kind", "kind") == (0 if changes else TEXT)
        if not changes:
            metrics = node.metrics()
            assert metrics['tenant_pinned_bytes{tenant="default"}'] == TEXT * 4096
            assert metrics['tier_used_bytes{tier="host"}'] <= SLOTS * 4096


def test_a_pin_ends_by_itself(rig: Rig) -> None:
    rig.register("kind")
    assert "until" in rig.command("pin", "kind", "--ttl", "2.5")
    ends = time.monotonic() + 2.5
    rig.store("kind", "kind")
    rig.flood()
    assert rig.pinned() == TEXT
    until(lambda: rig.pinned() == 0)
    assert ends - 0.1 < time.monotonic()
    assert "until" not in rig.command("list")
    rig.flood()
    assert rig.found("kind", "kind") == 0


def test_what_takes_a_pin_away(rig: Rig) -> None:
    for how in ("unpin", "retire", "purge", "promote"):
        rig.register(how)
        rig.command("pin", how, "--ttl", "600")
        rig.store(how, how)
        assert rig.pinned() == TEXT
        if how == "unpin":
            rig.command("unpin", how)
        elif how == "promote":
            text = pb.RegisterTemplateRequest(name=how, version="2", text=b"You are kinder.")
            rig.admin.call(rig.admin.registry.RegisterTemplate, text)
            rig.command("promote", how, "2")
        else:
            gone = pb.InvalidateRequest(scope="template", name=how, purge=how == "purge")
            rig.admin.call(rig.admin.registry.Invalidate, gone)
        until(lambda: rig.pinned() == 0)
        assert not any(one.pinned_until for one in rig.admin.state().templates.values())


def test_a_budget_is_kept_and_what_it_refuses_is_told(rig: Rig) -> None:
    rig.register("kind")
    rig.command("pin", "kind", "--ttl", "600")
    for variant in range(3):
        rig.store(f"kind {variant}", "kind")
    status = rig.admin.call(rig.admin.admin.Status, pb.StatusRequest())
    (usage,) = [one for one in status.usage if one.tenant_id == DEFAULT_TENANT]
    assert (usage.pinned_bytes, usage.pins_refused) == (2 * TEXT * 4096, TEXT)
    assert usage.pin_max_bytes == SLOTS * 4096 // 20
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        socket = str(rig.directory / "admin.sock")
        cli.main(["tenant", "usage", "--json", "--admin-socket", socket])
    (shown,) = [u for u in json.loads(out.getvalue())["usage"] if u["name"] == "default"]
    assert shown["pins_refused"] == TEXT
    cli.main(["tenant", "set", "default", "--pin-budget", "0", "--admin-socket", socket])
    until(lambda: rig.pinned() == 0)


def test_a_pin_survives_a_hand_over_and_a_crash(tmp_path: Path) -> None:
    options = OPTIONS | {"ssd_bytes": 16 << 20}
    with NodeProcess(tmp_path, **options) as old:
        with at(tmp_path) as rig:
            rig.register("kind")
            rig.command("pin", "kind", "--ttl", "600")
            rig.store("kind", "kind")
            assert rig.found("kind", "kind") == BLOCKS
            sealed = pb.StatusRequest(sealed_keys=True)
            until(lambda: len(rig.admin.call(rig.admin.admin.Status, sealed).sealed_keys) == BLOCKS)
        with NodeProcess(tmp_path, takeover=True, **options) as new:
            assert old.wait() == 0
            with at(tmp_path) as rig:
                assert rig.pinned() == TEXT
                rig.flood()
                assert rig.pinned() == TEXT
            new.kill()
            with NodeProcess(tmp_path, **options), at(tmp_path) as rig:
                until(lambda: rig.found("kind", "kind") == BLOCKS)  # from SSD
                until(lambda: rig.pinned() == TEXT)
                rig.flood()
                assert rig.pinned() == TEXT


def test_a_pin_reaches_every_node_of_a_fleet(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with RedisServer(tmp_path / "redis") as redis:
        shared = OPTIONS | {"directory": redis.url, "insecure": "true", "keyring_dir": str(keys)}
        shared["epoch_lease_s"] = 0.5
        with contextlib.ExitStack() as stack:
            for name in ("one", "two"):
                node = NodeProcess(tmp_path / name, node_id=name, **shared)
                stack.enter_context(node)
            one, two = (stack.enter_context(at(tmp_path / name, keys)) for name in ("one", "two"))
            one.register("kind")
            until(lambda: ("kind", "1") in two.admin.state().templates)
            until(lambda: two.serves())
            assert two.store("kind", "kind") == BLOCKS
            one.command("pin", "kind", "--ttl", "600")
            until(lambda: two.pinned() == TEXT)
            two.flood()
            assert two.found("kind", "kind") == TEXT
            one.command("unpin", "kind")
            until(lambda: two.pinned() == 0)
