"""What routers tell each other of their load, kept for a moment: no state of the registry, no harm if lost.

A row is the routers' own business. It is forgotten when its router has not told again for `KEPT_S`.
"""

from __future__ import annotations

from collections.abc import Callable

from kvfabric.errors import CapacityError, ConfigError

KEPT_S = 3.0
MAX_ROUTERS = 64
MAX_ROW_BYTES = 256 << 10
MAX_NAME_CHARS = 64


def check_row(router: str, row: bytes) -> None:
    """Raises ConfigError for what no router tells."""
    if not 0 < len(router) <= MAX_NAME_CHARS or len(row) > MAX_ROW_BYTES:
        raise ConfigError(
            f"a router's load has a name of up to {MAX_NAME_CHARS} characters and {MAX_ROW_BYTES} B at most"
        )


class RouterLoads:
    """Rows by router, for the routers of one node. `clock`: seconds. Sync."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rows: dict[str, tuple[float, bytes]] = {}

    def exchange(self, router: str, row: bytes) -> list[bytes]:
        """Keep this router's row in place of its last one; what the others told last. Raises ConfigError,
        CapacityError with more routers than there may be."""
        check_row(router, row)
        now = self._clock()
        self._rows = {name: kept for name, kept in self._rows.items() if now - kept[0] < KEPT_S}
        if router not in self._rows and len(self._rows) >= MAX_ROUTERS:
            raise CapacityError(f"{MAX_ROUTERS} routers share their load here already")
        self._rows[router] = (now, row)
        return [kept[1] for name, kept in self._rows.items() if name != router]
