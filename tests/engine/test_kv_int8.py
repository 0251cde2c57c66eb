"""Keys and values stored in int8: what is read back, what moves with them, and that every pass reads the same."""

from __future__ import annotations

import ctypes
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.backends import resolve_backends
from paceline.engine.kv_cache import KVEntry, KVExport, KVGeometry, SlabKVCache
from paceline.engine.kv_entry import quantize
from paceline.engine.lean import lean_runner
from paceline.engine.load import load_model
from paceline.engine.native import HeadsStruct, WindowStruct
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.products import KEEPING, REQUEST, KeepingBackend, Packer, fp16_product
from paceline.engine.runner import Runner
from paceline.errors import EngineError
from paceline.speculation.local import LocalProposer
from tests import tiny
from tests.engine.families import model_of, runner_of
from tests.engine.test_lean import SHAPE, built, compiled, lean

CPU = torch.device("cpu")
GEOMETRY = KVGeometry(2, 3, 8, torch.int8, CPU)
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 5, 40, 100)]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-wide-heads": LlamaConfig(**SHAPE | {"hidden_size": 128, "num_attention_heads": 2}, head_dim=64),
    "mistral": MistralConfig(**SHAPE, sliding_window=23, head_dim=8),
}


def cache(geometry: KVGeometry = GEOMETRY) -> SlabKVCache:
    return SlabKVCache(geometry, 100, max_model_len=64)


def filled(kv: SlabKVCache, tokens: list[int], session: str | None = None) -> KVEntry:
    """With random keys and values."""
    entry = kv.reserve([*tokens, 0], len(tokens) + 1, session)
    assert entry is not None
    for layer in range(GEOMETRY.num_layers):
        entry.write(layer, 0, *torch.randn(2, GEOMETRY.num_kv_heads, len(tokens), GEOMETRY.head_dim))
    kv.append(entry, tokens)
    return entry


def stored(entry: KVEntry, tokens: int) -> torch.Tensor:
    return torch.stack([torch.stack(entry.read(n, slice(0, tokens), torch.float32)) for n in range(2)])


def test_a_token_s_bytes_count_its_scales() -> None:
    assert GEOMETRY.bytes_per_token == 2 * 2 * 3 * (8 + 4)


def test_what_is_read_back_is_within_half_a_step() -> None:
    x = torch.randn(5, 7, 64) * torch.rand(5, 7, 1) * 100
    numbers, scales = quantize(x)
    assert bool(((numbers * scales[..., None] - x).abs() <= scales[..., None] * 0.501).all())


def test_zeros_stay_zeros() -> None:
    numbers, scales = quantize(torch.zeros(3, 8))
    assert (numbers.count_nonzero(), scales.count_nonzero()) == (0, 0)


def test_a_fork_copies_the_scales() -> None:
    kv = cache()
    source = filled(kv, list(range(20)), "s")
    entry = kv.reserve(list(range(21)), 30, "t")
    assert entry is not None and torch.equal(stored(entry, 20), stored(source, 20))


def test_an_export_carries_the_scales() -> None:
    kv, other = cache(), cache()
    source = filled(kv, list(range(20)), "s")
    export: KVExport = pickle.loads(pickle.dumps(kv.export_session("s")))
    assert other.import_session(export)
    entry = other.reserve(list(range(21)), 30, "s")
    assert entry is not None and torch.equal(stored(entry, 20), stored(source, 20))
    assert export.num_bytes == 20 * GEOMETRY.bytes_per_token


def test_an_export_without_its_scales_is_refused() -> None:
    with pytest.raises(EngineError, match="KV export: scales"):
        KVExport("s", torch.zeros(4).numpy(), *torch.zeros(2, 2, 3, 4, 8, dtype=torch.int8))


@pytest.mark.parametrize("ours", [torch.int8, torch.float32])
def test_an_import_of_another_type_is_refused_by_both_names(ours: torch.dtype) -> None:
    theirs = torch.float32 if ours == torch.int8 else torch.int8
    kv, other = (cache(KVGeometry(2, 3, 8, dtype, CPU)) for dtype in (theirs, ours))
    filled(kv, [1, 2, 3], "s")
    export = kv.export_session("s")
    assert export is not None
    with pytest.raises(EngineError, match=rf"in {str(theirs)[6:]}, where this model has .* in {str(ours)[6:]}"):
        other.import_session(export)


def test_a_short_sequence_commits_few_pages() -> None:
    """The scales of all heads lie side by side."""
    entry = filled(cache(), [1, 2, 3])
    assert entry.scales is not None
    assert [scales.stride() for scales in entry.scales] == [(64 * 3, 1, 3)] * 2


def logits(runner: Runner, ids: tuple[int, ...], cuts: list[int], *, quantized: bool = True) -> torch.Tensor:
    kv = tiny.kv_for(runner, quantized=quantized)
    entry = kv.reserve(ids, len(ids))
    assert entry is not None
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        found.append(runner.run([Window(entry, ids[start:end], sample=end - start)]))
        kv.append(entry, ids[start:end])
    return torch.cat(found)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_lean_pass_reads_what_transformers_reads(config: str) -> None:
    model = built(CONFIGS[config])
    ids = tiny.prompt(100)
    theirs, ours = (logits(runner, ids, [30, 31, 36]) for runner in (tiny.ours(model), lean(model)))
    exact = logits(lean(model), ids, [30, 31, 36], quantized=False)
    # A product's rounding sends a number now and then to the neighbouring step.
    assert float((ours - theirs).abs().mean()) < 0.1 * float((ours - exact).abs().mean())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("budget", [2, 11, 64])
