"""Which LoRA weights a request of vLLM runs with: digests of adapter folders, and the proof that they hold.

vLLM reads an adapter's files when it likes: at `add_lora`, at its first request, again after its LRU cache
dropped it. It says nothing of it to connectors, and the digest is made later still. So a digest counts only
where every such reading must have seen the same bytes: while nothing of the folder changed since before this
engine started. The proof is `ctime`, which no program can set back. It is looked at again when a request
comes (here), before its blocks are loaded and after those to be stored were computed (in each worker).

The rest stands aside, from then on and with one line: an adapter that came or changed after the start, is
loaded in place, shares its id with another, is no local folder, or runs where adapters may be exchanged at
any moment (VLLM_ALLOW_RUNTIME_LORA_UPDATING). Not seen: another directory moved into the place of one above
the folder, and `add_lora` in place, from another folder, by a program while requests of that id run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from kvfabric.hashing import tlv
from kvfabric_engine.integrations.vllm_identity import WEIGHT_FILES, file_digest

CONFIG_FILE = "adapter_config.json"
CLOCK_S = 2.0
"""How far a file system's clock and ours may be apart, its granularity included."""

Stamp = tuple[tuple[str, int, int, int, int, int], ...]
"""(name, device, inode, size, mtime_ns, ctime_ns) of the folder, of links to it, and of its files."""


class Unknown(Exception):
    """What a request's KV depends on is not known. Says why, in words for a log line."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder as it was when it was digested."""

    folder: str
    stamp: Stamp

    def are_unchanged(self) -> bool:
        try:
            return stamp_of(self.folder) == self.stamp
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Adapter:
    """A request's adapter: `digest`, 32 bytes of its content; `number`, vLLM's id of it."""

    number: int
    digest: bytes
    files: AdapterFiles


def files_of(folder: str) -> list[Path]:
    """What decides an adapter's weights. Raises OSError."""
    names = {f for pattern in (CONFIG_FILE, *WEIGHT_FILES) for f in Path(folder).glob(pattern)}
    return sorted(names)


def stamp_of(folder: str) -> Stamp:
    """What changes when the folder does. Raises OSError."""
    paths = [Path(folder), *files_of(folder)]
    links = {link for path in paths for link in _links(path)}
    entries = [(f"link {link}", link.lstat()) for link in sorted(links)]
    entries += [(str(path), path.stat()) for path in paths]
    return tuple(
        (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in entries
    )


def _links(path: Path) -> Iterator[Path]:
    """Every symbolic link on the way to what `path` names."""
    for _ in range(40):  # as many as Linux follows
        link = next((p for p in (*reversed(path.parents), path) if p.is_symlink()), None)
        if link is None:
            return
        yield link
        path = link.parent / link.readlink() / path.relative_to(link)
    raise OSError(errno.ELOOP, "too many links")


def _changed_ns(stamp: Stamp) -> int:
    return max(max(mtime, ctime) for *_, mtime, ctime in stamp)


class Adapters:
    """Made before the engine serves. Thread-safe; `see` returns at once, `find` looks at the folder.

    `settings`: what else of the engine decides how adapters are computed. `tell` gets lines for the log.
    """

    def __init__(
        self, *, settings: str, may_be_exchanged: bool, tell: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._may_be_exchanged = may_be_exchanged
        self._tell = tell
        self._start = time.time(), time.monotonic()
        self._reader = ThreadPoolExecutor(1, "kvf-adapters")
        self._lock = Lock()  # guards all below
        self._bound: dict[int, tuple[str, bool]] = {}
        self._distrusted: set[int | str] = set()  # ids and folders
        self._digests: dict[str, tuple[Stamp, Future[bytes]]] = {}

    def __repr__(self) -> str:
        return f"<Adapters {len(self._digests)} folders, {len(self._distrusted)} distrusted>"

    def close(self) -> None:
        """After what is being read: Python waits for that at its end in any case."""
        self._reader.shutdown(cancel_futures=True)

    def see(self, lora: Any) -> None:
        """A request with this LoRARequest came. Before vLLM can act on it: an id may change its weights."""
        form = str(lora.lora_path), bool(lora.is_3d_lora_weight)
        with self._lock:
            if lora.load_inplace or self._bound.setdefault(lora.lora_int_id, form) != form:
                self._distrusted.add(lora.lora_int_id)

    def is_trusted(self, adapter: Adapter | None) -> bool:
        """Whether the adapter's id still means what it did when it was found."""
        return adapter is None or adapter.number not in self._distrusted

    def find(self, lora: Any) -> Adapter:
        """Raises Unknown while its weights are not known for certain."""
        folder = _folder_of(str(lora.lora_path))
        with self._lock:
            if lora.lora_int_id in self._distrusted:
                raise Unknown("was loaded in place, or its id was given to another")
            if folder in self._distrusted:
                raise Unknown("changed on disk since this engine started")
        if self._may_be_exchanged:
            raise Unknown("may be exchanged at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING)")
        stamp = self._proven_stamp(folder)
        content = self._content(str(lora.lora_name), folder, stamp)
        fields = [
            (1, content),
            (2, bytes([bool(lora.is_3d_lora_weight)])),
            (3, self._settings.encode()),
        ]
        digest = hashlib.blake2b(
            tlv("kvfabric/vllm-adapter", fields), digest_size=32, person=b"kvf-adapter-1"
        ).digest()
        return Adapter(lora.lora_int_id, digest, AdapterFiles(folder, stamp))

    def _proven_stamp(self, folder: str) -> Stamp:
        """Of a folder that did not change since before this engine could read it."""
        if not os.path.isdir(folder):
            raise Unknown("is not a folder here")
        try:
            stamp = stamp_of(folder)
        except OSError as exc:
            raise Unknown(f"cannot be read ({exc.strerror})") from exc
        started, started_monotonic = self._start
        if time.time() - started < time.monotonic() - started_monotonic - CLOCK_S / 2:
            raise Unknown("cannot be dated: the clock was set back")
        if not 0 < _changed_ns(stamp) < (started - CLOCK_S) * 1e9:
            with self._lock:
                self._distrusted.add(folder)
            raise Unknown("changed on disk since this engine started")
        return stamp

    def _content(self, name: str, folder: str, stamp: Stamp) -> bytes:
        with self._lock:
            known = self._digests.get(folder)
            if known is None:
                self._digests[folder] = stamp, self._reader.submit(_digest_of, folder)
        if known is None:
            self._tell(
                f'adapter "{name}" is being read: until then it is computed without the fabric'
            )
        if known is None or not known[1].done():
            raise Unknown("")
        if known[0] != stamp:
            with self._lock:
                self._distrusted.add(folder)
            raise Unknown("changed on disk since this engine started")
        try:
            return known[1].result()
        except OSError as exc:
            raise Unknown(f"cannot be read ({exc.strerror or exc})") from exc


def _folder_of(path: str) -> str:
    """As vLLM finds it."""
    return path if os.path.isabs(path) else os.path.abspath(os.path.expanduser(path))


def _digest_of(folder: str) -> bytes:
    files = files_of(folder)
    if len(files) < 2 or CONFIG_FILE not in (file.name for file in files):
        raise OSError("it has no configuration or no weights")
    return hashlib.sha256(
        tlv("kvfabric/adapter-files", [(1, file_digest(file)) for file in files])
    ).digest()
