"""What a node's measured links mean, for `kvfabric doctor`: what is used, and what to do where it is slow.

Pure functions. `Machine` is what the answer depends on beside the measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvfabric.protocol import kvfabric_pb2 as pb

OK, WARN, FAIL = "ok", "warn", "fail"
SLOW_BYTES_PER_S = 1e9
SLOW_ROUND_TRIP_S = 0.01
LINE_SHARE = 0.5
"""Of a network device's own rate: less is slow."""
_SAME_MACHINE = ("sysv/", "posix/", "cma/")
_TCP_SETTINGS = ("UCX_PROTOS", "UCX_MAX_RNDV_RAILS", "UCX_TCP_RX_SEG_SIZE", "UCX_RNDV_THRESH")
SYSTEM_LIBRARY = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"


class LinkFinding(NamedTuple):
    """As `doctor.Finding`."""

    subject: str
    result: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """`rdma_devices`: of the kernel; `devices`: network devices with bytes per second, 0 if not known.
    `ptrace_scope`: of Yama, 0 without it. `locked_bytes`: -1 for no limit."""

    rdma_devices: tuple[str, ...] = ()
    devices: tuple[tuple[str, float], ...] = ()
    ptrace_scope: int = 0
    locked_bytes: int = -1

    @classmethod
    def here(cls, locked_bytes: int) -> Machine:
        scope = _read(Path("/proc/sys/kernel/yama/ptrace_scope"))
        devices = tuple(
            (name, max(0, int(_read(Path("/sys/class/net") / name / "speed") or 0)) * 1e6 / 8)
            for name in _names(Path("/sys/class/net"))
        )
        return cls(_names(Path("/sys/class/infiniband")), devices, int(scope or 0), locked_bytes)


def link_findings(measured: pb.MeasuredLinks, machine: Machine) -> Iterator[LinkFinding]:
    if not measured.exchanges:
        advice = "--ucx-net-devices, if blocks are to move between nodes"
        yield LinkFinding("transfers", WARN, "this node moves no blocks to others", advice)
        return
    resources = ", ".join(measured.resources)
    text = f"{measured.library}; may use {resources}; wire {measured.wire}"
    yield LinkFinding("ucx", OK, text)
    yield from _rdma(measured, machine)
    if measured.settings:
        yield LinkFinding("ucx settings", OK, ", ".join(measured.settings))
    yield _sockets(measured)
    if not measured.links:
        yield LinkFinding(
            "links", WARN, "no other node in the directory", "start a second node to measure to"
        )
    for link in measured.links:
        yield _link(link, measured, machine)


def device_findings(net_devices: str, machine: Machine) -> Iterator[LinkFinding]:
    """Are the configured devices there? "mlx5_0:1" is a port of an RDMA device."""
    there = {name for name, _ in machine.devices} | set(machine.rdma_devices)
    for device in filter(None, net_devices.split(",")):
        if device.partition(":")[0] not in there:
            advice = f"ucx_net_devices is one of {', '.join(sorted(there))}, or several"
            yield LinkFinding("ucx_net_devices", FAIL, f"no device {device} here", advice)
    if "lo" in net_devices.split(","):
        text = "lo: no other machine is reached over it"
        yield LinkFinding("ucx_net_devices", WARN, text, "name the device of the nodes' network")


def _rdma(measured: pb.MeasuredLinks, machine: Machine) -> Iterator[LinkFinding]:
    uses_rdma = any(not _is_tcp(resource) for resource in measured.resources)
    if machine.rdma_devices and not uses_rdma:
        text = f"{', '.join(machine.rdma_devices)} here, and this UCX does not use it"
        yield LinkFinding(
            "rdma",
            WARN,
            text,
            "UCX from PyPI is built without RDMA: install the system's UCX with verbs, set "
            f"{SYSTEM_LIBRARY}=true, and name the device in ucx_net_devices ({machine.rdma_devices[0]}:1)",
        )
    if uses_rdma and machine.locked_bytes >= 0:
        text = f"RDMA pins the arena, and {machine.locked_bytes} bytes may be locked"
        yield LinkFinding("rdma", WARN, text, "`ulimit -l unlimited`")


def _sockets(measured: pb.MeasuredLinks) -> LinkFinding:
    listening = ", ".join(measured.listening) or "none"
    if any(place.startswith(("0.0.0.0:", "[::]:")) for place in measured.listening):
        advice = "close these ports to all but the nodes of the fleet: UCX authenticates nobody"
        return LinkFinding("ucx sockets", WARN, f"UCX listens on {listening}", advice)
    return LinkFinding("ucx sockets", OK, f"UCX listens on {listening}")


def _link(link: pb.MeasuredLink, measured: pb.MeasuredLinks, machine: Machine) -> LinkFinding:
    subject = f"link to {link.node_id}"
    if link.failure:
        advice = (
            "blocks are computed, not fetched, until it works: is the node up, are both nodes' "
            "ucx_net_devices on one network, does a firewall let UCX's ports through?"
        )
        return LinkFinding(subject, FAIL, link.failure, advice)
    text = (
        f"{link.bytes_per_s / 1e9:.2f} GB/s, {link.round_trip_s * 1e6:.0f} us there and back "
        f"({link.call_s * 1e6:.0f} of them gRPC), over {', '.join(link.lanes)}: {'; '.join(link.protocols)}"
    )
    advice = "; ".join(_why_slow(link, measured, machine))
    return LinkFinding(subject, WARN if advice else OK, text, advice)


def _why_slow(link: pb.MeasuredLink, measured: pb.MeasuredLinks, machine: Machine) -> Iterator[str]:
    rates = dict(machine.devices)
    used = [lane.partition("/")[2].partition(":")[0] for lane in link.lanes]
    line = sum(rates.get(device, 0.0) for device in used)
    slow = link.bytes_per_s < (LINE_SHARE * line if line else SLOW_BYTES_PER_S)
    if link.round_trip_s > SLOW_ROUND_TRIP_S:
        yield "a round trip takes long: is a machine busy, or the way far?"
    if not slow:
        return
    if line:
        yield f"slow for devices of {line / 1e9:.2f} GB/s"
    if given := [s for s in measured.settings if s.startswith(_TCP_SETTINGS)]:
        yield f"the environment sets {', '.join(given)}: try without"
    if all(map(_is_tcp, link.lanes)):
        if machine.rdma_devices:
            yield f"TCP, though there is {machine.rdma_devices[0]}: see rdma"
        if used == ["lo"]:
            scope = (
                f" (and ptrace_scope 0, which is {machine.ptrace_scope})"
                if machine.ptrace_scope
                else ""
            )
            yield f"nodes of one machine are faster with UCX_TLS=tcp,cma{scope}"
        else:
            yield "is it the fast network's device? jumbo frames (MTU 9000) help TCP"


def _is_tcp(resource: str) -> bool:
    return resource.startswith(("tcp/", "self/", *_SAME_MACHINE))


def _names(directory: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(directory)))
    except OSError:
        return ()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # of a device that is down or has no speed, too
        return ""
