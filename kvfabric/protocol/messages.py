"""Every message between an engine process and its node. Frozen structs, no behaviour.

Every message is a vector: its unit is a request or a chunk of blocks, never a block or a layer. Vectors
of fixed-size things are packed bytes: keys 32 B each, indexes and generations u32, offsets and lengths
u64, checksums 16 B (XXH3-128, big-endian), states and tiers one byte; integers little-endian. Times are
seconds relative to the receipt of the message, so the two clocks need not agree.

A node looks at the first `MAX_KEYS` keys of a Match, Load, Confirm or Recheck and the first `MAX_RESERVED`
of a Reserve, so that no message keeps others waiting; the rest misses or is refused with reason `too_many`.

Flow of one request:

    OpenHandle -> HandleOpened          once, the engine's scheduler
    Match      -> Matched               leased; asking again renews
    Load       -> Located               per (group, shard), a worker; brings SSD blocks into the arena
      ... the worker copies from the arena and verifies ...
    Confirm    -> Confirmed             after the copies ended: rights, generations and epochs still hold
    Recheck    -> Rechecked             what did not verify at the worker: is it corrupt here?
    Reserve    -> Reserved              per (group, shard), a worker; then it writes its window
    Commit     -> Committed             the daemon has copied and checksummed: the window is free again
    Release    -> Released              nothing of this request is touched any more

Engines of one host may read each other's HBM. A connection may begin with `Lend` (a pool's descriptor comes
with it) or `Borrow` instead of Hello; it ends with the answer.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

PROTOCOL_VERSION = 1

MAX_KEYS = 8192
MAX_RESERVED = 1024
MAX_PLACED = 1024

RequestId = Annotated[str, msgspec.Meta(max_length=1024)]
RequestIds = Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=1 << 16)]


class Role(enum.IntFlag):
    """What a connection of a session does."""

    SCHEDULER = 1
    WORKER = 2


class WirePart(msgspec.Struct, array_like=True, frozen=True):
    group: int
    shard: int
    num_bytes: int


class WireLayout(msgspec.Struct, array_like=True, frozen=True):
    """A `types.BlockLayout`, field by field."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    engine_block_tokens: int
    parts: tuple[WirePart, ...]
    kv_scales: str
    packing: str
    parallel: str
    rope: str
    attention: str


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """First frame of a connection. May carry one descriptor: the arena of an earlier daemon, returned.

    `us_per_token` and `growth` are what computing blocks again costs, a `types.RecomputeCost`; `serves` is
    `prefill`, `decode` or `both`. Older engines leave them out.

    `session` is empty for the first connection of an engine instance (the node mints one) and names it
    for every further one. A client that lost its node and reconnects from the same processes sends the
    old session with `resumed` true: by that it states that no copy from the arena is under way in any
    process of the session, and that windows of the old connection are not written any more.
    """

    version: int
    role: int
    session: bytes
    resumed: bool
    engine_id: str
    endpoint: str
    model: str
    model_revision: str
    adapter: str
    adapter_revision: str
    layout: WireLayout
    shard: int
    window_bytes: int
    us_per_token: float = 0.0
    growth: float = 0.0
    serves: str = "both"


