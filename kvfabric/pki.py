"""`kvfabric pki`: a development CA, and certificates for nodes, routers, administrators and Redis.

    DIR/ca/          ca.crt, ca.key: stays where it was made
    DIR/ROLE-NAME/   ca.crt, tls.crt, tls.key: goes to the machine of that process (`tls_dir`)

The names are those of a Kubernetes TLS secret, so certificates of cert-manager fit as they are if they carry
the same names. Who somebody is stands in the certificate as URI `kvfabric://ROLE/NAME`; whom a client meets
is checked by the DNS name `ROLE.kvfabric`, wherever the process runs.
"""

from __future__ import annotations

import argparse
import datetime
import getpass
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfabric.cli import Command
from kvfabric.errors import ConfigError, Conflict

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ROLES = ("node", "router", "admin", "redis")
CA_DAYS, LEAF_DAYS = 3650, 90
CA_FILE, CERT_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_URI = re.compile(r"kvfabric://([a-z]+)/([A-Za-z0-9._-]+)")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate speaks for."""

    role: str
    name: str

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"


def parse_uri(text: str) -> Identity | None:
    """Of a subject alternative name; None if it is no identity of ours."""
    found = _URI.fullmatch(text)
    return Identity(found[1], found[2]) if found and found[1] in ROLES else None


def dns_name(role: str) -> str:
    """What every certificate of a role carries, and what clients ask of whom they meet."""
    return f"{role}.kvfabric"


def init(directory: Path, *, days: int = CA_DAYS) -> None:
    """Make the CA. Raises Conflict if there is one: what it signed would be foreign to a new one."""
    from cryptography import x509

    where = directory / "ca"
    if (where / "ca.key").exists():
        raise Conflict(
            f"{where} holds a CA already: `kvfabric pki issue` makes further certificates"
        )
    key = _new_key()
    name = x509.Name(
        [
            x509.NameAttribute(
                x509.NameOID.COMMON_NAME, f"kvfabric development CA {os.urandom(4).hex()}"
            )
        ]
    )
    builder = _builder(name, name, key, days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    builder = builder.add_extension(_usage(signs=True), critical=True)
    _write(where / "ca.key", _key_pem(key), 0o600)
    _write(where / CA_FILE, _pem(_sign(builder, key)), 0o644)


def issue(
    directory: Path,
    identity: Identity,
    *,
    hosts: Sequence[str] = (),
    days: float = LEAF_DAYS,
) -> Path:
    """Make or renew a certificate; the directory it is in. The key is new each time.

    `hosts`: names and addresses under which the process is reached by clients that check them, as Redis is.
    Raises ConfigError without a CA and for names that could be taken for others.
    """
    from cryptography import x509
    from cryptography.x509 import oid

    if identity.role not in ROLES or not _NAME.fullmatch(identity.name):
        raise ConfigError(
            f"{identity}: a role of {', '.join(ROLES)}, and a name of letters, digits, ._-"
        )
    ca, ca_key = _load_ca(directory)
    key = _new_key()
    dns = [dns_name(identity.role), f"{identity.name}.{dns_name(identity.role)}", "localhost"]
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"kvfabric://{identity.role}/{identity.name}"),
        *map(x509.DNSName, dns),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        *map(_host, hosts),
    ]
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(identity))])
    builder = _builder(subject, ca.subject, key, days)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs=False), True),
        (x509.SubjectAlternativeName(names), False),
        (
            x509.ExtendedKeyUsage(
                [oid.ExtendedKeyUsageOID.SERVER_AUTH, oid.ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            False,
        ),
    ):
        builder = builder.add_extension(extension, critical=critical)
    where = directory / f"{identity.role}-{identity.name}"
    # The certificate last: a process that reloads takes a pair only once it fits.
    _write(where / CA_FILE, _pem(ca), 0o644)
    _write(where / KEY_FILE, _key_pem(key), 0o600)
    _write(where / CERT_FILE, _pem(_sign(builder, ca_key)), 0o644)
    return where


# ---------------------------------------------------------------------- inside


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_ca(directory: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = directory / "ca"
    try:
        key = load_pem_private_key((where / "ca.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((where / CA_FILE).read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"no CA in {where}: `kvfabric pki init {directory}` makes one") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{where}/ca.key is no EC key")
    return certificate, key


def _write(path: Path, data: bytes, mode: int) -> None:
    """By rename: a reader sees the old file or the new one. Raises ConfigError."""
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(temporary, flags, mode), "wb") as file:
            file.write(data)
        temporary.rename(path)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


# ---------------------------------------------------------------------- command


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    make = verbs.add_parser("init", help="make a development CA, and certificates of this machine")
    make.add_argument("directory", metavar="DIR", type=Path)
    make.set_defaults(run_verb=_init)
    give = verbs.add_parser("issue", help="make or renew a certificate")
    give.add_argument("directory", metavar="DIR", type=Path)
    give.add_argument("role", metavar="ROLE", choices=ROLES, help=", ".join(ROLES))
    give.add_argument("name", metavar="NAME", help="of the node, router, administrator")
    give.add_argument("--days", type=float, default=LEAF_DAYS, help="how long it is valid")
    give.set_defaults(run_verb=_issue)
    for verb in (make, give):
        verb.add_argument(
            "--host", action="append", default=[], help="under which it is reached; several times"
        )


def _init(args: argparse.Namespace) -> int:
    init(args.directory)
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())
    for role, name in (("node", host), ("router", host), ("admin", getpass.getuser())):
        print(f"{role}/{name}: {issue(args.directory, Identity(role, name), hosts=args.host)}")
    print(f"The CA's key is {args.directory}/ca/ca.key: keep it off the machines that serve.")
    return 0


def _issue(args: argparse.Namespace) -> int:
    identity = Identity(args.role, args.name)
    where = issue(args.directory, identity, hosts=args.host, days=args.days)
    print(f"{identity}: {where}")
    return 0


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_verb(args)
    return code


COMMAND = Command("make a development CA and certificates", "node", _configure, _run)
