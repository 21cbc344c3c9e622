"""The keyring as the router has it: a node's file, read again when it may have changed, or in memory only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from kvfabric.errors import ConfigError
from kvfabric.keyring import Keyring, MemoryKeyring
from kvfabric.types import TenantId

REREAD_S = 10.0
"""Handle keys rotate rarely and the one before stays valid: this is soon enough."""

_log = logging.getLogger(__name__)


class KeyringReader:
    """Opens the keyring when it is first there. A file that cannot be read leaves what was read before.

    `in_memory`: without a file, what other holders of the fleet give (`registry.fleet_keys`) is kept here.
    `unknown` is called when a tenant is not in it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        in_memory: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.unknown: Callable[[], None] = lambda: None
        self._memory = MemoryKeyring() if in_memory else None
        self._directory = directory
        self._clock = clock
        self._keyring: Keyring | None = None
        self._read_at = float("-inf")
        self._reported = ""

    def current(self) -> Keyring | None:
        """None as long as there is no keyring; then requests are served without reuse."""
        if self._keyring is None or self._clock() - self._read_at >= REREAD_S:
            self.reread()
        if self._keyring is None and self._memory is not None and not self._memory.is_empty:
            return self._memory
        return self._keyring

    def own(self) -> MemoryKeyring | None:
        """What is to be kept up by this process; None where there is a node's file."""
        self.current()
        return None if self._keyring is not None else self._memory

    def forget(self, tenants: Collection[TenantId]) -> None:
        """Of tenants that ended. In a node's file, the node does it."""
        if self._memory is not None:
            self._memory.remove_tenants(tenants)

    def reread(self) -> None:
        """Read the file now (a few hundred bytes); at most once a millisecond."""
        now = self._clock()
        if now - self._read_at < 1e-3:
            return
        self._read_at = now
        try:
            if self._keyring is None:
                self._keyring = Keyring.open(self._directory)
            else:
                self._keyring.reload()
            self._reported = ""
        except ConfigError as exc:
            if str(exc) != self._reported and self._memory is None:
                _log.warning("keyring: %s", exc)
            self._reported = str(exc)
