"""The keyring: private, durable, and closed to whoever lacks the root key."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from kvfabric import failpoints
from kvfabric.errors import ConfigError, UnknownTenant
from kvfabric.keyring import Keyring, MemoryKeyring
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, TenantId

ACME = TenantId("t-acme")


def test_first_start_makes_private_files(tmp_path: Path) -> None:
    Keyring.create_or_open(tmp_path)
    for name in ("keyring", "root.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_secrets_survive_reopening_and_differ(tmp_path: Path) -> None:
    first = Keyring.create_or_open(tmp_path)
    first.add_tenant(ACME)
    again = Keyring.open(tmp_path)
    names = [DEFAULT_TENANT, PUBLIC_TENANT, ACME]
    assert [again.tenant_secret(n) for n in names] == [first.tenant_secret(n) for n in names]
    assert len({again.tenant_secret(n) for n in names}) == 3


def test_adding_a_tenant_twice_keeps_its_secret(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    keyring.add_tenant(ACME)
    secret = keyring.tenant_secret(ACME)
    keyring.add_tenant(ACME)
    assert keyring.tenant_secret(ACME) == secret


def test_reader_sees_a_new_tenant_when_it_meets_it(tmp_path: Path) -> None:
    node = Keyring.create_or_open(tmp_path)
    router = Keyring.open(tmp_path)
    node.add_tenant(ACME)
    assert router.tenant_secret(ACME) == node.tenant_secret(ACME)
    assert router.generation == node.generation


def test_nodes_that_share_it_write_one_after_the_other(tmp_path: Path) -> None:
    nodes = [Keyring.create_or_open(tmp_path) for _ in range(2)]
    names = [TenantId(f"t-{number}") for number in range(8)]
    with ThreadPoolExecutor(2) as pool:
        for number, name in enumerate(names):
            pool.submit(nodes[number % 2].add_tenant, name)
    secrets = {name: nodes[0].tenant_secret(name) for name in names}
    assert secrets == {name: nodes[1].tenant_secret(name) for name in names}
    assert len(set(secrets.values())) == len(names)


def test_rotation_keeps_two_handle_keys(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    first = keyring.current_handle_key()
    second = keyring.rotate_handle_key()
    assert set(keyring.handle_keys()) == {first[0], second}
    third = keyring.rotate_handle_key()
    assert set(keyring.handle_keys()) == {second, third}
    assert keyring.current_handle_key()[0] == third


def test_repr_shows_no_secret(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    shown = repr(keyring)
    secrets = [keyring.tenant_secret(DEFAULT_TENANT), keyring.current_handle_key()[1]]
    assert not any(secret.hex() in shown or repr(secret) in shown for secret in secrets)


def test_file_holds_no_secret_in_clear(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    assert keyring.tenant_secret(DEFAULT_TENANT) not in (tmp_path / "keyring").read_bytes()


def test_wrong_root_key_is_refused(tmp_path: Path) -> None:
    Keyring.create_or_open(tmp_path)
    (tmp_path / "root.key").write_bytes(bytes(32))
    with pytest.raises(ConfigError, match="does not open"):
        Keyring.open(tmp_path)


def test_changed_byte_is_refused(tmp_path: Path) -> None:
    Keyring.create_or_open(tmp_path)
    raw = bytearray((tmp_path / "keyring").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "keyring").write_bytes(raw)
    with pytest.raises(ConfigError, match="does not open"):
        Keyring.open(tmp_path)


def test_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Keyring.create_or_open(tmp_path)
    (tmp_path / "root.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keyring.open(tmp_path)


def test_lost_root_key_is_not_replaced(tmp_path: Path) -> None:
    """A new root key beside an old keyring would silently orphan every stored block."""
    Keyring.create_or_open(tmp_path)
    (tmp_path / "root.key").unlink()
    with pytest.raises(ConfigError, match="root key"):
        Keyring.create_or_open(tmp_path)


def test_missing_keyring_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root\.key"):
        Keyring.open(tmp_path)


@pytest.mark.parametrize("name", ["keyring", "root.key"])
@pytest.mark.parametrize("length", [0, 12])
def test_cut_short_file_is_named(tmp_path: Path, name: str, length: int) -> None:
    Keyring.create_or_open(tmp_path)
    os.truncate(tmp_path / name, length)
    with pytest.raises(ConfigError, match=name):
        Keyring.open(tmp_path)


def test_secret_that_was_not_written_is_nobodys(tmp_path: Path) -> None:
    """While the file cannot be replaced no tenant gets a secret that a restart would lose."""
    keyring = Keyring.create_or_open(tmp_path)
    (tmp_path / "keyring.new").mkdir()
    for change in (lambda: keyring.add_tenant(ACME), keyring.rotate_handle_key):
        with pytest.raises(ConfigError, match="cannot write"):
            change()
    with pytest.raises(UnknownTenant):
        keyring.tenant_secret(ACME)
    assert keyring.current_handle_key() == Keyring.open(tmp_path).current_handle_key()
    (tmp_path / "keyring.new").rmdir()
    keyring.add_tenant(ACME)
    assert Keyring.open(tmp_path).tenant_secret(ACME) == keyring.tenant_secret(ACME)


def test_rotating_the_root_key_keeps_every_secret_and_closes_older_copies(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    keyring.add_tenant(ACME)
    reader = Keyring.open(tmp_path)
    secrets = (keyring.tenant_secret(ACME), keyring.data_key(ACME), keyring.handle_keys())
    backup, root = (tmp_path / "keyring").read_bytes(), (tmp_path / "root.key").read_bytes()
    generation = keyring.generation
    assert keyring.rotate_root_key() == generation + 1
    assert (tmp_path / "root.key").read_bytes() != root
    assert not (tmp_path / "root.key.next").exists()
    assert stat.S_IMODE((tmp_path / "root.key").stat().st_mode) == 0o600
    reader.reload()
    for one in (keyring, reader, Keyring.open(tmp_path)):
        assert (one.tenant_secret(ACME), one.data_key(ACME), one.handle_keys()) == secrets
    (tmp_path / "keyring").write_bytes(backup)
    with pytest.raises(ConfigError, match="does not open"):
        Keyring.open(tmp_path)


@pytest.mark.parametrize(
    "point",
    ["keyring.written:1", "keyring.renamed:1", "keyring.root.next:1", "keyring.written:2",
     "keyring.renamed:2", "keyring.root.sealed:1"],
)  # fmt: skip
def test_a_rotation_that_dies_anywhere_loses_nothing(tmp_path: Path, point: str) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    secret = keyring.tenant_secret(DEFAULT_TENANT)
    code = (
        "import sys, pathlib; from kvfabric.keyring import Keyring; "
        "Keyring.create_or_open(pathlib.Path(sys.argv[1])).rotate_root_key()"
    )
    environment = {**os.environ, failpoints.VARIABLE: point}
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=False)
    assert ended.returncode == -9
    assert Keyring.open(tmp_path).tenant_secret(DEFAULT_TENANT) == secret
    keyring.add_tenant(ACME)  # a writer ends what the crash left
    assert not (tmp_path / "root.key.next").exists()
    assert Keyring.open(tmp_path).tenant_secret(DEFAULT_TENANT) == secret
    assert Keyring.open(tmp_path).tenant_secret(ACME) == keyring.tenant_secret(ACME)


def test_readers_open_it_at_every_moment_of_a_rotation(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        rotations = pool.submit(lambda: [keyring.rotate_root_key() for _ in range(50)])
        reads = 0
        while not rotations.done():
            Keyring.open(tmp_path)
            reads += 1
        assert rotations.result()
    assert reads > 10


def test_a_removed_tenant_has_neither_secret_nor_data_key_anywhere(tmp_path: Path) -> None:
    node, other = Keyring.create_or_open(tmp_path), Keyring.create_or_open(tmp_path)
    node.add_tenant(ACME)
    root = (tmp_path / "root.key").read_bytes()
    assert other.remove_tenants([ACME, TenantId("t-never")]) == {ACME}
    assert (tmp_path / "root.key").read_bytes() != root
    node.reload()
    for keyring in (node, other, Keyring.open(tmp_path)):
        for secret_of in (keyring.tenant_secret, keyring.data_key):
            with pytest.raises(UnknownTenant):
                secret_of(ACME)
    generation = other.generation
    assert other.remove_tenants([ACME]) == frozenset()
    assert other.generation == generation, "nothing to do is nothing done"


def test_tenants_of_an_earlier_release_get_data_keys(tmp_path: Path) -> None:
    old = Keyring.create_or_open(tmp_path)
    old._save(msgspec.structs.replace(old._contents, data_keys={}))
    again = Keyring.create_or_open(tmp_path)
    assert len(again.data_key(DEFAULT_TENANT)) == 32
    assert Keyring.open(tmp_path).data_key(PUBLIC_TENANT) == again.data_key(PUBLIC_TENANT)


# ---------------------------------------------------------------------- a fleet's keys


def test_what_a_check_confirms_is_taken_and_nothing_else(tmp_path: Path) -> None:
    """As two nodes do that began with keyrings of their own. Data keys are each one's own."""
    first, second = (Keyring.create_or_open(_made(tmp_path / name)) for name in "ab")
    first.add_tenant(ACME)
    first.rotate_handle_key()
    given = first.shared([DEFAULT_TENANT, PUBLIC_TENANT, ACME])
    assert second.check(PUBLIC_TENANT) != first.check(PUBLIC_TENANT) == first.check(DEFAULT_TENANT)
    wanted = {PUBLIC_TENANT: first.check(PUBLIC_TENANT), ACME: b"x" * 16}
    assert second.lacking(wanted) == wanted
    before = second.data_key(DEFAULT_TENANT)
    assert second.adopt(given, wanted) == {DEFAULT_TENANT, PUBLIC_TENANT}
    assert not second.has_keys(ACME), "the check said that it is another one"
    assert second.adopt(given, {ACME: first.check(ACME)}) == {ACME}

    again = Keyring.open(tmp_path / "b")
    for name in (DEFAULT_TENANT, PUBLIC_TENANT, ACME):
        assert again.tenant_secret(name) == first.tenant_secret(name)
        assert again.data_key(name) != first.data_key(name)
        assert again.check(name) == first.check(name)
    assert again.data_key(DEFAULT_TENANT) == before
    assert again.handle_keys() == first.handle_keys()
    assert again.adopt(given, {}) == frozenset()
    assert again.generation == second.generation, "nothing to write"


