"""What a process tells the service manager that started it (systemd, `Type=notify`)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Say e.g. `READY=1`, by the protocol of sd_notify(3); without a service manager nothing happens.

    One that does not listen costs nothing either: it is told so that it can wait, not so that we may go on.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(state.encode(), address)
        except OSError as exc:
            log.warning("the service manager at %s does not hear %s: %s", path, state, exc.strerror)
