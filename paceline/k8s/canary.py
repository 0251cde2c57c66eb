"""What is asked of a new version before, and after, it gets everybody's requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from paceline.errors import PacelineError, SessionConflict, UnknownSession
from paceline.k8s.errors import NotReady
from paceline.k8s.server import ServerProxy

SEED = 20
TOKENS = 24
QUESTIONS = ("Count from one to ten.", "What is the capital of France?", "Tell me a short story about a bicycle race.")
SAID = "My favourite number is 4711. Say one word."
ASKED = "Which number is my favourite?"


@dataclass(frozen=True, slots=True)
class Compared:
    """Answers of both versions to the same seeded questions."""

    questions: int
    same: int

    def __str__(self) -> str:
        return f"{self.same} of {self.questions} seeded answers are the same, token for token"


def check_replicas(server: ServerProxy) -> int:
    """Targets that run there. Raises NotReady if there is none."""
    targets = server.status().get("targets") or ()
    if not targets:
        raise NotReady("the new version answers, and has no target replica")
    return len(targets)


def compare(old: ServerProxy, new: ServerProxy) -> Compared:
    """Ask both the same. An answer is fixed by its seed, so that another one means another model."""
    same = sum(_answer(old, question) == _answer(new, question) for question in QUESTIONS)
    return Compared(len(QUESTIONS), same)


def _answer(server: ServerProxy, question: str) -> list[int]:
    answer = server.chat([{"role": "user", "content": question}], seed=SEED, max_tokens=TOKENS)
    return tokens_of(answer)


def tokens_of(answer: Mapping[str, Any]) -> list[int]:
    """Of a whole answer."""
    return [int(each) for each in (answer.get("paceline") or {}).get("token_ids") or ()]


def begin_probe(server: ServerProxy, session_id: str) -> None:
    """A session with one turn, to be found again; nothing if it is there already."""
    try:
        server.post("/v1/sessions", {"session_id": session_id, "seed": SEED})
    except SessionConflict:
        if probe_turns(server, session_id):
            return
    _turn(server, session_id, SAID)


def probe_turns(server: ServerProxy, session_id: str) -> int:
    """Turns of the session as that version knows it; 0 if it knows none."""
    try:
        return int(server.ask("GET", _path(session_id)).get("turns") or 0)
    except UnknownSession:
        return 0


def follow_up(server: ServerProxy, session_id: str) -> int:
    """Ask on in the session; returns the tokens of history that the answer was given from. Raises NotReady if none."""
    try:
        before = int(server.ask("GET", _path(session_id)).get("history_tokens") or 0)
        usage = _turn(server, session_id, ASKED).get("usage") or {}
    except UnknownSession:
        raise NotReady(f"session {session_id}, begun before the switch, is not known after it") from None
    if not before or int(usage.get("prompt_tokens") or 0) <= before:
        raise NotReady(f"session {session_id} was answered without its history")
    return before


def end_probe(server: ServerProxy, session_id: str) -> None:
    """Forget it; it goes by itself otherwise, when the store forgets what nobody uses."""
    try:
        server.ask("DELETE", _path(session_id))
    except PacelineError:
        return


def _turn(server: ServerProxy, session_id: str, content: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    return server.post(f"{_path(session_id)}/turns", body, timeout_s=300.0)


def _path(session_id: str) -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}"
