"""`kvfabric doctor`: is this machine fit for a node, and does the one that is configured answer?

Runs from a bare install: whatever an extra would bring is looked for, never needed. Each finding is one
line, ok, warn or fail, with what to do; only a fail makes the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import http.client
import importlib.util
import json
import mmap
import os
import resource
import stat
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfabric.cli import Command
from kvfabric.config import NodeConfig, add_arguments, from_args, split_address
from kvfabric.errors import KVFabricError
from kvfabric.link_findings import Machine, device_findings, link_findings

OK, WARN, FAIL = "ok", "warn", "fail"
MIN_PYTHON = (3, 11)
MIN_DESCRIPTORS = 4096
HTTP_DEADLINE_S = 3.0
LINKS_DEADLINE_S = 60.0
SCRUB_DEADLINE_S = 86_400.0
MIN_CERTIFICATE_LIFE = datetime.timedelta(days=14)
EXTRAS = {
    "node": ("grpc", "google.protobuf", "grpc_health", "lmdb", "cryptography", "aiohttp"),
    "redis": ("redis", "lmdb"),
    "router": ("grpc", "google.protobuf", "cryptography", "aiohttp"),
    "engine": ("torch", "aiohttp"),
    "ucx-cu12 or ucx-cu13": ("ucxx",),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` is what to do, empty for ok."""

    subject: str
    result: str
    text: str
    advice: str = ""


def _python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version[:2] >= MIN_PYTHON:
        return Finding("python", OK, text)
    return Finding("python", FAIL, text, "use Python 3.11 or newer")


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if not _is_there(name)]
        subject = f"extra {extra}"
        if not missing:
            yield Finding(subject, OK, "installed")
            continue
        advice = f"pip install 'kvfabric[{extra.split()[0]}]' if this machine needs it"
        yield Finding(subject, WARN, f"{', '.join(missing)} missing", advice)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def _memory_file() -> Finding:
    """A sealed memory file can be made and mapped: the arena is one."""
    try:
        descriptor = os.memfd_create("kvfabric-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            mmap.mmap(descriptor, mmap.PAGESIZE).close()
        finally:
            os.close(descriptor)
    except (OSError, AttributeError) as exc:
        return Finding("memfd", FAIL, f"no memory files: {exc}", "a node needs Linux 3.17 or newer")
    return Finding("memfd", OK, "memory files can be made and sealed")


def _process_file() -> Finding:
    """A node learns by pidfd that an engine's process is gone."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as exc:
        return Finding("pidfd", FAIL, f"no pidfd: {exc}", "a node needs Linux 5.3 or newer")
    return Finding("pidfd", OK, "the exit of engines can be seen")


def _state_directory(directory: Path) -> Finding:
    there = _nearest(directory)
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "choose another with --state-dir, or let this user write there"
        return Finding("state directory", FAIL, f"{there} is not writable", advice)
    if there != directory:
        return Finding("state directory", OK, f"{directory} will be made")
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        advice = f"chown it to this user and chmod 700 {directory}: it holds the keyring"
        return Finding("state directory", WARN, f"{directory} can be changed by others", advice)
    return Finding("state directory", OK, str(directory))


def _direct_io(directory: Path) -> Finding:
    """The SSD tier writes past the page cache. Makes one file without a name, which leaves nothing."""
    there = _nearest(directory)
    try:
        descriptor = os.open(there, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page:
                os.pwrite(descriptor, page, 0)
        finally:
            os.close(descriptor)
    except OSError as exc:
        advice = "put ssd_dir on a local ext4 or xfs, or switch the tier off with --ssd-bytes 0"
        return Finding("O_DIRECT", WARN, f"not in {there}: {exc.strerror}", advice)
    return Finding("O_DIRECT", OK, f"works in {there}")


def _scrub(config: NodeConfig) -> Finding:
    """Verify what lies in the tiers: the running node does it, or this process on a stopped one's files."""
    try:
        report = _scrub_running(config) if _answers(config) else _scrub_stopped(config)
    except ModuleNotFoundError as exc:
        advice = "pip install 'kvfabric[node]'"
        return Finding("scrub", WARN, f"not done: {exc.name} is missing", advice)
    except KVFabricError as exc:
        return Finding("scrub", FAIL, str(exc), "see the node's log")
    text = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.items())
    if any(report[name] for name in ("arena_corrupt", "ssd_corrupt", "ssd_unreadable")):
        advice = (
            "what is corrupt was taken out, and is computed anew; check the disk and the memory"
        )
        return Finding("scrub", FAIL, text, advice)
    return Finding("scrub", OK, text)


