"""`RegistryService`: epochs, tenants and templates, the lease on them, and receipts of changes.

A change that takes something out of reach is answered when it counts everywhere: every holder of an epoch
lease has applied it or was waited out. The caller may go away meanwhile; the change stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from kvfabric.daemon.admin_sources import AdminSources
from kvfabric.daemon.fleet_models import check_adapter, model_revision_of
from kvfabric.daemon.rpc import requested_by, stream, unary
from kvfabric.errors import ConfigError, Conflict, KVFabricError, NotFound
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.base import Change
from kvfabric.registry.changes import TenantChange, mint_tenant_id, tenant_named
from kvfabric.registry.holders import Ack, Holders
from kvfabric.registry.receipts import MADE, AckRow, ChangeRow, assemble
from kvfabric.registry.router_load import RouterLoads
from kvfabric.registry.state import TierQuota
from kvfabric.registry.wire import (
    limits_from_pb,
    quota_from_pb,
    state_to_pb,
    template_to_pb,
    tenant_to_pb,
)
from kvfabric.registry.withdrawn import receipt_id
from kvfabric.types import DEFAULT_TENANT, TierName

MAX_FLOOR_SHARE = 0.9
MAX_RECEIPT_WAIT_S = 25.0
_REPORT_S, _DESTROY_S = 1.0, 2.0
"""How long the answer to a change waits for what nodes report, and for what is to be destroyed."""
_ROWS_POLL_S = 0.02


class RegistryService(pb_grpc.RegistryServiceServicer):
    def __init__(
        self,
        sources: AdminSources,
        holders: Holders,
        node_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._registry = sources.registry
        self._sources = sources
        self._holders = holders
        self._node_id = node_id
        self._clock = clock
        self._heard = asyncio.Event()
        self._keyring_lock = asyncio.Lock()
        self._loads = RouterLoads(clock)

    @stream
    async def Watch(
        self, request: pb.WatchRegistryRequest, context: Any
    ) -> AsyncIterator[pb.RegistryState]:
        state = self._registry.state
        while True:
            yield state_to_pb(state)
            state = await self._registry.wait_newer(state.version)

    @unary
    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.EpochLease:
        if not 0 < len(request.holder_id) <= 200:
            raise ConfigError("a holder has an id of 1 to 200 characters")
        if self._registry.tracks_holders:
            raise Conflict(
                "this node's registry is a directory: give the router the same --directory"
            )
        state = self._registry.state
        ttl_s = self._holders.renew(
            request.holder_id, request.holder_kind, request.applied_version, state.version
        )
        heard, self._heard = self._heard, asyncio.Event()
        heard.set()
        return pb.EpochLease(registry_id=state.registry_id, ttl_s=ttl_s, version=state.version)

    @unary
    async def ShareLoad(self, request: pb.RouterLoad, context: Any) -> pb.RouterLoads:
        return pb.RouterLoads(rows=self._loads.exchange(request.router, request.row))

    @unary
    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Any) -> pb.TenantCreated:
        host, ssd = quota_from_pb(request.host), quota_from_pb(request.ssd)
        self._check_floors("", host, ssd)
        # The secret is durable before the tenant is: a tenant without one could never be served.
        tenant_id = mint_tenant_id()
        async with self._keyring_lock:
            await asyncio.to_thread(self._sources.keyring.add_tenant, tenant_id)
        tenant, api_key = await self._registry.create_tenant(
            request.name,
            host,
            ssd,
            limits=limits_from_pb(request.limits),
            minted=(tenant_id, self._sources.keyring.check(tenant_id)),
            requested_by=requested_by(context),
        )
        return pb.TenantCreated(tenant=tenant_to_pb(tenant), api_key=api_key)

    @unary
    async def SetTenant(self, request: pb.SetTenantRequest, context: Any) -> pb.Tenant:
        change = TenantChange(
            host=quota_from_pb(request.host) if request.HasField("host") else None,
            ssd=quota_from_pb(request.ssd) if request.HasField("ssd") else None,
            max_age_s=request.max_age_s if request.HasField("max_age_s") else None,
            opted_out=request.opted_out if request.HasField("opted_out") else None,
            limits=limits_from_pb(request.limits) if request.HasField("limits") else None,
        )
        self._check_floors(request.name, change.host, change.ssd)
        tenant = await self._registry.set_tenant(
            request.name, change, requested_by=requested_by(context)
        )
        return tenant_to_pb(tenant)

    @unary
    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Any) -> pb.ApiKeyCreated:
        api_key = await self._registry.create_api_key(
            request.name, requested_by=requested_by(context)
        )
        return pb.ApiKeyCreated(api_key=api_key)

    @unary
    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: Any) -> pb.Tenant:
        """Answers when no router takes the key any more."""
        tenant, change = await self._registry.revoke_api_key(
            request.name, request.api_key_prefix, requested_by=requested_by(context)
        )
        await self._reached(change.version)
        return tenant_to_pb(tenant)

    @unary
    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: Any) -> pb.ApiKeyCreated:
        """Answers when every router takes the fresh key, and without grace none takes an old one."""
        api_key, change = await self._registry.rotate_api_keys(
            request.name, grace_s=request.grace_s, requested_by=requested_by(context)
        )
        await self._reached(change.version)
        return pb.ApiKeyCreated(api_key=api_key)

    @unary
    async def OffboardTenant(self, request: pb.OffboardTenantRequest, context: Any) -> pb.Receipt:
        """API keys end everywhere, then each node that hears of it destroys secrets and bytes, and says so in
        its row; one that is away does at its next start (`withdrawals`)."""
        started, requested_at = self._clock(), time.time()
        who = requested_by(context)
        change = await self._registry.offboard_tenant(request.name, requested_by=who)
        return await self._receipt(
            change, who, started, requested_at, for_good=True, wait_s=_wait_s(request)
        )

    @unary
    async def RegisterTemplate(
        self, request: pb.RegisterTemplateRequest, context: Any
    ) -> pb.Template:
        template = await self._registry.register_template(
            request.name,
            request.version,
            request.text,
            is_public=request.is_public,
            after=request.after,
            requested_by=requested_by(context),
        )
        return template_to_pb(template)

    @unary
    async def PromoteTemplate(self, request: pb.PromoteTemplateRequest, context: Any) -> pb.Receipt:
        started, requested_at = self._clock(), time.time()
        who = requested_by(context)
        change = await self._registry.promote_template(
            request.name, request.version, requested_by=who
        )
        return await self._receipt(change, who, started, requested_at, for_good=False)

    @unary
    async def PinTemplate(self, request: pb.PinTemplateRequest, context: Any) -> pb.Template:
        template = await self._registry.pin_template(
            request.name,
            request.version,
            ttl_s=request.ttl_s,
            requested_by=requested_by(context),
        )
        return template_to_pb(template)

    @unary
    async def UnpinTemplate(self, request: pb.UnpinTemplateRequest, context: Any) -> pb.Template:
        template = await self._registry.unpin_template(
            request.name, request.version, requested_by=requested_by(context)
        )
        return template_to_pb(template)

    @unary
    async def ClaimKeys(self, request: pb.ClaimKeysRequest, context: Any) -> pb.KeysClaimed:
        keyring = self._sources.keyring
        mine = {one: keyring.check(one) for one in self._registry.state.tenants}
        checks = {one: check for one, check in mine.items() if check and one != DEFAULT_TENANT}
        await self._registry.claim_keys(checks, anew=True, requested_by=requested_by(context))
        return pb.KeysClaimed(num_tenants=len(checks))

    @unary
    async def GetReceipt(self, request: pb.GetReceiptRequest, context: Any) -> pb.Receipt:
        wait_s = min(max(0.0, request.wait_s), MAX_RECEIPT_WAIT_S)
        receipt = await self._receipt_of(request.receipt_id, {}, lambda r: r.is_final, wait_s)
        if receipt is None:
            raise NotFound(
                f"there is no receipt {request.receipt_id!r}: its id is SCOPE@EPOCH, as it was printed"
            )
        return receipt

    @unary
    async def Invalidate(self, request: pb.InvalidateRequest, context: Any) -> pb.Receipt:
        started, requested_at = self._clock(), time.time()
        who = requested_by(context)
        name = request.name
        if request.scope in ("model", "adapter"):
            models, silent = await self._sources.models.known()
            state = self._registry.state
            if request.scope == "model":
                name = model_revision_of(state, models, name, silent)
            else:
                check_adapter(state, models, name, silent)
        change = await self._registry.invalidate(
            request.scope, name, request.version, purge=request.purge, requested_by=who
        )
        for_good = request.purge or request.scope != "template"
        return await self._receipt(
            change, who, started, requested_at, for_good=for_good, wait_s=_wait_s(request)
        )

    async def _receipt(
        self,
        change: Change,
        who: str,
        started: float,
        requested_at: float,
        *,
        for_good: bool,
        wait_s: float | None = None,
    ) -> pb.Receipt:
        """What happened and when it counted; and, as far as they say so within a moment, what became of the
        bytes on each node. `GetReceipt` tells the rest."""
        acks = await self._reached(change.version)
        row = ChangeRow(
            action=change.action,
            scope=change.scope,
            old_epoch=change.old_epoch,
            new_epoch=change.new_epoch,
            requested_by=who,
            requested_at=requested_at,
            unreachable_at=requested_at + max(ack.at for ack in acks) - started,
            acknowledgements=tuple(
                AckRow(ack.holder_id, ack.kind, ack.at - started, ack.waited_out) for ack in acks
            ),
            audit_head=change.audit_head,
            for_good=for_good,
        )
        name = receipt_id(change.scope, change.new_epoch)
        made = {MADE: msgspec.msgpack.encode(row)}
        with contextlib.suppress(KVFabricError):  # the change stands, and is told of
            await self._registry.put_receipt_row(name, MADE, made[MADE])
        if not self._sources.reports:
            wait_s = 0.0
        elif wait_s is None:
            wait_s = _DESTROY_S if for_good else _REPORT_S
        lost = {ack.holder_id for ack in acks if ack.waited_out}

        def is_enough(receipt: pb.Receipt) -> bool:
            heard = set(receipt.not_heard_from) <= lost
            return heard and (not for_good or all(node.destroyed_at for node in receipt.nodes))

        receipt = await self._receipt_of(name, made, is_enough, wait_s)
        assert receipt is not None
        return receipt

    async def _receipt_of(
        self,
        name: str,
        made: Mapping[str, bytes],
        is_enough: Callable[[pb.Receipt], bool],
        wait_s: float,
    ) -> pb.Receipt | None:
        """As it is once it is enough, or after `wait_s`. `made`: rows known without the registry."""
        ends = self._clock() + wait_s
        while True:
            rows: Mapping[str, bytes] = {}
            try:
                rows = await self._registry.receipt_rows(name)
            except KVFabricError:
                if not made:
                    raise
            receipt = assemble(name, {**made, **rows})
            if receipt is None or is_enough(receipt) or self._clock() >= ends:
                return receipt
            await asyncio.sleep(_ROWS_POLL_S)

    async def _reached(self, version: int) -> list[Ack]:
        """Wait until every holder of a lease has applied `version` or was waited out."""
        if self._registry.tracks_holders:
            return await self._registry.reached(version)
        # The node itself acts on the registry's own state, from the moment it was published.
        own = Ack(self._node_id, "node", self._clock())
        current = self._holders.begin(version)
        try:
            while (wait_s := self._holders.wait_s(current)) is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._heard.wait()
            return [own, *current.acks]
        finally:
            self._holders.end(current)

    def _check_floors(self, name: str, host: TierQuota | None, ssd: TierQuota | None) -> None:
        """Floors sum to at most 90 % of a tier (design 7). Raises ConfigError."""
        state = self._registry.state
        own = tenant_named(state, name).tenant_id if name else None
        others = [tenant for tenant in state.tenants.values() if tenant.tenant_id != own]
        capacities = {tier.tier: tier.capacity_bytes for tier in self._sources.status(False).tiers}
        for tier, quota in ((TierName.HOST, host), (TierName.SSD, ssd)):
            if quota is None or not quota.floor_bytes or tier not in capacities:
                continue
            of_others = sum(getattr(tenant, tier).floor_bytes for tenant in others)
            room = int(MAX_FLOOR_SHARE * capacities[tier]) - of_others
            if quota.floor_bytes > room:
                raise ConfigError(
                    f"a {tier} floor of {quota.floor_bytes} bytes is too much: all floors together "
                    f"may be 90 % of the tier, which leaves {max(0, room)}"
                )


def _wait_s(request: pb.InvalidateRequest | pb.OffboardTenantRequest) -> float | None:
    """None: as long as is usual."""
    if not request.HasField("wait_s"):
        return None
    return min(max(0.0, request.wait_s), MAX_RECEIPT_WAIT_S)
