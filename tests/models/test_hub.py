"""The Hub's client against a Hub of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub.constants
import pytest

from paceline.errors import ModelError
from paceline.models import SILENT, resolve
from paceline.models.configs import find_config
from tests.models.conftest import Recorder
from tests.models.file_server import serving

COMMIT = "c" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"0123456789",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"copy",
    "onnx/config.json": b"{}",
}


def answer(handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    headers = {"X-Repo-Commit": COMMIT, "Content-Type": "application/json"}
    status, body = 404, b"{}"
    if path.startswith("/api/models/owner/tiny/revision/"):
        status, body = 200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": []}).encode()
    elif path.startswith("/api/models/owner/tiny/tree/"):
        tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
        status, body = 200, json.dumps(tree).encode()
    elif (name := path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")) in FILES:
        status, body, headers["ETag"] = 200, FILES[name], f'"{name}"'
    elif "/owner/missing" in path:
        headers["X-Error-Code"] = "RepoNotFound"
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


NOWHERE = "http://127.0.0.1:9"


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT would do, had the client not been imported before."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(answer) as address:
        point_at(address, monkeypatch)
        yield address


@pytest.fixture
def no_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(NOWHERE, monkeypatch)


def test_only_what_transformers_reads_is_downloaded(hub: str) -> None:
    folder = resolve("owner/tiny").path
    assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_name_is_the_hub_id(hub: str) -> None:
    assert resolve("owner/tiny").name == "owner/tiny"


def test_bytes_are_reported(hub: str, recorder: Recorder) -> None:
    resolve("owner/tiny", progress=recorder)
    assert recorder.done == {"downloading owner/tiny from the Hub": 14}


def test_cached_model_needs_no_network(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("owner/tiny").path
    point_at(NOWHERE, monkeypatch)
    assert resolve("owner/tiny").path == folder


def test_without_download_an_absent_model_names_the_command(hub: str) -> None:
    with pytest.raises(ModelError, match="paceline models pull owner/tiny"):
        resolve("owner/tiny", download=False)


def test_unknown_repository_is_named(hub: str) -> None:
    with pytest.raises(ModelError, match="owner/missing: no folder of that name and no such model on the Hub"):
        resolve("owner/missing")


def test_unreachable_hub_is_one_line_with_a_remedy(no_hub: None) -> None:
    with pytest.raises(ModelError, match="the Hub cannot be reached; check the network") as caught:
        resolve("owner/tiny", progress=SILENT)
    assert "\n" not in caught.value.message


def test_a_config_is_fetched_without_weights(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "config.json", b'{"model_type": "llama", "hidden_size": 96}')
    monkeypatch.delitem(FILES, "model.safetensors")  # whoever asked for it would fail
    assert find_config("owner/tiny").config.hidden_size == 96


def test_a_config_alone_is_no_model_in_the_cache(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "config.json", b'{"model_type": "llama"}')
    find_config("owner/tiny")
    with pytest.raises(ModelError, match="not in the Hub's cache; fetch it with: paceline models pull owner/tiny"):
        resolve("owner/tiny", download=False)


def test_a_config_nobody_knows_is_named_by_its_repository(hub: str) -> None:
    with pytest.raises(ModelError, match=r"^owner/tiny: cannot load the config"):
        find_config("owner/tiny")


def test_a_repository_without_a_config_says_so(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FILES, "config.json")
    with pytest.raises(ModelError, match=r"owner/tiny: it has no config\.json"):
        find_config("owner/tiny")


def test_a_config_of_an_unknown_repository_is_an_error(hub: str) -> None:
    with pytest.raises(ModelError, match="no such model on the Hub"):
        find_config("owner/missing")
