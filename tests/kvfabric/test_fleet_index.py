from __future__ import annotations

import random

import numpy as np
import pytest

from kvfabric.errors import RemoteProtocolError
from kvfabric.events.index import FleetIndex, Holder, NodeFeed
from kvfabric.events.table import KeyTable
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.types import BlockKey, TierName

TAG, OTHER_TAG = b"\x01tenant1", b"\x02tenant2"
BOOT, NEXT_BOOT = b"b" * 16, b"c" * 16
HOST = Holder("n1", TierName.HOST)


def keys_of(seed: int, count: int) -> list[BlockKey]:
    rng = random.Random(seed)
    return [BlockKey(rng.randbytes(32)) for _ in range(count)]


def packed(keys: list[BlockKey]) -> bytes:
    return b"".join(key[:8] for key in keys)


def run(kind: pb.EventKind, holder: Holder, keys: list[BlockKey], tag: bytes = TAG) -> pb.Run:
    tier = {TierName.HBM: pb.HBM, TierName.HOST: pb.HOST}[holder.tier]
    return pb.Run(kind=kind, tier=tier, namespace_tag=tag, keys=packed(keys), engine=holder.engine)


def batch(sequence: int, *runs: pb.Run, boot: bytes = BOOT, **more: object) -> pb.EventBatch:
    return pb.EventBatch(boot_id=boot, sequence=sequence, runs=runs, **more)  # type: ignore[arg-type]


def test_match_answers_block_by_block_when_a_holder_has_gaps() -> None:
    index, keys = FleetIndex(), keys_of(1, 8)
    index.apply("n1", batch(1, run(pb.STORED, HOST, keys)))
    index.apply("n1", batch(2, run(pb.REMOVED, HOST, [keys[0], keys[5]])))
    found = index.match(TAG, keys)
    assert list(found) == [HOST]
    assert found[HOST].tolist() == [False, True, True, True, True, False, True, True]


def test_the_same_key_of_another_namespace_is_another_block() -> None:
    index, keys = FleetIndex(), keys_of(2, 4)
    index.apply("n1", batch(1, run(pb.STORED, HOST, keys)))
    assert index.match(OTHER_TAG, keys) == {}
    assert index.match(TAG, []) == {}


def test_a_full_index_leaves_out_what_is_new_and_counts_it() -> None:
    """Bounded, and right in what it holds: other holders of known blocks and removals still count."""
    index, keys = FleetIndex(max_blocks=100), keys_of(9, 120)
    other = Holder("n2", TierName.HOST)
    index.apply("n1", batch(1, run(pb.STORED, HOST, keys[:80])))
    index.apply("n2", batch(1, run(pb.STORED, other, keys)))
    statistics = index.statistics()
    assert (statistics.num_blocks, statistics.num_left_out) == (100, 20)
    found = index.match(TAG, keys)
    assert found[HOST].tolist() == [True] * 80 + [False] * 40
    assert found[other][:80].all()
    assert int(found[other].sum()) == 100
    index.apply("n1", batch(2, run(pb.REMOVED, HOST, keys[:80])))
    index.apply("n2", batch(2, run(pb.REMOVED, other, keys[:80])))
    index.apply("n1", batch(3, run(pb.STORED, HOST, keys[80:])))
    assert index.match(TAG, keys)[HOST][80:].all()
    assert index.statistics().num_left_out == 20
    # The bound taken out: the same news takes as much room as it wants.
    free = FleetIndex()
    free.apply("n2", batch(1, run(pb.STORED, other, keys)))
    assert free.statistics().num_blocks == 120


def test_an_index_takes_less_than_64_bytes_a_block_at_any_size() -> None:
    index, rng = FleetIndex(capacity=1 << 10), np.random.default_rng(3)
    for _ in range(60):
        more = pb.Run(kind=pb.STORED, tier=pb.HOST, namespace_tag=TAG, keys=rng.bytes(8 * 2_000))
        index.apply("n1", pb.EventBatch(runs=[more]))
        statistics = index.statistics()
        assert statistics.num_bytes <= 64 * max(statistics.num_blocks, 1_000)


def test_cleared_and_gone_end_what_a_holder_holds() -> None:
    index, keys = FleetIndex(), keys_of(3, 4)
    hbm = Holder("n1", TierName.HBM, b"e" * 16)
    index.apply("n1", batch(1, run(pb.STORED, HOST, keys), run(pb.STORED, hbm, keys[:2])))
    assert set(index.match(TAG, keys)) == {HOST, hbm}
    gone = pb.Engine(session=hbm.engine, gone=True)
    index.apply("n1", batch(2, engines=[gone]))
    assert set(index.match(TAG, keys)) == {HOST}
    index.apply("n1", batch(3, pb.Run(kind=pb.CLEARED, tier=pb.HOST)))
    assert index.match(TAG, keys) == {}
    assert index.statistics().num_blocks == 0