class OpenHandle(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """`handle` empty: the request came without one (default tenant, if the node allows it)."""

    request_id: RequestId
    handle: str


class Match(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Longest leased prefix of `keys`. Idempotent per (session, request): asking again renews.

    Of a request whose blocks another engine is computing (`HandleOpened.wait_s`): answered once more than
    `beyond` leading blocks are here, none is to come any more, or after `wait_s`.
    """

    request_id: RequestId
    keys: bytes
    beyond: int = 0
    wait_s: float = 0.0


class Load(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Where the parts (`group`, `shard`) of matched `keys` lie in the arena, in their order."""

    request_id: RequestId
    keys: bytes
    group: int
    shard: int


class Confirm(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """The copies of everything located for this request have ended: did every right hold throughout?"""

    request_id: RequestId
    keys: bytes
    generations: bytes
    group: int
    shard: int


class Reserve(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """Ask to store consecutive blocks of a chain; `parent` is the key before the first, or 32 zeros."""

    request_id: RequestId
    parent: bytes
    keys: bytes
    group: int
    shard: int


class Commit(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """Parts `indexes` (into Reserve.keys) lie at `offsets` of this connection's window."""

    reservation: int
    indexes: bytes
    offsets: bytes


class Abort(msgspec.Struct, array_like=True, frozen=True, tag=8):
    """Give a reservation up. Idempotent."""

    reservation: int


class Release(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """No process of the session reads anything of these requests any more. Idempotent."""

    request_ids: RequestIds


class BlockRun(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive blocks of one chain, as 8-byte prefixes. Hints: they may collide or be stale."""

    namespace_tag: bytes
    parent: bytes
    keys: bytes


BlockRuns = Annotated[tuple[BlockRun, ...], msgspec.Meta(max_length=1 << 17)]


class EngineEvents(msgspec.Struct, array_like=True, frozen=True, tag=10):
    """What changed in the engine's own HBM pool. `cleared`: all was dropped before `stored`."""

    stored: BlockRuns
    removed: BlockRuns
    cleared: bool


class Ping(msgspec.Struct, array_like=True, frozen=True, tag=11):
    """`dropped`: up to which registry version this engine's HBM holds nothing that was struck off; -1 from
    a process that does not keep the cache there. `kept`: why what was struck off stays, if it does."""

    dropped: int = -1
    kept: str = ""


class Bye(msgspec.Struct, array_like=True, frozen=True, tag=12):
    """Orderly end of this connection: nothing of it is in flight and its window is not used any more."""


class Recheck(msgspec.Struct, array_like=True, frozen=True, tag=13):
    """Parts that this request leases did not verify where they were read: the node looks for itself, and
    takes corrupt ones out. An engine's word alone takes nothing out."""

    request_id: RequestId
    keys: bytes
    group: int
    shard: int


class PoolName(msgspec.Struct, array_like=True, frozen=True):
    """Whose pool: a session's, of the worker with this shard."""

    session: bytes
    shard: int


class Lend(msgspec.Struct, array_like=True, frozen=True, tag=14):
    """First and only frame of a connection, with one descriptor: the HBM pool `name`, page by page. From a
    process of that session only."""

    name: PoolName
    num_pages: int
    page_bytes: int


class Borrow(msgspec.Struct, array_like=True, frozen=True, tag=15):
    """First and only frame of a connection: `borrower`, a session of the sender's, wants to map pool `name`,
    which `Pong` said is lent to it."""

    borrower: bytes
    name: PoolName


class Placed(msgspec.Struct, array_like=True, frozen=True, tag=16):
    """The parts of `keys` (at most `MAX_PLACED`, KV group 0) lie in these pages (u32, equally many a key) of
    the pool that the sender lends as `shard`. A hint: over when the pages are written again, said or not."""

    shard: int
    keys: bytes
    pages: bytes


Request = (
    Hello
    | OpenHandle
    | Match
    | Load
    | Confirm
    | Reserve
    | Commit
    | Abort
    | Release
    | EngineEvents
    | Ping
    | Bye
    | Recheck
    | Lend
    | Borrow
    | Placed
)


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=64):
    """Answer to Hello. Carries the arena (read-only) and, to a worker, its window, as descriptors.

    `arena_bytes` 0 means that the host tier is not there (yet): no descriptor of it comes.
    """

    version: int
    session: bytes
    boot_id: bytes
    node_id: str
    arena_bytes: int
    window_bytes: int
    lease_s: float
    reservation_s: float
    arena_adopted: bool


class WireSegment(msgspec.Struct, array_like=True, frozen=True):
    template: str
    version: str
    incarnation: bytes
    first_token: int


class HandleOpened(msgspec.Struct, array_like=True, frozen=True, tag=65):
    """`cacheable_tokens` -1: no limit. `public_key` is empty without a public prefix.

    `hands_over`: another engine waits for the prompt's blocks, so each chunk of them is to be stored at once.
    `wait_s` above 0: another engine is computing them, and so long they are worth waiting for.
    """

    namespace_key: bytes
    public_key: bytes
    public_tokens: int
    cacheable_tokens: int
    segments: tuple[WireSegment, ...]
    no_store: bool
    no_read: bool
    hands_over: bool = False
    wait_s: float = 0.0


class Matched(msgspec.Struct, array_like=True, frozen=True, tag=66):
    """`tiers`: one byte a block (0 host, 1 SSD, 2 on its way from a peer). `reason` tells why the block after
    the last missed. `more`: another engine is computing it, so it is worth asking again."""

    num_blocks: int
    tiers: bytes
    lease_s: float
    reason: str
    more: bool = False


class Located(msgspec.Struct, array_like=True, frozen=True, tag=67):
    """The first `num_blocks` of what was asked are in the arena; `reason` tells why not the rest.

    Some may also lie in HBM of other engines: `pools` names it if any do, then `pool_of` has one byte a block
    (0 none, else which of `pools`, from 1 on) and `pool_pages` its pages there (u32, equally many a block).
    """

    num_blocks: int
    part_bytes: int
    offsets: bytes
    generations: bytes
    checksums: bytes
    reason: str
    pools: tuple[PoolName, ...] = ()
    pool_of: bytes = b""
    pool_pages: bytes = b""


class Confirmed(msgspec.Struct, array_like=True, frozen=True, tag=68):
    """Only the first `num_blocks` may be used."""

    num_blocks: int
    reason: str


class Reserved(msgspec.Struct, array_like=True, frozen=True, tag=69):
    """`states`: one `types.GrantState` byte a part. `reservation` 0: nothing was granted."""

    reservation: int
    states: bytes
    ttl_s: float
    reason: str


class Committed(msgspec.Struct, array_like=True, frozen=True, tag=70):
    """`states`: 1 for each index of Commit that is stored now, else 0."""

    states: bytes
    reason: str


class Done(msgspec.Struct, array_like=True, frozen=True, tag=71):
    """Answer to Abort, Release, EngineEvents, Lend, Placed and Bye."""


class Rechecked(msgspec.Struct, array_like=True, frozen=True, tag=73):
    """How many of the parts were corrupt in the arena, and are gone."""

    num_corrupt: int


class Pong(msgspec.Struct, array_like=True, frozen=True, tag=74):
    """Answer to Ping. `struck`: what was struck off for good after `dropped`, up to registry version
    `version`: incarnations (16 B) and namespace tags (8 B). An engine lets go of the blocks made of these.
    `pools`: HBM that the caller lends or may borrow now; it unmaps every other."""

    version: int
    struck: tuple[bytes, ...]
    pools: tuple[PoolName, ...] = ()


class Lent(msgspec.Struct, array_like=True, frozen=True, tag=75):
    """Answer to Borrow. Carries the pool as a descriptor."""

    num_pages: int
    page_bytes: int


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=72):
    """The request failed as a whole; `code` is a class of `kvfabric.errors`."""

    code: str
    message: str


Reply = (
    Welcome
    | HandleOpened
    | Matched
    | Located
    | Confirmed
    | Reserved
    | Committed
    | Done
    | Failed
    | Rechecked
    | Pong
    | Lent
)
