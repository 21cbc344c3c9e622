"""Which registry a process uses: its own, or a fleet's. Redis is imported only for the latter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from kvfabric.config import NodeConfig, RouterConfig
from kvfabric.errors import ConfigError
from kvfabric.keyring import Keyring
from kvfabric.registry.base import Registry
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.tls import Security

if TYPE_CHECKING:
    from kvfabric.registry.fleet_keys import FleetKeys
    from kvfabric.registry.redis.registry import HolderRecord, RedisRegistry


def open_registry(config: NodeConfig) -> Registry:
    """A node's, to be entered. Raises ConfigError for a directory that cannot be meant."""
    if not config.directory:
        return EmbeddedRegistry(config.state_dir / "registry")
    return join_directory(config, kind="node", name=config.name, address=own_address(config))


def fleet_keys(registry: Registry, config: NodeConfig, keyring: Keyring) -> FleetKeys | None:
    """What keeps a node's keyring the fleet's; None for a registry that is the node's own."""
    if not config.directory:
        return None
    from kvfabric.registry.fleet_keys import FleetKeys
    from kvfabric.registry.redis.registry import RedisRegistry

    assert isinstance(registry, RedisRegistry)
    return FleetKeys(
        registry,
        lambda: keyring,
        security_of(config),
        own_address=own_address(config),
        claims=True,
    )


def holders_of(registry: Registry) -> Callable[[], Iterable[HolderRecord]] | None:
    """Everybody in the directory, as seen within the last second; None for a registry of the node alone."""
    directory = _directory_of(registry)
    return None if directory is None else lambda: directory.holders


def everybody_of(registry: Registry) -> Callable[[], Awaitable[Iterable[HolderRecord]]] | None:
    """As `holders_of`, asked for anew each time."""
    directory = _directory_of(registry)
    return None if directory is None else directory.everybody


def _directory_of(registry: Registry) -> RedisRegistry | None:
    if not registry.tracks_holders:
        return None
    from kvfabric.registry.redis.registry import RedisRegistry

    assert isinstance(registry, RedisRegistry)
    return registry


def security_of(config: NodeConfig) -> Security:
    """How a node reaches others."""
    return Security("node", config.tls_path if config.tls_dir else None, config.insecure)


def own_address(config: NodeConfig) -> str:
    """Under which others reach a node's gRPC."""
    return config.advertise or config.listen or f"unix:{config.admin_socket_path}"


def join_directory(
    config: NodeConfig | RouterConfig,
    *,
    kind: str,
    name: str,
    address: str = "",
    before_ack: Callable[[], Awaitable[None]] | None = None,
) -> RedisRegistry:
    """The fleet's registry as this holder sees it, to be entered. Raises ConfigError."""
    try:
        from kvfabric.registry.redis.address import parse
        from kvfabric.registry.redis.registry import Holder, RedisRegistry
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"--directory needs {exc.name}, which is missing: pip install 'kvfabric[redis]'"
        ) from exc
    return RedisRegistry(
        parse(config.directory, insecure=config.insecure),
        config.state_dir / ("registry" if kind == "node" else f"registry-{name}"),
        holder=Holder(kind, name, address, before_ack),
        lease_s=config.epoch_lease_s if isinstance(config, NodeConfig) else 2.0,
    )
