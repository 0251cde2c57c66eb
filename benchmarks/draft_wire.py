"""A draft replica in a process of its own and an engine in this one: bytes, waits and tokens, with and without ahead.

    python benchmarks/draft_wire.py [--target-ms 20] [--draft-ms 3] [--noise 0.02] [--streams 1] [--delay-ms 0]

Everything between the two is real: server, socket, streams, threads. The models are tiny and random, and a pass takes
as long as it is told to, so that the figures are the protocol's and not this machine's. `--noise` is what separates
the draft's weights from the target's, as a share of their spread: 0 is right always. `--delay-ms` holds every frame
back for so long, each way.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import multiprocessing as mp
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from sys import path as import_path

import torch

import_path.insert(0, str(Path(__file__).parent.parent))

from paceline.config import SpeculationSettings
from paceline.engine.attention import Window
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.loop import DrafterLoop
from paceline.engine.runner import ModelRunner
from paceline.rpc.draft_client import DraftPool
from paceline.rpc.draft_server import DraftService, start_draft_server
from paceline.speculation.controller import FixedDepth
from paceline.speculation.frames import Candidates, DraftFrame, Hello
from paceline.speculation.links import DraftLink
from paceline.speculation.remote import RemoteProposer
from paceline.speculation.speculator import Speculator
from tests import tiny

FINGERPRINT = "benchmark"
MODEL = tiny.tiny_llama(num_hidden_layers=1)


class Paced(ModelRunner):
    """Every pass takes a given time."""

    seconds = 0.0

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        due = time.perf_counter() + self.seconds
        logits = super().run(windows)
        time.sleep(max(0.0, due - time.perf_counter()))
        return logits


def paced(seconds: float, noise: float = 0.0) -> Paced:
    model = copy.deepcopy(MODEL)
    torch.manual_seed(5)
    with torch.no_grad():
        for weights in model.parameters():
            weights += noise * weights.std() * torch.randn_like(weights)
    runner = Paced(tiny.ours(model).model)
    runner.seconds = seconds
    return runner


def serve(address: Connection, seconds: float, noise: float) -> None:
    """A drafter until its process ends."""

    async def main() -> None:
        runner = paced(seconds, noise)
        drafter = Drafter(runner, tiny.kv_for(runner, 65536), max_batched_tokens=256, max_model_len=512)
        service = DraftService(DrafterLoop(drafter), Hello("draft", "tiny", FINGERPRINT))
        _, where = await start_draft_server(service, "127.0.0.1")
        address.send(where)
        await asyncio.Event().wait()

    asyncio.run(main())


class Far(DraftLink):
    """A link whose frames arrive later."""

    def __init__(self, near: DraftLink, events: asyncio.AbstractEventLoop, delay_s: float) -> None:
        self.near, self.replica_id = near, near.replica_id
        self._events, self._delay_s = events, delay_s

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self.near.bytes_sent

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        return self.near.bytes_received

    def send(self, frame: DraftFrame) -> None:
        self._events.call_soon_threadsafe(self._events.call_later, self._delay_s, self.near.send, frame)


class FarProposer(RemoteProposer):
    """One whose drafters are far away, in both directions."""

    def __init__(self, delay_s: float, ahead: int) -> None:
        super().__init__(1.0, ahead=ahead)
        self._delay_s = delay_s
        self.far: dict[DraftLink, Far] = {}

    def add_link(self, link: DraftLink) -> None:
        far = self.far[link] = Far(link, asyncio.get_running_loop(), self._delay_s)
        super().add_link(far)

    def remove_link(self, link: DraftLink) -> None:
        super().remove_link(self.far.pop(link))

    def receive(self, link: DraftLink, replies: Sequence[Candidates]) -> None:  # type: ignore[override]
        if link in self.far:
            asyncio.get_running_loop().call_later(self._delay_s, super().receive, self.far[link], replies)


class Streams:
    """A pool of draft streams in an event loop of its own."""

    def __init__(self, proposer: RemoteProposer, address: str) -> None:
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, daemon=True).start()

        async def connect() -> DraftPool:
            pool = DraftPool(proposer, Hello("target", "target", FINGERPRINT))
            pool.set_members({"d": address})
            return pool

        self._pool = asyncio.run_coroutine_threadsafe(connect(), self._events).result()
        while not proposer.link_ids:
            time.sleep(0.01)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._pool.close(), self._events).result()
        self._events.call_soon_threadsafe(self._events.stop)


def measure(options: argparse.Namespace, address: str, depth: int, ahead: int) -> str:
    """One row of the table; depth 0 is plain decoding."""
    proposer = FarProposer(options.delay_ms / 1e3, ahead) if options.delay_ms else RemoteProposer(1.0, ahead=ahead)
    streams = Streams(proposer, address)
    runner = paced(options.target_ms / 1e3)
    limits = EngineLimits(512, 64, 1024, 64)
    speculator = Speculator(FixedDepth(depth), max_depth=depth, draft=proposer) if depth else None
    engine = Engine(
        runner,
        tiny.kv_for(runner, 65536),
        limits,
        speculator=speculator,
        speculation=SpeculationSettings(enabled=depth > 0),
    )
    for seed in range(options.streams):
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "max_tokens": options.tokens}
        engine.add(tiny.request(tiny.prompt(20, seed=seed), str(seed), **sampling))
    began, steps = time.perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    seconds, total = time.perf_counter() - began, options.streams * options.tokens
    streams.close()
    stats = proposer.stats
    return (
        f"| {depth} | {ahead if depth else ''} | {total / seconds:.0f} | {1e3 * stats.waited_s / steps:.1f} |"
        f" {1e3 * stats.longest_wait_s:.0f} | {stats.waits} of {steps} | {stats.tokens.confirmed} of"
        f" {stats.tokens.heard} | {stats.bytes_sent / total:.1f} + {stats.bytes_received / total:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-ms", type=float, default=20.0)
    parser.add_argument("--draft-ms", type=float, default=3.0)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()
    ours, theirs = mp.Pipe()
    arguments = (theirs, options.draft_ms / 1e3, options.noise)
    drafter = mp.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    drafter.start()
    address = ours.recv()
    print("| depth | ahead | tok/s | ms waited a step | longest | waited | confirmed of heard | B/token up + down |")
    print("|---|---|---|---|---|---|---|---|")
    for depth, ahead in ((0, 0), (options.depth, 0), (options.depth, options.depth + 1), (options.depth, 24)):
        print(measure(options, address, depth, ahead), flush=True)
    drafter.kill()


if __name__ == "__main__":
    main()
