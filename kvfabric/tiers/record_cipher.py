"""Option `ssd_encryption`: payloads of records at rest, under keys that die with their tenant. No I/O.

AES-256-GCM. Key = HKDF-SHA256(tenant's data key; file id, sequence), nonce = the record's 4 KiB page in its
file, associated data = where the record lies and whose it is (`records.associated_data`). The sequence is in
the key because a group of writes that failed is overwritten at the same place of the same file: no key and
nonce ever seal two payloads. A record that is written anew is sealed anew.

The tag lies at the end of the header page. The checksum of the plain payload is not written: it would tell
whoever can compute the KV of a guessed prompt that the guess is right.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvfabric.errors import CorruptBlock, UnknownTenant
from kvfabric.tiers.records import PAGE_BYTES, TAG_BYTES, RecordHeader, associated_data
from kvfabric.types import TenantId

_INFO = b"kvfabric ssd record 1"


class RecordCipher:
    """`data_key(tenant)`: 32 bytes, or UnknownTenant; asked for each record, from several threads."""

    def __init__(self, data_key: Callable[[TenantId], bytes]) -> None:
        self._data_key = data_key

    def knows(self, tenant: TenantId) -> bool:
        try:
            self._data_key(tenant)
        except UnknownTenant:
            return False
        return True

    def seal(self, header: RecordHeader, payload: memoryview, out: memoryview) -> bytes:
        """Encrypt `payload` into `out`, as long; the tag. Of a tenant without a key, for nobody to read."""
        try:
            data_key = self._data_key(header.identity.tenant)
        except UnknownTenant:  # offboarded since the write was accepted
            data_key = secrets.token_bytes(32)
        sealer = _cipher(data_key, header).encryptor()
        sealer.authenticate_additional_data(associated_data(header))
        sealer.update_into(payload, out)
        sealer.finalize()
        tag: bytes = sealer.tag
        assert len(tag) == TAG_BYTES
        return tag

    def open(self, header: RecordHeader, payload: memoryview) -> None:
        """Decrypt in place. Raises CorruptBlock for any other key, place, identity, tag or byte, and the
        payload is of no meaning then."""
        try:
            data_key = self._data_key(header.identity.tenant)
        except UnknownTenant as exc:
            raise CorruptBlock(f"no data key for a record of {header.identity.tenant}") from exc
        opener = _cipher(data_key, header, header.tag).decryptor()
        opener.authenticate_additional_data(associated_data(header))
        opener.update_into(payload, payload)
        try:
            opener.finalize()
        except InvalidTag as exc:
            raise CorruptBlock(
                f"record at offset {header.offset} of file {header.file_id.hex()} fails its tag"
            ) from exc


def _cipher(data_key: bytes, header: RecordHeader, tag: bytes | None = None) -> Cipher[Any]:
    info = _INFO + header.file_id + header.sequence.to_bytes(8, "little")
    key = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(data_key)
    nonce = (header.offset // PAGE_BYTES).to_bytes(12, "little")
    return Cipher(algorithms.AES(key), modes.GCM(nonce, tag))
