"""Whatever happens around a request, it gets the tokens it gets alone, and every account closes.

A schedule is a list of events between steps: requests arrive (with shared prefixes, in sessions with follow-up
turns, with priorities, some under a streaming window), some are cancelled, idle KV is evicted, sessions are dropped.
KV is so small that running sequences are preempted. Evicted sessions may go to tiers, whose threads lag behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from unittest.mock import patch

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from paceline.engine import engine as engine_module
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers
from paceline.speculation.local import LocalProposer
from paceline.types import Request
from tests import tiny
from tests.engine.by_hand import Tiers

MODEL = tiny.tiny_llama(num_hidden_layers=1, hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
OTHER = tiny.tiny_llama(seed=7, num_hidden_layers=1, hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
DRAFTS: dict[str, PreTrainedModel | None] = {"alone": None, "agreeing": MODEL, "disagreeing": OTHER}
CAPACITY = 190
RESTORE_TIMEOUT = 40
"""In looks at the clock."""
PREFIXES = [tiny.prompt(length, seed=length) for length in (20, 70, 90)]
TAILS = [tiny.prompt(length, seed=1000 + length) for length in (1, 7, 30)]


class Ticks:
    """A clock that goes on by one whenever somebody looks."""

    def __init__(self) -> None:
        self._now = 0

    def __call__(self) -> float:
        self._now += 1
        return self._now


@dataclass(frozen=True)
class Arrival:
    """A prompt made of a shared prefix and a tail; in a session it continues that session's last turn, if it may."""

    prefix: int
    tail: int
    session: int | None
    priority: int
    max_tokens: int
    sampled: bool
    speculate: bool
    ctx_size: int | None


@dataclass(frozen=True)
class Cancel:
    """The request that arrived as number `which` modulo the number so far."""

    which: int


@dataclass(frozen=True)
class Evict:
    tokens: int


@dataclass(frozen=True)
class Drop:
    session: int


arrivals = st.builds(
    Arrival,
    prefix=st.integers(0, 2),
    tail=st.integers(0, 2),
    session=st.none() | st.integers(0, 1),
    priority=st.integers(-1, 1),
    max_tokens=st.integers(4, 48),
    sampled=st.booleans(),
    speculate=st.booleans(),
    ctx_size=st.sampled_from((None, None, 48)),
)
events = (
    arrivals
    | arrivals
    | arrivals
    | arrivals
    | st.builds(Cancel, st.integers(0, 20))
    | st.builds(Evict, st.integers(1, 200))
)
schedules = st.lists(
    st.tuples(st.integers(0, 4), events | st.builds(Drop, st.integers(0, 1))), min_size=12, max_size=24
)


@dataclass
class World:
    """An engine under a schedule, and what each request has been given.

    Its tiers do `jobs` jobs of each thread after a step, and only then.
    """

    engine: Engine
    drafter: Drafter | None
    tiers: Tiers | None = None
    jobs: int = 0
    given: dict[str, list[int]] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    last_turn: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def act(self, event: Arrival | Cancel | Evict | Drop) -> None:
        if isinstance(event, Arrival):
            self._arrive(event)
        elif isinstance(event, Cancel) and self.requests:
            name = str(event.which % len(self.requests))
            if self.engine.abort(name) is not None:
                self.done.add(name)
                self.cancelled.add(name)
        elif isinstance(event, Evict):
            self.engine.kv.evict(event.tokens)
        elif isinstance(event, Drop):
            self.engine.drop_session(f"s{event.session}")
        self.engine.check()

    def step(self) -> None:
        for name, delta in self.engine.step().items():
            self.given[name] += delta.token_ids
            if delta.finished:
                self.done.add(name)
                self._remember(name)
        if self.tiers is not None:
            self.tiers.reader.work(self.jobs)
            self.tiers.writer.work(self.jobs)
        self.engine.check()
        if self.drafter is not None:
            self.drafter.kv.check()

    def _arrive(self, event: Arrival) -> None:
        before = self.last_turn.get(event.session, ()) if event.session is not None else ()
        prompt = (*(before or PREFIXES[event.prefix]), *TAILS[event.tail])
        if len(prompt) + event.max_tokens > CAPACITY and event.ctx_size is None:
            return
        name = str(len(self.requests))
        params = {"temperature": 0.8, "top_k": 20, "seed": 3} if event.sampled else {}
        session = None if event.session is None else f"s{event.session}"
        request = tiny.request(prompt, name, session, max_tokens=event.max_tokens, ctx_size=event.ctx_size, **params)
        self.requests[name] = replace(request, priority=event.priority, speculate=event.speculate)
        self.given[name] = []
        self.engine.add(self.requests[name])

    def _remember(self, name: str) -> None:
        request = self.requests[name]
        if request.session_id is not None:
            self.last_turn[int(request.session_id[1:])] = (*request.token_ids, *self.given[name])


