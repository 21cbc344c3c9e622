"""Proof 4, at the node: an engine that was taken over shows handles that were not made for what it asks.

Each attack is after the blocks of a victim. Each is refused as a bad handle; its twin is the same attack on
a node that lacks the one guard that it must break. For routers: `tests/router/test_attacks.py`.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import BadHandle, KVFabricError
from kvfabric.handle import MAC_BYTES, Handle, mint
from kvfabric.hashing import block_keys
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, TinyEngine, tiny_hello, tokens_of
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode
from tests.torture.tenants import Tenants, create_tenants

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

BLOCKS = 4


@dataclass
class Scene:
    """A victim's prompt is stored, whose text the attacker knows; the attacker has an engine session."""

    tenants: Tenants
    attacker: TinyEngine
    victim: str
    own: str

    def theirs(self, **changes: object) -> Handle:
        """A handle of the victim's that the attacker saw."""
        text = self.tenants.handle(self.victim, "seen")
        return msgspec.structs.replace(_decoded(text), **changes)

    def mine(self, **changes: object) -> Handle:
        """One that a router made for the attacker's own tenant, session and request."""
        made = _decoded(self.tenants.handle(self.own, "asked"))
        changes = {"audience": self.attacker.client.session} | changes
        return msgspec.structs.replace(made, **changes)

    def signed(self, handle: Handle) -> str:
        """As the router would."""
        return mint(handle, self.tenants._keyring.current_handle_key()[1])

    def take(self, request: str, handle: str) -> int:
        """How many of the victim's blocks the attacker is promised. Raises BadHandle."""
        opened = self.attacker.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        keys = block_keys(tokens_of("secret", BLOCKS), BLOCK_TOKENS, opened.namespace_key)
        matched = self.attacker.client.match(request, keys, deadline_s=DEADLINE_S)
        self.attacker.release(request)
        return matched.num_blocks


def _decoded(text: str) -> Handle:
    body = base64.urlsafe_b64decode(text + "==")[:-MAC_BYTES]
    return msgspec.msgpack.decode(body, type=Handle)


def _renamed(scene: Scene) -> tuple[str, str]:
    """The attacker's own handle with the victim's name in it, and the signature that it had."""
    own = base64.urlsafe_b64decode(scene.signed(scene.mine()) + "==")
    body = msgspec.msgpack.encode(scene.mine(tenant=scene.victim))
    return "asked", base64.urlsafe_b64encode(body + own[-MAC_BYTES:]).rstrip(b"=").decode()


def _made_up(scene: Scene) -> tuple[str, str]:
    return "asked", mint(scene.mine(tenant=scene.victim), os.urandom(32))


def _of_another_engine(scene: Scene) -> tuple[str, str]:
    return "seen", scene.signed(scene.theirs())


def _of_another_request(scene: Scene) -> tuple[str, str]:
    return "asked", scene.signed(scene.theirs(audience=scene.attacker.client.session))


def _expired(scene: Scene) -> tuple[str, str]:
    session = scene.attacker.client.session
    return "seen", scene.signed(scene.theirs(audience=session, expires_at=1_700_000_000))


ATTACKS: dict[str, tuple[Callable[[Scene], tuple[str, str]], str]] = {
    "forged: another name under one's own signature": (_renamed, "no_signature"),
    "forged: signed with a key of one's own": (_made_up, "no_signature"),
    "handle to another engine": (_of_another_engine, "no_audience"),
    "replayed for another request": (_of_another_request, "no_request"),
    "expired": (_expired, "no_expiry"),
}


@contextlib.contextmanager
def scene(directory: Path, *changes: str) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        node = stack.enter_context(ForkedNode(launcher, directory, changes=changes))
        admin = stack.enter_context(AdminClient(directory / "admin.sock"))
        engine = TinyEngine.connect(node.socket, tiny_hello())
        stack.callback(engine.client.close)
        attacker = TinyEngine.connect(node.socket, tiny_hello())
        stack.callback(attacker.client.close)
        victim, own = create_tenants(admin, 2)
        tenants = Tenants(directory, engine, [victim, own])
        assert tenants.store(victim, tenants.keys(victim, "secret", BLOCKS)) == BLOCKS
        yield Scene(tenants, attacker, victim, own)


def test_handles_made_for_something_else_are_refused(tmp_path: Path) -> None:
    with scene(tmp_path / "n") as found:
        for name, (attack, _) in ATTACKS.items():
            with pytest.raises(BadHandle):
                found.take(*attack(found))
            assert found.take("asked", found.signed(found.mine())) == 0, name
        # Cut, longer, or not text at all.
        whole = found.signed(found.theirs(audience=found.attacker.client.session))
        assert found.take("seen", whole) == BLOCKS, "this is what they are after"
        for broken in (*(whole[:end] for end in range(0, len(whole), 7)), whole + "A", "x" * 4096):
            if broken:
                with pytest.raises(BadHandle):
                    found.take("seen", broken)
        # Keys of no whole length, and more of them than a message may have.
        for keys in ([b"k" * 31], [b"k" * 32] * (1 << 20)):
            with pytest.raises((KVFabricError, ValueError)):
                found.attacker.client.match("asked", keys, deadline_s=DEADLINE_S)  # type: ignore[arg-type]


@pytest.mark.parametrize("guard", sorted({guard for _, guard in ATTACKS.values()}))
def test_without_a_guard_its_attack_succeeds(tmp_path: Path, guard: str) -> None:
    """The twins. The other attacks fail as before."""
    with scene(tmp_path / "n", guard) as found:
        for attack, breaks in ATTACKS.values():
            if breaks == guard:
                assert found.take(*attack(found)) == BLOCKS
            else:
                with pytest.raises(BadHandle):
                    found.take(*attack(found))
