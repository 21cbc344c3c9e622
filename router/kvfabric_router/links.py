"""Which nodes a router is linked to: those that its configuration names, and those that it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from kvfabric.types import NodeId, TenantId
from kvfabric_router.diagnosis import NodeSight
from kvfabric_router.hints import Hint
from kvfabric_router.nodes import NodeLink, Told

LOOK_EVERY_S = 0.5
GONE_AFTER_S = 10.0
"""A node that is not in the directory may be there again soon: its link tries on for so long."""


class Links:
    """One link for each node: those that are named, and those that `found` finds, as they come and go."""

    def __init__(self, make: Callable[[str, bool], NodeLink], named: Iterable[str]) -> None:
        """`make(target, is_first)`: a link that is not running yet."""
        self._make = make
        self._named = tuple(named)
        self._links: dict[str, tuple[NodeLink, asyncio.Task[None]]] = {}
        self._seen: dict[str, float] = {}
        self._looked = False

    def __repr__(self) -> str:
        return f"<Links to {sorted(self._links)}>"

    @property
    def num_connected(self) -> int:
        return sum(link.connected for link, _ in self._links.values())

    @property
    def are_known(self) -> bool:
        """Whether what each node holds was learned once, or asked for in vain; False at the start."""
        return self._looked and all(link.is_settled for link, _ in self._links.values())

    def sights(self) -> list[NodeSight]:
        return [
            NodeSight(
                link.target, link.connected, link.version, link.clock_ahead_s, link.stale_serves
            )
            for link, _ in self._links.values()
        ]

    def hint(self, hint: Hint) -> None:
        """To the node that it is for, if there is a link to it."""
        for link, _ in self._links.values():
            if link.node_id == hint.node_id:
                link.hint(hint)
                return

    async def end_handoff(self, node: NodeId, name: str, tenant: TenantId) -> None:
        """Have a node's engine wait no more for a prompt that nobody computes, if there is a link to it."""
        for link, _ in self._links.values():
            if link.node_id == node:
                await link.end_handoff(name, tenant)
                return

    async def lookup(self, node: NodeId | None, request_id: str, tenant: TenantId) -> Told | None:
        """What a node answered to the lookup of a tenant's request; None if nobody can tell."""
        for link, _ in self._links.values():
            if node and link.node_id == node:
                return await link.lookup(request_id, tenant)
        return None

    async def run(self, found: Callable[[], Iterable[str]]) -> None:
        """Serve all links until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._look(group, found())
                    self._looked = True
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._links.clear()  # ended tasks keep their channels alive

    def _look(self, group: asyncio.TaskGroup, found: Iterable[str]) -> None:
        now = asyncio.get_running_loop().time()
        self._seen |= dict.fromkeys((*self._named, *found), now)
        for target in [t for t, at in self._seen.items() if now - at > GONE_AFTER_S]:
            del self._seen[target]
            self._links.pop(target)[1].cancel()
        for number, target in enumerate(self._seen):
            if target not in self._links:
                link = self._make(target, number == 0)
                self._links[target] = link, group.create_task(link.run())
