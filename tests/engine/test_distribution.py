"""Through the engine, both ways to verify give the target's own distribution: 200,000 draws each, by chi-square.

The target is a Markov chain, so that a token's distribution is known from the one before it. Counts are compared
for each pair of tokens, at each place within a step: the first token of a step, the second (one candidate was
accepted before it), and so on. Seeds are fixed. A limit is passed by one true sampler in 100,000.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from paceline.config import SpeculationSettings
from paceline.engine.attention import Window
from paceline.engine.draft_streams import DraftStreams
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.runner import Runner
from paceline.speculation import rejection
from paceline.speculation.controller import FixedDepth
from paceline.speculation.frames import SparseRow
from paceline.speculation.proposer import Proposer
from paceline.speculation.rejection import Guess, Purpose
from paceline.speculation.remote import RemoteProposer
from paceline.speculation.sampling import Rows
from paceline.speculation.speculator import Speculator
from paceline.types import Request, SamplingParams
from tests import tiny
from tests.engine.markov import MarkovProposer, MarkovRunner
from tests.speculation.wire import Clock, DraftSide, Wire

VOCAB = 8
SEQUENCES = 64
DEPTHS = range(1, 9)
DRAWS = 200_000
RARE = 1e-5
TARGET = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
TARGET[:, 6:] = -torch.inf
NOISE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
ELSEWHERE = torch.full((VOCAB, VOCAB), -torch.inf)
ELSEWHERE[:, 6:] = NOISE[:, 6:]
DRAFTS = {
    "equal": TARGET,
    "near": TARGET + 0.3 * NOISE,
    "far": 2 * NOISE,
    "certain and wrong": torch.where(torch.eye(VOCAB).bool(), 8.0, 0.0),
    "disjoint": ELSEWHERE,
}
SLOW = ("far", "certain and wrong")
"""Between others."""
TOKENS = 2 + DRAWS // (len(DRAFTS) * len(DEPTHS) * SEQUENCES)


@dataclass
class Sample:
    """How often each token followed each other, by its place within the step that drew it."""

    counts: torch.Tensor
    drafted: int
    accepted: int

    def p_value(self) -> float:
        """Of the chi-square statistic over all pairs and places."""
        expected = self.counts.sum(-1, keepdim=True) * TARGET.double().softmax(-1)
        used = expected > 5
        rows = used.any(-1)
        statistic = ((self.counts - expected) ** 2 / expected)[used].sum()
        freedom = used.sum() - rows.sum()
        return torch.special.gammaincc(freedom / 2.0, statistic / 2).item()

    def impossible(self) -> int:
        return int(self.counts[..., 6:].sum())


def sample(verification: str, draft: torch.Tensor, depth: int) -> Sample:
    return drawn_by(MarkovRunner(TARGET), MarkovProposer(draft, probs=verification == "rejection"), verification, depth)


def drawn_by(runner: Runner, proposer: Proposer, verification: str, depth: int) -> Sample:
    engine = Engine(
        runner,
        tiny.kv_for(runner, capacity=SEQUENCES * (TOKENS + 80)),
        EngineLimits(512, SEQUENCES, SEQUENCES * (1 + depth), SEQUENCES),
        speculator=Speculator(FixedDepth(depth), max_depth=depth, draft=proposer),
        speculation=SpeculationSettings(depth=depth, verification=verification),  # type: ignore[arg-type]
    )
    for n in range(SEQUENCES):
        params = SamplingParams(seed=100 * depth + n, max_tokens=TOKENS, ignore_eos=True)
        engine.add(Request(str(n), (n % 6,), params))
    found: Counter[tuple[int, int, int]] = Counter()
    last = {str(n): n % 6 for n in range(SEQUENCES)}
    for name, delta in tiny.deltas(engine):
        for place, token in enumerate(delta.token_ids):
            found[place, last[name], token] += 1
            last[name] = token
    counts = torch.zeros(depth + 1, VOCAB, VOCAB, dtype=torch.float64)
    for key, count in found.items():
        counts[key] = count
    return Sample(counts, engine.tally.drafted, engine.tally.accepted)


VERIFICATIONS = pytest.mark.parametrize("verification", ["coupled", "rejection"])


@VERIFICATIONS
@pytest.mark.parametrize(
    "draft",
    [pytest.param(table, marks=pytest.mark.slow if name in SLOW else ()) for name, table in DRAFTS.items()],
    ids=DRAFTS,
)
def test_draws_follow_the_target_at_every_depth(verification: str, draft: torch.Tensor) -> None:
    samples = [sample(verification, draft, depth) for depth in DEPTHS]
    assert [each.impossible() for each in samples] == [0] * len(samples)
    assert [each.p_value() > RARE for each in samples] == [True] * len(samples)
    assert sum(int(each.counts.sum()) for each in samples) >= DRAWS / len(DRAFTS)


# Through a drafter that runs ahead, and whose answers come late now and then.


class MarkovDraft(DraftSide):
    def __init__(self, table: torch.Tensor, clock: Clock) -> None:
        self._table = table
        super().__init__(tiny.tiny_llama(), clock)

    def restart(self) -> None:
        runner = MarkovRunner(self._table)
        kv = tiny.kv_for(runner, capacity=SEQUENCES * (TOKENS + 100))
        drafter = Drafter(runner, kv, max_batched_tokens=SEQUENCES * 4, max_model_len=512)
        self.streams, self.wires = DraftStreams(drafter, self.clock), {}


class Meanwhile(MarkovRunner):
    """The target's model, beside which a drafter works."""

    wire: Wire

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        self.wire.pump()
        return super().run(windows)


