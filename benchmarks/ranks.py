"""One model on two ranks against the same on one: random weights of real shapes, written to a folder, served from it.

    python benchmarks/ranks.py cpu                # 160M parameters: 2 ranks x 1 thread against 1 x 2 threads
    python benchmarks/ranks.py gpu                # Llama-8B's shape on two GPUs against one
    python benchmarks/ranks.py gpu --shape 70b    # as many of its layers as `--layers` says
    python benchmarks/ranks.py gpu --collectives nccl

Both run in one process by turns; medians, least and most in brackets; ratios are medians of each turn's. A step's time
holds everything: what rank 0 tells the others, the sums, and the logits of all ranks side by side. What one sum takes
alone: benchmarks/all_reduce.py. `--folder` may be that of any model.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import first_token_s, rate, spread, words
from safetensors.torch import save_file
from transformers import LlamaConfig

from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.tp.runner import ShardedRunner
from paceline.models.lazy import empty_causal_lm
from paceline.models.sharding import ShardPlan

GIB = 2**30
SHAPES: dict[str, dict[str, int]] = {
    "160m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
POINTS = ((1, 1), (1, 6), (32, 1))
CONTEXT = 1024
FILE_BYTES = 4 * GIB
_numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: 160m on a CPU, 8b on GPUs")
    parser.add_argument("--layers", type=int, help="default: all of the shape")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--collectives", default="auto", help="engine.collectives")
    parser.add_argument("--weight-dtype", default="auto", help="engine.weight_dtype")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the weights here; default: a temporary folder")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape or ("160m" if arguments.device == "cpu" else "8b")])
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        write(folder, LlamaConfig(**shape, tie_word_embeddings=False))
        (on_cpu if arguments.device == "cpu" else on_gpus)(folder, arguments)


def on_cpu(folder: Path, arguments: argparse.Namespace) -> None:
    """Decoding of one stream and of eight, and a prompt."""
    ranks, threads = arguments.ranks, torch.get_num_threads()
    both = {
        f"1 rank x {threads} threads": (threads, loaded(folder, arguments, device="cpu", threads=threads)),
        f"{ranks} ranks x {threads // ranks} threads": (
            threads // ranks,
            loaded(folder, arguments, ranks, device="cpu", threads=threads // ranks),
        ),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in both}
    engines = {name: (count, model.engine()) for name, (count, model) in both.items()}
    for number in range(arguments.rounds + 1):
        for name, (count, engine) in engines.items():
            torch.set_num_threads(count)
            row = [
                rate(engine, prompts(1, 16), 64),
                rate(engine, prompts(8, 16), 32),
                512 / first_token_s(engine, *prompts(1, 512)),
            ]
            if number:  # the first is for what is set up at first use
                found[name].append(row)
    print(f"\ntokens a second{'one stream':>26}{'eight streams':>26}{'prompt of 512':>26}")
    for name, rows in found.items():
        print(f"{name:15}" + "".join(f"{spread(column):>26}" for column in zip(*rows, strict=True)))
    alone, shared = found.values()
    ratios = [
        statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        for ours, theirs in zip(zip(*shared, strict=True), zip(*alone, strict=True), strict=True)
    ]
    print(f"{'ratio':17}" + "".join(f"{ratio:>26.2f}" for ratio in ratios), flush=True)


def on_gpus(folder: Path, arguments: argparse.Namespace) -> None:
    """Steps at a context of 1024, decoding of one stream, and each rank's memory."""
    print(f"{arguments.ranks} of {torch.cuda.device_count()} {torch.cuda.get_device_name()}, torch {torch.__version__}")
    settings = {"kv_tokens": 34 * (CONTEXT + 64), "max_num_seqs": 32, "max_model_len": 2048}
    began = time.perf_counter()
    alone = loaded(folder, arguments, **settings)
    weights = torch.cuda.memory_allocated() - _logits_bytes(alone)
    middle = time.perf_counter()
    shared = loaded(folder, arguments, arguments.ranks, **settings)
    print(f"loaded in {middle - began:.0f} s alone, in {time.perf_counter() - middle:.0f} s on {arguments.ranks} ranks")
    _memory(folder, shared, weights, arguments.ranks)
    runs = {name: [step_of(model, *point) for point in POINTS] for name, model in (("1", alone), ("n", shared))}
    times: dict[str, list[list[float]]] = {name: [[] for _ in POINTS] for name in runs}
    for number, name in itertools.product(range(len(POINTS)), list(runs) * arguments.rounds):
        times[name][number].append(timed(runs[name][number], 20))
    print(f"\nms a step{'1 rank':>24}{f'{arguments.ranks} ranks':>24}{'speed-up':>10}")
    for point, one, several in zip(POINTS, *times.values(), strict=True):
        gain = statistics.median(one) / statistics.median(several)
        print(f"{point[0]:3} x {point[1]:<3}{spread(one):>24}{spread(several):>24}{gain:10.2f}", flush=True)
    del runs
    engines = [model.engine() for model in (alone, shared)]
    rates = [[rate(engine, prompts(1, 128), 128) for engine in engines] for _ in range(arguments.rounds + 1)][1:]
    one, several = zip(*rates, strict=True)
    gain = statistics.median(several) / statistics.median(one)
    print(f"engine, one stream, tokens/s: {spread(one)} and {spread(several)}: {gain:.2f}x", flush=True)


