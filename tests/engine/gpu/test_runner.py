"""A device runner over blocks, on the CPU, against the model's own logits; and steps launched, against steps run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("triton", reason="Triton, which also interprets its kernels on a CPU, is not installed")

from paceline.engine.attention import Window
from paceline.engine.families import runner_for
from paceline.engine.gpu import runner as gpu_runner
from paceline.engine.gpu.attention import PagedAttention
from paceline.engine.gpu.body import Body, OwnCode
from paceline.engine.gpu.fused import FusedBody
from paceline.engine.gpu.runner import DeviceRunner
from paceline.engine.kv_blocks import BLOCK, BlockPool
from paceline.engine.kv_cache import KVEntry, SlabKVCache
from paceline.engine.lean import NotLeanError
from paceline.engine.reduced_vocab import ReducedVocabRunner
from paceline.speculation import sampling
from paceline.speculation.grammar import Matcher
from paceline.speculation.sampling import Rows
from paceline.types import Grammar, SamplingParams
from tests import schemas, tiny

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **tiny.SPECIAL,
}
SLIDING = {"sliding_window": 12}
BUILT_LIKE_LLAMA = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": SLIDING,
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 1.5},
}
OTHERS = {
    "gemma2": {
        **SLIDING,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gpt_oss": {
        **SLIDING,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
TEXTS = [tiny.prompt(45, seed=n) for n in range(2)]
TEXTS = [tuple(token % SHAPE["vocab_size"] for token in text) for text in TEXTS]
STEPS = [((0, 20), (0, 5)), ((20, 21), (5, 6)), ((21, 26), (6, 26)), ((26, 34), (26, 30)), ((34, 35), (30, 31))]
"""Windows of two texts: prompts, one beyond what our kernel takes, verifications, a decode beside one, decodes."""
GREEDY, SEEDED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, min_p=0.02, seed=5)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SHAPE | BUILT_LIKE_LLAMA.get(family, {}) | OTHERS.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "sinks" in name:
            torch.nn.init.normal_(weight)
    return model.eval().requires_grad_(False)


@functools.cache
@torch.inference_mode()
def reference(family: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of both texts by the model's own code in float32, from the weights as they are rounded."""
    model = copy.deepcopy(model_of(family, dtype)).float()
    return [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS]


def runner(family: str = "llama", *, fused: bool = False, block: int = BLOCK) -> DeviceRunner:
    """Over the family's layers fused, in half precision, or over its own code, in float32."""
    model = copy.deepcopy(model_of(family, torch.float16 if fused else torch.float32))
    attention = PagedAttention("triton", torch.device("cpu"))
    body: Body = FusedBody(model, attention) if fused else OwnCode(runner_for(model), attention)
    shape = body.shape
    geometry = shape.kv_geometry() if not fused else tiny.ours(model).kv_geometry()
    return DeviceRunner(
        body, key_shift="not here", geometry=geometry, max_rows=64, max_sequences=4, block=block, graphs=False
    )


def entries(of: DeviceRunner, texts: Sequence[tuple[int, ...]] = TEXTS) -> tuple[SlabKVCache, list[KVEntry]]:
    geometry, longest = of.kv_geometry(), of.max_model_len
    kv = SlabKVCache(geometry, 512, longest, memory=of.kv_memory(geometry, 512, longest))
    found = [kv.reserve(text, len(text) + 5) for text in texts]
    return kv, [entry for entry in found if entry is not None]


def logits_of(of: DeviceRunner, wanted: int = 100) -> list[torch.Tensor]:
    """Of the last `wanted` rows of each window, step by step."""
    kv, (a, b) = entries(of)
    found = []
    for step in STEPS:
        windows = [
            Window(entry, text[start:end], sample=min(wanted, end - start))
            for entry, text, (start, end) in zip((a, b), TEXTS, step, strict=True)
        ]
        found.append(of.run(windows).clone())
        for window in windows:
            kv.append(window.entry, window.token_ids)
    kv.check()
    return found


def expected(family: str, dtype: torch.dtype, wanted: int = 100) -> list[torch.Tensor]:
    rows = reference(family, dtype)
    return [
        torch.cat([each[start:end][-wanted:] for each, (start, end) in zip(rows, step, strict=True)]) for step in STEPS
    ]


