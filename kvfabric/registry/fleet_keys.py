"""A fleet's secrets where nodes share no file system: whoever lacks one asks the nodes for it.

    the registry has a check of each tenant's secret --> a keyring that lacks it, or has another
        --> asks each node of the directory, over mTLS --> takes what has that check

Secrets travel between nodes and routers only, never through the directory. A node that is new to a fleet
makes a keyring of its own at its first start, and takes the fleet's secrets in its place as soon as a node
gives them. Of handle keys the newest count; who is shown a handle that none of its own signed asks at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import grpc

from kvfabric.errors import KVFabricError, NotFound
from kvfabric.keyring import Keyring, SharedKeys
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.base import Change
from kvfabric.registry.redis.registry import HolderRecord
from kvfabric.registry.state import RegistryState
from kvfabric.tls import Security, open_channel
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, TenantId

log = logging.getLogger(__name__)

POLL_S, RETRY_S, PAUSE_S = 5.0, 0.5, 0.1
"""Between looks for newer handle keys; between tries while something is lacking; at least, whoever wakes."""
GOSSIP, REACH = 2, 16
"""How many nodes are asked for handle keys now and then, and when somebody showed one that is not known."""
_ASK_S = 2.0
_WHOSE = (DEFAULT_TENANT, PUBLIC_TENANT)


class Directory(Protocol):
    """Of a registry that is a fleet's."""

    @property
    def state(self) -> RegistryState: ...

    @property
    def holders(self) -> tuple[HolderRecord, ...]: ...

    async def wait_newer(self, version: int) -> RegistryState: ...

    async def claim_keys(
        self, checks: Mapping[TenantId, bytes], *, requested_by: str = ""
    ) -> Change: ...


