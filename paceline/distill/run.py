"""`paceline distill` from beginning to end: write text, choose what to build, train, measure, export.

OUT/                  the draft (paceline.models.draft_folder), once it is measured
OUT/.state/           what an interrupted run goes on from: the settings, text-*.safetensors, the training's state
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.distill import card, measure, openings, plan
from paceline.distill import chat as chats
from paceline.distill.budget import Budget
from paceline.distill.chat import ChatFormat, chat_format
from paceline.distill.draft import DraftBody, Tokens, choose_tokens, new_draft
from paceline.distill.measure import Acceptance
from paceline.distill.shape import DraftShape
from paceline.distill.streams import StreamWriter
from paceline.distill.teacher import RESERVE_ALONE, StateStore, Teacher, TeacherHead, new_store
from paceline.distill.text import Rows, TextStore, free_of, join
from paceline.distill.train import Trainer, TrainProgress, TrainSettings
from paceline.distill.write import EngineWriter, StreamsWriter, Writer, encode, streams_that_fit
from paceline.engine.geometry import max_model_len
from paceline.errors import ConfigError, ModelError
from paceline.models import eos_token_ids, load_causal_lm, load_tokenizer, tokenizer_fingerprint
from paceline.models.draft_folder import GROUP, DraftCard, dequantize, quantize, write_draft
from paceline.speculation.grammar import tokenizer_text

STATE = ".state"
OPENINGS = {"cuda": 200_000, "cpu": 5_000}
"""By device: so many that greedy answers seldom come twice."""
WRITING, TRYING, MEASURING = 0.4, 0.08, 0.04
"""Shares of the time budget; trying only if there is something to choose from. The rest is training."""
VALIDATION_ROWS = 128
HELD_OUT = 120
TEMPERATURES = (0.0, measure.WARM)
ENOUGH_TOKENS = 48_000_000
"""More than this is only written if its hidden states can be remembered: reading them costs a tenth of training,
computing them again doubles it."""

Report = Callable[[str, float, str], None]
"""What is being done, how far it is (0 to 1), and a remark."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is asked for. Rounds and steps in place of time make a run that is the same everywhere (for tests)."""

    target: str
    minutes: float = 10.0
    seed: int = 0
    device: str = "auto"
    sizes: tuple[DraftShape, ...] = ()
    """Candidates; none lets the plan choose."""
    recipes: tuple[TrainSettings, ...] = (TrainSettings(),)
    prompts: tuple[str, ...] = ()
    """The user's own; none takes the built-in openings."""
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    row_length: int = 512
    streams: int | None = None
    write_rounds: int | None = None
    train_steps: int | None = None
    max_tokens: int = measure.MAX_TOKENS
    command: str = ""

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on from another's state; the time may be longer."""
        kept = ("target", "seed", "row_length", "prompts")
        return json.loads(json.dumps({name: getattr(self, name) for name in kept}))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made and how good it is. Acceptance by temperature, then by category with `all`; `before` training by
    temperature."""

    path: Path
    shape: DraftShape
    tokens_written: int
    progress: TrainProgress
    before: Mapping[float, Acceptance]
    acceptance: Mapping[float, Mapping[str, Acceptance]]
    gains: Sequence[plan.Gain]
    costs: plan.Costs


def distill(path: Path, out: Path, settings: Settings, report: Report = lambda *_: None) -> Outcome:
    """Make a draft for the model in the folder `path`. Raises ModelError or ConfigError.

    Interrupted, it leaves its state in `out`; the same call goes on from there.
    """
    state = _state_folder(out, settings)
    run = _Run(path, state, settings, report)
    rows, store = run.write()
    counts = rows.counts(run.vocab_size).cpu()
    body, tokens, shape, progress = run.train(rows, counts, store)
    del store
    outcome = run.finish(out, body, tokens, shape, progress, rows, counts)
    shutil.rmtree(state)
    return outcome


class _Run:
    """What every phase needs: the target, its tokenizer and words, the time."""

    def __init__(self, path: Path, state: Path, settings: Settings, report: Report) -> None:
        self.path, self.state, self.report = path, state, report
        self.device = _device(settings.device)
        report("loading the target", 0.0, settings.target)
        self.tokenizer = load_tokenizer(path)
        self.eos = eos_token_ids(path, tokenizer=self.tokenizer)
        self.chat: ChatFormat = chat_format(self.tokenizer, self.eos)
        self.target = _load_target(path, self.device)
        self.vocab_size = int(self.target.config.get_text_config(decoder=True).vocab_size)
        self.settings = settings = replace(settings, row_length=min(settings.row_length, max_model_len(self.target)))
        self.held_out = _held_out(settings)
        self._avoid = {openings.normalized(text) for texts in self.held_out.values() for text in texts}
        self._store = TextStore(state / "text")

    # Writing

    def write(self) -> tuple[Rows, StateStore | None]:
        """Text until its share of the time is spent; what an earlier run wrote counts."""
        settings = self.settings
        share = Budget(60 * settings.minutes * WRITING, used=self._used("written"))
        if settings.write_rounds is not None:
            share = Budget(settings.write_rounds, counts_steps=True, used=self._used("written"))
        found = self._store.read()
        parts = [] if found is None else [found]
        count = 0 if found is None else len(found)
        if found is not None and share.spent:
            return self._rows(parts), new_store(self.target, settings.row_length, RESERVE_ALONE)
        writer = self._writer(round_seed=count)
        store = new_store(self.target, settings.row_length)
        phrases = self._held_out_phrases()
        began = time.monotonic()
        wrote = 0
        full = False
        while not (share.spent or full) or not parts:
            rows, states = writer.write()
            clean = free_of(rows, phrases) & rows.answers.any(dim=1)
            if states is not None:
                clean &= states.isfinite().flatten(1).all(dim=1)
            rows = rows.at(clean)
            if store is not None and states is not None:
                store.put(torch.arange(count, count + len(rows)), states[clean])
                full = store.full and len(store) * rows.length >= ENOUGH_TOKENS
                rows = rows.at(slice(0, max(0, len(store) - count))) if full else rows
            rows = rows.to("cpu")
            self._store.add(rows)
            parts.append(rows)
            count += len(rows)
            wrote += rows.tokens.numel()
            share.advance()
            self._note("written", share.used)
            speed = wrote / (time.monotonic() - began)
            self.report(
                "writing text", share.fraction, f"{count * rows.length / 1e6:.2f}M tokens, {speed:.0f} tokens/s"
            )
        if full and not share.spent:
            self._note("spared", 0.0 if share.counts_steps else share.limit - share.used)
            self._note("written", share.limit)
        del writer
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._rows(parts), store

    def _rows(self, parts: list[Rows]) -> Rows:
        return join(parts).to(self.device)

    def _writer(self, round_seed: int) -> Writer:
        settings = self.settings
        seed = settings.seed * 1_000_003 + round_seed
        if settings.prompts:
            chosen = openings.from_lines(settings.prompts, OPENINGS[self.device.type], seed, self._avoid)
        else:
            chosen = openings.openings(OPENINGS[self.device.type], seed, self._avoid)
        starts = encode(self.tokenizer, self.chat, chosen)
        if not starts:
            raise ModelError("no opening fits this model's chat template; give --prompts")
        length = settings.row_length
        if self.device.type == "cuda":
            streams = settings.streams or streams_that_fit(self.target, length)
            try:
                return StreamsWriter(
                    StreamWriter(
                        self.target,
                        self.chat,
                        starts,
                        self.eos,
                        streams=streams,
                        length=length,
                        seed=seed,
                        keep_states=True,
                    )
                )
            except ModelError:
                pass  # Attention of a kind that streams do not have: the engine does.
        return self._engine_writer(starts, seed)

    def _engine_writer(self, starts: list[tuple[list[int], bool]], seed: int) -> Writer:
        from paceline.engine.load import load_model

        batch = self.settings.streams or 16
        length = self.settings.row_length
        engine = load_model(
            self.path,
            EngineSettings(
                device="cuda" if self.device.type == "cuda" else "cpu",
                threads=torch.get_num_threads(),
                max_num_seqs=batch,
                max_queued_requests=2 * batch,
                kv_tokens=2 * batch * length,
                max_batched_tokens=512,
            ),
        ).engine()
        return EngineWriter(engine, self.chat, starts, self.eos, batch=batch, length=length, seed=seed)

    def _held_out_phrases(self) -> list[list[int]]:
        """Token ids of each held-out line with what closes it: nothing written may hold them."""
        close = list(self.chat.before_answer[:1])
        texts = [text for found in self.held_out.values() for text in found]
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*ids, *close] for ids in encoded]

    # Training

    def train(
        self, rows: Rows, counts: torch.Tensor, store: StateStore | None
    ) -> tuple[DraftBody, Tokens, DraftShape, TrainProgress]:
        """The best of the candidates after short trials, trained for what is left of the time."""
        first = min(VALIDATION_ROWS, len(rows) // 8)
        shapes = [shape.within(self.vocab_size) for shape in self.settings.sizes] or [self._planned()]
        candidates = [(shape, recipe) for recipe in self.settings.recipes[:1] for shape in shapes]
        total = 60 * self.settings.minutes
        trials = len(candidates) + len(self.settings.recipes) - 1
        share = 1.0 - WRITING - MEASURING - (TRYING if trials > 1 else 0.0)
        chosen = self._chosen()
        if chosen is None:
            chosen = candidates[0]
            if trials > 1:
                chosen = self._try(candidates, rows, counts, store, first, total * TRYING / trials)
            self._note("chosen", {"shape": asdict(chosen[0]), "recipe": asdict(chosen[1])})
        shape, recipe = chosen
        trainer, tokens = self._trainer(shape, recipe, rows, counts, store, first)
        used = trainer.restore(self.state)
        budget = Budget(total * share + self._used("spared"), used=used)
        if self.settings.train_steps is not None:
            budget = Budget(self.settings.train_steps, counts_steps=True, used=used)

        def on_step(progress: TrainProgress) -> None:
            remark = f"step {progress.steps}, {progress.tokens / 1e6:.1f}M answer tokens, loss {progress.loss:.3f}"
            self.report("training", budget.fraction, remark)

        try:
            progress = trainer.run(budget, on_step, save=lambda: trainer.save(self.state, budget))
        except KeyboardInterrupt:
            trainer.save(self.state, budget)
            raise
        return trainer.draft, tokens, shape, progress

    def _trainer(
        self,
        shape: DraftShape,
        recipe: TrainSettings,
        rows: Rows,
        counts: torch.Tensor,
        store: StateStore | None,
        first: int,
    ) -> tuple[Trainer, Tokens]:
        tokens = self._tokens(shape, counts)
        model = new_draft(shape, tokens, counts, self.target, self.settings.seed)
        body = DraftBody(model, tokens).to(self.device)
        teacher = Teacher(self.target, tokens.kept, store)
        return Trainer(body, teacher, rows, replace(recipe, seed=self.settings.seed), first=first), tokens

    def _tokens(self, shape: DraftShape, counts: torch.Tensor) -> Tokens:
        special = {*self.tokenizer.all_special_ids, *self.eos, *self.chat.before_answer, *self.chat.before_next_user}
        return choose_tokens(counts, shape.kept, special, self.target.get_input_embeddings().weight.detach())

    def _try(
        self,
        candidates: list[tuple[DraftShape, TrainSettings]],
        rows: Rows,
        counts: torch.Tensor,
        store: StateStore | None,
        first: int,
        seconds: float,
    ) -> tuple[DraftShape, TrainSettings]:
        """Train each candidate for a moment: shapes first, then recipes with the best shape."""
        scores: dict[tuple[DraftShape, TrainSettings], float] = {}
        results: list[dict[str, Any]] = []

        def score(candidate: tuple[DraftShape, TrainSettings]) -> float:
            if candidate not in scores:
                shape, recipe = candidate
                brief = replace(recipe, compile=False)  # Compiling would take half of so short a time.
                trainer, tokens = self._trainer(shape, brief, rows, counts, store, first)
                progress = trainer.run(Budget(seconds))
                same, overlap = self.quick(trainer.draft, tokens, rows.at(slice(0, first)))
                scores[candidate] = (same + overlap) / 2
                remark = f"agreement {same:.3f}, overlap {overlap:.3f}, {progress.steps} steps"
                self.report("trying", min(1.0, len(scores) / trials), f"{_in_words(shape, recipe)}: {remark}")
                results.append(
                    {"shape": asdict(shape), "recipe": asdict(recipe), "agreement": same, "overlap": overlap}
                )
                self._note("trials", results)
            return scores[candidate]

        trials = len(candidates) + len(self.settings.recipes) - 1
        shape, _ = max(candidates, key=score)
        return max(((shape, recipe) for recipe in self.settings.recipes), key=score)

    def quick(self, body: DraftBody, tokens: Tokens, rows: Rows) -> tuple[float, float]:
        """Agreement and overlap on rows that are not trained on."""
        body.eval()
        teacher = Teacher(self.target, tokens.kept)
        head = TeacherHead(self.target).weight
        same, overlap, parts = 0.0, 0.0, 0
        for first in range(0, len(rows), 32):
            part = rows.at(slice(first, first + 32))
            a, o = measure.row_agreement(body, tokens, part, teacher.compute(part), head)
            same, overlap, parts = same + a, overlap + o, parts + 1
        return same / max(1, parts), overlap / max(1, parts)

    def _planned(self) -> DraftShape:
        self.report("timing this machine", 0.0, "")
        steps = plan.target_steps(self._target_runner())
        name, shape = plan.choose(steps, lambda shape: plan.draft_step(shape, self.device), self.vocab_size)
        self.report("timing this machine", 1.0, f"a target step takes {steps[1]:.1f} ms; size {name}")
        return shape

    def _target_runner(self) -> Any:
        from paceline.engine.load import load_model

        device: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        return load_model(self.path, EngineSettings(device=device, threads=torch.get_num_threads())).runner

    # Measuring and exporting

    def finish(
        self,
        out: Path,
        body: DraftBody,
        tokens: Tokens,
        shape: DraftShape,
        progress: TrainProgress,
        rows: Rows,
        counts: torch.Tensor,
    ) -> Outcome:
        """Round the draft to what is stored, measure that, write the folder."""
        self.target.set_attn_implementation("sdpa")
        self.target.float()
        fresh = DraftBody(new_draft(shape, tokens, counts, self.target, self.settings.seed), tokens).to(self.device)
        round_weights(body)
        acceptance: dict[float, dict[str, Acceptance]] = {}
        before: dict[float, Acceptance] = {}
        for n, temperature in enumerate(TEMPERATURES):
            texts = self._held_out_texts(temperature)
            before[temperature] = measure.summarize(measure.agreements(fresh.eval(), tokens, texts))
            acceptance[temperature] = measure.by_category(texts, measure.agreements(body.eval(), tokens, texts))
            rate = acceptance[temperature]["all"].tokens_per_step[4]
            remark = f"temperature {temperature:g}: {rate:.2f} tokens a step at depth 4"
            self.report("measuring", (n + 1) / len(TEMPERATURES), remark)
        costs = plan.Costs(
            plan.target_steps(self._target_runner(), repeats=3), plan.draft_step(shape, self.device, repeats=3)
        )
        gains = plan.gains(acceptance[0.0]["all"].tokens_per_step, costs)
        outcome = Outcome(out, shape, rows.tokens.numel(), progress, before, acceptance, gains, costs)
        self._export(outcome, body, tokens)
        return outcome

    def _held_out_texts(self, temperature: float) -> list[measure.Continuation]:
        prompts = []
        for category, texts in self.held_out.items():
            ids = chats.prompts(self.tokenizer, self.chat, list(texts))
            prompts += [(category, one) for one in ids]
        deadline = Budget(60 * self.settings.minutes * MEASURING / len(TEMPERATURES))
        # A slow machine measures fewer prompts, of every category as many.
        order = list(range(len(prompts)))
        random.Random(self.settings.seed).shuffle(order)
        found: list[measure.Continuation] = []
        size = measure.BATCH if self.device.type == "cuda" else 16
        for first in range(0, len(order), size):
            chosen = [prompts[n] for n in order[first : first + size]]
            found += measure.continuations(
                self.target,
                chosen,
                self.eos,
                temperature,
                seed=self.settings.seed + first,
                max_tokens=self.settings.max_tokens,
            )
            deadline.advance()
            if deadline.spent and self.device.type != "cuda":
                break
        return found

    def _export(self, outcome: Outcome, body: DraftBody, tokens: Tokens) -> None:
        figures = card.figures(outcome, self._notes().get("trials", []))
        draft_card = DraftCard(
            target=self.settings.target,
            fingerprint=tokenizer_fingerprint(self.tokenizer),
            vocab_size=self.vocab_size,
            command=self.settings.command,
            seed=self.settings.seed,
            figures=figures,
        )
        text = card.readme(outcome, draft_card, _hardware(self.device), own_prompts=bool(self.settings.prompts))
        grammar_tokens = tokenizer_text(self.tokenizer)
        write_draft(outcome.path, body.draft, tokens.kept, tokens.nearest, draft_card, text, grammar_tokens)

    # Notes that outlive an interruption

    def _notes(self) -> dict[str, Any]:
        file = self.state / "progress.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _note(self, name: str, value: Any) -> None:
        (self.state / "progress.json").write_text(json.dumps(self._notes() | {name: value}, indent=2) + "\n")

    def _used(self, name: str) -> float:
        return float(self._notes().get(name, 0.0))

    def _chosen(self) -> tuple[DraftShape, TrainSettings] | None:
        found = self._notes().get("chosen")
        return None if found is None else (DraftShape(**found["shape"]), TrainSettings(**found["recipe"]))


@torch.no_grad()
def round_weights(body: DraftBody) -> None:
    """Put every matrix on the grid it is stored on, so that what is measured is what is shipped."""
    for parameter in body.draft.parameters():
        if parameter.dim() == 2 and parameter.shape[1] % GROUP == 0:
            parameter.copy_(dequantize(*quantize(parameter)))


def _load_target(path: Path, device: torch.device) -> PreTrainedModel:
    """In float32 on a CPU; on a GPU in float16 if that loses less than bfloat16 and stays finite."""
    if device.type == "cpu":
        return load_causal_lm(path, dtype=torch.float32, device=device, attn_implementation="sdpa")
    model = load_causal_lm(path, dtype=torch.float16, device=device, attn_implementation="sdpa")
    ids = torch.randint(
        model.config.get_text_config(decoder=True).vocab_size, (4, 256), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        finite = bool(torch.isfinite(model(input_ids=ids.to(device), use_cache=False).logits).all())
    return model if finite else load_causal_lm(path, dtype=torch.bfloat16, device=device, attn_implementation="sdpa")


def _held_out(settings: Settings) -> dict[str, Sequence[str]]:
    """Prompts nobody trains on, by category: those given, or some of the built-in ones."""
    if settings.held_out:
        return dict(settings.held_out)
    if settings.prompts:
        # Every twentieth of the user's own, at least one.
        return {"prompts": list(settings.prompts[:: max(2, min(20, len(settings.prompts)))])[:HELD_OUT]}
    chosen = openings.openings(4 * HELD_OUT, settings.seed + 1)
    return {"built-in": [each.text for each in chosen if each.whole][:HELD_OUT]}


def _state_folder(out: Path, settings: Settings) -> Path:
    """Its state, made or taken over. Raises ConfigError if `out` holds something else."""
    state = out / STATE
    marks = state / "settings.json"
    mine = settings.fingerprint()
    if marks.is_file():
        if json.loads(marks.read_text()) != mine:
            raise ConfigError(
                f"--out: {out}: holds an unfinished run with other settings; repeat its command or remove {state}",
                param="out",
            )
        return state
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out}: is not empty", param="out")
    state.mkdir(parents=True, exist_ok=True)
    marks.write_text(json.dumps(mine, indent=2) + "\n")
    return state


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda is asked for, but torch sees no GPU here", param="device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _in_words(shape: DraftShape, recipe: TrainSettings) -> str:
    return (
        f"{shape.kept} tokens, {shape.hidden} wide, {shape.layers} deep, mlp {shape.mlp}; "
        f"lr {recipe.lr:g}, sharpen {recipe.sharpen:g}, overlap {recipe.overlap:g}"
    )
