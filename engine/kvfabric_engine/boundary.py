"""The boundary between a cache and an inference: whatever goes wrong behind it becomes a miss.

The one place of the engine side where every exception is caught (design 2: never in the way). Each failure is
counted under a MissReason and logged once; what repeats, or only follows from a lost connection, is logged at
debug level, until `forgive`.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from kvfabric.errors import (
    AccessError,
    BlockError,
    CapacityError,
    ClosedError,
    CorruptBlock,
    DeadlineExceeded,
    Fenced,
    KVFabricError,
    PeerClosed,
    TransferError,
)
from kvfabric.types import MissReason

_log = logging.getLogger(__name__)
R = TypeVar("R")

_REASONS: tuple[tuple[type[BaseException], MissReason], ...] = (
    (DeadlineExceeded, MissReason.DEADLINE),
    (TransferError, MissReason.NODE_DOWN),
    (ClosedError, MissReason.NODE_DOWN),
    (Fenced, MissReason.FENCED),
    (CorruptBlock, MissReason.CORRUPT),
    (BlockError, MissReason.EXPIRED),
    (AccessError, MissReason.NO_HANDLE),
    (CapacityError, MissReason.LEASE_BUDGET),
)


class NotConnected(PeerClosed):
    """There is no connection now. Who tried to connect has said why."""


def reason_of(error: BaseException) -> MissReason:
    """What a failure counts as. What nobody foresaw counts as a tier out of service."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return MissReason.TIER_DOWN


class Boundary:
    """Runs what may fail. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._misses: Counter[MissReason] = Counter()
        self._seen: set[tuple[str, str]] = set()

    def run(
        self, operation: str, action: Callable[[], R], otherwise: Callable[[BaseException], R]
    ) -> R:
        """`action()`, or what `otherwise` (which must not fail) makes of the error. Never raises."""
        try:
            return action()
        except Exception as exc:  # noqa: BLE001 - a cache must never fail an inference
            self.count(reason_of(exc))
            self._report(operation, exc)
            return otherwise(exc)

    def count(self, reason: MissReason) -> None:
        with self._lock:
            self._misses[reason] += 1

    def forgive(self) -> None:
        """Things work again: the next failure of each kind is news."""
        with self._lock:
            self._seen.clear()

    @property
    def misses(self) -> dict[MissReason, int]:
        with self._lock:
            return dict(self._misses)

    def _report(self, operation: str, error: Exception) -> None:
        kind = (operation, type(error).__name__)
        with self._lock:
            is_new = kind not in self._seen
            self._seen.add(kind)
        is_news = is_new and not isinstance(error, NotConnected)
        level = logging.WARNING if is_news else logging.DEBUG
        known = isinstance(error, KVFabricError)
        _log.log(
            level,
            "fabric: %s failed (%s: %s); computing instead",
            operation,
            type(error).__name__,
            str(error),  # not the error: a kept log record would keep its frames and their buffers
            exc_info=None if known else error,
        )
