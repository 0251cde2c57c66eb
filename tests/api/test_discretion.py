"""What users write, and secrets, are in no log, whatever happens and at whatever level."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from paceline.api import Gateway, create_app
from paceline.api.access import Access
from paceline.api.keys import KeyEntry, hash_of, open_keys
from paceline.cli.app import app as command_line
from paceline.config import AppSettings, default_deployment, load_deployment, parse_settings
from paceline.errors import ConfigError, EngineError, Overloaded, PacelineError, Unavailable
from paceline.rpc.draft_credentials import DraftCredentials
from paceline.rpc.inference_service import InferenceHandlers
from paceline.types import Delta, Failure, FinishReason
from paceline.v1 import inference_pb2 as pb
from tests import tiny
from tests.api.scripted import ACCEPTED, CONTEXT, METRICS, MODEL, ScriptedTargets, gateway, tokenizer
from tests.api.test_abandoned import LLAMA
from tests.api.wire import EngineTargets, head, post, served, talk
from tests.rpc.test_inference_access import Context

MARK = "my-own-words"
SECRET = "marked-secret-0123456789-0123456789"
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": f"{MARK} hi"}], "max_tokens": 5}
OUTPUT = Delta((10,), MARK)
SCRIPTS = {
    "out of order": [OUTPUT],
    "two beginnings": [ACCEPTED, ACCEPTED],
    "more than the end": [ACCEPTED, Delta((10,), MARK, FinishReason.STOP, METRICS), OUTPUT],
    "a failure": [ACCEPTED, OUTPUT, Failure.of(EngineError("the engine failed"))],
    "an overload": [Failure.of(Overloaded("full", retry_after=1.0))],
    "a loss": [ACCEPTED, OUTPUT, Unavailable("lost")],
    "what nobody expects": [ACCEPTED, OUTPUT, RuntimeError("broken")],
    "an end too soon": [ACCEPTED, OUTPUT],
}


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


async def test_a_conversation_with_an_engine_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    targets = EngineTargets(tiny.engine_for(LLAMA, decoder=tokenizer()))
    try:
        async with served(create_app(Gateway(targets, tokenizer(), MODEL, CONTEXT, 30.0))) as port:
            for body in (TALK, {**TALK, "stream": True}, {**TALK, "session_id": "s"}):
                assert (await talk(port, post("/v1/chat/completions", body)))[0] == 200
            assert (await talk(port, post("/v1/completions", {"prompt": MARK})))[0] == 200
            for wrong in ({"prompt": MARK, "nonsense": 1}, {"prompt": {"text": MARK}}, {"prompt": MARK * 200}):
                assert (await talk(port, post("/v1/completions", wrong)))[0] == 400
            assert (await talk(port, post("/v1/completions", f'{{"prompt": "{MARK}" "'.encode())))[0] == 400
            for path in ("/v1/models/x", f"/{MARK}"):
                assert (await talk(port, head("GET", path)))[0] == 404
    finally:
        targets.loop.stop()
    assert MARK not in caplog.text


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_is_not_logged(name: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    targets = ScriptedTargets(SCRIPTS[name])  # type: ignore[arg-type]
    async with served(create_app(gateway(targets))) as port:
        await talk(port, post("/v1/chat/completions", {**TALK, "stream": stream}))
        context = Context()
        asked = pb.ChatRequest(messages=[pb.Message(role="user", content=MARK)])
        async for _ in InferenceHandlers(gateway(ScriptedTargets(SCRIPTS[name]))).Chat(asked, context):
            pass
    assert MARK not in caplog.text


async def test_a_client_that_leaves_is_logged_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    targets = EngineTargets(tiny.engine_for(LLAMA, decoder=tokenizer()))
    try:
        async with served(create_app(Gateway(targets, tokenizer(), MODEL, CONTEXT, 30.0))) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post("/v1/chat/completions", {**TALK, "max_tokens": 300, "stream": True}))
            await reader.readuntil(b"data: ")
            writer.transport.abort()
            await targets.idle()
    finally:
        targets.loop.stop()
    assert "the client went away" in caplog.text
    assert MARK not in caplog.text


async def test_keys_and_tokens_are_nowhere_in_the_life_of_a_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, token = tmp_path / "keys.yaml", tmp_path / "token"
    keys.write_text(KeyEntry(name="alice", hash=hash_of(SECRET)).line())
    token.write_text(SECRET)
    monkeypatch.setenv("PACELINE_API_KEY", SECRET)
    settings = parse_settings(
        {"api_keys": {"file": str(keys)}, "draft": {"security": {"mode": "token", "token_file": str(token)}}}
    )
    seen = [repr(settings), settings.model_dump_json(), str(default_deployment(settings))]
    credentials = DraftCredentials.of(settings.draft.security, SecretStr(SECRET))
    ring = open_keys(settings.api_keys)
    assert ring is not None
    seen += [repr(credentials), repr(ring), repr(ring.caller(SECRET)), repr(vars(ring.caller(SECRET)))]
    async with served(create_app(gateway(), access=Access(ring, settings.api_keys))) as port:
        for sent in (SECRET, SECRET + "x"):
            _, answer = await talk(port, head("GET", "/v1/models", {"authorization": f"Bearer {sent}"}))
            seen.append(answer.decode())
    seen.append(CliRunner().invoke(command_line, ["keys", "check", str(keys)]).output)
    assert "the key in PACELINE_API_KEY is alice's" in seen[-1]
    assert SECRET not in "".join(seen) + caplog.text + capsys.readouterr().out


def test_a_secret_where_none_belongs_is_refused_without_quoting_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    found: list[PacelineError] = []
    for args in (
        {"api_keys": {"keys": [SECRET]}},
        {"api_keys": SECRET},
        {"draft": {"security": {"token": SECRET}}},
        {"draft": {"security": SECRET}},
    ):
        file.write_text(str({"applications": [{"import_path": "paceline.serving.app:build", "args": args}]}))
        with pytest.raises(ConfigError) as refused:
            load_deployment(file)
        found.append(refused.value)
    assert all(SECRET not in str(error) for error in found)


def test_the_password_of_a_store_is_not_shown() -> None:
    settings = AppSettings.model_validate({"sessions": {"store": f"redis://:{SECRET}@host:6379/0"}})
    assert SECRET not in f"{settings!r} {settings}"
