"""What taking a template version out of reach costs, when it is seen everywhere, and what isolation costs.

bump        a real registry (LMDB), store and withdrawals in one process, with 1e3 and 1e6 blocks under the
            version: from the durable change to the moment when a match is refused and the bytes are known,
            and the same from the call on. Beside it the raw limit (a durable LMDB commit, which is most of
            the latter) and the other design: dropping every block.
visible     4 nodes, 2 routers and Redis, each a process: from the command to the last refusal. Nodes are
            asked by an engine of each, all the time; a router's moment is its acknowledgement, which it gives
            when nothing made under the old state is unsent any more.
isolation   one request opened by a handle that the router's code mints, against one without a handle.
public      64 tenants with one public prompt on a reference engine, and on vLLM where there is `.venv-vllm`,
            against one namespace each (`public_prefix.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import harness
import lmdb
import numpy as np
import public_prefix
from kvfabric_router.identity import Addressee, ModelIdentity, RequestIdentity
from kvfabric_router.prompt import Recognised

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.daemon.withdrawals import NodeParts, Withdrawals
from kvfabric.hashing import layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import HandleOpened
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.state import Tenant, scopes_of
from kvfabric.store.index import RESERVED, Lineage
from kvfabric.store.lease import RequestGrant
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.engine import TinyEngine
from kvfabric.testing.minting import Minter, keys_of, segment_of
from kvfabric.testing.processes import NodeProcess, RouterProcess, start_all, until
from kvfabric.testing.redis import RedisServer
from kvfabric.testing.store import PART_BYTES, SESSION, RecordedEvents, make_layout
from kvfabric.tiers.arena import Arena
from kvfabric.types import DEFAULT_TENANT

TAG = b"tenant-1"
CHUNK = 1 << 16
TENANTS = 64
POLL_S = 0.001


class _Nobody:
    """Who wants to know of sessions: none is opened here."""

    def session_opened(self, session: Session) -> None: ...
    def session_ended(self, session: Session) -> None: ...
    def processes_changed(self) -> None: ...


# ---------------------------------------------------------------------- the bump


class Bump:
    """`num_blocks` under version 1 of template t, in a store without their bytes: those play no part."""

    def __init__(self, home: Path, num_blocks: int) -> None:
        home.mkdir()
        self.num_blocks = num_blocks
        self.registry = EmbeddedRegistry(home / "registry")
        limits = StoreLimits(
            host_bytes=num_blocks * PART_BYTES, max_blocks=num_blocks + 64, scrub_bytes_per_s=0
        )
        events = RecordedEvents()
        self.store = BlockStore(
            limits=limits,
            registry=lambda: self.registry.state,
            clock=time.monotonic,
            events=events,
            ssd=None,
        )
        self.withdrawals = Withdrawals(
            NodeParts(
                registry=self.registry,
                store=self.store,
                sessions=Sessions(self.store, _Nobody()),
                keyring=Keyring.create_or_open(home),
                node_id="n1",
                changing=asyncio.Lock(),
                file=home / "withdrawals",
                models_file=home / "models",
                awaits_ssd=lambda: False,
                wall_clock=time.time,
            )
        )
        self.keys = b""

    def fill(self, source: random.Random) -> None:
        """Through the store's own transitions, `CHUNK` blocks at a time, one chain for each."""
        store, layout = self.store, make_layout()
        residency, index = store._residency, store._index
        residency.arena = Arena.create(self.num_blocks * PART_BYTES)
        store._host.resize(residency.arena.size_bytes)
        incarnation = self.registry.state.templates["t", "1"].incarnation
        lineage = Lineage(DEFAULT_TENANT, TAG, layout_fingerprint(layout), (incarnation,))
        for start in range(0, self.num_blocks, CHUNK):
            count = min(CHUNK, self.num_blocks - start)
            keys = source.randbytes(32 * count)
            rows = index.insert(np.frombuffer(keys, dtype=np.uint64).reshape(-1, 4))
            number = index.intern_lineage(lineage, residency.tenant_slot(DEFAULT_TENANT))
            parents = np.concatenate([np.zeros(1, dtype=np.uint32), rows[:-1]])
            places = np.arange(count, dtype=np.uint32)
            index.adopt(rows, parents, np.full(count, number, dtype=np.uint32), places)
            index.ensure_parts(rows, 1)
            parts = index.parts(rows, 0)
            residency.begin(rows, parts, PART_BYTES, RESERVED)
            slots = residency.arena.allocate(count, PART_BYTES)
            assert slots is not None
            residency.publish(rows, parts, PART_BYTES, slots, bytes(16 * count))
            self.keys = self.keys or keys[: 32 * 64]

    def matches(self) -> int:
        """How many of 64 blocks a request under the newest epochs gets."""
        state = self.registry.state
        grant = RequestGrant(
            tenant=DEFAULT_TENANT,
            namespace_tag=TAG,
            public_tag=b"",
            public_blocks=0,
            cacheable_blocks=-1,
            block_tokens=64,
            segments=(segment_of(state, "t", "1"),),
            epochs=state.epochs_of(scopes_of(DEFAULT_TENANT, "rev", "", ["t"])),
            no_store=False,
            no_read=False,
        )
        self.store.open_request(SESSION, "r", grant)
        found = self.store.match(SESSION, "r", self.keys).num_blocks
        self.store.release(SESSION, ["r"])
        return found

    @contextlib.asynccontextmanager
    async def serving(self, source: random.Random) -> AsyncIterator[Self]:
        """Filled, and with the withdrawals watching."""
        async with self.registry, self.store, asyncio.TaskGroup() as group:
            await self.registry.register_template("t", "1", b"kind", is_public=False)
            self.store.open_session(SESSION, make_layout())
            self.fill(source)
            watch = group.create_task(self.withdrawals.run())
            await asyncio.sleep(0.1)
            yield self
            watch.cancel()
        assert self.store._residency.arena is not None
        self.store._residency.arena.close()

    @property
    def incarnation(self) -> bytes:
        return self.registry.state.templates["t", "1"].incarnation

    async def once(self) -> tuple[float, float]:
        """Microseconds of one bump: with its durable change, and after that alone. Then it is rolled back."""
        assert self.matches() == 64
        started = time.perf_counter()
        await self.registry.invalidate("template", "t", "1", purge=False)
        changed = time.perf_counter()
        num_bytes = self.store.bytes_of([self.incarnation])
        num_blocks = self.matches()
        done = time.perf_counter()
        assert num_blocks == 0
        assert num_bytes == self.num_blocks * PART_BYTES
        await self.registry.promote_template("t", "1")
        await asyncio.sleep(0.02)  # the rows of its receipts
        return (done - started) * 1e6, (done - changed) * 1e6

    async def sweep(self) -> float:
        """Microseconds of the other design: drop every block, one after the other."""
        started = time.perf_counter()
        assert await self.store.purge([self.incarnation]) == self.num_blocks
        return (time.perf_counter() - started) * 1e6


