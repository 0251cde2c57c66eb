"""Does an answer survive the death of its replica? `kill -9` of a busy target, again and again, on one cluster.

    python benchmarks/crash.py                               # 20 kills, 8 streams at each of 2 targets
    python benchmarks/crash.py --kills 2 --streams 2 --max-tokens 30   # a look

All streams run once undisturbed. Then, for each kill, they run again with the same seeds; when a third of the tokens
is out, the target with the most open streams is killed. Every stream must end with exactly the tokens of the
undisturbed run. Between kills the cluster gets its replica back. Prints a table, fails if a stream was lost or differs;
`--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from paceline.config import default_deployment, parse_settings
from paceline.ports import free_ports
from paceline.serving.cluster import LocalCluster

BACK_TIMEOUT_S, POLL_S = 120.0, 0.5


@dataclass
class Answer:
    """What one stream gave. `silence_s` is the longest time between two of its frames."""

    tokens: list[int] = field(default_factory=list)
    error: str = ""
    complete: bool = False
    resumptions: int = 0
    silence_s: float = 0.0


@dataclass
class Kill:
    """One repetition: streams open at the killed target, and what became of all."""

    open: int
    resumed: int
    same: int
    different: int
    lost: list[str]
    silence_s: list[float]


async def stream(client: httpx.AsyncClient, number: int, max_tokens: int, heard: Callable[[int], None]) -> Answer:
    body = {
        "messages": [{"role": "user", "content": f"Tell me a story about the number {number}."}],
        "max_tokens": max_tokens,
        "temperature": 0.8,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    answer, last = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    answer.complete |= line == "data: [DONE]"
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    answer.error = chunk["error"]["message"]
                    break
                told = chunk.get("paceline") or {}
                new = told.get("token_ids") or []
                if new and answer.tokens:
                    answer.silence_s = max(answer.silence_s, time.perf_counter() - last)
                last = time.perf_counter()
                answer.tokens += new
                answer.resumptions = told.get("resumptions") or answer.resumptions
                heard(len(new))
    except httpx.HTTPError as error:
        answer.error = str(error) or type(error).__name__
    return answer


async def all_streams(url: str, count: int, max_tokens: int, heard: Callable[[int], None]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return await asyncio.gather(*(stream(client, number, max_tokens, heard) for number in range(count)))


async def kill_once(url: str, expected: list[Answer], options: argparse.Namespace) -> Kill:
    """Run the streams, kill a target when a third of the tokens is out."""
    due, left = asyncio.Event(), len(expected) * options.max_tokens // 3

    def count(new: int) -> None:
        nonlocal left
        left -= new
        if left <= 0:
            due.set()

    running = asyncio.create_task(all_streams(url, len(expected), options.max_tokens, count))
    await due.wait()
    victim = max(await targets(url), key=lambda target: int(target["running"]))
    os.kill(victim["pid"], signal.SIGKILL)
    answers = await running
    pairs = list(zip(answers, expected, strict=True))
    return Kill(
        open=victim["running"],
        resumed=sum(answer.resumptions > 0 for answer in answers),
        same=sum(answer.complete and answer.tokens == other.tokens for answer, other in pairs),
        different=sum(answer.complete and answer.tokens != other.tokens for answer, other in pairs),
        lost=[answer.error or "ended early" for answer in answers if not answer.complete],
        silence_s=[answer.silence_s for answer in answers if answer.resumptions],
    )


async def targets(url: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        found: list[dict[str, Any]] = (await client.get("/status")).raise_for_status().json()["targets"]
        return found


async def whole_again(url: str, replicas: int) -> None:
    for _ in range(int(BACK_TIMEOUT_S / POLL_S)):
        if len(await targets(url)) >= replicas:
            return
        await asyncio.sleep(POLL_S)
    raise SystemExit(f"the killed replica was not back after {BACK_TIMEOUT_S:g} s")


async def run(url: str, options: argparse.Namespace) -> list[Kill]:
    undisturbed = await all_streams(url, options.streams * options.replicas, options.max_tokens, lambda _: None)
    if not all(answer.complete for answer in undisturbed):
        raise SystemExit(f"the undisturbed run failed: {[answer.error for answer in undisturbed]}")
    kills = []
    for number in range(options.kills):
        kills.append(await kill_once(url, undisturbed, options))
        print(f"kill {number + 1}: {json.dumps({**asdict(kills[-1]), 'silence_s': None})}", flush=True)
        await whole_again(url, options.replicas)
    return kills


def table(kills: list[Kill]) -> str:
    silences = sorted(silence for kill in kills for silence in kill.silence_s) or [0.0]
    rows = [
        ("kills", len(kills)),
        ("streams open at a killed target", f"{min(k.open for k in kills)} to {max(k.open for k in kills)}"),
        ("streams that went on elsewhere", sum(kill.resumed for kill in kills)),
        ("streams with the tokens of the undisturbed run", sum(kill.same for kill in kills)),
        ("with others", sum(kill.different for kill in kills)),
        ("lost", sum(len(kill.lost) for kill in kills)),
        ("their longest silence, median and most", f"{statistics.median(silences):.2f} s, {silences[-1]:.2f} s"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2, help="targets")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8, help="at each target")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args()
    settings = parse_settings(
        {
            "model": "smollm2-135m",
            "target": {"num_replicas": options.replicas, "num_cpus": 0.1, "engine": {"kv_tokens": 16_384}},
            "draft": {"num_replicas": options.drafts, "num_cpus": 0.1, "engine": {"kv_tokens": 16_384}},
        }
    )
    http_port, grpc_port = free_ports(2)
    with LocalCluster(default_deployment(settings, http_port=http_port, grpc_port=grpc_port)) as endpoints:
        kills = asyncio.run(run(endpoints.http, options))
    print(table(kills))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(kill) for kill in kills]) + "\n")
    return int(any(kill.lost or kill.different for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
