"""Engines of this host that lend each other their HBM: whose pool is whose, and what lies where in it.

The node passes a pool's descriptor from the engine that made it to those that load the same model in the
same layout, and remembers which pages stored blocks lie in, as their engine said. It never maps one. What it
remembers are hints: the engine that reads there verifies what it got against the checksum of the block that
it leases here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from kvfabric.daemon.sessions import Session
from kvfabric.errors import AccessError, NotFound, RemoteProtocolError
from kvfabric.protocol.messages import (
    MAX_PLACED,
    Borrow,
    EngineEvents,
    Lend,
    Lent,
    Load,
    Located,
    Placed,
    PoolName,
)
from kvfabric.types import KEY_BYTES, SessionId

PREFIX_BYTES = 8
"""Of a key, as in events."""
_MAX_PAGES = 1 << 31
_MAX_LENT_BYTES = 1 << 44
_GROUP = 0
_Place = tuple[PoolName, bytes]


@dataclass(slots=True)
class _Pool:
    owner: Session
    descriptor: int
    lent: Lent
    keys: dict[bytes, bytes] = field(default_factory=dict)
    """By the first of a block's pages: prefix of its key. At most one for each page of the pool."""


class Pools:
    """Of this daemon. What its sessions lent is let go of when they end, and so when it stops."""

    def __init__(self, session: Callable[[bytes], Session | None]) -> None:
        """`session`: a session with open connections, by id."""
        self._session = session
        self._pools: dict[PoolName, _Pool] = {}
        self._places: dict[tuple[bytes, int], _Place] = {}  # by prefix of a key, and shard

    def __repr__(self) -> str:
        return f"<Pools: {len(self._pools)} lent, {len(self._places)} blocks in them>"

    def ended(self, session: SessionId) -> None:
        """Nobody keeps the memory of an engine that is gone: its borrowers hear of it at their next ping."""
        for name in [name for name in self._pools if name.session == session]:
            self._drop(name)

    def lend(self, message: Lend, sender: Callable[[Session], bool], descriptor: int) -> None:
        """Takes `descriptor` over unless it raises. `sender`: is the sending process one of that session?

        Raises NotFound, AccessError, RemoteProtocolError."""
        owner = self._known(message.name.session, sender)
        sizes = (message.num_pages, message.page_bytes)
        if min(sizes) <= 0 or max(sizes) > _MAX_PAGES or sizes[0] * sizes[1] > _MAX_LENT_BYTES:
            raise RemoteProtocolError(f"no pool has {sizes[0]} pages of {sizes[1]} B")
        self._drop(message.name)
        lent = Lent(message.num_pages, message.page_bytes)
        self._pools[message.name] = _Pool(owner, descriptor, lent)

    def borrow(self, message: Borrow, sender: Callable[[Session], bool]) -> tuple[Lent, int]:
        """What to answer, and the descriptor, which stays ours. Raises NotFound and AccessError."""
        borrower = self._known(message.borrower, sender)
        pool = self._pools.get(message.name)
        if pool is None:
            raise NotFound("no such pool is lent")
        if not _fits(pool.owner, borrower):
            raise AccessError("that pool holds another model, or another layout")
        return pool.lent, pool.descriptor

    def offered(self, session: bytes) -> tuple[PoolName, ...]:
        """What this session lends or may borrow."""
        caller = self._session(session)
        if caller is None:
            return ()
        return tuple(name for name, pool in self._pools.items() if _fits(pool.owner, caller))

    def placed(self, session: SessionId, message: Placed) -> None:
        """Raises RemoteProtocolError for vectors that do not fit each other. Of a pool that is not lent (any
        more) it says nothing."""
        name = PoolName(session, message.shard)
        pool = self._pools.get(name)
        count = len(message.keys) // KEY_BYTES
        if len(message.keys) % KEY_BYTES or not 0 < count <= MAX_PLACED:
            raise RemoteProtocolError(f"1 to {MAX_PLACED} keys of {KEY_BYTES} B are placed at once")
        if len(message.pages) % (4 * count) or not message.pages:
            raise RemoteProtocolError("each key is placed in equally many pages")
        if pool is None:
            return
        if int(np.frombuffer(message.pages, "<u4").max()) >= pool.lent.num_pages:
            raise RemoteProtocolError("a block is placed outside of its pool")
        size = len(message.pages) // count
        for number in range(count):
            prefix = message.keys[KEY_BYTES * number : KEY_BYTES * number + PREFIX_BYTES]
            pages = message.pages[size * number : size * (number + 1)]
            before = pool.keys.get(pages[:4])
            if before is not None:
                self._forget(name, before)
            pool.keys[pages[:4]] = prefix
            self._places[prefix, message.shard] = (name, pages)

    def heard(self, session: SessionId, events: EngineEvents) -> None:
        """What an engine's pool let go of does not lie there any more."""
        names = [name for name in self._pools if name.session == session]
        for name in names:
            if events.cleared:
                self._forget_all(name)
            for run in events.removed:
                for at in range(0, len(run.keys), PREFIX_BYTES):
                    self._forget(name, run.keys[at : at + PREFIX_BYTES])

    def name_pools(self, session: Session, message: Load, located: Located) -> Located:
        """`located`, with the pools that its first `MAX_PLACED` blocks also lie in."""
        if not self._places or message.group != _GROUP:
            return located
        found: list[tuple[int, _Place]] = []
        for number in range(min(located.num_blocks, MAX_PLACED)):
            prefix = message.keys[KEY_BYTES * number : KEY_BYTES * number + PREFIX_BYTES]
            place = self._places.get((prefix, message.shard))
            if place is not None and place[0].session != session.id:
                found.append((number, place))
        found = [one for one in found if _fits(self._pools[one[1][0]].owner, session)]
        if not found:
            return located
        size = len(found[0][1][1])
        pool_of, pages = bytearray(located.num_blocks), bytearray(size * located.num_blocks)
        names: list[PoolName] = []
        for number, (name, where) in found:
            if name not in names and len(names) < 255:
                names.append(name)
            if name in names and len(where) == size:
                pool_of[number] = names.index(name) + 1
                pages[size * number : size * (number + 1)] = where
        return msgspec.structs.replace(
            located, pools=tuple(names), pool_of=bytes(pool_of), pool_pages=bytes(pages)
        )

    def _known(self, name: bytes, sender: Callable[[Session], bool]) -> Session:
        session = self._session(name)
        if session is None:
            raise NotFound(f"no session {name.hex()[:8]} is open here")
        if not sender(session):
            raise AccessError("only the processes of a session lend and borrow for it")
        return session

    def _drop(self, name: PoolName) -> None:
        self._forget_all(name)
        pool = self._pools.pop(name, None)
        if pool is not None:
            os.close(pool.descriptor)

    def _forget_all(self, name: PoolName) -> None:
        pool = self._pools.get(name)
        if pool is not None:
            for prefix in list(pool.keys.values()):
                self._forget(name, prefix)

    def _forget(self, name: PoolName, prefix: bytes) -> None:
        place = self._places.get((prefix, name.shard))
        if place is None or place[0] != name:
            return
        del self._places[prefix, name.shard]
        self._pools[name].keys.pop(place[1][:4], None)


def _fits(owner: Session, borrower: Session) -> bool:
    """Whether the two have KV in common at all."""
    ours, theirs = owner.hello, borrower.hello
    same = ours.model_revision == theirs.model_revision
    return same and owner.fingerprint == borrower.fingerprint
