"""TLS and API keys on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.client import TLS, AsyncClient, Model, Retry
from paceline.errors import Unavailable
from paceline.rpc.inference_service import InferenceHandlers
from tests.api.scripted import MODEL, gateway
from tests.rpc.served import serving
from tests.rpc.test_draft_security import certificates

ONCE = Retry(max_attempts=1)


class Listening(InferenceHandlers):
    """Keeps the metadata of the calls."""

    def __init__(self) -> None:
        super().__init__(gateway())
        self.metadata: dict[str, Any] = {}

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:
        self.metadata = dict(grpc_context.invocation_metadata())
        return await super().ListModels(request, grpc_context)


def pem(folder: Path) -> tuple[bytes, bytes, bytes]:
    """An authority, a certificate of it, and its key."""
    made = certificates(folder)
    return Path(made.ca_file).read_bytes(), Path(made.cert_file).read_bytes(), Path(made.key_file).read_bytes()


async def test_a_key_goes_along_over_tls_in_both_directions(tmp_path: Path) -> None:
    ca, certificate, key = pem(tmp_path)
    both = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    own = TLS(ca, certificate, key, server_name="paceline-draft")
    handlers = Listening()
    async with (
        serving(handlers, both) as address,
        AsyncClient(address, api_key="pl-1", tls=own, metadata=[("application", "paceline")]) as client,
    ):
        assert await client.models() == (Model(MODEL, 512),)
    assert handlers.metadata["authorization"] == "Bearer pl-1"
    assert handlers.metadata["application"] == "paceline"


async def test_a_server_of_another_authority_is_not_talked_to(tmp_path: Path) -> None:
    _, certificate, key = pem(tmp_path / "ours")
    other, *_ = pem(tmp_path / "theirs")
    handlers = Listening()
    theirs = TLS(other, server_name="paceline-draft")
    async with (
        serving(handlers, grpc.ssl_server_credentials([(key, certificate)])) as address,
        AsyncClient(address, api_key="pl-1", tls=theirs, retry=ONCE, timeout=20) as client,
    ):
        with pytest.raises(Unavailable):
            await client.models()
    assert handlers.metadata == {}
