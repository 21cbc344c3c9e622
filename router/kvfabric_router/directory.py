"""The fleet's directory as a router uses it: registry and lease come from it, and which nodes there are."""

from __future__ import annotations

from kvfabric.config import RouterConfig
from kvfabric.registry.fleet_keys import FleetKeys
from kvfabric.registry.home import join_directory
from kvfabric.registry.redis.registry import RedisRegistry
from kvfabric.registry.withdrawn import offboarded_tenants
from kvfabric.tls import Security
from kvfabric_router.keyring_reader import KeyringReader
from kvfabric_router.registry_view import RegistryView


def join(config: RouterConfig, view: RegistryView, keyring: KeyringReader) -> RedisRegistry:
    """To be entered; then `follow` it. Raises ConfigError."""

    async def before_ack() -> None:
        view.apply(registry.state)
        keyring.forget(offboarded_tenants(registry.state))
        await view.wait_sent()

    name = f"router-{config.listen.replace(':', '-')}"
    registry = join_directory(config, kind="router", name=name, before_ack=before_ack)
    return registry


def fleet_keys(registry: RedisRegistry, keyring: KeyringReader, security: Security) -> FleetKeys:
    """What keeps a keyring in memory the fleet's; to be run."""
    keys = FleetKeys(registry, keyring.own, security)
    keyring.unknown = keys.wake
    return keys


async def follow(registry: RedisRegistry, view: RegistryView) -> None:
    """Keep `view` and its lease as the directory has them, until cancelled."""
    view.lease = registry.lease
    version = 0
    while True:
        state = await registry.wait_newer(version)
        view.apply(state)
        version = state.version


def node_targets(registry: RedisRegistry) -> tuple[str, ...]:
    """Where the nodes of the directory are, each once."""
    nodes = (holder.address for holder in registry.holders if holder.kind == "node")
    return tuple(dict.fromkeys(address for address in nodes if address))
