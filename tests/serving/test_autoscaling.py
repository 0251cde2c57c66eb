"""What deployments say to Serve when they scale, and what a Serve config names as their policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from paceline.config import default_deployment, load_deployment, parse_settings
from paceline.config_autoscaling import ReplicaRange
from paceline.serving.app import build
from paceline.serving.autoscaling import Held
from paceline.serving.cluster import _cpus, scaled, share_cores
from paceline.serving.journal import autoscaling_status
from tests.serving.test_scaling import ARGS, TARGET, Store, context

ENABLED: dict[str, Any] = {"enabled": True, "target": {"min_replicas": 2, "max_replicas": 6}}
CONFIGS = sorted((Path(__file__).parents[2] / "deployments").glob("*.yaml"))


def deployments(**args: Any) -> dict[str, Any]:
    """Of the built application, by name."""
    found: dict[str, Any] = {}

    def walk(app: Any) -> None:
        deployment = app._bound_deployment
        found[deployment.name] = deployment
        for each in deployment.init_args:
            if hasattr(each, "_bound_deployment"):
                walk(each)

    walk(build(parse_settings(args)))
    return found


def scaling(**args: Any) -> AutoscalingConfig:
    config = deployments(**args)["Target"]._deployment_config.autoscaling_config
    assert isinstance(config, AutoscalingConfig)
    return config


def test_without_autoscaling_there_are_as_many_replicas_as_set() -> None:
    target = deployments(target={"num_replicas": 3})["Target"]
    assert target.num_replicas == 3
    assert target._deployment_config.autoscaling_config is None


def test_bounds_and_the_first_number_are_those_of_the_settings() -> None:
    found = scaling(autoscaling=ENABLED, target={"num_replicas": 3})
    assert (found.min_replicas, found.initial_replicas, found.max_replicas) == (2, 3, 6)


@pytest.mark.parametrize(("num_replicas", "first"), [(1, 2), (4, 4), (9, 6)])
def test_the_first_number_is_within_the_bounds(num_replicas: int, first: int) -> None:
    settings = parse_settings({"autoscaling": ENABLED, "target": {"num_replicas": num_replicas}})
    assert settings.target_replicas == ReplicaRange(2, first, 6)


def test_serve_adds_no_delays_of_its_own() -> None:
    found = scaling(autoscaling=ENABLED)
    assert (found.upscale_delay_s, found.downscale_delay_s, found.downscale_to_zero_delay_s) == (0, 0, 0)


def test_replicas_report_once_an_interval() -> None:
    found = scaling(autoscaling={**ENABLED, "interval_s": 2.0})
    assert (found.metrics_interval_s, found.look_back_period_s) == (2.0, 10.0)


def test_the_policy_finds_the_settings_and_no_secret_with_the_deployment() -> None:
    args: dict[str, Any] = {"autoscaling": ENABLED, "sessions": {"store": "redis://:secret@host/0"}}
    kwargs = scaling(**args).policy.policy_kwargs
    assert kwargs["autoscaling"] == ENABLED
    assert "secret" not in str(kwargs)


def test_drafts_may_begin_with_none_and_come_later() -> None:
    drafts = deployments(autoscaling=ENABLED, draft={"num_replicas": 0})["Draft"]._deployment_config.autoscaling_config
    assert (drafts.min_replicas, drafts.initial_replicas, drafts.max_replicas) == (0, 0, 4)


def test_the_policies_can_be_pickled_as_serve_does() -> None:
    for name in ("Autoscaler", "Held"):
        policy = AutoscalingPolicy(policy_function=f"paceline.serving.autoscaling:{name}")
        assert policy.get_policy().__name__ == name


def test_without_the_applications_policy_a_deployment_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    held = Held(**ARGS)
    assert [held(context(TARGET, 3))[0] for _ in range(3)] == [3, 3, 3]
    (record,) = caplog.records
    assert "add" in record.message.lower() and "paceline.serving.autoscaling:Autoscaler" in record.message


def test_serving_locally_adds_the_policy() -> None:
    config = default_deployment(parse_settings({"autoscaling": ENABLED}))
    (application,) = scaled(config)["applications"]
    assert application["autoscaling_policy"] == {"policy_function": "paceline.serving.autoscaling:Autoscaler"}
    assert "autoscaling_policy" not in config["applications"][0]


def test_nothing_is_added_where_nothing_scales() -> None:
    assert "autoscaling_policy" not in scaled(default_deployment())["applications"][0]


def test_a_local_ray_has_cpus_and_cores_for_the_most_there_may_be() -> None:
    settings = parse_settings({"autoscaling": ENABLED, "target": {"num_cpus": 50}, "draft": {"num_cpus": 25}})
    config = default_deployment(settings)
    assert _cpus(config) >= 6 * 50 + 4 * 25
    shared = parse_settings(share_cores(config, 40)["applications"][0]["args"])
    assert (shared.target.engine.threads, shared.draft.engine.threads) == (4, 4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_takes_every_config(path: Path) -> None:
    ServeDeploySchema.model_validate(scaled(load_deployment(path)))


async def test_without_an_autoscaler_what_is_wanted_is_what_is_set() -> None:
    settings = parse_settings({"target": {"num_replicas": 3}, "draft": {"num_replicas": 1}})
    told = await autoscaling_status(settings, "app", Store())
    assert told == {"enabled": False, "target": {"wanted": 3}, "draft": {"wanted": 1}}


async def test_with_one_it_is_what_its_journal_says() -> None:
    store = Store()
    store.put("autoscaling/app", b'{"target": {"wanted": 5, "text": "busy"}, "errors": 0}')
    told = await autoscaling_status(parse_settings({"autoscaling": ENABLED}), "app", store)
    assert told["enabled"] is True
    assert told["target"] == {"wanted": 5, "text": "busy"}
    assert told["draft"] == {"wanted": 2}


@pytest.mark.parametrize("pool", ["target", "draft"])
def test_bounds_that_cross_are_refused(pool: str) -> None:
    from paceline.errors import ConfigError

    with pytest.raises(ConfigError, match=rf"autoscaling\.{pool}.*min_replicas 5 is more than max_replicas 4"):
        parse_settings({"autoscaling": {pool: {"min_replicas": 5}}})
