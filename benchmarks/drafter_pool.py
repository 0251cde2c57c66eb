"""How many drafters the policy keeps, by how often candidates are accepted: where do they stop to pay?

    python benchmarks/drafter_pool.py [--acceptance 0.05 0.2 …] [--seconds 75] [--streams 2] [--most 2]
    python benchmarks/drafter_pool.py --gpus --streams 8      random weights, 8B on the first GPU, 1B on the last

One target and its drafters, each drafter a process of its own, over gRPC; real models, real steps, the real policy. A
candidate is accepted with the set probability, whatever it is. Each acceptance begins with `--first` drafters and has
so many seconds; the policy looks once a second at what target and drafters measured, and drafters come and go as it
says.

The gain is what drafters saved the target in the ten seconds before each look, for each drafter; its mean leaves out
looks at which there was none. On a CPU all of them share its cores: so it is this machine's crossover.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing as mp
import os
import random
import statistics
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from sys import path as import_path

import torch

import_path.insert(0, str(Path(__file__).parent.parent))

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.presets import resolved
from paceline.autoscaling.snapshot import DraftLoad, Snapshot
from paceline.config import AutoscalingSettings, EngineSettings, SpeculationSettings
from paceline.engine.engine import Engine
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.loop import DrafterLoop
from paceline.engine.verify_cost import measure_verify_cost
from paceline.models import resolve
from paceline.rpc.draft_client import DraftPool
from paceline.rpc.draft_server import DraftService, start_draft_server
from paceline.speculation.cost import VerifyCost
from paceline.speculation.frames import Hello
from paceline.speculation.remote import RemoteProposer
from paceline.types import Request, SamplingParams

PROMPT, ANSWER = 64, 192
GRACE_S = 2.0
ENGINE = EngineSettings(max_num_seqs=16, kv_tokens=16384, threads=1, device="cpu")


ON_GPUS = ("llama-8b", "llama-1b")


def model_of(name: str, **engine: str) -> LoadedModel:
    """A model of ours on the CPU, or a random one of a real shape on a GPU."""
    if name not in ON_GPUS:
        return load_model(resolve(name).path, EngineSettings(**{**ENGINE.model_dump(), **engine}))
    import gpu

    sizes = {"kv_tokens": 32768, "max_num_seqs": 32, "max_model_len": 2048}
    if name == "llama-8b":
        return gpu.loaded(gpu.LLAMA_8B, **sizes)
    return gpu.loaded(gpu.LLAMA_1B, **sizes, weight_dtype="int8")


def last_gpu() -> str:
    """As CUDA_VISIBLE_DEVICES has it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[-1] if visible else str(torch.cuda.device_count() - 1)


def serve(line: Connection, model: str) -> None:
    """A drafter in its process: tells its address, then its load whenever it is asked; ends when told to."""

    async def main() -> None:
        loaded = model_of(model)
        loop = DrafterLoop(loaded.drafter())
        service = DraftService(loop, Hello("draft", model, loaded.fingerprint))
        server, address = await start_draft_server(service, "127.0.0.1")
        line.send(address)
        while await asyncio.to_thread(line.recv) == "load":
            line.send(loop.meter.load("draft").numbers())
        await server.stop(GRACE_S)

    asyncio.run(main())


@dataclass
class Drafter:
    process: BaseProcess
    line: Connection
    address: str | None = None

    @classmethod
    def start(cls, model: str) -> Drafter:
        ours, theirs = mp.Pipe()
        if model in ON_GPUS:
            os.environ["CUDA_VISIBLE_DEVICES"] = last_gpu()  # this process has looked at its own already
        process = mp.get_context("spawn").Process(target=serve, args=(theirs, model), daemon=True)
        process.start()
        return cls(process, ours)

    def look(self) -> DraftLoad | None:
        """None while it starts."""
        if self.address is None:
            if not self.line.poll():
                return None
            self.address = self.line.recv()
        self.line.send("load")
        return DraftLoad.of(str(self.process.pid), self.line.recv())


class Pool:
    """The drafters there are; their streams live in an event loop of their own."""

    def __init__(self, proposer: RemoteProposer, hello: Hello, model: str) -> None:
        self.drafters: list[Drafter] = []
        self._model = model
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, daemon=True).start()

        async def connect() -> DraftPool:
            return DraftPool(proposer, hello)

        self._pool = asyncio.run_coroutine_threadsafe(connect(), self._events).result()

    def size(self, count: int) -> None:
        while len(self.drafters) < count:
            self.drafters.append(Drafter.start(self._model))
        while len(self.drafters) > count:
            leaving = self.drafters.pop()
            if leaving.address is None:
                leaving.process.kill()
            else:
                leaving.line.send("stop")

    def look(self) -> tuple[DraftLoad, ...]:
        seen = tuple(load for each in self.drafters if (load := each.look()) is not None)
        members = {str(each.process.pid): each.address for each in self.drafters if each.address is not None}
        self._events.call_soon_threadsafe(self._pool.set_members, members)
        return seen

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._pool.close(), self._events).result()
        self.size(0)
        self._events.call_soon_threadsafe(self._events.stop)


