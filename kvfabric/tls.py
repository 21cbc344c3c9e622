"""mTLS of the gRPC plane: what a process proves itself by, whom it believes, and channels that say why not.

`tls_dir` holds ca.crt, tls.crt and tls.key. They are read again for each connection when they changed; a new
pair that does not fit yet, or that nobody could use, leaves the old one in force.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from kvfabric.errors import ConfigError
from kvfabric.pki import CA_FILE, CERT_FILE, KEY_FILE, Identity, dns_name, parse_uri

PROBE_S = 2.0
SERVER_NAME = "grpc.ssl_target_name_override"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """A pair that fits, with its CA; PEM."""

    ca: bytes
    cert: bytes
    key: bytes
    identity: Identity
    not_after: datetime.datetime


def load(directory: Path) -> Material:
    """Raises ConfigError that names the file and what is wrong with it."""
    ca_pem, cert_pem, key_pem = (_read(directory / name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
    try:
        ca, cert = (x509.load_pem_x509_certificate(pem) for pem in (ca_pem, cert_pem))
        key = load_pem_private_key(key_pem, None)
    except ValueError as exc:
        raise ConfigError(f"{directory}: a certificate or key cannot be read: {exc}") from exc
    if _public(key.public_key()) != _public(cert.public_key()):
        raise ConfigError(f"{directory}/{KEY_FILE} is not the key of {CERT_FILE}")
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise ConfigError(f"{directory}/{CERT_FILE} is foreign: {CA_FILE} did not sign it") from exc
    now = datetime.datetime.now(datetime.UTC)
    for name, one in ((CERT_FILE, cert), (CA_FILE, ca)):
        if one.not_valid_after_utc <= now:
            raise ConfigError(
                f"{directory}/{name} expired at {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: "
                "`kvfabric pki issue` renews it"
            )
        if one.not_valid_before_utc > now:
            raise ConfigError(
                f"{directory}/{name} is not valid yet: is this machine's clock right?"
            )
    identity = identity_of(cert)
    if identity is None:
        raise ConfigError(f"{directory}/{CERT_FILE} names no kvfabric://ROLE/NAME")
    return Material(ca_pem, cert_pem, key_pem, identity, cert.not_valid_after_utc)


def identity_of(cert: x509.Certificate) -> Identity | None:
    with contextlib.suppress(x509.ExtensionNotFound):
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris: Iterable[str] = names.get_values_for_type(x509.UniformResourceIdentifier)
        return next(filter(None, map(parse_uri, uris)), None)
    return None


def peer_identity(names: Iterable[bytes]) -> Identity | None:
    """Out of the subject alternative names that gRPC found in a peer's certificate."""
    texts = (name.decode(errors="replace") for name in names)
    return next(filter(None, map(parse_uri, texts)), None)


class Reloaded:
    """The newest material of a directory that is fit for use."""

    def __init__(self, directory: Path, role: str) -> None:
        """Raises ConfigError unless it is fit, and of that role."""
        self._directory = directory
        self._seen = self._stamp()
        self.material = load(directory)
        if self.material.identity.role != role:
            raise ConfigError(
                f"{directory}/{CERT_FILE} is of {self.material.identity}, and a {role} needs one of its own"
            )

    def __repr__(self) -> str:
        return f"<Reloaded {self._directory}: {self.material.identity}>"

    def refresh(self) -> bool:
        """Read again if a file changed; whether there is something new."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self.material = load(self._directory)
        except ConfigError as exc:
            log.warning("the certificate before stays in use: %s", exc)
            return False
        log.info("certificate of %s renewed", self.material.identity)
        return True

    def _stamp(self) -> tuple[int, ...]:
        stamps = []
        for name in (CA_FILE, CERT_FILE, KEY_FILE):
            with contextlib.suppress(OSError):
                status = (self._directory / name).stat()
                stamps += [status.st_ino, status.st_mtime_ns]
        return tuple(stamps)


def server_credentials(source: Reloaded) -> Any:
    """Clients must have a certificate of the same CA. Each new connection gets the newest pair."""

    def config() -> Any:
        material = source.material
        pair = (material.key, material.cert)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=material.ca)

    def fetch() -> Any:
        return config() if source.refresh() else None

    return grpc.dynamic_ssl_server_credentials(config(), fetch, require_client_authentication=True)


@dataclass(frozen=True, slots=True)
class Security:
    """How a process reaches others over TCP. `tls_dir` None: not at all, or plain with `insecure`."""

    role: str
    tls_dir: Path | None = None
    insecure: bool = False


def open_channel(
    target: str, security: Security, options: Iterable[tuple[str, Any]], *, blocking: bool = False
) -> Any:
    """To `unix:PATH` or a node's `HOST:PORT`; of grpc.aio, or of grpc if `blocking`.

    Raises ConfigError if this process has no valid certificate.
    """
    module: Any = grpc if blocking else grpc.aio
    if target.startswith("unix:"):
        return module.insecure_channel(target, options=list(options))
    if security.tls_dir is None:
        if not security.insecure:
            raise ConfigError(
                f"{target} is reached over TCP: it needs --tls-dir (`kvfabric pki init`)"
            )
        return module.insecure_channel(target, options=list(options))
    material = Reloaded(security.tls_dir, security.role).material
    credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
    named = [*options, (SERVER_NAME, dns_name("node"))]
    return module.secure_channel(target, credentials, options=named)


def diagnose(target: str, security: Security) -> str:
    """Why TLS with `target` fails, found by trying; empty if it does not. Blocks for at most 4 s."""
    if security.tls_dir is None or target.startswith("unix:"):
        return ""
    host, _, port = target.rpartition(":")
    directory = security.tls_dir
    try:
        identity = load(directory).identity
        context = ssl.create_default_context(cafile=str(directory / CA_FILE))
        context.load_cert_chain(directory / CERT_FILE, directory / KEY_FILE)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=dns_name("node")) as secured,
        ):
            # What the other side thinks of us comes after the handshake: gRPC greets, or closes.
            if not secured.recv(1):
                return f"{target} refuses the certificate of {identity}: its log says why"
    except ssl.SSLCertVerificationError as exc:
        return f"the certificate of {target} is refused: {exc.verify_message}"
    except ssl.SSLError as exc:
        return f"{target} refuses this process's certificate: {exc.reason or exc}"
    except ConfigError as exc:
        return str(exc)
    except (OSError, ValueError) as exc:
        return "" if isinstance(exc, TimeoutError) else f"{target} cannot be reached: {exc}"
    return ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc


def _public(key: Any) -> bytes:
    data: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data
