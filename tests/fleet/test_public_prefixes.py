"""Public prefixes on a real node: which blocks tenants share, who pays for them, and who decides that.

Keys are made as an engine makes them, from what the node answers to a handle that the router minted.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from kvfabric_router.identity import Addressee, ModelIdentity, RequestIdentity
from kvfabric_router.prompt import Recognised, TemplateIndex
from kvfabric_router.tokenizers import ByteTokenizer

from kvfabric import tokenizer
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import BadHandle
from kvfabric.handle import Handle, mint, open_handle
from kvfabric.hashing import BlockHasher, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.state import RETIRED, RegistryState
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import PUBLIC_TENANT, BlockKey, Incarnation, Segment, TenantId
from tests.router.standin import registry_state, template

PUBLIC = "You are the assistant of everybody here."  # 40 tokens: two blocks and a half
TOOLS = " You may call search(text), and nothing else."  # 45 tokens: with PUBLIC five blocks, and 5
PRIVATE = "Only for those who are asked to know it."
QUESTION = " What is it that you are allowed to tell me about them? " * 2
WHOLE, SHARED = 9, 2
PART_BYTES = 4096


@dataclass
class Asked:
    """A request that is open at the node, and its keys as an engine makes them."""

    request: str
    keys: list[BlockKey]


@dataclass
class Fleet:
    admin: AdminClient
    engine: TinyEngine
    keyring: Keyring
    tenants: dict[str, TenantId] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def handle(
        self, who: str, text: str, request: str, *, believed: Recognised | None = None
    ) -> str:
        """`believed`: what a router would take for recognised if it asked its client."""
        state = self.admin.state()
        tokens = tokenizer.encode(text)
        hello = self.engine.hello
        identity = RequestIdentity(
            tenant=state.tenants[self.tenants[who]],
            state=state,
            keyring=self.keyring,
            token_ids=tokens,
            recognised=believed or TemplateIndex(state, ByteTokenizer()).recognise(tokens),
        )
        model = ModelIdentity(hello.model_revision, layout_fingerprint(hello.layout), BLOCK_TOKENS)
        return identity.mint(
            model,
            to=Addressee(self.engine.client.session),
            request_id=request,
            expires_at=int(time.time()) + 60,
        )

    def ask(self, who: str, text: str, *, believed: Recognised | None = None) -> Asked:
        request = f"request-{next(self.numbers)}"
        handle = self.handle(who, text, request, believed=believed)
        opened = self.engine.client.open_handle(request, handle, deadline_s=DEADLINE_S)
        hasher = BlockHasher(
            opened.namespace_key,
            BLOCK_TOKENS,
            segments=[
                Segment(s.template, s.version, Incarnation(s.incarnation), s.first_token)
                for s in opened.segments
            ],
            public_key=opened.public_key or None,
            public_tokens=opened.public_tokens,
        )
        return Asked(request, hasher.extend(tokenizer.encode(text)))

    def store(self, who: str, text: str, *, believed: Recognised | None = None) -> int:
        asked = self.ask(who, text, believed=believed)
        stored = self.engine.store(asked.request, asked.keys)
        self.engine.release(asked.request)
        return stored

    def matched(self, who: str, text: str, *, believed: Recognised | None = None) -> int:
        asked = self.ask(who, text, believed=believed)
        found = self.engine.client.match(asked.request, asked.keys, deadline_s=DEADLINE_S)
        self.engine.release(asked.request)
        return found.num_blocks

    def charged(self) -> dict[str, int]:
        """Blocks in host memory by who pays for them."""
        return self._blocks("host_bytes")

    def pinned(self) -> dict[str, int]:
        """Of these, those that a pinned template keeps."""
        return self._blocks("pinned_bytes")

    def _blocks(self, field: str) -> dict[str, int]:
        names = {tenant: name for name, tenant in self.tenants.items()} | {PUBLIC_TENANT: "public"}
        status = self.admin.call(self.admin.admin.Status, pb.StatusRequest())
        return {
            names[TenantId(row.tenant_id)]: num_bytes // PART_BYTES
            for row in status.usage
            if (num_bytes := getattr(row, field))
        }


@contextlib.contextmanager
def fleet(directory: Path) -> Iterator[Fleet]:
    with NodeProcess(directory) as node, AdminClient(directory / "admin.sock") as admin:
        engine = TinyEngine.connect(node.socket, tiny_hello())
        try:
            found = Fleet(admin, engine, Keyring.open(directory))
            for name in ("one", "two"):
                created = admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name=name))
                found.tenants[name] = TenantId(created.tenant.tenant_id)
            for name, text, is_public, after in (
                ("p", PUBLIC, True, []),
                ("s", PRIVATE, False, []),
                ("tools", TOOLS, True, ["p"]),
            ):
                request = pb.RegisterTemplateRequest(
                    name=name, version="1", text=text.encode(), is_public=is_public, after=after
                )
                admin.call(admin.registry.RegisterTemplate, request)
            yield found
        finally:
            engine.client.close()


@pytest.mark.slow
@pytest.mark.fleet
def test_tenants_share_what_is_public_and_nothing_else(tmp_path: Path) -> None:
    with fleet(tmp_path / "n") as found:
        text = PUBLIC + QUESTION
        assert found.store("one", text) == WHOLE
        assert found.charged() == {"public": SHARED, "one": WHOLE - SHARED}

        # The same text, and another that starts alike: the straddling block is the tenant's own.
        assert found.matched("one", text) == WHOLE
        assert found.matched("two", text) == SHARED
        assert found.matched("two", PUBLIC + " Something else, then. " * 4) == SHARED
        assert found.store("two", text) == WHOLE - SHARED
        assert found.matched("two", text) == WHOLE
        mine = WHOLE - SHARED
        assert found.charged() == {"public": SHARED, "one": mine, "two": mine}

        # Registered, but not for the public; the public text elsewhere than at the start; not quite it.
        elsewhere = (PRIVATE + QUESTION, " " + text, PRIVATE + text, PUBLIC.lower() + QUESTION)
        for other in elsewhere:
            assert found.store("one", other) > SHARED
            assert found.matched("one", other) > SHARED
            assert found.matched("two", other) == 0, other
        assert found.charged()["public"] == SHARED

        # Withdrawn: shared by nobody any more, and back with the version.
        found.admin.call(
            found.admin.registry.Invalidate, pb.InvalidateRequest(scope="template", name="p")
        )
        assert found.matched("one", text) == found.matched("two", text) == 0
        promote = pb.PromoteTemplateRequest(name="p", version="1")
        found.admin.call(found.admin.registry.PromoteTemplate, promote)
        assert found.matched("two", text) == WHOLE


@pytest.mark.slow
@pytest.mark.fleet
def test_pinned_texts_count_for_who_owns_their_blocks(tmp_path: Path) -> None:
    """The router tells the node, in the handle, where the texts that it recognised end."""
    with fleet(tmp_path / "n") as found:
        for name in ("p", "s"):
            pin = pb.PinTemplateRequest(name=name, ttl_s=600)
            found.admin.call(found.admin.registry.PinTemplate, pin)
        for who in ("one", "two"):
            found.store(who, PUBLIC + QUESTION)
        assert found.pinned() == {"public": SHARED}
        found.store("one", PRIVATE + QUESTION)
        assert found.pinned() == {"public": SHARED, "one": len(PRIVATE) // BLOCK_TOKENS}


@pytest.mark.slow
@pytest.mark.fleet
def test_public_templates_in_the_approved_order_are_shared_as_one(tmp_path: Path) -> None:
    """A system prompt and a list of tools. The twin is the other order, which nobody approved."""
    both, system = 5, 2
    with fleet(tmp_path / "n") as found:
        text = PUBLIC + TOOLS + QUESTION
        whole = found.store("one", text)
        assert found.charged() == {"public": both, "one": whole - both}
        assert found.matched("two", text) == both
        assert found.matched("two", PUBLIC + QUESTION) == system
        assert found.matched("two", PUBLIC + " " + TOOLS + QUESTION) == system
        turned = TOOLS + PUBLIC + QUESTION
        assert found.store("one", turned) == found.matched("one", turned) > both
        assert found.matched("two", turned) == 0

        # The second is withdrawn: the first stays shared, and warm. And back.
        invalidate = pb.InvalidateRequest(scope="template", name="tools")
        found.admin.call(found.admin.registry.Invalidate, invalidate)
        assert found.matched("one", text) == found.matched("two", text) == system
        promote = pb.PromoteTemplateRequest(name="tools", version="1")
        found.admin.call(found.admin.registry.PromoteTemplate, promote)
        assert found.matched("two", text) == both
        # The first: then nothing that follows is anybody's.
        invalidate = pb.InvalidateRequest(scope="template", name="p")
        found.admin.call(found.admin.registry.Invalidate, invalidate)
        assert found.matched("one", text) == found.matched("two", text) == 0


@pytest.mark.slow
@pytest.mark.fleet
def test_a_router_that_believed_its_client_would_share_secrets(tmp_path: Path) -> None:
    """The twin: boundaries are what the client says. And only who has the key can say so to a node."""
    secret = PRIVATE + QUESTION
    claim = Recognised(public_tokens=len(tokenizer.encode(secret)))
    with fleet(tmp_path / "n") as found:
        found.store("one", secret, believed=claim)
        assert found.matched("two", secret, believed=claim) > SHARED
        assert found.charged()["public"] > SHARED
        # As it is: the same tenants, the same text, recognised and not believed.
        found.store("one", secret)
        assert found.matched("one", secret)
        assert found.matched("two", secret) == 0

        # A client that makes such a handle itself, of one that was meant for it.
        client, session = found.engine.client, found.engine.client.session
        honest = found.handle("two", secret, "mine")
        keys = found.keyring.handle_keys()
        opened = open_handle(honest, keys, audience=session, now=time.time())
        forged = mint(replaced(opened, public_tokens=claim.public_tokens), b"k" * 32)
        with pytest.raises(BadHandle, match="not signed"):
            client.open_handle("mine", forged, deadline_s=DEADLINE_S)
        client.open_handle("mine", honest, deadline_s=DEADLINE_S)


def replaced(handle: Handle, **fields: object) -> Handle:
    return msgspec.structs.replace(handle, **fields)


# ---------------------------------------------------------------------- against a second opinion


def public_tokens(state: RegistryState, text: str) -> int:
    """By the definition: all before lie in a text that serves and is public, and nothing withdrawn began."""
    serving = [t for t in state.templates.values() if t.state != RETIRED]
    withdrawn = [text.find(t.text.decode()) for t in state.templates.values() if t.state == RETIRED]
    end = min((place for place in withdrawn if place >= 0), default=len(text))
    public = [t for t in serving if t.is_public]

    def longest(place: int, before: str) -> int:
        """Tried out: every text that may follow `before` here, and what may follow it."""
        fitting = [
            t
            for t in public
            if (before in t.after if before else not t.after)
            and text.find(t.text.decode()) == place
        ]
        return max([longest(place + len(t.text), t.name) for t in fitting], default=place)

    return min(longest(0, ""), end)


def test_recognition_agrees_with_the_definition() -> None:
    """Random texts of two letters, so that they contain, extend and overlap each other all the time."""
    chance = random.Random(9)
    found_public = found_cut = found_chained = 0
    for _ in range(6000):
        templates = [
            template(
                f"t{number}",
                "1",
                "".join(chance.choices("ab", k=chance.randrange(1, 7))),
                is_public=chance.random() < 0.7,
                state=RETIRED if chance.random() < 0.2 else "serving",
                after=[f"t{chance.randrange(4)}"] if chance.random() < 0.5 else [],
            )
            for number in range(4)
        ]
        state = registry_state(templates=templates)
        text = "".join(chance.choices("ab", k=12))
        expected = public_tokens(state, text)
        recognised = TemplateIndex(state, ByteTokenizer()).recognise(tokenizer.encode(text))
        assert recognised.public_tokens == expected, (templates, text)
        found_public += expected > 0
        starts = [t for t in templates if t.is_public and not t.after]
        found_chained += expected not in (0, *(len(t.text) for t in starts))
        found_cut += expected > 0 and recognised.cacheable_tokens == expected
    assert min(found_public, found_cut, found_chained) > 30
