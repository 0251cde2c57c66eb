"""The engine on one GPU against the physical limit and against Transformers: random weights of real shapes.

    python benchmarks/gpu.py steps          # time of a step over weights + KV bytes / copy bandwidth
    python benchmarks/gpu.py engine         # what scheduler, sampling and detokenizing add, 64 streams
    python benchmarks/gpu.py speculation    # synthetic acceptance 0.8, depth 5, a 1B draft on the same GPU
    python benchmarks/gpu.py generate       # one stream against Transformers' eager generate
    python benchmarks/gpu.py prompt         # 16k tokens: peak memory and time, flash against eager attention
    python benchmarks/gpu.py memory         # octocoder-15B in bf16, 8 bits, 4 bits, beside `paceline estimate`

Medians; least and most in brackets. Needs no files: models are random, tokens are words w0, w1, ….
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from paceline.config import EngineSettings, SpeculationSettings
from paceline.engine.attention import Window
from paceline.engine.backends import resolve_backends
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.families import runner_for
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.load import LoadedModel
from paceline.engine.runner import Runner
from paceline.speculation.local import LocalProposer
from paceline.types import Request, SamplingParams

GIB = 2**30
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
OCTOCODER = GPTBigCodeConfig(
    vocab_size=49152, n_embd=6144, n_layer=40, n_head=48, n_inner=24576, n_positions=8192, multi_query=True
)
POINTS = ((1, 1), (1, 6), (32, 1), (32, 6), (64, 1))
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--weight-dtype", choices=("auto", "int8"), default="auto", help="of the 8B model")
    parser.add_argument("--draft-weight-dtype", choices=("auto", "int8"), default="int8", help="of the 1B draft")
    parser.add_argument("--attention", default="auto", help="engine.attn_implementation")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in arguments.parts:
        PARTS[part](arguments)
        gc.collect()
        torch.cuda.empty_cache()


def steps(arguments: argparse.Namespace) -> None:
    """Time of a step, replayed, inputs copied each time, over the time its weights and KV take to be copied."""
    bandwidth = copy_bandwidth()
    print(f"\nsteps, Llama-8B shape, context {CONTEXT}; a copy moves {bandwidth / 1e12:.2f} TB/s")
    model = loaded(LLAMA_8B, kv_tokens=64 * (CONTEXT + 64), max_num_seqs=64, **_of(arguments))
    read = weight_bytes(model.runner)
    print(f"{'':8}{'ms':>22}{'floor':>8}{'ratio':>8}")
    for sequences, rows in POINTS:
        run = step_of(model, sequences, rows)
        found = timed(run, 20)
        kv = sequences * CONTEXT * model.kv_geometry.bytes_per_token
        floor = 1e3 * (read + kv) / bandwidth
        ratio = statistics.median(found) / floor
        print(f"{sequences:3} x {rows:<3}{spread(found):>22}{floor:8.2f}{ratio:8.3f}", flush=True)


def engine(arguments: argparse.Namespace) -> None:
    """64 streams, steady state: a step of the engine, wall clock, over the same step's replay."""
    streams, tokens = 64, 160
    model = loaded(LLAMA_8B, kv_tokens=streams * (CONTEXT + 320), max_num_seqs=streams, **_of(arguments))
    replay = statistics.median(timed(step_of(model, streams, 1), 20))
    serving = model.engine()
    prompts = prompts_of(streams, CONTEXT - tokens // 2)
    found = [1e3 * seconds for seconds in step_times(serving, prompts, tokens)]
    print(f"\nengine, {streams} streams: a step {spread(found)} ms, its graph {replay:.2f}", end="")
    print(f", {100 * (statistics.median(found) / replay - 1):+.1f}%", flush=True)


def speculation(arguments: argparse.Namespace) -> None:
    """One stream, rounds by turns."""
    sizes = {"kv_tokens": 4096, "max_num_seqs": 4, "max_model_len": 2048}
    target = loaded(LLAMA_8B, **sizes, **_of(arguments))
    draft = loaded(LLAMA_1B, **sizes, weight_dtype=arguments.draft_weight_dtype)
    plain = target.engine()
    settings = SpeculationSettings(synthetic_acceptance=0.8, depth=5, prompt_lookup_num_tokens=0)
    speculating = target.engine(LocalProposer(draft.drafter()), settings)
    rates: dict[str, list[float]] = {"plain": [], "speculation": []}
    for _ in range(5):
        for name, each in (("plain", plain), ("speculation", speculating)):
            rates[name].append(rate(each, prompts_of(1, 512), 256))
    gain = statistics.median(rates["speculation"]) / statistics.median(rates["plain"])
    dtype = arguments.draft_weight_dtype
    print(f"\nspeculation, acceptance 0.8, depth 5, a 1B draft (weights {dtype}) on the same GPU, one stream:")
    print(
        f"plain {spread(rates['plain'])} tokens/s, with drafts {spread(rates['speculation'])}: {gain:.2f}x", flush=True
    )


def generate(arguments: argparse.Namespace) -> None:
    """Transformers' generate on the same weights, before they are fused."""
    tokens, prompt = 64, prompts_of(1, 128)[0]
    own = random_model(LLAMA_8B)
    ids = torch.tensor([prompt], device="cuda")

    def theirs() -> float:
        began = time.perf_counter()
        own.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return tokens / (time.perf_counter() - began)

    theirs()
    found = [theirs() for _ in range(3)]
    settings = {"kv_tokens": 4096, "max_num_seqs": 4, "max_model_len": 1024, "cache_implementation": "static"}
    serving = loaded(LLAMA_8B, own=own, **settings, **_of(arguments)).engine()
    rate(serving, [prompt], tokens)
    ours = [rate(serving, [prompt], tokens) for _ in range(3)]
    gain = statistics.median(ours) / statistics.median(found)
    print(f"\ngenerate, one stream, {tokens} tokens after 128: Transformers, eager, {spread(found)} tokens/s;", end="")
    print(f" static cache and graphs {spread(ours)}: {gain:.1f}x", flush=True)


def prompt(_: argparse.Namespace) -> None:
    """Peak memory beyond weights and KV; chunks of 2048 tokens, and all at once."""
    length = 16384
    print(f"\nprompt of {length} tokens, 8B shape")
    for attention, chunk in (("auto", 2048), ("auto", length), ("eager", 2048), ("eager", length)):
        settings = {"kv_tokens": length + 128, "max_num_seqs": 1, "max_model_len": length + 128}
        model = loaded(LLAMA_8B, **settings, max_batched_tokens=chunk, attn_implementation=attention)
        serving = model.engine()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = first_token_s(serving, prompts_of(1, length)[0])
            peak = (torch.cuda.max_memory_allocated() - before) / GIB
            print(f"{attention:6} chunks of {chunk:5}: {seconds:6.2f} s, {peak:6.2f} GiB", flush=True)
        except torch.OutOfMemoryError:
            print(f"{attention:6} chunks of {chunk:5}: out of memory", flush=True)
        del model, serving
        gc.collect()
        torch.cuda.empty_cache()


def memory(_: argparse.Namespace) -> None:
    """Peak of loading and of 60 tokens after a short prompt, as Transformers' documentation measured octocoder."""
    print("\nmemory, octocoder-15B shape, GiB")
    for precision, make in (("bf16", random_model), ("8-bit", in_8_bits), ("4-bit", in_4_bits)):
        torch.cuda.reset_peak_memory_stats()
        model = loaded(OCTOCODER, own=make(OCTOCODER), kv_tokens=512, max_num_seqs=1, max_model_len=512)
        weights = torch.cuda.memory_allocated() / GIB
        rate(model.engine(), prompts_of(1, 64), 60)
        peak = torch.cuda.max_memory_allocated() / GIB
        tokens = 16_000 * model.kv_geometry.bytes_per_token / 1e6
        print(f"{precision}: weights {weights:.2f}, peak {peak:.2f}; KV of 16000 tokens {tokens:.0f} MB", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    each.__name__: each for each in (steps, engine, speculation, generate, prompt, memory)
}


def loaded(config: PretrainedConfig, *, own: Any = None, **settings: Any) -> LoadedModel:
    """A random model as `paceline.engine.load.load_model` would have it from a folder."""
    from paceline.engine.gpu.load import on_device  # needs Triton, which what others import from here does not

    asked = EngineSettings(**settings)
    own = random_model(config) if own is None else own
    backends = resolve_backends(asked)
    runner: Runner = runner_for(own)
    if backends.attention in ("triton", "flash_attention_3", "varlen_attn"):
        runner, _ = on_device(runner, backends, asked)  # type: ignore[arg-type]
    else:
        runner.attend_as(backends.attention, paged=backends.paged)  # type: ignore[attr-defined]
    geometry = runner.kv_geometry()
    longest = runner.max_model_len if asked.max_model_len == "auto" else asked.max_model_len
    limits = EngineLimits(longest, asked.max_num_seqs, asked.max_batched_tokens, asked.max_queued_requests)
    assert isinstance(asked.kv_tokens, int)
    no_eos: frozenset[int] = frozenset()
    tokenizer = words(config.vocab_size)
    shift = runner.key_shift()
    return LoadedModel(runner, tokenizer, no_eos, limits, geometry, asked.kv_tokens, shift, "random", "random", ())


def random_model(config: PretrainedConfig) -> Any:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def in_8_bits(config: PretrainedConfig) -> Any:
    import bitsandbytes as bnb

    def quantized(linear: torch.nn.Linear, noise: torch.Tensor) -> torch.nn.Module:
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(noise.cpu(), requires_grad=False, has_fp16_weights=False)
        return made

    # The library multiplies in half precision.
    return _replaced(config, quantized, torch.float16)


def in_4_bits(config: PretrainedConfig) -> Any:
    import bitsandbytes as bnb

    def quantized(linear: torch.nn.Linear, noise: torch.Tensor) -> torch.nn.Module:
        sizes = linear.in_features, linear.out_features
        made = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        made.weight = bnb.nn.Params4bit(noise, requires_grad=False, quant_type="nf4")
        return made

    return _replaced(config, quantized, torch.bfloat16)


def _replaced(
    config: PretrainedConfig,
    quantized: Callable[[torch.nn.Linear, torch.Tensor], torch.nn.Module],
    dtype: torch.dtype,
) -> Any:
    """All linear layers but the head, one after the other, as loading a checkpoint does; of each shape one is rounded
    and the others are copies of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    made: dict[tuple[int, int], torch.nn.Module] = {}
    for name, linear in [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]:
        if "lm_head" in name:
            continue
        shape = linear.out_features, linear.in_features
        if shape not in made:
            made[shape] = quantized(linear, torch.empty(shape, dtype=dtype, device="cuda").normal_(std=0.02))
            zeros = torch.zeros(linear.out_features, dtype=dtype)
            made[shape].bias = None if linear.bias is None else torch.nn.Parameter(zeros, requires_grad=False)
            model.set_submodule(name, made[shape].to("cuda"))
        else:
            model.set_submodule(name, copy.deepcopy(made[shape]))
    _fill(model, dtype)
    model.tie_weights()
    model.hf_quantizer = "bitsandbytes"
    return model.eval().requires_grad_(False)


def _fill(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What is still without memory, at random."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device="cuda").normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cuda"), False)


def words(vocab: int) -> Any:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def weight_bytes(runner: Any) -> int:
    """What a step reads of the weights: all but the embedding, of which it reads a row a token."""
    body = runner.body
    return int(body.weight_bytes)


def copy_bandwidth() -> float:
    """Bytes read and written a second; the best of some sizes."""
    found = 0.0
    for size in (2**28, 2**30, 2**32):
        of, to = (
            torch.empty(size, dtype=torch.uint8, device="cuda"),
            torch.empty(size, dtype=torch.uint8, device="cuda"),
        )
        found = max(found, 2e3 * size / statistics.median(timed(lambda of=of, to=to: to.copy_(of), 10)))  # type: ignore[misc]
    return found


def step_of(model: LoadedModel, sequences: int, rows: int) -> Callable[[], Any]:
    """A step of so many windows at CONTEXT, again and again."""
    geometry = model.kv_geometry
    memory = model.runner.kv_memory(geometry, model.kv_tokens, model.limits.max_model_len)
    kv = SlabKVCache(geometry, model.kv_tokens, model.limits.max_model_len, memory=memory)
    windows = []
    for number in range(sequences):
        entry = kv.reserve([number] * 4, CONTEXT + 16)
        assert entry is not None
        kv.append(entry, [number] * (CONTEXT - rows))
        for part in entry.tensors:
            part[:, :, entry.at(slice(0, CONTEXT))] = 0.1
        windows.append(Window(entry, list(range(rows)), sample=rows))
    return lambda: model.runner.run(windows)


def timed(run: Callable[[], Any], count: int, rounds: int = 9) -> list[float]:
    """Milliseconds of a call, from events around `count` of them."""
    run()
    run()
    found = []
    for _ in range(rounds):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(count):
            run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / count)
    return found


def prompts_of(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1000, 100_000, (length,), generator=generator).remainder(49_000).tolist() for _ in range(count)
    ]


_names = itertools.count()


def requests(prompts: Sequence[list[int]], tokens: int) -> Iterator[Request]:
    for number, ids in enumerate(prompts):
        params = SamplingParams(temperature=0.8, seed=number, max_tokens=tokens, ignore_eos=True)
        yield Request(f"r{next(_names)}", tuple(ids), params)


def step_times(serving: Engine, prompts: Sequence[list[int]], tokens: int) -> list[float]:
    """Seconds of each step in which all streams decode, but for the first and last few."""
    for request in requests(prompts, tokens):
        serving.add(request)
    found: list[float] = []
    while serving.has_work:
        began = time.perf_counter()
        deltas = serving.step()
        if len(deltas) == len(prompts):
            found.append(time.perf_counter() - began)
    return found[8:-8]


def rate(serving: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Tokens a second after the first."""
    for request in requests(prompts, tokens):
        serving.add(request)
    made, began = 0, 0.0
    while serving.has_work:
        new = sum(len(delta.token_ids) for delta in serving.step().values())
        if not began and new:
            began = time.perf_counter()
        elif began:
            made += new
    return made / (time.perf_counter() - began)


def first_token_s(serving: Engine, ids: list[int]) -> float:
    (request,) = requests([ids], 1)
    began = time.perf_counter()
    serving.add(request)
    while serving.has_work:
        serving.step()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def _of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"weight_dtype": arguments.weight_dtype, "attn_implementation": arguments.attention}


if __name__ == "__main__":
    main()
