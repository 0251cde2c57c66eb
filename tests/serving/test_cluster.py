"""What LocalCluster decides before Ray is there."""

from __future__ import annotations

import socket

import pytest

from paceline.config import default_deployment, parse_settings
from paceline.errors import ConfigError
from paceline.serving.cluster import LocalCluster, _cpus, _custom_resources, share_cores
from tests.serve.conftest import free_port


def threads(shared: dict[str, object]) -> tuple[object, object]:
    settings = parse_settings(shared["applications"][0]["args"])  # type: ignore[index]
    return settings.target.engine.threads, settings.draft.engine.threads


@pytest.mark.parametrize(("cores", "each"), [(1, 1), (2, 1), (8, 2), (64, 16)])
def test_engines_share_the_cores(cores: int, each: int) -> None:
    assert threads(share_cores(default_deployment(), cores)) == (each, each)


def test_a_configured_thread_count_stays() -> None:
    settings = parse_settings({"target": {"engine": {"threads": 3}}})
    assert threads(share_cores(default_deployment(settings), 8)) == (3, 2)


def test_ranks_share_the_cores_as_replicas_do() -> None:
    target = {"num_replicas": 1, "engine": {"tensor_parallel_size": 2}}
    settings = parse_settings({"target": target, "draft": {"num_replicas": 2}})
    assert threads(share_cores(default_deployment(settings), 8)) == (2, 2)


def test_ranks_that_are_told_their_cores_keep_to_them() -> None:
    settings = parse_settings({"target": {"engine": {"tensor_parallel_size": 2, "cores_per_rank": 3}}})
    assert threads(share_cores(default_deployment(settings), 8))[0] == "auto"


def test_a_local_ray_has_the_cpus_of_all_ranks() -> None:
    target = {"num_replicas": 3, "num_cpus": 100, "engine": {"tensor_parallel_size": 2}}
    settings = parse_settings({"target": target, "draft": {"num_replicas": 0}})
    assert _cpus(default_deployment(settings)) >= 600


def custom_resources(settings: dict[str, object]) -> dict[str, float]:
    return _custom_resources(default_deployment(parse_settings(settings)))


def test_a_local_ray_has_the_custom_resources_of_all_ranks() -> None:
    target = {"num_replicas": 3, "resources": {"socket": 0.5}, "engine": {"tensor_parallel_size": 2}}
    draft = {"num_replicas": 2, "resources": {"socket": 1, "fast": 2}}
    assert custom_resources({"target": target, "draft": draft}) == {"socket": 5.0, "fast": 4.0}


def test_a_local_ray_has_the_custom_resources_of_as_many_replicas_as_there_may_be() -> None:
    settings = {
        "target": {"resources": {"socket": 1}},
        "autoscaling": {"enabled": True, "target": {"min_replicas": 1, "max_replicas": 4}},
    }
    assert custom_resources(settings) == {"socket": 4.0}


def test_a_role_without_replicas_needs_none() -> None:
    assert custom_resources({"draft": {"num_replicas": 0, "resources": {"fast": 1}}}) == {}


def test_ranks_that_cannot_work_are_refused_before_anything_starts() -> None:
    target = {"engine": {"tensor_parallel_size": 2, "device": "cuda"}}
    settings = parse_settings({"model": "./nowhere", "target": target})
    config = default_deployment(settings, http_port=free_port(), grpc_port=free_port())
    with pytest.raises(ConfigError, match=r"target\.num_gpus: 2 ranks on GPUs need one each"):
        LocalCluster(config).start()


def test_sharing_leaves_the_callers_config_alone() -> None:
    config = default_deployment()
    share_cores(config, 8)
    assert config == default_deployment()


def test_a_taken_port_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)) as caught:
            LocalCluster(default_deployment(http_port=port)).start()
    assert caught.value.param == "http_options.port"


def test_a_config_without_our_application_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"paceline\.serving\.app:build"):
        LocalCluster({"applications": []})
