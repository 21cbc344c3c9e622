"""Option `ssd_encryption`: what lies on the disk, and who can make bytes of it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfabric.errors import ConfigError, CorruptBlock, TransferError, UnknownTenant
from kvfabric.keyring import Keyring
from kvfabric.testing.segments import RECORD, SMALL, Owner, flip_bit, make_tier
from kvfabric.testing.tiers import TENANTS, make_part, read_back
from kvfabric.tiers import record_cipher
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import NO_CHECKSUM, PAGE_BYTES, RecordHeader
from kvfabric.tiers.segment_file import path_of
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import TenantId
from tests.kvfabric.test_segments import TestConformance

KEYS = {tenant: bytes([number]) * 32 for number, tenant in enumerate(TENANTS, start=1)}


def data_key(tenant: TenantId) -> bytes:
    try:
        return KEYS[tenant]
    except KeyError:
        raise UnknownTenant(tenant) from None


def sealed_tier(directory: Path, keys: Any = data_key, **kwargs: Any) -> SegmentTier:
    tier = make_tier(directory, **kwargs)
    tier.encrypt_with(RecordCipher(keys))
    return tier


class TestEncryptedConformance(TestConformance):
    is_plain = False

    def make_tier(self, directory: Path) -> SegmentTier:
        return sealed_tier(directory)


def on_disk(directory: Path) -> bytes:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() for path in files)


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "twin"])
async def test_neither_bytes_nor_checksum_are_on_the_disk(tmp_path: Path, encrypted: bool) -> None:
    identity, payload = make_part(1)
    async with (sealed_tier if encrypted else make_tier)(tmp_path) as tier:
        await tier.write(identity, payload)
    found = on_disk(tmp_path)
    assert bytes(identity.part.key) in found
    for secret in (bytes(payload[64:96]), identity.checksum):
        assert (secret in found) != encrypted


async def test_what_was_sealed_is_read_after_a_restart_and_without_the_index(
    tmp_path: Path,
) -> None:
    parts = [make_part(seed) for seed in range(4)]
    async with sealed_tier(tmp_path) as tier:
        places = [await tier.write(*part) for part in parts]
    for index in (True, False):
        if not index:
            (tmp_path / "index" / "data.mdb").unlink()
        async with sealed_tier(tmp_path) as tier:
            assert {one.checksum for one, _ in tier.records()} == {NO_CHECKSUM}
            for (identity, payload), place in zip(parts, places, strict=True):
                assert await read_back(tier, place, identity) == bytes(payload)
                buffer = memoryview(bytearray(len(payload)))
                unknown = replace(identity, checksum=NO_CHECKSUM)
                assert await tier.read_into(place, unknown, buffer) == identity.checksum


async def wrong_key_reads(directory: Path, keys: Any) -> tuple[bool, int]:
    """(whether another daemon with these keys reads the part, how many records it put aside)."""
    identity, payload = make_part(1)
    async with sealed_tier(directory) as tier:
        place = await tier.write(identity, payload)
    async with sealed_tier(directory, keys) as tier:
        try:
            good = await read_back(tier, place, identity) == bytes(payload)
        except CorruptBlock:
            good = False
        return good, tier.statistics().quarantined


async def test_another_key_or_none_is_a_corrupt_record(tmp_path: Path) -> None:
    def none(tenant: TenantId) -> bytes:
        raise UnknownTenant(tenant)

    assert await wrong_key_reads(tmp_path / "other", lambda _: b"x" * 32) == (False, 1)
    assert await wrong_key_reads(tmp_path / "none", none) == (False, 1)
    assert await wrong_key_reads(tmp_path / "same", data_key) == (True, 0)


@pytest.mark.parametrize("at", [PAGE_BYTES, PAGE_BYTES + 9_999, PAGE_BYTES - 1, 60])
async def test_a_flipped_bit_of_payload_tag_or_header_is_found(tmp_path: Path, at: int) -> None:
    identity, payload = make_part(1)
    async with sealed_tier(tmp_path) as tier:
        place = await tier.write(identity, payload)
        flip_bit(tmp_path, place, at)
        with pytest.raises(CorruptBlock):
            await read_back(tier, place, identity)
        assert tier.statistics().quarantined == 1


async def test_a_record_moved_under_another_header_fails_its_tag(tmp_path: Path) -> None:
    """Header and payload each intact, of one tenant, not of one record."""
    parts = [make_part(seed) for seed in (1, 3)]
    async with sealed_tier(tmp_path) as tier:
        first, second = [await tier.write(*part) for part in parts]
        with path_of(tmp_path, first.file).open("r+b") as file:
            file.seek(first.offset + PAGE_BYTES)
            body = file.read(10_000)
            file.seek(second.offset + PAGE_BYTES)
            file.write(body)
        with pytest.raises(CorruptBlock):
            await read_back(tier, second, parts[1][0])


async def test_no_key_and_nonce_seal_two_payloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a group that failed is overwritten at the same place."""
    assert await seals(tmp_path / "a", monkeypatch) == (4, 4)
    monkeypatch.setattr(record_cipher, "_INFO", b"")

    def without_sequence(key: bytes, header: RecordHeader, tag: bytes | None = None) -> Any:
        return real(key, header._replace(sequence=0), tag)

    real = record_cipher._cipher
    monkeypatch.setattr(record_cipher, "_cipher", without_sequence)
    made, distinct = await seals(tmp_path / "b", monkeypatch)
    assert distinct < made, "the twin without the sequence in the key reuses one"


