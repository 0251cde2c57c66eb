"""The engine without Ray: `from paceline import LLM, SamplingParams`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import ValidationError

from paceline.config import DEFAULT_MODEL, EngineSettings, SpeculationSettings, config_error
from paceline.errors import ConfigError, EngineError, InvalidRequest
from paceline.types import (
    CompletionOutput,
    Delta,
    FinishReason,
    Metrics,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

S = TypeVar("S", EngineSettings, SpeculationSettings)


class LLM:
    """One model in this process, with a drafter beside it if `draft` names one.

    `model` and `draft` are names `paceline models list` shows, folders, .gguf files or Hub ids. `options` are
    the keys of `EngineSettings` (dtype, threads, max_model_len, kv_tokens, max_num_seqs, …) and of
    `SpeculationSettings` (depth, prompt_lookup_num_tokens, …). Raises ModelError or ConfigError with the remedy.

        >>> from paceline import LLM, SamplingParams
        >>> llm = LLM("smollm2-135m")
        >>> llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4))[0].text

    With `tensor_parallel_size` the other ranks are processes of this host; they end with `close`, with the `with` block
    that it is used in, or with this process.
    """

    def __init__(self, model: str = DEFAULT_MODEL, draft: str | None = None, device: str = "auto", **options: Any):
        from paceline.engine.load import load_model
        from paceline.models import resolve
        from paceline.speculation.local import LocalProposer

        chosen = {key: options.pop(key) for key in list(options) if key in SpeculationSettings.model_fields}
        speculation = _settings(SpeculationSettings, chosen)
        settings = _settings(EngineSettings, {"device": device, **options})
        loaded = load_model(resolve(model).path, settings)
        drafter = None
        if draft is not None:
            # A draft's window is that of each request; it is too small to be shared by ranks.
            alone = settings.model_copy(update={"ctx_size": None, "tensor_parallel_size": 1})
            drafting = load_model(resolve(draft).path, alone)
            if drafting.fingerprint != loaded.fingerprint:
                raise ConfigError(f"draft: {draft!r} and {model!r} have different tokenizers", param="draft")
            drafter = LocalProposer(
                drafting.drafter(loaded.grammars), rejection=speculation.verification == "rejection"
            )
        self.tokenizer = loaded.tokenizer
        self.engine = loaded.engine(drafter, speculation)
        self.choices = loaded.choices
        """What was chosen for this machine, and why."""
        self._ids = itertools.count(1)
        self._loaded = loaded

    def close(self) -> None:
        """End the other ranks, if there are any. Idempotent; nothing can be generated afterwards."""
        self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        A prompt is a string or a list of token ids. `params` is one for all or one for each; its `n` outputs
        are in `outputs`. `progress` None shows a bar on a terminal. Raises InvalidRequest, naming the prompt,
        before anything runs.

        With a grammar the text is one of its texts, unless `max_tokens` cuts it off (finish reason "length"):

            >>> from paceline.types import Grammar
            >>> city = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
            >>> params = SamplingParams(grammar=Grammar("json_schema", city))
            >>> json.loads(llm.generate("Where is the Louvre? As JSON: ", params)[0].text)["city"]

        A regular expression (`Grammar("regex", "yes|no")`) and a grammar in Lark's notation are the other kinds.
        `paceline.speculation.grammar` says what of JSON Schema is supported; whatever else changes which texts are
        valid is refused by its name.
        """
        texts = _prompt_list(prompts)
        each = _params_list(params, len(texts))
        requests = [self._request(prompt, p) for prompt, p in zip(texts, each, strict=True)]
        choices = [request.choices() for request in requests]
        runs = {choice.request_id: _Run(choice) for group in choices for choice in group}
        try:
            for group in choices:
                self.engine.add_all(group)
            self._run(runs, sys.stderr.isatty() if progress is None else progress)
        except BaseException:
            for name in runs:
                self.engine.abort(name)
            raise
        return [_output([runs[choice.request_id] for choice in group]) for group in choices]

    def chat(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None, *, progress: bool | None = None
    ) -> RequestOutput:
        """Answer a conversation ({"role", "content"} each) through the model's chat template."""
        if not messages:
            raise InvalidRequest("messages: must hold at least one message", param="messages")
        ids = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return self.generate([list(ids)], params, progress=progress)[0]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Request(f"llm-{next(self._ids)}", tuple(ids), params.with_seed())

    def _run(self, runs: dict[str, _Run], show: bool) -> None:
        with _bar(show) as (bar, task):
            bar.update(task, total=len(runs))
            while any(run.end is None for run in runs.values()):
                deltas = self.engine.step()
                if not deltas and not self.engine.has_work:
                    raise EngineError("the engine stopped with requests unfinished")
                for name, delta in deltas.items():
                    runs[name].take(delta)
                    bar.advance(task, float(delta.finished))


@dataclass(slots=True)
class _Run:
    """One output as it grows."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    end: FinishReason | None = None
    metrics: Metrics = field(default_factory=Metrics)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def take(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.end = delta.finish_reason
        self.metrics = delta.metrics or self.metrics
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs

    def output(self) -> CompletionOutput:
        params = self.request.params
        assert self.end is not None and params.seed is not None
        return CompletionOutput(
            self.request.index,
            tuple(self.token_ids),
            self.text,
            self.end,
            params.seed,
            self.metrics,
            None if params.logprobs is None else tuple(self.logprobs),
        )


def _output(runs: Sequence[_Run]) -> RequestOutput:
    """Of all n outputs of a request; the first has told about the prompt."""
    first = runs[0]
    told = first.request.params.prompt_logprobs is not None
    prompt = (None, *first.prompt_logprobs) if told else None
    return RequestOutput(first.request.token_ids, tuple(run.output() for run in runs), prompt)


class _bar:
    """A progress bar, or one that draws nothing."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True, disable=not show)

    def __enter__(self) -> tuple[Progress, TaskID]:
        self._progress.start()
        return self._progress, self._progress.add_task("generating", total=None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def _settings(kind: type[S], values: dict[str, Any]) -> S:
    try:
        return kind(**values)
    except ValidationError as error:
        raise config_error(error) from None


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    found = list(prompts)
    for n, prompt in enumerate(found):
        if not isinstance(prompt, str) and not (_is_ids(prompt) and prompt):
            raise InvalidRequest(
                f"prompts.{n}: must be a string or a non-empty list of token ids", param=f"prompts.{n}"
            )
    return found  # type: ignore[return-value]


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, Iterable) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"params: {len(params)} for {count} prompts; give one, or one for each", param="params")
    return list(params)
