"""What is changed in a node for a test of transfers: faults of the one that sends, guards of the other.

`altered(directory, "name", ...)` is a Python to start a node with. Faults never reach a real node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvfabric.daemon import fetching
from kvfabric.daemon.sending import Sender
from kvfabric.store.copying import checksum
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


def sends_wrong_bytes() -> None:
    """One bit of every part, in a copy."""
    parts_of = Sender._parts

    def parts(sender: Sender, offsets: bytes, num_bytes: int) -> list[memoryview]:
        changed = [bytearray(part) for part in parts_of(sender, offsets, num_bytes)]
        for part in changed:
            part[num_bytes // 2] ^= 1
        return [memoryview(part) for part in changed]

    Sender._parts = parts  # type: ignore[assignment, method-assign]


def sends_less() -> None:
    _changing(lambda message: Message(message.buffer[: len(message.buffer) // 2], message.tag))


def sends_more() -> None:
    _changing(lambda message: Message(memoryview(bytes(message.buffer) + bytes(4096)), message.tag))


def sends_under_other_tags() -> None:
    _changing(lambda message: Message(message.buffer, message.tag ^ 1))


def sends_nothing() -> None:
    _changing(None)


def _changing(change: object) -> None:
    send = Link.send

    def changed(link: Link, messages: Sequence[Message]) -> Posted:
        return send(link, [change(message) for message in messages] if callable(change) else [])

    Link.send = changed  # type: ignore[assignment, method-assign]


# ---------------------------------------------------------------------- of the receiver


def believes_what_comes() -> None:
    """Guard out: what arrived is not compared with what the peer has."""
    fetching._verified = lambda parts, checksums: b"".join(map(checksum, parts))


def waits_less() -> None:
    """Not a guard: a deadline that a test can wait for."""
    fetching.Fetches.__init__.__kwdefaults__["fetch_s"] = 0.5  # type: ignore[index]
