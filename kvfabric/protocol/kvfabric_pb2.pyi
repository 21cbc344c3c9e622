from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    STORED: _ClassVar[EventKind]
    REMOVED: _ClassVar[EventKind]
    CLEARED: _ClassVar[EventKind]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    HBM: _ClassVar[Tier]
    HOST: _ClassVar[Tier]
    SSD: _ClassVar[Tier]
EVENT_KIND_UNSPECIFIED: EventKind
STORED: EventKind
REMOVED: EventKind
CLEARED: EventKind
TIER_UNSPECIFIED: Tier
HBM: Tier
HOST: Tier
SSD: Tier

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeDescription(_message.Message):
    __slots__ = ("node_id", "boot_id", "version", "sequence", "engines", "clock", "stale_serves", "models", "takes_hints", "rates", "machine", "rack", "zone", "exchanges", "host_bytes", "ssd_bytes")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    STALE_SERVES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TAKES_HINTS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    RACK_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_BYTES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    boot_id: bytes
    version: str
    sequence: int
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    clock: float
    stale_serves: int
    models: _containers.RepeatedCompositeFieldContainer[Model]
    takes_hints: bool
    rates: _containers.RepeatedCompositeFieldContainer[Rate]
    machine: bytes
    rack: str
    zone: str
    exchanges: bool
    host_bytes: int
    ssd_bytes: int
    def __init__(self, node_id: _Optional[str] = ..., boot_id: _Optional[bytes] = ..., version: _Optional[str] = ..., sequence: _Optional[int] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., clock: _Optional[float] = ..., stale_serves: _Optional[int] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., takes_hints: _Optional[bool] = ..., rates: _Optional[_Iterable[_Union[Rate, _Mapping]]] = ..., machine: _Optional[bytes] = ..., rack: _Optional[str] = ..., zone: _Optional[str] = ..., exchanges: _Optional[bool] = ..., host_bytes: _Optional[int] = ..., ssd_bytes: _Optional[int] = ...) -> None: ...

