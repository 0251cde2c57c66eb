"""Keys and values in blocks on a GPU: kernels, graphs and steps ahead, against float32 and against each other."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("triton", reason="Triton is not installed")

from paceline.engine.attention import Window
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.families import runner_for
from paceline.engine.gpu.attention import PagedAttention
from paceline.engine.gpu.body import Body, OwnCode
from paceline.engine.gpu.fused import FusedBody
from paceline.engine.gpu.kinds import missing
from paceline.engine.gpu.runner import DeviceRunner
from paceline.engine.kv_blocks import BLOCK
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.runner import ModelRunner, Runner
from paceline.speculation import sampling
from paceline.speculation.local import LocalProposer
from paceline.speculation.proposer import Proposer
from paceline.speculation.sampling import Rows
from paceline.speculation.speculator import speculator_for
from paceline.types import Request, SamplingParams
from tests import tiny
from tests.engine.gpu.paged import Case, difference
from tests.engine.gpu.test_attention import attended

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16 = 1e-2
"""Relative, of attention: some last bits of bfloat16."""
LOGITS = 3e-2
"""Of their spread, in bfloat16 over two layers."""
LIBRARIES = ("flash_attention_3", "varlen_attn")
LLAMA_8B = (32, 8, 128)
LAYER = 1
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    **tiny.SPECIAL,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"sliding_window": 40, "attn_logit_softcapping": 20.0},
}
TEXTS = [tuple(token * 5 % 1024 for token in tiny.prompt(n, seed=n)) for n in (300, 90, 17, 5)]
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}


def needed(name: str) -> None:
    if (why := missing(name)) is not None:
        pytest.skip(f"{name}: {why}")


# Kernels.


def on_gpu(windows: Sequence[tuple[int, int]], *sizes: int, **asked: Any) -> Case:
    return Case(windows, *(sizes or LLAMA_8B), **{"dtype": torch.bfloat16, "device": DEVICE, "block": 64} | asked)


def worst(case: Case) -> float:
    """Of the rows, and of all that lies in blocks thereafter."""
    out, keys, values = case.expected(LAYER)
    found = attended(case)
    return max(difference(*pair) for pair in ((found, out), (case.keys, keys), (case.values, values)))


@pytest.mark.parametrize("sizes", [LLAMA_8B, (9, 3, 64), (16, 1, 128), (8, 8, 80), (4, 2, 256)], ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_short_windows(sizes: tuple[int, ...], count: int) -> None:
    assert worst(on_gpu([(1024, count), (1, count), (0, count), (63, count), (640, 1)], *sizes)) < BF16


@pytest.mark.parametrize(
    "asked",
    [
        {"sliding": 100},
        {"softcap": 5.0},
        {"sunk": True},
        {"sloped": True},
        {"turned": True},
        {"turned": True, "normed": True},
        {"block": 1024},
    ],
    ids=str,
)
def test_what_is_asked_of_scores_and_rows(asked: dict[str, Any]) -> None:
    assert worst(on_gpu([(1000, 1), (70, 5), (0, 1)], **asked)) < BF16


@pytest.mark.parametrize("seed", range(20))
def test_any_ragged_batch(seed: int) -> None:
    chance = random.Random(seed)
    windows = [(chance.randrange(3000), chance.randrange(1, 17)) for _ in range(chance.choice([1, 3, 40]))]
    case = on_gpu(
        windows,
        *chance.choice([LLAMA_8B, (9, 3, 64), (8, 1, 96)]),
        turned=chance.random() < 0.5,
        sliding=chance.choice([None, 50, 1000]),
        sunk=chance.random() < 0.3,
        seed=seed,
    )
    assert worst(case) < BF16


def test_many_windows_fill_the_gpu_without_a_split() -> None:
    assert worst(on_gpu([(17 * n % 700, 1) for n in range(64)])) < BF16


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("sliding", [None, 100])
def test_libraries_attend_as_our_kernel_does(name: str, sliding: int | None) -> None:
    needed(name)
    case = on_gpu([(1000, 1), (70, 5), (0, 40)], sliding=sliding)
    batch = case.batch()
    found = PagedAttention(name, torch.device(DEVICE)).attend(
        batch, LAYER, case.layout, case.scoring, case.q, case.k, case.v
    )
    assert difference(found, case.expected(LAYER)[0]) < BF16


# Runners.


@functools.cache
def model_of(family: str, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(layers)
    config = CONFIG_MAPPING[family](**SHAPE | FAMILIES[family] | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval().requires_grad_(False).to(DEVICE)


@functools.cache
@torch.inference_mode()
def reference(family: str) -> list[torch.Tensor]:
    """Logits of all texts by the model's own code in float32, from the weights as they are rounded."""
    model = copy.deepcopy(model_of(family)).float()
    return [model(input_ids=torch.tensor([text], device=DEVICE), use_cache=False).logits[0] for text in TEXTS]


