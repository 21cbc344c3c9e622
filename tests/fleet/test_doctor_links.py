"""`kvfabric doctor` and the ways between nodes: measured on two real ones, judged on what could be."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvfabric.link_findings import FAIL, OK, WARN, Machine, device_findings, link_findings
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.testing.processes import until
from tests.fleet.test_peers import Pair, nodes_on


def doctor(pair: Pair) -> dict[str, tuple[str, str]]:
    """Result and the rest of the line, by subject."""
    options = {"directory": pair.b.options["directory"], "ucx-net-devices": "lo", "http": ""}
    command = [sys.executable, "-m", "kvfabric", "doctor", "--state-dir", str(pair.b.state_dir)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [re.split(r"\s{2,}", line, maxsplit=2) for line in done.stdout.splitlines()]
    return {line[1]: (line[0], line[2]) for line in lines if len(line) == 3}


@pytest.mark.slow
@pytest.mark.fleet
def test_doctor_measures_the_way_to_each_other_node(tmp_path: Path) -> None:
    with nodes_on(tmp_path) as pair:
        found = doctor(pair)
        _, link = found["link to a"]
        measured = re.match(
            r"([\d.]+) GB/s, (\d+) us there and back \((\d+) of them gRPC\), over tcp/lo: (.*)",
            link,
        )
        assert measured, found
        assert 0.05 < float(measured[1]) < 100
        assert 0 < int(measured[3]) < int(measured[2]) * 1.5
        assert "64K..inf rendezvous" in measured[4]
        assert "may use tcp/lo" in found["ucx"][1]
        assert "TLS=tcp" in found["ucx settings"][1]
        assert found["ucx_net_devices"] == (
            WARN,
            "lo: no other machine is reached over it -> name the device of the nodes' network",
        )
        # What it says UCX listens on, the kernel says too.
        ports = re.findall(r"127\.0\.0\.1:(\d+)", found["ucx sockets"][1])
        table = Path(f"/proc/{pair.b.pid}/net/tcp").read_text().splitlines()[1:]
        listening = {int(line.split()[1].split(":")[1], 16) for line in table if " 0A " in line}
        assert ports
        assert {int(port) for port in ports} <= listening
        os.kill(pair.a.pid, signal.SIGSTOP)
        result, text = doctor(pair)["link to a"]
        os.kill(pair.a.pid, signal.SIGCONT)
        assert result == FAIL
        assert "no answer in 5 s" in text or "DEADLINE" in text
        # It was worth no more than that: the node is there again once it has renewed its lease.
        until(lambda: doctor(pair).get("link to a", (FAIL, ""))[0] in (OK, WARN))


LINK = pb.MeasuredLink(
    node_id="a",
    call_s=0.0005,
    round_trip_s=0.001,
    bytes_per_s=4e9,
    lanes=["tcp/eth0"],
    protocols=["0..inf multi-frag tcp/eth0"],
)
MACHINE = Machine(devices=(("eth0", 3.1e9), ("lo", 0.0)))


def judged(machine: Machine = MACHINE, **changes: object) -> dict[str, tuple[str, str]]:
    measured = pb.MeasuredLinks(
        exchanges=True,
        net_devices="eth0",
        library="1.21.0 in libucp.so.0",
        resources=["tcp/eth0"],
        listening=["10.0.0.1:4000"],
    )
    link = pb.MeasuredLink()
    link.CopyFrom(LINK)
    for name, value in changes.items():
        target = link if name in pb.MeasuredLink.DESCRIPTOR.fields_by_name else measured
        if isinstance(value, list):
            del getattr(target, name)[:]
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
    measured.links.append(link)
    return {f.subject: (f.result, f.advice) for f in link_findings(measured, machine)}


def test_a_good_link_needs_no_advice() -> None:
    assert judged() == {
        "ucx": (OK, ""),
        "ucx sockets": (OK, ""),
        "link to a": (OK, ""),
    }


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"bytes_per_s": 1e9}, "slow for devices of 3.10 GB/s"),
        ({"bytes_per_s": 1e9}, "MTU 9000"),
        ({"bytes_per_s": 5e8, "settings": ["UCX_PROTOS=all"]}, "sets UCX_PROTOS=all: try without"),
        ({"bytes_per_s": 5e8, "lanes": ["tcp/lo"]}, "UCX_TLS=tcp,cma"),
        ({"round_trip_s": 0.2}, "is a machine busy"),
    ],
)
def test_a_slow_link_is_told_what_to_try(changes: dict[str, Any], advice: str) -> None:
    result, text = judged(**changes)["link to a"]
    assert result == WARN
    assert advice in text


def test_a_link_that_fails_says_why_and_what_to_look_at() -> None:
    result, text = judged(failure="UNAVAILABLE: connection refused")["link to a"]
    assert result == FAIL
    assert "ucx_net_devices" in text


def test_rdma_that_lies_idle_and_rdma_that_cannot_pin() -> None:
    idle = dataclasses.replace(MACHINE, rdma_devices=("mlx5_0",))
    result, advice = judged(idle)["rdma"]
    assert result == WARN
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true" in advice
    assert "mlx5_0:1" in advice
    used: dict[str, Any] = {"resources": ["rc_mlx5/mlx5_0:1"], "lanes": ["rc_mlx5/mlx5_0:1"]}
    assert "rdma" not in judged(idle, **used)
    tight = dataclasses.replace(idle, locked_bytes=65_536)
    assert judged(tight, **used)["rdma"] == (WARN, "`ulimit -l unlimited`")


def test_ports_that_all_can_reach() -> None:
    assert judged(listening=["0.0.0.0:4000"])["ucx sockets"][0] == WARN


def test_devices_that_are_not_there() -> None:
    (found,) = device_findings("eth1", MACHINE)
    assert found.result == FAIL
    assert "eth0, lo" in found.advice
    assert not list(device_findings("eth0,mlx5_0:1", Machine(("mlx5_0",), (("eth0", 0.0),))))
    assert "lo" in dict(Machine.here(-1).devices)


def test_nodes_that_exchange_nothing() -> None:
    (found,) = link_findings(pb.MeasuredLinks(), MACHINE)
    assert found.result == WARN
