"""Peers on the same weights. Each runs where it is installed; llama.cpp in a process of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from paceline.bench.measure import seconds

LLAMA_TIMEOUT_S = 600

LLAMA_PROGRAM = """
import json, random, sys, time
from llama_cpp import Llama, __version__
path, threads, tokens, prompt = sys.argv[1], *map(int, sys.argv[2:5])
llm = Llama(path, n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
draw = random.Random(0)
def ids(n): return [draw.randrange(100, 40000) for _ in range(n)]
def prefill():
    llm.reset(); batch = ids(prompt); start = time.perf_counter(); llm.eval(batch)
    return prompt / (time.perf_counter() - start)
def decode():
    llm.reset(); llm.eval(ids(32)); start = time.perf_counter()
    for _ in range(tokens): llm.eval([llm.sample(temp=0.0)])
    return tokens / (time.perf_counter() - start)
for command in sys.stdin:
    value = {"prefill": prefill, "decode": decode}[command.strip()]()
    print(json.dumps({"value": value, "version": __version__}), flush=True)
"""


class TransformersPeer:
    """`transformers.generate`, eager, float32."""

    def __init__(self, model: Any, tokens: int, prompt: int) -> None:
        self._model, self._tokens, self._prompt = model, tokens, prompt
        self._random = random.Random(0)

    def decode(self) -> float:
        ids = torch.tensor([[self._random.randrange(100, 40000) for _ in range(32)]])
        mask = torch.ones_like(ids)
        options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        first = seconds(lambda: self._model.generate(ids, max_new_tokens=1, **options))
        whole = seconds(lambda: self._model.generate(ids, max_new_tokens=self._tokens + 1, **options))
        return self._tokens / (whole - first)

    def prefill(self) -> float:
        ids = torch.tensor([[self._random.randrange(100, 40000) for _ in range(self._prompt)]])
        with torch.inference_mode():
            return self._prompt / seconds(lambda: self._model(ids, logits_to_keep=1))


class LlamaCppPeer:
    """llama-cpp-python of another interpreter (or this one), over a GGUF file. A context manager."""

    def __init__(self, gguf: Path, threads: int, tokens: int, prompt: int, python: str = sys.executable) -> None:
        self._command = [python, "-c", LLAMA_PROGRAM, str(gguf), str(threads), str(tokens), str(prompt)]
        self.version = ""

    def __enter__(self) -> LlamaCppPeer:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def decode(self) -> float:
        return self._ask("decode")

    def prefill(self) -> float:
        return self._ask("prefill")

    def _ask(self, what: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self.version = answer["version"]
        return float(answer["value"])


def has_llama_cpp(python: str) -> bool:
    """Whether that interpreter can import llama_cpp."""
    return subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, timeout=60).returncode == 0