async def bump(home: Path, rounds: int, source: random.Random) -> dict[int, dict[str, float]]:
    """By number of blocks; the two sizes take turns."""
    sizes = (1_000, 1_000_000)
    async with contextlib.AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(Bump(home / str(size), size).serving(source))
            for size in sizes
        ]
        taken: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
        for _ in range(rounds):
            for one in found:
                taken[one.num_blocks].append(await one.once())
        rows = {
            size: {
                "bump_us": harness.median([apply for _, apply in values]),
                "with_commit_us": harness.median([whole for whole, _ in values]),
            }
            for size, values in taken.items()
        }
        rows[sizes[0]]["drop_every_block_us"] = await found[0].sweep()
    return rows


def commit_us(home: Path, rounds: int) -> float:
    """The raw limit: one durable LMDB transaction with a row of 200 bytes."""
    taken = []
    with lmdb.open(str(home), map_size=1 << 24) as env:
        for number in range(rounds):
            started = time.perf_counter()
            with env.begin(write=True) as txn:
                txn.put(number.to_bytes(8, "big"), bytes(200))
            taken.append((time.perf_counter() - started) * 1e6)
    return harness.median(taken)


# ---------------------------------------------------------------------- visible


class Asker(threading.Thread):
    """Asks one node for blocks under the version, all the time, and notes when it was refused first."""

    def __init__(self, node: NodeProcess, admin: AdminClient, minter: Minter) -> None:
        super().__init__(daemon=True)
        self.engine = TinyEngine.connect(node.socket)
        self._admin, self._minter = admin, minter
        self._number = 0
        self._lock = threading.Lock()
        self.reason = ""
        self.request = ""
        self.keys = keys_of(self._open(), "prompt", 4)
        assert self.engine.store(self.request, self.keys) == 4
        self.served_at = self.refused_at = 0.0
        self.ends = False

    def _open(self) -> HandleOpened:
        self._number += 1
        self.request = f"r{self._number}"
        state = self._admin.state()
        handle = self._minter.handle(
            self.engine, self.request, state, (segment_of(state, "t", "1"),), tenant=DEFAULT_TENANT
        )
        return self.engine.client.open_handle(self.request, handle, deadline_s=5)

    def renew(self) -> None:
        """Under the newest epochs: it is served again."""
        with self._lock:
            self.engine.release(self.request)
            self._open()
            self.refused_at = 0.0
            assert self._ask() == 4, self.reason

    def _ask(self) -> int:
        matched = self.engine.client.match(self.request, self.keys, deadline_s=5)
        self.reason = matched.reason
        return matched.num_blocks

    def run(self) -> None:
        while not self.ends:
            with self._lock:
                num_blocks = self._ask()
                now = time.monotonic()
                if num_blocks:
                    self.served_at = now
                elif not self.refused_at:
                    self.refused_at = now
            time.sleep(POLL_S)


