"""The keyring as the router reads it: there or not yet, and read again when it may have changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from kvfabric.errors import ConfigError
from kvfabric.keyring import Keyring

REREAD_S = 10.0
"""Handle keys rotate rarely and the one before stays valid: this is soon enough."""

_log = logging.getLogger(__name__)


class KeyringReader:
    """Opens the keyring when it is first there. A file that cannot be read leaves what was read before."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._keyring: Keyring | None = None
        self._read_at = float("-inf")
        self._reported = ""

    def current(self) -> Keyring | None:
        """None as long as there is no keyring; then requests are served without reuse."""
        if self._keyring is None or self._clock() - self._read_at >= REREAD_S:
            self.reread()
        return self._keyring

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
            if str(exc) != self._reported:
                _log.warning("keyring: %s", exc)
            self._reported = str(exc)