def _answers(config: NodeConfig) -> bool:
    return _admin(config.admin_socket_path).result == OK


def _scrub_running(config: NodeConfig) -> dict[str, int]:
    from kvfabric.daemon.admin_client import AdminClient, to_plain
    from kvfabric.protocol import kvfabric_pb2 as pb

    with AdminClient(config.admin_socket_path, deadline_s=SCRUB_DEADLINE_S) as client:
        return to_plain(client.call(client.admin.Scrub, pb.ScrubRequest()))


def _scrub_stopped(config: NodeConfig) -> dict[str, int]:
    """Opens the directory as the node would, so that nothing else can, and takes out what is corrupt."""
    if not config.ssd_bytes or not config.ssd_path.is_dir():
        return {"ssd_records": 0, "ssd_corrupt": 0, "ssd_unreadable": 0, "arena_corrupt": 0}
    from kvfabric.store.scrub import scrub_ssd
    from kvfabric.store.turns import Turns
    from kvfabric.tiers.segments import SegmentTier

    async def scrub() -> dict[str, int]:
        tier = SegmentTier(config.ssd_path, capacity_bytes=config.ssd_bytes, clock=time.monotonic)
        async with tier:
            return (await scrub_ssd(tier, Turns()))._asdict()

    return asyncio.run(scrub())


