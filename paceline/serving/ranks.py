"""The ranks of one replica: rank 0 is the replica itself, each other one a Ray actor in a bundle of its own.

    replica (bundle 0)   Leader ── meeting ──► RankActor (bundle 1), RankActor (bundle 2), …
                         Ranks.lost() ◄─────── an actor dies, a rank's loop ends

All of them end with the replica, whatever ends it: Ray kills the actors of an owner that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    """Where a rank runs; `cores` it may use, and GPUs that Ray gave it, in CUDA's words."""

    rank: int
    pid: int
    node: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls, rank: int) -> Self:
        cores = tuple(sorted(os.sched_getaffinity(0)))
        gpus = tuple(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", ())))
        return cls(rank, os.getpid(), ray.util.get_node_ip_address(), cores, gpus)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.node})"


class RankActor:
    """A rank beside rank 0. Its calls run in threads, so that it answers while it runs. Undecorated: see `Actors`."""

    def __init__(self, rank: int, engine: EngineSettings) -> None:
        self._rank, self._engine = rank, engine

    def fetch(self, model: str) -> None:
        """Have the model on this node. Raises ModelError."""
        resolve(model)

    def place(self) -> Place:
        return Place.here(self._rank)

    def see(self, gpus: Sequence[str]) -> None:
        see(gpus)

    def run(self, model: str, meeting: Meeting) -> None:
        """Load this rank's share and do as rank 0 says until that is done. Raises what ends it earlier."""
        from paceline.engine.tp.follower import follow

        follow(resolve(model).path, self._engine, meeting, self._rank)


class Others(Protocol):
    """The ranks but 0, in the order of their numbers: the seam to Ray."""

    @abstractmethod
    async def fetch(self, model: str) -> None:
        """Have the model on their nodes. Raises ModelError."""

    @abstractmethod
    async def places(self) -> Sequence[Place]: ...

    @abstractmethod
    async def see(self, gpus: Sequence[Sequence[str]]) -> None:
        """Let each see these GPUs."""

    @abstractmethod
    def run(self, model: str, meeting: Meeting) -> Sequence[asyncio.Future[None]]:
        """Start their loops. One that is done has ended, or failed for what it holds."""

    @abstractmethod
    def kill(self) -> None:
        """End their processes. Idempotent."""


class Actors(Others):
    """One in each bundle of this replica's placement group but the first, where the replica is."""

    def __init__(self, engine: EngineSettings) -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None
        self._actors = [
            ray.remote(RankActor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                resources={name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
                max_restarts=0,
                max_concurrency=CALLS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            .remote(rank, engine)
            for rank, bundle in enumerate(group.bundle_specs)
            if rank > 0
        ]

    async def fetch(self, model: str) -> None:
        try:
            await asyncio.gather(*(actor.fetch.remote(model) for actor in self._actors))
        except RayTaskError as error:
            raise _cause(error) from None

    async def places(self) -> Sequence[Place]:
        found: list[Place] = await asyncio.gather(*(actor.place.remote() for actor in self._actors))
        return found

    async def see(self, gpus: Sequence[Sequence[str]]) -> None:
        await asyncio.gather(*(actor.see.remote(own) for actor, own in zip(self._actors, gpus, strict=True)))

    def run(self, model: str, meeting: Meeting) -> Sequence[asyncio.Future[None]]:
        return [asyncio.ensure_future(actor.run.remote(model, meeting)) for actor in self._actors]

    def kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class Ranks:
    """Rank 0's view of the others. Made by `Ranks.start`; belongs to the event loop. `places` has all of them."""

    def __init__(self, leader: Leader, others: Others, places: Sequence[Place], model: str) -> None:
        self.leader, self.places = leader, tuple(places)
        self._others = others
        self._runs = others.run(model, leader.meeting)
        self._failure: str | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopped = False

    @classmethod
    async def start(cls, settings: TargetSettings | DraftSettings, model: str) -> Self | None:
        """Those of this replica, with the model at hand on their nodes; None if it is the only one.

        Raises what one of them fails for.
        """
        from paceline.engine.tp.leader import Leader

        engine = rank_engine(settings)
        if engine.tensor_parallel_size == 1:
            return None
        others = Actors(engine)
        try:
            await asyncio.gather(others.fetch(model), asyncio.to_thread(resolve, model))
            places = (Place.here(0), *await others.places())
            see(visible(places, 0))
            await others.see([visible(places, place.rank) for place in places[1:]])
            leader = await asyncio.to_thread(Leader.open, engine, ray.util.get_node_ip_address())
            return cls(leader, others, places, model)
        except BaseException:
            others.kill()
            raise

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

    async def watch(self, tell: Callable[[PacelineError], object]) -> None:
        """All is loaded. From now on: when a rank is lost, tell so at once, in words for clients, and end the others.

        The step that runs then may hang in a sum over all ranks, until its deadline.
        """
        self.places = (Place.here(0), *await self.loading(self._others.places()))  # now on cores of their own
        for place in self.places:
            logger.info("%s has cores %s", place, list(place.cores))

        async def wait() -> None:
            logger.error("%s; the replica ends", await self.lost())
            tell(Unavailable("the replica serving this request lost a part of its model; send it again"))
            self._others.kill()

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
            raise self._error() or (task.exception() if task.done() else None) or EngineError(await self.lost())
        finally:
            lost.cancel()
            task.cancel()

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
        self._others.kill()

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


def visible(places: Sequence[Place], rank: int) -> list[str]:
    """The GPUs of all ranks on this rank's host, in the order of ranks: to write into each other's memory takes more
    than the one that Ray shows."""
    return [gpu for place in places if place.node == places[rank].node for gpu in place.gpus]


def see(gpus: Sequence[str]) -> None:
    """Let this process see these GPUs: before it uses any. None leaves it as it is."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


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
        told["ranks"] = [
            {**asdict(place), "cores": list(place.cores), "gpus": list(place.gpus)} for place in ranks.places
        ]
    return told


def _cause(error: BaseException) -> BaseException:
    """What an actor's method raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
