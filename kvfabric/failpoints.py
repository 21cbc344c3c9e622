"""Named places at which a process can be made to die, for tests of what a crash leaves behind.

    KVFABRIC_FAILPOINT=registry.committed:3    dies by SIGKILL when it passes there for the third time

Read once, when this module is imported; without the variable a passing is one look-up in an empty dict.
Every place where durable or shared state changes has one; `POINTS` lists them all.
"""

from __future__ import annotations

import os
import signal
import threading

from kvfabric.errors import ConfigError

VARIABLE = "KVFABRIC_FAILPOINT"

POINTS = (
    "segment.create.allocated",
    "segment.create.synced",
    "segment.create.named",
    "segment.create.registered",
    "segment.appended",
    "segment.synced",
    "segment.unlinked",
    "segment.reclaim.moved",
    "segment.reclaim.forgotten",
    "segment.reclaim.done",
    "index.changed",
    "index.committed",
    "index.created",
    "index.doubted",
    "index.trusted",
    "store.reserved",
    "store.commit.copied",
    "store.commit.published",
    "store.evicted",
    "store.sealed",
    "store.promote.read",
    "store.promote.published",
    "store.purge.dropped",
    "store.purge.wiped",
    "registry.changed",
    "registry.committed",
    "keyring.written",
    "keyring.renamed",
    "keyring.root.next",
    "keyring.root.sealed",
    "arena.recorded",
    "arena.replaced",
    "arena.adopted",
    "takeover.frozen",
    "takeover.given",
    "takeover.agreed",
    "takeover.gone",
    "takeover.asked",
    "takeover.received",
    "takeover.restored",
    "takeover.ready",
    "takeover.going",
    "takeover.serving",
)

_armed: dict[str, int] = {}  # name -> passings until the end
_counting = threading.Lock()


def failpoint(name: str) -> None:
    """End the process here and now if the environment asked for it."""
    if name in _armed:
        _pass(name)


def arm(spec: str) -> None:
    """`name:n`, or empty for none. Raises ConfigError for a name that is no failpoint."""
    _armed.clear()
    if spec:
        name, _, count = spec.partition(":")
        if name not in POINTS or not count.isdigit():
            raise ConfigError(f"{VARIABLE} is {spec!r}; it must be NAME:N with a known name")
        _armed[name] = int(count)


def _pass(name: str) -> None:
    with _counting:
        _armed[name] -= 1
        if _armed[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE, ""))
