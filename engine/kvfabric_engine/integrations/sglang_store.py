"""Pages of an engine that names them by hashes of its own: looked up, loaded and stored through the node.

Between SGLang's storage interface and the node; does not import SGLang. Every call is a request of its own,
because the interface names none: opened under the default tenant (a node with `require_handle` has none and
refuses), matched, and released when its copies have ended. Calls block, from any thread, at most for their
deadlines, and raise what went wrong (the caller has the boundary). At least one page a call.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfabric.client import EngineHello, NodeClient, Window
from kvfabric.errors import KVFabricError, NoSpace
from kvfabric.hashing import ROOT_PARENT, engine_page_keys
from kvfabric.protocol.messages import MAX_KEYS, Matched
from kvfabric.types import BlockKey, GrantState, MissReason
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.integrations.sglang_pool import Runs, copy_in, copy_out
from kvfabric_engine.node_link import LinkCalls, NodeLink
from kvfabric_engine.options import Deadlines

STAGING_BYTES = 16 << 20
_NO_PARENT = "no_parent"

Page = Sequence[Runs]
"""Of each KV group the runs of its part, in host memory that stays ours while a call lasts."""


@dataclass(frozen=True, slots=True)
class _Request:
    client: NodeClient
    name: str
    keys: list[BlockKey]


class PageStore:
    """`start` before use, `close` at the end; then nothing may be under way."""

    def __init__(
        self,
        socket_path: str,
        hello: EngineHello,
        *,
        engine: str,
        boundary: Boundary,
        deadlines: Deadlines,
    ) -> None:
        """`engine` names the maker of the hashes: equal hashes of two makers are two keys."""
        layout = hello.layout
        self._engine = engine
        self._shard = hello.shard
        self._part_bytes = [part.num_bytes for part in layout.parts if part.shard == hello.shard]
        self._deadlines = deadlines
        self._link = NodeLink(
            socket_path,
            hello,
            boundary=boundary,
            calls=LinkCalls(connected=self._connected, gone=lambda: None, tick=self._release),
        )
        self._numbers = itertools.count()
        self._staging: dict[int, list[memoryview]] = {}  # by group; the load under way has them
        self._loading = threading.Lock()
        self._lock = threading.Lock()  # guards what follows
        self._to_release: list[str] = []

    def __repr__(self) -> str:
        return f"<PageStore {self._link!r}, shard {self._shard}, parts of {self._part_bytes} B>"

    def start(self) -> None:
        """Begin to connect, and keep at it. Returns at once."""
        self._link.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the node; False if it is not there after `timeout_s`."""
        return self._link.wait_up(timeout_s)

    def close(self) -> None:
        """Say goodbye. Idempotent."""
        self._link.close()

    def exists(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages of `hashes` could be loaded now. A hint: nothing is kept for the caller.

        In as many requests as leases take: what one may hold at once is bounded (design 7).
        """
        found = 0
        while found < len(hashes):
            with self._request(hashes[found : found + MAX_KEYS]) as request:
                matched = self._match(request)
            found += matched.num_blocks
            if not _goes_on(matched, request):
                break
        return found

    def load(self, hashes: Sequence[bytes], pages: Sequence[Page]) -> int:
        """How many leading pages are in `pages`, verified and confirmed. Pages after them hold anything."""
        deadline = time.monotonic() + self._deadlines.load_s
        done = 0
        with self._loading:
            while done < len(hashes):
                with self._request(hashes[done : done + MAX_KEYS]) as request:
                    matched = self._match(request)
                    usable = self._load_matched(request, pages[done:], matched, deadline)
                done += usable
                if usable < matched.num_blocks or not _goes_on(matched, request):
                    break
            return done

    def _load_matched(
        self, request: _Request, pages: Sequence[Page], matched: Matched, deadline: float
    ) -> int:
        usable = matched.num_blocks
        for group in range(len(self._part_bytes)):
            parts = [page[group] for page in pages[:usable]]
            usable = self._load_group(request, group, parts, deadline)
        return usable

    def save(self, before: bytes, hashes: Sequence[bytes], pages: Sequence[Page]) -> None:
        """Store consecutive pages of a chain; `before`: hash of the page before them, or empty.

        Pages whose page before is not in the fabric (any more) begin a chain there: the engine itself may
        still hold what comes before. Raises NoSpace for what the node refuses; pages before that are stored.
        """
        with self._request([before, *hashes] if before else hashes) as request:
            keys = request.keys[1:] if before else request.keys
            parent = request.keys[0] if before else ROOT_PARENT
            step = max(1, request.client.window.num_bytes // 2 // max(self._part_bytes))
            for start in range(0, len(keys), step):
                chunk = slice(start, start + step)
                for group in range(len(self._part_bytes)):
                    parts = [page[group] for page in pages[chunk]]
                    self._save_group(request, parent, keys[chunk], group, parts)
                parent = keys[chunk][-1]

    # --- requests ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _request(self, hashes: Sequence[bytes]) -> Iterator[_Request]:
        with self._link.use() as client:
            name = f"pages-{next(self._numbers)}"
            try:
                opened = client.open_handle(name, "", deadline_s=self._deadlines.control_s)
                yield _Request(
                    client, name, engine_page_keys(self._engine, hashes, opened.namespace_key)
                )
            finally:
                with self._lock:
                    self._to_release.append(name)
            # At once: the next request needs what this one leased. After a failure the link's thread does it.
            self._release(client)

    def _connected(self, client: NodeClient) -> None:
        """A new connection: the node knows no request of the old one."""
        with self._lock:
            self._to_release.clear()

    def _release(self, client: NodeClient) -> None:
        with self._lock:
            names, self._to_release = self._to_release, []
        if not names:
            return
        try:
            client.release(names, deadline_s=self._deadlines.control_s)
        except BaseException:
            with self._lock:  # releasing twice is harmless
                self._to_release = names + self._to_release
            raise

    def _match(self, request: _Request) -> Matched:
        deadline_s = self._deadlines.control_s
        return request.client.match(request.name, request.keys, deadline_s=deadline_s)

    # --- load ----------------------------------------------------------------------------------------

    def _load_group(
        self, request: _Request, group: int, parts: Sequence[Runs], deadline: float
    ) -> int:
        """How many leading parts of this group are where they belong."""
        is_direct = all(len(runs) == 1 for runs in parts)
        step = len(parts) if is_direct else len(self._staging_of(group))
        done = 0
        while done < len(parts):
            chunk = parts[done : done + step]
            keys = request.keys[done : done + len(chunk)]
            buffers = [runs[0] for runs in chunk] if is_direct else self._staging_of(group)
            good = self._fetch(request, group, keys, buffers, deadline)
            if not is_direct:
                for buffer, runs in zip(buffers, chunk[:good], strict=False):
                    copy_in(buffer, runs)
            done += good
            if good < len(chunk):
                break
        return done

    def _staging_of(self, group: int) -> list[memoryview]:
        if group not in self._staging:
            size = self._part_bytes[group]
            whole = memoryview(bytearray(max(1, STAGING_BYTES // size) * size))
            self._staging[group] = [whole[at : at + size] for at in range(0, len(whole), size)]
        return self._staging[group]

    def _fetch(
        self,
        request: _Request,
        group: int,
        keys: Sequence[BlockKey],
        buffers: Sequence[memoryview],
        deadline: float,
    ) -> int:
        """Arena -> `buffers`; how many leading parts are verified, and were ours to read throughout."""
        client, shard = request.client, self._shard
        located = client.load(
            request.name, keys, group=group, shard=shard, deadline_s=_left(deadline)
        )
        good = client.read(located, buffers) if located.num_blocks else 0
        if good == 0:
            return 0
        confirmed = client.confirm(
            request.name,
            keys[:good],
            located,
            group=group,
            shard=shard,
            deadline_s=_left(deadline),
        )
        return min(good, confirmed.num_blocks)

    # --- save ----------------------------------------------------------------------------------------

    def _save_group(
        self,
        request: _Request,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        group: int,
        parts: Sequence[Runs],
    ) -> None:
        client, deadline_s = request.client, self._deadlines.save_s
        reserved = client.reserve(
            request.name, parent, keys, group=group, shard=self._shard, deadline_s=deadline_s
        )
        if reserved.reason == _NO_PARENT and parent != ROOT_PARENT:
            return self._save_group(request, ROOT_PARENT, keys, group, parts)
        states = [GrantState(state) for state in reserved.states]
        granted = [i for i, state in enumerate(states) if state is GrantState.GRANTED]
        if granted:
            sources = [parts[i] for i in granted]
            self._commit(client, reserved.reservation, granted, sources, self._part_bytes[group])
        if GrantState.REFUSED in states:
            raise NoSpace(f"the node stores no more of these pages ({reserved.reason})")
        return None

    def _commit(
        self,
        client: NodeClient,
        reservation: int,
        granted: Sequence[int],
        sources: Sequence[Runs],
        size: int,
    ) -> None:
        """Pool -> window -> node; on failure the reservation is given up."""
        try:
            start = _allocate(client.window, len(granted) * size)
            try:
                offsets = [start + i * size for i in range(len(granted))]
                for runs, offset in zip(sources, offsets, strict=True):
                    copy_out(runs, client.window.view(offset, size))
                committed = client.commit(
                    reservation, granted, offsets, deadline_s=self._deadlines.save_s
                )
            finally:
                client.window.free(start)
        except BaseException:
            with contextlib.suppress(KVFabricError):
                client.abort(reservation, deadline_s=self._deadlines.control_s)
            raise
        if not all(committed.states):
            raise NoSpace(f"the node kept only some of these pages ({committed.reason})")


def _goes_on(matched: Matched, request: _Request) -> bool:
    """Whether another request may find more: this one found all it could name, or may lease at once."""
    is_cut = matched.num_blocks > 0 and matched.reason == MissReason.LEASE_BUDGET
    return is_cut or matched.num_blocks == len(request.keys)


def _allocate(window: Window, num_bytes: int) -> int:
    start = window.allocate(num_bytes)
    if start is None:
        raise NoSpace(f"no {num_bytes} B in {window!r}")
    return start


def _left(deadline: float) -> float:
    """Seconds until `deadline` (monotonic), never quite zero: the call itself decides that it is late."""
    return max(0.001, deadline - time.monotonic())
