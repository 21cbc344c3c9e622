"""`kvfabric template`: register, list, promote, pin, unpin."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvfabric.daemon.admin_printing import (
    DIGEST_DIGITS,
    client,
    common,
    dump,
    print_json,
    print_lines,
    table,
)
from kvfabric.daemon.receipt_commands import print_receipt
from kvfabric.errors import ConfigError

if TYPE_CHECKING:
    from kvfabric.registry.state import TemplateVersion


def configure_template(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    register = verbs.add_parser("register", help="add a version of a template")
    register.add_argument("name", metavar="NAME")
    register.add_argument("--version", required=True, metavar="V")
    register.add_argument("--file", required=True, metavar="FILE", help="its text; - for stdin")
    register.add_argument(
        "--public", action="store_true", help="its blocks may be shared by all tenants"
    )
    register.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="NAME",
        help="public right behind that public template, not at the start (several: behind any of them)",
    )
    common(register, _template_register)
    common(verbs.add_parser("list", help="templates and their versions"), _template_list)
    promote = verbs.add_parser("promote", help="make a version the serving one, or roll back to it")
    promote.add_argument("name", metavar="NAME")
    promote.add_argument("position", nargs="?", default="", metavar="V")
    promote.add_argument("--version", default="", metavar="V", help="the same as V")
    common(promote, _template_promote)
    pin = verbs.add_parser(
        "pin", help="keep the serving version's blocks in the host tier for a while"
    )
    pin.add_argument("name", metavar="NAME")
    pin.add_argument("--version", default="", metavar="V", help="default: the one that serves")
    pin.add_argument("--ttl", type=float, required=True, metavar="SECONDS", help="then it ends")
    common(pin, _template_pin)
    unpin = verbs.add_parser("unpin", help="end a pin before its time")
    unpin.add_argument("name", metavar="NAME")
    unpin.add_argument("--version", default="", metavar="V", help="default: whichever is pinned")
    common(unpin, _template_unpin)


def _template_register(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.RegisterTemplateRequest(
        name=args.name,
        version=args.version,
        text=_text(args.file),
        is_public=args.public,
        after=args.after,
    )
    with client(args) as node:
        template = node.call(node.registry.RegisterTemplate, request)
    if args.json:
        return print_json(template)
    waits = ""
    if template.state != "serving":
        promote = f"kvfabric template promote {template.name} {template.version}"
        waits = f"; another version serves: `{promote}` switches"
    return print_lines([f"template {template.name} {template.version} is {template.state}{waits}"])


def _text(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc


def _template_list(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.registry.wire import template_to_pb

    with client(args) as node:
        templates = list(node.state().templates.values())
    if args.json:
        return dump({"templates": [to_plain(template_to_pb(t)) for t in templates]})
    rows = [
        (
            template.name,
            template.version,
            template.state,
            _shared(template),
            f"{len(template.text)} bytes",
            _pin(template.pinned_until),
            template.incarnation.hex()[:DIGEST_DIGITS],
        )
        for template in templates
    ]
    header = ("template", "version", "state", "shared", "text", "pinned", "incarnation")
    return print_lines(table(header, rows))


def _pin(until: float) -> str:
    if until <= time.time():
        return "-"
    return f"until {datetime.fromtimestamp(until, UTC).isoformat(timespec='seconds')}"


def _template_pin(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.PinTemplateRequest(name=args.name, version=args.version, ttl_s=args.ttl)
    with client(args) as node:
        template = node.call(node.registry.PinTemplate, request)
    if args.json:
        return print_json(template)
    end = _pin(template.pinned_until)
    return print_lines([f"template {template.name} {template.version} is pinned {end}"])


def _template_unpin(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.UnpinTemplateRequest(name=args.name, version=args.version)
    with client(args) as node:
        template = node.call(node.registry.UnpinTemplate, request)
    if args.json:
        return print_json(template)
    return print_lines([f"template {template.name} {template.version} is not pinned any more"])


def _shared(template: TemplateVersion) -> str:
    if not template.is_public:
        return "-"
    return f"public after {', '.join(template.after)}" if template.after else "public"


def _template_promote(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    version = args.position or args.version
    if not version or (args.position and args.version and args.position != args.version):
        raise ConfigError("name one version: kvfabric template promote NAME V")
    with client(args) as node:
        request = pb.PromoteTemplateRequest(name=args.name, version=version)
        receipt = node.call(node.registry.PromoteTemplate, request)
    return print_receipt(args, receipt)
