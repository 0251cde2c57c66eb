"""Do sessions find their KV again, and what is it worth? Real clients against a real cluster on this machine.

    python benchmarks/sessions.py                                     # 60 sessions of 6 turns, 3 target replicas
    python benchmarks/sessions.py --sessions 6 --turns 3 --burst 12 --history 300   # a look

Plain `openai` clients, which name no session and resend every message: how many follow-up turns are served by the
replica that served the turn before, how many tokens of a follow-up are prefilled against those that are new, how even
the replicas' shares are. Then a burst of new sessions at once. Then the time to the first token of a follow-up with a
long history, with the session's KV and after it was dropped, in turns. Prints a table; `--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from paceline.config import default_deployment, parse_settings
from paceline.ports import free_ports
from paceline.serving.cluster import LocalCluster

TOPICS = """
    river stone window engine garden letter morning silver bridge winter harbour candle forest market mountain paper
    copper island thunder orchard lantern meadow compass violin
"""
REPEATS = 5


@dataclass
class Turn:
    """What one answer said of how it was made."""

    replica: str
    route: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass
class Session:
    """One conversation as its client has it."""

    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


async def ask(client: AsyncOpenAI, session: Session, content: str, max_tokens: int) -> None:
    session.messages.append({"role": "user", "content": content})
    raw = await client.chat.completions.with_raw_response.create(
        model="smollm2-135m", messages=session.messages, max_tokens=max_tokens, temperature=0.8
    )
    answer = raw.parse()
    session.messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    usage = answer.usage
    cached = usage.prompt_tokens_details.cached_tokens
    session.turns.append(
        Turn(
            raw.headers["x-paceline-replica"],
            raw.headers.get("x-paceline-route", ""),
            usage.prompt_tokens,
            cached,
            usage.completion_tokens,
        )
    )


def question(chance: random.Random, words: int = 12) -> str:
    return f"Tell me about {' '.join(chance.choices(TOPICS.split(), k=words))}."


async def conversations(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Many sessions side by side, each with pauses of its own between the turns."""

    async def converse(number: int) -> Session:
        chance, session = random.Random(number), Session()
        async with client_of(url) as client:
            for _ in range(options.turns):
                await asyncio.sleep(chance.uniform(0, options.pause_s))
                await ask(client, session, question(chance), options.max_tokens)
        return session

    sessions = await asyncio.gather(*(converse(number) for number in range(options.sessions)))
    pairs = [pair for session in sessions for pair in zip(session.turns, session.turns[1:], strict=False)]
    shares = Counter(turn.replica for session in sessions for turn in session.turns)
    return {
        "follow_ups": len(pairs),
        "same_replica": sum(after.replica == before.replica for before, after in pairs) / len(pairs),
        "by_reason": dict(Counter(after.route for _, after in pairs)),
        "mean_prompt_tokens": statistics.mean(after.prompt_tokens for _, after in pairs),
        "mean_prefilled_tokens": statistics.mean(after.prompt_tokens - after.cached_tokens for _, after in pairs),
        "mean_new_tokens": statistics.mean(
            after.prompt_tokens - before.prompt_tokens - before.completion_tokens for before, after in pairs
        ),
        "requests_by_replica": sorted(shares.values()),
        "imbalance": imbalance(shares, options.replicas),
    }


async def burst(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """New sessions all at once, a token each."""
    async with client_of(url) as client:
        sessions = [Session() for _ in range(options.burst)]
        asked = (ask(client, each, question(random.Random(10_000 + n)), 1) for n, each in enumerate(sessions))
        await asyncio.gather(*asked)
    shares = Counter(session.turns[0].replica for session in sessions)
    return {"requests_by_replica": sorted(shares.values()), "imbalance": imbalance(shares, options.replicas)}


async def follow_up_ttft(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token after a long history, with KV and without, one after the other."""
    found: dict[str, list[float]] = {"with_kv": [], "without_kv": []}
    async with client_of(url) as client, httpx.AsyncClient(base_url=url, timeout=600) as http:
        for number in range(2 * REPEATS):
            kind, name, chance = ("with_kv", "without_kv")[number % 2], f"ttft-{number}", random.Random(number)
            messages = [{"role": "user", "content": question(chance, words=options.history)}]
            await streamed(client, messages, name, max_tokens=4)
            if kind == "without_kv":
                (await http.delete(f"/v1/sessions/{name}")).raise_for_status()
            messages.append({"role": "user", "content": "Which of these is the oldest?"})
            found[kind].append(await streamed(client, messages, name, max_tokens=4))
    return {kind: {"median_s": statistics.median(values), "all_s": values} for kind, values in found.items()}


async def streamed(client: AsyncOpenAI, messages: list[dict[str, str]], name: str, *, max_tokens: int) -> float:
    """One turn; its answer is appended. Seconds until its first text."""
    began, first, text = time.perf_counter(), 0.0, ""
    stream = await client.chat.completions.create(
        model="smollm2-135m",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_headers={"x-session-id": name},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            text += chunk.choices[0].delta.content
    messages.append({"role": "assistant", "content": text})
    return first


def imbalance(shares: Counter[str], replicas: int) -> float:
    """The busiest replica's share over the mean; 1 is even."""
    return max(shares.values()) * replicas / sum(shares.values())


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)


def table(results: dict[str, Any], options: argparse.Namespace) -> str:
    said, burst_, ttft = results["conversations"], results["burst"], results["follow_up_ttft"]
    rows = [
        ("follow-up turns served where the turn before was", f"{said['same_replica']:.1%} of {said['follow_ups']}"),
        ("why", ", ".join(f"{reason} {count}" for reason, count in sorted(said["by_reason"].items()))),
        (
            "tokens of a follow-up: prompt, new, prefilled",
            f"{said['mean_prompt_tokens']:.0f}, {said['mean_new_tokens']:.1f}, {said['mean_prefilled_tokens']:.1f}",
        ),
        ("requests by replica", f"{said['requests_by_replica']}, busiest {said['imbalance']:.2f} of the mean"),
        (
            f"burst of {options.burst} new sessions",
            f"{burst_['requests_by_replica']}, busiest {burst_['imbalance']:.2f} of the mean",
        ),
        (
            f"time to first token after {options.history} words, with KV and without",
            f"{ttft['with_kv']['median_s']:.2f} s, {ttft['without_kv']['median_s']:.2f} s",
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--pause-s", type=float, default=2.0)
    parser.add_argument("--burst", type=int, default=100)
    parser.add_argument("--history", type=int, default=1700, help="words of it; 1700 are about 2000 tokens")
    parser.add_argument("--routing", choices=("soft", "hard"), default="soft")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args()
    settings = parse_settings(
        {
            "model": "smollm2-135m",
            "target": {"num_replicas": options.replicas, "num_cpus": 0.1, "engine": {"kv_tokens": 24_576}},
            "draft": {"num_replicas": 0},
            "sessions": {"routing": options.routing},
        }
    )
    http_port, grpc_port = free_ports(2)
    deployment = default_deployment(settings, http_port=http_port, grpc_port=grpc_port)
    results: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    with LocalCluster(deployment) as endpoints:
        for part in (conversations, burst, follow_up_ttft):
            results[part.__name__] = asyncio.run(part(endpoints.http, options))
            print(part.__name__, json.dumps(results[part.__name__]), flush=True)
    print(table(results, options))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