def test_runs_of_one_batch_count_in_their_order() -> None:
    index, keys = FleetIndex(), keys_of(4, 2)
    stored, removed = run(pb.STORED, HOST, keys), run(pb.REMOVED, HOST, keys)
    index.apply("n1", batch(1, stored, removed))
    assert index.match(TAG, keys) == {}
    index.apply("n1", batch(2, removed, stored, stored))
    assert index.match(TAG, keys)[HOST].all()


@pytest.mark.parametrize(
    "bad",
    [
        pb.Run(kind=pb.STORED, tier=pb.HOST, namespace_tag=TAG, keys=b"seven.."),
        pb.Run(kind=pb.STORED, tier=pb.HOST, namespace_tag=b"short", keys=b"12345678"),
        pb.Run(kind=pb.STORED, namespace_tag=TAG, keys=b"12345678"),
        pb.Run(tier=pb.HOST, namespace_tag=TAG, keys=b"12345678"),
    ],
)
def test_a_malformed_run_is_the_peers_fault(bad: pb.Run) -> None:
    with pytest.raises(RemoteProtocolError):
        FleetIndex().apply("n1", batch(1, bad))


def test_index_equals_a_dict_of_sets_after_any_history() -> None:
    """Random stores, removals and drops by 12 holders, so that blocks get wide and narrow again."""
    rng = random.Random(7)
    index, keys = FleetIndex(capacity=8), keys_of(5, 60)
    holders = [HOST, *(Holder(f"n{i % 3}", TierName.HBM, bytes([i]) * 16) for i in range(11))]
    model: dict[Holder, set[BlockKey]] = {holder: set() for holder in holders}
    for sequence in range(500):
        holder = rng.choice(holders)
        action = rng.choices(["tell", "drop", "node"], [10, 1, 0.3])[0]
        if action == "tell":
            mine = [one for one in holders if one.node_id == holder.node_id]
            runs = []
            for _ in range(rng.choice([1, 1, 6])):
                one, some = rng.choice(mine), rng.sample(keys, rng.randint(1, 30))
                kind = rng.choices([pb.STORED, pb.REMOVED, pb.CLEARED], [6, 4, 0.5])[0]
                runs.append(run(kind, one, some))
                if kind == pb.CLEARED:
                    model[one] = set()
                else:
                    model[one] = (
                        model[one] | set(some) if kind == pb.STORED else model[one] - set(some)
                    )
            index.apply(holder.node_id, batch(sequence, *runs))
        elif action == "drop":
            index.drop_engine(holder.node_id, holder.engine)
            if holder.tier is TierName.HBM:
                model[holder] = set()
        else:
            index.drop_node(holder.node_id)
            model |= {h: set() for h in holders if h.node_id == holder.node_id}
        found = {h: set(np.array(keys)[mask]) for h, mask in index.match(TAG, keys).items()}
        assert found == {h: {bytes(k) for k in held} for h, held in model.items() if held}
        assert index.statistics().num_blocks == len(set().union(*model.values()))


def test_a_thousand_holders_of_a_shared_prefix_are_told_apart() -> None:
    index, keys = FleetIndex(capacity=64), keys_of(6, 3)
    for number in range(1000):
        holder = Holder(f"n{number}", TierName.HOST)
        index.apply(holder.node_id, batch(1, run(pb.STORED, holder, keys[: 1 + number % 3])))
    found = index.match(TAG, keys)
    assert len(found) == 1000
    assert found[Holder("n998", TierName.HOST)].tolist() == [True, True, True]
    assert found[Holder("n999", TierName.HOST)].tolist() == [True, False, False]


def test_a_block_costs_at_most_64_bytes() -> None:
    index = FleetIndex(capacity=1000)
    rng = np.random.default_rng(1)
    for sequence in range(40):
        keys = rng.integers(1, 1 << 63, 1000, dtype=np.uint64).tobytes()
        stored = pb.Run(kind=pb.STORED, tier=pb.HOST, namespace_tag=TAG, keys=keys)
        index.apply("n1", batch(sequence, stored))
    statistics = index.statistics()
    assert statistics.num_blocks == 40_000
    assert statistics.num_bytes <= 64 * statistics.num_blocks


