"""A server of its own for clients of others: the real front end and tokenizer, over replicas that know their lines.

`python -m tests.clients.server` serves on a free port of the loopback interface and prints its address.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator

import uvicorn
from transformers import PreTrainedTokenizerBase

from paceline.api import create_app
from paceline.api.gateway import Gateway
from paceline.errors import ModelError
from paceline.models import load_tokenizer, resolve
from paceline.types import Accepted, Delta, FinishReason, Frame, Metrics, Request, TokenLogprobs
from tests.api import scripted

MODEL, CONTEXT = "smollm2-135m", 8192
PERSON = '{"name": "Ada", "age": 36}'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLED = re.compile(r'"name": "(\w+)"')


def tokenizer() -> PreTrainedTokenizerBase:
    """The small model's own, if it is on this machine."""
    try:
        found: PreTrainedTokenizerBase = load_tokenizer(resolve(MODEL, download=False).path)
    except ModelError:
        found = scripted.tokenizer()
    return found


class Actor(scripted.ScriptedTargets):
    """Answers as the prompt wants: with a call if there are functions, with their result if there is one, as JSON if it
    must be, else with a greeting."""

    def __init__(self, words: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.words = words

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        params, prompt = request.params, self.words.decode(list(request.token_ids))
        line = self._line(request, prompt)
        for stop in params.stop:
            line = line.partition(stop)[0]
        tokens = self.words.encode(line, add_special_tokens=False)[: params.max_tokens]
        yield Accepted("target-1", params.seed or 0, len(request.token_ids))
        told = tuple(map(_likely, request.token_ids[1:])) if params.prompt_logprobs is not None else ()
        before = ""
        for n, token in enumerate(tokens):
            text, last = self.words.decode(tokens[: n + 1]), n == len(tokens) - 1
            metrics = Metrics(len(request.token_ids), 0, len(tokens)) if last else None
            reason = (
                None if not last else FinishReason.LENGTH if len(tokens) == params.max_tokens else FinishReason.STOP
            )
            logprobs = (_likely(token),) if params.logprobs is not None else ()
            yield Delta((token,), text[len(before) :], reason, metrics, 0, logprobs, told if n == 0 else ())
            before = text

    def _line(self, request: Request, prompt: str) -> str:
        grammar = request.params.grammar
        if "<tool_response>\n" in prompt.rpartition("</tools>")[2]:
            return "It rains in Oslo."
        if grammar is not None and grammar.kind == "json_schema":
            return PERSON
        if grammar is not None and (names := CALLED.findall(grammar.source.replace("\\", ""))):
            arguments = PERSON if names[0] == "Person" else '{"city": "Oslo"}'
            return f'<tool_call>\n{{"name": "{names[0]}", "arguments": {arguments}}}\n</tool_call>'
        return CALL if "</tools>" in prompt else "Hello, friend!"


def _likely(token: int) -> TokenLogprobs:
    """The likeliest token, by far."""
    return TokenLogprobs(token, -0.125, 1, ((token, -0.125),))


def main() -> None:
    words = tokenizer()
    app = create_app(Gateway(Actor(words), words, MODEL, CONTEXT, 60.0))
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off")).run(sockets=[listener])


if __name__ == "__main__":
    main()
