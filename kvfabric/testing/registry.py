"""What every home of the registry must do: subclass `RegistryTests` and give it a registry.

Used by tests alone; needs pytest with pytest-asyncio in auto mode.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from kvfabric.errors import ConfigError, Conflict, NotFound
from kvfabric.registry.base import Registry
from kvfabric.registry.changes import Draft, TenantChange, api_key_digest, invalidate_scope
from kvfabric.registry.state import (
    PURGED,
    RETIRED,
    SERVING,
    RegistryState,
    TemplateVersion,
    TenantLimits,
    TierQuota,
    namespace_of,
)
from kvfabric.registry.wire import state_from_pb, state_to_pb
from kvfabric.types import (
    DEFAULT_TENANT,
    PUBLIC_TENANT,
    MissReason,
    Segment,
    adapter_scope,
    model_scope,
    template_scope,
    tenant_scope,
)

NO_QUOTA = TierQuota()


class RegistryTests(ABC):
    """`open_registry(home)` returns a registry that is not entered yet; the same home, the same data."""

    @abstractmethod
    def open_registry(self, home: Path) -> Registry: ...

    # ------------------------------------------------------------------ state and its news

    async def test_fresh_registry_has_default_and_public_and_an_id(self, tmp_path: Path) -> None:
        async with (
            self.open_registry(tmp_path / "a") as one,
            self.open_registry(tmp_path / "b") as other,
        ):
            assert set(one.state.tenants) == {DEFAULT_TENANT, PUBLIC_TENANT}
            assert len(one.state.registry_id) == 16
            assert one.state.registry_id != other.state.registry_id

    async def test_everything_survives_reopening(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await registry.create_tenant("acme", TierQuota(100, 10), NO_QUOTA)
            await registry.set_tenant("acme", TenantChange(max_age_s=3.5, opted_out=True))
            await self.register(registry, "v1")
            await registry.invalidate("model", "digest", "", purge=False)
            before, log = registry.state, await registry.audit_log()
        async with self.open_registry(tmp_path) as registry:
            assert registry.state == before
            assert await registry.audit_log() == log

    async def test_waiters_get_the_state_after_each_change(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry, asyncio.TaskGroup() as group:
            before = registry.state
            waiting = group.create_task(registry.wait_newer(before.version))
            await asyncio.sleep(0)
            await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            async with asyncio.timeout(5):
                after = await waiting
            assert after.version == before.version + 1
            assert await registry.wait_newer(before.version) is registry.state
            assert "acme" not in {tenant.name for tenant in before.tenants.values()}

    # ------------------------------------------------------------------ tenants

    async def test_api_key_is_shown_once_and_kept_as_digest(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            tenant, api_key = await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            assert len(api_key) == 47
            assert tenant.tenant_id.startswith("t-")
            second = await registry.create_api_key("acme")
            assert second != api_key
            digests = registry.state.tenants[tenant.tenant_id].api_key_digests
            assert digests == (api_key_digest(api_key), api_key_digest(second))
            await registry.revoke_api_key(tenant.tenant_id, digests[0].hex()[:8])
            assert registry.state.tenants[tenant.tenant_id].api_key_digests == digests[1:]

    async def test_tenant_changes_that_cannot_be_right_change_nothing(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            before = registry.state
            with pytest.raises(Conflict, match="acme"):
                await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            with pytest.raises(ConfigError, match="floor"):
                await registry.create_tenant("umbrella", TierQuota(5, 6), NO_QUOTA)
            with pytest.raises(ConfigError):
                await registry.create_tenant("no spaces", NO_QUOTA, NO_QUOTA)
            with pytest.raises(NotFound, match="tenant list"):
                await registry.set_tenant("nobody", TenantChange())
            with pytest.raises(ConfigError):
                await registry.set_tenant("acme", TenantChange(max_age_s=-1.0))
            with pytest.raises(Conflict, match="public"):
                await registry.create_api_key("public")
            with pytest.raises(ConfigError, match="8 hex"):
                await registry.revoke_api_key("acme", "12")
            with pytest.raises(NotFound):
                await registry.revoke_api_key("acme", "00000000")
            assert registry.state is before

    async def test_a_change_of_a_tenant_fences_its_requests(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            tenant, _ = await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            epochs = registry.state.epochs_of([tenant_scope(tenant.tenant_id)])
            assert registry.state.fence_reason(epochs, ()) is MissReason.NONE
            await registry.set_tenant("acme", TenantChange(opted_out=True))
            assert registry.state.fence_reason(epochs, ()) is MissReason.FENCED

    async def test_limits_and_rotated_keys_are_kept_also_after_reopening(
        self, tmp_path: Path
    ) -> None:
        limits = TenantLimits(1 << 30, 3 << 30, 2.5, 1 << 20)
        async with self.open_registry(tmp_path) as registry:
            await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            await registry.set_tenant("acme", TenantChange(limits=limits))
            await registry.rotate_api_keys("acme", grace_s=60.0)
            before = registry.state.tenants
        async with self.open_registry(tmp_path) as registry:
            assert registry.state.tenants == before
            (acme,) = [t for t in before.values() if t.name == "acme"]
            assert (acme.limits, len(acme.expiring_keys)) == (limits, 1)
            with pytest.raises(ConfigError, match="requests_per_s"):
                await registry.set_tenant("acme", TenantChange(limits=TenantLimits(0, 0, -1.0)))

    async def test_an_offboarded_tenant_is_gone_for_good(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            made, _ = await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            scope = tenant_scope(made.tenant_id)
            epochs = registry.state.epochs_of([scope])
            await registry.offboard_tenant("acme")
            assert registry.state.fence_reason(epochs, ()) is MissReason.FENCED
            incarnation = registry.state.scope_incarnations[scope]
        async with self.open_registry(tmp_path) as registry:
            gone = registry.state.tenants[made.tenant_id]
            assert (gone.is_offboarded, gone.api_key_digests) == (True, ())
            assert registry.state.scope_incarnations[scope] == incarnation
            for again in (
                registry.create_api_key("acme"),
                registry.rotate_api_keys("acme", grace_s=0.0),
                registry.set_tenant("acme", TenantChange(opted_out=False)),
                registry.create_tenant("acme", NO_QUOTA, NO_QUOTA),
            ):
                with pytest.raises(Conflict):
                    await again
            for name in ("default", "public"):
                with pytest.raises(Conflict, match="stays"):
                    await registry.offboard_tenant(name)

    # ------------------------------------------------------------------ templates

    async def test_what_a_public_template_comes_after_is_kept_and_checked(
        self, tmp_path: Path
    ) -> None:
        async with self.open_registry(tmp_path) as registry:
            register = registry.register_template
            await register("system", "1", b"You are kind.", is_public=True)
            await register("secret", "1", b"Hush.", is_public=False)
            await register("tools", "1", b"Tools: none.", is_public=True, after=["system"])
            with pytest.raises(NotFound):
                await register("x", "1", b"x", is_public=True, after=["absent"])
            with pytest.raises(Conflict, match="not public"):
                await register("x", "1", b"x", is_public=True, after=["secret"])
            for name, is_public in (("x", False), ("system", True)):
                with pytest.raises(ConfigError):
                    await register(name, "2", b"x", is_public=is_public, after=["system"])
        async with self.open_registry(tmp_path) as registry:
            assert registry.state.templates["tools", "1"].after == ("system",)
            assert state_from_pb(state_to_pb(registry.state)) == registry.state

    async def test_a_new_version_waits_until_it_is_promoted(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            assert (await self.register(registry, "v1")).state == SERVING
            assert (await self.register(registry, "v2")).state == RETIRED
            await registry.promote_template("greeting", "v2")
            assert self.states(registry) == {"v1": RETIRED, "v2": SERVING}

    async def test_rollback_brings_the_same_incarnation_back_under_a_new_epoch(
        self, tmp_path: Path
    ) -> None:
        async with self.open_registry(tmp_path) as registry:
            v1 = await self.register(registry, "v1")
            segment = Segment("greeting", "v1", v1.incarnation, 0)
            epochs = registry.state.epochs_of([template_scope("greeting")])
            assert registry.state.fence_reason(epochs, [segment]) is MissReason.NONE
            await registry.invalidate("template", "greeting", "v1", purge=False)
            assert registry.state.fence_reason(epochs, [segment]) is MissReason.WITHDRAWN
            change = await registry.promote_template("greeting", "v1")
            assert change.new_epoch == change.old_epoch + 1 == 3
            assert registry.state.templates["greeting", "v1"].incarnation == v1.incarnation
            assert registry.state.fence_reason(epochs, [segment]) is MissReason.FENCED
            now = registry.state.epochs_of([template_scope("greeting")])
            assert registry.state.fence_reason(now, [segment]) is MissReason.NONE

    async def test_purged_is_for_good_also_after_reopening(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await self.register(registry, "v1")
            await registry.invalidate("template", "greeting", "v1", purge=True)
            await registry.invalidate("template", "greeting", "", purge=False)
            assert self.states(registry) == {"v1": PURGED}
        async with self.open_registry(tmp_path) as registry:
            with pytest.raises(Conflict, match="never serves again"):
                await registry.promote_template("greeting", "v1")
            again = await registry.register_template("greeting", "v2", b"hello v1", is_public=False)
            assert again.state == SERVING
            assert again.incarnation != registry.state.templates["greeting", "v1"].incarnation

    async def test_a_pin_is_kept_fences_nobody_and_ends_with_the_service(
        self, tmp_path: Path
    ) -> None:
        async with self.open_registry(tmp_path) as registry:
            v1 = await self.register(registry, "v1")
            await self.register(registry, "v2")
            segment = Segment("greeting", "v1", v1.incarnation, 0)
            epochs = registry.state.epochs_of([template_scope("greeting")])
            version = registry.state.version
            pinned = await registry.pin_template("greeting", "", ttl_s=60.0)
            assert (pinned.version, pinned.pin_s) == ("v1", 60.0)
            assert registry.state.version == version + 1
            assert registry.state.fence_reason(epochs, [segment]) is MissReason.NONE
            assert [record.action for record in await registry.audit_log()][-1] == "pin_template"
        async with self.open_registry(tmp_path) as registry:
            assert registry.state.templates["greeting", "v1"] == pinned
            again = await registry.pin_template("greeting", "v1", ttl_s=5.0)
            assert again.pinned_until < pinned.pinned_until
            with pytest.raises(Conflict, match="promote"):
                await registry.pin_template("greeting", "v2", ttl_s=60.0)
            await registry.promote_template("greeting", "v1")  # which serves already
            assert self.pins(registry) == {"v1": 5.0, "v2": 0.0}
            await registry.promote_template("greeting", "v2")
            assert self.pins(registry) == {"v1": 0.0, "v2": 0.0}
            for purge in (False, True):
                await registry.promote_template("greeting", "v2")
                await registry.pin_template("greeting", "v2", ttl_s=60.0)
                assert self.pins(registry)["v2"] == 60.0
                await registry.invalidate("template", "greeting", "v2", purge=purge)
                assert self.pins(registry)["v2"] == 0.0
            await registry.promote_template("greeting", "v1")
            await registry.pin_template("greeting", "", ttl_s=60.0)
            assert (await registry.unpin_template("greeting", "")).version == "v1"
            assert self.pins(registry) == {"v1": 0.0, "v2": 0.0}

    async def test_pins_that_cannot_be_right_change_nothing(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await self.register(registry, "v1")
            before = registry.state
            for ttl_s in (0.0, -1.0, float("nan"), float("inf"), 31 * 86_400.0):
                with pytest.raises(ConfigError, match="up to"):
                    await registry.pin_template("greeting", "", ttl_s=ttl_s)
            with pytest.raises(NotFound, match="template list"):
                await registry.pin_template("parting", "", ttl_s=1.0)
            with pytest.raises(Conflict, match="greeting v1 is not pinned"):
                await registry.unpin_template("greeting", "v1")
            less_than_none = TenantChange(limits=TenantLimits(pin_max_bytes=-1))
            with pytest.raises(ConfigError, match="pin_max_bytes"):
                await registry.set_tenant("default", less_than_none)
            assert registry.state is before

    async def test_templates_that_cannot_be_right_change_nothing(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await self.register(registry, "v1")
            before = registry.state
            for error, match, name, version, text in (
                (Conflict, "never changes", "greeting", "v1", b"other"),
                (Conflict, "registered already", "other", "v1", b"hello v1"),
                (ConfigError, "UTF-8", "other", "v1", b"\xff"),
                (ConfigError, "bytes of text", "other", "v1", b""),
                (ConfigError, "letters", "other", "", b"text"),
            ):
                with pytest.raises(error, match=match):
                    await registry.register_template(name, version, text, is_public=False)
            with pytest.raises(NotFound, match="template list"):
                await registry.promote_template("greeting", "v9")
            with pytest.raises(ConfigError, match="which version"):
                await registry.promote_template("greeting", "")
            with pytest.raises(NotFound):
                await registry.invalidate("template", "nothing", "", purge=True)
            assert registry.state is before

    # ------------------------------------------------------------------ invalidation

    @pytest.mark.parametrize("kind", ["tenant", "model", "adapter"])
    async def test_invalidated_scope_gets_new_keys_and_fences(
        self, tmp_path: Path, kind: str
    ) -> None:
        async with self.open_registry(tmp_path) as registry:
            tenant, _ = await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA)
            await registry.create_tenant("other", NO_QUOTA, NO_QUOTA)
            scope = {
                "tenant": tenant_scope(tenant.tenant_id),
                "model": model_scope("m1"),
                "adapter": adapter_scope("a1"),
            }[kind]
            name = {"tenant": "acme", "model": "m1", "adapter": "a1"}[kind]
            epochs = registry.state.epochs_of([scope])
            mine = (tenant.tenant_id, "m1", bytes(32), "a1", "r1")
            others = (DEFAULT_TENANT, "m2", bytes(32), "a2", "r1")
            before = registry.state
            seen = [namespace_of(before, *mine)]
            for _ in range(2):
                change = await registry.invalidate(kind, name, "", purge=False)
                assert change.scope == scope
                assert change.new_epoch == change.old_epoch + 1
                seen.append(namespace_of(registry.state, *mine))
            assert len(set(seen)) == 3
            assert namespace_of(registry.state, *others) == namespace_of(before, *others)
            assert registry.state.fence_reason(epochs, ()) is MissReason.FENCED

    async def test_wrong_scopes_are_refused(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            for kind, name, version in (
                ("planet", "x", ""),
                ("model", "", ""),
                ("model", "m1", "v1"),
            ):
                with pytest.raises(ConfigError):
                    await registry.invalidate(kind, name, version, purge=False)

    # ------------------------------------------------------------------ order, epochs, audit

    async def test_changes_at_once_are_made_one_after_the_other(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            first = registry.state.version
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(registry.invalidate("model", "m1", "", purge=False))
                    for _ in range(8)
                ]
            assert sorted(task.result().new_epoch for task in tasks) == list(range(1, 9))
            assert registry.state.version == first + 8

    async def test_a_cancelled_change_is_whole_or_not_at_all(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(registry.invalidate("model", "m1", "", purge=False))
                await asyncio.sleep(0)
                task.cancel()
            change = await registry.invalidate("model", "m1", "", purge=False)
            assert change.new_epoch == registry.state.epoch(model_scope("m1")) == 2
            assert [record.new_epoch for record in await registry.audit_log()] == [1, 2]

    async def test_epochs_never_go_back_whatever_is_decided(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await registry.invalidate("model", "m1", "", purge=False)
            await self.register(registry, "v1")
            await registry.invalidate("template", "greeting", "", purge=True)
            before = registry.state

            def back(state: RegistryState) -> RegistryState:
                epochs = {**state.epochs, model_scope("m1"): 0}
                return replace(state, epochs=MappingProxyType(epochs), version=state.version + 1)

            def forgotten(state: RegistryState) -> RegistryState:
                return replace(state, epochs=MappingProxyType({}), version=state.version + 1)

            def same_version(state: RegistryState) -> RegistryState:
                return state

            def resurrected(state: RegistryState) -> RegistryState:
                rows = {name: replace(t, state=SERVING) for name, t in state.templates.items()}
                return replace(state, templates=MappingProxyType(rows), version=state.version + 1)

            for make in (back, forgotten, same_version, resurrected):
                with pytest.raises(Conflict):
                    await registry.commit(self.rogue(make), "rogue")
            assert registry.state is before
            assert "rogue" not in {record.who for record in await registry.audit_log()}

    async def test_audit_log_tells_every_change_in_order(self, tmp_path: Path) -> None:
        async with self.open_registry(tmp_path) as registry:
            await registry.create_tenant("acme", NO_QUOTA, NO_QUOTA, requested_by="alice")
            await self.register(registry, "v1")
            change = await registry.invalidate(
                "template", "greeting", "v1", purge=False, requested_by="bob"
            )
            log = await registry.audit_log()
            assert [(r.sequence, r.who, r.action) for r in log] == [
                (1, "alice", "create_tenant"),
                (2, "", "register_template"),
                (3, "bob", "retire_template"),
            ]
            assert log[2].detail == "v1 retired"
            assert (log[2].old_epoch, log[2].new_epoch) == (change.old_epoch, change.new_epoch)
            assert log[2].version == change.version == registry.state.version
            assert len(change.audit_head) == 32

    # ------------------------------------------------------------------ inside

    async def register(self, registry: Registry, version: str) -> TemplateVersion:
        text = f"hello {version}".encode()
        return await registry.register_template("greeting", version, text, is_public=False)

    def states(self, registry: Registry) -> dict[str, str]:
        return {t.version: t.state for t in registry.state.templates.values()}

    def pins(self, registry: Registry) -> dict[str, float]:
        return {t.version: t.pin_s for t in registry.state.templates.values()}

    def rogue(
        self, make: Callable[[RegistryState], RegistryState]
    ) -> Callable[[RegistryState], Draft[None]]:
        def decide(state: RegistryState) -> Draft[None]:
            return replace(invalidate_scope(state, model_scope("m1"), "rogue"), state=make(state))

        return decide


class SharedRegistryTests(RegistryTests):
    """Further, of a registry that several processes share: each opens its own at the same `home`."""

    @abstractmethod
    def open_holder(self, home: Path, name: str) -> Registry: ...

    def open_registry(self, home: Path) -> Registry:
        return self.open_holder(home, "a")

    async def test_what_one_changes_all_see_and_log(self, tmp_path: Path) -> None:
        async with (
            self.open_holder(tmp_path, "a") as one,
            self.open_holder(tmp_path, "b") as other,
        ):
            await one.create_tenant("acme", TierQuota(100, 10), NO_QUOTA, requested_by="alice")
            await self.register(one, "v1")
            await self.see(other, one.state.version)
            assert other.state == one.state
            await other.invalidate("template", "greeting", "", purge=False, requested_by="bob")
            await self.see(one, other.state.version)
            assert one.state == other.state
            assert await one.audit_log() == await other.audit_log()
            assert [r.who for r in await one.audit_log()] == ["alice", "", "bob"]

    async def test_changes_of_several_are_made_one_after_the_other(self, tmp_path: Path) -> None:
        async with (
            self.open_holder(tmp_path, "a") as one,
            self.open_holder(tmp_path, "b") as other,
            asyncio.TaskGroup() as group,
        ):
            first = one.state.version
            tasks = [
                group.create_task(holder.invalidate("model", "m1", "", purge=False))
                for _ in range(6)
                for holder in (one, other)
            ]
            changes = [await task for task in tasks]
            assert sorted(change.new_epoch for change in changes) == list(range(1, 13))
            assert len({change.audit_head for change in changes}) == 12
            await self.see(one, first + 12)
            await self.see(other, first + 12)

    async def test_a_change_reaches_every_holder(self, tmp_path: Path) -> None:
        async with (
            self.open_holder(tmp_path, "a") as one,
            self.open_holder(tmp_path, "b") as other,
        ):
            await self.lease(one)
            await self.lease(other)
            change = await one.invalidate("model", "m1", "", purge=False)
            acks = await one.reached(change.version)
            assert [ack.waited_out for ack in acks] == [False, False]
            assert {ack.holder_id[0] for ack in acks} == {"a", "b"}
            seen = other.usable()
            assert seen is not None
            assert seen.version >= change.version

    async def test_nobody_waits_for_who_has_left(self, tmp_path: Path) -> None:
        async with self.open_holder(tmp_path, "a") as one:
            async with self.open_holder(tmp_path, "b") as other:
                await self.lease(other)
            assert other.usable() is None or one.state.version == other.state.version
            change = await one.invalidate("model", "m1", "", purge=False)
            assert [ack.holder_id[0] for ack in await one.reached(change.version)] == ["a"]

    async def test_names_and_leases_outlive_a_restart(self, tmp_path: Path) -> None:
        async with self.open_holder(tmp_path, "a") as one:
            await self.lease(one)
            await one.invalidate("model", "m1", "", purge=False)
        async with self.open_holder(tmp_path, "b") as other:
            await self.lease(other)
            assert other.state.epoch(model_scope("m1")) == 1

    async def see(self, registry: Registry, version: int) -> None:
        async with asyncio.timeout(5):
            await registry.wait_newer(version - 1)

    async def lease(self, registry: Registry) -> RegistryState:
        """Wait until it may serve."""
        async with asyncio.timeout(10):
            while True:
                state = registry.usable()
                if state is not None:
                    return state
                await asyncio.sleep(0.01)
