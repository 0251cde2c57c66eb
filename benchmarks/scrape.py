"""How long a scrape of /metrics takes while sessions are held and streams run, and what telemetry costs a step.

    python benchmarks/scrape.py [--sessions 1000] [--scrapes 50] [--streams 4]        # an engine behind the application
    python benchmarks/scrape.py --served [--targets 2]                                # a cluster, over HTTP

A tiny model holds the sessions; streams of the same model go on meanwhile, so that a scrape meets an engine at work.
Without `--served` the application is called in this process, and its parts are timed alone: the status of the engine,
and the text, for one replica and for eight. Fails if the 99th percentile is not below `--within-ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paceline.api import ClusterStatus, Gateway, SessionInfo, Targets, create_app
from paceline.api.metrics import prometheus_text
from paceline.config import EngineSettings, default_deployment, parse_settings
from paceline.engine.engine import Engine
from paceline.engine.load import load_model
from paceline.engine.loop import EngineLoop
from paceline.engine.sequence import Sequence as EngineSequence
from paceline.engine.status import status_of
from paceline.engine.telemetry import EngineTelemetry, Phase
from paceline.errors import PacelineError
from paceline.models import load_tokenizer, resolve
from paceline.ports import free_ports
from paceline.serving.cluster import LocalCluster
from paceline.sessions.handoff import Outcome
from paceline.types import Accepted, Delta, Failure, Frame, Request, SamplingParams

VOCAB, MAX_LEN = 512, 1024
PROMPT_WORDS = 12
KV_TOKENS = 160
"""A session, with room for the streams; a word may be several tokens."""
AT_ONCE = 16
TIMED_S = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--scrapes", type=int, default=50)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--model", default="", help="another than the tiny one: a name, a folder")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--targets", type=int, default=1, help="with --served")
    parser.add_argument("--within-ms", type=float, default=50.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paceline-scrape-") as folder:
        if not args.model:
            save_model(Path(folder))
        model = args.model or folder
        found = asyncio.run(served(args, model) if args.served else in_process(args, model))
    times = sorted(found)
    median, p99 = statistics.median(times), times[min(len(times) - 1, int(0.99 * len(times)))]
    print(f"{len(times)} scrapes: median {median:.1f} ms, p99 {p99:.1f} ms, {times[0]:.1f} to {times[-1]:.1f} ms")
    return 0 if p99 < args.within_ms else 1


def save_model(folder: Path) -> None:
    """Weights by chance, and a tokenizer of their vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)