@contextlib.contextmanager
def fleet(
    home: Path, num_nodes: int, num_routers: int
) -> Iterator[tuple[list[NodeProcess], list[RouterProcess]]]:
    with RedisServer(home / "redis") as redis:
        shared: dict[str, Any] = {
            "directory": redis.url,
            "keyring_dir": home / "keys",
            "host_bytes": 8 << 20,
        }
        nodes = [NodeProcess(home / f"n{n}", node_id=f"n{n}", **shared) for n in range(num_nodes)]
        routers = [
            RouterProcess(home / f"r{n}", directory=redis.url, keyring_dir=home / "keys")
            for n in range(num_routers)
        ]
        with start_all([*nodes, *routers]):
            for node in nodes:
                until(lambda node=node: _serves(node))  # type: ignore[misc]
            for router in routers:
                until(lambda router=router: _is_leased(router))  # type: ignore[misc]
            yield nodes, routers


def _serves(node: NodeProcess) -> bool:
    with AdminClient(node.state_dir / "admin.sock") as admin:
        status = admin.call(admin.admin.Status, pb.StatusRequest())
        return bool(status.registry.state == "serving")


def _is_leased(router: RouterProcess) -> bool:
    metrics = f"{router.log[-1].rsplit(' ', 1)[1].strip()}/metrics"
    with urllib.request.urlopen(metrics, timeout=5) as answer:
        return b"kvfabric_router_epoch_lease_valid 1.0" in answer.read()


def visible(home: Path, rounds: int, size: tuple[int, int]) -> list[dict[str, float]]:
    """One row for each change, in milliseconds from the command on."""
    rows = []
    with fleet(home, *size) as (nodes, routers), contextlib.ExitStack() as stack:
        admins = [stack.enter_context(AdminClient(node.state_dir / "admin.sock")) for node in nodes]
        admin = admins[0]
        text = pb.RegisterTemplateRequest(name="t", version="1", text=b"kind")
        admin.call(admin.registry.RegisterTemplate, text)
        minter = Minter(home / "keys")
        askers = [Asker(*each, minter) for each in zip(nodes, admins, strict=True)]
        for asker in askers:
            asker.start()
        retire = pb.InvalidateRequest(scope="template", name="t", version="1")
        promote = pb.PromoteTemplateRequest(name="t", version="1")
        for _ in range(rounds):
            time.sleep(random.uniform(0.05, 0.55))  # renewals are at another point each time
            started = time.monotonic()
            receipt = admin.call(admin.registry.Invalidate, retire)
            ended = time.monotonic()
            kinds = [ack.holder_kind for ack in receipt.acknowledgements]
            assert sorted(kinds) == ["node"] * len(nodes) + ["router"] * len(routers), receipt
            assert not any(ack.waited_out for ack in receipt.acknowledgements), receipt
            while not all(asker.refused_at for asker in askers):
                time.sleep(POLL_S)
            seen = max(asker.refused_at for asker in askers)
            acked = max(ack.after_s for ack in receipt.acknowledgements)
            assert all(asker.served_at < asker.refused_at for asker in askers), "served afterwards"
            rows.append(
                {
                    "last_node_refused_ms": (seen - started) * 1e3,
                    "last_acknowledged_ms": acked * 1e3,
                    "visible_ms": max(seen - started, acked) * 1e3,
                    "receipt_ms": (ended - started) * 1e3,
                }
            )
            admin.call(admin.registry.PromoteTemplate, promote)
            for asker in askers:
                asker.renew()
        for asker in askers:
            asker.ends = True
            asker.join()
            asker.engine.client.close()
    return rows


# ---------------------------------------------------------------------- what isolation costs and gives


