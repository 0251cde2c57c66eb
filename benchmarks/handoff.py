"""Do sessions keep their KV when replicas come and go? Real clients against a real cluster on this machine.

    python benchmarks/handoff.py                                     # 60 sessions, 4 busy clients, 3 -> 2 -> 3 targets
    python benchmarks/handoff.py --sessions 9 --history 60 --clients 2   # a look

Sessions with some history are spread over three target replicas. Then, while other clients keep asking, one replica is
taken away and later added again, as `serve deploy` with another `num_replicas` does. After each change every session
asks once more. Reported: requests that failed, how many sessions of the replica that left found their KV at another,
how many of their tokens were prefilled, and what the replica that left logged. A holder that is overloaded just then
is passed over, and the KV is there and not used; the routes tell. Prints a table; `--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray

from paceline.config import default_deployment, parse_settings
from paceline.ports import free_ports
from paceline.serving.cluster import LocalCluster

TOPICS = """
    river stone window engine garden letter morning silver bridge winter harbour candle forest market mountain paper
    copper island thunder orchard lantern meadow compass violin
"""
QUESTION_WORDS = 12
KEPT = 0.8
"""A follow-up kept its KV if that much of what was said before was cached. A template's last words may be computed
again."""


@dataclass
class Turn:
    """What one answer said of how it was made."""

    asked: float
    replica: str
    route: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float


@dataclass
class Session:
    """One conversation as its client has it."""

    name: str
    chance: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient, words: int, max_tokens: int) -> None:
        content = f"Tell me about {' '.join(self.chance.choices(TOPICS.split(), k=words))}."
        messages = [*self.messages, {"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.8, "session_id": self.name}
        asked = time.time()
        try:
            response = await client.post("/v1/chat/completions", json=body)
            answer = response.raise_for_status().json()
        except httpx.HTTPError as error:
            self.failures.append(str(error) or type(error).__name__)
            return
        self.messages = [*messages, answer["choices"][0]["message"]]
        usage, told = answer["usage"], response.headers
        self.turns.append(
            Turn(
                asked,
                told["x-paceline-replica"],
                told.get("x-paceline-route", ""),
                usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"],
                usage["completion_tokens"],
                time.time() - asked,
            )
        )


@dataclass
class Pair:
    """A turn at a replica that left since, and the next one of its session."""

    before: Turn
    after: Turn

    @property
    def kept(self) -> bool:
        return self.after.cached_tokens >= KEPT * self.before.prompt_tokens

    @property
    def prefilled(self) -> int:
        return self.after.prompt_tokens - self.after.cached_tokens

    @property
    def new(self) -> int:
        """Tokens of its prompt that the turn before did not have."""
        return self.after.prompt_tokens - self.before.prompt_tokens - self.before.completion_tokens


async def busy(client: httpx.AsyncClient, session: Session, options: argparse.Namespace, over: asyncio.Event) -> None:
    """One client of the load: turn after turn with short pauses; a new conversation when one gets long."""
    while not over.is_set():
        await session.ask(client, QUESTION_WORDS, options.max_tokens)
        if sum(len(message["content"]) for message in session.messages) > 40 * options.history:
            session.messages = []
        await asyncio.sleep(session.chance.uniform(0, options.pause_s))


async def ask_all(client: httpx.AsyncClient, sessions: list[Session], words: int, options: argparse.Namespace) -> None:
    """Every session once, a few at a time."""
    places = asyncio.Semaphore(options.abreast)

    async def one(session: Session) -> None:
        async with places:
            await session.ask(client, words, options.max_tokens)

    await asyncio.gather(*(one(session) for session in sessions))


async def targets(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    status = (await client.get("/status")).raise_for_status().json()
    return {target["replica_id"]: target["handoff"] for target in status["targets"]}


async def run(cluster: LocalCluster, url: str, options: argparse.Namespace) -> dict[str, Any]:
    sessions = [Session(f"idle-{n}", random.Random(n)) for n in range(options.sessions)]
    load = [Session(f"busy-{n}", random.Random(1000 + n)) for n in range(options.clients)]
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await ask_all(client, sessions, options.history, options)
        running = [asyncio.create_task(busy(client, each, options, over)) for each in load]
        await asyncio.sleep(options.lead_s)
        first = set(await targets(client))
        began = time.time()
        await asyncio.to_thread(cluster.scale, "Target", options.replicas - 1)
        down_s = time.time() - began
        after = await targets(client)
        await ask_all(client, sessions, QUESTION_WORDS, options)
        began = time.time()
        await asyncio.to_thread(cluster.scale, "Target", options.replicas)
        up_s = time.time() - began
        await ask_all(client, sessions, QUESTION_WORDS, options)
        over.set()
        await asyncio.gather(*running)
    gone = first - after.keys()
    return {
        "scale_down_s": down_s,
        "scale_up_s": up_s,
        "requests": sum(len(each.turns) + len(each.failures) for each in (*sessions, *load)),
        "failures": [failure for each in (*sessions, *load) for failure in each.failures],
        "idle": moved(sessions, gone),
        "busy": moved(load, gone),
        "stayed": unmoved(sessions, gone),
        "received": {name: sum(each[name] for each in after.values()) for name in ("received", "bytes_received")},
        "missing": sum(each["missing"] for each in after.values()),
        "log": log_lines(),
    }


def moved(sessions: list[Session], gone: set[str]) -> dict[str, Any]:
    """Of the sessions that were at a replica that left: their first turn after it."""
    pairs = [
        Pair(before, after)
        for session in sessions
        for before, after in zip(session.turns, session.turns[1:], strict=False)
        if before.replica in gone and after.replica not in gone and after.prompt_tokens > before.prompt_tokens
    ]
    return {
        "sessions": len(pairs),
        "kept": sum(pair.kept for pair in pairs),
        "others": dict(Counter(pair.after.route for pair in pairs if not pair.kept)),
        "prefilled": mean(pair.prefilled for pair in pairs),
        "new": mean(pair.new for pair in pairs),
        "prompt": mean(pair.after.prompt_tokens for pair in pairs),
        "median_s": statistics.median([pair.after.seconds for pair in pairs] or [0.0]),
        "lost": [asdict(pair.after) for pair in pairs if not pair.kept],
    }


def unmoved(sessions: list[Session], gone: set[str]) -> dict[str, Any]:
    """Of the other sessions: every later turn."""
    pairs = [
        Pair(before, after)
        for session in sessions
        for before, after in zip(session.turns, session.turns[1:], strict=False)
        if before.replica not in gone
    ]
    elsewhere = Counter(pair.after.route for pair in pairs if not pair.kept)
    return {"turns": len(pairs), "kept": sum(pair.kept for pair in pairs), "others": dict(elsewhere)}


def mean(values: Any) -> float:
    found = list(values)
    return statistics.mean(found) if found else 0.0


def log_lines() -> list[str]:
    """What replicas that left said about it."""
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    texts = (file.read_text(errors="replace") for file in folder.glob("replica_*.log"))
    return [found for text in texts for found in re.findall(r"leaving: .*|hand-off: .*", text)]


def shares(counts: dict[str, Any], what: str) -> str:
    others = ", ".join(f"{route} {count}" for route, count in counts["others"].items())
    return f"{counts['kept']} of {counts[what]}" + (f"; routes of the others: {others}" if others else "")


def table(results: dict[str, Any]) -> str:
    idle, load = results["idle"], results["busy"]
    rows = [
        ("requests that failed", f"{len(results['failures'])} of {results['requests']}"),
        ("sessions of the replica that left that kept their KV", shares(idle, "sessions")),
        ("the same, of those under way meanwhile", shares(load, "sessions")),
        (
            "tokens of their follow-up: prompt, new, prefilled",
            f"{idle['prompt']:.0f}, {idle['new']:.1f}, {idle['prefilled']:.1f}",
        ),
        ("turns of other sessions that kept their KV", shares(results["stayed"], "turns")),
        (
            "received by the others",
            f"{results['received']['received']} sessions, {results['received']['bytes_received'] / 1e6:.0f} MB",
        ),
        ("scale down, up", f"{results['scale_down_s']:.1f} s, {results['scale_up_s']:.1f} s"),
        *(("log", line) for line in results["log"]),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument(
        "--history", type=int, default=250, help="words of the first question; 250 are about 300 tokens"
    )
    parser.add_argument("--clients", type=int, default=4, help="that ask all the time")
    parser.add_argument("--abreast", type=int, default=3, help="sessions that ask at the same time")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--pause-s", type=float, default=1.0)
    parser.add_argument("--lead-s", type=float, default=5.0, help="of load before the first change")
    parser.add_argument("--handoff-timeout-s", type=float, default=10.0)
    parser.add_argument("--load-bound", type=float, default=1.5, help="sessions.load_bound")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args()
    settings = parse_settings(
        {
            "model": "smollm2-135m",
            "target": {"num_replicas": options.replicas, "num_cpus": 0.1, "engine": {"kv_tokens": 24_576}},
            "draft": {"num_replicas": 0},
            "sessions": {"handoff_timeout_s": options.handoff_timeout_s, "load_bound": options.load_bound},
        }
    )
    http_port, grpc_port = free_ports(2)
    cluster = LocalCluster(default_deployment(settings, http_port=http_port, grpc_port=grpc_port))
    with cluster as endpoints:
        results = asyncio.run(run(cluster, endpoints.http, options))
    print(table(results))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **results}) + "\n"
        )


if __name__ == "__main__":
    main()