def test_chunks_change_no_token(config: str, budget: int) -> None:
    model = built(CONFIGS[config])
    runner = lean(model)
    requests = [tiny.request(ids, str(n)) for n, ids in enumerate(PROMPTS)]
    whole = tiny.run(tiny.engine_for(model, runner=runner, max_batched_tokens=512, quantized=True), *requests)
    cut = tiny.run(tiny.engine_for(model, runner=runner, max_batched_tokens=budget, quantized=True), *requests)
    assert cut == whole


@pytest.mark.parametrize("config", CONFIGS)
def test_speculation_changes_no_sampled_token(config: str) -> None:
    model = built(CONFIGS[config])
    runner = lean(model)
    requests = [tiny.request(ids, str(n), **SEEDED) for n, ids in enumerate(PROMPTS)]
    plain = tiny.run(tiny.engine_for(model, runner=runner, quantized=True), *requests)
    proposer = LocalProposer(tiny.drafter_for(tiny.tiny_llama(seed=7)))
    drafted = tiny.engine_for(model, runner=runner, proposer=proposer, depth=6, quantized=True)
    assert tiny.run(drafted, *requests) == plain


@pytest.mark.parametrize("name", ["MPT", "Falcon, new decoder", "Gemma 2"])
def test_models_without_a_lean_pass_answer_alike_in_chunks(name: str) -> None:
    requests = [tiny.request(ids, str(n), max_tokens=12) for n, ids in enumerate(PROMPTS)]
    runner = runner_of(name)
    assert isinstance(runner, PerSequenceRunner) == (name != "Gemma 2")
    whole, cut = (
        tiny.run(tiny.engine_for(model_of(name), runner=runner, max_batched_tokens=n, quantized=True), *requests)
        for n in (512, 11)
    )
    assert cut == whole


@pytest.mark.parametrize("quantized", [False, True])
def test_logits_are_the_same_to_the_last_bit_however_a_sequence_is_cut(quantized: bool) -> None:
    model = built(CONFIGS["llama-wide-heads"])
    runner = lean_runner(model, compiled(), fp16_product, rounds=True)
    whole, cut = (logits(runner, PROMPTS[3], cuts, quantized=quantized) for cuts in ([], [40, 41, 42, 48, 70]))
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("backend", [one for one in KEEPING if one.rows_alike and one.missing() is None])
def test_a_product_s_rows_do_not_depend_on_each_other(backend: KeepingBackend) -> None:
    product = backend.round(torch.randn(96, 64), None)
    assert product is not None
    x = torch.randn(70, 64)
    assert all(torch.equal(product(x[:n].clone()), product(x)[:n]) for n in (1, 2, 3, 5, 6, 7, 17, 64))


def test_no_product_is_taken_whose_rows_depend_on_each_other_if_another_keeps_the_weight() -> None:
    linears = resolve_backends(EngineSettings(device="cpu", threads=1)).linears
    assert linears is not None
    packer = Packer(linears, lambda kept, _: {name: dict.fromkeys(REQUEST, float(name != "torch")) for name in kept})
    packer(torch.randn(32, 32).half().float(), None)
    assert packer.taken == "fbgemm_fp16"


def attended(dim: int, window: int, cuts: list[int], *, quantized: bool) -> torch.Tensor:
    """What our kernel makes of 600 rows of 6 heads over 2, in pieces."""
    rows, heads, kv_heads = 600, 6, 2
    shape = HeadsStruct(heads=heads, kv_heads=kv_heads, dim=dim, rotary_dim=dim, scale=dim**-0.5, sliding_window=window)
    geometry = KVGeometry(1, kv_heads, dim, torch.int8 if quantized else torch.float32, CPU)
    entry = SlabKVCache(geometry, rows, rows).reserve(range(rows), rows)
    assert entry is not None
    torch.manual_seed(0)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    out = torch.empty(rows, heads * dim)
    for start, end in zip([0, *cuts], [*cuts, rows], strict=True):
        struct = WindowStruct(row=0, start=start, rows=end - start, room=entry.room)
        struct.keys, struct.values = entry.keys.data_ptr(), entry.values.data_ptr()
        if entry.scales is not None:
            struct.key_scales, struct.value_scales = (each.data_ptr() for each in entry.scales)
        part, into = qkv[start:end].clone(), out[start:end]
        arguments = part.data_ptr(), None, None, ctypes.addressof(struct), 1, 0, ctypes.addressof(shape)
        compiled().library.attention(*arguments, into.data_ptr())
    return out


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("window", [0, 37, 550])
@pytest.mark.parametrize("dim", [12, 64, 80, 128])
def test_attention_is_the_same_to_the_last_bit_however_it_is_cut(dim: int, window: int, quantized: bool) -> None:
    whole = attended(dim, window, [], quantized=quantized)
    cut = attended(dim, window, [64, 65, 70, 103, 300, 301, 520, 523, 580], quantized=quantized)
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("window", [0, 37, 550])
@pytest.mark.parametrize("dim", [12, 64, 80, 128])
def test_attention_is_torch_s(dim: int, window: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(600, 10 * dim).view(600, 10, dim).transpose(0, 1).split((6, 2, 2))
    i, j = torch.arange(600)[:, None], torch.arange(600)[None]
    mask = (j <= i) & (j > i - (window or 600))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = attended(dim, window, [300, 301], quantized=False)
    torch.testing.assert_close(found, expected.transpose(0, 1).reshape(600, -1))


def test_the_setting_reaches_the_cache_and_the_choices(tmp_path: Path) -> None:
    vocabulary = {f"w{n}": n for n in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(tmp_path)
    tiny.tiny_llama().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, EngineSettings(device="cpu", threads=1, kv_tokens=512, kv_dtype="int8"))
    (choice,) = (choice.value for choice in loaded.choices if choice.name == "kv cache")
    assert (loaded.kv_geometry.dtype, choice) == (torch.int8, "512 tokens in int8")
