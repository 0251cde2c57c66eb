"""Conversations written by the target in thousands of streams at once, on the device from the first token to the last.

One step computes one token of every stream: keys and values lie in a preallocated cache, what is fed next (the
opening, the words between turns, or what the model drew) is decided by tensors, and on a GPU the whole step is a
CUDA graph. Nothing is prefilled: openings are short, and feeding them costs the steps they are long.

    stream b:  opening ─ [user's line] ─ words between ─ answer ─ words between ─ user's line ─ … ─ next opening
                forced      drawn            forced       drawn       forced         drawn
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.distill.chat import ChatFormat
from paceline.distill.teacher import TeacherHead
from paceline.distill.text import Rows
from paceline.engine.attention import ATTENTION_NAME, AttentionStep, Scoring
from paceline.errors import ModelError

BUCKET = 64
"""Attention reads the cache up to the next multiple of this; one CUDA graph each."""
USER_TEMPERATURE = 0.9
"""At which the model writes the user's lines, also where it answers greedily: else all would be the same."""
LONGEST_ANSWER, LONGEST_LINE = 256, 128
"""Tokens after which a conversation is cut: a model that repeats itself must not fill the text with it."""
NEW_CONVERSATION = 0.45
"""How often an answer is the last of its conversation."""
TO_ANSWER, TO_USER, FIRST_OPENING = 0, 1, 2


@dataclass(slots=True)
class StreamStep(AttentionStep):
    """One token of every stream against the cache: keys and values [layers, streams, kv_heads, T, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    at: torch.Tensor
    """Index in the row of the token being computed: int64 [1]."""
    start: torch.Tensor
    """Where each stream's conversation begins: int64 [streams]."""
    length: int = 0
    """Of the cache that is read."""
    _mask: torch.Tensor | None = field(default=None)
    attend_streams: Callable[..., torch.Tensor] | None = None

    def begin(self, length: int) -> None:
        self.length = length
        index = torch.arange(length, device=self.at.device)
        seen = (index[None, :] >= self.start[:, None]) & (index[None, :] <= self.at) | (index[None, :] == self.at)
        self._mask = seen[:, None, None, :]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        if scoring.softcap is not None or scoring.sinks is not None:
            raise ModelError("attention with soft-capping or sinks is not written in streams")
        if scoring.sliding_window is not None and scoring.sliding_window < self.keys.shape[3]:
            raise ModelError(f"a sliding window of {scoring.sliding_window} is shorter than a row")
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.at, key[0].transpose(0, 1).unsqueeze(2))
        values.index_copy_(2, self.at, value[0].transpose(0, 1).unsqueeze(2))
        streams, kv_heads, _, dim = keys.shape
        grouped = query[0].transpose(0, 1).reshape(streams, kv_heads, -1, dim)
        if self.attend_streams is not None:
            out = self.attend_streams(grouped, keys, values, self.start, self.at, scoring.scale)
        else:
            out = attend_plainly(grouped, keys[:, :, : self.length], values[:, :, : self.length], self._mask, scoring)
        return out.reshape(streams, -1, dim).transpose(0, 1)[None]


