"""Structured output: which tokens the text of a grammar can go on with (llguidance, the engine of Guidance).

    Grammar ── compiled once (Grammars) ──► Matcher of a sequence ── follows its output ──► a mask for each row

The mask of a row is a function of the grammar and of the output before it, candidates of a verification window
included. Draft and target apply it at the same place (`sampling.adjust`), so their coupled draws agree as they would
without, and both know the tokens that the grammar leaves no choice about.

Compiled grammars are kept, the latest ones, and each sequence's matcher is a copy that shares their automata. A text
that is complete and cannot go on ends the output; where it could also go on, an id in `Grammar.ends` may be drawn.

What of JSON Schema is supported is llguidance's list: all types, enum, const, anyOf, oneOf of branches that exclude
each other, allOf, $ref within the document (recursive ones too), properties, patternProperties, required,
additionalProperties, items, prefixItems, minItems, maxItems, minLength, maxLength, pattern (no look-around, no
back-references), the usual formats (date-time, uuid, email, …), minimum, maximum, multipleOf. Properties come in the
order of the schema. Keywords that change what is valid and are not there, as `not`, `uniqueItems`, `if`,
`minProperties` or a remote `$ref`, are refused by name; annotations and unknown keywords are passed over.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from paceline.errors import InvalidRequest
from paceline.speculation import grammar_source
from paceline.speculation.run import common_prefix
from paceline.types import Grammar

logger = logging.getLogger(__name__)

MOST_COMPILED = 64
"""Grammars kept by a tokenizer: some 100 kB each, up to 100 MB for one whose lexer runs into its limit."""
CHECK_TIMEOUT_S = 3.0
"""For the check of one grammar on a busy machine; of a core it gets `grammar_source.CPU_S`."""
MOST_CHECKED = 1024
TOO_MUCH = "takes too much time or memory to compile; make it smaller, or its patterns and numbers simpler"


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may call it.

    `tokenizer` is the text of a tokenizer.json (`tokenizer_text`), `eos` are the ids that end a model's answer. The
    first use takes about half a second: it sorts the vocabulary.
    """

    def __init__(self, tokenizer: str, eos: Iterable[int] = ()) -> None:
        self._text, self._eos = tokenizer, sorted(eos)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._building, self._storing = threading.Lock(), threading.Lock()

    def compile(self, grammar: Grammar) -> None:
        """Raises InvalidRequest, as `matcher` does, which costs next to nothing afterwards."""
        self._base(grammar)

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is compiled."""
        with self._storing:
            return (grammar.kind, grammar.source) in self._compiled

    def matcher(self, grammar: Grammar, output: Sequence[int] = ()) -> Matcher:
        """For a sequence with so much output. Raises InvalidRequest if this is no grammar, or too large a one."""
        base = self._base(grammar)
        matcher = Matcher(base, self._sorted(), grammar.ends)
        for token in output:
            matcher.push(token)
        return matcher

    def _base(self, grammar: Grammar) -> LLMatcher:
        key = grammar.kind, grammar.source
        with self._storing:
            found = self._compiled.get(key)
        # Another thread may compile the same: better than to wait for one that compiles something else.
        found = found or self._compile(grammar)
        with self._storing:
            self._compiled[key] = found
            self._compiled.move_to_end(key)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, grammar: Grammar) -> LLMatcher:
        tokenizer = self._sorted()
        try:
            text = grammar_source.own_form(grammar.kind, grammar.source)
        except ValueError as error:
            raise _refusal(str(error)) from None
        found = LLMatcher(tokenizer, text, log_level=0, limits=grammar_source.limits())
        if (why := grammar_source.fault(found)) is not None:
            raise _refusal(why)
        return found

    def _sorted(self) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                try:
                    # Without any, it takes what the tokenizer says.
                    self._tokenizer = LLTokenizer(self._text, eos_token=self._eos or None)
                except ValueError as error:
                    raise _refusal(f"this model's tokenizer has no bytes for its tokens ({error})") from None
            return self._tokenizer


class Matcher:
    """Follows one output under its grammar: `push` what is agreed, ask what may come next.

    Candidates are tried on top of the agreed output and taken back when others come, so that nothing is computed
    twice; a matcher made anew for the same output answers the same. Nothing here raises: behind a candidate that
    the grammar refuses rows mean nothing, and are left as they are.
    """

    def __init__(self, base: LLMatcher, tokenizer: LLTokenizer, ends: Sequence[int]) -> None:
        self._base, self._ends = base, ends
        self._width = tokenizer.vocab_size
        self._foreign = [token for token in tokenizer.eos_tokens if token not in ends]
        self._matcher = base.deep_copy()
        self._agreed: list[int] = []
        self._tried: list[int] = []
        self.failed = False
        """Whether nothing is known of what follows: the output left the grammar, or a step took too much work."""
        self.complete = False
        """Whether the text is whole and the output ends here."""

    def push(self, token: int) -> None:
        """The output goes on with this token."""
        if self.failed or self.complete:
            return
        if self._tried[:1] == [token]:
            del self._tried[0]
        else:
            self._try([])
            if token in self._ends and self._matcher.is_accepting():
                self.complete = True
                return
            self.failed = not self._consume(token)
            if self.failed:
                return
        self._agreed.append(token)
        self.complete = not self._tried and self._matcher.is_stopped()

    def admits(self, candidates: Sequence[int]) -> int:
        """How many of these may follow the output, one after the other."""
        if self.failed:
            return len(candidates)
        tried = self._try(candidates)
        at_end = tried < len(candidates) and candidates[tried] in self._ends and self._matcher.is_accepting()
        return tried + at_end

    def refused(self, following: Sequence[int], count: int, vocab: int) -> torch.Tensor:
        """Which tokens each of `count` rows may not draw: bool [count, vocab], on the CPU.

        The last row is behind the agreed output and all of `following`, each row above it one token earlier.
        """
        words = [self._allowed(following[: len(following) - count + 1 + row]) for row in range(count)]
        refused = np.zeros((count, vocab), dtype=bool)
        for row, word in zip(refused, words, strict=True):
            if word is not None:
                known = np.unpackbits(word, bitorder="little")[:vocab] == 0
                row[: len(known)], row[len(known) :] = known, True
        found: torch.Tensor = torch.from_numpy(refused)
        return found

    def _allowed(self, following: Sequence[int]) -> np.ndarray | None:
        """A bit for each token, uint8; None if nothing is known."""
        if self.failed or self._try(following) < len(following):
            return None
        accepting = self.complete or self._matcher.is_accepting()
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8).copy()
        if self._matcher.is_error():
            self._recover()
            self.failed = self.failed or not following
            return None
        if self.complete:
            words[:] = 0
        for token in self._foreign:
            words[token >> 3] &= ~np.uint8(1 << (token & 7))
        for token in self._ends if accepting else ():
            if token < 8 * len(words):
                words[token >> 3] |= np.uint8(1 << (token & 7))
        return words if words.any() else None

    def _try(self, candidates: Sequence[int]) -> int:
        """Go to the place behind these candidates, or as many of them as the grammar admits. Returns how many."""
        same = common_prefix(self._tried, candidates)
        if same < len(self._tried):
            self._matcher.rollback(len(self._tried) - same)
            del self._tried[same:]
        for token in candidates[same:]:
            if self.failed or token in self._ends or not self._consume(token):
                break
            self._tried.append(token)
        return len(self._tried)

    def _consume(self, token: int) -> bool:
        if not 0 <= token < self._width or self._matcher.try_consume_tokens([token]) != 1:
            if self._matcher.is_error():
                self._recover()
            return False
        return True

    def _recover(self) -> None:
        """An error stays for ever in llguidance: begin again, with what is agreed."""
        logger.warning("a grammar took too much work in one step: %s", self._matcher.get_error()[:200])
        self._matcher = self._base.deep_copy()
        self._tried.clear()
        self.failed = self._matcher.try_consume_tokens(self._agreed) < len(self._agreed)


def check_grammar(grammar: Grammar, *, param: str = "response_format", timeout_s: float = CHECK_TIMEOUT_S) -> None:
    """Refuse what cannot be compiled, or only with much time or memory, before a request is queued anywhere.

    Raises InvalidRequest that names `param` and what is wrong. It compiles in a process of its own, for about 0.1 s
    the first time a grammar is seen: call it outside an event loop. The module's text says what a schema may hold.
    """
    if (why := _checked(grammar.kind, grammar.source, timeout_s)) is not None:
        raise _refusal(why, param)


def tokenizer_text(tokenizer: Any) -> str | None:
    """The tokenizer.json of a Transformers tokenizer, for `Grammars`; None if it is not one of the fast ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    text: str = backend.to_str()
    return text


@lru_cache(maxsize=MOST_CHECKED)
def _checked(kind: str, source: str, timeout_s: float) -> str | None:
    """What is wrong with a grammar, in one line."""
    program = [sys.executable, "-P", grammar_source.__file__]
    question = json.dumps({"kind": kind, "source": source})
    try:
        done = subprocess.run(program, input=question, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return TOO_MUCH
    if done.returncode:
        logger.warning("checking a grammar ended with %d: %s", done.returncode, done.stderr[-300:])
        return TOO_MUCH
    error: str | None = json.loads(done.stdout)["error"]
    return error


def _refusal(why: str, param: str = "grammar") -> InvalidRequest:
    return InvalidRequest(f"{param}: {why[:300]}", param=param)
