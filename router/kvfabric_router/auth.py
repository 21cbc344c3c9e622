"""API keys to tenants. Pure: the registry holds digests, a request carries the key."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping

from kvfabric.registry.state import RegistryState, Tenant
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT
from kvfabric_router.api import ApiError

_SCHEME = "bearer "


class TenantDirectory:
    """Who may use the router under one registry state.

    As long as there is no tenant but those of every registry and none of them has a key, requests belong
    to the tenant `default`, key or no key: a first try needs no set-up. After that every request needs
    a key, also when the last one was revoked.
    """

    def __init__(self, state: RegistryState, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._expiring: Mapping[bytes, tuple[Tenant, float]] = {
            digest: (tenant, at)
            for tenant in state.tenants.values()
            for digest, at in tenant.expiring_keys
        }
        self._tenants: Mapping[bytes, Tenant] = {
            digest: tenant for tenant in state.tenants.values() for digest in tenant.api_key_digests
        }
        self._is_open = not self._tenants and set(state.tenants) <= {DEFAULT_TENANT, PUBLIC_TENANT}
        self._default = state.tenants.get(DEFAULT_TENANT) or Tenant(DEFAULT_TENANT, DEFAULT_TENANT)

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an `Authorization` header. Raises ApiError 401."""
        if self._is_open:
            return self._default
        if not authorization or not authorization.lower().startswith(_SCHEME):
            raise ApiError(
                401,
                "No API key: send `Authorization: Bearer kvf-...` "
                "(`kvfabric tenant create NAME` prints one).",
                code="missing_api_key",
            )
        key = authorization[len(_SCHEME) :].strip()
        # Looked up by digest: how long it takes tells nothing of any stored key.
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        tenant = self._tenants.get(digest) or self._left_by_rotation(digest)
        if tenant is None:
            raise ApiError(401, "This API key is unknown or revoked.", code="invalid_api_key")
        return tenant

    def _left_by_rotation(self, digest: bytes) -> Tenant | None:
        tenant, ends_at = self._expiring.get(digest, (None, 0.0))
        return tenant if self._wall_clock() < ends_at else None
