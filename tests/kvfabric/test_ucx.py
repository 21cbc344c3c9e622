"""UCX between two real processes: bytes, ends, deaths."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvfabric.errors import ClosedError, ConfigError, ConnectError
from kvfabric.testing.ucx_peer import Peer, digest, payload, peer
from kvfabric.transfer import ucx
from kvfabric.transfer.ucx import Link, Message, Posted, Settings, Transport, _Abort

SETTINGS = Settings()
SECONDS = 10.0


@dataclass(frozen=True)
class Pair:
    transport: Transport
    link: Link
    peer: Peer


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with await Transport.start(SETTINGS) as transport, peer(SETTINGS) as other:
        assert await other.ask(connect=transport.address.hex())
        yield Pair(transport, await transport.connect(other.address), other)


def tag() -> int:
    return secrets.randbits(64)


async def outcome(posted: Posted) -> tuple[str, ...]:
    async with asyncio.timeout(SECONDS):
        return await posted.outcome()


async def quiet(posted: Posted) -> None:
    done = asyncio.Event()
    posted.when_quiet(done.set)
    async with asyncio.timeout(SECONDS):
        await done.wait()
    assert posted.quiet


async def test_a_vector_arrives_where_it_was_asked_for(pair: Pair) -> None:
    sizes = [1, 64, 4096, 65_536, 65_537, 1 << 20, 2 << 20, 5_000_001]
    arena = np.zeros(sum(sizes) + len(sizes), np.uint8).data
    tags, messages, at = [tag() for _ in sizes], [], 0
    for size, its_tag in zip(sizes, tags, strict=True):
        messages.append(Message(arena[at : at + size], its_tag))
        at += size + 1
    received = pair.link.receive(messages)
    asked = [[t, size, seed] for seed, (t, size) in enumerate(zip(tags, sizes, strict=True))]
    # In another order than they are waited for: the tag says which is which.
    assert await pair.peer.ask(send=asked[::-1]) == [""] * len(sizes)
    assert await outcome(received) == ("",) * len(sizes)
    for seed, (size, message) in enumerate(zip(sizes, messages, strict=True)):
        assert message.buffer == payload(size, seed)
    at = 0
    for size in sizes:
        at += size
        assert arena[at] == 0  # nothing beside the slots
        at += 1
    assert pair.transport.num_in_flight == 0


async def test_sends_arrive_too(pair: Pair) -> None:
    tags = [tag() for _ in range(20)]
    buffers = [payload(100_000 + i, i) for i in range(20)]
    pair.peer.tell(receive=[[t, len(b)] for t, b in zip(tags, buffers, strict=True)])
    sent = pair.link.send([Message(b, t) for b, t in zip(buffers, tags, strict=True)])
    assert await pair.peer.answer() == [["", digest(b)] for b in buffers]
    assert await outcome(sent) == ("",) * 20


async def test_more_than_was_asked_for_is_an_error_and_stays_outside(pair: Pair) -> None:
    arena = memoryview(bytearray(1 << 20))
    t = tag()
    received = pair.link.receive([Message(arena[: 1 << 19], t)])
    await pair.peer.ask(send=[[t, 1 << 20, 0]])
    (error,) = await outcome(received)
    assert "runcated" in error
    assert not any(arena[1 << 19 :])


async def test_an_end_of_the_link_ends_what_is_in_flight(pair: Pair) -> None:
    """And not before UCX has let go: an outcome that was given up does not make the memory free."""
    received = pair.link.receive([Message(memoryview(bytearray(4096)), tag()) for _ in range(3)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await received.outcome()
    assert not received.quiet
    pair.link.abort()
    assert all(await outcome(received))
    await quiet(received)
    assert not pair.link.is_alive
    assert await outcome(pair.link.receive([Message(memoryview(bytearray(1)), tag())])) == (
        "the link was ended",
    )
    again = await pair.transport.connect(pair.peer.address)
    t, memory = tag(), memoryview(bytearray(70_000))
    received = again.receive([Message(memory, t)])
    await pair.peer.ask(send=[[t, 70_000, 7]])
    assert await outcome(received) == ("",)
    assert memory == payload(70_000, 7)


def _kill_when(posted: Posted, process: int, how: signal.Signals) -> None:
    """Without a way through the event loop, which would be too late."""
    while not posted.quiet:
        time.sleep(0.0002)
    os.kill(process, how)


async def test_close_lets_arrive_what_is_on_its_way_and_takes_nothing_more(pair: Pair) -> None:
    """`abort` does not; see above."""
    tags, size = [tag() for _ in range(8)], 1 << 20
    arena = memoryview(bytearray(8 * size))
    received = pair.link.receive(
        [Message(arena[i * size : (i + 1) * size], t) for i, t in enumerate(tags)]
    )
    pair.link.close()
    (late,) = await outcome(pair.link.receive([Message(memoryview(bytearray(1)), tag())]))
    assert late == "the link was ended"
    assert not received.quiet
    assert await pair.peer.ask(send=[[t, size, i] for i, t in enumerate(tags)]) == [""] * 8
    assert await outcome(received) == ("",) * 8
    assert arena[-size:] == payload(size, 7)
    await asyncio.sleep(0.2)
    assert not pair.transport._progress._links


async def test_a_peer_that_is_gone_is_noticed_and_another_link_made(pair: Pair) -> None:
    """By what is in flight, and nothing of it is kept. A peer that starts again has another address."""
    address = pair.peer.address
    link = await pair.transport.link_to(address)
    received = link.receive([Message(memoryview(bytearray(4096)), tag())])
    pair.peer.tell(send=[[tag(), 8, 0]])  # so that there is a connection
    await asyncio.sleep(0.2)
    pair.peer.process.kill()
    began = time.monotonic()
    link.send([Message(memoryview(bytearray(8)), tag())])
    assert all(await outcome(received))
    assert time.monotonic() - began < SECONDS / 2
    assert not link.is_alive
    async with peer(SETTINGS) as other:
        assert await other.ask(connect=pair.transport.address.hex())
        t, buffer = tag(), memoryview(bytearray(100_000))
        again = (await pair.transport.link_to(other.address)).receive([Message(buffer, t)])
        await other.ask(send=[[t, 100_000, 3]])
        assert await outcome(again) == ("",)
        assert buffer == payload(100_000, 3)


async def test_leaving_while_something_is_asked(pair: Pair) -> None:
    for _ in range(20):
        async with await Transport.start(SETTINGS) as transport:
            (await transport.connect(pair.peer.address)).abort()


async def cpu_share(pair: Pair, seconds: float = 0.5) -> float:
    """Of one processor, that UCX's thread takes."""
    thread = pair.transport._progress._thread.native_id
    before = _cpu_ns(thread)
    await asyncio.sleep(seconds)
    return (_cpu_ns(thread) - before) / 1e9 / seconds