def test_of_handle_keys_the_newest_count(tmp_path: Path) -> None:
    first, second = (Keyring.create_or_open(_made(tmp_path / name)) for name in "ab")
    second.adopt(first.shared(_BOTH), {PUBLIC_TENANT: first.check(PUBLIC_TENANT)})
    second.rotate_handle_key()
    second.adopt(first.shared(()), {})
    assert second.current_handle_key()[0] == 2
    first.adopt(second.shared(()), {})
    assert first.handle_keys() == second.handle_keys()


def test_a_check_tells_nothing_of_the_secret_and_shared_keys_show_none(tmp_path: Path) -> None:
    keyring = Keyring.create_or_open(tmp_path)
    given = keyring.shared(_BOTH)
    assert len(keyring.check(PUBLIC_TENANT)) == 16
    assert keyring.check(ACME) == b""
    shown = repr(given) + repr(keyring.check(PUBLIC_TENANT))
    assert not any(repr(key)[2:-1] in shown for key in given.tenant_secrets.values())


def test_a_keyring_in_memory_has_what_it_was_given_and_forgets(tmp_path: Path) -> None:
    node = Keyring.create_or_open(tmp_path)
    node.add_tenant(ACME)
    checks = {PUBLIC_TENANT: node.check(PUBLIC_TENANT), ACME: node.check(ACME)}
    router = MemoryKeyring()
    assert router.is_empty
    assert router.adopt(node.shared([*_BOTH, ACME]), checks) == {*_BOTH, ACME}
    assert router.current_handle_key() == node.current_handle_key()
    assert router.tenant_secret(ACME) == node.tenant_secret(ACME)
    assert router.remove_tenants([ACME]) == {ACME}
    with pytest.raises(UnknownTenant):
        router.tenant_secret(ACME)
    assert {path.name for path in tmp_path.iterdir()} == {"keyring", "root.key", "keyring.lock"}


_BOTH = (DEFAULT_TENANT, PUBLIC_TENANT)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
