"""The draft protocol's messages and their plain data, both ways. The only place that knows both."""

from __future__ import annotations

from paceline.sessions.window import StreamingWindow
from paceline.speculation.frames import (
    Advance,
    Candidates,
    DraftFailureReason,
    DraftFrame,
    Hello,
    Open,
    SparseRow,
)
from paceline.telemetry.tracing import checked
from paceline.types import Grammar, GrammarKind, SamplingParams
from paceline.v1 import draft_pb2 as pb

_REASONS = {
    DraftFailureReason.UNKNOWN_SEQUENCE: pb.DRAFT_FAILURE_REASON_UNKNOWN_SEQUENCE,
    DraftFailureReason.BASE_MISMATCH: pb.DRAFT_FAILURE_REASON_BASE_MISMATCH,
    DraftFailureReason.BUSY: pb.DRAFT_FAILURE_REASON_BUSY,
    DraftFailureReason.INTERNAL: pb.DRAFT_FAILURE_REASON_INTERNAL,
    DraftFailureReason.UNSUPPORTED: pb.DRAFT_FAILURE_REASON_UNSUPPORTED,
}
_REASONS_BACK = {wire: reason for reason, wire in _REASONS.items()}
_KINDS: dict[GrammarKind, pb.DraftGrammarKind] = {
    "json_schema": pb.DRAFT_GRAMMAR_KIND_JSON_SCHEMA,
    "regex": pb.DRAFT_GRAMMAR_KIND_REGEX,
    "lark": pb.DRAFT_GRAMMAR_KIND_LARK,
}
_KINDS_BACK = {wire: kind for kind, wire in _KINDS.items()}
_SEED_MASK = 2**64 - 1
_MAX_UINT32 = 2**32 - 1


def hello_to_proto(hello: Hello) -> pb.Hello:
    return pb.Hello(replica_id=hello.replica_id, model=hello.model, tokenizer_fingerprint=hello.fingerprint)


def hello_from_proto(message: pb.Hello) -> Hello:
    return Hello(message.replica_id, message.model, message.tokenizer_fingerprint)


def frame_to_proto(frame: DraftFrame) -> pb.DraftRequest:
    return pb.DraftRequest(
        open=[
            pb.Open(
                sequence=o.sequence,
                tokens=o.tokens,
                sampling=_sampling_to_proto(o.params),
                depth=o.depth,
                prompt_length=o.prompt_length,
                ahead=o.ahead,
                rejection=o.rejection,
                window=_window_to_proto(o.params.window),
                traceparent=o.trace,
            )
            for o in frame.opens
        ],
        advance=[pb.Advance(sequence=a.sequence, base=a.base, tokens=a.tokens, depth=a.depth) for a in frame.advances],
        close=[pb.Close(sequence=sequence) for sequence in frame.closes],
    )


def frame_from_proto(message: pb.DraftRequest) -> DraftFrame:
    """Raises InvalidRequest if a sampling parameter is out of its range."""
    return DraftFrame(
        opens=tuple(
            Open(
                o.sequence,
                tuple(o.tokens),
                _params_from_proto(o),
                o.depth,
                o.prompt_length,
                o.ahead,
                o.rejection,
                checked(o.traceparent),
            )
            for o in message.open
        ),
        advances=tuple(Advance(a.sequence, a.base, tuple(a.tokens), a.depth) for a in message.advance),
        closes=tuple(close.sequence for close in message.close),
    )


def candidates_to_proto(replies: list[Candidates]) -> pb.DraftReply:
    return pb.DraftReply(
        candidates=[
            pb.Candidates(
                sequence=r.sequence,
                base=r.base,
                tokens=r.tokens,
                offset=r.offset,
                final=r.final,
                probs=[pb.SparseRow(ids=row.ids, probs=row.probs) for row in r.probs],
            )
            for r in replies
            if r.failure is None
        ],
        failure=[
            pb.DraftFailure(sequence=r.sequence, reason=_REASONS[r.failure], base=r.base)
            for r in replies
            if r.failure is not None
        ],
    )


def candidates_from_proto(message: pb.DraftReply) -> list[Candidates]:
    """Rows that do not go with the tokens are left out."""
    drafted = [
        Candidates(
            c.sequence,
            c.base,
            tuple(c.tokens),
            offset=c.offset,
            probs=_rows_from_proto(c),
            final=c.final,
        )
        for c in message.candidates
    ]
    failed = [
        Candidates(f.sequence, f.base, failure=_REASONS_BACK.get(f.reason, DraftFailureReason.INTERNAL))
        for f in message.failure
    ]
    return drafted + failed


def _rows_from_proto(message: pb.Candidates) -> tuple[SparseRow, ...]:
    rows = tuple(SparseRow(tuple(row.ids), tuple(row.probs)) for row in message.probs)
    sound = len(rows) == len(message.tokens) and all(len(row.ids) == len(row.probs) for row in rows)
    return rows if sound else ()


def _sampling_to_proto(params: SamplingParams) -> pb.DraftSampling:
    masked = params.stop_token_ids if params.min_tokens else ()
    return pb.DraftSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, _MAX_UINT32),  # more than any vocabulary: off either way
        min_p=params.min_p,
        seed=(params.seed or 0) & _SEED_MASK,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.bias,
        min_tokens=params.min_tokens,
        stop_token_ids=[token for token in masked if token <= _MAX_UINT32],  # beyond any vocabulary
        grammar=_grammar_to_proto(params.grammar),
    )


def _grammar_to_proto(grammar: Grammar | None) -> pb.DraftGrammar | None:
    if grammar is None:
        return None
    return pb.DraftGrammar(kind=_KINDS[grammar.kind], source=grammar.source, ends=grammar.ends)


def _grammar_from_proto(message: pb.DraftGrammar) -> Grammar:
    """A kind that came after this version is one that cannot be compiled here: no text of Lark is empty."""
    kind = _KINDS_BACK.get(message.kind)
    return Grammar("lark", "") if kind is None else Grammar(kind, message.source, tuple(message.ends))


def _window_to_proto(window: StreamingWindow | None) -> pb.StreamingWindow | None:
    if window is None:
        return None
    return pb.StreamingWindow(ctx_size=window.ctx_size, n_keep=window.n_keep, n_discard=window.n_discard)


def _params_from_proto(opened: pb.Open) -> SamplingParams:
    message = opened.sampling
    window = opened.window if opened.HasField("window") else None
    return SamplingParams(
        ctx_size=None if window is None else window.ctx_size,
        n_keep=None if window is None else window.n_keep,
        n_discard=None if window is None else window.n_discard,
        max_tokens=None,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        grammar=_grammar_from_proto(message.grammar) if message.HasField("grammar") else None,
    )
