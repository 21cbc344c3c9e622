"""Tells the other replicas of this router what it has at the engines, and hears what they have.

Over the registry: the directory's Redis, or the first node's where there is none. Nothing waits for it; what
is not heard fades (`shared_load`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

import grpc
import msgspec

from kvfabric.errors import KVFabricError
from kvfabric_router.fleet import Fleet
from kvfabric_router.shared_load import PUBLISH_S, LoadReport

Exchange = Callable[[str, bytes], Awaitable[Iterable[bytes]]]
"""(this replica, its row) -> the others' rows. Raises KVFabricError or AioRpcError."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(LoadReport)

_log = logging.getLogger(__name__)


async def share_load(fleet: Fleet, exchange: Exchange) -> None:
    """Until cancelled."""
    shared = fleet.shared
    while True:
        try:
            async with asyncio.timeout(PUBLISH_S):
                row = _ENCODER.encode(shared.report(fleet.loads()))
                rows = await exchange(shared.replica, row)
        except (TimeoutError, KVFabricError, grpc.aio.AioRpcError) as exc:
            _log.debug("load is not shared: %s", exc)
        else:
            # When each was told is not known: at some moment since the last exchange.
            shared.hear(_reports(rows), late_s=PUBLISH_S / 2)
            fleet.room()
        await asyncio.sleep(PUBLISH_S)


def _reports(rows: Iterable[bytes]) -> Iterator[LoadReport]:
    for row in rows:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # of another version
            yield _DECODER.decode(row)
