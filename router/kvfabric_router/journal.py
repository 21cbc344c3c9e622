"""The journal: what was chosen from what, and what came of it, on disk, so that it can be replayed.

A line is `CRC32 JSON`: a `Chosen` when a request is sent, an `Answered` when its engine told its usage. Ids
of requests and tenants are keyed digests (the key lies in the router's state directory, not in the journal);
blocks are the 8-byte prefixes that nodes' events carry. No text, no token, no API key.

Lines are collected and appended by a thread twice a second, then synced. A file that was torn by a crash is
never appended to: each start, and each file that is full, begins a new one; the oldest go when all together
are larger than allowed. A disk that fails costs lines (counted), never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from kvfabric.errors import ConfigError, NotFound
from kvfabric.types import NodeId
from kvfabric_router.decision import Decision, Outcome
from kvfabric_router.policy import Candidate

FLUSH_EVERY_S = 0.5
MAX_BUFFERED_BYTES = 8 << 20
NUM_FILES = 8
BLOCK_ID_BYTES = 8
_KEY_FILE = "journal.key"

_log = logging.getLogger(__name__)


class Capacity(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a node's tiers."""

    host: int
    ssd: int


class Chosen(msgspec.Struct, frozen=True, kw_only=True, tag="chosen"):
    """`candidates` as the policy saw them, best first; `draw` makes it choose the same again. `blocks`: ids
    of the prompt's reusable blocks, 8 bytes each, of `block_tokens` tokens. `at`: Unix seconds. `capacity` of
    the candidates' nodes, as far as they told.
    """

    id: str
    tenant: str
    at: float
    model: str
    policy: str
    draw: int
    reason: str
    waited_ms: float
    candidates: tuple[Candidate, ...]
    blocks: bytes
    block_tokens: int
    capacity: dict[str, Capacity] = {}


class Answered(msgspec.Struct, frozen=True, kw_only=True, tag="answered"):
    id: str
    outcome: Outcome


