"""Keyring: tenant secrets and handle keys, wrapped by a root key, in one 0600 file.

Held by nodes and routers only: never by engines, Redis, events or logs. Nodes write, one at a time where they
share it; whoever meets a tenant or key id that it does not know reads again.

File: magic, version, 12-byte nonce, AES-256-GCM(root key) over MessagePack. The header is the associated
data. It is replaced by write, fsync, rename, fsync of the directory: a reader sees the old or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvfabric.errors import ConfigError, UnknownTenant
from kvfabric.failpoints import failpoint
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, TenantId

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4
_MAGIC = b"KVFKEYS1"
_NONCE_BYTES = 12
SECRET_BYTES = 32


class _Contents(msgspec.Struct):
    generation: int = 0
    tenant_secrets: dict[str, bytes] = {}
    handle_keys: dict[int, bytes] = {}
    current_handle_key: int = 0


class Keyring:
    """Secrets in memory, backed by a file. `repr` shows no secret."""

    def __init__(self, path: Path, root_key_path: Path) -> None:
        self._path = path
        self._root_key_path = root_key_path
        self._contents = _Contents()
        self._read_file = (0, 0)

    @classmethod
    def create_or_open(cls, directory: Path) -> Keyring:
        """The node's way in: makes root key and keyring at first start, with 0600 on both."""
        keyring = cls(directory / "keyring", directory / "root.key")
        with keyring._locked():
            keyring._create_or_open(directory)
        return keyring

    def _create_or_open(self, directory: Path) -> None:
        if not self._root_key_path.exists():
            if self._path.exists():
                raise ConfigError(
                    f"{self._path} exists but its root key {directory}/root.key does not"
                )
            _write_private(self._root_key_path, secrets.token_bytes(SECRET_BYTES))
        if self._path.exists():
            self.reload()
            return
        self._save(
            _Contents(
                generation=1,
                tenant_secrets={
                    DEFAULT_TENANT: secrets.token_bytes(SECRET_BYTES),
                    PUBLIC_TENANT: secrets.token_bytes(SECRET_BYTES),
                },
                handle_keys={1: secrets.token_bytes(SECRET_BYTES)},
                current_handle_key=1,
            )
        )

    @classmethod
    def open(cls, directory: Path) -> Keyring:
        """The router's way in: reads what a node made."""
        keyring = cls(directory / "keyring", directory / "root.key")
        keyring.reload()
        return keyring

    def __repr__(self) -> str:
        c = self._contents
        return (
            f"<Keyring generation {c.generation}: {len(c.tenant_secrets)} tenants, "
            f"handle keys {sorted(c.handle_keys)}>"
        )

    @property
    def generation(self) -> int:
        return self._contents.generation

    def reload(self) -> None:
        """Read the file again. Raises ConfigError if it is missing, exposed or not ours."""
        root = self._root_key()
        self._read_file = self._file_now()
        raw = _read_private(self._path)
        head = len(_MAGIC) + _NONCE_BYTES
        if raw[: len(_MAGIC)] != _MAGIC or len(raw) < head:
            raise ConfigError(f"{self._path} is not a keyring of this version")
        nonce = raw[len(_MAGIC) : head]
        try:
            plain = AESGCM(root).decrypt(nonce, raw[head:], _MAGIC)
        except InvalidTag as exc:
            raise ConfigError(f"{self._path} does not open with {self._root_key_path}") from exc
        try:
            contents = msgspec.msgpack.decode(plain, type=_Contents)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ConfigError(f"{self._path} is damaged: {exc}") from exc
        if contents.current_handle_key not in contents.handle_keys:
            raise ConfigError(f"{self._path} is damaged: it lacks its current handle key")
        self._contents = contents

    def tenant_secret(self, tenant: TenantId) -> bytes:
        """32 bytes. Raises UnknownTenant."""
        if tenant not in self._contents.tenant_secrets:
            self._refresh()
        try:
            return self._contents.tenant_secrets[tenant]
        except KeyError:
            raise UnknownTenant(f"no secret for tenant {tenant}") from None

    def handle_keys(self) -> dict[int, bytes]:
        """Every handle key in force, by id."""
        self._refresh()
        return dict(self._contents.handle_keys)

    def current_handle_key(self) -> tuple[int, bytes]:
        key_id = self._contents.current_handle_key
        return key_id, self._contents.handle_keys[key_id]

    def add_tenant(self, tenant: TenantId) -> None:
        """Give a tenant a random secret, durably. A tenant that has one keeps it."""
        with self._locked():
            self.reload()
            known = self._contents.tenant_secrets
            if tenant not in known:
                added = {**known, tenant: secrets.token_bytes(SECRET_BYTES)}
                self._save(msgspec.structs.replace(self._contents, tenant_secrets=added))

    def rotate_handle_key(self) -> int:
        """A new current handle key; the one before stays valid, older ones end. Returns its id."""
        with self._locked():
            self.reload()
            known = self._contents
            fresh = known.current_handle_key + 1
            keys = {
                known.current_handle_key: known.handle_keys[known.current_handle_key],
                fresh: secrets.token_bytes(SECRET_BYTES),
            }
            self._save(msgspec.structs.replace(known, handle_keys=keys, current_handle_key=fresh))
        return fresh

    def _refresh(self) -> None:
        """Read again if another node wrote since. What cannot be read leaves what was read before."""
        if self._file_now() != self._read_file:
            try:
                self.reload()
            except ConfigError as exc:
                log.warning("keyring: %s", exc)

    def _file_now(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the nodes that write this file. Waits for another one, which takes milliseconds."""
        path = self._path.with_name("keyring.lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _root_key(self) -> bytes:
        root = _read_private(self._root_key_path)
        if len(root) != SECRET_BYTES:
            raise ConfigError(f"{self._root_key_path} is no root key: it has {len(root)} bytes")
        return root

    def _save(self, contents: _Contents) -> None:
        """Durable first, in force then: nobody gets a secret that a restart would lose."""
        contents.generation += 1
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(self._root_key()).encrypt(nonce, msgspec.msgpack.encode(contents), _MAGIC)
        _write_private(self._path, _MAGIC + nonce + sealed)
        self._contents, self._read_file = contents, self._file_now()


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise ConfigError(
                    f"{path} is readable by others (mode {stat.S_IMODE(mode):o}): chmod 600 it"
                )
            return file.read()
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        failpoint("keyring.written")
        temporary.rename(path)
        failpoint("keyring.renamed")
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def hide_memory() -> None:
    """For a process that holds secrets: no core dump, and no other process of our user may look in."""
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("the memory of this process may end up in core dumps")