@VERIFICATIONS
@pytest.mark.parametrize("name", ["equal", "near", "far"])
def test_a_drafter_that_runs_ahead_and_is_late_changes_no_distribution(verification: str, name: str) -> None:
    clock, chance = Clock(), random.Random(1)

    def wait(_: threading.Condition, seconds: float) -> None:
        """The drafter gets to work, or the deadline passes."""
        worked = chance.random() < 0.97 and runner.wire.pump()
        clock.now += 0.001 if worked else seconds

    proposer = RemoteProposer(0.1, clock, ahead=5, rejection=verification == "rejection", wait=wait)
    runner = Meanwhile(TARGET)
    runner.wire = Wire("t", "d", proposer, MarkovDraft(DRAFTS[name], clock))
    found = drawn_by(runner, proposer, verification, depth=3)
    assert (found.impossible(), found.p_value() > RARE, found.accepted > 0) == (0, True, True)
    assert 0 < proposer.stats.late < found.drafted


# The test can fail.


def test_one_stream_for_everything_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = rejection.uniform
    monkeypatch.setattr(rejection, "uniform", lambda seed, _, position: uniform(seed, Purpose.OWN, position))
    assert sample("rejection", DRAFTS["far"], 2).p_value() < RARE


def test_drafts_drawn_from_another_distribution_than_they_say_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = SparseRow(tuple(range(VOCAB)), (1 / VOCAB,) * VOCAB)
    draft = rejection.draft
    monkeypatch.setattr(rejection, "draft", lambda *given: [(token, flat) for token, _ in draft(*given)])
    assert sample("rejection", DRAFTS["far"], 2).p_value() < RARE


def test_a_refusal_redrawn_from_the_whole_distribution_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = rejection.verify

    def careless(logits: torch.Tensor, batch: list[Rows], guesses: list[Guess]) -> list[rejection.Verdict]:
        kept = [verdict.accepted for verdict in verify(logits, batch, guesses)]
        again = [Guess(guess.tokens[:n], guess.probs[:n]) for guess, n in zip(guesses, kept, strict=True)]
        return verify(logits, batch, again)

    monkeypatch.setattr(rejection, "verify", careless)
    assert sample("rejection", DRAFTS["far"], 2).p_value() < RARE
