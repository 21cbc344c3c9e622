"""SGLang's interface as its wheel has it, against ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from kvfabric_engine.integrations import sglang_identity
from kvfabric_engine.integrations.sglang import KVFabricStorage
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from sglang.srt.mem_cache.utils import get_hash_str, get_storage_hash_str

from kvfabric.errors import ConfigError

METHODS = [
    "register_mem_pool_host",
    "register_mem_host_pool_v2",
    "batch_exists",
    "batch_get_v1",
    "batch_set_v1",
    "get",
    "batch_get",
    "set",
    "batch_set",
    "exists",
    "clear",
]


def shape(method: Callable[..., Any]) -> list[tuple[str, object, object]]:
    """Name, kind and default of each parameter."""
    parameters = inspect.signature(method).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


def missing(storage: type) -> list[str]:
    """Of SGLang's methods those that `storage` does not have, or has with other parameters."""
    return [
        name
        for name in METHODS
        if name not in vars(storage)
        or shape(getattr(storage, name)) != shape(getattr(HiCacheStorage, name))
    ]


def test_signatures_are_those_of_the_base_class() -> None:
    """Every method that SGLang calls takes what SGLang's own class takes, and none is left abstract."""
    assert missing(KVFabricStorage) == []
    assert not KVFabricStorage.__abstractmethods__
    own = {name for name, value in vars(HiCacheStorage).items() if callable(value)}
    assert own - {*METHODS, *UNUSED} == set(), "the interface has grown"


UNUSED = {
    "on_host_pools_registered",  # the base class's: nothing is left to do
    "batch_exists_v2",  # hybrid models, which are refused
    "batch_get_v2",
    "batch_set_v2",
    "get_stats",
}


def test_another_signature_is_noticed() -> None:
    class Other(KVFabricStorage):
        def batch_get_v1(self, keys: list[str], host_indices: Any) -> list[bool]:  # type: ignore[override]
            return []

    assert missing(Other) != []


def test_page_hashes_are_chained_and_salted() -> None:
    """The wheel's own hash function passes the check that keys depend on."""
    sglang_identity.check_page_hashes()


def test_hashes_of_tokens_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What older releases gave to storages: a chain without salt. And hashes that are cut short."""

    def unsalted(key: Any, prior: str | None = None, page_size: int | None = None) -> Any:
        return get_hash_str(key, prior, page_size=page_size)

    def short(key: Any, prior: str | None = None, page_size: int | None = None) -> Any:
        return [value[:32] for value in get_storage_hash_str(key, prior, page_size=page_size)]

    for bad in (unsalted, short):
        monkeypatch.setattr(sglang_identity, "get_storage_hash_str", bad)
        with pytest.raises(ConfigError, match="nothing is cached"):
            sglang_identity.check_page_hashes()
