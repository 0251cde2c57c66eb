"""The promise: the output is a function of prompt, parameters, seed and target weights alone.

Twenty real prompts of 64 tokens, over HTTP, against transformers.generate in float32 on the same weights:
without speculation, with remote drafts, and with a draft replica killed in the middle.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest
import torch

from paceline.models import ModelFiles, load_causal_lm, load_tokenizer
from tests.serve.conftest import Server, chat_all, chat_tokens, whole

pytestmark = pytest.mark.serve

PROMPTS = [
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Write a haiku about the sea.",
    "List three uses of copper.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23? Show your work.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "Translate 'good morning' into Spanish, French and German.",
    "Write a Python function that reverses a string.",
    "What causes the seasons on Earth?",
    "Name five animals that live in the desert.",
    "How does a refrigerator work?",
    "Write a short letter to a friend about a trip to the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a joke about computers.",
    "Who wrote 'Pride and Prejudice', and when?",
    "Describe the water cycle for a ten-year-old.",
    "What should I pack for a week of hiking?",
    "Explain what a KV cache is in a language model.",
]
MAX_TOKENS = 64
# Past the end of an answer as well, so that every prompt is held over all 64 tokens.
FULL: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
GREEDY: dict[str, Any] = {"temperature": 0, **FULL}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 42, **FULL}


@pytest.fixture(scope="module")
def reference(smollm2: ModelFiles) -> list[list[int]]:
    """transformers.generate, greedy, float32, all prompts in one left-padded batch."""
    tokenizer = load_tokenizer(smollm2.path)
    model = load_causal_lm(smollm2.path, dtype=torch.float32, device="cpu")
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=None)
    answers: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    assert {len(answer) for answer in answers} == {MAX_TOKENS}
    return answers


@pytest.fixture(scope="module")
def plain_seeded(cluster: Server) -> list[list[int]]:
    """Sampled tokens without speculation."""
    return [tokens for tokens, _ in asyncio.run(chat_all(cluster, PROMPTS, speculation=False, **SEEDED))]


async def test_greedy_without_speculation(server: Server, reference: list[list[int]]) -> None:
    answers = await chat_all(server, PROMPTS, speculation=False, **GREEDY)
    assert [tokens for tokens, _ in answers] == reference


async def test_greedy_with_remote_drafts(server: Server, reference: list[list[int]]) -> None:
    answers = await chat_all(server, PROMPTS, **GREEDY)
    assert [tokens for tokens, _ in answers] == reference
    assert all(0 < info["accepted_tokens"] <= info["drafted_tokens"] for _, info in answers)


@pytest.mark.slow
async def test_greedy_with_a_draft_replica_killed(server: Server, reference: list[list[int]]) -> None:
    assert await _with_a_killed_draft(server, **GREEDY) == reference


async def test_seeded_with_remote_drafts(server: Server, plain_seeded: list[list[int]]) -> None:
    answers = await chat_all(server, PROMPTS, **SEEDED)
    assert [tokens for tokens, _ in answers] == plain_seeded
    assert all(0 < info["accepted_tokens"] <= info["drafted_tokens"] for _, info in answers)


async def test_seeded_with_a_draft_replica_killed(server: Server, plain_seeded: list[list[int]]) -> None:
    assert await _with_a_killed_draft(server, **SEEDED) == plain_seeded


async def test_sampling_is_not_greedy(reference: list[list[int]], plain_seeded: list[list[int]]) -> None:
    assert plain_seeded != reference


async def _with_a_killed_draft(server: Server, **options: Any) -> list[list[int]]:
    """Answer all prompts; once a quarter of the tokens is there, SIGKILL the draft replica with most sequences."""
    before = server.status()["drafts"]
    produced, killed = 0, asyncio.Event()

    def count(new: int) -> None:
        nonlocal produced
        produced += new
        if produced >= len(PROMPTS) * MAX_TOKENS // 4:
            killed.set()

    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=300) as client:
        running = [asyncio.create_task(chat_tokens(client, p, count, **options)) for p in PROMPTS]
        await asyncio.wait_for(killed.wait(), 120)
        drafts = (await client.get("/status")).json()["drafts"]
        victim = max(drafts, key=lambda draft: int(draft["sequences"]))
        os.kill(victim["pid"], signal.SIGKILL)
        answers = await asyncio.gather(*running)
    assert victim["sequences"] > 0 and victim["drafted_tokens"] > 0
    after = server.wait_for(whole)["drafts"]
    assert victim["replica_id"] in {draft["replica_id"] for draft in before}
    assert victim["replica_id"] not in {draft["replica_id"] for draft in after}
    return [tokens for tokens, _ in answers]
