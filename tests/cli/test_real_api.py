"""The client against the API's own routes, with scripted targets behind them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from threading import Thread

import pytest
import uvicorn

from paceline.api import create_app
from paceline.cli.client import Answer, ChatOptions, Client, Message
from paceline.errors import InvalidRequest
from tests.api.scripted import METRICS, MODEL, gateway
from tests.cli.test_client import ignore


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(gateway()), log_level="error", lifespan="off"))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as made:
            yield made
        server.should_exit = True
        thread.join()


def test_an_answer_is_read(client: Client) -> None:
    options = ChatOptions(session_id="s", return_token_ids=True)
    expected = Answer("Hello", "stop", "target-1", "s", 7, replace(METRICS, queue_s=0.0), (10, 11, 12))
    assert client.chat([Message("user", "hi")], options, ignore) == expected


def test_a_refusal_is_read(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        client.chat([Message("user", "hi")], ChatOptions(temperature=-1.0), ignore)


def test_the_model_is_read(client: Client) -> None:
    assert client.model() == MODEL


def test_the_status_is_read(client: Client) -> None:
    assert [replica["replica_id"] for replica in client.status().targets] == ["target-1"]
