"""A node that lost its epoch lease while blocks of a tenant, model or adapter were invalidated elsewhere.

A router that did not lose its own sends handles under the new epochs meanwhile. Whoever opens one by the old
state gets the key of the namespace that is gone: of blocks in the engine's own HBM, and of those here as
soon as the node has a lease again and before it has destroyed them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvfabric.daemon import grants, handlers
from kvfabric.daemon.handlers import Caller, Services
from kvfabric.daemon.sessions import Session
from kvfabric.errors import Fenced
from kvfabric.events.stream import EventStream
from kvfabric.handle import FORMAT_VERSION, Handle, mint
from kvfabric.hashing import ROOT_PARENT, block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol.messages import HandleOpened, Match, OpenHandle, Release, Reserve
from kvfabric.registry.changes import initial_state, invalidate_scope
from kvfabric.registry.state import RegistryState, scopes_of
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.engine import BLOCK_TOKENS, tiny_hello, tokens_of
from kvfabric.tiers.arena import Arena
from kvfabric.types import DEFAULT_TENANT, BlockKey, MissReason, SessionId, TenantId, model_scope

HELLO = tiny_hello()


@dataclass
class Rig:
    """One session at a store; `usable`: what the node may serve by now."""

    store: BlockStore
    keyring: Keyring
    state: RegistryState
    usable: RegistryState | None

    def __post_init__(self) -> None:
        layout = HELLO.layout
        wire = HELLO.to_wire(session=b"", resumed=False)
        session = Session(SessionId(b"s" * 16), wire, layout, layout_fingerprint(layout))
        services = Services(
            store=self.store,
            keyring=self.keyring,
            registry=lambda: self.usable,
            events=EventStream(boot_id=bytes(16)),
            require_handle=True,
            wall_clock=lambda: 0.0,
        )
        self.caller = Caller(services, session, memoryview(bytearray(1 << 16)))
        self.store.open_session(session.id, layout)

    def open(self, request: str, state: RegistryState) -> HandleOpened:
        """With a handle that a router minted under `state`."""
        key_id, key = self.keyring.current_handle_key()
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=DEFAULT_TENANT,
            model_revision="rev",
            adapter="",
            adapter_revision="",
            layout_fingerprint=self.caller.session.fingerprint,
            segments=(),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=state.epochs_of(scopes_of(DEFAULT_TENANT, "rev")),
            audience=self.caller.session.id,
            request_id=request,
            expires_at=60,
        )
        return handlers.open_handle(self.caller, OpenHandle(request, mint(handle, key)))

    async def store_blocks(self) -> list[BlockKey]:
        opened = self.open("writer", self.state)
        keys = block_keys(tokens_of("prompt", 2), BLOCK_TOKENS, opened.namespace_key)
        reserved = handlers.reserve(
            self.caller, Reserve("writer", ROOT_PARENT, b"".join(keys), 0, 0)
        )
        committed = await self.store.commit(
            self.caller.session.id,
            reserved.reservation,
            np.arange(2, dtype="<u4").tobytes(),
            self.caller.window,
            np.zeros(2, dtype="<u8").tobytes(),
        )
        assert sum(committed.states) == 2
        handlers.release(self.caller, Release(("writer",)))
        return keys

    def match(self, request: str, keys: list[BlockKey]) -> int:
        return handlers.match(self.caller, Match(request, b"".join(keys))).num_blocks


@contextmanager
def arena() -> Iterator[Arena]:
    made = Arena.create(1 << 20)
    try:
        yield made
    finally:
        made.close()


async def _story(directory: Path) -> int:
    """How many blocks of an invalidated model are served to a request that came without a lease."""
    state = initial_state()
    usable: list[RegistryState | None] = [state]
    with arena() as memory:
        async with BlockStore(
            limits=StoreLimits(host_bytes=1 << 20, max_blocks=64, scrub_bytes_per_s=0),
            registry=lambda: usable[0],
            clock=asyncio.get_running_loop().time,
            events=EventStream(boot_id=bytes(16)),
            ssd=None,
        ) as store:
            store.attach_arena(memory)
            rig = Rig(store, Keyring.create_or_open(directory), state, state)
            keys = await rig.store_blocks()
            rig.open("reader", state)
            assert rig.match("reader", keys) == 2
            usable[0] = rig.usable = None
            newer = invalidate_scope(state, model_scope("rev"), "retire_model").state
            opened = rig.open("late", newer)
            assert block_keys(tokens_of("prompt", 2), BLOCK_TOKENS, opened.namespace_key) == keys
            usable[0] = rig.usable = newer
            return rig.match("late", keys)


async def test_without_a_lease_no_handle_opens(tmp_path: Path) -> None:
    with pytest.raises(Fenced, match="no epoch lease"):
        await _story(tmp_path)


async def test_a_handle_that_opens_by_an_old_state_is_served_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the store's own fence lets it pass, for the handle's epochs are the newest."""

    class Nothing(RegistryState):
        """Known to have changed."""

        def fence_reason(self, *_: object) -> MissReason:
            return MissReason.NONE

    def believing(services: Services) -> RegistryState:
        return services.registry() or Nothing()

    monkeypatch.setattr(handlers, "state_of", believing)
    monkeypatch.setattr(grants, "state_of", believing)
    assert await _story(tmp_path) == 2


async def test_a_router_is_told_why(tmp_path: Path) -> None:
    state = initial_state()
    async with BlockStore(
        limits=StoreLimits(host_bytes=1 << 20, max_blocks=64),
        registry=lambda: None,
        clock=asyncio.get_running_loop().time,
        events=EventStream(boot_id=bytes(16)),
        ssd=None,
    ) as store:
        rig = Rig(store, Keyring.create_or_open(tmp_path), state, None)
        with pytest.raises(Fenced):
            rig.open("r", state)
        # Nor does it open one for another node.
        terms = grants.Terms(tenant=DEFAULT_TENANT)
        weights = grants.Weights("rev", "", "", rig.caller.session.fingerprint, BLOCK_TOKENS)
        with pytest.raises(Fenced):
            grants.granted(rig.caller.services, terms, weights)
        told = rig.caller.services.lookups.find("r", TenantId(DEFAULT_TENANT))
        assert told is not None
        assert told.reason is MissReason.NO_EPOCH_LEASE
