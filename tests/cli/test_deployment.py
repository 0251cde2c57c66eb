from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.cli.deployment import Overrides, find_local_cpu, read_deployment
from paceline.config import default_deployment, load_deployment
from paceline.errors import ConfigError

DEPLOYMENTS = sorted((Path(__file__).parents[2] / "deployments").glob("*.yaml"))
LOCAL_CPU = next(path for path in DEPLOYMENTS if path.name == "local-cpu.yaml")


def config_file(folder: Path, **changes: Any) -> Path:
    """A config file: the default one with `changes` to its application."""
    config = default_deployment()
    config["applications"][0].update(changes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_without_a_file_the_default_is_deployed() -> None:
    assert read_deployment(None, Overrides()).config == default_deployment()


def test_without_options_a_file_is_deployed_as_it_is() -> None:
    assert read_deployment(LOCAL_CPU, Overrides()).config == yaml.safe_load(LOCAL_CPU.read_text())


def test_options_override_the_settings_of_a_file() -> None:
    settings = read_deployment(LOCAL_CPU, Overrides(model="other", drafts=0, targets=3)).settings
    assert (settings.model, settings.draft.num_replicas, settings.target.num_replicas) == ("other", 0, 3)


def test_another_model_does_without_the_configs_draft() -> None:
    assert read_deployment(LOCAL_CPU, Overrides(model="other")).settings.draft.model is None


def test_the_same_model_keeps_the_configs_draft() -> None:
    assert read_deployment(LOCAL_CPU, Overrides(model="smollm2-135m")).settings.draft.model == "smollm2-135m-draft"


def test_the_default_has_the_draft_of_local_cpu() -> None:
    assert read_deployment(None, Overrides()).settings.draft.model == "smollm2-135m-draft"


def test_an_override_keeps_what_stands_beside_it() -> None:
    assert read_deployment(LOCAL_CPU, Overrides(targets=3)).settings.target.num_cpus == 0.25


def test_a_models_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert read_deployment(None, Overrides(model="./mine")).settings.model == str(tmp_path / "mine")


def test_a_models_hub_id_is_left_as_it_is() -> None:
    assert read_deployment(None, Overrides(model="owner/name")).settings.model == "owner/name"


def test_addresses_override_those_of_a_file() -> None:
    deployment = read_deployment(LOCAL_CPU, Overrides(host="0.0.0.0", port=81, grpc_port=91))
    assert (deployment.host, deployment.http_port, deployment.grpc_port) == ("0.0.0.0", 81, 91)


def test_a_grpc_port_turns_grpc_on(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": default_deployment()["applications"]}))
    assert read_deployment(path, Overrides(grpc_port=91)).grpc_port == 91


def test_a_config_without_grpc_has_no_grpc_port(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": default_deployment()["applications"]}))
    assert read_deployment(path, Overrides()).grpc_port is None


def test_a_file_without_our_application_is_refused(tmp_path: Path) -> None:
    path = config_file(tmp_path, import_path="other:app")
    with pytest.raises(ConfigError, match="needs exactly one with import_path"):
        read_deployment(path, Overrides())


def test_an_option_that_the_config_would_shadow_is_refused(tmp_path: Path) -> None:
    path = config_file(tmp_path, deployments=[{"name": "Target", "num_replicas": 5}])
    with pytest.raises(ConfigError, match=r"--targets: the config sets the replicas under deployments\.Target"):
        read_deployment(path, Overrides(targets=1))


def test_local_cpu_is_found_in_the_current_folder(tmp_path: Path) -> None:
    copy = tmp_path / "deployments" / "local-cpu.yaml"
    copy.parent.mkdir()
    copy.write_text("")
    assert find_local_cpu(tmp_path) == copy


def test_local_cpu_is_found_in_the_checkout(tmp_path: Path) -> None:
    assert find_local_cpu(tmp_path) == LOCAL_CPU


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.name)
def test_every_deployment_has_valid_settings(path: Path) -> None:
    assert load_deployment(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.name)
def test_every_deployment_is_a_valid_serve_config(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(path.read_text())
    assert len(ServeDeploySchema.model_validate(config).applications) == len(config["applications"])


def test_local_cpu_differs_from_the_default_in_reserved_cpus_alone() -> None:
    settings = read_deployment(LOCAL_CPU, Overrides()).settings.model_dump()
    for section in ("target", "draft"):
        settings[section]["num_cpus"] = 1.0
    assert settings == read_deployment(None, Overrides()).settings.model_dump()


def test_local_cpu_listens_where_the_default_does() -> None:
    config = load_deployment(LOCAL_CPU)
    default = default_deployment()
    assert {key: config[key] for key in default if key != "applications"} == {
        key: default[key] for key in default if key != "applications"
    }


def test_local_cpu_reserves_no_more_than_two_cores() -> None:
    settings = read_deployment(LOCAL_CPU, Overrides()).settings
    reserved = sum(part.num_replicas * part.num_cpus for part in (settings.target, settings.draft))
    assert reserved + settings.num_routers <= 2


def certificate(folder: Path) -> tuple[Path, Path]:
    for name in ("cert.pem", "key.pem"):
        (folder / name).touch()
    return folder / "cert.pem", folder / "key.pem"


def test_certificate_and_key_go_to_the_http_port(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    options = read_deployment(None, Overrides(tls_cert=cert, tls_key=key)).config["http_options"]
    assert (options["ssl_certfile"], options["ssl_keyfile"]) == (str(cert), str(key))


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    with pytest.raises(ConfigError, match="give both"):
        read_deployment(None, Overrides(tls_cert=cert))
    with pytest.raises(ConfigError, match="no such file"):
        read_deployment(None, Overrides(tls_cert=cert, tls_key=tmp_path / "none"))


@pytest.mark.parametrize(
    ("host", "keys", "told"),
    [
        ("0.0.0.0", {}, "whoever reaches 0.0.0.0:8000"),
        ("127.0.0.1", {}, "gRPC port 9000 listens on every interface"),
        ("0.0.0.0", {"file": "keys.yaml"}, None),
    ],
)
def test_a_server_that_is_open_to_strangers_says_so(
    host: str, keys: dict[str, str], told: str | None, tmp_path: Path
) -> None:
    file = config_file(tmp_path, args={"api_keys": keys})
    why = read_deployment(file, Overrides(host=host)).open_to_strangers
    assert why is None if told is None else told in str(why)
