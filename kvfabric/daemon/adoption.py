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

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
        temporary.replace(path)

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
        except (OSError, ValueError, KeyError, TypeError) as exc:
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
