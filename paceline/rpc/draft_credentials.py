"""How a draft and a target know each other: a shared token, certificates on both sides, or nothing on loopback."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from pydantic import SecretStr

from paceline.config import DraftSecurity, secret
from paceline.errors import ConfigError

TOKEN_BYTES = 32
TOKEN_KEY = "authorization"


@dataclass(frozen=True, slots=True)
class Certificates:
    """What mutual TLS takes, PEM: a key with its certificate, and who signs those of the others."""

    key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)
    server_name: str


@dataclass(frozen=True, slots=True)
class DraftCredentials:
    """What one replica shows the other, and asks of it. Without either, everybody is let in."""

    token: SecretStr | None = None
    certificates: Certificates | None = None

    @classmethod
    def of(cls, security: DraftSecurity, shared: SecretStr | None) -> DraftCredentials:
        """As the settings say; `shared` is the token of this deployment. Reads files of this machine.

        Raises ConfigError naming the key.
        """
        match security.mode:
            case "auto":
                if shared is None:
                    raise ConfigError("draft.security: auto needs the token of its deployment", param="draft.security")
                return cls(token=shared)
            case "token":
                return cls(token=SecretStr(_token(security)))
            case "tls":
                names = ("key_file", "cert_file", "ca_file")
                key, certificate, authority = (_read(name, getattr(security, name)) for name in names)
                return cls(certificates=Certificates(key, certificate, authority, security.server_name))
            case "off":
                return cls()

    def metadata(self) -> list[tuple[str, str]]:
        """What a target sends with its call."""
        return [] if self.token is None else [(TOKEN_KEY, f"Bearer {self.token.get_secret_value()}")]

    def admits(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        """Whether a call's metadata holds the token. Certificates were checked before there was a call."""
        expected = self.metadata()
        if not expected:
            return True
        shown = [value for name, value in metadata or () if name == TOKEN_KEY]
        return len(shown) == 1 and hmac.compare_digest(_bytes(shown[0]), _bytes(expected[0][1]))

    def channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
        """From a target to a draft."""
        if self.certificates is None:
            return grpc.aio.insecure_channel(address, options=options)
        ours = self.certificates
        named = [*options, ("grpc.ssl_target_name_override", ours.server_name)]
        credentials = grpc.ssl_channel_credentials(ours.authority, ours.key, ours.certificate)
        return grpc.aio.secure_channel(address, credentials, options=named)

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Open a draft's port. Returns which; raises RuntimeError if it is taken."""
        if self.certificates is None:
            return server.add_insecure_port(address)
        ours = self.certificates
        credentials = grpc.ssl_server_credentials(
            [(ours.key, ours.certificate)], root_certificates=ours.authority, require_client_auth=True
        )
        return server.add_secure_port(address, credentials)


OPEN = DraftCredentials()


def new_token() -> SecretStr:
    """For one deployment. It reaches its replicas as an argument, and nobody else."""
    return SecretStr(secrets.token_urlsafe(TOKEN_BYTES))


def _token(security: DraftSecurity) -> str:
    if security.token_environment is not None:
        key, found = "token_environment", secret(security.token_environment)
        if found is None:
            raise ConfigError(
                f"draft.security.{key}: {security.token_environment} is not set", param=f"draft.security.{key}"
            )
    else:
        key, found = "token_file", _read("token_file", security.token_file).decode(errors="replace").strip()
    if len(found) < TOKEN_BYTES or not (found.isascii() and found.isprintable()):
        raise ConfigError(
            f"draft.security.{key}: a token has at least {TOKEN_BYTES} printable ASCII characters; "
            "make one with `openssl rand -hex 32`",
            param=f"draft.security.{key}",
        )
    return found


def _read(name: str, path: str | None) -> bytes:
    assert path is not None, "checked where the settings are"
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"draft.security.{name}: {path}: {error.strerror}", param=f"draft.security.{name}") from None


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
