"""What a request and an engine say of the candidates that were verified for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from paceline.engine.engine import Engine
from paceline.speculation.frames import Advance
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.types import Delta, Metrics, SamplingParams, SourceMetrics, Verified
from tests import tiny

MODEL = tiny.tiny_llama()
PROMPT = tiny.prompt(9)
TEXT = tiny.generate(MODEL, PROMPT, 24)


@dataclass
class Prophet(Proposer):
    """Knows the greedy output; says it right for the first `right` candidates, wrong after them, nothing if late."""

    right: int = 99
    late: bool = False
    _lengths: dict[int, int] = field(default_factory=dict)

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:
        self._lengths[sequence] = len(tokens)

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        return {} if self.late else {want.sequence: self._proposal(want) for want in wanted}

    def _proposal(self, want: Wanted) -> Proposal:
        start = want.base - len(PROMPT)
        true = TEXT[start : start + want.depth]
        said = [token if n < self.right else (token + 1) % tiny.VOCAB for n, token in enumerate(true)]
        return Proposal(tuple(said), Source.REMOTE)

    def advance(self, updates: Sequence[Advance]) -> None: ...

    def close(self, sequence: int) -> None: ...

    def serves(self, sequence: int) -> bool:
        return True

    def latency(self, depth: int) -> float:
        return 0.0


def metrics(engine: Engine, **params: object) -> Metrics:
    engine.add(tiny.request(PROMPT, max_tokens=13, **params))
    (*_, (_, last)) = tiny.deltas(engine)
    assert last.metrics is not None
    return last.metrics


def deltas(busy: Engine) -> list[Delta]:
    busy.add(tiny.request(PROMPT, max_tokens=13))
    return [delta for _, delta in tiny.deltas(busy)]


class Letters:
    """One letter a token, so that characters of the text count its tokens."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "x" * len(token_ids)


def engine(proposer: Prophet, **options: object) -> Engine:
    return tiny.engine_for(MODEL, depth=3, proposer=proposer, **options)  # type: ignore[arg-type]


def test_acceptance_is_told_by_source_and_place() -> None:
    """13 tokens: one with the prompt, then four steps of three candidates and one token more, the last cut short."""
    assert metrics(engine(Prophet())).sources == (SourceMetrics("remote", (3, 3, 3), (3, 3, 3)),)


def test_a_delta_says_which_of_its_tokens_were_candidates() -> None:
    first, second, *_ = deltas(engine(Prophet(right=2), decoder=Letters()))
    assert (first.verified, len(first.token_ids)) == (None, 1)
    assert second.verified == Verified("remote", drafted=3, accepted=2, chars=2)
    assert len(second.token_ids) == len(second.text) == 3


def test_a_delta_without_candidates_says_nothing_of_them() -> None:
    assert {delta.verified for delta in deltas(engine(Prophet(late=True)))} == {None}


def test_of_a_run_that_ends_the_output_only_what_was_taken_counts() -> None:
    taken = [(len(delta.token_ids), delta.verified) for delta in deltas(engine(Prophet()))]
    assert all(found.accepted <= tokens for tokens, found in taken if found is not None)
    assert sum(tokens for tokens, _ in taken) == 13


def test_a_refused_candidate_takes_those_behind_it_along() -> None:
    found = metrics(engine(Prophet(right=1)))
    (source,) = found.sources
    assert source.accepted[1:] == (0, 0)
    assert source.accepted[0] == source.drafted[0]
    assert found.rolled_back == source.rolled_back == sum(source.drafted[1:])


def test_a_candidate_behind_the_end_is_not_accepted() -> None:
    stop = next(n for n in range(2, 12) if TEXT[n] not in TEXT[:n] and n % 4 in (1, 2))
    found = metrics(engine(Prophet()), stop_token_ids=(TEXT[stop],))
    assert found.completion_tokens == stop + 1
    assert found.drafted - found.accepted == found.rolled_back > 0


def test_candidates_for_which_a_step_has_no_room_are_wasted() -> None:
    found = metrics(engine(Prophet(), max_batched_tokens=2))
    (source,) = found.sources
    assert (found.wasted, len(source.drafted)) == (source.wasted, 1)
    assert source.wasted > 0


def test_late_steps_are_counted() -> None:
    found = metrics(engine(Prophet(late=True)))
    assert (found.late, found.drafted, found.sources) == (11, 0, ())


def test_the_engines_totals_are_sums_over_its_requests() -> None:
    busy = engine(Prophet())
    first, second = metrics(busy), metrics(busy)
    assert busy.tally.drafted == first.drafted + second.drafted
    assert busy.tally.accepted == first.accepted + second.accepted
    assert busy.tally.steps == first.steps + second.steps


def test_requests_without_speculation_are_counted() -> None:
    some = engine(Prophet())
    some.add(replace(tiny.request(PROMPT, "a"), speculate=False))
    some.add(tiny.request(PROMPT, "b"))
    tiny.finish(some)
    assert (some.tally.requests, some.tally.declined) == (2, 1)
