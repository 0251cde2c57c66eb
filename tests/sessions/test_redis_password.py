"""The password of a Redis store, against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paceline.config import parse_settings
from paceline.errors import ConfigError
from paceline.ports import free_ports
from paceline.sessions.history import Session
from paceline.sessions.stores import open_store
from tests.redis_server import PASSWORD, running

TTL_S = 100.0
VARIABLE = "SESSIONS_PASSWORD"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port/0` of a Redis that wants the password `right`."""
    (port,) = free_ports(1)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", ""]
    with running(["redis-server", *options], port, tmp_path_factory.mktemp("redis")):
        yield f"127.0.0.1:{port}/0"


async def test_the_password_comes_from_the_variable(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "right")
    store = open_store(f"redis://{address}", TTL_S, VARIABLE)
    await store.put(Session("s"))
    assert (await store.get("s")) == Session("s")
    await store.close()


async def test_a_password_in_the_address_still_works(address: str) -> None:
    store = open_store(f"redis://:right@{address}", TTL_S)
    assert await store.get("nobody") is None
    await store.close()


def test_a_wrong_password_names_the_setting_and_not_the_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "guess")
    with pytest.raises(ConfigError, match=r"^sessions\.password_environment: .* refuses") as error:
        open_store(f"redis://{address}", TTL_S, VARIABLE)
    assert "guess" not in str(error.value)


def test_a_wrong_password_in_the_address_names_that(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^sessions\.store: .*in the address$"):
        open_store(f"redis://:guess@{address}", TTL_S)


def test_a_missing_password_names_the_remedy(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^sessions\.store: .* name that in sessions\.password_environment$"):
        open_store(f"redis://{address}", TTL_S)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=rf"^sessions\.password_environment: {VARIABLE} is not set$"):
        open_store("redis://127.0.0.1:1/0", TTL_S, VARIABLE)


@pytest.mark.parametrize(
    ("store", "why"),
    [
        ("memory", "is for a redis:// store"),
        ("sqlite:////tmp/sessions", "is for a redis:// store"),
        ("redis://:secret@host/0", "has a password too"),
    ],
)
def test_settings_that_contradict_it_are_refused(store: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        parse_settings({"sessions": {"store": store, "password_environment": VARIABLE}})
    assert error.value.param == "sessions.password_environment"
    assert "secret" not in str(error.value)


def test_a_user_in_the_address_goes_with_it() -> None:
    settings = parse_settings({"sessions": {"store": "redis://app@host/0", "password_environment": VARIABLE}})
    assert settings.sessions.password_environment == VARIABLE
