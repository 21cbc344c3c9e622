"""Which LoRA weights a request of vLLM runs with: digests of what the workers have loaded.

vLLM reads an adapter's files when it likes: at `add_lora` (the dynamic LoRA endpoint calls it), at its first
request, again after its LRU cache dropped it; `load_inplace` puts other weights under an id. It says nothing
of it to connectors. So the files count for nothing here: each worker looks, before and after every step, what
vLLM holds under each id, and digests that.

    worker      look()              a serial number for each set of weights; digests in the background
    worker      report() -> learn() scheduler: with the output of a step
    scheduler   find() -> Adapter   what a request opened from now on has in its keys
    worker      has(adapter)        before its blocks are loaded, and after those to be stored were computed

So an adapter's first request is computed, as is the first one after vLLM dropped it. Weights that were
exchanged have another serial number, and what was opened with the old one is neither loaded nor stored. Not
seen: that vLLM drops an adapter between a request's load and its first step, and then reads other files.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

from kvfabric.hashing import tlv
from kvfabric_engine.integrations.vllm_digest import Unknown, canonical_object, digest

_log = logging.getLogger("vllm.kvfabric")


class Weights(NamedTuple):
    """Of one adapter as one worker has loaded it: no other loading there has this `serial`."""

    serial: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """`number`: vLLM's id of it; `digest`: 32 bytes of its content; `serials`: by rank."""

    number: int
    digest: bytes
    serials: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    weights: object
    serial: int
    digest: Future[bytes]


class LoadedAdapters:
    """A worker's half, on its main thread. `held`: vLLM's weights by id, another object for each loading."""

    def __init__(self, held: Callable[[], Mapping[int, object]], *, rank: int) -> None:
        self._now = held
        self._rank = rank
        self._held: dict[int, _Held] = {}
        self._serials = itertools.count(1)
        self._reported: dict[int, Weights] = {}
        self._reader = ThreadPoolExecutor(1, "kvf-adapters")

    def __repr__(self) -> str:
        return f"<LoadedAdapters {len(self._held)} held, {len(self._reported)} reported>"

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def look(self) -> None:
        """Notice what vLLM loaded, exchanged or dropped. Returns at once."""
        now = self._now()
        for number in self._held.keys() - now.keys():
            del self._held[number]
        for number, weights in now.items():
            known = self._held.get(number)
            if known is None or known.weights is not weights:
                found = self._reader.submit(weights_digest, weights)
                self._held[number] = _Held(weights, next(self._serials), found)

    def has(self, adapter: Adapter) -> bool:
        """Whether vLLM holds these very weights under this id, as of the last `look`."""
        known = self._held.get(adapter.number)
        return known is not None and known.serial == adapter.serials[self._rank]

    def report(self) -> dict[int, Weights] | None:
        """All that is held and digested, by id; None if that is what was reported last."""
        done = {number: held for number, held in self._held.items() if held.digest.done()}
        found = {
            number: Weights(held.serial, content)
            for number, held in done.items()
            if (content := held.digest.result())
        }
        if found == self._reported:
            return None
        self._reported = found
        return found


def weights_digest(weights: object) -> bytes:
    """32 bytes of a LoRAModel, whatever its id; none, with a line, if it has something unknown in it."""
    fields = {name: value for name, value in vars(weights).items() if name != "id"}
    try:
        return digest(b"kvf-lora-1", canonical_object(fields))
    except Unknown as exc:
        _log.warning("fabric: an adapter is computed without the fabric: %s", exc)
        return b""


def held_by_vllm(lora_config: object) -> Callable[[], Mapping[int, object]] | None:
    """What this worker process holds by id; None if it is not found.

    vLLM gives connectors no way to its LoRA manager, so it is searched for once among all objects.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    for candidate in gc.get_objects():
        if issubclass(type(candidate), WorkerLoRAManager) and candidate.lora_config is lora_config:
            manager: Any = candidate
            return lambda: dict(manager._adapter_manager.list_adapters())
    return None


class Adapters:
    """The scheduler's half. Thread-safe. `settings`: what else of the engine decides how adapters are
    computed. `tell` gets lines for the log."""

    def __init__(self, *, num_ranks: int, settings: str, tell: Callable[[str], None]) -> None:
        self._num_ranks = num_ranks
        self._settings = settings
        self._tell = tell
        self._lock = Lock()  # guards all below
        self._loaded: dict[int, Mapping[int, Weights]] = {}  # by rank

    def __repr__(self) -> str:
        return f"<Adapters {self._loaded!r}>"

    def learn(self, reports: Mapping[int, Mapping[int, Weights]]) -> None:
        """Workers reported, by rank."""
        with self._lock:
            self._loaded |= reports

    def is_trusted(self, adapter: Adapter | None) -> bool:
        """Whether the adapter's id still means what it did when it was found, as far as workers told."""
        if adapter is None:
            return True
        held = self._held(adapter.number)
        return tuple(weights.serial for weights in held) == adapter.serials

    def find(self, lora: Any) -> Adapter:
        """The adapter of a LoRARequest. Raises Unknown while its weights are not known for certain."""
        if lora.load_inplace:
            raise Unknown("is loaded anew by each of its requests (load_inplace)")
        held = self._held(lora.lora_int_id)
        if len(held) < self._num_ranks:
            self._tell(
                f'adapter "{lora.lora_name}" is not loaded yet or still being read: until it is, it is '
                "computed without the fabric"
            )
            raise Unknown("")
        if len({weights.digest for weights in held}) != 1:
            raise Unknown("has other weights on other ranks")
        fields = [(1, held[0].digest), (2, self._settings.encode())]
        content = hashlib.blake2b(
            tlv("kvfabric/vllm-adapter", fields), digest_size=32, person=b"kvf-adapter-1"
        ).digest()
        return Adapter(lora.lora_int_id, content, tuple(weights.serial for weights in held))

    def _held(self, number: int) -> list[Weights]:
        """By rank, as far as ranks hold it."""
        with self._lock:
            found = [self._loaded.get(rank, {}).get(number) for rank in range(self._num_ranks)]
        return [weights for weights in found if weights is not None]
