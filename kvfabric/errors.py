"""Every error of kvfabric, grouped by what the caller does next.

    KVFabricError
    ├ ConfigError                 fix the configuration and start again
    ├ ProtocolError               somebody broke the wire contract: close the connection
    │  ├ RemoteProtocolError      the peer did
    │  └ LocalProtocolError       we did
    ├ TransferError               try another location, else recompute
    │  ├ ConnectError
    │  ├ PeerClosed
    │  └ DeadlineExceeded
    ├ AccessError                 refuse, never retry
    │  ├ BadHandle
    │  └ UnknownTenant
    ├ CapacityError               try later, or shed
    │  ├ NoSpace
    │  ├ QuotaExceeded
    │  └ Overloaded
    ├ BlockError                  this block is unusable: drop it and recompute
    │  ├ CorruptBlock
    │  ├ LeaseExpired
    │  └ Fenced                   an epoch moved
    ├ NotFound                    an administrator named something that does not exist
    ├ Conflict                    an administrator asked for what the present state forbids
    └ ClosedError                 something closed was used: a bug

A miss is never an error: it is a shorter match.
"""

from __future__ import annotations


class KVFabricError(Exception):
    """Base of every error raised on purpose by kvfabric. `code` is its name on the wire."""

    code = "internal"


class ConfigError(KVFabricError):
    code = "config"


class ProtocolError(KVFabricError):
    code = "protocol"


class RemoteProtocolError(ProtocolError):
    code = "remote_protocol"


class LocalProtocolError(ProtocolError):
    code = "local_protocol"


class TransferError(KVFabricError):
    code = "transfer"


class ConnectError(TransferError):
    code = "connect"


class PeerClosed(TransferError):
    code = "peer_closed"


class DeadlineExceeded(TransferError):
    code = "deadline_exceeded"


class AccessError(KVFabricError):
    code = "access"


class BadHandle(AccessError):
    code = "bad_handle"


class UnknownTenant(AccessError):
    code = "unknown_tenant"


class CapacityError(KVFabricError):
    code = "capacity"


class NoSpace(CapacityError):
    code = "no_space"


class QuotaExceeded(CapacityError):
    code = "quota_exceeded"


class Overloaded(CapacityError):
    code = "overloaded"


class BlockError(KVFabricError):
    code = "block"


class CorruptBlock(BlockError):
    code = "corrupt_block"


class LeaseExpired(BlockError):
    code = "lease_expired"


class Fenced(BlockError):
    code = "fenced"


class NotFound(KVFabricError):
    code = "not_found"


class Conflict(KVFabricError):
    code = "conflict"


class ClosedError(KVFabricError):
    code = "closed"


def _tree(root: type[KVFabricError]) -> dict[str, type[KVFabricError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[KVFabricError]] = _tree(KVFabricError)
"""Wire code -> class. An unknown code from a newer peer becomes a plain KVFabricError."""


def from_wire(code: str, message: str) -> KVFabricError:
    """The error a peer reported in an error frame."""
    return BY_CODE.get(code, KVFabricError)(message)