@dataclass
class Course:
    """What happened at one acceptance."""

    gains: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0

    def row(self, acceptance: float, seconds: float, least: float) -> str:
        gain = statistics.fmean(self.gains) if self.gains else 0.0
        spread = statistics.pstdev(self.gains) if self.gains else 0.0
        path = "→".join(str(size) for size, _ in itertools.groupby(self.sizes))
        pays = "yes" if gain >= least else "no"
        return f"| {acceptance:g} | {gain:+.2f} ± {spread:.2f} | {pays} | {path} | {self.tokens / seconds:.1f} |"


class Streams:
    """So many at once; where one ends another begins."""

    def __init__(self, engine: Engine, vocab: int, count: int) -> None:
        self._engine, self._vocab = engine, vocab
        self._random, self._numbers = random.Random(0), itertools.count()
        for _ in range(count):
            self._begin(self._random.randrange(ANSWER // 2, ANSWER))

    def step(self) -> int:
        tokens = 0
        for delta in self._engine.step().values():
            tokens += len(delta.token_ids)
            if delta.finished:
                self._begin(ANSWER)
        return tokens

    def _begin(self, length: int) -> None:
        number = next(self._numbers)
        ids = tuple(self._random.randrange(100, self._vocab - 100) for _ in range(PROMPT))
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, seed=number)
        self._engine.add(Request(str(number), ids, params))


def measure(
    options: argparse.Namespace, model: LoadedModel, cost: VerifyCost, acceptance: float, goals: AutoscalingSettings
) -> Course:
    proposer, course = RemoteProposer(1.0), Course()
    speculation = SpeculationSettings(synthetic_acceptance=acceptance, prompt_lookup_num_tokens=0)
    engine = model.engine(proposer, speculation, cost.fresh())
    pool = Pool(proposer, Hello("target", options.model, model.fingerprint), options.draft)
    pool.size(options.first)
    while len(pool.look()) < options.first:
        time.sleep(0.1)
    policy, streams = LoadPolicy(goals), Streams(engine, model.runner.vocab_size, options.streams)
    began = due = time.monotonic()
    while (now := time.monotonic()) < began + options.seconds:
        course.tokens += streams.step()
        if now < due:
            continue
        due = now + goals.interval_s
        target, drafts = engine.meter.load("target"), pool.look()
        target = replace(target, seats=engine.meter.seats(float(goals.itl_s)))
        decision = policy.decide(Snapshot(now, 1, len(pool.drafters), (target,), drafts)).draft
        if drafts and target.draft_saved is not None and now > began + 10:
            course.gains.append(target.draft_saved / len(drafts))
        course.sizes.append(len(pool.drafters))
        if decision.changes:
            course.texts.append(f"{acceptance:g}, {now - began:.0f} s: {decision.reason}: {decision.text}")
        pool.size(decision.replicas)
    course.sizes.append(len(pool.drafters))
    pool.close()
    return course


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", default="smollm2-135m-draft")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9])
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--gpus", action="store_true", help="see above")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument(
        "--target-backend", default="auto", help="its linear_backend; fbgemm_fp16 or torch stand for a larger target"
    )
    parser.add_argument("--first", type=int, default=1, help="drafters to begin with")
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument(
        "--utilization", type=float, default=0.25, help="of a drafter; low, so that few streams want more"
    )
    options = parser.parse_args()
    if options.gpus:
        options.model, options.draft = ON_GPUS
    draft = {"max_replicas": options.most, "utilization": options.utilization}
    chosen = {"downscale_delay_s": 30.0, "upscale_delay_s": 2.0, "draft": draft}
    goals = resolved(AutoscalingSettings.model_validate(chosen), cpu=not options.gpus)
    least = float(goals.draft.min_gain)
    model = model_of(options.model, linear_backend=options.target_backend)
    cost, courses = measure_verify_cost(model.runner), list[Course]()
    print(f"A drafter must save {least:g} s of targets a second.\n")
    print("| accepted | saved a second, each drafter | pays | drafters | tokens/s |\n|---|---|---|---|---|")
    for acceptance in options.acceptance:
        courses.append(measure(options, model, cost, acceptance, goals))
        print(courses[-1].row(acceptance, options.seconds, least), flush=True)
    print("\n" + "\n".join(text for course in courses for text in course.texts))


if __name__ == "__main__":
    main()
