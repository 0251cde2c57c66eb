"""Settings are checked at the edge: a wrong one is named by its dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from paceline.config import (
    API_KEY_VARIABLE,
    APP_NAME,
    IMPORT_PATH,
    AppSettings,
    EngineSettings,
    ca_bundle,
    cache_dir,
    default_deployment,
    load_deployment,
    parse_settings,
    secret,
)
from paceline.errors import ConfigError


def refused(values: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_settings(values)
    return caught.value


def deployment(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "app.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refused_file(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_deployment(path)
    return caught.value


# Keys.


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"modle": "x"}, "modle"),
        ({"draft": {"replicas": 1}}, "draft.replicas"),
        ({"target": {"engine": {"max-num-seqs": 1}}}, "target.engine.max-num-seqs"),
        ({"draft": {"engine": {"thread": 1}}}, "draft.engine.thread"),
    ],
)
def test_an_unknown_key_is_named(values: dict[str, Any], key: str) -> None:
    error = refused(values)
    assert (error.message, error.param) == (f"{key}: unknown key", key)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"model": 5}, "model"),
        ({"num_routers": 0}, "num_routers"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"target": 5}, "target"),
        ({"target": {"num_cpus": -1}}, "target.num_cpus"),
        ({"target": {"engine": {"dtype": "int3"}}}, "target.engine.dtype"),
        ({"target": {"engine": {"max_num_seqs": 1.5}}}, "target.engine.max_num_seqs"),
        ({"target": {"engine": {"ctx_size": 0}}}, "target.engine.ctx_size"),
        ({"target": {"engine": {"n_keep": -1}}}, "target.engine.n_keep"),
        ({"target": {"engine": {"ctx_size": 5}}}, "target.engine.n_discard"),
        ({"target": {"engine": {"ctx_size": 64, "n_discard": 60}}}, "target.engine.n_discard"),
        ({"draft": {"port": 65536}}, "draft.port"),
        ({"speculation": {"depth": 0}}, "speculation.depth"),
        ({"speculation": {"depth": 17}}, "speculation.depth"),
        ({"speculation": {"draft_timeout_ms": float("nan")}}, "speculation.draft_timeout_ms"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], key: str) -> None:
    error = refused(values)
    assert (error.param, error.message.partition(":")[0]) == (key, key)


@pytest.mark.parametrize("value", [0, "many", None])
def test_a_wrong_number_or_auto_is_named_once(value: Any) -> None:
    error = refused({"target": {"engine": {"threads": value}}})
    assert (error.param, error.message.count("threads"), "or 'auto'" in error.message) == (
        "target.engine.threads",
        1,
        True,
    )


def test_every_wrong_key_is_named() -> None:
    message = refused({"modle": 1, "draft": {"port": -1}}).message
    assert ("modle: unknown key" in message, "draft.port: " in message) == (True, True)


def test_nothing_given_is_the_default() -> None:
    assert parse_settings({}) == AppSettings()


def test_a_given_value_is_kept_beside_the_defaults() -> None:
    settings = parse_settings({"target": {"engine": {"threads": 3}}})
    assert settings.target.engine == EngineSettings(threads=3)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AppSettings().model = "other"  # type: ignore[misc]


def test_the_drafts_model_is_the_targets_unless_named() -> None:
    own, named = parse_settings({"model": "a"}), parse_settings({"model": "a", "draft": {"model": "b"}})
    assert (own.draft_model, named.draft_model) == ("a", "b")


def test_the_public_name_is_the_models_unless_given() -> None:
    own, named = parse_settings({"model": "a"}), parse_settings({"model": "a", "served_model_name": "b"})
    assert (own.public_name, named.public_name) == ("a", "b")


# Files.


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    content = default_deployment(parse_settings({"model": "a"}))
    assert load_deployment(deployment(tmp_path, content)) == content


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refused_file(tmp_path / "no.yaml").message == f"{tmp_path / 'no.yaml'}: no such config file"


@pytest.mark.parametrize("content", ["a: [", "\x00"])
def test_a_file_that_is_no_yaml_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    message = refused_file(deployment(tmp_path, content)).message
    assert (message.startswith(f"{tmp_path / 'app.yaml'}: not readable as YAML: "), "\n" in message) == (True, False)


@pytest.mark.parametrize("content", ["", "5", {"applications": {}}, {"applications": [1]}, {}], ids=str)
def test_a_file_without_applications_says_so(tmp_path: Path, content: object) -> None:
    assert refused_file(deployment(tmp_path, content)).param == "applications"


def test_a_wrong_argument_is_named_with_its_file(tmp_path: Path) -> None:
    content = {"applications": [{"name": APP_NAME, "import_path": IMPORT_PATH, "args": {"draft": {"n": 1}}}]}
    error = refused_file(deployment(tmp_path, content))
    assert (error.message, error.param) == (f"{tmp_path / 'app.yaml'}: args.draft.n: unknown key", "draft.n")


def test_another_application_may_have_any_arguments(tmp_path: Path) -> None:
    content = {"applications": [{"name": "other", "import_path": "my.app:build", "args": {"n": 1}}]}
    assert load_deployment(deployment(tmp_path, content)) == content


# The environment.


def test_the_cache_is_where_paceline_cache_says() -> None:
    assert cache_dir({"PACELINE_CACHE": "/models", "XDG_CACHE_HOME": "/xdg"}) == Path("/models")


def test_the_cache_is_in_the_users_cache_folder() -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/paceline")


def test_the_cache_is_in_the_home_folder_otherwise() -> None:
    assert cache_dir({}) == Path.home() / ".cache" / "paceline"


@pytest.mark.parametrize("name", ["PACELINE_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_is_none(name: str) -> None:
    assert cache_dir({name: ""}) == cache_dir({})


def test_a_tilde_is_the_home_folder() -> None:
    assert cache_dir({"PACELINE_CACHE": "~/models"}) == Path.home() / "models"


def test_certificates_are_looked_for_in_pips_order() -> None:
    environ = {"SSL_CERT_FILE": "d", "CURL_CA_BUNDLE": "c", "REQUESTS_CA_BUNDLE": "b", "PIP_CERT": "a"}
    found = []
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        found.append(ca_bundle(environ))
        del environ[name]
    assert [*found, ca_bundle(environ)] == ["a", "b", "c", "d", None]


@pytest.mark.parametrize(
    "where", ["memory", "sqlite:///sessions.db", "sqlite:////var/s.db", "redis://h:6379/0", "rediss://h"]
)
def test_a_session_store_is_taken(where: str) -> None:
    assert parse_settings({"sessions": {"store": where}}).sessions.store == where


@pytest.mark.parametrize("where", ["disk", "sqlite:///", "sqlite://x", "redis://", "memory ", ""])
def test_an_unknown_session_store_is_refused(where: str) -> None:
    assert refused({"sessions": {"store": where}}).param == "sessions.store"


@pytest.mark.parametrize("path", ["/var/lib/kv", "~/kv", None])
def test_a_folder_for_kv_is_taken(path: str | None) -> None:
    assert parse_settings({"sessions": {"kv_disk_path": path}}).sessions.kv_disk_path == path


def test_a_folder_for_kv_that_depends_on_where_a_replica_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sessions\.kv_disk_path: .*absolute path"):
        parse_settings({"sessions": {"kv_disk_path": "kv"}})


def test_the_key_of_the_command_line_comes_from_the_environment() -> None:
    found = [
        secret(API_KEY_VARIABLE, environment) for environment in ({API_KEY_VARIABLE: "sk"}, {API_KEY_VARIABLE: ""}, {})
    ]
    assert found == ["sk", None, None]