def _memory(folder: Path, shared: LoadedModel, alone: int, ranks: int) -> None:
    """What weights take on each rank, beside what the plan says and half of what one rank takes."""
    assert isinstance(shared.runner, ShardedRunner)
    config = LlamaConfig.from_pretrained(folder)
    plan = ShardPlan.of(config, ranks)
    whole = plan.replicated_bytes(2)
    even = (alone - whole) / ranks + whole
    print(f"weights: {alone / GIB:.2f} GiB alone; an even share and what all have whole: {even / GIB:.2f} GiB")
    for rank, bytes_there in enumerate(shared.runner.share_bytes):
        planned, away = plan.share_bytes(rank, 2) / GIB, 100 * (bytes_there / even - 1)
        print(f"rank {rank}: {bytes_there / GIB:.2f} GiB ({away:+.1f}%), planned {planned:.2f}", flush=True)


def loaded(folder: Path, arguments: argparse.Namespace, ranks: int = 1, **settings: Any) -> LoadedModel:
    own = {"tensor_parallel_size": ranks, "weight_dtype": arguments.weight_dtype}
    if ranks > 1:
        own["collectives"] = arguments.collectives
    return load_model(folder, EngineSettings(**{"kv_tokens": 4096, "max_model_len": 1024} | settings | own))


def write(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint of random weights in bfloat16, in files of some gigabytes."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for name, weight in empty_causal_lm(config, dtype=torch.bfloat16).named_parameters():
        made = torch.empty(weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        part[name] = (torch.ones_like(made) if "norm" in name else made).cpu()
        if sum(each.nbytes for each in part.values()) > FILE_BYTES:
            _write_part(folder, part, index)
    _write_part(folder, part, index)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    words(config.vocab_size).save_pretrained(folder)
    print(f"{total / GIB:.1f} GiB of random weights written in {time.perf_counter() - began:.0f} s", flush=True)


def _write_part(folder: Path, part: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    if not part:
        return
    file = f"model-{len(set(index.values())) + 1:05}.safetensors"
    save_file(part, folder / file, metadata={"format": "pt"})
    index |= dict.fromkeys(part, file)
    part.clear()


def _logits_bytes(model: LoadedModel) -> int:
    """What a runner holds beside weights and grows with the vocabulary."""
    logits = getattr(model.runner, "_logits", None)
    return 0 if logits is None else int(logits.nbytes)


def step_of(model: LoadedModel, sequences: int, rows: int) -> Any:
    """A step of so many windows at CONTEXT, again and again."""
    geometry, longest = model.kv_geometry, model.limits.max_model_len
    memory = model.runner.kv_memory(geometry, sequences * (CONTEXT + 64), longest)
    kv = SlabKVCache(geometry, sequences * (CONTEXT + 64), longest, memory=memory)
    windows = []
    for number in range(sequences):
        entry = kv.reserve([number] * 4, CONTEXT + 16)
        assert entry is not None
        kv.append(entry, [number] * (CONTEXT - rows))
        windows.append(Window(entry, list(range(rows)), sample=rows))
    return lambda: model.runner.run(windows)


def timed(run: Any, count: int) -> float:
    """Milliseconds of a call, of `count` in a row."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / count


def prompts(streams: int, length: int) -> list[list[int]]:
    """Others each time: nothing is found in the KV cache."""
    generator = torch.Generator().manual_seed(next(_numbers))
    return [torch.randint(1000, 30_000, (length,), generator=generator).tolist() for _ in range(streams)]


if __name__ == "__main__":
    main()
    gc.collect()
