"""The cluster launcher files: what Ray, EC2 and Compute Engine say to them, and that nothing in them has drifted."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from paceline.cli.deployment import Overrides, read_deployment
from paceline.config import AppSettings
from paceline.serving.environment import CLUSTER as ENVIRONMENT
from tests.cluster import compute_schema
from tests.cluster.launcher import (
    AWS,
    CLOUDS,
    CLUSTER,
    GCP,
    LAUNCHER_FILES,
    PLACEHOLDER,
    ROOT,
    aws_complaints,
    commands,
    gcp_complaints,
    node_types,
    read,
    unread_provider_keys,
)

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_ENV = CLUSTER / "ray.env"
GPU_CONFIG = ROOT / "deployments" / "cluster-gpu.yaml"
PINNED = re.compile(r"paceline(?:\[([a-z0-9,]+)\])?==(\S+?)['\"\s]")

each_file = pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
each_cloud = pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
each_pool = pytest.mark.parametrize("pool", ["target", "draft"])


@pytest.fixture(scope="module")
def settings() -> AppSettings:
    """Of the application that is deployed on these clusters."""
    return read_deployment(GPU_CONFIG, Overrides()).settings


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What a shell has that read ray.env, started as Ray's command runner starts one."""
    script = f'export OMP_NUM_THREADS=1; . "{RAY_ENV}"; env -0'
    bare = {"HOME": "/home/ubuntu", "PATH": "/usr/bin:/bin"}
    found = subprocess.run(["/bin/bash", "-c", script], env=bare, check=True, capture_output=True, timeout=10)
    return dict(entry.split("=", 1) for entry in found.stdout.decode().split("\0") if entry)


# What its readers say.


@each_file
def test_ray_accepts_it(path: Path) -> None:
    config = prepare_config(read(path))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@each_file
def test_ray_reads_every_key_of_its_provider(path: Path) -> None:
    assert unread_provider_keys(read(path)) == set()


@each_cloud
def test_a_misspelt_key_of_the_provider_is_found(path: Path) -> None:
    config = read(path)
    config["provider"]["regoin"] = config["provider"].pop("region")
    validate_config(prepare_config(config))  # Ray itself takes it
    assert unread_provider_keys(config) == {"regoin"}


@pytest.mark.parametrize("name", ["head", "target", "draft"])
def test_ec2_accepts_what_aws_yaml_asks_for(name: str) -> None:
    assert aws_complaints(node_types(read(AWS))[name]["node_config"]) == ""


def test_a_misspelt_key_of_an_ec2_node_is_found() -> None:
    config = {**node_types(read(AWS))["head"]["node_config"], "InstanceMarketOption": {"MarketType": "spot"}}
    assert "InstanceMarketOption" in aws_complaints(config)


def test_a_wrong_type_in_an_ec2_node_is_found() -> None:
    config = {**node_types(read(AWS))["head"]["node_config"]}
    config["BlockDeviceMappings"] = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]
    assert "VolumeSize" in aws_complaints(config)


@pytest.mark.parametrize("name", ["head", "target", "draft"])
def test_compute_engine_accepts_what_gcp_yaml_asks_for(name: str) -> None:
    assert gcp_complaints(node_types(read(GCP))[name]["node_config"]) == []


def test_a_misspelt_key_of_a_compute_engine_node_is_found() -> None:
    config = {**node_types(read(GCP))["draft"]["node_config"]}
    config["scheduling"] = {"provisioningModell": "SPOT"}
    assert gcp_complaints(config) == [
        "Additional properties are not allowed ('provisioningModell' was unexpected)",
    ]


def test_a_wrong_value_in_a_compute_engine_node_is_found() -> None:
    config = {**node_types(read(GCP))["draft"]["node_config"], "scheduling": {"provisioningModel": "spot"}}
    assert "'spot' is not one of" in gcp_complaints(config)[0]


def test_the_stored_schema_is_google_s_own() -> None:
    pytest.importorskip("googleapiclient", reason="needs google-api-python-client, which brings Google's description")
    made = compute_schema.schema(compute_schema.installed())
    stored = json.loads(compute_schema.STORED.read_text())
    if made["$comment"] != stored["$comment"]:
        pytest.skip(f"another revision is installed: {made['$comment']}")
    assert stored == made


@each_file
def test_its_commands_are_shell(path: Path) -> None:
    for command in commands(read(path)):
        subprocess.run(["/bin/bash", "-n", "-c", command], check=True, timeout=10)


# What must be alike.


@each_cloud
def test_nodes_install_the_version_of_this_tree(path: Path) -> None:
    found = [match[2] for line in commands(read(path)) for match in PINNED.finditer(f"{line} ")]
    assert found == [PROJECT["version"]]


