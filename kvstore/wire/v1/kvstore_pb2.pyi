import datetime

from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Representation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPRESENTATION_UNSPECIFIED: _ClassVar[Representation]
    REPRESENTATION_PACKED: _ClassVar[Representation]
    REPRESENTATION_DENSE: _ClassVar[Representation]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_PATH: _ClassVar[Transport]
    TRANSPORT_STREAM: _ClassVar[Transport]
REPRESENTATION_UNSPECIFIED: Representation
REPRESENTATION_PACKED: Representation
REPRESENTATION_DENSE: Representation
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_PATH: Transport
TRANSPORT_STREAM: Transport

class Namespace(_message.Message):
    __slots__ = ("weights", "adapter", "layout_digest", "dtype", "engine", "salt", "alias")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    weights: bytes
    adapter: bytes
    layout_digest: bytes
    dtype: str
    engine: str
    salt: bytes
    alias: str
    def __init__(self, weights: _Optional[bytes] = ..., adapter: _Optional[bytes] = ..., layout_digest: _Optional[bytes] = ..., dtype: _Optional[str] = ..., engine: _Optional[str] = ..., salt: _Optional[bytes] = ..., alias: _Optional[str] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("namespace", "tokens", "fidelity_min", "prefill_tokens_per_s", "covered_tokens", "request_id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_MIN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    tokens: bytes
    fidelity_min: int
    prefill_tokens_per_s: float
    covered_tokens: int
    request_id: str
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., tokens: _Optional[bytes] = ..., fidelity_min: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., covered_tokens: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("n_tokens", "reason", "fidelity")
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    n_tokens: int
    reason: str
    fidelity: int
    def __init__(self, n_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., fidelity: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("namespace", "tokens", "fidelity_min", "representation", "transport", "prefill_tokens_per_s", "covered_tokens", "request_id", "stall_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_MIN_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    tokens: bytes
    fidelity_min: int
    representation: Representation
    transport: Transport
    prefill_tokens_per_s: float
    covered_tokens: int
    request_id: str
    stall_ms: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., tokens: _Optional[bytes] = ..., fidelity_min: _Optional[int] = ..., representation: _Optional[_Union[Representation, str]] = ..., transport: _Optional[_Union[Transport, str]] = ..., prefill_tokens_per_s: _Optional[float] = ..., covered_tokens: _Optional[int] = ..., request_id: _Optional[str] = ..., stall_ms: _Optional[int] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("plan", "chunk")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    plan: FetchPlan
    chunk: LayerChunk
    def __init__(self, plan: _Optional[_Union[FetchPlan, _Mapping]] = ..., chunk: _Optional[_Union[LayerChunk, _Mapping]] = ...) -> None: ...

class FetchPlan(_message.Message):
    __slots__ = ("n_tokens", "reason", "fidelity", "layout", "blocks", "checkpoint", "fetch_id", "templates")
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FETCH_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    n_tokens: int
    reason: str
    fidelity: int
    layout: bytes
    blocks: _containers.RepeatedCompositeFieldContainer[BlockSlice]
    checkpoint: StateSlice
    fetch_id: str
    templates: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, n_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., fidelity: _Optional[int] = ..., layout: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[BlockSlice, _Mapping]]] = ..., checkpoint: _Optional[_Union[StateSlice, _Mapping]] = ..., fetch_id: _Optional[str] = ..., templates: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StateSlice(_message.Message):
    __slots__ = ("key", "states", "path", "payload_offset", "file_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    states: bytes
    path: str
    payload_offset: int
    file_bytes: int
    def __init__(self, key: _Optional[bytes] = ..., states: _Optional[bytes] = ..., path: _Optional[str] = ..., payload_offset: _Optional[int] = ..., file_bytes: _Optional[int] = ...) -> None: ...

class BlockSlice(_message.Message):
    __slots__ = ("key", "n_tokens", "runs", "path", "payload_offset", "file_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    n_tokens: int
    runs: bytes
    path: str
    payload_offset: int
    file_bytes: int
    def __init__(self, key: _Optional[bytes] = ..., n_tokens: _Optional[int] = ..., runs: _Optional[bytes] = ..., path: _Optional[str] = ..., payload_offset: _Optional[int] = ..., file_bytes: _Optional[int] = ...) -> None: ...

class LayerChunk(_message.Message):
    __slots__ = ("layer", "data")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    layer: int
    data: bytes
    def __init__(self, layer: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class FetchBasisRequest(_message.Message):
    __slots__ = ("namespace", "digest")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    digest: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class BasisPiece(_message.Message):
    __slots__ = ("namespace", "layout", "data")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    layout: bytes
    data: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., layout: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class BeginStoreRequest(_message.Message):
    __slots__ = ("namespace", "layout", "tokens", "captured_from", "restored_tokens", "restored_fidelity", "profile", "transport", "states", "request_id", "interim", "prompt", "touched_tokens", "continued_tokens")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FROM_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIDELITY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INTERIM_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOUCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTINUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    layout: bytes
    tokens: bytes
    captured_from: int
    restored_tokens: int
    restored_fidelity: int
    profile: str
    transport: Transport
    states: bytes
    request_id: str
    interim: bool
    prompt: int
    touched_tokens: int
    continued_tokens: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., layout: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., captured_from: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., restored_fidelity: _Optional[int] = ..., profile: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., states: _Optional[bytes] = ..., request_id: _Optional[str] = ..., interim: bool = ..., prompt: _Optional[int] = ..., touched_tokens: _Optional[int] = ..., continued_tokens: _Optional[int] = ...) -> None: ...

class BeginStoreReply(_message.Message):
    __slots__ = ("upload_id", "start", "end", "upload_bytes", "by_socket", "reason", "held_tokens", "wants_states", "durable", "detail")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    BY_SOCKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WANTS_STATES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    start: int
    end: int
    upload_bytes: int
    by_socket: bool
    reason: str
    held_tokens: int
    wants_states: bool
    durable: bool
    detail: str
    def __init__(self, upload_id: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., upload_bytes: _Optional[int] = ..., by_socket: bool = ..., reason: _Optional[str] = ..., held_tokens: _Optional[int] = ..., wants_states: bool = ..., durable: bool = ..., detail: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("upload_id", "data")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    data: bytes
    def __init__(self, upload_id: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("received_bytes",)
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    def __init__(self, received_bytes: _Optional[int] = ...) -> None: ...

class CommitStoreRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class CommitStoreReply(_message.Message):
    __slots__ = ("done", "durable", "stored_tokens", "new_bytes", "reason")
    DONE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    STORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    done: bool
    durable: bool
    stored_tokens: int
    new_bytes: int
    reason: str
    def __init__(self, done: bool = ..., durable: bool = ..., stored_tokens: _Optional[int] = ..., new_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortStoreRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class AbortStoreReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("key", "detail", "reason", "timing", "speed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    detail: str
    reason: str
    timing: FetchTiming
    speed: PrefillSpeed
    def __init__(self, key: _Optional[bytes] = ..., detail: _Optional[str] = ..., reason: _Optional[str] = ..., timing: _Optional[_Union[FetchTiming, _Mapping]] = ..., speed: _Optional[_Union[PrefillSpeed, _Mapping]] = ...) -> None: ...

class PrefillSpeed(_message.Message):
    __slots__ = ("namespace_id", "tokens_per_s")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    tokens_per_s: float
    def __init__(self, namespace_id: _Optional[bytes] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class FetchTiming(_message.Message):
    __slots__ = ("fetch_id", "read_bytes", "read_s", "decoded_bytes", "decode_s", "got_tokens", "reason", "again")
    FETCH_ID_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    DECODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    GOT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    fetch_id: str
    read_bytes: int
    read_s: float
    decoded_bytes: int
    decode_s: float
    got_tokens: int
    reason: str
    again: bool
    def __init__(self, fetch_id: _Optional[str] = ..., read_bytes: _Optional[int] = ..., read_s: _Optional[float] = ..., decoded_bytes: _Optional[int] = ..., decode_s: _Optional[float] = ..., got_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., again: bool = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("quarantined",)
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    quarantined: bool
    def __init__(self, quarantined: bool = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("daemon", "disk", "tokens", "requests", "miss_reasons", "bytes", "namespaces", "store_reasons", "evictions", "refusals", "load", "since_start", "last_hour", "lifetime", "lifetime_since_s", "shortened_reasons", "sessions", "places", "labelled", "recent", "fetch_s", "idle_s", "reuse_s", "writes", "pressure", "remote")
    class MissReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class StoreReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class EvictionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Evicted
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Evicted, _Mapping]] = ...) -> None: ...
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ShortenedReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DAEMON_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MISS_REASONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    STORE_REASONS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SINCE_START_FIELD_NUMBER: _ClassVar[int]
    LAST_HOUR_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SINCE_S_FIELD_NUMBER: _ClassVar[int]
    SHORTENED_REASONS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    REUSE_S_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    PRESSURE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    daemon: DaemonStats
    disk: DiskStats
    tokens: TokenStats
    requests: RequestStats
    miss_reasons: _containers.ScalarMap[str, int]
    bytes: ByteStats
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    store_reasons: _containers.ScalarMap[str, int]
    evictions: _containers.MessageMap[str, Evicted]
    refusals: _containers.ScalarMap[str, int]
    load: LoadStats
    since_start: Traffic
    last_hour: Traffic
    lifetime: Traffic
    lifetime_since_s: int
    shortened_reasons: _containers.ScalarMap[str, int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStats]
    places: _containers.RepeatedCompositeFieldContainer[Place]
    labelled: _containers.RepeatedCompositeFieldContainer[NamespaceTraffic]
    recent: _containers.RepeatedCompositeFieldContainer[Request]
    fetch_s: Histogram
    idle_s: Histogram
    reuse_s: Histogram
    writes: WriteStats
    pressure: PressureStats
    remote: RemoteStats
    def __init__(self, daemon: _Optional[_Union[DaemonStats, _Mapping]] = ..., disk: _Optional[_Union[DiskStats, _Mapping]] = ..., tokens: _Optional[_Union[TokenStats, _Mapping]] = ..., requests: _Optional[_Union[RequestStats, _Mapping]] = ..., miss_reasons: _Optional[_Mapping[str, int]] = ..., bytes: _Optional[_Union[ByteStats, _Mapping]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., store_reasons: _Optional[_Mapping[str, int]] = ..., evictions: _Optional[_Mapping[str, Evicted]] = ..., refusals: _Optional[_Mapping[str, int]] = ..., load: _Optional[_Union[LoadStats, _Mapping]] = ..., since_start: _Optional[_Union[Traffic, _Mapping]] = ..., last_hour: _Optional[_Union[Traffic, _Mapping]] = ..., lifetime: _Optional[_Union[Traffic, _Mapping]] = ..., lifetime_since_s: _Optional[int] = ..., shortened_reasons: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[_Iterable[_Union[SessionStats, _Mapping]]] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ..., labelled: _Optional[_Iterable[_Union[NamespaceTraffic, _Mapping]]] = ..., recent: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., fetch_s: _Optional[_Union[Histogram, _Mapping]] = ..., idle_s: _Optional[_Union[Histogram, _Mapping]] = ..., reuse_s: _Optional[_Union[Histogram, _Mapping]] = ..., writes: _Optional[_Union[WriteStats, _Mapping]] = ..., pressure: _Optional[_Union[PressureStats, _Mapping]] = ..., remote: _Optional[_Union[RemoteStats, _Mapping]] = ...) -> None: ...

class PressureStats(_message.Message):
    __slots__ = ("fills_up", "idle_reason", "blocks", "before_bytes", "after_bytes", "left_blocks", "held_blocks", "error_mean", "error_max")
    FILLS_UP_FIELD_NUMBER: _ClassVar[int]
    IDLE_REASON_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    ERROR_MAX_FIELD_NUMBER: _ClassVar[int]
    fills_up: bool
    idle_reason: str
    blocks: int
    before_bytes: int
    after_bytes: int
    left_blocks: int
    held_blocks: int
    error_mean: float
    error_max: float
    def __init__(self, fills_up: bool = ..., idle_reason: _Optional[str] = ..., blocks: _Optional[int] = ..., before_bytes: _Optional[int] = ..., after_bytes: _Optional[int] = ..., left_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., error_mean: _Optional[float] = ..., error_max: _Optional[float] = ...) -> None: ...

class RemoteStats(_message.Message):
    __slots__ = ("state", "detail", "place", "requests", "read_bytes", "written_bytes", "hits", "hit_tokens", "pushed_blobs", "queued_blobs", "queued_bytes", "unused_reasons", "not_pushed", "bytes_per_s", "latency_s", "wrong_objects", "create_only", "failed_calls", "late_calls")
    class UnusedReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class NotPushedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNUSED_REASONS_FIELD_NUMBER: _ClassVar[int]
    NOT_PUSHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    WRONG_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    CREATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    FAILED_CALLS_FIELD_NUMBER: _ClassVar[int]
    LATE_CALLS_FIELD_NUMBER: _ClassVar[int]
    state: str
    detail: str
    place: str
    requests: int
    read_bytes: int
    written_bytes: int
    hits: int
    hit_tokens: int
    pushed_blobs: int
    queued_blobs: int
    queued_bytes: int
    unused_reasons: _containers.ScalarMap[str, int]
    not_pushed: _containers.ScalarMap[str, int]
    bytes_per_s: float
    latency_s: float
    wrong_objects: int
    create_only: str
    failed_calls: int
    late_calls: int
    def __init__(self, state: _Optional[str] = ..., detail: _Optional[str] = ..., place: _Optional[str] = ..., requests: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., pushed_blobs: _Optional[int] = ..., queued_blobs: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., unused_reasons: _Optional[_Mapping[str, int]] = ..., not_pushed: _Optional[_Mapping[str, int]] = ..., bytes_per_s: _Optional[float] = ..., latency_s: _Optional[float] = ..., wrong_objects: _Optional[int] = ..., create_only: _Optional[str] = ..., failed_calls: _Optional[int] = ..., late_calls: _Optional[int] = ...) -> None: ...

class WriteStats(_message.Message):
    __slots__ = ("admission", "day_bytes", "left_bytes", "held_back_stores", "held_back_bytes")
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    DAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_STORES_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_BYTES_FIELD_NUMBER: _ClassVar[int]
    admission: str
    day_bytes: int
    left_bytes: int
    held_back_stores: int
    held_back_bytes: int
    def __init__(self, admission: _Optional[str] = ..., day_bytes: _Optional[int] = ..., left_bytes: _Optional[int] = ..., held_back_stores: _Optional[int] = ..., held_back_bytes: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("namespace_id", "alias", "common_tokens", "prompts")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    COMMON_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    alias: str
    common_tokens: int
    prompts: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., alias: _Optional[str] = ..., common_tokens: _Optional[int] = ..., prompts: _Optional[int] = ...) -> None: ...

class Traffic(_message.Message):
    __slots__ = ("hits", "shortened", "misses", "in_memory", "prompt_tokens", "hit_tokens", "saved_s", "stores", "stored_tokens", "written_bytes", "reused_bytes", "remote_tokens")
    HITS_FIELD_NUMBER: _ClassVar[int]
    SHORTENED_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_S_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    STORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    REUSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REMOTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    hits: int
    shortened: int
    misses: int
    in_memory: int
    prompt_tokens: int
    hit_tokens: int
    saved_s: float
    stores: int
    stored_tokens: int
    written_bytes: int
    reused_bytes: int
    remote_tokens: int
    def __init__(self, hits: _Optional[int] = ..., shortened: _Optional[int] = ..., misses: _Optional[int] = ..., in_memory: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., saved_s: _Optional[float] = ..., stores: _Optional[int] = ..., stored_tokens: _Optional[int] = ..., written_bytes: _Optional[int] = ..., reused_bytes: _Optional[int] = ..., remote_tokens: _Optional[int] = ...) -> None: ...

class NamespaceTraffic(_message.Message):
    __slots__ = ("namespace_id", "alias", "traffic")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    alias: str
    traffic: Traffic
    def __init__(self, namespace_id: _Optional[bytes] = ..., alias: _Optional[str] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("at_s", "kind", "alias", "tokens", "prompt_tokens", "bytes", "seconds", "reason", "request_id", "pid")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    kind: str
    alias: str
    tokens: int
    prompt_tokens: int
    bytes: int
    seconds: float
    reason: str
    request_id: str
    pid: int
    def __init__(self, at_s: _Optional[float] = ..., kind: _Optional[str] = ..., alias: _Optional[str] = ..., tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., reason: _Optional[str] = ..., request_id: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("bounds", "counts", "sum")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum: float
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum: _Optional[float] = ...) -> None: ...

class SessionStats(_message.Message):
    __slots__ = ("pid", "namespace_id", "alias", "engine", "profile", "last_s", "last_hit_s", "traffic")
    PID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LAST_S_FIELD_NUMBER: _ClassVar[int]
    LAST_HIT_S_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    pid: int
    namespace_id: bytes
    alias: str
    engine: str
    profile: str
    last_s: int
    last_hit_s: int
    traffic: Traffic
    def __init__(self, pid: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., alias: _Optional[str] = ..., engine: _Optional[str] = ..., profile: _Optional[str] = ..., last_s: _Optional[int] = ..., last_hit_s: _Optional[int] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ...) -> None: ...

class Evicted(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class LoadStats(_message.Message):
    __slots__ = ("clients", "clients_max", "connections", "connections_max", "calls", "calls_max", "uploads", "uploads_max", "received_bytes", "waiting")
    class WaitingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_MAX_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_MAX_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CALLS_MAX_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_MAX_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    clients: int
    clients_max: int
    connections: int
    connections_max: int
    calls: int
    calls_max: int
    uploads: int
    uploads_max: int
    received_bytes: int
    waiting: _containers.ScalarMap[str, int]
    def __init__(self, clients: _Optional[int] = ..., clients_max: _Optional[int] = ..., connections: _Optional[int] = ..., connections_max: _Optional[int] = ..., calls: _Optional[int] = ..., calls_max: _Optional[int] = ..., uploads: _Optional[int] = ..., uploads_max: _Optional[int] = ..., received_bytes: _Optional[int] = ..., waiting: _Optional[_Mapping[str, int]] = ...) -> None: ...

class DaemonStats(_message.Message):
    __slots__ = ("version", "pid", "uptime_s", "state", "device", "detail", "profile", "log_level", "data_dir", "descriptors_max", "descriptors")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    DATA_DIR_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_MAX_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_s: int
    state: str
    device: str
    detail: str
    profile: str
    log_level: str
    data_dir: str
    descriptors_max: int
    descriptors: int
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[int] = ..., state: _Optional[str] = ..., device: _Optional[str] = ..., detail: _Optional[str] = ..., profile: _Optional[str] = ..., log_level: _Optional[str] = ..., data_dir: _Optional[str] = ..., descriptors_max: _Optional[int] = ..., descriptors: _Optional[int] = ...) -> None: ...

class DiskStats(_message.Message):
    __slots__ = ("used_bytes", "budget_bytes", "free_bytes", "free_floor_bytes", "blobs", "quarantined", "checkpoints", "checkpoint_bytes", "scrubbed_s", "damaged")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_S_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    budget_bytes: int
    free_bytes: int
    free_floor_bytes: int
    blobs: int
    quarantined: int
    checkpoints: int
    checkpoint_bytes: int
    scrubbed_s: int
    damaged: int
    def __init__(self, used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., free_floor_bytes: _Optional[int] = ..., blobs: _Optional[int] = ..., quarantined: _Optional[int] = ..., checkpoints: _Optional[int] = ..., checkpoint_bytes: _Optional[int] = ..., scrubbed_s: _Optional[int] = ..., damaged: _Optional[int] = ...) -> None: ...

class TokenStats(_message.Message):
    __slots__ = ("stored", "served")
    STORED_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    stored: int
    served: int
    def __init__(self, stored: _Optional[int] = ..., served: _Optional[int] = ...) -> None: ...

class RequestStats(_message.Message):
    __slots__ = ("match", "fetch", "store", "hits", "partial_hits", "misses")
    MATCH_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    match: int
    fetch: int
    store: int
    hits: int
    partial_hits: int
    misses: int
    def __init__(self, match: _Optional[int] = ..., fetch: _Optional[int] = ..., store: _Optional[int] = ..., hits: _Optional[int] = ..., partial_hits: _Optional[int] = ..., misses: _Optional[int] = ...) -> None: ...

class ByteStats(_message.Message):
    __slots__ = ("logical", "stored", "written", "served")
    LOGICAL_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    logical: int
    stored: int
    written: int
    served: int
    def __init__(self, logical: _Optional[int] = ..., stored: _Optional[int] = ..., written: _Optional[int] = ..., served: _Optional[int] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("id", "alias", "tokens", "bytes", "blocks", "logical_bytes", "engine", "dtype", "layers", "checkpoints", "checkpoint_bytes", "profile", "profile_refused", "quality", "encrypted", "used_s", "orphaned", "unmeasured", "traffic", "prefill_tokens_per_s", "weights", "adapter", "layout", "quota_bytes", "ttl_s", "bases", "basis_bytes", "basis_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_REFUSED_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    USED_S_FIELD_NUMBER: _ClassVar[int]
    ORPHANED_FIELD_NUMBER: _ClassVar[int]
    UNMEASURED_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    BASIS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASIS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    alias: str
    tokens: int
    bytes: int
    blocks: int
    logical_bytes: int
    engine: str
    dtype: str
    layers: int
    checkpoints: int
    checkpoint_bytes: int
    profile: str
    profile_refused: str
    quality: _containers.RepeatedCompositeFieldContainer[Quality]
    encrypted: bool
    used_s: int
    orphaned: bool
    unmeasured: _containers.RepeatedScalarFieldContainer[str]
    traffic: Traffic
    prefill_tokens_per_s: float
    weights: bytes
    adapter: bytes
    layout: bytes
    quota_bytes: int
    ttl_s: int
    bases: int
    basis_bytes: int
    basis_tokens: int
    def __init__(self, id: _Optional[bytes] = ..., alias: _Optional[str] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., logical_bytes: _Optional[int] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., layers: _Optional[int] = ..., checkpoints: _Optional[int] = ..., checkpoint_bytes: _Optional[int] = ..., profile: _Optional[str] = ..., profile_refused: _Optional[str] = ..., quality: _Optional[_Iterable[_Union[Quality, _Mapping]]] = ..., encrypted: bool = ..., used_s: _Optional[int] = ..., orphaned: bool = ..., unmeasured: _Optional[_Iterable[str]] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ..., weights: _Optional[bytes] = ..., adapter: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., quota_bytes: _Optional[int] = ..., ttl_s: _Optional[int] = ..., bases: _Optional[int] = ..., basis_bytes: _Optional[int] = ..., basis_tokens: _Optional[int] = ...) -> None: ...

class Quality(_message.Message):
    __slots__ = ("profile", "spec", "prefixes", "positions", "kl_mean", "kl_p99", "top1", "nll_delta", "answer_cold", "answer_restored", "bits_per_value", "encode_bytes_per_s", "decode_bytes_per_s", "created_s", "refused", "tokens", "threshold_tokens", "answers", "answer_wrong", "answer_loss", "passed", "thresholds")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KL_MEAN_FIELD_NUMBER: _ClassVar[int]
    KL_P99_FIELD_NUMBER: _ClassVar[int]
    TOP1_FIELD_NUMBER: _ClassVar[int]
    NLL_DELTA_FIELD_NUMBER: _ClassVar[int]
    ANSWER_COLD_FIELD_NUMBER: _ClassVar[int]
    ANSWER_RESTORED_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_VALUE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_WRONG_FIELD_NUMBER: _ClassVar[int]
    ANSWER_LOSS_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    profile: str
    spec: str
    prefixes: int
    positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    nll_delta: float
    answer_cold: float
    answer_restored: float
    bits_per_value: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    created_s: int
    refused: str
    tokens: int
    threshold_tokens: int
    answers: int
    answer_wrong: float
    answer_loss: float
    passed: bool
    thresholds: QualityThresholds
    def __init__(self, profile: _Optional[str] = ..., spec: _Optional[str] = ..., prefixes: _Optional[int] = ..., positions: _Optional[int] = ..., kl_mean: _Optional[float] = ..., kl_p99: _Optional[float] = ..., top1: _Optional[float] = ..., nll_delta: _Optional[float] = ..., answer_cold: _Optional[float] = ..., answer_restored: _Optional[float] = ..., bits_per_value: _Optional[float] = ..., encode_bytes_per_s: _Optional[float] = ..., decode_bytes_per_s: _Optional[float] = ..., created_s: _Optional[int] = ..., refused: _Optional[str] = ..., tokens: _Optional[int] = ..., threshold_tokens: _Optional[int] = ..., answers: _Optional[int] = ..., answer_wrong: _Optional[float] = ..., answer_loss: _Optional[float] = ..., passed: bool = ..., thresholds: _Optional[_Union[QualityThresholds, _Mapping]] = ...) -> None: ...

class QualityThresholds(_message.Message):
    __slots__ = ("kl_mean_max", "kl_p99_max", "top1_min", "nll_delta_max", "answer_loss_max")
    KL_MEAN_MAX_FIELD_NUMBER: _ClassVar[int]
    KL_P99_MAX_FIELD_NUMBER: _ClassVar[int]
    TOP1_MIN_FIELD_NUMBER: _ClassVar[int]
    NLL_DELTA_MAX_FIELD_NUMBER: _ClassVar[int]
    ANSWER_LOSS_MAX_FIELD_NUMBER: _ClassVar[int]
    kl_mean_max: float
    kl_p99_max: float
    top1_min: float
    nll_delta_max: float
    answer_loss_max: float
    def __init__(self, kl_mean_max: _Optional[float] = ..., kl_p99_max: _Optional[float] = ..., top1_min: _Optional[float] = ..., nll_delta_max: _Optional[float] = ..., answer_loss_max: _Optional[float] = ...) -> None: ...

class RecordQualityRequest(_message.Message):
    __slots__ = ("namespace", "quality", "layout")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    quality: Quality
    layout: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., quality: _Optional[_Union[Quality, _Mapping]] = ..., layout: _Optional[bytes] = ...) -> None: ...

class RecordQualityReply(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: str
    def __init__(self, refused: _Optional[str] = ...) -> None: ...

class ListQualityRequest(_message.Message):
    __slots__ = ("namespace_prefix",)
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    def __init__(self, namespace_prefix: _Optional[bytes] = ...) -> None: ...

class ListQualityReply(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceQuality]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceQuality, _Mapping]]] = ...) -> None: ...

class NamespaceQuality(_message.Message):
    __slots__ = ("id", "alias", "engine", "quality")
    ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    alias: str
    engine: str
    quality: _containers.RepeatedCompositeFieldContainer[Quality]
    def __init__(self, id: _Optional[bytes] = ..., alias: _Optional[str] = ..., engine: _Optional[str] = ..., quality: _Optional[_Iterable[_Union[Quality, _Mapping]]] = ...) -> None: ...

class ForgetQualityRequest(_message.Message):
    __slots__ = ("namespace_prefix", "profile", "all")
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    profile: str
    all: bool
    def __init__(self, namespace_prefix: _Optional[bytes] = ..., profile: _Optional[str] = ..., all: bool = ...) -> None: ...

class ForgetQualityReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: int
    def __init__(self, results: _Optional[int] = ...) -> None: ...

class HistoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HistoryReply(_message.Message):
    __slots__ = ("hours",)
    HOURS_FIELD_NUMBER: _ClassVar[int]
    hours: _containers.RepeatedCompositeFieldContainer[Hour]
    def __init__(self, hours: _Optional[_Iterable[_Union[Hour, _Mapping]]] = ...) -> None: ...

class Hour(_message.Message):
    __slots__ = ("hour_s", "traffic", "miss_reasons", "shortened_reasons", "store_reasons", "evicted_bytes", "used_bytes")
    class MissReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ShortenedReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class StoreReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HOUR_S_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    MISS_REASONS_FIELD_NUMBER: _ClassVar[int]
    SHORTENED_REASONS_FIELD_NUMBER: _ClassVar[int]
    STORE_REASONS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    hour_s: int
    traffic: Traffic
    miss_reasons: _containers.ScalarMap[str, int]
    shortened_reasons: _containers.ScalarMap[str, int]
    store_reasons: _containers.ScalarMap[str, int]
    evicted_bytes: int
    used_bytes: int
    def __init__(self, hour_s: _Optional[int] = ..., traffic: _Optional[_Union[Traffic, _Mapping]] = ..., miss_reasons: _Optional[_Mapping[str, int]] = ..., shortened_reasons: _Optional[_Mapping[str, int]] = ..., store_reasons: _Optional[_Mapping[str, int]] = ..., evicted_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("namespace_prefix", "limit", "sequences", "blocks")
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    limit: int
    sequences: bool
    blocks: bool
    def __init__(self, namespace_prefix: _Optional[bytes] = ..., limit: _Optional[int] = ..., sequences: bool = ..., blocks: bool = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("namespaces", "blocks", "truncated", "sequences")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    truncated: bool
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceInfo]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., truncated: bool = ..., sequences: _Optional[_Iterable[_Union[SequenceInfo, _Mapping]]] = ...) -> None: ...

class SequenceInfo(_message.Message):
    __slots__ = ("key", "namespace_id", "label", "tokens", "bytes", "own_bytes", "created_s", "accessed_s", "hits")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    ACCESSED_S_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    namespace_id: bytes
    label: str
    tokens: int
    bytes: int
    own_bytes: int
    created_s: int
    accessed_s: int
    hits: int
    def __init__(self, key: _Optional[bytes] = ..., namespace_id: _Optional[bytes] = ..., label: _Optional[str] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., own_bytes: _Optional[int] = ..., created_s: _Optional[int] = ..., accessed_s: _Optional[int] = ..., hits: _Optional[int] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("key", "parent", "namespace_id", "start", "n_tokens", "bytes", "fidelity", "created_s", "accessed_s", "recipes", "path", "runs", "checkpoint", "error", "basis", "references", "lost")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    ACCESSED_S_FIELD_NUMBER: _ClassVar[int]
    RECIPES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    namespace_id: bytes
    start: int
    n_tokens: int
    bytes: int
    fidelity: int
    created_s: int
    accessed_s: int
    recipes: _containers.RepeatedScalarFieldContainer[str]
    path: str
    runs: int
    checkpoint: bool
    error: float
    basis: bool
    references: int
    lost: bool
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., namespace_id: _Optional[bytes] = ..., start: _Optional[int] = ..., n_tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., fidelity: _Optional[int] = ..., created_s: _Optional[int] = ..., accessed_s: _Optional[int] = ..., recipes: _Optional[_Iterable[str]] = ..., path: _Optional[str] = ..., runs: _Optional[int] = ..., checkpoint: bool = ..., error: _Optional[float] = ..., basis: bool = ..., references: _Optional[int] = ..., lost: bool = ...) -> None: ...

class ShowRequest(_message.Message):
    __slots__ = ("key_prefix",)
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    key_prefix: bytes
    def __init__(self, key_prefix: _Optional[bytes] = ...) -> None: ...

class ShowReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ...) -> None: ...

class SettingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SettingsReply(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("key", "value", "source")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    source: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class WhyRequest(_message.Message):
    __slots__ = ("last", "tokens", "namespace_prefix", "alias", "context")
    LAST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    last: int
    tokens: bytes
    namespace_prefix: bytes
    alias: str
    context: bool
    def __init__(self, last: _Optional[int] = ..., tokens: _Optional[bytes] = ..., namespace_prefix: _Optional[bytes] = ..., alias: _Optional[str] = ..., context: bool = ...) -> None: ...

class WhyReply(_message.Message):
    __slots__ = ("found", "not_kept", "left_out", "not_noted")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    NOT_KEPT_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    NOT_NOTED_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedCompositeFieldContainer[Explanation]
    not_kept: int
    left_out: int
    not_noted: int
    def __init__(self, found: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ..., not_kept: _Optional[int] = ..., left_out: _Optional[int] = ..., not_noted: _Optional[int] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("at_ms", "request_id", "pid", "namespace_id", "alias", "prompt_tokens", "given_tokens", "common_tokens", "reason", "cause", "identity_field", "other_namespace_id", "other_alias", "other_tokens", "unstored_reason", "before", "asked", "stored", "nearest_key", "store", "prefix", "asked_more", "stored_more", "remote")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMMON_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_FIELD_NUMBER: _ClassVar[int]
    OTHER_NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    OTHER_ALIAS_FIELD_NUMBER: _ClassVar[int]
    OTHER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNSTORED_REASON_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    NEAREST_KEY_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    ASKED_MORE_FIELD_NUMBER: _ClassVar[int]
    STORED_MORE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    at_ms: int
    request_id: str
    pid: int
    namespace_id: bytes
    alias: str
    prompt_tokens: int
    given_tokens: int
    common_tokens: int
    reason: str
    cause: str
    identity_field: str
    other_namespace_id: bytes
    other_alias: str
    other_tokens: int
    unstored_reason: str
    before: bytes
    asked: bytes
    stored: bytes
    nearest_key: bytes
    store: StoreResult
    prefix: bytes
    asked_more: bytes
    stored_more: bytes
    remote: str
    def __init__(self, at_ms: _Optional[int] = ..., request_id: _Optional[str] = ..., pid: _Optional[int] = ..., namespace_id: _Optional[bytes] = ..., alias: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., given_tokens: _Optional[int] = ..., common_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., cause: _Optional[str] = ..., identity_field: _Optional[str] = ..., other_namespace_id: _Optional[bytes] = ..., other_alias: _Optional[str] = ..., other_tokens: _Optional[int] = ..., unstored_reason: _Optional[str] = ..., before: _Optional[bytes] = ..., asked: _Optional[bytes] = ..., stored: _Optional[bytes] = ..., nearest_key: _Optional[bytes] = ..., store: _Optional[_Union[StoreResult, _Mapping]] = ..., prefix: _Optional[bytes] = ..., asked_more: _Optional[bytes] = ..., stored_more: _Optional[bytes] = ..., remote: _Optional[str] = ...) -> None: ...

class StoreResult(_message.Message):
    __slots__ = ("offered_tokens", "stored_tokens", "new_bytes", "reason")
    OFFERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    offered_tokens: int
    stored_tokens: int
    new_bytes: int
    reason: str
    def __init__(self, offered_tokens: _Optional[int] = ..., stored_tokens: _Optional[int] = ..., new_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SetRequest(_message.Message):
    __slots__ = ("namespace_prefix", "key", "value", "dry_run", "alias", "at_once")
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    key: str
    value: str
    dry_run: bool
    alias: str
    at_once: bool
    def __init__(self, namespace_prefix: _Optional[bytes] = ..., key: _Optional[str] = ..., value: _Optional[str] = ..., dry_run: bool = ..., alias: _Optional[str] = ..., at_once: bool = ...) -> None: ...

class SetReply(_message.Message):
    __slots__ = ("before", "value", "deletes_bytes", "stored_bytes")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    DELETES_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    before: str
    value: str
    deletes_bytes: int
    stored_bytes: int
    def __init__(self, before: _Optional[str] = ..., value: _Optional[str] = ..., deletes_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("key_prefix", "tokens", "namespace_prefix", "remove")
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    key_prefix: bytes
    tokens: bytes
    namespace_prefix: bytes
    remove: bool
    def __init__(self, key_prefix: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., namespace_prefix: _Optional[bytes] = ..., remove: bool = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pins", "kept_bytes", "kept_bytes_max")
    PINS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[Pin]
    kept_bytes: int
    kept_bytes_max: int
    def __init__(self, pins: _Optional[_Iterable[_Union[Pin, _Mapping]]] = ..., kept_bytes: _Optional[int] = ..., kept_bytes_max: _Optional[int] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("key", "namespace_id", "alias", "tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    namespace_id: bytes
    alias: str
    tokens: int
    def __init__(self, key: _Optional[bytes] = ..., namespace_id: _Optional[bytes] = ..., alias: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("namespace_prefix", "key_prefix")
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    key_prefix: bytes
    def __init__(self, namespace_prefix: _Optional[bytes] = ..., key_prefix: _Optional[bytes] = ...) -> None: ...

class ExportReply(_message.Message):
    __slots__ = ("plan", "piece")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    plan: ExportPlan
    piece: BlobPiece
    def __init__(self, plan: _Optional[_Union[ExportPlan, _Mapping]] = ..., piece: _Optional[_Union[BlobPiece, _Mapping]] = ...) -> None: ...

class ExportPlan(_message.Message):
    __slots__ = ("namespace", "blobs", "bytes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    blobs: int
    bytes: int
    def __init__(self, namespace: _Optional[bytes] = ..., blobs: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class BlobPiece(_message.Message):
    __slots__ = ("blob_bytes", "data")
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    blob_bytes: int
    data: bytes
    def __init__(self, blob_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportReply(_message.Message):
    __slots__ = ("blobs", "held", "new_bytes", "reason", "detail")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    held: int
    new_bytes: int
    reason: str
    detail: str
    def __init__(self, blobs: _Optional[int] = ..., held: _Optional[int] = ..., new_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class PutBasisReply(_message.Message):
    __slots__ = ("digest", "new_bytes", "reason", "detail")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    new_bytes: int
    reason: str
    detail: str
    def __init__(self, digest: _Optional[bytes] = ..., new_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace_prefix", "key_prefix", "idle_s", "bytes", "all", "dry_run", "shred", "orphans")
    NAMESPACE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    SHRED_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    namespace_prefix: bytes
    key_prefix: bytes
    idle_s: int
    bytes: int
    all: bool
    dry_run: bool
    shred: bool
    orphans: bool
    def __init__(self, namespace_prefix: _Optional[bytes] = ..., key_prefix: _Optional[bytes] = ..., idle_s: _Optional[int] = ..., bytes: _Optional[int] = ..., all: bool = ..., dry_run: bool = ..., shred: bool = ..., orphans: bool = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("blocks", "freed_bytes", "kept_bytes", "pinned_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    freed_bytes: int
    kept_bytes: int
    pinned_bytes: int
    def __init__(self, blocks: _Optional[int] = ..., freed_bytes: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("repair",)
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    repair: bool
    def __init__(self, repair: bool = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("blobs", "bytes", "repaired", "findings", "done", "blobs_total", "removed")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    BLOBS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    bytes: int
    repaired: int
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    done: bool
    blobs_total: int
    removed: int
    def __init__(self, blobs: _Optional[int] = ..., bytes: _Optional[int] = ..., repaired: _Optional[int] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., done: bool = ..., blobs_total: _Optional[int] = ..., removed: _Optional[int] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("kind", "path", "detail")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    path: str
    detail: str
    def __init__(self, kind: _Optional[str] = ..., path: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class StatusDetails(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class RetryInfo(_message.Message):
    __slots__ = ("retry_delay",)
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    retry_delay: _duration_pb2.Duration
    def __init__(self, retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
