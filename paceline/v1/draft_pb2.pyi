from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftGrammarKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_GRAMMAR_KIND_UNSPECIFIED: _ClassVar[DraftGrammarKind]
    DRAFT_GRAMMAR_KIND_JSON_SCHEMA: _ClassVar[DraftGrammarKind]
    DRAFT_GRAMMAR_KIND_REGEX: _ClassVar[DraftGrammarKind]
    DRAFT_GRAMMAR_KIND_LARK: _ClassVar[DraftGrammarKind]

class DraftFailureReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_FAILURE_REASON_UNSPECIFIED: _ClassVar[DraftFailureReason]
    DRAFT_FAILURE_REASON_UNKNOWN_SEQUENCE: _ClassVar[DraftFailureReason]
    DRAFT_FAILURE_REASON_BASE_MISMATCH: _ClassVar[DraftFailureReason]
    DRAFT_FAILURE_REASON_BUSY: _ClassVar[DraftFailureReason]
    DRAFT_FAILURE_REASON_INTERNAL: _ClassVar[DraftFailureReason]
    DRAFT_FAILURE_REASON_UNSUPPORTED: _ClassVar[DraftFailureReason]
DRAFT_GRAMMAR_KIND_UNSPECIFIED: DraftGrammarKind
DRAFT_GRAMMAR_KIND_JSON_SCHEMA: DraftGrammarKind
DRAFT_GRAMMAR_KIND_REGEX: DraftGrammarKind
DRAFT_GRAMMAR_KIND_LARK: DraftGrammarKind
DRAFT_FAILURE_REASON_UNSPECIFIED: DraftFailureReason
DRAFT_FAILURE_REASON_UNKNOWN_SEQUENCE: DraftFailureReason
DRAFT_FAILURE_REASON_BASE_MISMATCH: DraftFailureReason
DRAFT_FAILURE_REASON_BUSY: DraftFailureReason
DRAFT_FAILURE_REASON_INTERNAL: DraftFailureReason
DRAFT_FAILURE_REASON_UNSUPPORTED: DraftFailureReason

class DraftRequest(_message.Message):
    __slots__ = ("hello", "open", "advance", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ADVANCE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: _containers.RepeatedCompositeFieldContainer[Open]
    advance: _containers.RepeatedCompositeFieldContainer[Advance]
    close: _containers.RepeatedCompositeFieldContainer[Close]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Iterable[_Union[Open, _Mapping]]] = ..., advance: _Optional[_Iterable[_Union[Advance, _Mapping]]] = ..., close: _Optional[_Iterable[_Union[Close, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("replica_id", "model", "tokenizer_fingerprint")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    model: str
    tokenizer_fingerprint: str
    def __init__(self, replica_id: _Optional[str] = ..., model: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("sequence", "tokens", "sampling", "depth", "prompt_length", "ahead", "rejection", "window", "traceparent")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    sampling: DraftSampling
    depth: int
    prompt_length: int
    ahead: int
    rejection: bool
    window: StreamingWindow
    traceparent: str
    def __init__(self, sequence: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[DraftSampling, _Mapping]] = ..., depth: _Optional[int] = ..., prompt_length: _Optional[int] = ..., ahead: _Optional[int] = ..., rejection: _Optional[bool] = ..., window: _Optional[_Union[StreamingWindow, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class StreamingWindow(_message.Message):
    __slots__ = ("ctx_size", "n_keep", "n_discard")
    CTX_SIZE_FIELD_NUMBER: _ClassVar[int]
    N_KEEP_FIELD_NUMBER: _ClassVar[int]
    N_DISCARD_FIELD_NUMBER: _ClassVar[int]
    ctx_size: int
    n_keep: int
    n_discard: int
    def __init__(self, ctx_size: _Optional[int] = ..., n_keep: _Optional[int] = ..., n_discard: _Optional[int] = ...) -> None: ...

class DraftSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "stop_token_ids", "grammar")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar: DraftGrammar
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., grammar: _Optional[_Union[DraftGrammar, _Mapping]] = ...) -> None: ...

class DraftGrammar(_message.Message):
    __slots__ = ("kind", "source", "ends")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    kind: DraftGrammarKind
    source: str
    ends: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[_Union[DraftGrammarKind, str]] = ..., source: _Optional[str] = ..., ends: _Optional[_Iterable[int]] = ...) -> None: ...

class Advance(_message.Message):
    __slots__ = ("sequence", "base", "tokens", "depth")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    base: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    depth: int
    def __init__(self, sequence: _Optional[int] = ..., base: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., depth: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class DraftReply(_message.Message):
    __slots__ = ("hello", "candidates", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    candidates: _containers.RepeatedCompositeFieldContainer[Candidates]
    failure: _containers.RepeatedCompositeFieldContainer[DraftFailure]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidates, _Mapping]]] = ..., failure: _Optional[_Iterable[_Union[DraftFailure, _Mapping]]] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("sequence", "base", "tokens", "offset", "final", "probs")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PROBS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    base: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    final: bool
    probs: _containers.RepeatedCompositeFieldContainer[SparseRow]
    def __init__(self, sequence: _Optional[int] = ..., base: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., final: _Optional[bool] = ..., probs: _Optional[_Iterable[_Union[SparseRow, _Mapping]]] = ...) -> None: ...

class SparseRow(_message.Message):
    __slots__ = ("ids", "probs")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PROBS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    probs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., probs: _Optional[_Iterable[float]] = ...) -> None: ...

class DraftFailure(_message.Message):
    __slots__ = ("sequence", "reason", "base")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    reason: DraftFailureReason
    base: int
    def __init__(self, sequence: _Optional[int] = ..., reason: _Optional[_Union[DraftFailureReason, str]] = ..., base: _Optional[int] = ...) -> None: ...