@each_cloud
def test_nodes_install_extras_that_exist(path: Path) -> None:
    (match,) = [match for line in commands(read(path)) for match in PINNED.finditer(f"{line} ")]
    assert set(match[1].split(",")) <= PROJECT["optional-dependencies"].keys()


@each_cloud
def test_everything_is_installed_under_the_constraints(path: Path) -> None:
    installs = [line for line in commands(read(path)) if "pip install" in line]
    assert [line for line in installs if "-c ~/constraints.txt" not in line] == []


@each_cloud
def test_what_nodes_are_given_is_there(path: Path) -> None:
    local = [source for source in read(path)["file_mounts"].values() if not source.startswith("~")]
    assert [source for source in local if not (ROOT / source).is_file()] == []


def test_both_clouds_set_their_nodes_up_alike() -> None:
    aws, gcp = read(AWS), read(GCP)
    gcp["setup_commands"][-1] = gcp["setup_commands"][-1].replace("[gpu,", "[aws,gpu,")
    keys = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "file_mounts")
    assert {key: aws[key] for key in keys} == {key: gcp[key] for key in keys}


@each_cloud
def test_ray_is_started_with_the_environment(path: Path) -> None:
    config = read(path)
    starting = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert [line for line in starting if not line.startswith(". ~/ray.env; ")] == []


def test_the_environment_is_what_serving_wants(environment: dict[str, str]) -> None:
    assert {name: environment.get(name) for name in ENVIRONMENT} == ENVIRONMENT


def test_the_cluster_asks_for_its_token(environment: dict[str, str]) -> None:
    assert environment["RAY_AUTH_MODE"] == "token"


def test_no_replica_inherits_one_thread(environment: dict[str, str]) -> None:
    assert "OMP_NUM_THREADS" not in environment


def test_the_installed_ray_is_found_first(environment: dict[str, str]) -> None:
    assert environment["PATH"].split(":")[0] == "/home/ubuntu/paceline/bin"


@each_cloud
def test_the_token_is_nobody_else_s(path: Path) -> None:
    assert read(path)["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"


# What goes where.


@each_cloud
def test_only_drafts_are_on_nodes_that_may_be_taken_back(path: Path) -> None:
    spot = {name for name, each in node_types(read(path)).items() if "spot" in json.dumps(each["node_config"]).lower()}
    assert spot == {"draft"}


@each_cloud
def test_a_router_finds_no_room_on_a_draft_node(path: Path, settings: AppSettings) -> None:
    assert (node_types(read(path))["draft"]["resources"]["CPU"], settings.draft.num_cpus) == (0, 0)


@each_cloud
@each_pool
def test_replicas_ask_for_what_only_their_nodes_have(path: Path, pool: str, settings: AppSettings) -> None:
    types = node_types(read(path))
    (wanted,) = getattr(settings, pool).resources
    assert [name for name, each in types.items() if wanted in each["resources"]] == [pool]


@each_cloud
@each_pool
def test_there_is_a_node_for_each_replica(path: Path, pool: str, settings: AppSettings) -> None:
    most = getattr(settings.autoscaling, pool).max_replicas
    assert node_types(read(path))[pool]["max_workers"] == most


@each_cloud
def test_the_cluster_may_have_all_its_workers(path: Path) -> None:
    config = read(path)
    assert config["max_workers"] == sum(each.get("max_workers", 0) for each in node_types(config).values())


@each_pool
def test_a_replica_fits_on_its_compute_engine_node(pool: str, settings: AppSettings) -> None:
    has, asked = node_types(read(GCP))[pool]["resources"], getattr(settings, pool)
    wants = {"CPU": asked.num_cpus, "GPU": asked.num_gpus, **asked.resources}
    assert {name: has.get(name, 0) for name in wants if has.get(name, 0) < wants[name]} == {}


@each_cloud
def test_nothing_is_paid_for_before_something_is_deployed(path: Path) -> None:
    assert [each.get("min_workers", 0) for each in node_types(read(path)).values()] == [0, 0, 0]


def test_nothing_is_paid_for_after_ray_down_on_aws() -> None:
    assert read(AWS)["provider"]["cache_stopped_nodes"] is False


def test_nothing_is_paid_for_after_ray_down_on_gcp() -> None:
    disks = [disk["autoDelete"] for each in node_types(read(GCP)).values() for disk in each["node_config"]["disks"]]
    assert disks == [True, True, True]


def test_the_image_is_named_in_one_place_for_all_nodes() -> None:
    text = AWS.read_text()
    images = {each["node_config"]["ImageId"] for each in node_types(yaml.safe_load(text)).values()}
    assert (images, text.count(PLACEHOLDER)) == ({PLACEHOLDER}, 1)


def test_the_readme_knows_the_image_s_place() -> None:
    assert PLACEHOLDER in (CLUSTER / "README.md").read_text()