def attend_plainly(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """`grouped` [streams, kv_heads, heads of each, head_dim] over keys and values [streams, kv_heads, L, head_dim]."""
    scores = (grouped @ keys.transpose(-1, -2)).float() * scoring.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(values.dtype) @ values


@dataclass(frozen=True, slots=True)
class Scripts:
    """What is forced: row 0 between a user's line and the answer, row 1 after an answer, then the openings.

    `tokens` int64 [n, longest]; `lengths` int64 [n]; `answers` bool [n]: an answer follows, else a user's line does.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    answers: torch.Tensor

    @classmethod
    def build(cls, chat: ChatFormat, openings: Sequence[tuple[Sequence[int], bool]], device: torch.device) -> Scripts:
        """`openings` are token ids and whether the answer follows them."""
        rows = [(chat.before_answer[1:], True), (chat.before_next_user, False), *openings]
        tokens = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.int64)
        for n, (ids, _) in enumerate(rows):
            tokens[n, : len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        answers = torch.tensor([answer for _, answer in rows])
        return cls(tokens.to(device), lengths.to(device), answers.to(device))


class StreamWriter:
    """Writes rows of `length` tokens, `streams` at a time, with one model.

    Raises ModelError for models whose attention cannot be replaced by `StreamStep`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        openings: Sequence[tuple[Sequence[int], bool]],
        eos: Collection[int],
        *,
        streams: int,
        length: int,
        seed: int,
        keep_states: bool = False,
    ) -> None:
        model.set_attn_implementation(ATTENTION_NAME)
        self._model, self._chat = model, chat
        self._device = model.device
        self._streams, self._length = streams, length
        self._head = TeacherHead(model)
        self._scripts = Scripts.build(chat, openings, self._device)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._eos = torch.tensor(sorted(eos), device=self._device)
        self._graphs: dict[int, Any] = {}
        self._allocate(keep_states)

    @torch.inference_mode()
    def write(self) -> tuple[Rows, torch.Tensor | None]:
        """One round: rows [streams, length] and, if kept, the hidden state after every token."""
        self._begin()
        for n in range(self._length - 1):
            self._step(n)
        if self._states is not None:
            self._run_model(self._length)
        return Rows(self._tokens.clone(), self._starts.clone(), self._answers.clone()), self._states

    def _allocate(self, keep_states: bool) -> None:
        config = self._model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, self._streams, heads, self._length, dim)
        options = {"device": self._device, "dtype": self._model.dtype}
        integers = {"device": self._device, "dtype": torch.int64}
        self._at, self._start = torch.zeros(1, **integers), torch.zeros(self._streams, **integers)
        self._cache = StreamStep(torch.zeros(shape, **options), torch.zeros(shape, **options), self._at, self._start)
        self._cache.attend_streams = _fast_attention(self._device, dim)
        self._token = torch.zeros(self._streams, **integers)
        self._script, self._offset = torch.zeros_like(self._token), torch.zeros_like(self._token)
        self._drawn_run = torch.zeros_like(self._token)
        self._answering = torch.zeros(self._streams, dtype=torch.bool, device=self._device)
        self._temperature = torch.zeros(self._streams, device=self._device)
        size = (self._streams, self._length)
        self._tokens, self._starts = (torch.zeros(size, device=self._device, dtype=torch.int32) for _ in range(2))
        self._answers = torch.zeros(size, dtype=torch.bool, device=self._device)
        hidden = config.hidden_size
        self._states = torch.zeros(*size, hidden, **options) if keep_states else None

    def _begin(self) -> None:
        """Every stream at its first token, with a temperature of its own: half greedy, half 0.6 to 1."""
        shape, options = (self._streams,), {"generator": self._generator, "device": self._device}
        self._at.zero_()
        self._start.zero_()
        self._drawn_run.zero_()
        self._script.copy_(torch.randint(FIRST_OPENING, len(self._scripts.lengths), shape, **options))
        self._offset.fill_(1)
        self._answering.copy_(self._scripts.answers[self._script])
        self._token.copy_(self._scripts.tokens[self._script, 0])
        warm = 0.6 + 0.4 * torch.rand(shape, **options)
        self._temperature.copy_(torch.where(torch.rand(shape, **options) < 0.5, torch.zeros_like(warm), warm))
        self._tokens[:, 0], self._starts[:, 0], self._answers[:, 0] = self._token.int(), 0, False

    def _step(self, n: int) -> None:
        length = min(self._length, (n // BUCKET + 1) * BUCKET)
        if self._device.type != "cuda":
            self._advance(length)
            return
        if length not in self._graphs:
            self._capture(length)
        self._graphs[length].replay()

    def _capture(self, length: int) -> None:
        """Record a step; warming up runs it, so the streams' state is put back."""
        state = (self._at, self._start, self._token, self._script, self._offset, self._answering, self._drawn_run)
        saved = [one.clone() for one in state]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(length)
        torch.cuda.current_stream().wait_stream(side)
        for one, was in zip(state, saved, strict=True):
            one.copy_(was)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=next(iter(self._graphs.values())).pool() if self._graphs else None):
            self._advance(length)
        self._graphs[length] = graph
        torch.cuda.empty_cache()  # What warming up took, on a stream of its own.

    def _run_model(self, length: int) -> torch.Tensor:
        """Hidden states [streams, hidden] of the current tokens; kept if states are."""
        self._cache.begin(length)
        hidden: torch.Tensor = self._model.base_model(
            input_ids=self._token[None],
            position_ids=(self._at - self._start).clamp(min=0)[None],
            use_cache=False,
            paceline_step=self._cache,
        ).last_hidden_state[0]
        if self._states is not None:
            self._states.index_copy_(1, self._at, hidden[:, None].to(self._states.dtype))
        return hidden

    def _advance(self, length: int) -> None:
        """One token of every stream; no value is looked at by the host."""
        logits = self._head(self._run_model(length)).float()
        temperature = torch.where(self._answering, self._temperature, USER_TEMPERATURE)
        noise = torch.empty_like(logits).exponential_(generator=self._generator).log_()
        drawn = (logits - temperature[:, None] * noise).argmax(dim=-1)
        scripts, longest = self._scripts, self._scripts.tokens.shape[1]
        forced = self._offset < scripts.lengths[self._script]
        following = torch.where(forced, scripts.tokens[self._script, self._offset.clamp(max=longest - 1)], drawn)
        answered = ~forced & self._answering
        self._at += 1
        self._drawn_run.copy_(torch.where(forced, 0, self._drawn_run + 1))
        self._token.copy_(following)
        ended = self._turns(following, forced)
        column = self._at
        self._tokens.index_copy_(1, column, following.int()[:, None])
        self._answers.index_copy_(1, column, answered[:, None])
        # A new conversation begins after this token.
        self._start.copy_(torch.where(ended, self._at + 1, self._start))
        self._starts.index_copy_(1, column, self._start.int()[:, None])

    def _turns(self, following: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """Move every stream's script on; true where the conversation has ended."""
        scripts, chance = self._scripts, {"generator": self._generator, "device": self._device}
        self._offset += forced
        line_over = ~forced & ~self._answering & (following == self._chat.end_of_user)
        answer_over = ~forced & self._answering & (following[:, None] == self._eos).any(dim=1)
        too_long = ~forced & (self._drawn_run >= torch.where(self._answering, LONGEST_ANSWER, LONGEST_LINE))
        last = torch.rand(self._streams, **chance) < NEW_CONVERSATION
        if not self._chat.writes_users:
            last = torch.ones_like(last)
        ended = (answer_over & last) | (too_long & ~answer_over & ~line_over)
        again = answer_over & ~last
        opening = torch.randint(FIRST_OPENING, len(scripts.lengths), (self._streams,), **chance)
        script = torch.where(
            line_over, TO_ANSWER, torch.where(again, TO_USER, torch.where(ended, opening, self._script))
        )
        moved = line_over | again | ended
        self._script.copy_(script)
        self._offset.copy_(torch.where(moved, 0, self._offset))
        self._answering.copy_(torch.where(moved, scripts.answers[script], self._answering))
        self._drawn_run.copy_(torch.where(moved, 0, self._drawn_run))
        return ended


def _fast_attention(device: torch.device, head_dim: int) -> Callable[..., torch.Tensor] | None:
    """A kernel that reads each stream's own tokens only, if it runs here and computes the same."""
    if device.type != "cuda":
        return None
    from paceline.distill.stream_attention import checked

    return checked(device, head_dim)
