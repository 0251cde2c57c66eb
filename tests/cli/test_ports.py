from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from paceline.errors import ConfigError
from paceline.ports import ALL_INTERFACES, free_ports, require_free, why_unusable


@pytest.fixture
def taken() -> Iterator[int]:
    """A port something listens on, on the loopback interface alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_free_port_is_usable() -> None:
    assert why_unusable("127.0.0.1", free_ports(1)[0]) is None


def test_a_taken_port_is_not(taken: int) -> None:
    assert why_unusable("127.0.0.1", taken) == "already in use"


def test_a_port_taken_on_one_interface_is_not_free_on_all(taken: int) -> None:
    assert why_unusable(ALL_INTERFACES, taken) == "already in use"


def test_another_machines_address_is_named() -> None:
    assert why_unusable("192.0.2.1", 8000) == "192.0.2.1 is no address of this machine"


def test_an_unknown_host_is_named() -> None:
    assert why_unusable("no host", 8000) == "'no host' is not a known host"


def test_free_ports_differ() -> None:
    assert len(set(free_ports(8))) == 8


def test_the_error_names_port_key_and_remedy(taken: int) -> None:
    with pytest.raises(ConfigError) as caught:
        require_free("127.0.0.1", taken, key="http_options.port", option="--port")
    assert caught.value.message == (
        f"port {taken} (http_options.port): already in use; stop what uses it or choose another with --port"
    )


def test_the_errors_param_is_the_key(taken: int) -> None:
    with pytest.raises(ConfigError) as caught:
        require_free("127.0.0.1", taken, key="http_options.port", option="--port")
    assert caught.value.param == "http_options.port"