def isolation(home: Path, rounds: int) -> dict[str, float]:
    """Microseconds of a request that the router minted a handle for, and of one without."""
    with (
        NodeProcess(home, epoch_lease_s=0.5) as node,
        AdminClient(node.state_dir / "admin.sock") as admin,
    ):
        text = pb.RegisterTemplateRequest(name="t", version="1", text=b"kind")
        admin.call(admin.registry.RegisterTemplate, text)
        state, keyring = admin.state(), Keyring.create_or_open(home)
        engine = TinyEngine.connect(node.socket)
        hello, client = engine.hello, engine.client
        model = ModelIdentity(
            hello.model_revision, layout_fingerprint(hello.layout), hello.layout.block_tokens
        )
        recognised = Recognised((segment_of(state, "t", "1"),))
        tenant = Tenant(DEFAULT_TENANT, "default")
        tokens = list(range(4096))
        bare = RequestIdentity(
            tenant=tenant,
            state=state,
            keyring=keyring,
            token_ids=tokens,
            recognised=Recognised(),
        )
        bare.keys(model)  # the keys of the prompt are needed in any case
        taken: dict[str, list[float]] = {"with a handle": [], "without": []}
        minted = []
        for number in range(rounds):
            name = f"r{number}"
            started = time.perf_counter()
            identity = RequestIdentity(
                tenant=tenant, state=state, keyring=keyring, token_ids=(), recognised=recognised
            )
            identity.keys(model)
            handle = identity.mint(
                model,
                to=Addressee(client.session),
                request_id=name,
                expires_at=int(time.time()) + 60,
            )
            minted.append((time.perf_counter() - started) * 1e6)
            client.open_handle(name, handle, deadline_s=5)
            taken["with a handle"].append((time.perf_counter() - started) * 1e6)
            started = time.perf_counter()
            client.open_handle(f"{name}-bare", "", deadline_s=5)
            taken["without"].append((time.perf_counter() - started) * 1e6)
            client.release([name, f"{name}-bare"], deadline_s=5)
        engine.client.close()
    rows = {name: harness.median(values) for name, values in taken.items()}
    return rows | {"of it at the router": harness.median(minted)}


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    source = random.Random(args.seed)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        (home / "limit").mkdir()
        raw = commit_us(home / "limit", 20 if args.quick else 200)
        bumps = asyncio.run(bump(home, 15 if args.quick else 101, source))
        for size, row in bumps.items():
            print(f"{size:9} blocks: {row}")
        print(f"one durable commit: {raw:.0f} us")
        changes = visible(home, *((5, (2, 1)) if args.quick else (120, (4, 2))))
        isolated = isolation(home / "isolation", 300 if args.quick else 5000)
        print(f"a request, us: {isolated}")
        tenants = 8 if args.quick else TENANTS
        shared = {"reference": public_prefix.on_reference(home / "public", tenants, 384)}
        if reason := public_prefix.why_no_vllm():
            print(f"public_prefix_saving_vllm is not measured: {reason}")
        else:
            (home / "vllm").mkdir()
            shared["vllm"] = public_prefix.on_vllm(home / "vllm", tenants, 384)
        print(f"prompt tokens computed: {shared}")
    seen = [row["visible_ms"] for row in changes]
    small, large = bumps.values()
    figures = {
        "bump_us_1e3": small["bump_us"],
        "bump_us_1e6": large["bump_us"],
        "bump_flatness": large["bump_us"] / small["bump_us"],
        "bump_with_commit_us_1e3": small["with_commit_us"],
        "bump_with_commit_us_1e6": large["with_commit_us"],
        "durable_commit_us": raw,
        "drop_every_block_us_1e3": small["drop_every_block_us"],
        "visible_ms_p50": harness.percentile(seen, 50),
        "visible_ms_p99": harness.percentile(seen, 99),
        "receipt_ms_p50": harness.percentile([row["receipt_ms"] for row in changes], 50),
        "isolation_cost_us_per_request": isolated["with a handle"] - isolated["without"],
        "public_prefix_saving": public_prefix.saving(shared["reference"]),
    }
    if "vllm" in shared:
        figures["public_prefix_saving_vllm"] = public_prefix.saving(shared["vllm"])
    rows = {
        "bump": {str(size): row for size, row in bumps.items()},
        "visible": changes,
        "isolation_us": isolated,
        "computed_prompt_tokens": shared,
    }
    harness.report("invalidate", args, figures, rows)


if __name__ == "__main__":
    main()
