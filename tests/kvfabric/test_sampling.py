"""What a sampler finds: whole chains, by lineage and tier, window by window."""

from __future__ import annotations

import pytest

from kvfabric.store import sampling
from kvfabric.store.index import packed_keys
from kvfabric.testing.store import StoreRig, grant_of, make_keys
from kvfabric.types import TierName


async def test_a_sample_is_a_whole_chain_of_the_lineage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WINDOW_ROWS", 8)
    async with StoreRig() as rig:
        assert await rig.put(make_keys(12)) == 12
        keys = make_keys(12, seed=1)
        assert await rig.put(keys, grant=grant_of("t-2")) == 12
        sampler = rig.store.sampler
        lineages = sampler.some(9)
        numbers = {number for number in lineages if lineages[number].tenant == "t-2"}
        assert (len(numbers), sampler.num_windows) == (1, 3)
        assert sampler.look(numbers, 0, 12) == []
        found = [chain for window in range(3) for chain in sampler.look(numbers, window, 12)]
        assert {chain.keys for chain in found} == {b"".join(keys[:end]) for end in range(1, 13)}
        assert all(chain.tier is TierName.HOST for chain in found)
        assert all(len(chain.lineages) == chain.num_blocks for chain in found)
        assert len(sampler.look(numbers, 5, 2)) == 2
        assert sampler.look(set(), 1, 12) == []
        # A block whose parent is gone could be promised to nobody.
        rig.store._drop(int(rig.store._index.lookup(packed_keys(keys[0]))[0]))
        assert not any(sampler.look(numbers, window, 12) for window in range(3))
