"""Where a fleet's directory is: the address that `--directory` takes, and connections to it.

    redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]              plain TCP; only with `insecure`
    rediss://...                                            TLS
    unix:///PATH[?db=DB]                                    Unix socket
    redis+sentinel://[USER@]HOST[:PORT][,HOST...]/PRIMARY   the primary that these Sentinels name
    rediss+sentinel://...                                   so, over TLS

Options after `?`: `fabric` (name of the fleet, default `default`: several may share a Redis), `replicas`
(how many must have a change before it counts, default 0: a majority of them where a primary can fail over),
`user`, `password_file` (0600; keeps the password out of `ps`), `ca`, `cert`, `key` (files, for TLS).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from kvfabric.errors import ConfigError

REDIS_PORT, SENTINEL_PORT = 6379, 26379
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_OPTIONS = {"fabric", "replicas", "user", "password_file", "ca", "cert", "key", "db"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class DirectoryAddress:
    """A parsed address. `repr` and `shown` hold no password."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    primary: str = ""
    db: int = 0
    fabric: str = "default"
    replicas: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    tls_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_plain_tcp(self) -> bool:
        return self.scheme in ("redis", "redis+sentinel")

    @property
    def prefix(self) -> str:
        """Of every key and channel."""
        return f"kvfabric:{self.fabric}:"

    @property
    def shown(self) -> str:
        where = ",".join(f"{host}:{port}" for host, port in self.hosts) + self.path
        if self.primary:
            where += f"/{self.primary}"
        return f"{self.scheme}://{where} fabric {self.fabric}"


def parse(text: str, *, insecure: bool) -> DirectoryAddress:
    """Raises ConfigError, which repeats no password."""
    scheme, _, _ = text.partition("://")
    if scheme not in _SCHEMES:
        raise ConfigError(f"directory: {scheme!r} is none of {', '.join(_SCHEMES)} (as SCHEME://)")
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError as exc:
        raise ConfigError(f"directory: this {scheme} address cannot be read: {exc}") from None
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ConfigError(f"directory: unknown option {', '.join(unknown)}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    sentinel = scheme.endswith("+sentinel")
    rest = parts.path.lstrip("/")
    address = DirectoryAddress(
        scheme=scheme,
        hosts=() if scheme == "unix" else _hosts(hosts, SENTINEL_PORT if sentinel else REDIS_PORT),
        path=parts.path if scheme == "unix" else "",
        primary=rest if sentinel else "",
        db=_number(options.get("db") or ("" if sentinel or scheme == "unix" else rest), "db"),
        fabric=options.get("fabric", "default"),
        replicas=_number(options.get("replicas", ""), "replicas"),
        user=options.get("user", unquote(user)),
        password=unquote(password),
        password_file=options.get("password_file", ""),
        tls_files={name: options[name] for name in ("ca", "cert", "key") if name in options},
    )
    _check(address, insecure)
    return address


def _check(address: DirectoryAddress, insecure: bool) -> None:
    if address.scheme == "unix" and not address.path:
        raise ConfigError("directory: unix:// needs the path of a socket")
    if address.scheme.endswith("+sentinel") and not address.primary:
        raise ConfigError("directory: which primary do the Sentinels name? add /NAME")
    if not _NAME.fullmatch(address.fabric):
        raise ConfigError(f"directory: fabric {address.fabric!r}: use letters, digits and ._-")
    if address.tls_files and not address.scheme.startswith("rediss"):
        raise ConfigError("directory: ca, cert and key are for rediss://")
    if address.is_plain_tcp and not insecure:
        raise ConfigError(
            f"directory: {address.scheme}:// is plain TCP, where anybody on the way reads and changes "
            f"epochs: use {address.scheme.replace('redis', 'rediss')}:// or unix://, or say --insecure"
        )


def _hosts(text: str, port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for part in text.split(","):
        host, colon, digits = part.rpartition(":")
        if not colon or digits.endswith("]"):
            host, digits = part, str(port)
        if not host or not digits.isdigit() or int(digits) > 65535:
            raise ConfigError(f"directory: {part!r} is no HOST or HOST:PORT")
        found.append((host.strip("[]"), int(digits)))
    return tuple(found)


def _number(text: str, what: str) -> int:
    if text and not text.isdigit():
        raise ConfigError(f"directory: {what} is {text!r}; it must be a number")
    return int(text or 0)


def _password(address: DirectoryAddress) -> str:
    """Read anew for each client: it may be rotated. Raises ConfigError."""
    if not address.password_file:
        return address.password
    path = Path(address.password_file)
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"directory: {path} is readable by others: chmod 600 it")
        return path.read_text().strip()
    except OSError as exc:
        raise ConfigError(f"directory: cannot read {path}: {exc.strerror}") from exc


class Link:
    """A client with one connection, which is opened when it is first used.

    One connection, because WAIT speaks of the writes of its own. Nothing is sent twice by itself: whether
    a change that got no answer was made is found out by its audit head.
    """

    def __init__(self, address: DirectoryAddress, *, timeout_s: float) -> None:
        """Raises ConfigError if the password's file cannot be read."""
        self.timeout_s = timeout_s
        self._sentinel: Sentinel | None = None
        options = _options(address, timeout_s)
        if address.primary:
            tls = {"ssl": True} if address.scheme.startswith("rediss") else {}
            # The Sentinels are asked with the same TLS files, but by nobody in particular.
            plain = {k: v for k, v in options.items() if k.startswith(("socket", "ssl", "retry"))}
            self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
                address.hosts, sentinel_kwargs=plain | tls, **options, **tls
            )
            self.client = self._sentinel.master_for(address.primary)
            return
        if address.path:
            pool = ConnectionPool(UnixDomainSocketConnection, path=address.path, **options)
        else:
            (host, port), *_ = address.hosts
            kind = SSLConnection if address.scheme.startswith("rediss") else Connection
            pool = ConnectionPool(kind, host=host, port=port, **options)
        self.client = Redis.from_pool(pool)

    async def aclose(self) -> None:
        await self.client.aclose()
        if self._sentinel is not None:
            for client in self._sentinel.sentinels:
                await client.aclose()


def _options(address: DirectoryAddress, timeout_s: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "db": address.db,
        "username": address.user or None,
        "password": _password(address) or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": 1,
    }
    if address.scheme.startswith("rediss"):
        options |= {"ssl_check_hostname": True, "ssl_cert_reqs": "required"}
        names = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
        options |= {names[name]: path for name, path in address.tls_files.items()}
    return options
