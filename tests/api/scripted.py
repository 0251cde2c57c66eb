"""A scripted stand-in for the target replicas, a tokenizer of a few hundred words, and how to read their answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paceline.api import ClusterStatus, Gateway, SessionInfo, Targets, create_app
from paceline.config import SchedulingPolicy
from paceline.sessions.handoff import BUSY, Outcome
from paceline.sessions.rules import WindowRules
from paceline.types import Accepted, Delta, FinishReason, Frame, Metrics, Request, SourceMetrics

MODEL = "tiny"
CONTEXT = 512
ACCEPTED = Accepted(replica_id="target-1", seed=7, prompt_tokens=4)
METRICS = Metrics(
    prompt_tokens=4,
    cached_tokens=2,
    completion_tokens=3,
    drafted=2,
    accepted=1,
    late=1,
    steps=2,
    queue_s=0.125,
    ttft_s=0.25,
    total_s=0.5,
    wasted=1,
    sources=(SourceMetrics("remote", (1, 1), (1, 0), wasted=1),),
)
HELLO = (
    ACCEPTED,
    Delta((10, 11), "Hel"),
    Delta((12,), "lo", FinishReason.STOP, METRICS),
)
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'FORBIDDEN' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Hang:
    """In a script: the replica says nothing more."""


class ScriptedTargets(Targets):
    """Streams the scripted frames for every request. An exception in the script is raised, a `Hang` hangs."""

    def __init__(self, script: Sequence[Frame | Exception | Hang] = HELLO) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.ended: list[str] = []
        self.hanging = asyncio.Event()
        self.over = asyncio.Event()
        self.held = [SessionInfo("s/1", "target-1", 40, True), SessionInfo("s2", "target-2", 7, False)]
        self.cluster = ClusterStatus(
            targets=({"replica_id": "target-1", "running": 1},), drafts=({"replica_id": "draft-1", "load": 0.5},)
        )

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        """`ended` tells how: "complete" by itself, "cancelled" while it waited, "closed" between two frames."""
        self.requests.append(request)
        how = "failed"
        try:
            for step in self.script:
                if isinstance(step, Hang):
                    self.hanging.set()
                    await asyncio.Event().wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
            how = "complete"
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        except GeneratorExit:
            how = "closed"
            raise
        finally:
            self.ended.append(how)
            self.over.set()

    async def sessions(self) -> list[SessionInfo]:
        return list(self.held)

    async def close_session(self, session_id: str) -> bool:
        known = [session for session in self.held if session.session_id == session_id]
        self.held = [session for session in self.held if session not in known]
        return bool(known)

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        """To a replica "target-9". Running sessions stay, as does everything if that is not the one asked for."""
        if replica not in {session.replica_id for session in self.held}:
            return None
        outcome = Outcome()
        for n, session in enumerate(self.held):
            if session.replica_id != replica or (sessions is not None and session.session_id not in sessions):
                continue
            if session.running or to not in (None, "target-9"):
                outcome.left[session.session_id] = BUSY if session.running else "without a peer"
            elif len(outcome.arrived) < count:
                outcome.arrived[session.session_id] = "target-9"
                self.held[n] = replace(session, replica_id="target-9")
        return outcome

    async def abort(self, request_id: str) -> bool:
        """Of every request it ever got."""
        return any(request.request_id == request_id for request in self.requests)

    async def status(self) -> ClusterStatus:
        return self.cluster


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one a special word: 262 in all."""
    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: index for index, word in enumerate(words + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=words[3:],
    )
    fast.chat_template = TEMPLATE
    return fast


def gateway(
    targets: Targets | None = None,
    *,
    timeout_s: float = 30.0,
    scheduling_policy: SchedulingPolicy = "fcfs",
    synthetic_acceptance: float | None = None,
    windows: WindowRules | None = None,
    context: int = CONTEXT,
    **options: Any,
) -> Gateway:
    targets, words = targets or ScriptedTargets(), options.pop("tokenizer", None) or tokenizer()
    return Gateway(
        targets, words, MODEL, context, timeout_s, scheduling_policy, synthetic_acceptance, windows, **options
    )


def http(targets: Targets | None = None, **options: Any) -> httpx.AsyncClient:
    """A client of the application in this process. Responses arrive whole."""
    app = create_app(gateway(targets, **options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline")


def events(body: str) -> list[Any]:
    """The JSON of Server-Sent Events, and the bare text of `[DONE]`."""
    assert body.endswith("\n\n")
    data = [event.removeprefix("data: ") for event in body.removesuffix("\n\n").split("\n\n")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
