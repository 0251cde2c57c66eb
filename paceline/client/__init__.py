"""A client of a running Paceline server, over gRPC: `Client`, and `AsyncClient` with the same methods to be awaited.

    from paceline.client import Client

    with Client("127.0.0.1:9000") as client:
        print(client.chat("What is the capital of France?", max_tokens=64).text)
        for delta in client.stream_chat("Tell me more.", temperature=0.7):
            print(delta.text, end="", flush=True)
        session = client.session("holiday")
        session.say("We leave on Monday.")
        print(session.say("When do we leave?").text)

Errors are Paceline's own (`paceline.errors`). A call that is refused because the server is busy or gone is made again,
a stream only as long as it has given no token; `Retry` says how often. Imports neither Ray nor PyTorch.
"""

from __future__ import annotations

from paceline.client.aio import AsyncClient, AsyncSession, AsyncStream
from paceline.client.answers import Answer, Model, Relief, SessionInfo, Started
from paceline.client.connection import TLS
from paceline.client.options import ChatOptions, GenerateOptions, Sampling, TurnOptions
from paceline.client.retry import Retry
from paceline.client.sync import Client, Session, Stream

__all__ = [
    "TLS",
    "Answer",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "ChatOptions",
    "Client",
    "GenerateOptions",
    "Model",
    "Relief",
    "Retry",
    "Sampling",
    "Session",
    "SessionInfo",
    "Started",
    "Stream",
    "TurnOptions",
]
