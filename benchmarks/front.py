"""What everything outside the engine costs a frame: detokenizer, replica, router, proxy, socket, client.

    python benchmarks/front.py [--streams 32] [--step-ms 10] [--frames 300] [--rounds 5] [--targets 1]

A whole cluster is started, with an engine that computes nothing: at every step each request gets one token of a real
text. Latency is from the moment before a step's tokens are turned into text to the moment the client has read the
event; both clocks are this machine's. Pass 1 paces the steps, so that streams x 1000 / step-ms frames arrive in a
second; pass 2 lets the engine run as fast as it can, and counts the frames that are read in a second. The client, a
process of its own, shares the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from sys import path as import_path
from types import SimpleNamespace
from typing import Any

import_path.insert(0, str(Path(__file__).parent.parent))

from paceline.config import AppSettings, parse_settings
from paceline.engine.detokenizer import Detokenizer, without_wrapping
from paceline.engine.loop import EngineLoop
from paceline.models import load_tokenizer, resolve
from paceline.ports import free_ports
from paceline.serving.environment import ray_environment
from paceline.serving.target import Target
from paceline.speculation.telemetry import SpeculationTally
from paceline.types import Delta, FinishReason, Metrics, Request

TEXT = "A paceline is a file of riders who take turns at the front, while the others sit in the draft and rest. "


class NoEngine:
    """What `EngineLoop` and `Target` use of an engine, without a model: a token a step for every request.

    `step_s` 0 runs as fast as it can.
    """

    speculator = restores = grammars = None

    def __init__(self, tokenizer: Any, step_s: float) -> None:
        self.step_s = step_s
        self.tally = SpeculationTally()
        self.kv = _NoKV()
        self.limits = SimpleNamespace(max_model_len=8192)
        self.times: dict[str, list[float]] = {}
        self._decoder = without_wrapping(tokenizer)
        self._tokens = tokenizer.encode(TEXT)
        self._running: dict[str, tuple[Request, Detokenizer, list[float]]] = {}
        self._due = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    num_waiting = 0

    def add_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            times = self.times[request.request_id] = []
            self._running[request.request_id] = request, Detokenizer(self._decoder), times

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def step(self) -> dict[str, Delta]:
        self._due = max(self._due + self.step_s, time.monotonic() - self.step_s)
        time.sleep(max(0.0, self._due - time.monotonic()))
        began, deltas = time.monotonic(), {}
        for name, (request, detokenizer, times) in list(self._running.items()):
            token = self._tokens[len(times) % len(self._tokens)]
            times.append(began)
            deltas[name] = self._delta(request, token, detokenizer.push(token), len(times))
        return deltas

    def _delta(self, request: Request, token: int, text: str, count: int) -> Delta:
        if count < (request.params.max_tokens or 1):
            return Delta((token,), text)
        del self._running[request.request_id]
        return Delta((token,), text, FinishReason.LENGTH, Metrics(len(request.token_ids), completion_tokens=count))

    def sessions(self) -> list[Any]:
        return []

    def close(self, timeout_s: float) -> None:
        pass


class _NoKV:
    def usage(self) -> SimpleNamespace:
        return SimpleNamespace(total=1, in_use=0, cached=0, free=1)

    def recent(self, limit: int) -> list[Any]:  # noqa: ARG002
        return []


class FrontTarget(Target):
    """A target replica as it is, but for the engine."""

    step_s = 0.0

    async def _set_up(self, draft_deployment: str | None) -> None:  # noqa: ARG002
        tokenizer = load_tokenizer(resolve(self._settings.model).path)
        self._model = SimpleNamespace(kv_identity="none", fingerprint="none")  # type: ignore[assignment]
        self._loop = EngineLoop(NoEngine(tokenizer, type(self).step_s))  # type: ignore[arg-type]

    async def times(self) -> dict[str, list[float]]:
        """When each frame of each request was begun, since the last call."""
        engine: Any = self._loop.engine
        taken, engine.times = engine.times, {}
        return dict(taken)


class Reader(asyncio.Protocol):
    """One stream: notes when each event was read."""

    def __init__(self, body: bytes, head: bytes) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.at: list[float] = []
        self.name = ""
        self._request = head + body
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self._note(event, now)

    def _note(self, event: bytes, now: float) -> None:
        if b'"content":' in event and b'"role"' not in event:
            self.at.append(now)
        if not self.name and b'"id":"' in event:
            self.name = event.split(b'"id":"')[1].split(b'"')[0].decode()
        if b"[DONE]" in event and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError(f"closed after {len(self.at)} events: {self._rest!r}"))


async def read_streams(port: int, streams: int, frames: int) -> dict[str, list[float]]:
    """When each event of each request was read."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": frames, "n": 1}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Reader(body, head), "127.0.0.1", port) for _ in range(streams)]
    readers = [reader for _, reader in made]
    await asyncio.wait_for(asyncio.gather(*(reader.done for reader in readers)), 300)
    for transport, _ in made:
        transport.close()
    return {reader.name: reader.at for reader in readers}


