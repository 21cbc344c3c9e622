"""Keyring: tenant secrets, data keys and handle keys, wrapped by a root key, in one 0600 file.

Held by nodes and routers only: never by engines, Redis, events or logs. Nodes write, one at a time where they
share it; whoever meets a tenant or key id that it does not know reads again. Nodes of a fleet that share no
file system have one each, and get from each other what they lack (`registry.fleet_keys`).

File: magic, version, 12-byte nonce, AES-256-GCM(root key) over MessagePack. The header is the associated
data. It is replaced by write, fsync, rename, fsync of the directory: a reader sees the old or the new one.

A new root key lies beside the old one as `root.key.next` while the keyring is sealed under it, and takes its
name then: at every moment one of the two opens the file. Writers end what a crash left in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
_CHECK_PERSON, _CHECK_BYTES = b"kvfabric keyring", 16
_NONCE_BYTES = 12
SECRET_BYTES = 32
_READ_TRIES = 3


class _Contents(msgspec.Struct):
    generation: int = 0
    tenant_secrets: dict[str, bytes] = {}
    data_keys: dict[str, bytes] = {}
    handle_keys: dict[int, bytes] = {}
    current_handle_key: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class SharedKeys:
    """What holders of a fleet's keys give each other. Data keys are not among it: SSD files are local.

    `fleet_check`: the giver's `check` of the keys that every keyring has.
    """

    fleet_check: bytes
    tenant_secrets: Mapping[TenantId, bytes]
    handle_keys: Mapping[int, bytes]
    current_handle_key: int


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
            self._add_data_keys()
            return
        first = (DEFAULT_TENANT, PUBLIC_TENANT)
        self._save(
            _Contents(
                generation=1,
                tenant_secrets={name: secrets.token_bytes(SECRET_BYTES) for name in first},
                data_keys={name: secrets.token_bytes(SECRET_BYTES) for name in first},
                handle_keys={1: secrets.token_bytes(SECRET_BYTES)},
                current_handle_key=1,
            )
        )

    def _add_data_keys(self) -> None:
        """Of tenants that an earlier release made."""
        known = self._contents
        lacking = known.tenant_secrets.keys() - known.data_keys.keys()
        if lacking:
            fresh = {name: secrets.token_bytes(SECRET_BYTES) for name in lacking}
            self._save(msgspec.structs.replace(known, data_keys={**known.data_keys, **fresh}))

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

    @property
    def num_tenants(self) -> int:
        return len(self._contents.tenant_secrets)

    def reload(self) -> None:
        """Read the file again. Raises ConfigError if it is missing, exposed or not ours."""
        for _ in range(_READ_TRIES):
            _root_key(self._root_key_path)
            self._read_file = self._file_now()
            raw = _read_private(self._path)
            if raw[: len(_MAGIC)] != _MAGIC or len(raw) < len(_MAGIC) + _NONCE_BYTES:
                raise ConfigError(f"{self._path} is not a keyring of this version")
            plain = self._opened(raw, self._root_key_path)
            if plain is None and self._next_root_path.exists():
                with contextlib.suppress(ConfigError):  # it has taken its name meanwhile
                    plain = self._opened(raw, self._next_root_path)
            if plain is not None:
                break  # else a rotation may have passed between two reads
        else:
            raise ConfigError(f"{self._path} does not open with {self._root_key_path}")
        try:
            contents = msgspec.msgpack.decode(plain, type=_Contents)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ConfigError(f"{self._path} is damaged: {exc}") from exc
        if contents.current_handle_key not in contents.handle_keys:
            raise ConfigError(f"{self._path} is damaged: it lacks its current handle key")
        self._contents = contents

    def _opened(self, raw: bytes, root_key_path: Path) -> bytes | None:
        head = len(_MAGIC) + _NONCE_BYTES
        try:
            root = _root_key(root_key_path)
            return AESGCM(root).decrypt(raw[len(_MAGIC) : head], raw[head:], _MAGIC)
        except InvalidTag:
            return None

    def has_keys(self, tenant: TenantId) -> bool:
        self._refresh()
        known = self._contents
        return tenant in known.tenant_secrets or tenant in known.data_keys

    def data_key(self, tenant: TenantId) -> bytes:
        """32 bytes, under which the tenant's blocks on SSD are encrypted. Raises UnknownTenant."""
        if tenant not in self._contents.data_keys:
            self._refresh()
        try:
            return self._contents.data_keys[tenant]
        except KeyError:
            raise UnknownTenant(f"no data key for tenant {tenant}") from None

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

    def check(self, tenant: TenantId) -> bytes:
        """16 bytes that tell whether two keyrings have the same secret for a tenant, and nothing of the
        secret (256 random bits cannot be searched); empty without one. Those of every keyring have one
        together."""
        self._refresh()
        return self._check(tenant)

    def _check(self, tenant: TenantId) -> bytes:
        known = self._contents.tenant_secrets
        names = _OF_EVERY_KEYRING if tenant in _OF_EVERY_KEYRING else (tenant,)
        if not all(name in known for name in names):
            return b""
        return _check_of(known[name] for name in names)

    def read_generation(self) -> int:
        """Of the file as it is now."""
        self._refresh()
        return self._contents.generation

    def lacking(self, checks: Mapping[TenantId, bytes]) -> dict[TenantId, bytes]:
        """Those of which this has no secret, or another one."""
        self._refresh()
        return {name: check for name, check in checks.items() if self._check(name) != check}

    def shared(self, tenants: Collection[TenantId]) -> SharedKeys:
        """For another holder: secrets of these tenants, as far as they are here, and handle keys."""
        fleet_check = self.check(PUBLIC_TENANT)
        known = self._contents
        return SharedKeys(
            fleet_check,
            {name: known.tenant_secrets[name] for name in tenants if name in known.tenant_secrets},
            dict(known.handle_keys),
            known.current_handle_key,
        )

    def adopt(self, given: SharedKeys, checks: Mapping[TenantId, bytes]) -> frozenset[TenantId]:
        """Take in, durably, secrets that have these checks, and handle keys that are newer than ours, or of
        the fleet that we were not of; a tenant's data key stays, or is made. Whose secrets were taken."""
        with self._locked():
            self.reload()
            known = self._contents
            secrets_now, data_keys = dict(known.tenant_secrets), dict(known.data_keys)
            taken: set[TenantId] = set()
            for tenant, check in checks.items():
                names = _OF_EVERY_KEYRING if tenant in _OF_EVERY_KEYRING else (tenant,)
                found = [given.tenant_secrets.get(name, b"") for name in names]
                if _check_of(found) == check:
                    secrets_now.update(zip(names, found, strict=True))
                    taken.update(names)
            for name in taken - data_keys.keys():
                data_keys[name] = secrets.token_bytes(SECRET_BYTES)
            handle_keys = given.handle_keys, given.current_handle_key
            if not taken.intersection(_OF_EVERY_KEYRING) and (
                given.current_handle_key <= known.current_handle_key
            ):
                handle_keys = known.handle_keys, known.current_handle_key
            if taken or handle_keys[1] != known.current_handle_key:
                self._save(
                    _Contents(
                        known.generation,
                        secrets_now,
                        data_keys,
                        dict(handle_keys[0]),
                        handle_keys[1],
                    )
                )
        return frozenset(taken)

    def add_tenant(self, tenant: TenantId) -> None:
        """Give a tenant a random secret and data key, durably. A tenant that has them keeps them."""
        with self._locked():
            self.reload()
            known = self._contents
            if tenant not in known.tenant_secrets:
                secret, data_key = (secrets.token_bytes(SECRET_BYTES) for _ in range(2))
                self._save(
                    msgspec.structs.replace(
                        known,
                        tenant_secrets={**known.tenant_secrets, tenant: secret},
                        data_keys={**known.data_keys, tenant: data_key},
                    )
                )

    def remove_tenants(self, tenants: Collection[TenantId]) -> frozenset[TenantId]:
        """Forget their secrets and data keys, durably, and rotate the root key, so that a copy of an earlier
        keyring does not open with what lies here. Those that had any; without one nothing changes."""
        with self._locked():
            self.reload()
            known = self._contents
            held = known.tenant_secrets.keys() | known.data_keys.keys()
            gone = frozenset(tenant for tenant in tenants if tenant in held)
            if gone:
                self._save_under_new_root(
                    msgspec.structs.replace(
                        known,
                        tenant_secrets=_without(known.tenant_secrets, gone),
                        data_keys=_without(known.data_keys, gone),
                    )
                )
        return gone

    def rotate_root_key(self) -> int:
        """Seal the keyring under a new root key; the old one is gone. Returns the new generation."""
        with self._locked():
            self.reload()
            self._save_under_new_root(msgspec.structs.replace(self._contents))
        return self._contents.generation

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
            self._end_rotation()
            yield
        finally:
            os.close(descriptor)

    @property
    def _next_root_path(self) -> Path:
        return self._root_key_path.with_name(self._root_key_path.name + ".next")

    def _save_under_new_root(self, contents: _Contents) -> None:
        _write_private(self._next_root_path, secrets.token_bytes(SECRET_BYTES))
        failpoint("keyring.root.next")
        self._save(contents, self._next_root_path)
        failpoint("keyring.root.sealed")
        self._end_rotation()

    def _end_rotation(self) -> None:
        """Of the two root keys of a rotation, also of one that died, keep the one that opens the file."""
        if not self._next_root_path.exists():
            return
        raw = _read_private(self._path)
        try:
            if self._opened(raw, self._next_root_path) is None:
                self._next_root_path.unlink()
            else:
                self._next_root_path.rename(self._root_key_path)
            _sync_directory(self._root_key_path.parent)
        except OSError as exc:
            raise ConfigError(f"cannot replace {self._root_key_path}: {exc.strerror}") from exc

    def _save(self, contents: _Contents, root_key_path: Path | None = None) -> None:
        """Durable first, in force then: nobody gets a secret that a restart would lose."""
        contents.generation += 1
        nonce = secrets.token_bytes(_NONCE_BYTES)
        root = _root_key(root_key_path or self._root_key_path)
        sealed = AESGCM(root).encrypt(nonce, msgspec.msgpack.encode(contents), _MAGIC)
        _write_private(self._path, _MAGIC + nonce + sealed)
        self._contents, self._read_file = contents, self._file_now()