def device_runner(
    family: str = "llama",
    attention: str = "triton",
    *,
    graphs: bool = True,
    fused: bool = True,
    block: int = BLOCK,
    layers: int = 2,
) -> DeviceRunner:
    own = runner_for(copy.deepcopy(model_of(family, layers)))
    assert isinstance(own, ModelRunner)
    kernel = PagedAttention(attention, torch.device(DEVICE))
    geometry, shift = own.kv_geometry(), own.key_shift()
    body: Body = FusedBody(own.model, kernel) if fused else OwnCode(own, kernel)
    return DeviceRunner(
        body, key_shift=shift, geometry=geometry, max_rows=512, max_sequences=8, block=block, graphs=graphs
    )


def runner_by(attention: str, family: str) -> Runner:
    if attention in ("triton", *LIBRARIES):
        needed(attention)
        return device_runner(family, attention, fused=family != "gemma2")
    own = runner_for(copy.deepcopy(model_of(family)))
    assert isinstance(own, ModelRunner)
    own.attend_as(attention, paged=False)
    return own


def logits_of(runner: Runner) -> list[torch.Tensor]:
    """Of every token of the texts: in prompts' windows, then verifications of up to 5, then decodes."""
    kv = kv_for(runner)
    entries = [kv.reserve(text, len(text)) for text in TEXTS]
    found: list[list[torch.Tensor]] = [[] for _ in TEXTS]
    for size in (0, 5, 5, *[1] * 7):
        going = []
        for number, (entry, text) in enumerate(zip(entries, TEXTS, strict=True)):
            assert entry is not None
            count = size or max(1, len(text) - 17)
            if more := text[entry.length : entry.length + count]:
                going.append((number, Window(entry, more, sample=len(more))))
        rows = runner.run([window for _, window in going]).split([window.sample for _, window in going])
        for (number, window), each in zip(going, rows, strict=True):
            found[number].append(each.clone())
            kv.append(window.entry, window.token_ids)
    kv.check()
    return [torch.cat(each) for each in found]


def kv_for(runner: Runner, capacity: int = 8192) -> SlabKVCache:
    geometry = runner.kv_geometry()
    memory = runner.kv_memory(geometry, capacity, runner.max_model_len)
    return SlabKVCache(geometry, capacity, runner.max_model_len, runner.key_shift(), memory=memory)


def away(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The median row's distance, of the spread: a near-tie further up may turn single rows."""
    rows = [(a - b[: len(a)]).square().mean(dim=1).sqrt() / b.std() for a, b in zip(found, wanted, strict=True)]
    return float(torch.cat(rows).median())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["triton", "sdpa", "eager", "flash_attention_2", *LIBRARIES])
def test_every_attention_gives_the_models_logits(attention: str, family: str) -> None:
    if attention in LIBRARIES and family == "gemma2" and attention == "varlen_attn":
        pytest.skip("varlen_attn caps no scores")
    assert away(logits_of(runner_by(attention, family)), reference(family)) < LOGITS


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_change_no_logits(family: str) -> None:
    fused = family != "gemma2"
    made = [logits_of(device_runner(family, graphs=graphs, fused=fused)) for graphs in (False, True)]
    assert away(*made) < LOGITS / 3


def test_a_static_cache_gives_the_logits_of_a_paged_one() -> None:
    static = device_runner(block=SHAPE["max_position_embeddings"])
    assert away(logits_of(static), logits_of(device_runner())) < LOGITS / 3


def test_warming_up_captures_what_decoding_needs() -> None:
    runner = device_runner()
    kv = kv_for(runner)
    shapes = runner.warm_up(kv.memory)
    entry = kv.reserve(TEXTS[3], 20)
    assert entry is not None
    runner.run([Window(entry, TEXTS[3], 1)])
    assert shapes == len(runner._captured) > 0


@pytest.mark.parametrize("graphs", [False, True])
def test_steps_chained_without_a_look_draw_as_a_cpu_does(graphs: bool) -> None:
    runner = device_runner(graphs=graphs)
    kv = kv_for(runner)
    params = [SamplingParams(temperature=0.0), SamplingParams(**SEEDED), SamplingParams(seed=3, top_k=9)]
    entries = [kv.reserve(text, 400) for text in TEXTS[1:]]
    for entry, text in zip(entries, TEXTS[1:], strict=True):
        assert entry is not None
        runner.run([Window(entry, text[:-1], 1)])
        kv.append(entry, text[:-1])
    histories = [list(text) for text in TEXTS[1:]]
    for ahead in range(4):
        windows = [
            Window(entry, [0] if ahead else history[-1:], 1, ahead)
            for entry, history in zip(entries, histories, strict=True)
            if entry is not None
        ]
        rows = [Rows(each, 2, text, [0] * ahead) for each, text in zip(params, histories, strict=True)]
        launched = runner.launch(windows, rows, range(3) if ahead else None)
        assert launched is not None
        expected = [token for (token,) in sampling.draw(launched.logits.cpu(), rows)]
        assert launched.tokens() == expected


# Engines.


