"""What a replica makes of its other ranks, without Ray: scripted ones stand in for the actors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from paceline.config import DraftSettings, TargetSettings
from paceline.engine.tp.group import Meeting
from paceline.errors import ConfigError, EngineError, ModelError, PacelineError, Unavailable
from paceline.serving import ranks as ranks_module
from paceline.serving.ranks import Others, Place, Ranks, loading, rank_engine, ranks_status, see, visible

PATIENCE_S = 10.0
MEETING = Meeting("127.0.0.1", 1, 2, "00", 3, 30.0)
BEFORE = [Place(rank, 100 + rank, "10.0.0.1", (0, 1, 2, 3)) for rank in range(3)]
BOUND = [Place(rank, 100 + rank, "10.0.0.1", (rank,)) for rank in range(3)]


class Leader:
    """As much of rank 0's as its view of the others looks at."""

    def __init__(self) -> None:
        self.meeting, self.failure, self.closed = MEETING, None, False

    def close(self) -> None:
        self.closed = True


class Scripted(Others):
    """Two ranks that do what the test says."""

    def __init__(self) -> None:
        self.loops: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        self.met: list[tuple[str, Meeting]] = []
        self.killed = asyncio.Event()

    async def fetch(self, model: str) -> None:
        raise NotImplementedError

    async def places(self) -> Sequence[Place]:
        return BOUND[1:]

    async def see(self, gpus: Sequence[Sequence[str]]) -> None:
        raise NotImplementedError

    def run(self, model: str, meeting: Meeting) -> Sequence[asyncio.Future[None]]:
        self.met.append((model, meeting))
        return self.loops

    def kill(self) -> None:
        self.killed.set()

    def end(self, rank: int, error: BaseException | None = None) -> None:
        """That rank's loop ends, or fails."""
        loop = self.loops[rank - 1]
        loop.set_exception(error) if error is not None else loop.set_result(None)