def _nearest(directory: Path) -> Path:
    """The directory itself or the closest one above that exists."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def _locked_memory(host_bytes: int) -> Finding:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if soft == resource.RLIM_INFINITY or soft >= host_bytes:
        return Finding("memlock", OK, "the arena can be pinned")
    text = f"{soft} bytes may be locked, the arena has {host_bytes}"
    return Finding("memlock", WARN, text, "`ulimit -l unlimited` where GPUs or RDMA pin the arena")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= MIN_DESCRIPTORS:
        return Finding("nofile", OK, f"{soft} descriptors")
    advice = f"`ulimit -n {min(MIN_DESCRIPTORS, hard) if hard > 0 else MIN_DESCRIPTORS}`"
    return Finding("nofile", WARN, f"only {soft} descriptors", advice)


def _trust_domain(uid: int) -> Finding:
    text = f"every process of uid {uid} on this machine is one trust domain: it can read the arena"
    if uid:
        return Finding("trust domain", OK, text)
    return Finding("trust domain", WARN, text, "run node and engines as a user of their own")


def _socket(path: Path) -> Finding:
    """The engines' socket. What is on it is the node's business: it is not spoken to."""
    try:
        status = path.stat()
    except OSError:
        return Finding("node socket", WARN, f"none at {path}", "start a node with `kvfabric node`")
    if not stat.S_ISSOCK(status.st_mode):
        return Finding("node socket", FAIL, f"{path} is no socket", "move it away")
    if stat.S_IMODE(status.st_mode) & 0o077:
        return Finding("node socket", FAIL, f"{path} is open to others", f"chmod 600 {path}")
    return Finding("node socket", OK, str(path))


def _admin(path: Path) -> Finding:
    if not path.exists():
        return Finding("admin socket", WARN, f"none at {path}", "start a node with `kvfabric node`")
    try:
        from kvfabric.daemon.admin_client import AdminClient
    except ModuleNotFoundError as exc:
        advice = "pip install 'kvfabric[node]'"
        return Finding("admin socket", WARN, f"not asked: {exc.name} is missing", advice)
    try:
        with AdminClient(path, deadline_s=HTTP_DEADLINE_S) as client:
            serving = client.is_serving()
    except KVFabricError as exc:
        return Finding("admin socket", FAIL, str(exc), "see the node's log, restart it")
    if not serving:
        return Finding("admin socket", WARN, "the node is stopping", "wait, then start it again")
    return Finding("admin socket", OK, f"a node answers at {path}")


def _lease(path: Path) -> Finding:
    """What a running node says of its registry."""
    from kvfabric.daemon.admin_client import AdminClient
    from kvfabric.protocol import kvfabric_pb2 as pb

    try:
        with AdminClient(path, deadline_s=HTTP_DEADLINE_S) as client:
            registry = client.call(client.admin.Status, pb.StatusRequest()).registry
    except KVFabricError as exc:
        return Finding("epoch lease", WARN, f"not known: {exc}", "see the admin socket")
    if registry.tenants_without_keys:
        return Finding(
            "keys of the fleet",
            WARN,
            f"no keys of {len(registry.tenants_without_keys)} tenants, whose requests reuse nothing here",
            "do nodes reach each other over mTLS (`listen`, `tls_dir`)? Else give them one keyring_dir; "
            "if no node has the keys any more: `kvfabric tenant claim-keys`",
        )
    if registry.state == "serving":
        return Finding("epoch lease", OK, f"{registry.home}, {registry.num_holders} holders")
    advice = "until it has one every lookup is a miss; it heals by itself once the directory does"
    detail = registry.detail or "the directory is another one than before"
    return Finding("epoch lease", WARN, f"none ({registry.state}): {detail}", advice)


def _directory(config: NodeConfig) -> Finding:
    """The fleet's registry: is it there, will it keep what it is told?"""
    try:
        from kvfabric.registry.redis.address import parse
        from kvfabric.registry.redis.store import Store
    except ModuleNotFoundError as exc:
        advice = "pip install 'kvfabric[redis]'"
        return Finding("directory", FAIL, f"{exc.name} is missing", advice)

    async def ask() -> str:
        store = Store(parse(config.directory, insecure=config.insecure), lease_s=HTTP_DEADLINE_S)
        try:
            await store.position()
            return await store.durability()
        finally:
            await store.aclose()

    try:
        problem = asyncio.run(ask())
    except KVFabricError as exc:
        return Finding("directory", FAIL, str(exc), "nodes miss everything until it answers")
    if problem:
        return Finding("directory", FAIL, problem, "until then no change is accepted")
    return Finding("directory", OK, "answers and keeps changes")


def _tls(config: NodeConfig) -> Finding:
    try:
        from kvfabric.tls import load
    except ModuleNotFoundError as exc:
        return Finding(
            "certificate", FAIL, f"{exc.name} is missing", "pip install 'kvfabric[node]'"
        )
    try:
        material = load(config.tls_path)
    except KVFabricError as exc:
        return Finding("certificate", FAIL, str(exc), "`kvfabric pki issue` makes a new one")
    text = f"{material.identity}, valid until {material.not_after:%Y-%m-%d}"
    left = material.not_after - datetime.datetime.now(datetime.UTC)
    if left < MIN_CERTIFICATE_LIFE:
        return Finding("certificate", WARN, text, "renew it: `kvfabric pki issue`; no restart")
    return Finding("certificate", OK, text)


