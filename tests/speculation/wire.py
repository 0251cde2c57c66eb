"""Targets and drafters of real tiny models over a wire the test owns: nothing moves before it says so, no thread,
no socket, a clock that stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import Window
from paceline.engine.draft_streams import DraftStreams
from paceline.engine.runner import ModelRunner
from paceline.rpc import convert
from paceline.speculation.frames import DraftFrame
from paceline.speculation.links import DraftLink
from paceline.speculation.remote import RemoteProposer
from paceline.types import Delta, Request
from paceline.v1 import draft_pb2 as pb
from tests import tiny

TICK_S = 0.001


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class DraftSide:
    """A draft replica without a server: its streams are connected and fed by the test."""

    def __init__(self, model: PreTrainedModel, clock: Clock, capacity: int = 4096) -> None:
        self.model, self.clock, self.capacity = model, clock, capacity
        self.restart()

    def restart(self) -> None:
        """All is gone: sequences, KV, streams."""
        self.streams = DraftStreams(tiny.drafter_for(self.model, self.capacity), self.clock)
        self.wires: dict[str, Wire] = {}

    @property
    def drafter(self) -> tiny.Drafter:
        return self.streams.drafter

    def work(self) -> bool:
        """One step, whose replies go onto the wires. Whether there was anything to do."""
        if not self.streams.has_work:
            return False
        for name, replies in self.streams.step().items():
            if name in self.wires:
                self.wires[name].send_down(convert.candidates_to_proto(replies))
        return True


class Wire(DraftLink):
    """One stream. What was sent waits in `up` and `down`, serialized, until it is delivered."""

    def __init__(self, name: str, replica_id: str, proposer: RemoteProposer, draft: DraftSide) -> None:
        self.name, self.replica_id = name, replica_id
        self.proposer, self.draft = proposer, draft
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        draft.streams.connect(name)
        draft.wires[name] = self
        proposer.add_link(self)

    def send(self, frame: DraftFrame) -> None:
        self.up.append(convert.frame_to_proto(frame).SerializeToString())
        self.bytes_sent += len(self.up[-1])

    def send_down(self, reply: pb.DraftReply) -> None:
        self.down.append(reply.SerializeToString())
        self.bytes_received += len(self.down[-1])

    def deliver_up(self) -> bool:
        if not self.up:
            return False
        self.draft.streams.apply(self.name, convert.frame_from_proto(pb.DraftRequest.FromString(self.up.pop(0))))
        return True

    def deliver_down(self) -> bool:
        if not self.down:
            return False
        self.proposer.receive(self, convert.candidates_from_proto(pb.DraftReply.FromString(self.down.pop(0))))
        return True

    def pump(self) -> bool:
        """Everything moves once: frames, one step of the drafter, replies. Whether anything did."""
        moved = [self.deliver_up() for _ in range(len(self.up))]
        moved.append(self.draft.work())
        moved += [self.deliver_down() for _ in range(len(self.down))]
        return any(moved)

    def cut(self) -> None:
        """The target's end learns that the stream is gone."""
        self.up.clear()
        self.down.clear()
        self.proposer.remove_link(self)

    def cut_below(self) -> None:
        """The drafter's end learns it."""
        if self.draft.wires.pop(self.name, None) is not None:
            self.draft.streams.disconnect(self.name)


class Verifier(ModelRunner):
    """Others work while it computes."""

    meanwhile: Callable[[], object]

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        logits = super().run(windows)
        self.meanwhile()
        return logits


@dataclass(eq=False)
class TargetSide:
    """An engine whose waiting moves the clock, and that calls `meanwhile` when it waits and `computing` while it
    computes. Waiting ends at once when `meanwhile` did something.
    """

    model: PreTrainedModel
    clock: Clock
    timeout_s: float = 1.0
    ahead: int = 8
    depth: int = 4
    verification: str = "coupled"
    meanwhile: Callable[[], bool] = lambda: False
    computing: Callable[[], object] = lambda: None
    tokens: dict[str, list[int]] = field(default_factory=dict)
    longest_wait_s: float = 0.0

    def __post_init__(self) -> None:
        self.proposer = RemoteProposer(
            self.timeout_s, self.clock, ahead=self.ahead, rejection=self.verification == "rejection", wait=self._wait
        )
        runner = Verifier(tiny.ours(self.model).model)
        runner.meanwhile = lambda: self.computing()
        self.engine = tiny.engine_for(
            self.model, runner=runner, proposer=self.proposer, depth=self.depth, verification=self.verification
        )

    def _wait(self, _: threading.Condition, seconds: float) -> None:
        self.clock.now += TICK_S if self.meanwhile() else seconds

    def add(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self.engine.add(request)

    def step(self) -> dict[str, Delta]:
        began = self.clock.now
        deltas = self.engine.step()
        self.longest_wait_s = max(self.longest_wait_s, self.clock.now - began)
        for name, delta in deltas.items():
            self.tokens[name] += delta.token_ids
        return deltas

    def run(self, *requests: Request) -> None:
        """Until all are done."""
        for request in requests:
            self.add(request)
        while self.engine.has_work:
            self.step()
