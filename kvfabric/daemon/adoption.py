"""The arena of an earlier daemon: who may still map it, and when it may be adopted or replaced.

A daemon that dies leaves engines that map its arena. Its successor must neither create a second arena
beside that one (the machine has not the memory) nor lose it. So each daemon keeps `arena.json`: which
memory its arena is and which processes have it. The successor waits, serving without a host tier:

    WAITING --an engine returns the descriptor, identity equal--> ADOPTED (contents void)
       |
       +--no listed process lives or has the memory any more--> GONE (create a fresh one)

A process that lives and has not returned it keeps the successor waiting, however long: time frees nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvfabric.failpoints import failpoint
from kvfabric.tiers.arena import PAGE_BYTES, Arena

log = logging.getLogger(__name__)


class ProcessId(NamedTuple):
    """A process, safe against reuse of its number: `start_time` in clock ticks since boot."""

    pid: int
    start_time: int


class ArenaIdentity(NamedTuple):
    device: int
    inode: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ArenaRecord:
    """Contents of `arena.json`."""

    boot_id: str
    arena: ArenaIdentity
    processes: tuple[ProcessId, ...]

    def save(self, path: Path) -> None:
        """Replace the file. Not synced to disk: a crash of the machine ends every process it lists."""
        temporary = path.with_name(path.name + ".new")
        document = {
            "boot_id": self.boot_id,
            "arena": list(self.arena),
            "processes": [list(process) for process in self.processes],
        }
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file)
        failpoint("arena.recorded")
        temporary.replace(path)
        failpoint("arena.replaced")

    @classmethod
    def load(cls, path: Path) -> ArenaRecord | None:
        """None if there is none. One that does not read is reported and counts as none."""
        try:
            document = json.loads(path.read_text())
            return cls(
                str(document["boot_id"]),
                ArenaIdentity(*(int(value) for value in document["arena"])),
                tuple(ProcessId(int(pid), int(start)) for pid, start in document["processes"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
            log.warning("%s does not read (%s): taken as absent", path, exc)
            return None


def identity_of(descriptor: int) -> ArenaIdentity:
    found = os.fstat(descriptor)
    return ArenaIdentity(found.st_dev, found.st_ino, found.st_size)


def start_time(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot, None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def has_memory(process: ProcessId, arena: ArenaIdentity) -> bool:
    """Does `process` live and map the arena or hold a descriptor of it? Blocks on /proc."""
    if start_time(process.pid) != process.start_time:
        return False
    root = Path(f"/proc/{process.pid}")
    try:
        if any(_same(entry, arena) for entry in (root / "fd").iterdir()):
            return True
        lines = (root / "maps").read_text().splitlines()
    except FileNotFoundError:
        return False
    except OSError as exc:  # not ours to look into: it may have it
        log.warning("cannot see what process %d maps (%s)", process.pid, exc)
        return True
    return any(_maps(line, arena) for line in lines)


def _same(entry: Path, arena: ArenaIdentity) -> bool:
    try:
        found = entry.stat()
    except OSError:  # closed meanwhile
        return False
    return (found.st_dev, found.st_ino) == (arena.device, arena.inode)


def _maps(line: str, arena: ArenaIdentity) -> bool:
    fields = line.split(maxsplit=5)
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    return os.makedev(major, minor) == arena.device and int(fields[4]) == arena.inode


class ArenaKeeper:
    """The arena of this node from nothing to attached, and `arena.json`, which outlives us."""

    def __init__(self, path: Path, boot_id: bytes, host_bytes: int) -> None:
        self.arena: Arena | None = None
        self.adopted = False
        self.descriptor = -1
        """Read-only, to hand out; -1 without an arena."""
        self.waiting_for: frozenset[ProcessId] = frozenset()
        self._path = path
        self._boot_id = boot_id
        self._host_bytes = host_bytes // PAGE_BYTES * PAGE_BYTES
        self._earlier = ArenaRecord.load(path)
        if self._earlier is not None:
            self.waiting_for = frozenset(self._earlier.processes)

    def __repr__(self) -> str:
        return f"<ArenaKeeper {self.arena!r}: waiting for {len(self.waiting_for)} processes>"

    def is_missing(self) -> bool:
        return self.arena is None

    async def refresh(self) -> None:
        """Drop from `waiting_for` who is gone or gave the memory up."""
        if self._earlier is not None and self.waiting_for:
            arena, listed = self._earlier.arena, self.waiting_for
            left = await asyncio.to_thread(
                lambda: frozenset(process for process in listed if has_memory(process, arena))
            )
            self.waiting_for &= left

    def create(self) -> Arena:
        """A fresh arena. Only when nobody maps the earlier one any more."""
        assert self.arena is None
        return self._set(Arena.create(self._host_bytes))

    def adopt(self, descriptor: int) -> Arena | None:
        """The earlier arena, if `descriptor` is it and we wait for it. `descriptor` stays the caller's."""
        if self.arena is not None or self._earlier is None:
            return None
        if identity_of(descriptor) != self._earlier.arena:
            return None
        arena = self._set(Arena.adopt(descriptor))
        self.adopted = True
        failpoint("arena.adopted")
        return arena

    def take_over(self, descriptor: int) -> Arena:
        """The arena of a living daemon that hands it over; `descriptor` stays the caller's.

        Raises RemoteProtocolError if it is none.
        """
        assert self.arena is None
        return self._set(Arena.adopt(descriptor))

    def save(self, processes: set[ProcessId]) -> None:
        """Note who has the arena now, before they get it; earlier ones that still map it stay listed."""
        if self.arena is None:
            return
        device, inode = self.arena.identity()
        record = ArenaRecord(
            boot_id=self._boot_id.hex(),
            arena=ArenaIdentity(device, inode, self.arena.size_bytes),
            processes=tuple(sorted(processes | self.waiting_for)),
        )
        try:
            record.save(self._path)
        except OSError as exc:
            # Engines are served all the same: what a successor may lose by it is memory, not truth.
            log.error("cannot write %s: %s", self._path, exc.strerror)  # noqa: TRY400

    def close(self) -> None:
        if self.arena is not None:
            os.close(self.descriptor)
            self.arena.close()

    def _set(self, arena: Arena) -> Arena:
        try:
            self.descriptor = arena.read_only_fd()
        except OSError:
            arena.close()
            raise
        self.arena = arena
        return arena
