"""The registry of a demo that is a fleet: a fabric of its own in the Redis it was given."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator

from redis.exceptions import RedisError

from kvfabric.demo.processes import DemoError
from kvfabric.errors import ConfigError
from kvfabric.registry.redis.address import Link, parse

_REDIS_S = 5.0


@contextlib.asynccontextmanager
async def own_fabric(directory: str) -> AsyncIterator[tuple[str, ...]]:
    """Flags for nodes and router: a fabric of the demo's own in this Redis, of which nothing stays.

    Raises ConfigError: the address is none; DemoError: there is no Redis.
    """
    if parse(directory, insecure=True).fabric != "default":
        raise ConfigError("--directory: the demo makes a fabric of its own: leave out fabric=")
    joint = "&" if "?" in directory else "?"
    ours = f"{directory}{joint}fabric=demo-{secrets.token_hex(6)}"
    address = parse(ours, insecure=True)
    link = Link(address, timeout_s=_REDIS_S)
    try:
        try:
            await link.client.ping()
        except (RedisError, OSError) as exc:
            raise DemoError(f"no Redis at {address.shown}: {exc}") from exc
        try:
            # Whoever sends the demo to a Redis over plain TCP has chosen that for its registry.
            yield ("--directory", ours, *(["--insecure", "true"] if address.is_plain_tcp else []))
        finally:
            async for key in link.client.scan_iter(f"{address.prefix}*", count=1000):
                await link.client.delete(key)
    finally:
        await link.aclose()