Record = Chosen | Answered
_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class Journal:
    """Appends to a directory of its own. Use as an async context manager; `append` never blocks or raises.

    Raises ConfigError on entering if the directory cannot be used or is another router's.
    """

    def __init__(
        self, directory: Path, *, state_dir: Path, max_bytes: int, dropped: Callable[[int], None]
    ) -> None:
        self._directory = directory
        self._state_dir = state_dir
        self._max_bytes = max_bytes
        self._dropped = dropped
        self.capacities: Callable[[Iterable[NodeId]], dict[str, Capacity]] = lambda _nodes: {}
        """What nodes hold at most; of those that told."""
        self._key = b""
        self._lines: list[bytes] = []
        self._buffered = 0
        self._file = -1
        self._file_bytes = 0
        self._lock = -1
        self._failed = False
        self._writing = threading.Lock()  # a cancelled write goes on in its thread

    def __repr__(self) -> str:
        return f"<Journal {self._directory}: {len(self._lines)} lines to write>"

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """While the block runs, lines reach the disk; the last ones when it ends."""
        try:
            await asyncio.to_thread(self._open)
        except OSError as exc:
            raise ConfigError(f"router.journal_dir {self._directory}: {exc.strerror}") from exc
        stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._run(stop))
                try:
                    yield
                finally:
                    stop.set()
        finally:
            self._write(self._take())
            for descriptor in (self._file, self._lock):
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def chosen(
        self, request_id: str, model: str, decision: Decision, blocks: bytes, block_tokens: int
    ) -> None:
        """A request is sent as was decided."""
        self._append(
            Chosen(
                id=self._name(request_id),
                tenant=self._name(decision.tenant),
                at=decision.made_at,
                model=model,
                policy=decision.policy,
                draw=decision.draw,
                reason=decision.reason,
                waited_ms=decision.waited_ms,
                candidates=tuple(_bare(ranked.candidate) for ranked in decision.ranked),
                blocks=blocks,
                block_tokens=block_tokens,
                capacity=self.capacities(
                    ranked.candidate.engine.node_id
                    for ranked in decision.ranked
                    if ranked.candidate.engine.node_id
                ),
            )
        )

    def answered(self, request_id: str, outcome: Outcome) -> None:
        """What its engine reported."""
        self._append(Answered(id=self._name(request_id), outcome=outcome))

    def _name(self, of: str) -> str:
        return hashlib.blake2b(of.encode(), key=self._key, digest_size=8).hexdigest()

    def _append(self, record: Record) -> None:
        body = msgspec.json.encode(record)
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        if self._buffered + len(line) > MAX_BUFFERED_BYTES:
            self._dropped(1)
            return
        self._lines.append(line)
        self._buffered += len(line)

    # ------------------------------------------------------------------ on a thread

    async def _run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_EVERY_S):
                    await stop.wait()
            if self._lines:
                await asyncio.to_thread(self._write, self._take())

    def _take(self) -> list[bytes]:
        lines, self._lines, self._buffered = self._lines, [], 0
        return lines

    def _open(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._lock)
            raise ConfigError(
                f"router.journal_dir {self._directory} is another router's: give each its own"
            ) from exc
        self._key = _read_key(self._state_dir)
        self._begin_file()

    def _begin_file(self) -> None:
        files = files_of(self._directory)
        number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0
        if self._file >= 0:
            with contextlib.suppress(OSError):  # what it lost was counted when it was written
                os.close(self._file)
        path = self._directory / f"journal-{number:08d}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._file_bytes = 0
        room = self._max_bytes - self._max_bytes // NUM_FILES  # the new one may become full
        sizes = {file: file.stat().st_size for file in files}
        for file in files:
            if sum(sizes.values()) > room:
                file.unlink()
                del sizes[file]

    def _write(self, lines: list[bytes]) -> None:
        with self._writing:
            while lines:
                try:
                    written = self._write_some(lines)
                except OSError as exc:
                    self._give_up(lines, exc)
                    return
                self._failed = False
                lines = lines[written:]

    def _write_some(self, lines: list[bytes]) -> int:
        """As many of them as the file takes. Raises OSError."""
        if self._file_bytes >= self._max_bytes // NUM_FILES:
            self._begin_file()
        room = max(self._max_bytes // NUM_FILES - self._file_bytes, 1)
        count, size = _fitting(lines, room)
        data = memoryview(b"".join(lines[:count]))
        while data:
            data = data[os.write(self._file, data) :]
        os.fdatasync(self._file)
        self._file_bytes += size
        return count

    def _give_up(self, lines: list[bytes], error: OSError) -> None:
        self._dropped(len(lines))
        if not self._failed:
            _log.error("journal %s: %s; going on without", self._directory, error.strerror)
        self._failed = True
        self._file_bytes = self._max_bytes  # whatever stands there now, a new file follows


def _fitting(lines: list[bytes], room: int) -> tuple[int, int]:
    """(how many leading lines fit, their bytes); at least one."""
    size = count = 0
    for line in lines:
        if count and size + len(line) > room:
            break
        count, size = count + 1, size + len(line)
    return count, size


def _bare(candidate: Candidate) -> Candidate:
    """Without what the policy does not look at."""
    return replace(
        candidate,
        engine=replace(candidate.engine, session=b"", model=None),
        prefill=_bare(candidate.prefill) if candidate.prefill is not None else None,
    )


def _read_key(state_dir: Path) -> bytes:
    path = state_dir / _KEY_FILE
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    key = path.read_bytes()
    if len(key) != 32:
        raise ConfigError(f"{path} holds no key; remove it to have a new one made")
    return key


# ---------------------------------------------------------------------- reading


def files_of(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("journal-*.jsonl"))


class Reading:
    """The records of a journal, a directory or one file, oldest first. `num_damaged`: lines left out, once
    it was iterated. Raises NotFound if there is none.
    """

    def __init__(self, path: Path) -> None:
        self.num_damaged = 0
        self._files = files_of(path) if path.is_dir() else [path]
        if not self._files or not all(file.is_file() for file in self._files):
            raise NotFound(f"{path} is no journal")

    def __iter__(self) -> Iterator[Record]:
        self.num_damaged = 0
        for file in self._files:
            with file.open("rb") as lines:
                for line in lines:
                    record = _decoded(line)
                    if record is None:
                        self.num_damaged += 1
                    else:
                        yield record


def _decoded(line: bytes) -> Record | None:
    """None if it is torn or was changed."""
    check, _, body = line.removesuffix(b"\n").partition(b" ")
    if check != b"%08x" % zlib.crc32(body):
        return None
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError:
        return None