class MemoryKeyring(Keyring):
    """Of a router that shares no file with a node: what it has goes with the process."""

    def __init__(self) -> None:
        super().__init__(Path(), Path())

    @property
    def is_empty(self) -> bool:
        return not self._contents.handle_keys

    def reload(self) -> None:
        """There is nothing to read."""

    def _refresh(self) -> None: ...

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        yield

    def _save(self, contents: _Contents, root_key_path: Path | None = None) -> None:
        contents.generation += 1
        self._contents = contents

    def _save_under_new_root(self, contents: _Contents) -> None:
        self._save(contents)


_OF_EVERY_KEYRING = (DEFAULT_TENANT, PUBLIC_TENANT)


def _check_of(secrets_of: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_CHECK_BYTES, person=_CHECK_PERSON)
    for secret in secrets_of:
        digest.update(secret)
    return digest.digest()


def _without(keys: dict[str, bytes], gone: Collection[str]) -> dict[str, bytes]:
    return {name: key for name, key in keys.items() if name not in gone}


def _root_key(path: Path) -> bytes:
    root = _read_private(path)
    if len(root) != SECRET_BYTES:
        raise ConfigError(f"{path} is no root key: it has {len(root)} bytes")
    return root


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
        _sync_directory(path.parent)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def hide_memory() -> None:
    """For a process that holds secrets: no core dump, and no other process of our user may look in."""
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("the memory of this process may end up in core dumps")
