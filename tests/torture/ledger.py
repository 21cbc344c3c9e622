"""What is known of a registry from outside: which changes were acknowledged, and which are under way.

Times are CLOCK_MONOTONIC. A question that was sent at `view.at` and answered before now may be judged by
what was acknowledged before it was sent, as far as nothing of it was touched since.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvfabric.registry.state import SERVING, RegistryState
from kvfabric.types import Segment, template_scope

Epochs = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class View:
    """What was acknowledged at `at`; `pending`: scopes with a change under way then."""

    at: float
    epochs: Mapping[str, int]
    serving: Mapping[str, Segment]
    retired: tuple[Segment, ...]
    purged: frozenset[bytes]
    pending: frozenset[str]

    def epoch(self, scope: str) -> int:
        return self.epochs.get(scope, 0)


@dataclass(slots=True)
class Ledger:
    """One writer, who makes changes; any number of readers. `serving` and `retired`: by template."""

    epochs: dict[str, int] = field(default_factory=dict)
    serving: dict[str, Segment] = field(default_factory=dict)
    retired: dict[str, list[Segment]] = field(default_factory=dict)
    purged: set[bytes] = field(default_factory=set)
    num_changes: int = 0
    _pending: set[str] = field(default_factory=set)
    _begun_at: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, state: RegistryState) -> None:
        """Of a registry that nobody changes now."""
        with self._lock:
            self.epochs = dict(state.epochs)
            for template in state.templates.values():
                segment = Segment(template.name, template.version, template.incarnation, 0)
                if template.state == SERVING:
                    self.serving[template.name] = segment
                else:
                    self.retired.setdefault(template.name, []).append(segment)

    @contextlib.contextmanager
    def changing(self, scope: str) -> Iterator[None]:
        """Inside, a change of the scope is under way; it is acknowledged when this is left."""
        with self._lock:
            self._pending.add(scope)
            self._begun_at[scope] = time.monotonic()
        yield
        with self._lock:
            self._pending.discard(scope)
            self.num_changes += 1

    def promoted(self, segment: Segment, epoch: int) -> None:
        name = segment.template
        with self._lock:
            self.epochs[template_scope(name)] = epoch
            others = [one for one in self.retired.get(name, []) if one != segment]
            before = self.serving.get(name)
            if before is not None and before != segment:
                others.append(before)
            self.serving[name], self.retired[name] = segment, others

    def withdrawn(self, segment: Segment, epoch: int, *, purge: bool) -> None:
        name = segment.template
        with self._lock:
            self.epochs[template_scope(name)] = epoch
            if self.serving.get(name) == segment:
                del self.serving[name]
            rest = [one for one in self.retired.get(name, []) if one != segment]
            self.retired[name] = rest if purge else [*rest, segment]
            if purge:
                self.purged.add(segment.incarnation)

    def raised(self, scope: str, epoch: int) -> None:
        with self._lock:
            self.epochs[scope] = epoch

    def view(self) -> View:
        with self._lock:
            return View(
                at=time.monotonic(),
                epochs=dict(self.epochs),
                serving=dict(self.serving),
                retired=tuple(one for known in self.retired.values() for one in known),
                purged=frozenset(self.purged),
                pending=frozenset(self._pending),
            )

    def is_touched(self, scope: str, view: View) -> bool:
        """Whether a change of the scope was under way at any time since the view."""
        return scope in view.pending or self._begun_at.get(scope, 0.0) >= view.at