class Rate(_message.Message):
    __slots__ = ("tier", "peer", "bytes_per_s", "num_sights")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SIGHTS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    peer: str
    bytes_per_s: float
    num_sights: int
    def __init__(self, tier: _Optional[str] = ..., peer: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., num_sights: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("hints",)
    HINTS_FIELD_NUMBER: _ClassVar[int]
    hints: _containers.RepeatedCompositeFieldContainer[PrefetchHint]
    def __init__(self, hints: _Optional[_Iterable[_Union[PrefetchHint, _Mapping]]] = ...) -> None: ...

class PrefetchHint(_message.Message):
    __slots__ = ("handle", "keys")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    handle: str
    keys: bytes
    def __init__(self, handle: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Prefetched(_message.Message):
    __slots__ = ("num_begun", "num_refused")
    NUM_BEGUN_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    num_begun: int
    num_refused: int
    def __init__(self, num_begun: _Optional[int] = ..., num_refused: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "revision", "adapter")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    adapter: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("session", "engine_id", "endpoint", "model", "model_revision", "adapter", "adapter_revision", "layout_fingerprint", "block_tokens", "block_bytes", "gone", "serves")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_REVISION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    engine_id: str
    endpoint: str
    model: str
    model_revision: str
    adapter: str
    adapter_revision: str
    layout_fingerprint: bytes
    block_tokens: int
    block_bytes: int
    gone: bool
    serves: str
    def __init__(self, session: _Optional[bytes] = ..., engine_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., adapter: _Optional[str] = ..., adapter_revision: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., gone: _Optional[bool] = ..., serves: _Optional[str] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("boot_id", "from_sequence")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    boot_id: bytes
    from_sequence: int
    def __init__(self, boot_id: _Optional[bytes] = ..., from_sequence: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FindLookupRequest(_message.Message):
    __slots__ = ("request_id", "tenant_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant_id: str
    def __init__(self, request_id: _Optional[str] = ..., tenant_id: _Optional[str] = ...) -> None: ...

class EndHandoffRequest(_message.Message):
    __slots__ = ("name", "tenant_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    tenant_id: str
    def __init__(self, name: _Optional[str] = ..., tenant_id: _Optional[str] = ...) -> None: ...

class HandoffEnded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Lookup(_message.Message):
    __slots__ = ("known", "num_asked", "num_host", "num_ssd", "reason", "num_peer")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    NUM_ASKED_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_FIELD_NUMBER: _ClassVar[int]
    NUM_SSD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_PEER_FIELD_NUMBER: _ClassVar[int]
    known: bool
    num_asked: int
    num_host: int
    num_ssd: int
    reason: str
    num_peer: int
    def __init__(self, known: _Optional[bool] = ..., num_asked: _Optional[int] = ..., num_host: _Optional[int] = ..., num_ssd: _Optional[int] = ..., reason: _Optional[str] = ..., num_peer: _Optional[int] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("kind", "tier", "namespace_tag", "parent", "keys", "engine")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_TAG_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    kind: EventKind
    tier: Tier
    namespace_tag: bytes
    parent: bytes
    keys: bytes
    engine: bytes
    def __init__(self, kind: _Optional[_Union[EventKind, str]] = ..., tier: _Optional[_Union[Tier, str]] = ..., namespace_tag: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., engine: _Optional[bytes] = ...) -> None: ...

class EventBatch(_message.Message):
    __slots__ = ("boot_id", "sequence", "runs", "engines", "gap", "snapshot_end", "rates", "stale_serves")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_END_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    STALE_SERVES_FIELD_NUMBER: _ClassVar[int]
    boot_id: bytes
    sequence: int
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    gap: bool
    snapshot_end: bool
    rates: _containers.RepeatedCompositeFieldContainer[Rate]
    stale_serves: int
    def __init__(self, boot_id: _Optional[bytes] = ..., sequence: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., gap: _Optional[bool] = ..., snapshot_end: _Optional[bool] = ..., rates: _Optional[_Iterable[_Union[Rate, _Mapping]]] = ..., stale_serves: _Optional[int] = ...) -> None: ...

class WatchRegistryRequest(_message.Message):
    __slots__ = ("holder_id", "holder_kind")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    HOLDER_KIND_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    holder_kind: str
    def __init__(self, holder_id: _Optional[str] = ..., holder_kind: _Optional[str] = ...) -> None: ...

class EpochEntry(_message.Message):
    __slots__ = ("scope", "epoch", "incarnation")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    scope: str
    epoch: int
    incarnation: bytes
    def __init__(self, scope: _Optional[str] = ..., epoch: _Optional[int] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class TierQuota(_message.Message):
    __slots__ = ("max_bytes", "floor_bytes")
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_bytes: int
    floor_bytes: int
    def __init__(self, max_bytes: _Optional[int] = ..., floor_bytes: _Optional[int] = ...) -> None: ...

class TenantLimits(_message.Message):
    __slots__ = ("lease_max_bytes", "ssd_write_bytes_per_day", "requests_per_s", "pin_max_bytes")
    LEASE_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_WRITE_BYTES_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PIN_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_max_bytes: int
    ssd_write_bytes_per_day: int
    requests_per_s: float
    pin_max_bytes: int
    def __init__(self, lease_max_bytes: _Optional[int] = ..., ssd_write_bytes_per_day: _Optional[int] = ..., requests_per_s: _Optional[float] = ..., pin_max_bytes: _Optional[int] = ...) -> None: ...

class ExpiringKey(_message.Message):
    __slots__ = ("digest", "expires_at")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    expires_at: float
    def __init__(self, digest: _Optional[bytes] = ..., expires_at: _Optional[float] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("tenant_id", "name", "api_key_digests", "host", "ssd", "max_age_s", "opted_out", "limits", "expiring_keys", "is_offboarded", "key_check")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    API_KEY_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_S_FIELD_NUMBER: _ClassVar[int]
    OPTED_OUT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EXPIRING_KEYS_FIELD_NUMBER: _ClassVar[int]
    IS_OFFBOARDED_FIELD_NUMBER: _ClassVar[int]
    KEY_CHECK_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    name: str
    api_key_digests: _containers.RepeatedScalarFieldContainer[bytes]
    host: TierQuota
    ssd: TierQuota
    max_age_s: float
    opted_out: bool
    limits: TenantLimits
    expiring_keys: _containers.RepeatedCompositeFieldContainer[ExpiringKey]
    is_offboarded: bool
    key_check: bytes
    def __init__(self, tenant_id: _Optional[str] = ..., name: _Optional[str] = ..., api_key_digests: _Optional[_Iterable[bytes]] = ..., host: _Optional[_Union[TierQuota, _Mapping]] = ..., ssd: _Optional[_Union[TierQuota, _Mapping]] = ..., max_age_s: _Optional[float] = ..., opted_out: _Optional[bool] = ..., limits: _Optional[_Union[TenantLimits, _Mapping]] = ..., expiring_keys: _Optional[_Iterable[_Union[ExpiringKey, _Mapping]]] = ..., is_offboarded: _Optional[bool] = ..., key_check: _Optional[bytes] = ...) -> None: ...

class FetchKeysRequest(_message.Message):
    __slots__ = ("tenant_ids",)
    TENANT_IDS_FIELD_NUMBER: _ClassVar[int]
    tenant_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SharedKeys(_message.Message):
    __slots__ = ("fleet_check", "tenant_secrets", "handle_keys", "current_handle_key")
    class TenantSecretsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class HandleKeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: bytes
        def __init__(self, key: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    FLEET_CHECK_FIELD_NUMBER: _ClassVar[int]
    TENANT_SECRETS_FIELD_NUMBER: _ClassVar[int]
    HANDLE_KEYS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_HANDLE_KEY_FIELD_NUMBER: _ClassVar[int]
    fleet_check: bytes
    tenant_secrets: _containers.ScalarMap[str, bytes]
    handle_keys: _containers.ScalarMap[int, bytes]
    current_handle_key: int
    def __init__(self, fleet_check: _Optional[bytes] = ..., tenant_secrets: _Optional[_Mapping[str, bytes]] = ..., handle_keys: _Optional[_Mapping[int, bytes]] = ..., current_handle_key: _Optional[int] = ...) -> None: ...

class Template(_message.Message):
    __slots__ = ("name", "version", "incarnation", "text", "is_public", "state", "pinned_until", "pin_s", "after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_FIELD_NUMBER: _ClassVar[int]
    PIN_S_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    incarnation: bytes
    text: bytes
    is_public: bool
    state: str
    pinned_until: float
    pin_s: float
    after: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., text: _Optional[bytes] = ..., is_public: _Optional[bool] = ..., state: _Optional[str] = ..., pinned_until: _Optional[float] = ..., pin_s: _Optional[float] = ..., after: _Optional[_Iterable[str]] = ...) -> None: ...

class RegistryState(_message.Message):
    __slots__ = ("registry_id", "version", "epochs", "tenants", "templates")
    REGISTRY_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    registry_id: bytes
    version: int
    epochs: _containers.RepeatedCompositeFieldContainer[EpochEntry]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    templates: _containers.RepeatedCompositeFieldContainer[Template]
    def __init__(self, registry_id: _Optional[bytes] = ..., version: _Optional[int] = ..., epochs: _Optional[_Iterable[_Union[EpochEntry, _Mapping]]] = ..., tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ..., templates: _Optional[_Iterable[_Union[Template, _Mapping]]] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("holder_id", "holder_kind", "applied_version")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    HOLDER_KIND_FIELD_NUMBER: _ClassVar[int]
    APPLIED_VERSION_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    holder_kind: str
    applied_version: int
    def __init__(self, holder_id: _Optional[str] = ..., holder_kind: _Optional[str] = ..., applied_version: _Optional[int] = ...) -> None: ...

class RouterLoad(_message.Message):
    __slots__ = ("router", "row")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    router: str
    row: bytes
    def __init__(self, router: _Optional[str] = ..., row: _Optional[bytes] = ...) -> None: ...

class RouterLoads(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, rows: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EpochLease(_message.Message):
    __slots__ = ("registry_id", "ttl_s", "version")
    REGISTRY_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    registry_id: bytes
    ttl_s: float
    version: int
    def __init__(self, registry_id: _Optional[bytes] = ..., ttl_s: _Optional[float] = ..., version: _Optional[int] = ...) -> None: ...

class CreateTenantRequest(_message.Message):
    __slots__ = ("name", "host", "ssd", "limits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    host: TierQuota
    ssd: TierQuota
    limits: TenantLimits
    def __init__(self, name: _Optional[str] = ..., host: _Optional[_Union[TierQuota, _Mapping]] = ..., ssd: _Optional[_Union[TierQuota, _Mapping]] = ..., limits: _Optional[_Union[TenantLimits, _Mapping]] = ...) -> None: ...

class TenantCreated(_message.Message):
    __slots__ = ("tenant", "api_key")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    API_KEY_FIELD_NUMBER: _ClassVar[int]
    tenant: Tenant
    api_key: str
    def __init__(self, tenant: _Optional[_Union[Tenant, _Mapping]] = ..., api_key: _Optional[str] = ...) -> None: ...

class SetTenantRequest(_message.Message):
    __slots__ = ("name", "host", "ssd", "max_age_s", "opted_out", "limits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_S_FIELD_NUMBER: _ClassVar[int]
    OPTED_OUT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    host: TierQuota
    ssd: TierQuota
    max_age_s: float
    opted_out: bool
    limits: TenantLimits
    def __init__(self, name: _Optional[str] = ..., host: _Optional[_Union[TierQuota, _Mapping]] = ..., ssd: _Optional[_Union[TierQuota, _Mapping]] = ..., max_age_s: _Optional[float] = ..., opted_out: _Optional[bool] = ..., limits: _Optional[_Union[TenantLimits, _Mapping]] = ...) -> None: ...

class RotateApiKeyRequest(_message.Message):
    __slots__ = ("name", "grace_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    grace_s: float
    def __init__(self, name: _Optional[str] = ..., grace_s: _Optional[float] = ...) -> None: ...

class OffboardTenantRequest(_message.Message):
    __slots__ = ("name", "wait_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    wait_s: float
    def __init__(self, name: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class ClaimKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KeysClaimed(_message.Message):
    __slots__ = ("num_tenants",)
    NUM_TENANTS_FIELD_NUMBER: _ClassVar[int]
    num_tenants: int
    def __init__(self, num_tenants: _Optional[int] = ...) -> None: ...

class CreateApiKeyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ApiKeyCreated(_message.Message):
    __slots__ = ("api_key",)
    API_KEY_FIELD_NUMBER: _ClassVar[int]
    api_key: str
    def __init__(self, api_key: _Optional[str] = ...) -> None: ...

class RevokeApiKeyRequest(_message.Message):
    __slots__ = ("name", "api_key_prefix")
    NAME_FIELD_NUMBER: _ClassVar[int]
    API_KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    name: str
    api_key_prefix: str
    def __init__(self, name: _Optional[str] = ..., api_key_prefix: _Optional[str] = ...) -> None: ...

class RegisterTemplateRequest(_message.Message):
    __slots__ = ("name", "version", "text", "is_public", "after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    text: bytes
    is_public: bool
    after: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., text: _Optional[bytes] = ..., is_public: _Optional[bool] = ..., after: _Optional[_Iterable[str]] = ...) -> None: ...

class PromoteTemplateRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class PinTemplateRequest(_message.Message):
    __slots__ = ("name", "version", "ttl_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    ttl_s: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class UnpinTemplateRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class InvalidateRequest(_message.Message):
    __slots__ = ("scope", "name", "version", "purge", "wait_s")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PURGE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    scope: str
    name: str
    version: str
    purge: bool
    wait_s: float
    def __init__(self, scope: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., purge: _Optional[bool] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Acknowledgement(_message.Message):
    __slots__ = ("holder_id", "holder_kind", "after_s", "waited_out")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    HOLDER_KIND_FIELD_NUMBER: _ClassVar[int]
    AFTER_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_OUT_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    holder_kind: str
    after_s: float
    waited_out: bool
    def __init__(self, holder_id: _Optional[str] = ..., holder_kind: _Optional[str] = ..., after_s: _Optional[float] = ..., waited_out: _Optional[bool] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("action", "scope", "old_epoch", "new_epoch", "requested_by", "requested_at", "unreachable_at", "acknowledgements", "bytes_unreachable", "audit_head", "receipt_id", "nodes", "bytes_reclaimed", "drained_at", "destroyed_at", "not_heard_from", "is_final")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    OLD_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEW_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_BY_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_AT_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_AT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGEMENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    AUDIT_HEAD_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_ID_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECLAIMED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_AT_FIELD_NUMBER: _ClassVar[int]
    DESTROYED_AT_FIELD_NUMBER: _ClassVar[int]
    NOT_HEARD_FROM_FIELD_NUMBER: _ClassVar[int]
    IS_FINAL_FIELD_NUMBER: _ClassVar[int]
    action: str
    scope: str
    old_epoch: int
    new_epoch: int
    requested_by: str
    requested_at: float
    unreachable_at: float
    acknowledgements: _containers.RepeatedCompositeFieldContainer[Acknowledgement]
    bytes_unreachable: int
    audit_head: bytes
    receipt_id: str
    nodes: _containers.RepeatedCompositeFieldContainer[NodeReport]
    bytes_reclaimed: int
    drained_at: float
    destroyed_at: float
    not_heard_from: _containers.RepeatedScalarFieldContainer[str]
    is_final: bool
    def __init__(self, action: _Optional[str] = ..., scope: _Optional[str] = ..., old_epoch: _Optional[int] = ..., new_epoch: _Optional[int] = ..., requested_by: _Optional[str] = ..., requested_at: _Optional[float] = ..., unreachable_at: _Optional[float] = ..., acknowledgements: _Optional[_Iterable[_Union[Acknowledgement, _Mapping]]] = ..., bytes_unreachable: _Optional[int] = ..., audit_head: _Optional[bytes] = ..., receipt_id: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[NodeReport, _Mapping]]] = ..., bytes_reclaimed: _Optional[int] = ..., drained_at: _Optional[float] = ..., destroyed_at: _Optional[float] = ..., not_heard_from: _Optional[_Iterable[str]] = ..., is_final: _Optional[bool] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("node_id", "bytes_unreachable", "bytes_reclaimed", "destroyed_at", "drained_at", "engines", "failure", "keys_removed_at", "keyring_generation", "audit")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECLAIMED_FIELD_NUMBER: _ClassVar[int]
    DESTROYED_AT_FIELD_NUMBER: _ClassVar[int]
    DRAINED_AT_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    KEYS_REMOVED_AT_FIELD_NUMBER: _ClassVar[int]
    KEYRING_GENERATION_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    bytes_unreachable: int
    bytes_reclaimed: int
    destroyed_at: float
    drained_at: float
    engines: _containers.RepeatedCompositeFieldContainer[EngineReport]
    failure: str
    keys_removed_at: float
    keyring_generation: int
    audit: AuditReport
    def __init__(self, node_id: _Optional[str] = ..., bytes_unreachable: _Optional[int] = ..., bytes_reclaimed: _Optional[int] = ..., destroyed_at: _Optional[float] = ..., drained_at: _Optional[float] = ..., engines: _Optional[_Iterable[_Union[EngineReport, _Mapping]]] = ..., failure: _Optional[str] = ..., keys_removed_at: _Optional[float] = ..., keyring_generation: _Optional[int] = ..., audit: _Optional[_Union[AuditReport, _Mapping]] = ...) -> None: ...

class AuditReport(_message.Message):
    __slots__ = ("result", "num_refused", "num_uncontrolled", "num_stale", "refused_at")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCONTROLLED_FIELD_NUMBER: _ClassVar[int]
    NUM_STALE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_AT_FIELD_NUMBER: _ClassVar[int]
    result: str
    num_refused: int
    num_uncontrolled: int
    num_stale: int
    refused_at: float
    def __init__(self, result: _Optional[str] = ..., num_refused: _Optional[int] = ..., num_uncontrolled: _Optional[int] = ..., num_stale: _Optional[int] = ..., refused_at: _Optional[float] = ...) -> None: ...

class EngineReport(_message.Message):
    __slots__ = ("session", "engine_id", "running", "drained_at", "hbm", "detail")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DRAINED_AT_FIELD_NUMBER: _ClassVar[int]
    HBM_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    session: str
    engine_id: str
    running: int
    drained_at: float
    hbm: str
    detail: str
    def __init__(self, session: _Optional[str] = ..., engine_id: _Optional[str] = ..., running: _Optional[int] = ..., drained_at: _Optional[float] = ..., hbm: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class GetReceiptRequest(_message.Message):
    __slots__ = ("receipt_id", "wait_s")
    RECEIPT_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    receipt_id: str
    wait_s: float
    def __init__(self, receipt_id: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScrubReport(_message.Message):
    __slots__ = ("arena_parts", "arena_corrupt", "ssd_records", "ssd_bytes", "ssd_corrupt", "ssd_unreadable")
    ARENA_PARTS_FIELD_NUMBER: _ClassVar[int]
    ARENA_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    SSD_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SSD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    SSD_UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    arena_parts: int
    arena_corrupt: int
    ssd_records: int
    ssd_bytes: int
    ssd_corrupt: int
    ssd_unreadable: int
    def __init__(self, arena_parts: _Optional[int] = ..., arena_corrupt: _Optional[int] = ..., ssd_records: _Optional[int] = ..., ssd_bytes: _Optional[int] = ..., ssd_corrupt: _Optional[int] = ..., ssd_unreadable: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("sealed_keys",)
    SEALED_KEYS_FIELD_NUMBER: _ClassVar[int]
    sealed_keys: bool
    def __init__(self, sealed_keys: _Optional[bool] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("tier", "state", "capacity_bytes", "used_bytes", "draining_bytes", "num_blocks", "detail")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    tier: str
    state: str
    capacity_bytes: int
    used_bytes: int
    draining_bytes: int
    num_blocks: int
    detail: str
    def __init__(self, tier: _Optional[str] = ..., state: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., draining_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class TenantUsage(_message.Message):
    __slots__ = ("tenant_id", "host_bytes", "ssd_bytes", "leased_bytes", "ssd_written_bytes", "pinned_bytes", "pin_max_bytes", "pins_refused")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIN_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    host_bytes: int
    ssd_bytes: int
    leased_bytes: int
    ssd_written_bytes: int
    pinned_bytes: int
    pin_max_bytes: int
    pins_refused: int
    def __init__(self, tenant_id: _Optional[str] = ..., host_bytes: _Optional[int] = ..., ssd_bytes: _Optional[int] = ..., leased_bytes: _Optional[int] = ..., ssd_written_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., pin_max_bytes: _Optional[int] = ..., pins_refused: _Optional[int] = ...) -> None: ...

class RegistryStatus(_message.Message):
    __slots__ = ("home", "state", "detail", "lease_left_s", "num_holders", "num_restores", "num_errors", "tenants_without_keys")
    class NumErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HOME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_HOLDERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTORES_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_WITHOUT_KEYS_FIELD_NUMBER: _ClassVar[int]
    home: str
    state: str
    detail: str
    lease_left_s: float
    num_holders: int
    num_restores: int
    num_errors: _containers.ScalarMap[str, int]
    tenants_without_keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, home: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., lease_left_s: _Optional[float] = ..., num_holders: _Optional[int] = ..., num_restores: _Optional[int] = ..., num_errors: _Optional[_Mapping[str, int]] = ..., tenants_without_keys: _Optional[_Iterable[str]] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node_id", "boot_id", "version", "uptime_s", "tiers", "engines", "usage", "registry_version", "arena_adopted", "counters", "sealed_keys", "registry", "audit")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARENA_ADOPTED_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SEALED_KEYS_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    boot_id: bytes
    version: str
    uptime_s: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    usage: _containers.RepeatedCompositeFieldContainer[TenantUsage]
    registry_version: int
    arena_adopted: bool
    counters: _containers.ScalarMap[str, int]
    sealed_keys: _containers.RepeatedScalarFieldContainer[bytes]
    registry: RegistryStatus
    audit: AuditStatus
    def __init__(self, node_id: _Optional[str] = ..., boot_id: _Optional[bytes] = ..., version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., usage: _Optional[_Iterable[_Union[TenantUsage, _Mapping]]] = ..., registry_version: _Optional[int] = ..., arena_adopted: _Optional[bool] = ..., counters: _Optional[_Mapping[str, int]] = ..., sealed_keys: _Optional[_Iterable[bytes]] = ..., registry: _Optional[_Union[RegistryStatus, _Mapping]] = ..., audit: _Optional[_Union[AuditStatus, _Mapping]] = ...) -> None: ...

class AuditStatus(_message.Message):
    __slots__ = ("num_audits", "num_refused", "num_uncontrolled", "stale_serves", "alarm")
    NUM_AUDITS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCONTROLLED_FIELD_NUMBER: _ClassVar[int]
    STALE_SERVES_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    num_audits: int
    num_refused: int
    num_uncontrolled: int
    stale_serves: int
    alarm: str
    def __init__(self, num_audits: _Optional[int] = ..., num_refused: _Optional[int] = ..., num_uncontrolled: _Optional[int] = ..., stale_serves: _Optional[int] = ..., alarm: _Optional[str] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("handle", "layout", "keys", "address")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    handle: str
    layout: bytes
    keys: bytes
    address: bytes
    def __init__(self, handle: _Optional[str] = ..., layout: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., address: _Optional[bytes] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("hold", "num_blocks", "reason", "address")
    HOLD_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    hold: bytes
    num_blocks: int
    reason: str
    address: bytes
    def __init__(self, hold: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., reason: _Optional[str] = ..., address: _Optional[bytes] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("hold", "group", "shard", "first", "num_blocks", "tags", "parts_per_message", "sealed")
    HOLD_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    PARTS_PER_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    hold: bytes
    group: int
    shard: int
    first: int
    num_blocks: int
    tags: _containers.RepeatedScalarFieldContainer[int]
    parts_per_message: int
    sealed: bool
    def __init__(self, hold: _Optional[bytes] = ..., group: _Optional[int] = ..., shard: _Optional[int] = ..., first: _Optional[int] = ..., num_blocks: _Optional[int] = ..., tags: _Optional[_Iterable[int]] = ..., parts_per_message: _Optional[int] = ..., sealed: _Optional[bool] = ...) -> None: ...

class Sent(_message.Message):
    __slots__ = ("there", "part_bytes", "checksums", "reason", "key", "seals")
    THERE_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    there: bool
    part_bytes: int
    checksums: bytes
    reason: str
    key: bytes
    seals: bytes
    def __init__(self, there: _Optional[bool] = ..., part_bytes: _Optional[int] = ..., checksums: _Optional[bytes] = ..., reason: _Optional[str] = ..., key: _Optional[bytes] = ..., seals: _Optional[bytes] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("hold",)
    HOLD_FIELD_NUMBER: _ClassVar[int]
    hold: bytes
    def __init__(self, hold: _Optional[bytes] = ...) -> None: ...

class Dropped(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SendTestRequest(_message.Message):
    __slots__ = ("address", "tags", "num_bytes", "describe")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    tags: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    describe: bool
    def __init__(self, address: _Optional[bytes] = ..., tags: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ..., describe: _Optional[bool] = ...) -> None: ...

class TestSent(_message.Message):
    __slots__ = ("address", "link")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    link: str
    def __init__(self, address: _Optional[bytes] = ..., link: _Optional[str] = ...) -> None: ...

class MeasureLinksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeasuredLinks(_message.Message):
    __slots__ = ("exchanges", "net_devices", "library", "settings", "resources", "listening", "links", "wire")
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    NET_DEVICES_FIELD_NUMBER: _ClassVar[int]
    LIBRARY_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    LISTENING_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    exchanges: bool
    net_devices: str
    library: str
    settings: _containers.RepeatedScalarFieldContainer[str]
    resources: _containers.RepeatedScalarFieldContainer[str]
    listening: _containers.RepeatedScalarFieldContainer[str]
    links: _containers.RepeatedCompositeFieldContainer[MeasuredLink]
    wire: str
    def __init__(self, exchanges: _Optional[bool] = ..., net_devices: _Optional[str] = ..., library: _Optional[str] = ..., settings: _Optional[_Iterable[str]] = ..., resources: _Optional[_Iterable[str]] = ..., listening: _Optional[_Iterable[str]] = ..., links: _Optional[_Iterable[_Union[MeasuredLink, _Mapping]]] = ..., wire: _Optional[str] = ...) -> None: ...

class MeasuredLink(_message.Message):
    __slots__ = ("node_id", "call_s", "round_trip_s", "bytes_per_s", "lanes", "protocols", "failure")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CALL_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOLS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    call_s: float
    round_trip_s: float
    bytes_per_s: float
    lanes: _containers.RepeatedScalarFieldContainer[str]
    protocols: _containers.RepeatedScalarFieldContainer[str]
    failure: str
    def __init__(self, node_id: _Optional[str] = ..., call_s: _Optional[float] = ..., round_trip_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., lanes: _Optional[_Iterable[str]] = ..., protocols: _Optional[_Iterable[str]] = ..., failure: _Optional[str] = ...) -> None: ...