def test_table_forgets_its_detours() -> None:
    """After everything is deleted no bucket sends a lookup further: deletions leave no trace."""
    table, rng = KeyTable(16), np.random.default_rng(2)
    keys = np.unique(rng.integers(1, 1 << 63, 5000, dtype=np.uint64))
    table.insert(keys)
    assert table._passed.any()
    assert set(table.keys().tolist()) == set(keys.tolist())
    table.delete(table.find(keys[::2]))
    assert (table.find(keys[1::2]) >= 0).all()
    assert (table.find(keys[::2]) < 0).all()
    table.delete(table.find(keys[1::2]))
    assert table.num_keys == 0
    assert not table._passed.any()


# ---------------------------------------------------------------------- one node's feed


def gap(sequence: int, boot: bytes = BOOT) -> pb.EventBatch:
    return batch(sequence, boot=boot, gap=True)


def snapshot_of(sequence: int, keys: list[BlockKey], boot: bytes = BOOT) -> list[pb.EventBatch]:
    first = batch(sequence, run(pb.STORED, HOST, keys), boot=boot)
    return [first, pb.EventBatch(boot_id=boot, snapshot_end=True)]


def test_feed_is_exact_after_snapshot_and_what_was_kept_meanwhile() -> None:
    index, keys = FleetIndex(), keys_of(8, 4)
    feed = NodeFeed(index, "n1")
    assert not feed.watch(gap(5))
    assert not feed.watch(batch(6, run(pb.REMOVED, HOST, keys[:1])))
    feed.snapshot(snapshot_of(5, keys))
    assert index.match(TAG, keys)[HOST].tolist() == [False, True, True, True]
    assert feed.watch(batch(7, run(pb.STORED, HOST, keys[:1])))
    assert index.match(TAG, keys)[HOST].all()
    assert feed.position == (BOOT, 8)


def test_a_snapshot_that_broke_off_is_never_taken_for_an_empty_node() -> None:
    index, keys = FleetIndex(), keys_of(9, 4)
    feed = NodeFeed(index, "n1")
    feed.watch(gap(0))
    feed.snapshot(snapshot_of(0, keys))
    feed.watch(gap(9))
    for broken in ([], snapshot_of(9, [])[:-1]):
        with pytest.raises(RemoteProtocolError, match="broke off"):
            feed.snapshot(broken)
    assert index.match(TAG, keys)[HOST].all()
    assert feed.needs_snapshot


def test_a_snapshot_older_than_the_first_kept_batch_is_refused() -> None:
    feed = NodeFeed(FleetIndex(), "n1", max_kept=2)
    feed.watch(gap(5))
    for sequence in (6, 7, 8):
        feed.watch(batch(sequence))
    with pytest.raises(RemoteProtocolError, match="too old"):
        feed.snapshot(snapshot_of(5, []))
    feed.snapshot(snapshot_of(7, []))
    assert not feed.needs_snapshot


def test_a_lost_batch_and_a_new_life_of_the_node_need_a_snapshot() -> None:
    index, keys = FleetIndex(), keys_of(10, 2)
    feed = NodeFeed(index, "n1")
    feed.watch(gap(0))
    feed.snapshot(snapshot_of(0, keys))
    assert feed.watch(batch(1))
    assert not feed.watch(batch(3)), "2 is missing"
    feed.snapshot(snapshot_of(3, keys))
    assert not feed.watch(gap(0, NEXT_BOOT))
    with pytest.raises(RemoteProtocolError):
        feed.snapshot(snapshot_of(3, keys))
    feed.snapshot(snapshot_of(0, [], NEXT_BOOT))
    assert index.match(TAG, keys) == {}


def test_a_snapshot_newer_than_the_watch_converges() -> None:
    """The watch delivers what the snapshot already showed: the last word on each block is the same."""
    index, keys = FleetIndex(), keys_of(11, 2)
    feed = NodeFeed(index, "n1")
    feed.watch(gap(0))
    feed.snapshot(snapshot_of(2, keys[:1]))
    feed.watch(batch(1, run(pb.STORED, HOST, keys)))
    feed.watch(batch(2, run(pb.REMOVED, HOST, keys[1:])))
    assert index.match(TAG, keys)[HOST].tolist() == [True, False]


def test_lost_node_holds_nothing() -> None:
    index, keys = FleetIndex(), keys_of(12, 2)
    feed = NodeFeed(index, "n1")
    feed.watch(gap(0))
    feed.snapshot([*snapshot_of(0, keys)])
    feed.lost()
    assert index.match(TAG, keys) == {}
    assert feed.position == (b"", 0)
