"""Which model or adapter an administrator means, whatever node of the fleet is asked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from kvfabric.config import NodeConfig
from kvfabric.errors import ConfigError, ConnectError, NotFound
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.home import own_address, security_of
from kvfabric.registry.state import RegistryState
from kvfabric.tls import Security, open_channel
from kvfabric.types import adapter_scope, model_scope

if TYPE_CHECKING:
    from kvfabric.registry.redis.registry import HolderRecord

_ASK_S = 2.0
_DIGEST = re.compile(r"([a-z0-9]+:)?[0-9a-f]{16,}")


@dataclass(frozen=True, slots=True)
class FleetModels:
    """`own` gives what this node knows. `holders`: everybody of the directory; None where there is none."""

    own: Callable[[], Sequence[pb.Model]]
    holders: Callable[[], Awaitable[Iterable[HolderRecord]]] | None = None
    security: Security = field(default_factory=lambda: Security("node"))
    own_address: str = ""

    @classmethod
    def of(
        cls,
        config: NodeConfig,
        own: Callable[[], Sequence[pb.Model]],
        holders: Callable[[], Awaitable[Iterable[HolderRecord]]] | None,
    ) -> FleetModels:
        return cls(own, holders, security_of(config), own_address(config))

    async def known(self) -> tuple[list[pb.Model], list[str]]:
        """What all nodes know, and the names of nodes that do not answer. Raises KVFabricError if the
        directory does not."""
        others = {
            holder.address: holder.name
            for holder in (await self.holders() if self.holders is not None else ())
            if holder.kind == "node" and holder.address not in ("", self.own_address)
        }
        async with asyncio.TaskGroup() as group:
            asked = {name: group.create_task(self._ask(at)) for at, name in others.items()}
        found, silent = list(self.own()), []
        for name, task in asked.items():
            answer = task.result()
            if answer is None:
                silent.append(name)
            else:
                found += answer.models
        return found, silent

    async def _ask(self, address: str) -> pb.NodeDescription | None:
        try:
            async with open_channel(address, self.security, ()) as channel:
                stub = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
                found: pb.NodeDescription = await stub.Describe(
                    pb.DescribeRequest(), timeout=_ASK_S
                )
        except (grpc.aio.AioRpcError, ConfigError):
            return None
        return found


def model_revision_of(
    state: RegistryState, models: Sequence[pb.Model], name: str, silent: Sequence[str] = ()
) -> str:
    """The revision that is meant: itself, or the name under which engines serve it or did.

    Raises NotFound for what is neither: an invalidation that hits nothing must not look like one. Raises
    ConfigError if several are meant, ConnectError if nodes that do not answer (`silent`) may know another.
    """
    served = sorted({model.revision for model in models if model.name == name})
    if len(served) > 1:
        raise ConfigError(
            f"engines serve {name!r} in {len(served)} revisions, name one: {', '.join(served)}"
        )
    if served and silent:
        raise ConnectError(
            f"{name!r} is {served[0]}, as far as nodes answer; {', '.join(silent)} may have another "
            "revision of that name: name the revision"
        )
    if served:
        return served[0]
    known = any(model.revision == name for model in models)
    if known or model_scope(name) in state.epochs or _DIGEST.fullmatch(name):
        return name
    raise NotFound(
        f"no engine serves a model or revision {name!r}{_listed(m.name for m in models)}{_but(silent)}"
    )


def check_adapter(
    state: RegistryState, models: Sequence[pb.Model], name: str, silent: Sequence[str] = ()
) -> None:
    """Raises NotFound for an adapter that no engine has or had, as far as nodes remember."""
    known = {model.adapter for model in models if model.adapter}
    if name and name not in known and adapter_scope(name) not in state.epochs:
        # vLLM loads adapters by name at run time: they are in the keys of its blocks by content alone.
        raise NotFound(
            f"no engine serves an adapter {name!r}{_listed(known)}{_but(silent)}; "
            "one that vLLM loaded by name goes with its model"
        )


def _listed(names: Iterable[str]) -> str:
    known = sorted({name for name in names if name})
    return f"; there are {', '.join(known)}" if known else ""


def _but(silent: Sequence[str]) -> str:
    return f"; not asked, because they do not answer: {', '.join(silent)}" if silent else ""