async def seals(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(records sealed, distinct first blocks of their key streams): zeros are written, twice in vain."""
    streams: list[bytes] = []
    real = RecordCipher.seal

    def seal(self: Any, header: RecordHeader, payload: memoryview, out: memoryview) -> bytes:
        tag = real(self, header, payload, out)
        streams.append(bytes(a ^ b for a, b in zip(payload[:16], out[:16], strict=True)))
        return tag

    async def failing(self: Any, plan: Any) -> None:
        raise TransferError("EIO")

    with monkeypatch.context() as patch:
        patch.setattr(RecordCipher, "seal", seal)
        async with sealed_tier(directory) as tier:
            for number in range(4):
                with monkeypatch.context() as broken:
                    if number < 2:
                        broken.setattr(SegmentTier, "_sync_data", failing)
                    try:
                        await tier.write(*make_part(number))
                    except TransferError:
                        assert number < 2
    return len(streams), len(set(streams))


async def test_what_is_written_anew_is_sealed_anew(tmp_path: Path) -> None:
    parts = [make_part(seed, RECORD) for seed in range(40)]
    owner, places = Owner(), {}
    async with sealed_tier(tmp_path, capacity_bytes=4 * SMALL, segment_bytes=SMALL) as tier:
        tier.owner = owner
        kept, payload = parts[0]
        owner.wanted = {kept.part}
        first = None
        for identity, body in parts:
            place = await tier.write(identity, body)
            places[identity.part] = place
            first = first or place
        assert first is not None
        now = owner.places[kept.part]
        assert now != first
        assert await read_back(tier, now, kept) == bytes(payload)


async def test_switching_encryption_leaves_no_file_of_the_other_kind(tmp_path: Path) -> None:
    identity, payload = make_part(1)
    needle = bytes(payload[64:96])
    async with make_tier(tmp_path) as plain:
        await plain.write(identity, payload)
    assert needle in on_disk(tmp_path)
    async with sealed_tier(tmp_path) as tier:
        assert list(tier.records()) == []
        assert needle not in on_disk(tmp_path)
        await tier.write(identity, payload)
    async with make_tier(tmp_path) as plain:
        assert list(plain.records()) == []


async def test_a_tenant_without_a_key_is_not_written(tmp_path: Path) -> None:
    identity, payload = make_part(1)
    stranger = replace(identity, tenant=TenantId("t-stranger"))
    async with sealed_tier(tmp_path) as tier:
        with pytest.raises(UnknownTenant):
            await tier.write(stranger, payload)
        assert await tier.write(identity, payload)


async def test_blocks_of_a_removed_tenant_are_undecipherable(tmp_path: Path) -> None:
    """With copies of every file there was, but the root key's of then."""
    identity, payload = make_part(1)
    (tmp_path / "keys").mkdir()
    keyring = Keyring.create_or_open(tmp_path / "keys")
    keyring.add_tenant(identity.tenant)
    async with sealed_tier(tmp_path / "ssd", keyring.data_key) as tier:
        place = await tier.write(identity, payload)
    backup = (tmp_path / "keys" / "keyring").read_bytes()
    assert keyring.remove_tenants([identity.tenant]) == {identity.tenant}
    assert bytes(identity.part.key) in on_disk(tmp_path / "ssd"), "the record is still there"
    reader = Keyring.open(tmp_path / "keys")
    async with sealed_tier(tmp_path / "ssd", reader.data_key) as tier:
        with pytest.raises(CorruptBlock, match="no data key"):
            await read_back(tier, place, identity)
    (tmp_path / "keys" / "keyring").write_bytes(backup)
    with pytest.raises(ConfigError, match="does not open"):
        Keyring.open(tmp_path / "keys")
