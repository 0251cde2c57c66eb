"""Whether something is a grammar that can be used here. For the edge: without torch, and apart from any model."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import lru_cache

from paceline.errors import InvalidRequest
from paceline.speculation import grammar_source
from paceline.types import Grammar

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 3.0
"""For the check of one grammar on a busy machine; of a core it gets `grammar_source.CPU_S`."""
MOST_CHECKED = 1024
TOO_MUCH = "takes too much time or memory to compile; make it smaller, or its patterns and numbers simpler"


def check_grammar(grammar: Grammar, *, param: str = "response_format", timeout_s: float = CHECK_TIMEOUT_S) -> None:
    """Refuse what cannot be compiled, or only with much time or memory, before a request is queued anywhere.

    Raises InvalidRequest that names `param` and what is wrong. It compiles in a process of its own, for about 0.1 s
    the first time a grammar is seen: call it outside an event loop. `paceline.speculation.grammar` says
    what a schema may hold.
    """
    try:
        why = _checked(grammar.kind, grammar.source, timeout_s)
    except subprocess.TimeoutExpired:
        why = TOO_MUCH  # this time: perhaps the machine was busy
    if why is not None:
        raise refusal(why, param)


def refusal(why: str, param: str = "grammar") -> InvalidRequest:
    """Of a grammar, in one line."""
    return InvalidRequest(f"{param}: {why[:300]}", param=param)


@lru_cache(maxsize=MOST_CHECKED)
def _checked(kind: str, source: str, timeout_s: float) -> str | None:
    """What is wrong with a grammar, in one line. Raises TimeoutExpired."""
    program = [sys.executable, "-P", grammar_source.__file__]
    question = json.dumps({"kind": kind, "source": source})
    done = subprocess.run(program, input=question, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        logger.warning("checking a grammar ended with %d: %s", done.returncode, done.stderr[-300:])
        return TOO_MUCH
    error: str | None = json.loads(done.stdout)["error"]
    return error