def client(pipe: Connection, port: int) -> None:
    """Answers (streams, frames) with what `read_streams` gives, until None."""
    import uvloop

    while (asked := pipe.recv()) is not None:
        pipe.send(uvloop.run(read_streams(port, *asked)))


def latencies_ms(sent: dict[str, list[float]], read: dict[str, list[float]], skip: int) -> list[float]:
    """Of every frame but the first `skip` of each stream."""
    found = []
    for name, at in read.items():
        assert len(sent[name]) == len(at), (len(sent[name]), len(at))
        found += [1000 * (there - here) for here, there in zip(sent[name], at, strict=True)][skip:]
    return sorted(found)


def frames_per_s(read: dict[str, list[float]]) -> float:
    every = [at for stream in read.values() for at in stream]
    return len(every) / (max(every) - min(every))


class Cluster:
    """Ray, Serve, one router and targets without an engine, on this machine."""

    def __init__(self, settings: AppSettings, step_s: float) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for name, value in ray_environment({}, Path(self._folder.name)).items():
            os.environ.setdefault(name, value)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
        )
        import ray

        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=128 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        from ray import serve

        from paceline.serving import app

        FrontTarget.step_s = step_s
        app.Target = FrontTarget  # type: ignore[misc]
        self.port = free_ports(1)[0]
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        serve.run(app.build(settings), name="paceline")
        self._target = serve.get_deployment_handle("Target", "paceline")

    def times(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for each in self._target.broadcast("times").results(timeout_s=30):
            found |= each
        return found

    def stop(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()


def measure(arguments: argparse.Namespace, step_ms: float) -> list[dict[str, float]]:
    settings = parse_settings(
        {
            "model": arguments.model,
            "target": {"num_replicas": arguments.targets, "num_cpus": 0.1, "engine": {"max_num_seqs": 256}},
            "draft": {"num_replicas": 0},
        }
    )
    cluster = Cluster(settings, step_ms / 1000)
    rounds = []
    try:
        here, there = mp.get_context("spawn").Pipe()
        process = mp.get_context("spawn").Process(target=client, args=(there, cluster.port), daemon=True)
        process.start()
        for number in range(arguments.rounds + 1):
            here.send((arguments.streams, arguments.frames if number else 30))
            read = here.recv()
            waits = latencies_ms(cluster.times(), read, skip=5)
            if number:  # the first warms up
                rounds.append(
                    {
                        "p50_ms": waits[len(waits) // 2],
                        "p99_ms": waits[int(0.99 * len(waits))],
                        "frames_s": frames_per_s(read),
                    }
                )
        here.send(None)
        process.join()
    finally:
        cluster.stop()
    return rounds


def report(title: str, rounds: list[dict[str, float]]) -> None:
    told = []
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        told.append(f"{name} {statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]")
    print(f"{title}: " + ", ".join(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer turns tokens into text")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--frames", type=int, default=300, help="of each stream, in a round")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the paced pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--only", choices=["paced", "burst"])
    arguments = parser.parse_args()
    if arguments.only != "burst":
        rate = 1000 * arguments.streams / arguments.step_ms
        report(f"{arguments.streams} streams, {rate:.0f} frames/s offered", measure(arguments, arguments.step_ms))
    if arguments.only != "paced":
        report(f"{arguments.streams} streams, as fast as they are taken", measure(arguments, 0.0))


if __name__ == "__main__":
    main()