def _cpu_ns(thread: int | None) -> int:
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


async def test_the_thread_sleeps_unless_something_is_in_flight(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tag()
    received = pair.link.receive([Message(memoryview(bytearray(1 << 20)), t)])
    await pair.peer.ask(send=[[t, 1 << 20, 0]])
    await outcome(received)
    assert await cpu_share(pair) < 0.005
    waiting = pair.link.receive([Message(memoryview(bytearray(8)), tag())])
    share = await cpu_share(pair)
    assert share < 0.1
    # The twin: without the sleep between two looks.
    monkeypatch.setattr(ucx, "WAKE_S", 0.0)
    await asyncio.sleep(0.05)
    assert await cpu_share(pair) > 3 * share
    pair.link.abort()
    await outcome(waiting)


async def test_ucx_runs_with_our_settings_or_the_users(pair: Pair) -> None:
    config = pair.transport._progress._context.config
    ours = {name: value for name, value in ucx._SETTINGS.items() if name in config}
    assert len(ours) == 3  # the rest is of the TCP transport, which does not tell
    assert all(value.lower() in config[name].lower() for name, value in ours.items()), config
    assert "RNDV_THRESH=64k" in pair.transport.information.settings
    assert pair.transport.information.resources == ("tcp/lo",)
    given = Settings("eth0").options({"UCX_TLS": "all", "UCX_RNDV_THRESH": "1k"})
    assert given["NET_DEVICES"] == "eth0"
    assert not given.keys() & {"TLS", "RNDV_THRESH"}


async def test_memory_that_is_registered_once(pair: Pair) -> None:
    """On TCP there is nothing to register it with; it must do no harm, and end before the memory does."""
    memory = mmap.mmap(-1, 4 << 20)
    async with await Transport.start(SETTINGS) as transport:
        transport.register(memoryview(memory))
        link = await transport.connect(pair.transport.address)
        back = await pair.transport.connect(transport.address)
        t = tag()
        received = link.receive([Message(memoryview(memory)[4096 : 4096 + (2 << 20)], t)])
        assert await outcome(back.send([Message(payload(2 << 20, 5), t)])) == ("",)
        assert await outcome(received) == ("",)
        assert len(transport._progress._mapped) == 1
        assert memory[4096 : 4096 + (2 << 20)] == payload(2 << 20, 5)
    gc.collect()
    memory.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_that_dies_or_hangs_in_a_transfer(how: signal.Signals) -> None:
    # In a process of its own: ucxx 0.52 keeps a worker, and its listening socket, whose link was ended in
    # the middle of a message, until the process ends.
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, str(how.value))
    assert await process.wait() == 0


