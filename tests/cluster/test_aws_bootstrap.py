"""Ray's own launcher code on aws.yaml, against an EC2 and an IAM that moto plays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.cluster.launcher import AWS, PLACEHOLDER, Config, node_types, read

pytestmark = pytest.mark.slow  # moto takes many seconds to read the types of instances

UBUNTU = "099720109477"
"""The account that publishes Ubuntu's images."""
WORKER = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty account and a home folder for the key pair. Nothing has to propagate, so nobody waits for it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setattr(time, "sleep", lambda _: None)
        with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
            yield home
            resource_cache.cache_clear()


@pytest.fixture(scope="module")
def config(account: Path) -> Config:
    """aws.yaml with an image that exists, as `ray up` makes it complete."""
    found = read(AWS)
    region = found["provider"]["region"]
    image = boto3.client("ec2", region).describe_images(Owners=[UBUNTU])["Images"][0]["ImageId"]
    for each in node_types(found).values():
        assert each["node_config"]["ImageId"] == PLACEHOLDER
        each["node_config"]["ImageId"] = image
    filled = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(found))
    validate_config(filled)
    completed: Config = AWSNodeProvider.bootstrap_config(filled)
    return completed


@pytest.fixture
def provider(config: Config) -> Iterator[AWSNodeProvider]:
    made = AWSNodeProvider(config["provider"], config["cluster_name"])
    yield made
    if left := made.non_terminated_nodes({}):
        made.terminate_nodes(left)


def start(provider: AWSNodeProvider, config: Config, kind: str) -> str:
    """A worker of a type, as the autoscaler asks for it."""
    tags = {
        **WORKER,
        TAG_RAY_USER_NODE_TYPE: kind,
        TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
        TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-worker",
        TAG_RAY_LAUNCH_CONFIG: "hash",
    }
    provider.create_node(node_types(config)[kind]["node_config"], tags, 1)
    (node,) = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: kind})
    return str(node)


def instance(config: Config, node: str) -> dict[str, Any]:
    """What EC2 says of it."""
    client = boto3.client("ec2", config["provider"]["region"])
    found: dict[str, Any] = client.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]
    return found


@pytest.mark.parametrize(
    ("kind", "resources"),
    [
        ("target", {"CPU": 8, "GPU": 1, "paceline_target": 1}),
        ("draft", {"CPU": 0, "GPU": 1, "paceline_draft": 1}),
    ],
)
def test_ray_adds_what_aws_says_a_node_has(config: Config, kind: str, resources: dict[str, int]) -> None:
    found = node_types(config)[kind]["resources"]
    assert {name: found.get(name) for name in resources} == resources


def test_the_head_may_start_instances_and_no_worker_may(config: Config) -> None:
    profiles = [each["node_config"].get("IamInstanceProfile") for each in node_types(config).values()]
    assert (profiles, "Arn" in config["head_node"]["IamInstanceProfile"]) == ([None, None, None], True)


def test_the_key_pair_is_its_owner_s_alone(config: Config, account: Path) -> None:
    key = Path(config["auth"]["ssh_private_key"])
    assert (key.parent, key.stat().st_mode & 0o777) == (account / ".ssh", 0o600)


def test_from_outside_there_is_ssh_and_nothing_else(config: Config) -> None:
    (group,) = {name for each in node_types(config).values() for name in each["node_config"]["SecurityGroupIds"]}
    rules = boto3.resource("ec2", config["provider"]["region"]).SecurityGroup(group).ip_permissions
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"]] == [(22, 22)]


def test_nodes_reach_each_other_on_every_port(config: Config) -> None:
    (group,) = {name for each in node_types(config).values() for name in each["node_config"]["SecurityGroupIds"]}
    rules = boto3.resource("ec2", config["provider"]["region"]).SecurityGroup(group).ip_permissions
    inside = [rule["IpProtocol"] for rule in rules if [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group]]
    assert inside == ["-1"]


def test_a_draft_s_node_is_a_spot_instance(provider: AWSNodeProvider, config: Config) -> None:
    assert instance(config, start(provider, config, "draft")).get("InstanceLifecycle") == "spot"


def test_a_target_s_node_is_not(provider: AWSNodeProvider, config: Config) -> None:
    assert instance(config, start(provider, config, "target")).get("InstanceLifecycle") is None


def test_a_node_that_goes_is_terminated_not_stopped(provider: AWSNodeProvider, config: Config) -> None:
    node = start(provider, config, "target")
    provider.terminate_nodes([node])
    assert instance(config, node)["State"]["Name"] == "terminated"
