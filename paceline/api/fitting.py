"""Sampling parameters as a request may have them here: within the context, held to a grammar, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from paceline.api.prompts import PromptEncoder, check_unicode
from paceline.api.tools import ToolUse
from paceline.config import SchedulingPolicy
from paceline.errors import InvalidRequest
from paceline.sessions.rules import WindowRules
from paceline.types import Grammar, SamplingParams

GrammarCheck = Callable[[Grammar], None]
"""Raises InvalidRequest for a grammar that the replicas could not hold an output to."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """What this front end allows."""

    prompts: PromptEncoder
    windows: WindowRules
    scheduling_policy: SchedulingPolicy
    check_grammar: GrammarCheck | None = None

    async def constrained(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        """The parameters that hold the model to the functions it may or must call. Raises InvalidRequest for a grammar
        that cannot be held to."""
        dialect = self.prompts.tools
        if tools.callable:
            grammar = dialect.grammar(tools, params.grammar)
            params = replace(params, grammar=grammar, shown_token_ids=dialect.shown_ids)
        if params.grammar is not None:
            check_unicode("response_format", params.grammar.source)
            if self.check_grammar is not None:
                checked = dialect.spelled(params.grammar) if tools.callable else params.grammar
                await asyncio.to_thread(self.check_grammar, checked)
        return params

    def check_priority(self, priority: int) -> None:
        """Raise InvalidRequest for one that would have no effect."""
        if priority and self.scheduling_policy == "fcfs":
            raise InvalidRequest(
                f"priority: {priority} has no effect here, where who came first goes first; leave it out, or have the "
                "server run with target.engine.scheduling_policy: priority",
                param="priority",
            )

    def at_most(self, max_tokens: int, prompt_tokens: int, params: SamplingParams) -> int:
        """`max_tokens`, or what the context leaves."""
        room = self.windows.longest(self.windows.resolve(params)) - prompt_tokens
        return min(max_tokens, max(1, room))

    def fit(self, source: str, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        """The parameters with the window, `max_tokens` and the seed resolved. Raises InvalidRequest if they name tokens
        the model lacks, or if prompt and output exceed its context. `source` is the field of the prompt."""
        self.prompts.check_ids("stop_token_ids", params.stop_token_ids)
        self.prompts.check_ids("logit_bias", tuple(params.bias))
        return self._within_context(source, prompt_tokens, self.windows.resolve(params)).with_seed()

    def _within_context(self, source: str, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        context = self.windows.longest(params)
        room = context - prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"{source}: {prompt_tokens} tokens leave no room for an answer in the model's context of {context}",
                param=source,
            )
        if params.max_tokens is None:
            return replace(params, max_tokens=room)
        if params.max_tokens > room:
            field = "max_output_tokens" if source == "input" else "max_tokens"
            raise InvalidRequest(
                f"{field}: {params.max_tokens} and a prompt of {prompt_tokens} tokens exceed the model's context "
                f"of {context}; at most {room} fit",
                param=field,
            )
        return params
