"""How many requests a second a tenant may have here: one token bucket each. Pure; `clock` in seconds.

The bucket holds a second's worth, one request at least. A limit that changes counts from the next request
on. Buckets of tenants without a limit do not exist, so there are as many as limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvfabric.registry.state import Tenant
from kvfabric.types import TenantId
from kvfabric_router.api import ApiError


class RequestRates:
    """Every method is atomic on the event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[TenantId, tuple[float, float]] = {}  # (tokens, at)

    def take(self, tenant: Tenant) -> None:
        """Count one request. Raises ApiError 429 that says when the next one would be taken."""
        rate = tenant.limits.requests_per_s
        if rate <= 0:
            self._buckets.pop(tenant.tenant_id, None)
            return
        most, now = max(1.0, rate), self._clock()
        tokens, at = self._buckets.get(tenant.tenant_id, (most, now))
        tokens = min(most, tokens + (now - at) * rate)
        if tokens < 1.0:
            self._buckets[tenant.tenant_id] = (tokens, now)
            wait_s = (1.0 - tokens) / rate
            raise ApiError(
                429,
                f"This tenant may have {rate:g} requests a second here.",
                code="rate_limit_exceeded",
                retry_after_s=max(1, math.ceil(wait_s)),
            )
        self._buckets[tenant.tenant_id] = (tokens - 1.0, now)