def engine(runner: Runner, proposer: Proposer | None = None, capacity: int = 8192) -> Engine:
    limits = EngineLimits(runner.max_model_len, 8, 512, 64)
    speculation = tiny.SpeculationSettings(depth=4)
    speculator = speculator_for(speculation, proposer, tiny.flat_cost)
    return Engine(runner, kv_for(runner, capacity), limits, speculator=speculator, speculation=speculation)


def drafts(layers: int) -> LocalProposer:
    runner = device_runner(layers=layers)
    return LocalProposer(Drafter(runner, kv_for(runner), max_batched_tokens=512, max_model_len=1024))


def asked(**params: Any) -> list[Request]:
    return [tiny.request(text, str(n), max_tokens=8, **params) for n, text in enumerate(TEXTS)]


class WithoutLaunches(DeviceRunner):
    """Waits for every step."""

    def launch(self, *_: Any, **__: Any) -> None:
        return None


def waiting(runner: DeviceRunner) -> DeviceRunner:
    runner.__class__ = WithoutLaunches
    return runner


def agreement(found: dict[str, list[int]], expected: dict[str, list[int]]) -> float:
    """The share of tokens before two outputs part: bfloat16 has near-ties, and batches of other sizes turn them."""
    same = 0
    for name, tokens in expected.items():
        pairs = zip(found[name], tokens, strict=True)
        same += next((n for n, (a, b) in enumerate(pairs) if a != b), len(tokens))
    return same / sum(map(len, expected.values()))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
def test_a_step_ahead_changes_no_token(params: dict[str, Any], graphs: bool) -> None:
    """The same kernels on the same shapes: here nothing is near enough to a tie to turn."""
    ahead = tiny.run(engine(device_runner(graphs=graphs)), *asked(**params))
    assert ahead == tiny.run(engine(waiting(device_runner(graphs=graphs))), *asked(**params))


@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
def test_an_engine_says_what_the_models_own_code_says(params: dict[str, Any]) -> None:
    own = runner_by("sdpa", "llama")
    assert agreement(tiny.run(engine(device_runner()), *asked(**params)), tiny.run(engine(own), *asked(**params))) > 0.7


@pytest.mark.parametrize("layers", [2, 1], ids=["agreeing", "disagreeing"])
def test_speculation_changes_hardly_a_token(layers: int) -> None:
    plain = tiny.run(engine(device_runner()), *asked(**SEEDED))
    made = engine(device_runner(), drafts(layers))
    assert agreement(tiny.run(made, *asked(**SEEDED)), plain) > 0.7
    made.check()
    assert made.kv.usage().in_use == 0


def test_an_agreeing_draft_is_accepted() -> None:
    made = engine(device_runner(), drafts(2))
    tiny.run(made, *asked(**SEEDED))
    assert made.tally.accepted > 0.5 * made.tally.drafted > 0


@pytest.mark.parametrize("ctx_size", [64, 100])
def test_a_streaming_window_goes_on_beyond_itself(ctx_size: int) -> None:
    made = engine(device_runner())
    found = tiny.run(made, tiny.request(TEXTS[2], max_tokens=200, ctx_size=ctx_size))
    own = tiny.run(engine(runner_by("sdpa", "llama")), tiny.request(TEXTS[2], max_tokens=200, ctx_size=ctx_size))
    assert len(found["r"]) == 200
    assert agreement({"r": found["r"][:8]}, {"r": own["r"][:8]}) > 0.7
    made.check()


def test_a_session_moves_to_another_pool_with_its_keys() -> None:
    here, there = (engine(device_runner()) for _ in range(2))
    text = TEXTS[1]
    answer = tuple(tiny.run(here, tiny.request(text, "a", "s", max_tokens=8))["a"])
    export = here.kv.export_session("s")
    assert export is not None and there.kv.import_session(export)
    second = tiny.request((*text, *answer, 7), "b", "s", max_tokens=8)
    moved = [delta.metrics for _, delta in _run(there, second) if delta.metrics is not None]
    assert moved[0].cached_tokens == len(text) + len(answer) - 1
    again = there.kv.export_session("s")
    kept = len(export.token_ids)
    assert again is not None and torch.equal(again.keys[:, :, :kept], export.keys)


def _run(made: Engine, request: Request) -> list[tuple[str, tiny.Delta]]:
    made.add(request)
    return tiny.deltas(made)


def test_an_abort_while_a_step_is_under_way_leaves_the_others_alone() -> None:
    whole, made = tiny.run(engine(device_runner()), *asked()), engine(device_runner())
    for each in asked():
        made.add(replace(each))
    given: dict[str, list[int]] = {str(n): [] for n in range(len(TEXTS))}
    for _ in range(3):
        for name, delta in made.step().items():
            given[name] += delta.token_ids
    made.abort("1")
    for name, tokens in tiny.finish(made).items():
        given[name] += tokens
    del given["1"], whole["1"]
    assert agreement(given, whole) > 0.7
    made.check()