class Wrapped(Exception):
    """As Ray wraps what an actor's method raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a traceback, then {cause}")
        self.cause = cause


class World:
    def __init__(self) -> None:
        self.leader: Any = Leader()
        self.others = Scripted()
        self.ranks = Ranks(self.leader, self.others, BEFORE, "m")
        self.told: asyncio.Queue[PacelineError] = asyncio.Queue()

    async def watch(self) -> None:
        await self.ranks.watch(self.told.put_nowait)

    async def heard(self) -> PacelineError:
        return await asyncio.wait_for(self.told.get(), PATIENCE_S)


@pytest_asyncio.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(ranks_module, "POLL_S", 0.001)
    monkeypatch.setattr(ranks_module, "STOP_TIMEOUT_S", 0.01)
    monkeypatch.setattr(ranks_module, "REASON_WAIT_S", 0.05)
    monkeypatch.setattr(Place, "here", staticmethod(BOUND.__getitem__))
    made = World()
    yield made
    await made.ranks.stop()


async def never() -> None:
    await asyncio.Event().wait()


async def test_the_others_are_told_where_to_meet(world: World) -> None:
    assert world.others.met == [("m", MEETING)]


async def test_while_all_run_there_is_no_failure(world: World) -> None:
    assert world.ranks.failure() is None
    world.ranks.check_health()


async def test_the_process_of_a_lost_rank_is_named(world: World) -> None:
    world.others.end(2, RuntimeError("the actor died"))
    assert world.ranks.failure() == "rank 2 (process 102 on 10.0.0.1) was lost"


async def test_what_a_rank_failed_for_is_told_without_ray_s_wrapping(world: World) -> None:
    world.others.end(1, Wrapped(EngineError("rank 0 did not answer")))
    assert world.ranks.failure() == "rank 1 (process 101 on 10.0.0.1) failed: rank 0 did not answer"


async def test_a_rank_that_ends_by_itself_is_a_failure(world: World) -> None:
    world.others.end(1)
    assert world.ranks.failure() == "rank 1 (process 101 on 10.0.0.1) ended"


async def test_what_rank_0_notices_is_a_failure(world: World) -> None:
    world.leader.failure = "rank 1 is gone"
    assert world.ranks.failure() == "rank 1 is gone"


async def test_the_first_failure_stays_the_reason(world: World) -> None:
    world.others.end(1)
    first = world.ranks.failure()
    world.leader.failure = "rank 2 is gone"
    assert world.ranks.failure() == first


async def test_a_lost_rank_fails_the_health_check(world: World) -> None:
    world.others.end(1)
    with pytest.raises(RuntimeError, match=r"rank 1 .* ended"):
        world.ranks.check_health()


@pytest.mark.parametrize("seen_by", ["actor", "leader"])
async def test_whoever_watches_hears_of_a_lost_rank_in_words_for_clients(world: World, seen_by: str) -> None:
    await world.watch()
    if seen_by == "actor":
        world.others.end(1, RuntimeError("the actor died"))
    else:
        world.leader.failure = "rank 1 is gone"
    error = await world.heard()
    assert isinstance(error, Unavailable)
    assert "rank" not in error.message


async def test_when_one_is_lost_the_others_are_ended(world: World) -> None:
    await world.watch()
    world.others.end(1)
    await asyncio.wait_for(world.others.killed.wait(), PATIENCE_S)


async def test_once_loaded_their_own_cores_are_known(world: World) -> None:
    await world.watch()
    settings = TargetSettings.model_validate({"engine": {"tensor_parallel_size": 3}})
    told = ranks_status(settings, world.ranks)
    assert told["tensor_parallel_size"] == 3
    assert told["ranks"][1] == {"rank": 1, "pid": 101, "node": "10.0.0.1", "cores": [1], "gpus": []}


async def test_the_only_rank_has_no_others_to_tell_of() -> None:
    assert ranks_status(TargetSettings(), None) == {"tensor_parallel_size": 1}


async def test_loading_gives_what_was_loaded(world: World) -> None:
    assert await world.ranks.loading(asyncio.sleep(0, "model")) == "model"


async def test_the_only_rank_loads_alone() -> None:
    assert await loading(None, asyncio.sleep(0, "model")) == "model"


async def test_a_rank_that_fails_to_load_ends_the_wait_with_its_own_error(world: World) -> None:
    waiting = asyncio.create_task(world.ranks.loading(never()))
    await asyncio.sleep(0)
    world.others.end(2, Wrapped(ConfigError("engine.cores_per_rank: too many", param="engine.cores_per_rank")))
    with pytest.raises(ConfigError, match=r"rank 2: engine\.cores_per_rank: too many"):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_a_rank_that_dies_while_it_loads_ends_the_wait(world: World) -> None:
    waiting = asyncio.create_task(world.ranks.loading(never()))
    await asyncio.sleep(0)
    world.others.end(1, RuntimeError("the actor died"))
    with pytest.raises(EngineError, match=r"rank 1 \(process 101 on 10\.0\.0\.1\) was lost"):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_what_rank_0_fails_for_itself_is_raised(world: World) -> None:
    async def load() -> None:
        raise ModelError("no such weights")

    with pytest.raises(ModelError, match="no such weights"):
        await world.ranks.loading(load())


async def test_a_rank_s_reason_is_better_than_that_it_is_gone(world: World) -> None:
    async def load() -> None:
        asyncio.get_running_loop().call_soon(world.others.end, 1, Wrapped(ModelError("no such weights")))
        raise EngineError("rank 1 is gone")

    with pytest.raises(ModelError, match="rank 1: no such weights"):
        await world.ranks.loading(load())


async def test_that_it_is_gone_is_better_than_nothing(world: World) -> None:
    async def load() -> None:
        raise EngineError("rank 1 is gone")

    with pytest.raises(EngineError, match="rank 1 is gone"):
        await world.ranks.loading(load())


async def test_stopping_lets_the_others_end_before_they_are_killed(world: World) -> None:
    await world.watch()
    await world.ranks.stop()
    assert (world.leader.closed, world.others.killed.is_set()) == (True, True)


async def test_ranks_that_were_stopped_are_not_lost(world: World) -> None:
    await world.watch()
    await world.ranks.stop()
    for rank in (1, 2):
        world.others.end(rank)
    assert (world.ranks.failure(), world.told.empty()) == (None, True)


def test_ranks_without_gpus_of_their_own_are_on_the_cpu() -> None:
    settings = TargetSettings.model_validate({"engine": {"tensor_parallel_size": 2}})
    assert rank_engine(settings).device == "cpu"


@pytest.mark.parametrize("values", [{"num_gpus": 1, "engine": {"tensor_parallel_size": 2}}, {}])
def test_other_replicas_are_where_their_settings_say(values: dict[str, Any]) -> None:
    settings = DraftSettings.model_validate(values)
    assert rank_engine(settings) == settings.engine


def test_a_rank_sees_the_gpus_of_its_host_s_ranks_in_their_order() -> None:
    nodes = ["a", "b", "a", "b"]
    places = [Place(rank, 1, node, (), (str(3 - rank),)) for rank, node in enumerate(nodes)]
    assert [visible(places, rank) for rank in range(4)] == [["3", "1"], ["2", "0"], ["3", "1"], ["2", "0"]]


def test_what_a_process_sees_is_left_alone_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    see([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    see(["2", "7"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,7"
