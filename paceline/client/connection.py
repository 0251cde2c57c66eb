"""How a client reaches a server: its address, TLS, the API key."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

import grpc

from paceline.errors import ConfigError, PacelineError, Unavailable
from paceline.rpc.rich_errors import error_of

MAX_RECEIVED_BYTES = 64 << 20
"""Of one message: log probabilities of a whole prompt are the largest."""


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM-encoded bytes. Without `ca` the system's authorities are trusted; `certificate` and `key` are the client's
    own, for servers that ask for one. `server_name` is what the server's certificate says, if not its address."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """Raises ConfigError if the API key would cross a network in plain text."""

    address: str
    api_key: str | None
    tls: TLS | None
    metadata: tuple[tuple[str, str], ...]
    plaintext_key: bool = False

    def __post_init__(self) -> None:
        if self.api_key and self.tls is None and not self.plaintext_key and not is_local(self.address):
            raise ConfigError(
                f"api_key: would be sent to {self.address} unencrypted; pass tls=True, or allow_plaintext_key=True if "
                "the network is private",
                param="api_key",
            )

    def __repr__(self) -> str:
        return f"Connection({self.address!r}, tls={self.tls is not None})"

    @property
    def options(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
        if is_local(self.address):
            found.append(("grpc.enable_http_proxy", 0))  # a proxy set for the internet does not know these ports
        if self.tls is not None and self.tls.server_name is not None:
            found.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return found

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain text."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(self.tls.ca, self.tls.key, self.tls.certificate)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        return (*self.metadata, ("authorization", f"Bearer {self.api_key}")) if self.api_key else self.metadata

    def error(self, failure: Any) -> PacelineError:
        """What a failed call of gRPC's means."""
        error = error_of(failure.code(), failure.details() or "", failure.trailing_metadata())
        if type(error) is Unavailable and error.message.startswith("failed to connect"):
            return Unavailable(f"no server at {self.address}; start one with `paceline serve`")
        return error


def is_local(address: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
