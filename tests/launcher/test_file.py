"""Which hosts a cluster launcher file names, and what is refused in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from paceline.config import load_deployment, parse_settings
from paceline.errors import ConfigError
from paceline.launcher import load_cluster_file
from paceline.serving.environment import CLUSTER

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "cluster" / "onprem.yaml"


def config(**changes: Any) -> dict[str, Any]:
    provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    return {"cluster_name": "c", "provider": provider, "auth": {"ssh_user": "me"}} | changes


def written(folder: Path, found: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def test_hosts_are_the_head_and_then_the_workers(tmp_path: Path) -> None:
    assert load_cluster_file(written(tmp_path, config())).hosts == ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def test_the_head_may_be_reached_at_another_address(tmp_path: Path) -> None:
    provider = config()["provider"] | {"external_head_ip": "192.0.2.1"}
    found = load_cluster_file(written(tmp_path, config(provider=provider)))
    assert [found.reached_at(host) for host in found.hosts] == ["192.0.2.1", "10.0.0.2", "10.0.0.3"]


def test_a_worker_is_joined_by_the_commands_ray_would_run_in_their_order(tmp_path: Path) -> None:
    commands = {"worker_start_ray_commands": ["c"], "setup_commands": ["a"], "worker_setup_commands": ["b"]}
    assert load_cluster_file(written(tmp_path, config(**commands))).join_commands == ("a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"provider": {"type": "aws"}}, "provider.type: 'aws'"),
        ({"provider": {"type": "local", "coordinator_address": "x:1"}}, "provider.coordinator_address: "),
        ({"provider": {"type": "local", "worker_ips": []}}, "provider.head_ip: "),
        ({"provider": {"type": "local", "head_ip": "a"}}, "provider.worker_ips: "),
        ({"provider": {"type": "local", "head_ip": "a", "worker_ips": ["-oX=y"]}}, "provider.worker_ips[0]: "),
        ({"provider": {"type": "local", "head_ip": "a", "worker_ips": ["a"]}}, "provider.worker_ips: a is there twice"),
        ({"provider": None}, "provider: "),
        ({"auth": {}}, "auth.ssh_user: "),
        ({"auth": {"ssh_user": "-x"}}, "auth.ssh_user: "),
        ({"auth": {"ssh_user": "me", "ssh_private_key": "/no/such/key"}}, "auth.ssh_private_key: /no/such/key"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    path = written(tmp_path, config(**changes))
    with pytest.raises(ConfigError) as refused:
        load_cluster_file(path)
    assert refused.value.message.startswith(f"{path}: {key}")


@pytest.mark.parametrize("text", ["a: [", "- 1\n", ""])
def test_what_is_no_launcher_file_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_cluster_file(path)


def test_ray_accepts_the_shipped_file() -> None:
    prepared = prepare_config(yaml.safe_load(SHIPPED.read_text()))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2


def test_the_shipped_file_sets_on_every_host_what_a_cluster_is_told() -> None:
    commands = "\n".join(yaml.safe_load(SHIPPED.read_text())["setup_commands"])
    exported = {line.split("#")[0].strip() for line in commands.splitlines() if line.startswith("export ")}
    wanted = {f"export {name}={value}" for name, value in CLUSTER.items()}
    assert exported == wanted | {"export PATH=$HOME/paceline/bin:$PATH", "export RAY_AUTH_MODE=disabled"}


def test_the_deployment_asks_for_resources_that_the_shipped_file_gives() -> None:
    application = load_deployment(ROOT / "deployments" / "onprem.yaml")["applications"][0]
    settings = parse_settings(application["args"])
    router = application["deployments"][0]["ray_actor_options"]["resources"]
    for name in (*settings.target.resources, *settings.draft.resources, *router):
        assert name in SHIPPED.read_text()
