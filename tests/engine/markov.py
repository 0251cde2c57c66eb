"""A model whose next token depends on the last one alone, by a table; and a draft by another table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.runner import Runner
from paceline.speculation import rejection, sampling
from paceline.speculation.frames import Advance, SparseRow
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams


class MarkovRunner(Runner):
    """`table` is [vocab, vocab]: the logits after each token."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def max_model_len(self) -> int:
        return 512

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kv_geometry(self) -> KVGeometry:
        return KVGeometry(1, 1, 1, torch.float32, self.device)

    def key_shift(self) -> KeyShift | str:
        return KeyShift((None,))

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        ids, _, rows = self.flatten(windows)
        return self._table[ids[rows]]


class MarkovProposer(Proposer):
    """Drafts from its own table, with or without the distributions, all sequences at once."""

    def __init__(self, table: torch.Tensor, *, probs: bool) -> None:
        self._table, self._probs = table, probs
        self._texts: dict[int, tuple[list[int], SamplingParams, int]] = {}

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:
        self._texts[sequence] = list(tokens), params, len(tokens)

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        drafted: dict[int, list[int]] = {want.sequence: [] for want in wanted}
        probs: dict[int, list[SparseRow]] = {want.sequence: [] for want in wanted}
        for depth in range(max(want.depth for want in wanted)):
            going = [want.sequence for want in wanted if want.depth > depth]
            batch = [self._rows(sequence, drafted[sequence]) for sequence in going]
            logits = self._table[[(rows.following or rows.tokens)[-1] for rows in batch]]
            if self._probs:
                for sequence, (token, row) in zip(going, rejection.draft(logits, batch), strict=True):
                    drafted[sequence].append(token)
                    probs[sequence].append(row)
            else:
                for sequence, (token,) in zip(going, sampling.draw(logits, batch), strict=True):
                    drafted[sequence].append(token)
        return {s: Proposal(tuple(found), Source.REMOTE, tuple(probs[s])) for s, found in drafted.items()}

    def advance(self, updates: Sequence[Advance]) -> None:
        for update in updates:
            self._texts[update.sequence][0][update.base :] = update.tokens

    def close(self, sequence: int) -> None:
        del self._texts[sequence]

    def serves(self, sequence: int) -> bool:
        return sequence in self._texts

    def latency(self, depth: int) -> float:
        return 0.0

    def _rows(self, sequence: int, drafted: list[int]) -> Rows:
        tokens, params, prompt = self._texts[sequence]
        return Rows(params, prompt, tokens, drafted)
