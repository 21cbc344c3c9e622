"""Machines of a test: network namespaces around a bridge in a namespace of its own, whose cables can be cut.

Nothing of the machine's own network is touched, and its addresses are reachable from these namespaces only.
A cut cable drops what is sent, both ways, and tells nobody: connections stay half-open. A `slow` machine's
cable goes through `Cable`, a proxy of ours that delays frames and loses some (the kernel's netem is not
everywhere).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

SUBNET = "10.213.7"
_MTU = 9000
_PREFIX = "kvfabric"
_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC_SLAVE, _MNT_DETACH = 0x4000 | 0x80000, 2
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 2, 0x1000

T = TypeVar("T")


def why_not() -> str:
    """Why this process may make no such network; empty if it may."""
    try:
        with Network(("a",), slow=("a",)):
            return ""
    except (OSError, subprocess.CalledProcessError) as exc:
        said = getattr(exc, "stderr", None)
        return f"network namespaces are not permitted here: {exc} {said or ''}".strip()


class Network:
    """A context manager; leaving removes the namespaces, and with them every interface.

    `names`: the machines. `slow`: those of them whose cable `delay` can make slow and lossy.
    """

    def __init__(self, names: tuple[str, ...], *, slow: tuple[str, ...] = ()) -> None:
        self._names = names
        self._slow = slow
        self._prefix = f"{_PREFIX}-{os.getpid()}-{os.urandom(2).hex()}"
        self._closing = contextlib.ExitStack()
        self._cables: dict[str, Cable] = {}

    def __enter__(self) -> Self:
        _sweep()
        try:
            self._add_namespace(self._hub)
            self._in_hub("link", "add", "bridge", "type", "bridge")
            self._in_hub("link", "set", "bridge", "mtu", str(_MTU), "up")
            for name in self._names:
                self._add_namespace(self.namespace(name))
                self._plug_in(name)
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    @property
    def _hub(self) -> str:
        return f"{self._prefix}-hub"

    def namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def address(self, name: str) -> str:
        return f"{SUBNET}.{1 + self._names.index(name)}"

    # -- what can be done to cables ------------------------------------------------------------------

    def cut(self, *names: str) -> None:
        """Nothing passes from now on, and nobody is told."""
        for name in names:
            self._in_hub("link", "set", self._port(name), "nomaster")

    def mend(self, *names: str) -> None:
        for name in names:
            self._in_hub("link", "set", self._port(name), "master", "bridge")

    def lose(self, name: str) -> None:
        """As a power failure does: the machine is gone with its connections, and nobody is told. What comes
        back under its name is another one, with its address. Its processes must have ended."""
        if name in self._cables:
            self._cables.pop(name).__exit__()
        else:
            self._in_hub("link", "del", self._port(name))
        # Its kernel part lives on for as long as it has connections to close, but nobody hears of that.
        _ip("netns", "del", self.namespace(name))
        _ip("netns", "add", self.namespace(name))
        self._plug_in(name)

    def limit(self, name: str, rate: str) -> None:
        """At most so much towards a machine, as `tc` writes it (`200mbit`)."""
        self._tc("replace", name, "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")

    def unlimit(self, name: str) -> None:
        self._tc("del", name)

    def delay(self, name: str, delay_s: float, lost: float) -> None:
        """Of a `slow` machine: each frame takes so much longer, and this share of them is lost."""
        cable = self._cables[name]
        cable.delay_s, cable.lost = delay_s, lost

    # -- inside --------------------------------------------------------------------------------------

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._closing.callback(_ip, "netns", "del", name)

    def _plug_in(self, name: str) -> None:
        space, port = self.namespace(name), self._port(name)
        if name in self._slow:
            with entered(self._hub):
                cable = Cable(port, f"{port}x")
            self._closing.enter_context(cable)
            self._cables[name] = cable
            self._in_hub("link", "set", f"{port}x", "netns", space)
            _ip("-n", space, "link", "set", f"{port}x", "name", "eth0")
        else:
            peer = ("peer", "name", "eth0", "netns", space)
            self._in_hub("link", "add", port, "type", "veth", *peer)
        # Who comes back has the address that others remember.
        ours = f"02:00:00:00:00:{self._names.index(name):02x}"
        _ip("-n", space, "link", "set", "eth0", "address", ours, "mtu", str(_MTU), "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._in_hub("link", "set", port, "mtu", str(_MTU), "master", "bridge", "up")

    def _port(self, name: str) -> str:
        return f"p{self._names.index(name)}"

    def _in_hub(self, *arguments: str) -> None:
        _ip("-n", self._hub, *arguments)

    def _tc(self, verb: str, name: str, *discipline: str) -> None:
        device = ("dev", self._port(name), "root")
        _run("tc", "-n", self._hub, "qdisc", verb, *device, *discipline)


class Cable:
    """Two TAP devices and a thread that carries frames between them. Made in the namespace of both."""

    def __init__(self, one: str, other: str) -> None:
        self.delay_s = self.lost = 0.0
        self.num_frames = self.num_lost = 0
        self._ends = [_tap(one), _tap(other)]
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._carry, name=f"cable {one}")
        self._chance = random.Random(0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._thread.is_alive():
            return  # a second time
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for descriptor in (*self._ends, self._stop):
            os.close(descriptor)

    def _carry(self) -> None:
        there = {self._ends[0]: self._ends[1], self._ends[1]: self._ends[0]}
        due: list[tuple[float, int, int, bytes]] = []
        while True:
            wait = max(due[0][0] - time.monotonic(), 0.0) if due else None
            ready, _, _ = select.select([*self._ends, self._stop], [], [], wait)
            if self._stop in ready:
                return
            for end in ready:
                with contextlib.suppress(OSError):  # not up yet, or no more
                    frame = os.read(end, 1 << 16)
                    self.num_frames += 1
                    if self._chance.random() < self.lost:
                        self.num_lost += 1
                        continue
                    at = time.monotonic() + self.delay_s
                    heapq.heappush(due, (at, self.num_frames, there[end], frame))
            while due and due[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(due)
                with contextlib.suppress(OSError):
                    os.write(end, frame)


def _sweep() -> None:
    """Remove namespaces of processes that were killed in the midst of a test."""
    for file in Path("/run/netns").glob(f"{_PREFIX}-*"):
        process = file.name.split("-")[1]
        if not Path(f"/proc/{process}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else sweeps, too
                _ip("netns", "del", file.name)


def _tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(
            descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
        )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# ---------------------------------------------------------------------- being in a namespace


def enter(namespace: str) -> None:
    """This process, or this thread alone, is in `namespace` from now on: sockets that it makes are."""
    with Path(f"/run/netns/{namespace}").open("rb") as file:
        _call("setns", file.fileno(), _CLONE_NEWNET)


def enter_for_good(namespace: str) -> None:
    """Of a process with one thread; as `enter`, and /sys shows the namespace's devices, which UCX reads."""
    enter(namespace)
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC_SLAVE, None)
    _call("umount2", b"/sys", _MNT_DETACH)
    _call("mount", b"kvfabric", b"/sys", b"sysfs", 0, None)


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """This thread, for as long as the block takes."""
    with Path("/proc/thread-self/ns/net").open("rb") as before:
        enter(namespace)
        try:
            yield
        finally:
            _call("setns", before.fileno(), _CLONE_NEWNET)


def within(namespace: str, work: Callable[[], T]) -> T:
    """What `work` returns, done in `namespace`, on a thread of its own. Raises what it raises."""

    def run() -> T:
        enter(namespace)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