def _links(config: NodeConfig) -> Iterator[Finding]:
    """Blocks from and to other nodes: a running node measures."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    machine = Machine.here(-1 if soft in (resource.RLIM_INFINITY, -1) else soft)
    found = [*device_findings(config.ucx_net_devices, machine)]
    if _answers(config):
        from kvfabric.daemon.admin_client import AdminClient
        from kvfabric.protocol import kvfabric_pb2 as pb

        try:
            with AdminClient(config.admin_socket_path, deadline_s=LINKS_DEADLINE_S) as client:
                measured = client.call(client.admin.MeasureLinks, pb.MeasureLinksRequest())
            if measured.exchanges or config.ucx_net_devices:
                found += link_findings(measured, machine)
        except KVFabricError as exc:
            yield Finding("links", WARN, f"not measured: {exc}", "see the admin socket")
    yield from (Finding(*finding) for finding in found)


def _fleet(config: NodeConfig) -> Iterator[Finding]:
    if config.directory:
        yield _directory(config)
    if config.directory and config.admin_socket_path.exists():
        yield _lease(config.admin_socket_path)
    if config.directory:
        yield from _links(config)
    if config.tls_dir:
        yield _tls(config)
    if config.insecure:
        advice = "use TLS (`kvfabric pki init`) and take --insecure away"
        yield Finding("insecure", WARN, "plain TCP is allowed: others can read and change", advice)


def _http(address: str, *, running: bool) -> Finding:
    """`running`: whether a node's sockets are there."""
    if not address:
        return Finding("http", OK, "switched off")
    host, port = split_address(address, "node.http")
    connection = http.client.HTTPConnection(host, port, timeout=HTTP_DEADLINE_S)
    try:
        connection.request("GET", "/readyz")
        code = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        level = FAIL if running else WARN
        advice = "is --http of the node another address?" if running else "start a node"
        return Finding("http", level, f"nothing at http://{address}: {exc}", advice)
    finally:
        connection.close()
    if code == http.client.OK:
        return Finding("http", OK, f"http://{address}/readyz answers")
    return Finding(
        "http", WARN, f"http://{address}/readyz says {code}", "the node is not ready yet"
    )


def examine(config: NodeConfig) -> list[Finding]:
    """Everything, in the order it is printed. Changes nothing on the machine."""
    running = config.socket_path.exists() or config.admin_socket_path.exists()
    return [
        _python(tuple(sys.version_info[:3])),
        *_extras(),
        _memory_file(),
        _process_file(),
        _state_directory(config.state_dir),
        _direct_io(config.ssd_path),
        _locked_memory(config.host_bytes),
        _descriptors(),
        _trust_domain(os.geteuid()),
        _socket(config.socket_path),
        _admin(config.admin_socket_path),
        _http(config.http, running=running),
        *_fleet(config),
    ]


def examine_router(url: str) -> list[Finding]:
    """What the router at `url` finds of itself, its nodes and engines."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/doctor", timeout=HTTP_DEADLINE_S) as answer:
            return [Finding(**found) for found in json.load(answer)["findings"]]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        advice = "is it running, and is this its URL?"
        return [Finding("router", FAIL, f"no answer from {url}: {exc}", advice)]


def _configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, NodeConfig)
    parser.add_argument(
        "--scrub",
        action="store_true",
        help="verify all bytes of the tiers, of a running node or of a stopped one's files; takes out what "
        "is corrupt",
    )
    parser.add_argument(
        "router",
        nargs="?",
        metavar="ROUTER_URL",
        help="look for silent failures of this router's fleet instead of at this machine",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    if args.router:
        findings = examine_router(args.router)
    else:
        config = from_args(NodeConfig, args)
        findings = examine(config) + ([_scrub(config)] if args.scrub else [])
    failed = any(finding.result == FAIL for finding in findings)
    if args.json:
        plain: dict[str, Any] = {"ok": not failed, "findings": [asdict(f) for f in findings]}
        print(json.dumps(plain, indent=2))
        return int(failed)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        print(f"{finding.result:4}  {finding.subject.ljust(width)}  {finding.text}{advice}")
    return int(failed)


COMMAND = Command("is this machine fit, and does the node answer?", "", _configure, _run)
