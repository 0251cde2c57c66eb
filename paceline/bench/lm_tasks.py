"""Tasks of EleutherAI's lm-evaluation-harness over our engine: its prompts and metrics, our logits and our sampling.

Import it only where `lm_eval` is installed (`pip install 'paceline[eval]'`). Nothing is fetched: a task runs if its
data is in the `datasets` cache or in files that its YAML names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from paceline.bench.scorers import EngineScorer
from paceline.engine.load import LoadedModel
from paceline.errors import ConfigError
from paceline.types import Request, SamplingParams

BOOTSTRAPS = 1000
"""Resamplings for the errors of metrics that have no formula for one."""
MAX_GEN_TOKENS = 256
"""Of an answer whose task sets no bound, as the harness has it."""

Scored = tuple[tuple[str, str], list[int], list[int]]
"""What was asked, and the ids of context and continuation."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One metric of one task; `error` is its standard error, None if the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None


def run_tasks(
    model: LoadedModel,
    names: Sequence[str],
    folder: Path | None = None,
    *,
    rows: int | None = None,
    limit: int | None = None,
    on_request: Callable[[int, None], None] = lambda *_: None,
) -> list[TaskResult]:
    """Metrics of the named tasks, also of those that YAML files in `folder` define; of `limit` documents each.

    `rows` is as in EngineScorer. Raises ConfigError for a task that is not known, or whose data is not here.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-path: {folder}: no such folder", param="tasks_path")
    manager = _manager(names, folder)
    with _offline():
        loaded = [task for name in names for task in _load(manager, name)]
        lm = EngineLM(model, rows, on_request)
        report = simple_evaluate(
            lm, tasks=loaded, task_manager=manager, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    return list(_results(report["results"]))


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no type information
    """What the harness asks of a model, one text after the other: contexts that choices share are computed once."""

    def __init__(
        self,
        model: LoadedModel,
        rows: int | None = None,
        on_request: Callable[[int, None], None] = lambda *_: None,
    ) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self._model = model
        self._scorer = EngineScorer(model, rows)
        self._on_request = on_request
        self._done = 0
        self._ids = itertools.count()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        return [self._rolling(*request.args) for request in requests]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        engine, limits = self._model.engine(), self._model.limits
        answers: list[str] = []
        for batch in _batches(requests, min(limits.max_num_seqs, limits.max_queued_requests)):
            texts = {f"eval-{next(self._ids)}": "" for _ in batch}
            for name, request in zip(texts, batch, strict=True):
                engine.add(self._request(name, *request.args))
            while engine.has_work:
                for name, delta in engine.step().items():
                    texts[name] += delta.text
                    if delta.finished:
                        self._count()
            answers += texts.values()
        return answers

    def _count(self) -> None:
        self._done += 1
        self._on_request(self._done, None)

    def _loglikelihood_tokens(self, requests: list[Scored], **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation, and whether each of its tokens is the likeliest. What is too long loses
        its beginning."""
        seen = [*context, *continuation[:-1]][-self._scorer.longest :]
        following = continuation[-len(seen) :]
        logits = self._scorer.logits(seen, len(following))
        chosen = logits.new_tensor(following).long()
        losses = logits.double().log_softmax(-1).gather(1, chosen[:, None])
        self._count()
        return float(losses.sum()), bool((logits.argmax(-1) == chosen).all())

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self._scorer.longest, 1)
        return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

    def _request(self, name: str, prompt: str, options: Mapping[str, Any]) -> Request:
        """Greedy unless the task wants samples, which then come from seed 0."""
        ends = options.get("until") or []
        most = min(int(options.get("max_gen_toks", MAX_GEN_TOKENS)), self._scorer.longest - 1)
        sampled = bool(options.get("do_sample"))
        params = SamplingParams(
            max_tokens=most,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(options.get("top_k", 0)) if sampled else 0,
            seed=0,
            stop=(ends,) if isinstance(ends, str) else tuple(end for end in ends if end),
        )
        return Request(name, tuple(self.tok_encode(prompt)[-(self._scorer.longest - most) :]), params)


def _batches(requests: Sequence[Instance], size: int) -> Iterator[Sequence[Instance]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """One that knows the tasks. The harness's own, of which there are thousands, are looked through only for those that
    are not in the folder. Raises ConfigError."""
    own = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    if own is not None and all(name in own.all_tasks for name in names):
        return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"--tasks: {', '.join(unknown)}: no such task; --tasks-path adds your own", param="tasks")
    return manager


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The task, or those of a group or a tag, with its data. Raises ConfigError."""
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ValueError, KeyError, ImportError) as error:  # what `datasets` raises for what it does not find
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--tasks: {name}: its data is not on this machine, and nothing is fetched ({reason[:200]})", param="tasks"
        ) from None


@contextmanager
def _offline() -> Iterator[None]:
    """What these libraries read of the environment when they are imported, set for now."""
    hub, config = huggingface_hub.constants, datasets.config
    before = hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE
    hub.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE = before


def _results(report: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskResult]:
    """The harness's keys are "metric,filter", and "metric_stderr,filter" beside them."""
    for task, found in report.items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield TaskResult(task, name, float(value), float(error) if isinstance(error, int | float) else None)