class FleetKeys:
    """Keeps a keyring what the fleet's is. `run` it; `wake` it when a tenant or handle key is unknown.

    `keyring` returns None where another process keeps it. `own_address`: of this node, which is not asked.
    `claims`: whether to say which secrets are the fleet's where nobody did; of nodes.
    """

    def __init__(
        self,
        directory: Directory,
        keyring: Callable[[], Keyring | None],
        security: Security,
        *,
        own_address: str = "",
        claims: bool = False,
    ) -> None:
        self._directory = directory
        self._keyring = keyring
        self._security = security
        self._own_address = own_address
        self._claims = claims
        self._changed = asyncio.Event()
        self._reach = 0
        self._reported: frozenset[TenantId] = frozenset()
        self._seen: frozenset[TenantId] = frozenset()
        self._refusals: dict[str, str] = {}
        self._compared = (-1, -1)
        self._lacking: Mapping[TenantId, bytes] = {}

    def wake(self) -> None:
        """A tenant or handle key is unknown here."""
        self._reach = REACH
        self._changed.set()

    def lacking(self) -> Mapping[TenantId, bytes]:
        """Tenants of which the fleet has a secret that is not here, with its check."""
        keyring, state = self._keyring(), self._directory.state
        if keyring is None:
            return {}
        known = (state.version, keyring.read_generation())
        if known != self._compared:
            self._compared = known
            rows = state.tenants.values()
            checks = {row.tenant_id: row.key_check for row in rows if not row.is_offboarded}
            self._lacking = keyring.lacking({one: check for one, check in checks.items() if check})
        return self._lacking

    def give(self, tenants: Iterable[str]) -> SharedKeys:
        """For another holder. Raises NotFound for a keyring that is not the fleet's: its keys help nobody."""
        keyring, state = self._keyring(), self._directory.state
        if (
            keyring is None
            or keyring.check(PUBLIC_TENANT) != state.tenants[PUBLIC_TENANT].key_check
        ):
            raise NotFound("this node has not got the fleet's keys itself yet")
        known = [state.tenants[TenantId(one)] for one in tenants if TenantId(one) in state.tenants]
        return keyring.shared([one.tenant_id for one in known if not one.is_offboarded])

    async def run(self) -> None:
        """Until cancelled. A failure is tried again; what is lacking meanwhile is a miss."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            await self._keep()

    async def _follow(self) -> None:
        version = self._directory.state.version
        while True:
            version = (await self._directory.wait_newer(version)).version
            self._changed.set()

    async def _keep(self) -> None:
        reach = GOSSIP
        while True:
            self._changed.clear()
            if self._claims:
                await self._claim()
            if self.lacking() or reach:
                await self._ask_some(reach)
            lacking = self.lacking()
            self._report(frozenset(lacking))
            reach = await self._pause(RETRY_S if lacking else POLL_S)

    async def _pause(self, at_most_s: float) -> int:
        """Until something changed, or a handle key is unknown, or for so long; how many nodes to ask for
        handle keys then."""
        await asyncio.sleep(PAUSE_S)
        try:
            async with asyncio.timeout(at_most_s):
                await self._changed.wait()
        except TimeoutError:
            self._reach = max(self._reach, GOSSIP)
        reach, self._reach = self._reach, 0
        return reach

    async def _claim(self) -> None:
        keyring, state = self._keyring(), self._directory.state
        if keyring is None:
            return
        unsaid = [
            one for one, row in state.tenants.items() if not row.key_check and not row.is_offboarded
        ]
        checks = {one: keyring.check(one) for one in unsaid if one != DEFAULT_TENANT}
        checks = {one: check for one, check in checks.items() if check}
        if checks:
            with contextlib.suppress(
                KVFabricError
            ):  # somebody was faster, or the directory is away
                await self._directory.claim_keys(
                    checks, requested_by="the first node that has them"
                )

    async def _ask_some(self, reach: int) -> None:
        """Any nodes: `reach` for handle keys, and on until nothing is lacking."""
        self._refusals.clear()
        for number, address in enumerate(self._nodes()):
            keyring, lacking = self._keyring(), self.lacking()
            if keyring is None or (number >= reach and not lacking):
                return
            try:
                given = await self._ask(address, lacking)
                if given.fleet_check == self._directory.state.tenants[PUBLIC_TENANT].key_check:
                    taken = await asyncio.to_thread(keyring.adopt, given, lacking)
                    if taken:
                        log.info("keys of %d tenants came from %s", len(taken), address)
            except KVFabricError as exc:
                self._refusals[address] = str(exc)
            except grpc.aio.AioRpcError as exc:
                self._refusals[address] = f"{exc.code().name}: {exc.details()}"

    def _nodes(self) -> list[str]:
        """Which can be asked, in any order. Over plain TCP nobody gives keys."""
        found = [
            holder.address
            for holder in self._directory.holders
            if holder.kind == "node" and holder.address not in ("", self._own_address)
        ]
        is_secure = self._security.tls_dir is not None
        fit = [one for one in dict.fromkeys(found) if is_secure or one.startswith("unix:")]
        return random.sample(fit, len(fit))

    async def _ask(self, address: str, lacking: Mapping[TenantId, bytes]) -> SharedKeys:
        """Raises AioRpcError, ConfigError."""
        wanted = {*lacking, *(_WHOSE if PUBLIC_TENANT in lacking else ())}
        async with open_channel(address, self._security, ()) as channel:
            stub = pb_grpc.KeyringServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.FetchKeysRequest(tenant_ids=sorted(wanted))
            found: pb.SharedKeys = await stub.Fetch(request, timeout=_ASK_S)
        return SharedKeys(
            found.fleet_check,
            {TenantId(name): secret for name, secret in found.tenant_secrets.items()},
            dict(found.handle_keys),
            found.current_handle_key,
        )

    def _report(self, lacking: frozenset[TenantId]) -> None:
        """What was lacking in the round before too: at the start nobody is known who could be asked."""
        seen, self._seen = self._seen, lacking
        if lacking == self._reported or lacking != seen:
            return
        if lacking:
            log.warning(
                "no keys of tenants %s, whose requests reuse nothing here: no node gives them over mTLS, and "
                "they share no keyring_dir (%s)",
                ", ".join(sorted(lacking)),
                "; ".join(f"{who}: {why}" for who, why in self._refusals.items()) or "none to ask",
            )
        else:
            log.info("the keyring has all keys of the fleet")
        self._reported = lacking