def worst(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", BUILT_LIKE_LLAMA)
def test_fused_layers_give_the_models_logits(family: str) -> None:
    assert worst(logits_of(runner(family, fused=True)), expected(family, torch.float16)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("family", ["mistral", *OTHERS])
def test_a_models_own_code_over_blocks_gives_its_logits(family: str) -> None:
    assert worst(logits_of(runner(family)), expected(family, torch.float32)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_some_rows_alone(fused: bool) -> None:
    dtype = torch.float16 if fused else torch.float32
    assert worst(logits_of(runner(fused=fused), wanted=1), expected("llama", dtype, 1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", OTHERS)
def test_layers_built_otherwise_are_not_fused(family: str) -> None:
    with pytest.raises(NotLeanError):
        runner(family, fused=True)


def test_products_of_float32_are_not_fused() -> None:
    model = copy.deepcopy(model_of("llama", torch.float32))
    with pytest.raises(NotLeanError, match="Linear of torch"):
        FusedBody(model, PagedAttention("triton", torch.device("cpu")))


def test_fused_weights_are_held_once() -> None:
    """The model's own code, which shares them, still gives what it gave."""
    model = copy.deepcopy(model_of("qwen2", torch.float16))
    before = sum(each.nbytes for each in model.parameters())
    FusedBody(model, PagedAttention("triton", torch.device("cpu")))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    assert sum(storages.values()) == before
    logits = model(input_ids=torch.tensor([TEXTS[0]]), use_cache=False).logits[0].float()
    assert worst([logits], reference("qwen2", torch.float16)[:1]) < TOLERANCE[torch.float16]


def test_a_static_cache_gives_the_same_to_the_last_bit() -> None:
    static = runner(block=SHAPE["max_position_embeddings"])
    pool = static.kv_memory(static.kv_geometry(), 512, static.max_model_len)
    assert isinstance(pool, BlockPool) and pool.block == static.max_model_len
    assert all(map(torch.equal, logits_of(static), logits_of(runner())))


def test_more_windows_than_a_pass_takes_are_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner()
    monkeypatch.setattr(gpu_runner, "MOST_SEQUENCES", 2)
    texts = [tiny.prompt(n, seed=n) for n in (3, 4, 5)]
    texts = [tuple(token % SHAPE["vocab_size"] for token in text) for text in texts]
    found = []
    for each in (whole, runner()):
        windows = [Window(entry, text, sample=2) for entry, text in zip(entries(each, texts)[1], texts, strict=True)]
        found.append(each.run(windows))
    assert worst(found[:1], found[1:]) < TOLERANCE[torch.float32]


class Texts:
    """Two texts, all but their last tokens computed, and how they go on."""

    def __init__(self, of: DeviceRunner, params: Sequence[SamplingParams]) -> None:
        self.runner, self.params = of, params
        self.texts = [list(text[:9]) for text in TEXTS]
        self.kv, self.entries = entries(of)
        of.run([Window(entry, text[:-1], 1) for entry, text in zip(self.entries, self.texts, strict=True)])
        for entry, text in zip(self.entries, self.texts, strict=True):
            self.kv.append(entry, text[:-1])

    def rows(self, ahead: int = 0) -> list[Rows]:
        return [Rows(each, 2, text, [0] * ahead) for each, text in zip(self.params, self.texts, strict=True)]

    def last(self) -> list[Window]:
        return [Window(entry, text[-1:], 1) for entry, text in zip(self.entries, self.texts, strict=True)]

    def take(self, tokens: Sequence[int]) -> None:
        for entry, text, token in zip(self.entries, self.texts, tokens, strict=True):
            self.kv.append(entry, text[-1:])
            text.append(token)


def step_by_step(texts: Texts, steps: int) -> list[list[int]]:
    found = []
    for _ in range(steps):
        logits = texts.runner.run(texts.last())
        found.append([token for (token,) in sampling.draw(logits, texts.rows())])
        texts.take(found[-1])
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("params", [(GREEDY, SEEDED), (SEEDED, SEEDED)], ids=["mixed", "seeded"])
def test_steps_chained_without_a_look_equal_steps_one_by_one(fused: bool, params: tuple[SamplingParams, ...]) -> None:
    texts, made = Texts(runner(fused=fused), params), []
    for ahead in range(3):
        windows = [Window(entry, [0], 1, ahead) for entry in texts.entries] if ahead else texts.last()
        made.append(texts.runner.launch(windows, texts.rows(ahead), range(2) if ahead else None))
    found = [each.tokens() for each in made if each is not None]
    assert found == step_by_step(Texts(runner(fused=fused), params), 3)


def test_any_number_of_steps_may_be_under_way_before_the_first_is_read() -> None:
    """As in a chain of drafts: none takes the place of one that nobody has read."""
    texts, made = Texts(runner(), (GREEDY, SEEDED)), []
    for ahead in range(8):
        windows = [Window(entry, [0], 1, ahead) for entry in texts.entries] if ahead else texts.last()
        made.append(texts.runner.launch(windows, texts.rows(ahead), range(2) if ahead else None))
    found = [each.tokens() for each in made if each is not None]
    assert found == step_by_step(Texts(runner(), (GREEDY, SEEDED)), 8)


def test_members_of_a_step_may_follow_others_of_the_one_before() -> None:
    """In any order, and not all: `feeds` says whose token each begins with."""
    texts = Texts(runner(), (SEEDED, SEEDED))
    first = texts.runner.launch(texts.last(), texts.rows())
    second = texts.runner.launch([Window(texts.entries[1], [0], 1, 1)], texts.rows(1)[1:], [1])
    assert first is not None and second is not None
    expected = step_by_step(Texts(runner(), (SEEDED, SEEDED)), 2)
    assert (first.tokens(), second.tokens()) == (expected[0], expected[1][1:])


def test_a_launch_draws_at_all_rows_of_a_verification() -> None:
    texts = Texts(runner(), (GREEDY, SEEDED))
    drafted = [[3, 4, 5], [6]]
    pairs = list(zip(texts.entries, texts.texts, drafted, strict=True))
    windows = [Window(entry, [text[-1], *more], 1 + len(more)) for entry, text, more in pairs]
    rows = [Rows(each, 2, text, more, 1 + len(more)) for each, (_, text, more) in zip(texts.params, pairs, strict=True)]
    launched = texts.runner.launch(windows, rows)
    assert launched is not None
    expected = [token for run in sampling.draw(texts.runner.run(windows), rows) for token in run]
    assert launched.tokens() == expected


def test_a_launch_has_logits_of_the_sampled_rows_alone() -> None:
    texts = Texts(runner(), (GREEDY, GREEDY))
    windows = [Window(texts.entries[0], [texts.texts[0][-1], 3, 4], 1), texts.last()[1]]
    launched = texts.runner.launch(windows, texts.rows())
    assert launched is not None
    assert torch.allclose(launched.logits, texts.runner.run(windows), atol=1e-5)


@pytest.mark.parametrize(
    ("params", "tokens"),
    [(SamplingParams(repetition_penalty=1.2), 1), (SamplingParams(top_k=3, top_p=0.5), 1), (GREEDY, 17)],
    ids=["history", "two filters", "a prompt"],
)
def test_what_cannot_be_drawn_there_is_not_launched(params: SamplingParams, tokens: int) -> None:
    texts = Texts(runner(), (GREEDY, params))
    windows = [Window(texts.entries[0], TEXTS[0][9 : 9 + tokens], 1), texts.last()[1]]
    assert texts.runner.launch(windows, texts.rows()) is None


def test_weights_in_8_bits_give_nearly_the_models_logits() -> None:
    model = copy.deepcopy(model_of("llama", torch.float16))
    geometry = tiny.ours(model).kv_geometry()
    body = FusedBody(model, PagedAttention("triton", torch.device("cpu")), in_bytes=True)
    rounded = DeviceRunner(body, key_shift="not here", geometry=geometry, max_rows=64, max_sequences=4, graphs=False)
    exact = logits_of(runner(fused=True))
    away = [float((a - b).square().mean().sqrt() / b.std()) for a, b in zip(logits_of(rounded), exact, strict=True)]
    assert 1e-4 < max(away) < 0.05
    assert not any(linear.weight.numel() for linear in model.modules() if isinstance(linear, torch.nn.Linear))


def test_a_draft_over_a_part_of_the_vocabulary_launches_under_its_targets_ids() -> None:
    kept = torch.arange(3, 3 + 5 * SHAPE["vocab_size"], 5)
    nearest = (torch.arange(600) // 5).clamp(max=SHAPE["vocab_size"] - 1)
    draft = ReducedVocabRunner(runner(), kept, nearest)
    geometry = draft.kv_geometry()
    kv = SlabKVCache(geometry, 512, 128, memory=draft.kv_memory(geometry, 512, 128))
    text = [7, 99, 250, 400]
    entry = kv.reserve(text, 20)
    assert entry is not None
    rows = [Rows(SEEDED, 4, text)]
    first = draft.launch([Window(entry, text, sample=1)], rows)
    second = draft.launch([Window(entry, [0], sample=1, ahead=4)], [Rows(SEEDED, 4, text, (0,))], [0])
    assert first is not None and second is not None
    (token,), (following,) = first.tokens(), second.tokens()
    logits = draft.run([Window(entry, text, sample=1)])
    assert sampling.draw(logits, rows, draft.columns) == [[token]]
    kv.append(entry, text)
    logits = draft.run([Window(entry, [token], sample=1)])
    assert sampling.draw(logits, [Rows(SEEDED, 4, [*text, token])], draft.columns) == [[following]]


def test_an_engine_over_it_says_what_the_models_own_code_says() -> None:
    model = model_of("llama", torch.float32)
    each = [tiny.request(text[:5], str(n), max_tokens=5) for n, text in enumerate(TEXTS)]
    found = tiny.run(tiny.engine_for(model, runner=runner()), *each)
    assert found == tiny.run(tiny.engine_for(model), *each)


DIGITS = SamplingParams(temperature=0.8, seed=5, grammar=Grammar("regex", "[0-9]{2,}[ab]"))


def bound(output: Sequence[int] = ()) -> Matcher:
    assert DIGITS.grammar is not None
    return schemas.grammars().matcher(DIGITS.grammar, output)


def test_a_launch_draws_within_a_grammar_at_all_rows_of_a_verification() -> None:
    texts = Texts(runner(), (SEEDED, DIGITS))
    one, two, letter = (schemas.ids(text)[0] for text in "12z")
    drafted = [[3, 4], [one, two, letter]]
    pairs = list(zip(texts.entries, texts.texts, drafted, strict=True))
    windows = [Window(entry, [text[-1], *more], 1 + len(more)) for entry, text, more in pairs]
    rows = [Rows(SEEDED, 9, texts.texts[0], drafted[0], 3), Rows(DIGITS, 9, texts.texts[1], drafted[1], 4, bound())]
    launched = texts.runner.launch(windows, rows)
    assert launched is not None
    expected = [token for run in sampling.draw(texts.runner.run(windows), rows) for token in run]
    assert launched.tokens() == expected
    assert schemas.tokenizer().decode(expected[3:5]).isdigit()


def test_a_mask_does_not_outlast_its_launch() -> None:
    texts = Texts(runner(), (SEEDED, SEEDED))
    rows = texts.rows()
    texts.runner.launch(texts.last(), [rows[0], Rows(DIGITS, 9, texts.texts[1], matcher=bound())])
    launched = texts.runner.launch(texts.last(), rows)
    assert launched is not None
    assert [[token] for token in launched.tokens()] == sampling.draw(texts.runner.run(texts.last()), rows)


def test_a_token_nobody_has_seen_is_not_followed_by_one_within_a_grammar() -> None:
    texts = Texts(runner(), (SEEDED, DIGITS))
    rows = [texts.rows()[0], Rows(DIGITS, 9, texts.texts[1], matcher=bound())]
    assert texts.runner.launch(texts.last(), rows) is not None
    windows = [Window(entry, [0], 1, 1) for entry in texts.entries]
    assert texts.runner.launch(windows, rows, range(2)) is None


def test_a_draft_over_a_part_of_the_vocabulary_draws_within_a_grammar() -> None:
    kept = torch.arange(3, 3 + 2 * SHAPE["vocab_size"], 2)
    draft = ReducedVocabRunner(runner(), kept, (torch.arange(310) // 2).clamp(max=SHAPE["vocab_size"] - 1))
    geometry = draft.kv_geometry()
    kv = SlabKVCache(geometry, 512, 128, memory=draft.kv_memory(geometry, 512, 128))
    text = [7, 99, 250, 300]
    entry = kv.reserve(text, 20)
    assert entry is not None
    rows = [Rows(DIGITS, 4, text, matcher=bound())]
    launched = draft.launch([Window(entry, text, sample=1)], rows)
    assert launched is not None
    expected = sampling.draw(draft.run([Window(entry, text, sample=1)]), rows, draft.columns)
    assert [launched.tokens()] == expected
    assert schemas.tokenizer().decode(expected[0]).isdigit()
