"""What is reserved for a replica of several ranks, and which ranks are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.config import AppSettings, parse_settings
from paceline.errors import ConfigError
from paceline.serving import bundles
from tests import tiny
from tests.engine.families import model_of


def node(cpus: float = 0, gpus: float = 0, *, alive: bool = True, **labels: str) -> dict[str, Any]:
    """As `ray.nodes()` tells of one."""
    resources = {name: amount for name, amount in {"CPU": cpus, "GPU": gpus}.items() if amount}
    return {"Alive": alive, "Resources": resources, "Labels": {"ray.io/node-id": "n", **labels}}


def settings(size: int = 2, *, model: str = "./nowhere", device: str = "auto", **target: Any) -> AppSettings:
    engine = {"tensor_parallel_size": size, "device": device}
    return parse_settings({"model": model, "target": {"engine": engine, **target}, "draft": {"num_replicas": 0}})


def refusal(asked: AppSettings, *nodes: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        bundles.check(asked, nodes or None)
    return caught.value


def test_a_replica_of_one_rank_has_no_bundles() -> None:
    assert bundles.options(settings(1, num_cpus=4).target) == {
        "ray_actor_options": {"num_cpus": 4, "num_gpus": 0},
        "health_check_period_s": bundles.HEALTH_CHECK_PERIOD_S,
    }


def test_cpu_ranks_are_on_one_host_with_a_bundle_each() -> None:
    made = bundles.options(settings(3, num_cpus=4).target)
    assert (made["placement_group_bundles"], made["placement_group_strategy"]) == ([{"CPU": 4}] * 3, "STRICT_PACK")


def test_gpu_ranks_may_be_on_several_hosts() -> None:
    made = bundles.options(settings(2, num_cpus=1, num_gpus=1).target)
    assert made["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}] * 2
    assert made["placement_group_strategy"] == "PACK"


def test_the_replica_itself_fits_in_its_bundle() -> None:
    made = bundles.options(settings(2, num_cpus=0, num_gpus=1).target)
    assert made["placement_group_bundles"][0] == {"GPU": 1}
    assert made["ray_actor_options"] == {"num_cpus": 0, "num_gpus": 1}


def test_ranks_on_gpus_need_one_each() -> None:
    error = refusal(settings(2, device="cuda"))
    assert error.param == "target.num_gpus"
    assert "2 ranks on GPUs need one each, and 0 is reserved for a rank; set target.num_gpus to 1" in error.message


def test_ranks_cannot_share_a_gpu() -> None:
    assert refusal(settings(2, num_gpus=0.5)).param == "target.num_gpus"


def test_one_rank_may_have_a_part_of_a_gpu() -> None:
    bundles.check(settings(1, num_gpus=0.5), [node(4)])


def test_ranks_for_which_nothing_is_reserved_are_refused() -> None:
    assert refusal(settings(2, num_cpus=0)).param == "target.num_cpus"


def test_a_size_that_the_heads_cannot_be_cut_into_is_refused_with_those_that_can(tmp_path: Path) -> None:
    tiny.tiny_llama().save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    error = refusal(settings(4, model=str(tmp_path)))
    assert error.param == "target.engine.tensor_parallel_size"
    assert error.message == (
        "target.engine.tensor_parallel_size: 4 ranks cannot share 6 query heads over 2 KV heads; these can: 1, 2, 6"
    )


def test_a_family_that_is_not_cut_is_refused(tmp_path: Path) -> None:
    model_of("Mixtral").save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    assert refusal(settings(2, model=str(tmp_path))).param == "target.engine.tensor_parallel_size"


def test_a_model_that_is_not_on_this_machine_is_left_to_the_replicas() -> None:
    bundles.check(settings(7))


def test_a_draft_is_checked_as_well() -> None:
    engine = {"tensor_parallel_size": 2, "device": "cuda"}
    asked = parse_settings({"model": "./nowhere", "draft": {"num_replicas": 1, "engine": engine}})
    assert refusal(asked).param == "draft.num_gpus"


def test_a_draft_that_is_not_deployed_is_not_checked() -> None:
    engine = {"tensor_parallel_size": 2, "device": "cuda"}
    bundles.check(parse_settings({"draft": {"num_replicas": 0, "engine": engine}}))


def test_cpu_ranks_that_no_single_node_holds_are_refused() -> None:
    error = refusal(settings(2, num_cpus=6), node(8), node(10), node(64, alive=False))
    assert error.param == "target.num_cpus"
    assert "no node of the cluster has 12; the largest has 10" in error.message


def test_cpu_ranks_that_one_node_holds_are_not() -> None:
    bundles.check(settings(2, num_cpus=6), [node(2), node(12)])


def test_more_gpu_ranks_than_gpus_are_refused() -> None:
    error = refusal(settings(4, num_gpus=1), node(8, 2), node(8, 1))
    assert error.param == "target.engine.tensor_parallel_size"
    assert "with 3 GPUs on 2 nodes, has room for 3" in error.message


def test_gpus_of_several_nodes_count_together() -> None:
    bundles.check(settings(4, num_gpus=1), [node(8, 2), node(8, 2)])


def test_gpu_ranks_need_their_cpus_on_the_same_node() -> None:
    assert "has room for 1" in refusal(settings(2, num_cpus=8, num_gpus=1), node(8, 2), node(64)).message


def test_where_nodes_may_be_added_the_bundles_may_wait_for_them() -> None:
    bundles.check(settings(2, num_cpus=6), [node(8, **{bundles.NODE_GROUP: "workers"})])


def test_custom_resources_keep_a_replica_to_nodes_that_have_them() -> None:
    made = bundles.options(settings(1, num_cpus=4, resources={"paceline_target": 1}).target)
    assert made["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 0, "resources": {"paceline_target": 1}}


def test_each_rank_reserves_the_custom_resources() -> None:
    made = bundles.options(settings(2, num_cpus=4, resources={"paceline_target": 0.5}).target)
    assert made["placement_group_bundles"] == [{"CPU": 4, "paceline_target": 0.5}] * 2


def test_rays_own_resources_are_no_custom_ones() -> None:
    with pytest.raises(ConfigError, match=r"target.resources: .*GPU is Ray's own; num_cpus and num_gpus reserve those"):
        settings(1, resources={"GPU": 1})
