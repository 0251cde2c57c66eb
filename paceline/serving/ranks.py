"""The ranks of one replica: rank 0 is the replica itself, each other one a Ray actor in a bundle of its own.

    replica (bundle 0)   Leader ── meeting ──► RankActor (bundle 1), RankActor (bundle 2), …
                         Ranks.lost() ◄─────── an actor dies, a rank's loop ends

All of them end with the replica, whatever ends it: Ray kills the actors of an owner that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paceline import numa
from paceline.config import DraftSettings, EngineSettings, TargetSettings
from paceline.errors import EngineError, PacelineError, Unavailable
from paceline.models import resolve

if TYPE_CHECKING:
    # torch takes seconds to import; the application builder imports this module without it.
    from paceline.engine.tp.group import Meeting
    from paceline.engine.tp.leader import Leader

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

POLL_S = 0.25
"""How often rank 0's own view of the others is looked at. That an actor died is heard at once."""
REASON_WAIT_S = 2.0
"""Rank 0 may learn that another failed before that one has said why."""
STOP_TIMEOUT_S = 5.0
CALLS_AT_ONCE = 2
"""Of a rank: its loop, and a question."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs; `cores` it may use."""

    rank: int
    pid: int
    node: str
    cores: tuple[int, ...]

    @classmethod
    def here(cls, rank: int) -> Self:
        return cls(rank, os.getpid(), ray.util.get_node_ip_address(), tuple(sorted(os.sched_getaffinity(0))))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.node})"


class RankActor:
    """A rank beside rank 0. Its calls run in threads, so that it answers while it runs. Undecorated: see `_actors`."""

    def __init__(self, rank: int, engine: EngineSettings) -> None:
        self._rank, self._engine = rank, engine

    def prepare(self, model: str) -> Place:
        """Fetch the model to this node if need be, and settle on this rank's cores. Raises ModelError, ConfigError."""
        resolve(model)
        bind(self._engine, self._rank)
        return Place.here(self._rank)

    def run(self, model: str, meeting: Meeting) -> None:
        """Do as rank 0 says until it is done. Raises EngineError when it is lost, and what loading raises."""
        from paceline.engine.tp.follower import follow

        bind(self._engine, self._rank)  # this thread's memory
        follow(resolve(model).path, self._engine, meeting, self._rank)


