"""A fleet's Redis that stops for a long time while versions are withdrawn: nothing stale is served meanwhile.

Twin: `test_paused` of `tests/kvfabric/test_registry_faults.py`, where a lease that never ends is found out.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvfabric.errors import ConnectError
from kvfabric.testing.redis import RedisServer
from tests.kvfabric.test_registry_faults import Watch, holder_at, serving, until, withdraw
from tests.torture.scale import at_most, count, record

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

PAUSES = count(1, 10, "KVFABRIC_TORTURE_PAUSES")
PAUSE_S = count(1, 30)
LEASE_S = 0.4


async def test_a_redis_that_pauses_serves_nothing_stale(tmp_path: Path) -> None:
    served = 0
    with RedisServer(tmp_path / "redis") as server:
        async with (
            holder_at(server.url, tmp_path, "a", lease_s=LEASE_S) as a,
            holder_at(server.url, tmp_path, "b", lease_s=LEASE_S) as b,
            Watch(a, b).watching() as watch,
        ):
            await serving(a, b)
            for _ in range(PAUSES):
                await withdraw(a, watch)
                server.pause()
                try:
                    await asyncio.sleep(LEASE_S)
                    ends = asyncio.get_running_loop().time() + PAUSE_S - LEASE_S
                    while asyncio.get_running_loop().time() < ends:
                        served += a.usable() is not None or b.usable() is not None
                        await asyncio.sleep(0.01)
                    assert a.status.state == b.status.state == "no_lease"
                    with pytest.raises(ConnectError):
                        await a.invalidate("model", "m1", "", purge=False)
                finally:
                    server.go_on()
                await serving(a, b)
                await until(lambda: a.state == b.state)
            assert served == watch.stale == watch.regressed == 0
            assert await a.audit_log() == await b.audit_log()
    record(
        f"directory. Redis paused for {PAUSE_S} s after a withdrawal",
        PAUSES,
        f"{at_most(0, PAUSES)} stale or served without a lease; each healed by itself",
    )
