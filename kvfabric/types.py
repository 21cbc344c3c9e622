"""The nouns that every part of kvfabric agrees on. Pure data: no I/O, no hashing, no clock."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

TenantId = NewType("TenantId", str)
"""Opaque id of a tenant (`t-` and 16 hex digits, or `default`). Never the customer's name."""

NodeId = NewType("NodeId", str)
SessionId = NewType("SessionId", bytes)
"""16 random bytes: one engine instance, with its scheduler's connection and its workers'."""

BootId = NewType("BootId", bytes)
"""16 random bytes: one life of a node daemon."""

Incarnation = NewType("Incarnation", bytes)
"""128 random bits, never used twice: of one registration of a template version, or of one invalidation of
a tenant, model or adapter. Enters keys and salts."""

Epoch = NewType("Epoch", int)
"""Counter of a scope; rises at every change of it; fences, and is never part of a key."""

BlockKey = NewType("BlockKey", bytes)
"""32 bytes; `kvfabric.hashing` is the only maker."""

KEY_BYTES = 32
ENGINE_ROLES = ("prefill", "decode", "both")
"""What an engine is for: prompts that others answer, answers to prompts that others may compute, or both."""

DEFAULT_TENANT = TenantId("default")
PUBLIC_TENANT = TenantId("public")
"""Owner of the blocks of operator-approved public prefixes."""


class Part(NamedTuple):
    """What is reserved, stored, checked and moved: one KV group's shard of one block."""

    key: BlockKey
    group: int
    shard: int


class TierName(enum.StrEnum):
    HBM = "hbm"
    HOST = "host"
    SSD = "ssd"
    PEER = "peer"


class MissReason(enum.StrEnum):
    """Why a block was not served or not stored: one enum for metrics, explanations, events and wire.

    A node and an engine say what they see of keys. Only a router sees prompts: OTHER_LAYOUT and DRIFTED are
    its words for what a node calls ABSENT.
    """

    NONE = "none"  # not a miss
    ABSENT = "absent"  # never stored, or forgotten without a trace
    OTHER_LAYOUT = "other_layout"  # stored by engines whose KV is laid out differently
    DRIFTED = "drifted"  # the prompt no longer starts as those did that hit
    EVICTED = "evicted"  # was here, gave way to others
    PENDING = "pending"  # somebody is storing it now
    FENCED = "fenced"  # an epoch moved since the handle was made
    WITHDRAWN = "withdrawn"  # its template version was taken out of service
    NO_READ = "no_read"  # the request or its tenant opted out
    NO_HANDLE = "no_handle"  # no valid handle and none may be assumed
    NO_EPOCH_LEASE = "no_epoch_lease"  # the node cannot know what was withdrawn
    LEASE_BUDGET = "lease_budget"  # the tenant holds as many leased bytes as it may
    CORRUPT = "corrupt"  # its bytes did not verify
    EXPIRED = "expired"  # older than the tenant's max_age
    TIER_DOWN = "tier_down"  # the tier that holds it is out of service
    TOO_MANY = "too_many"  # beyond what a node looks at for one message
    TOO_SLOW = "too_slow"  # there, but computing it is sooner done than fetching it
    DEADLINE = "deadline"  # the answer would have come too late
    NODE_DOWN = "node_down"  # no daemon to ask
    NO_STORE = "no_store"  # not stored: the request or its tenant opted out
    OVER_QUOTA = "over_quota"  # not stored: the tenant may hold no more
    NO_SPACE = "no_space"  # not stored: no slot, no row or no window
    NO_PARENT = "no_parent"  # not stored: the block before it is not there


class GrantState(enum.IntEnum):
    """Answer of `reserve` for one part."""

    GRANTED = 0
    EXISTS = 1  # READY already: nothing to store
    PENDING = 2  # another reservation is storing it
    REFUSED = 3  # quota, space or policy; the reason is in the reply


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part of a block as its layout declares it."""

    group: int
    shard: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Everything about an engine's KV tensors that decides whether bytes are interchangeable.

    `packing` names page packing and instruction set (KV pages on CPU are packed per ISA); `attention`
    names window, sink and sparsity; `rope` the rotary settings. Two layouts with equal fingerprints
    hold interchangeable bytes.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    engine_block_tokens: int
    parts: tuple[PartSpec, ...]
    kv_scales: str = "none"
    packing: str = "plain"
    parallel: str = "tp1"
    rope: str = ""
    attention: str = "full"

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block: all parts."""
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Namespace:
    """What changes KV values, or who may read them (design 3). Its key is made by `hashing`.

    `incarnations`: those of the tenant, model and adapter that were invalidated, in that order; none of a
    scope that never was. `registry.state.namespace_of` fills them in.
    """

    tenant: TenantId
    model_revision: str
    layout_fingerprint: bytes
    adapter: str = ""
    adapter_revision: str = ""
    incarnations: tuple[Incarnation, ...] = ()


@dataclass(frozen=True, slots=True)
class RecomputeCost:
    """What an engine says of its own prefill. `us_per_token` 0: unknown.

    `us_per_token`: microseconds for a token of a short prompt. `growth`: by which share of that the cost
    rises with each token before (attention): 3.5e-5 for an 8B model on an H100, which takes 33 us a token
    around the 2,500th and 58 around the 24,000th.
    """

    us_per_token: float = 0.0
    growth: float = 0.0


UNKNOWN_COST = RecomputeCost()


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one registered template version inside a prompt, from `first_token` on.

    `num_tokens`: length of its text, 0 where nobody said; it follows from the rest and is no part of it.
    """

    template: str
    version: str
    incarnation: Incarnation
    first_token: int
    num_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ExtraInput:
    """Content other than token ids that the KV of a prompt depends on (image, audio, embeddings).

    `digest` is 32 bytes of the content itself, never a caller's own id for it.
    """

    kind: str
    digest: bytes
    dtype: str
    shape: tuple[int, ...]
    first_token: int
    num_tokens: int


def fabric_scope() -> str:
    return "fabric"


def tenant_scope(tenant: str) -> str:
    return f"tenant:{tenant}"


def model_scope(model_revision: str) -> str:
    return f"model:{model_revision}"


def adapter_scope(adapter: str) -> str:
    return f"adapter:{adapter}"


def template_scope(template: str) -> str:
    return f"template:{template}"
