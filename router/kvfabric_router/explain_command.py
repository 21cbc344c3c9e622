"""`kvfabric explain REQUEST_ID`: why a request went where it went, and reused what it reused."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kvfabric.cli import Command
from kvfabric.errors import ConfigError, ConnectError, NotFound

KEY_VARIABLE = "KVFABRIC_API_KEY"
DEFAULT_ROUTER = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the answer's X-Request-Id")
    parser.add_argument("--router", default=DEFAULT_ROUTER, metavar="URL", help="of the router")
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"holds the tenant's API key (default: ${KEY_VARIABLE}); never a flag, which `ps` shows",
    )
    parser.add_argument("--json", action="store_true", help="print what the router answered")


def _run(args: argparse.Namespace) -> int:
    told = fetch(args.router, args.request_id, _key(args.key_file))
    print(json.dumps(told, indent=2) if args.json else "\n".join(lines(told)), file=sys.stdout)
    return 0


def _key(file: str | None) -> str:
    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        return Path(file).read_text().strip()
    except OSError as exc:
        raise ConfigError(f"--key-file {file}: {exc.strerror}") from exc


def fetch(router: str, request_id: str, key: str) -> dict[str, Any]:
    """Ask the router. Raises NotFound, ConfigError (the key, the URL) or ConnectError."""
    if not router.startswith(("http://", "https://")):
        raise ConfigError(f"--router is {router!r}; it must be a URL such as {DEFAULT_ROUTER}")
    asked = urllib.request.Request(f"{router.rstrip('/')}/v1/explain/{request_id}")
    if key:
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as exc:
        with exc:
            if exc.code == 404:
                raise NotFound(
                    f"{request_id}: no recent request of this tenant has this id"
                ) from exc
            if exc.code == 401:
                raise ConfigError(f"the router wants an API key: set {KEY_VARIABLE}") from exc
            raise ConnectError(f"{router} answered {exc.code}") from exc
    except (OSError, ValueError) as exc:
        raise ConnectError(f"{router}: {exc}") from exc


def lines(told: dict[str, Any]) -> list[str]:
    """The answer for people."""
    return [*_outcome(told), "", *_candidates(told)]


def _outcome(told: dict[str, Any]) -> list[str]:
    found = [f"request {told['request_id']} went to {told['engine']} (policy {told['policy']})"]
    if told["prefill_engine"]:
        found.append(f"  its prompt was computed at {told['prefill_engine']}, and came in blocks")
    actual = told["actual"]
    if actual is None:
        found.append("  not answered, or the engine told no usage")
    else:
        reuse = actual["reuse_tokens"]
        found.append(
            f"  reused {sum(reuse.values())} of {actual['prompt_tokens']} prompt tokens "
            f"(HBM {reuse['hbm']}, host {reuse['host']}, SSD {reuse['ssd']}, "
            f"peers {reuse['peer']}); "
            f"at most {told['reusable_tokens']} may be"
        )
    found.append(
        f"  predicted {told['selected_tokens']} here, {told['reachable_tokens']} at the best engine; "
        f"given up for others {told['regret_tokens']} tokens, {told['regret_ms']:.1f} ms"
    )
    miss = told["miss"]
    if miss["reason"] != "none":
        found.append(f"  missed from token {miss['first_missing_token']} on: {miss['reason']}")
    if told["reason"]:
        found.append(f"  nothing could be reused: {told['reason']}")
    if drift := miss["drift"]:
        where = f"in {drift['segment']}" if drift["segment"] else f"before {drift['template']}"
        found.append(
            f"  differs from the prompts that hit {drift['template']} {drift['version']} at token "
            f"{drift['token']}, {where}"
        )
    if node := told["node"]:
        found.append(
            f"  its node promised {node['host_blocks']} blocks of host memory, {node['ssd_blocks']} of SSD "
            f"and {node['peer_blocks']} of other nodes, of {node['asked_blocks']} asked; the next: "
            f"{node['reason']}"
        )
    return found


_BASES = {"link": "measured", "class": "as others of its kind", "default": "a guess"}


def _candidates(told: dict[str, Any]) -> list[str]:
    terms = ["wait", "fetch", "prefill", "decode", "others", "total"]
    if any(one["prefill_engine"] for one in told["candidates"]):
        terms[-1:-1] = ["handoff", "stall"]
    found = [
        f"{'engine':20}{'hbm':>8}{'host':>8}{'ssd':>8}{'peer':>8}"
        + "".join(f"{term:>10}" for term in terms)
    ]
    for one in told["candidates"]:
        reuse, cost = one["reuse_tokens"], one["cost_ms"]
        found.append(
            f"{one['engine']:20}{reuse['hbm']:>8}{reuse['host']:>8}{reuse['ssd']:>8}{reuse['peer']:>8}"
            + "".join(f"{cost[term]:>10.1f}" for term in terms)
        )
        if first := one["prefill_engine"]:
            found.append(f"    its prompt computed at {first}, where the reuse is")
        if peer := one["peer"]:
            rate = f"{peer['bytes_per_s'] / 1e6:.0f} MB/s ({_BASES[peer['basis']]})"
            found.append(f"    from node {peer['node']} over a {peer['link']} link, {rate}")
        if one["why_not"]:
            found.append(f"    {one['why_not']}")
    found += [f"{engine:20}{why}" for engine, why in told["left_out"].items()]
    return found


COMMAND = Command(
    help="why a request went where it went, and reused what it reused",
    extra="router",
    configure=_configure,
    run=_run,
)
