"""The ways to the other nodes, measured for `kvfabric doctor`: what UCX uses, how long and how fast it is.

Over the node's own worker, so over what blocks go over. A few MiB a node, one node after the other.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import statistics
import time
from collections.abc import Mapping
from typing import Any

import grpc

from kvfabric.errors import KVFabricError, PeerClosed
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.tls import Security, open_channel
from kvfabric.transfer.ucx import Link, Message, Transport

DEADLINE_S = 5.0
CALLS = 8
ROUNDS = 6
NUM_MESSAGES, MESSAGE_BYTES = 8, 2 << 20

_LANE = re.compile(r"lane\[\d+\]:\s+\d+:(\S+?)\.\d+ ")
_PROTOCOL = re.compile(r"\|\s+(\S+)\s+\|\s*(.+?)\s*\|\s*(\S+)\s*\|$")


async def measured_links(
    transport: Transport, peers: Mapping[str, str], security: Security
) -> pb.MeasuredLinks:
    """`peers`: each other node's gRPC, by its id. Never raises for what a peer does."""
    information = transport.information
    return pb.MeasuredLinks(
        exchanges=True,
        net_devices=transport.settings.net_devices,
        library=information.library,
        settings=information.settings,
        resources=information.resources,
        listening=information.listening,
        links=[await _measured(transport, peers[name], name, security) for name in sorted(peers)],
        wire="aes-gcm" if transport.is_sealed else "plain",
    )


async def _measured(
    transport: Transport, address: str, name: str, security: Security
) -> pb.MeasuredLink:
    try:
        channel = open_channel(address, security, [("grpc.use_local_subchannel_pool", 1)])
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await _Tries(transport, channel).link(name)
        finally:
            await channel.close()
    except grpc.aio.AioRpcError as exc:
        failure = f"{exc.code().name}: {exc.details()}"
    except TimeoutError:
        failure = f"no answer in {DEADLINE_S:g} s"
    except KVFabricError as exc:
        failure = str(exc)
    return pb.MeasuredLink(node_id=name, failure=failure)


class _Tries:
    def __init__(self, transport: Transport, channel: Any) -> None:
        self._transport = transport
        self._stub: Any = pb_grpc.NodeTransferStub(channel)  # type: ignore[no-untyped-call]

    async def link(self, name: str) -> pb.MeasuredLink:
        sent = await self._ask([], 0)
        link = await self._transport.link_to(sent.address)
        calls = [await self._timed_call() for _ in range(CALLS)]
        small, large = memoryview(bytearray(8)), memoryview(bytearray(NUM_MESSAGES * MESSAGE_BYTES))
        trips = [await self._come(link, [small]) for _ in range(CALLS)]
        pieces = [large[at : at + MESSAGE_BYTES] for at in range(0, len(large), MESSAGE_BYTES)]
        times = [await self._come(link, pieces) for _ in range(ROUNDS)]
        said = (await self._ask([], 0, describe=True)).link
        matches = filter(None, map(_PROTOCOL.search, said.splitlines()))
        protocols = dict.fromkeys(
            f"{sizes} {what.removeprefix('(?) ')} {lane}"
            for sizes, what, lane in (match.groups() for match in matches)
        )
        return pb.MeasuredLink(
            node_id=name,
            call_s=statistics.median(calls),
            round_trip_s=statistics.median(trips),
            bytes_per_s=len(large) / min(times),
            lanes=dict.fromkeys(_LANE.findall(said)),
            protocols=protocols,
        )

    async def _ask(self, tags: list[int], num_bytes: int, *, describe: bool = False) -> pb.TestSent:
        sent: pb.TestSent = await self._stub.SendTest(
            pb.SendTestRequest(
                address=self._transport.address,
                tags=tags,
                num_bytes=num_bytes,
                describe=describe,
            )
        )
        return sent

    async def _timed_call(self) -> float:
        began = time.perf_counter()
        await self._ask([], 0)
        return time.perf_counter() - began

    async def _come(self, link: Link, buffers: list[memoryview]) -> float:
        """Seconds until all of them are filled by the peer. Raises PeerClosed."""
        tags = [secrets.randbits(64) for _ in buffers]
        began = time.perf_counter()
        posted = link.receive([Message(b, t) for b, t in zip(buffers, tags, strict=True)])
        try:
            await self._ask(tags, len(buffers[0]))
            errors = [error for error in await posted.outcome() if error]
        except BaseException:
            link.abort()
            raise
        if errors:
            raise PeerClosed(errors[0])
        return time.perf_counter() - began