def alone(request: Request, quantized: bool) -> list[int]:
    params = request.params
    return list(_alone(request.token_ids, params.max_tokens or 0, params.greedy, params.ctx_size, quantized))


@cache
def _alone(
    tokens: tuple[int, ...], max_tokens: int, greedy: bool, ctx_size: int | None, quantized: bool
) -> tuple[int, ...]:
    params = {} if greedy else {"temperature": 0.8, "top_k": 20, "seed": 3}
    request = tiny.request(tokens, max_tokens=max_tokens, ctx_size=ctx_size, **params)
    return tuple(tiny.run(_engine(128, None, quantized=quantized), request)["r"])


def _engine(
    budget: int,
    drafter: Drafter | None,
    capacity: int = CAPACITY,
    share: int | None = None,
    quantized: bool = False,
    depth: int | Literal["auto"] = 4,
    lookup: int = 0,
    tiers: KVTiers | None = None,
) -> Engine:
    return tiny.engine_for(
        MODEL,
        capacity=capacity,
        max_num_seqs=4,
        max_batched_tokens=budget,
        max_prefill_while_decoding=share,
        depth=depth,
        lookup=lookup,
        proposer=LocalProposer(drafter) if drafter is not None else None,
        quantized=quantized,
        tiers=tiers,
        restore_timeout_s=RESTORE_TIMEOUT,
        clock=Ticks(),
    )


@pytest.mark.parametrize(("draft", "quantized"), [*((draft, False) for draft in DRAFTS), ("disagreeing", True)])
@seed(20240607)
@settings(max_examples=24)
@given(
    schedules,
    st.sampled_from([2, 5, 24, 64]),
    st.sampled_from([None, 1, 8]),
    st.sampled_from([1, 4, 9, "auto"]),
    st.sampled_from([0, 2, 8]),
)
def test_no_schedule_changes_a_token(
    draft: str,
    quantized: bool,
    schedule: list[tuple[int, Arrival | Cancel | Evict | Drop]],
    budget: int,
    share: int | None,
    depth: int | Literal["auto"],
    lookup: int,
) -> None:
    model = DRAFTS[draft]
    drafter = tiny.drafter_for(model, capacity=220) if model is not None else None
    made = _engine(budget, drafter, share=share, quantized=quantized, depth=depth, lookup=lookup)
    runs_as_alone(World(made, drafter), schedule, quantized)


@pytest.mark.parametrize("quantized", [False, True])
@seed(20240607)
@settings(max_examples=30)
@given(
    schedules,
    st.sampled_from([5, 64]),
    st.sampled_from([0, 100, 10_000]),
    st.booleans(),
    st.sampled_from([0, 1, 100]),
)
def test_no_schedule_changes_a_token_with_tiers(
    quantized: bool,
    schedule: list[tuple[int, Arrival | Cancel | Evict | Drop]],
    budget: int,
    host_tokens: int,
    disk: bool,
    jobs: int,
) -> None:
    geometry = tiny.geometry_of(tiny.ours(MODEL), quantized=quantized)
    with TemporaryDirectory() as folder, patch.object(engine_module, "PAUSE_S", 0.0):
        host_bytes = host_tokens * geometry.bytes_per_token
        tiers = Tiers(Slabs(geometry, CAPACITY), host_bytes, Path(folder) if disk else None)
        world = World(_engine(budget, None, quantized=quantized, tiers=tiers), None, tiers, jobs)
        runs_as_alone(world, schedule, quantized)


def runs_as_alone(world: World, schedule: list[tuple[int, Arrival | Cancel | Evict | Drop]], quantized: bool) -> None:
    for steps, event in schedule:
        world.act(event)
        for _ in range(steps):
            world.step()
    steps_left = 5000
    while world.engine.has_work and steps_left:
        world.step()
        steps_left -= 1
    assert world.done == world.requests.keys()
    for name, request in world.requests.items():
        expected = alone(request, quantized)
        assert world.given[name] == (expected[: len(world.given[name])] if name in world.cancelled else expected)
    engine = world.engine
    assert (engine.num_running, engine.num_waiting, engine.kv.usage().in_use) == (0, 0, 0)
    if (drafter := world.drafter) is not None:
        assert (drafter.num_sequences, drafter.kv.usage().in_use) == (0, 0)
