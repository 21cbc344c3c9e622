"""What is changed in a node for a test of transfers: faults of the one that sends, guards of the other.

`altered(directory, "name", ...)` is a Python to start a node with. Faults never reach a real node.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvfabric.daemon import arriving, fetching, handoffs, sending
from kvfabric.daemon.fetching import Fetches
from kvfabric.daemon.handoffs import Handoffs
from kvfabric.daemon.sending import Sender
from kvfabric.errors import PeerClosed
from kvfabric.store.copying import checksum
from kvfabric.transfer import sealing
from kvfabric.transfer.ucx import Link, Message, Posted


def altered(directory: Path, *changes: str) -> str:
    script = directory / f"python-{'-'.join(changes)}"
    lines = [
        f"#!{sys.executable}",
        "import runpy, sys",
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})",
        "from tests.fleet import peer_faults",
        *(f"peer_faults.{change}()" for change in changes),
        "sys.argv = ['kvfabric', *sys.argv[3:]]",  # without: -m kvfabric
        "runpy.run_module('kvfabric', run_name='__main__', alter_sys=True)",
    ]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o700)
    return str(script)


# ---------------------------------------------------------------------- of the sender


def sends_something_else() -> None:
    """What: the content of the file `fault` in the state directory, looked at whenever something is sent."""
    messages_of, send = Sender._messages, Link.send

    def messages(
        self: Sender, offsets: bytes, num_bytes: int, together: int
    ) -> list[list[memoryview]]:
        right = messages_of(self, offsets, num_bytes, together)
        if _fault() != "wrong bytes":
            return right
        return [[_altered(view) for view in views] for views in right]

    def changed(self: Link, messages: Sequence[Message]) -> Posted:
        return send(self, [m for one in messages for m in _CHANGES.get(_fault(), _same)(one)])

    Sender._messages = messages  # type: ignore[method-assign]
    Link.send = changed  # type: ignore[method-assign]


def dies_on_the_way() -> None:
    """Once so many tenths of a vector, counted in bytes, have gone out: the file `fault`."""
    send = Link.send

    def dying(self: Link, messages: Sequence[Message]) -> Posted:
        if not _fault():
            return send(self, messages)
        sizes = [len(message.buffer) for message in messages]
        limit = sum(sizes) * int(_fault()) // 10
        before = bisect.bisect(list(itertools.accumulate(sizes)), limit)
        posted = [send(self, [message]) for message in messages]
        threading.Thread(target=_die_after, args=(posted[:before],), daemon=True).start()
        return posted[-1]

    Link.send = dying  # type: ignore[method-assign]


def _die_after(posted: Sequence[Posted]) -> None:
    while not all(one.quiet for one in posted):
        time.sleep(0.0001)
    os.kill(os.getpid(), signal.SIGKILL)


LATE_S = 4.0


def sends_late() -> None:
    """By `LATE_S`, whoever has given it up by then; where the file `fault` is."""
    send = Link.send

    def late(self: Link, messages: Sequence[Message]) -> Posted:
        if not _fault():
            return send(self, messages)
        promised = Posted(len(messages))
        after = asyncio.get_running_loop().call_later
        after(LATE_S, lambda: _follow(send(self, messages), promised))
        return promised

    Link.send = late  # type: ignore[method-assign]


def _follow(sent: Posted, promised: Posted) -> None:
    sent._ended.add_done_callback(lambda ended: promised._ended.set_result(ended.result()))


def gives_up_sooner() -> None:
    """Not a guard: how long a peer may take what it asked for, as a test can wait for it."""
    Sender.__init__.__kwdefaults__.update(send_s=1.0, hold_s=3.0)  # type: ignore[union-attr]


def _fault() -> str:
    file = _state_dir() / "fault"
    return file.read_text() if file.exists() else ""


def _altered(view: memoryview) -> memoryview:
    """A byte of each small part, and of a large one."""
    changed = bytearray(view)
    for at in range(len(changed) // 2 % 4096, len(changed), 4096):
        changed[at] ^= 1
    return memoryview(changed)


def _same(message: Message) -> list[Message]:
    return [message]


_CHANGES: dict[str, Callable[[Message], list[Message]]] = {
    "less": lambda m: [Message(m.buffer[: len(m.buffer) // 2], m.tag)],
    "more": lambda m: [Message(memoryview(bytes(m.buffer) + bytes(4096)), m.tag)],
    "under other tags": lambda m: [Message(m.buffer, m.tag ^ 1)],
    "nothing": lambda _: [],
    "tampered": lambda m: [Message(_altered(m.buffer), m.tag)],
}
FAULTS = ("wrong bytes", *_CHANGES)


# ---------------------------------------------------------------------- of the receiver


def believes_what_comes() -> None:
    """Guard out: what arrived is not compared with what the peer has."""
    arriving.verified = lambda parts, checksums: b"".join(map(checksum, parts))


def takes_what_is_there() -> None:
    """Guards out: neither that messages failed is looked at, nor what arrived of the others."""

    async def arrived(_: Fetches, peer: Any, messages: list[Message]) -> None:
        await peer.link.receive(messages).outcome()

    Fetches._arrived = arrived  # type: ignore[method-assign, assignment]
    believes_what_comes()


def lets_go_at_once() -> None:
    """Guard out: slots are free when nobody waits for them any more, whatever UCX may still write there."""

    async def arrived(_: Fetches, peer: Any, messages: list[Message]) -> None:
        errors = [error for error in await peer.link.receive(messages).outcome() if error]
        if errors:
            raise PeerClosed(errors[0])

    Fetches._arrived = arrived  # type: ignore[method-assign, assignment]


def never_gives_up() -> None:
    """Guard out: what a peer sends is waited for without a deadline."""
    Fetches.__init__.__kwdefaults__["fetch_s"] = 1e6  # type: ignore[index]


def takes_any_seal() -> None:
    """Guard out: whether a sealed message is what was sealed."""
    sealing._check_tag = lambda *_: None


def waits_less() -> None:
    """Not a guard: a deadline that a test can wait for."""
    Fetches.__init__.__kwdefaults__["fetch_s"] = 0.5  # type: ignore[index]


def waits_for_ever() -> None:
    """Guard out: blocks that another engine computes are waited for without a deadline."""
    opened = Handoffs.opened

    def without(self: Handoffs, *arguments: Any) -> None:
        opened(self, *arguments)
        for awaited in self._awaited.values():
            awaited.deadline = 1e9

    Handoffs.opened = without  # type: ignore[method-assign,assignment]
    handoffs.MAX_WAIT_S = 1e9


# ---------------------------------------------------------------------- of both


def hopes_for_more() -> None:
    """Guard out: the node of an engine that computes for another does not look whether it still does."""
    Handoffs.may_come = lambda self, name, since: True  # type: ignore[method-assign]


# ---------------------------------------------------------------------- of both


def notes_messages() -> None:
    """Each vector of messages is a line of JSON in the file `messages` in the state directory."""
    for name in ("send", "receive"):
        setattr(Link, name, _noted(getattr(Link, name), name))


def _noted(post: Callable[[Link, Sequence[Message]], Posted], name: str) -> Any:
    def noted(self: Link, messages: Sequence[Message]) -> Posted:
        line = {
            "what": name,
            "tags": [m.tag for m in messages],
            "sizes": [len(m.buffer) for m in messages],
            "in_arena": [isinstance(m.buffer.obj, mmap.mmap) for m in messages],
        }
        with (_state_dir() / "messages").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return post(self, messages)

    return noted


def notes_bytes_in_flight() -> None:
    """The most that were asked for at once, in the file `in_flight` in the state directory. 1 MiB a chunk."""
    fetching.CHUNK_BYTES = 1 << 20
    sent, bytes_now, most = Fetches._sent, 0, 0

    async def noted(self: Any, peer: Any, chunk: Any, slots: Any) -> bytes:
        nonlocal bytes_now, most
        bytes_now += chunk.num_bytes
        if bytes_now > most:
            most = bytes_now
            (_state_dir() / "in_flight").write_text(str(most))
        try:
            return await sent(self, peer, chunk, slots)
        finally:
            bytes_now -= chunk.num_bytes

    Fetches._sent = noted  # type: ignore[method-assign]


def has_little_room() -> None:
    """Not a guard: a bound that a test can reach."""
    fetching.IN_FLIGHT_BYTES = 2 << 20


def is_busy_when_told() -> None:
    """While there is a file `busy` in the state directory, a hold is one too many."""
    hold = Sender.Hold

    async def told(self: Sender, request: Any, context: Any) -> Any:
        sending.MAX_HOLDS = 0 if (_state_dir() / "busy").exists() else 256
        return await hold(self, request, context)

    Sender.Hold = told  # type: ignore[method-assign]


def _state_dir() -> Path:
    return Path(sys.argv[sys.argv.index("--state-dir") + 1])