async def test_a_send_that_was_cancelled_is_no_success() -> None:
    """In a process of its own, as above."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "0")
    assert await process.wait() == 0


async def _cancelled() -> None:
    """Nobody receives it: it could only look like a success."""
    async with await Transport.start(SETTINGS) as transport, peer(SETTINGS) as other:
        assert await other.ask(connect=transport.address.hex())
        link = await transport.connect(other.address)
        sent = link.send([Message(payload(size, 1), tag()) for size in (1 << 20, 2 << 20)])
        await asyncio.sleep(0.1)
        assert not sent.quiet
        link.abort()
        assert all(await outcome(sent))


async def _die_or_hang(how: signal.Signals) -> None:
    """Every part either arrived whole or failed; after `quiet` nothing writes any more."""
    size, count = 4 << 20, 60
    arena = np.zeros(size * count, np.uint8).data
    tags = [tag() for _ in range(count)]
    async with await Transport.start(SETTINGS) as transport, peer(SETTINGS) as other:
        assert await other.ask(connect=transport.address.hex())
        link = await transport.connect(other.address)
        posted = [
            link.receive([Message(arena[i * size : (i + 1) * size], t)]) for i, t in enumerate(tags)
        ]
        other.tell(send=[[t, size, i] for i, t in enumerate(tags)])
        await asyncio.to_thread(_kill_when, posted[0], other.process.pid, how)
        await asyncio.sleep(0.2)
        link.abort()
        outcomes = [await outcome(p) for p in posted]
        for p in posted:
            await quiet(p)
        before = digest(arena)
        if how is signal.SIGSTOP:
            os.kill(other.process.pid, signal.SIGCONT)
            await asyncio.sleep(0.3)
        assert digest(arena) == before
    arrived = [i for i, (error,) in enumerate(outcomes) if not error]
    assert arrived[:1] == [0]
    assert len(arrived) < count, "it was too fast to be ended in between"
    for i in arrived:
        assert arena[i * size : (i + 1) * size] == payload(size, i)


async def test_leaving_ends_everything(pair: Pair) -> None:
    received = pair.link.receive([Message(memoryview(bytearray(4096)), tag())])
    async with asyncio.timeout(SECONDS):
        await pair.transport.__aexit__(None, None, None)
    assert received.quiet
    (error,) = await received.outcome()
    assert error
    with pytest.raises(ClosedError):
        pair.link.receive([])
    pair.link.abort()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_fails_leaves_nobody_waiting(pair: Pair) -> None:
    """What is in flight ends as failed, and who comes later hears of it."""
    received = pair.link.receive([Message(memoryview(bytearray(4096)), tag())])
    await asyncio.sleep(0.1)

    def fail() -> None:
        raise RuntimeError("a fault of this test")

    pair.transport._progress._take_commands = fail  # type: ignore[method-assign]
    pair.transport._progress.submit(_Abort(0))
    (error,) = await outcome(received)
    assert error
    await quiet(received)
    with pytest.raises(ClosedError):
        await pair.transport.link_to(pair.peer.address)
    with pytest.raises(ClosedError):
        pair.link.send([])


async def test_what_is_no_address(pair: Pair) -> None:
    with pytest.raises(ConnectError):
        await pair.transport.connect(b"")


async def test_one_link_for_all_even_if_the_first_who_asked_is_gone(pair: Pair) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(pair.transport.link_to(pair.peer.address))
        await asyncio.sleep(0)
        second = group.create_task(pair.transport.link_to(pair.peer.address))
        await asyncio.sleep(0)
        first.cancel()
    link = second.result()
    assert (await pair.transport.link_to(pair.peer.address)).number == link.number
    received = link.receive([Message(memoryview(bytearray(8)), tag())])
    link.abort()
    await outcome(received)
    assert (await pair.transport.link_to(pair.peer.address)).number != link.number


async def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="nowhere0"):
        await Transport.start(Settings("nowhere0", "tcp"))


if __name__ == "__main__":
    number = int(sys.argv[1])
    asyncio.run(_die_or_hang(signal.Signals(number)) if number else _cancelled())