class Ranks:
    """Rank 0's view of the others. Made by `start_ranks`; belongs to the event loop.

    `runs` are the others' loops, in the order of their ranks, `kill` ends their processes.
    """

    def __init__(
        self, leader: Leader, places: Sequence[Place], runs: Sequence[asyncio.Future[None]], kill: Callable[[], None]
    ) -> None:
        self.leader, self.places = leader, tuple(places)
        self._runs, self._kill = tuple(runs), kill
        self._failure: str | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopped = False

    def failure(self) -> str | None:
        """Which rank was lost, and why; the first that was. None while all are there."""
        if self._failure is None and not self._stopped:
            self._failure = next(filter(None, map(self._reason, self.places[1:], self._runs)), self.leader.failure)
        return self._failure

    async def lost(self) -> str:
        """Wait for the first failure."""
        while (failure := self.failure()) is None:
            await asyncio.wait(self._runs, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        return failure

    def watch(self, tell: Callable[[PacelineError], object]) -> None:
        """From now on: when a rank is lost, tell so at once, in words for clients, and end the others.

        The step that runs then may hang in a sum over all ranks, until its deadline.
        """

        async def wait() -> None:
            logger.error("%s; the replica ends", await self.lost())
            tell(Unavailable("the replica serving this request lost a part of its model; send it again"))
            self._kill()

        self._watch = asyncio.create_task(wait())

    def check_health(self) -> None:
        """Raises RuntimeError if a rank was lost."""
        if (failure := self.failure()) is not None:
            raise RuntimeError(failure)

    async def loading(self, work: Awaitable[T]) -> T:
        """What `work` gives, which all ranks do together. One that fails at it ends the wait: its error is raised."""
        task, lost = asyncio.ensure_future(work), asyncio.create_task(self.lost())
        try:
            await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not isinstance(task.exception(), EngineError):
                return task.result()
            await asyncio.wait(self._runs, timeout=REASON_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            raise self._error() or task.exception() or EngineError(await self.lost())
        finally:
            lost.cancel()

    async def stop(self) -> None:
        """Let them end, then kill whoever has not. Idempotent."""
        if self._stopped:
            return
        lost = self.failure() is not None
        self._stopped = True
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self.leader.close)
        if not lost:
            await asyncio.wait(self._runs, timeout=STOP_TIMEOUT_S)
        self._kill()

    def _reason(self, place: Place, run: asyncio.Future[None]) -> str | None:
        if not run.done():
            return None
        error = None if run.cancelled() else run.exception()
        if error is None:
            return f"{place} ended"
        ours = _cause(error)
        return f"{place} {f'failed: {ours.message}' if isinstance(ours, PacelineError) else 'was lost'}"

    def _error(self) -> PacelineError | None:
        """What a rank said it failed for, as its own kind of error."""
        for place, run in zip(self.places[1:], self._runs, strict=True):
            error = run.exception() if run.done() and not run.cancelled() else None
            if error is not None and isinstance(ours := _cause(error), PacelineError):
                return type(ours)(f"rank {place.rank}: {ours.message}", param=ours.param)
        return None


async def start_ranks(settings: TargetSettings | DraftSettings, model: str) -> Ranks | None:
    """The other ranks of this replica, each with the model at hand on its node; None if it is the only one.

    Binds this process to its own cores. Raises what a rank fails for.
    """
    engine = rank_engine(settings)
    if engine.tensor_parallel_size == 1:
        return None
    bind(engine, 0)
    actors = _actors(engine, settings.num_gpus > 0)
    try:
        return await _met(actors, engine, model)
    except BaseException:
        _kill(actors)
        raise


def rank_engine(settings: TargetSettings | DraftSettings) -> EngineSettings:
    """The engine's settings as its ranks have them: without GPUs of their own they are on the CPU."""
    engine = settings.engine
    if engine.tensor_parallel_size > 1 and settings.num_gpus == 0:
        return engine.model_copy(update={"device": "cpu"})
    return engine


async def loading(ranks: Ranks | None, work: Awaitable[T]) -> T:
    """`Ranks.loading`, also of the only rank."""
    return await (work if ranks is None else ranks.loading(work))


def ranks_status(settings: TargetSettings | DraftSettings, ranks: Ranks | None) -> dict[str, Any]:
    """For /status."""
    told: dict[str, Any] = {"tensor_parallel_size": settings.engine.tensor_parallel_size}
    if ranks is not None:
        told["ranks"] = [{**asdict(place), "cores": list(place.cores)} for place in ranks.places]
    return told


def bind(engine: EngineSettings, rank: int) -> None:
    """Keep this process, and the memory that this thread takes, to a CPU rank's part of the machine."""
    if engine.device != "cpu":
        return
    found = numa.bindings(engine.tensor_parallel_size, cores_per_rank=engine.cores_per_rank, numa_bind=engine.numa_bind)
    numa.apply(found[rank])


def _actors(engine: EngineSettings, gpus: bool) -> list[Any]:
    """One in each bundle but the first, where this replica is."""
    group = ray.util.get_current_placement_group()
    assert group is not None
    made = []
    for rank, bundle in enumerate(group.bundle_specs):
        if rank > 0:
            options = ray.remote(RankActor).options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0) if gpus else 0,
                max_restarts=0,
                max_concurrency=CALLS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            made.append(options.remote(rank, engine))
    return made


async def _met(actors: Sequence[Any], engine: EngineSettings, model: str) -> Ranks:
    from paceline.engine.tp.leader import Leader

    try:
        prepared = asyncio.gather(*(actor.prepare.remote(model) for actor in actors))
        await asyncio.to_thread(resolve, model)
        places = await prepared
    except Exception as error:
        if isinstance(ours := _cause(error), PacelineError):
            raise ours from None
        raise
    leader = await asyncio.to_thread(Leader.open, engine, ray.util.get_node_ip_address())
    runs = [asyncio.ensure_future(actor.run.remote(model, leader.meeting)) for actor in actors]
    ranks = Ranks(leader, (Place.here(0), *places), runs, lambda: _kill(actors))
    for place in ranks.places:
        logger.info("%s, cores %s", place, list(place.cores))
    return ranks


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _cause(error: BaseException) -> BaseException:
    """What an actor's method raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