class OneEngine(Targets):
    """An engine in its thread, as a target replica has it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loop = EngineLoop(engine)

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        request = dataclasses.replace(request, params=request.params.with_seed())
        frames: asyncio.Queue[Delta | Failure] = asyncio.Queue()
        events = asyncio.get_running_loop()
        running = True
        try:
            sink = self.loop.submit(request, lambda frame: events.call_soon_threadsafe(frames.put_nowait, frame))
            await asyncio.wrap_future(sink)
            yield Accepted("target-1", request.params.seed or 0, len(request.token_ids))
            while running:
                frame = await frames.get()
                running = isinstance(frame, Delta) and not frame.finished
                yield frame
        except PacelineError as error:
            yield Failure.of(error)
        finally:
            if running:
                self.loop.abort(request.request_id)

    async def sessions(self) -> list[SessionInfo]:
        return []

    async def close_session(self, session_id: str) -> bool:  # noqa: ARG002
        return False

    async def hand_off(
        self,
        replica: str,  # noqa: ARG002
        sessions: Sequence[str] | None,  # noqa: ARG002
        count: int,  # noqa: ARG002
        to: str | None = None,  # noqa: ARG002
    ) -> Outcome | None:
        return None

    async def abort(self, request_id: str) -> bool:
        return await asyncio.wrap_future(self.loop.end(request_id))

    async def status(self) -> ClusterStatus:
        return ClusterStatus(({"replica_id": "target-1", **status_of(self.engine)},))


async def in_process(args: argparse.Namespace, model: str) -> list[float]:
    path = resolve(model).path
    loaded = load_model(path, EngineSettings(kv_tokens=args.sessions * KV_TOKENS, threads=1))
    targets = OneEngine(loaded.engine())
    tokenizer = load_tokenizer(path)
    app = create_app(Gateway(targets, tokenizer, "tiny", MAX_LEN, 600.0))
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
            times = await scrapes(client, args)
            told = await targets.status()
    finally:
        targets.loop.stop()
    print(f"status {timed(lambda: status_of(targets.engine)):.0f} µs")
    for replicas in (1, 8):
        cluster = ClusterStatus(told.targets * replicas)
        text = prometheus_text("tiny", cluster)
        took = timed(lambda cluster=cluster: prometheus_text("tiny", cluster))  # type: ignore[misc]
        lines = text.count(b"\n")
        print(f"text of {replicas} replicas {took / 1000:.2f} ms: {lines} lines, {took / lines:.2f} µs a line")
    for batch in (1, 8, 64):
        print(f"telemetry of a step with {batch} sequences {timed(lambda batch=batch: a_step(batch)):.1f} µs")  # type: ignore[misc]
    return times


async def served(args: argparse.Namespace, model: str) -> list[float]:
    with cluster(model, args) as url:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
            return await scrapes(client, args)


@contextmanager
def cluster(model: str, args: argparse.Namespace) -> Iterator[str]:
    config = default_deployment()
    application = config["applications"][0]
    application["args"] |= {
        "model": model,
        "target": {
            "num_replicas": args.targets,
            "num_cpus": 0.25,
            "engine": {"kv_tokens": args.sessions * KV_TOKENS, "threads": 1},
        },
        "draft": {"num_replicas": 0},
    }
    parse_settings(application["args"])
    http, grpc = free_ports(2)
    config["http_options"] = {**config.get("http_options", {}), "port": http}
    config["grpc_options"] = {**config.get("grpc_options", {}), "port": grpc}
    with LocalCluster(config) as endpoints:
        yield endpoints.http


async def scrapes(client: httpx.AsyncClient, args: argparse.Namespace) -> list[float]:
    """Milliseconds of each, with all sessions held and the streams running."""
    await hold(client, args.sessions)
    found = []
    async with streams(client, args.streams):
        for _ in range(args.scrapes):
            began = time.perf_counter()
            text = (await client.get("/metrics")).raise_for_status().text
            found.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(0.02)
    held = sum(value_of(text, "paceline_sessions"))
    running = sum(value_of(text, "vllm:num_requests_running"))
    print(f"{held:.0f} sessions held, {running:.0f} streams, {len(text) / 1024:.0f} KiB")
    if held < args.sessions:
        raise SystemExit(f"only {held:.0f} sessions are held")
    return found


async def hold(client: httpx.AsyncClient, sessions: int) -> None:
    """So many sessions with KV of their own."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        words = " ".join(f"w{3 + (number * 7 + 13 * n) % (VOCAB - 3)}" for n in range(PROMPT_WORDS))
        body = {"prompt": words, "max_tokens": 1, "session_id": f"session-{number}"}
        async with places:
            (await client.post("/v1/completions", json=body)).raise_for_status()

    await asyncio.gather(*(one(number) for number in range(sessions)))


@asynccontextmanager
async def streams(client: httpx.AsyncClient, count: int) -> AsyncIterator[None]:
    """Answers that go on, one after the other."""

    async def go_on(number: int) -> None:
        while True:
            body = {"prompt": f"w{number + 3}", "max_tokens": MAX_LEN - 64, "ignore_eos": True}
            (await client.post("/v1/completions", json=body)).raise_for_status()

    running = [asyncio.create_task(go_on(number)) for number in range(count)]
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*running)


def value_of(text: str, name: str) -> list[float]:
    """Of every series of that name."""
    return [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name}{{")]


def timed(function: Callable[[], Any]) -> float:
    """Microseconds a call, the median of many."""
    found, until = [], time.perf_counter() + TIMED_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        function()
        found.append(1e6 * (time.perf_counter() - began))
    return statistics.median(found)


TELEMETRY = EngineTelemetry()
SEQUENCES = [
    EngineSequence(n, Request(str(n), (1, 2, 3), SamplingParams(max_tokens=9)), None, last_token=1.0) for n in range(64)
]


def a_step(batch: int) -> None:
    """What `Engine.step` has noted, with a window of candidates for every sequence."""
    times = TELEMETRY.step
    times.begin()
    for phase in (Phase.SCHEDULE, *Phase):
        times.lap(phase)
    now = TELEMETRY.clock()
    for sequence in SEQUENCES[:batch]:
        TELEMETRY.verified("remote", 4)
        TELEMETRY.gained(sequence, 3, now)
    times.end()
    TELEMETRY.step_tokens.note(5 * batch)


if __name__ == "__main__":
    sys.exit(main())
