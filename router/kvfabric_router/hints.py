"""What a node should begin to bring because a request was just sent to one of its engines. Pure.

An engine asks its node when it comes to the request; until then the node can read blocks from SSD or fetch
them from a peer. The hint leaves at the moment of choice, beside the request, which never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfabric.handle import PARAMS_FIELD
from kvfabric.types import NodeId

if TYPE_CHECKING:
    from collections import deque

    from kvfabric_router.dispatch import Plan

MAX_BLOCKS = 4096
MAX_MESSAGE_BYTES = 512 << 10
"""Of one message's keys; a node takes messages of up to 1 MiB."""


@dataclass(frozen=True, slots=True)
class Hint:
    """`handle` as the engine gets it; `keys`: the prompt's blocks from the first on, 32 B each."""

    node_id: NodeId
    handle: str
    keys: bytes


def hint_of(plan: Plan) -> Hint | None:
    """None if HBM and the host tier have all of the prompt, as far as is known, or another engine computes
    it. What a node has on SSD or at its peers only it can tell."""
    engine, reuse = plan.engine, plan.choice.reuse
    if not plan.keys or not plan.has_handle or not plan.is_exact or plan.errand is not None:
        return None
    if engine.node_id is None or engine.model is None:
        return None
    if reuse.hbm_tokens + reuse.host_tokens >= len(plan.keys) * engine.model.block_tokens:
        return None
    handle = plan.fields["kv_transfer_params"][PARAMS_FIELD]
    return Hint(engine.node_id, handle, b"".join(plan.keys[:MAX_BLOCKS]))


def messages(waiting: deque[Hint]) -> Iterator[list[Hint]]:
    """What waits, by messages; each takes its hints off when it is asked for."""
    while waiting:
        some = [waiting.popleft()]
        size = len(some[0].keys)
        while waiting and size + len(waiting[0].keys) <= MAX_MESSAGE_BYTES:
            some.append(waiting.popleft())
            size += len(some[-1].keys)
        yield some
