"""Where a model is cut between ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, LlamaConfig

from paceline.errors import ConfigError, ModelError
from paceline.models.cuts import head_ranges, row_ranges, width_ranges
from paceline.models.sharding import ShardPlan, check_size
from tests.engine.families import FAMILIES
from tests.tiny import SHAPE

SIZES = st.integers(1, 8)
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def config_of(name: str, **changed: Any) -> Any:
    family = next(family for family in FAMILIES if family.name == name)
    return CONFIG_MAPPING[family.model_type](**{"tie_word_embeddings": False, **family.config, **changed})


def numbers(ranges: Sequence[range]) -> list[int]:
    return [number for one in ranges for number in one]


@given(kv_heads=st.integers(1, 16), group=st.integers(1, 8), size=SIZES)
def test_ranks_part_the_query_heads_and_cover_the_kv_heads(kv_heads: int, group: int, size: int) -> None:
    try:
        queries, kept = head_ranges(kv_heads * group, kv_heads, size)
    except ConfigError:
        assume(False)
    assert numbers(queries) == list(range(kv_heads * group))
    assert sorted(set(numbers(kept))) == list(range(kv_heads))


@given(kv_heads=st.integers(1, 16), group=st.integers(1, 8), size=SIZES)
def test_every_query_head_is_with_its_kv_head(kv_heads: int, group: int, size: int) -> None:
    try:
        parts = head_ranges(kv_heads * group, kv_heads, size)
    except ConfigError:
        assume(False)
    for queries, kept in zip(*parts, strict=True):
        local = len(queries) // len(kept)
        assert [kept[n // local] for n in range(len(queries))] == [head // group for head in queries]


@given(units=st.integers(8, 200), fixed=st.lists(st.integers(0, 2000), min_size=1, max_size=8), cost=st.integers(1, 9))
def test_ranks_part_a_width_in_groups(units: int, fixed: list[int], cost: int) -> None:
    ranges = width_ranges(32 * units, fixed, cost)
    assert numbers(ranges) == list(range(32 * units))
    assert all(len(one) and one.start % 32 == 0 and one.stop % 32 == 0 for one in ranges)


@given(units=st.integers(8, 40), fixed=st.lists(st.integers(0, 2000), min_size=2, max_size=4), cost=st.integers(1, 9))
def test_no_group_given_to_another_rank_makes_the_largest_share_smaller(
    units: int, fixed: list[int], cost: int
) -> None:
    ranges = width_ranges(32 * units, fixed, cost)
    loads = [load + cost * len(one) for load, one in zip(fixed, ranges, strict=True)]
    largest = loads.index(max(loads))
    movable = len(ranges[largest]) > 32
    assert not movable or all(load + 32 * cost >= max(loads) for load in loads)


@given(width=st.integers(1, 200), size=SIZES)
def test_a_width_that_divides_into_groups_is_cut_evenly(width: int, size: int) -> None:
    ranges = width_ranges(32 * width * size, [5] * size, 3)
    assert {len(one) for one in ranges} == {32 * width}


def test_groups_of_128_stay_together() -> None:
    assert [len(one) for one in width_ranges(1536, [589824, 294912], 1728, 128)] == [640, 896]


@given(rows=st.integers(1, 5000), size=SIZES)
def test_ranks_part_the_vocabulary(rows: int, size: int) -> None:
    assume(rows >= size)
    ranges = row_ranges(rows, size)
    assert numbers(ranges) == list(range(rows))
    assert all(len(one) > 0 for one in ranges)


@given(rows=st.integers(300, 5000), size=SIZES)
def test_rows_begin_at_multiples_of_eight(rows: int, size: int) -> None:
    assert all(one.start % 8 == 0 for one in row_ranges(rows, size))


@given(eighth=st.integers(1, 5000), size=SIZES)
def test_a_vocabulary_that_divides_is_cut_evenly(eighth: int, size: int) -> None:
    assert {len(one) for one in row_ranges(8 * eighth * size, size)} == {8 * eighth}


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["Llama", "Qwen2", "Phi-3", "GLM-4", "Cohere"]),
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 4),
    width=st.integers(8, 40),
    rows=st.integers(64, 600),
    size=st.integers(2, 6),
)
def test_ranks_part_every_weight_that_is_cut(
    family: str, kv_heads: int, group: int, width: int, rows: int, size: int
) -> None:
    heads = kv_heads * group
    shape = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "hidden_size": 16 * heads,
        "intermediate_size": 32 * width,
        "vocab_size": rows,
        "num_hidden_layers": 1,
    }
    try:
        plan = ShardPlan.of(config_of(family, **shape), size)
    except ConfigError:
        assume(False)
    for name in plan.divisions:
        cuts = [cut for rank in range(size) if (cut := plan.pieces(name, rank)) is not None]
        covered = sorted(number for cut in cuts for number in numbers(cut.ranges))
        whole = plan.shapes[name][cuts[0].dim]
        assert sorted(set(covered)) == list(range(whole)), name
        assert len(covered) == whole or size > kv_heads, name


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "works"), [(9, 3, 4, "1, 2, 3, 9"), (4, 1, 3, "1, 2, 4"), (2, 2, 3, "1, 2")]
)
def test_sizes_that_cannot_be_are_refused_with_those_that_can(heads: int, kv_heads: int, size: int, works: str) -> None:
    with pytest.raises(ConfigError, match=f"{size} ranks cannot share {heads} .* {kv_heads} KV heads.*: {works}$") as e:
        head_ranges(heads, kv_heads, size)
    assert e.value.param == "engine.tensor_parallel_size"


def test_three_kv_heads_over_two_ranks_are_two_and_one_with_their_queries() -> None:
    plan = ShardPlan.of(SMOLLM2, 2)
    assert [plan.heads(rank) for rank in range(2)] == [range(6), range(6, 9)]
    assert [plan.kv_heads(rank) for rank in range(2)] == [range(2), range(2, 3)]


def test_a_rank_with_fewer_heads_has_more_of_the_mlp() -> None:
    plan = ShardPlan.of(SMOLLM2, 2)
    widths = [plan.shape("model.layers.0.mlp.down_proj.weight", rank)[1] for rank in range(2)]
    assert widths == [672, 864]
    first, second = (plan.share_bytes(rank, 2) for rank in range(2))
    assert abs(first - second) < 0.01 * first


def test_shares_of_an_even_shape_are_equal() -> None:
    config = LlamaConfig(num_hidden_layers=1, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
    plan = ShardPlan.of(config, 8)
    assert len({plan.share_bytes(rank, 2) for rank in range(8)}) == 1


def test_shares_make_up_the_model_and_what_every_rank_holds_again() -> None:
    plan, whole = ShardPlan.of(SMOLLM2, 3), ShardPlan.of(SMOLLM2, 1)
    shares = sum(plan.share_bytes(rank, 2) for rank in range(3))
    assert shares == whole.share_bytes(0, 2) + 2 * plan.replicated_bytes(2)


def test_a_fused_projection_is_cut_in_each_of_its_parts() -> None:
    cut = ShardPlan.of(config_of("Phi-3"), 2).pieces("model.layers.0.self_attn.qkv_proj.weight", 1)
    assert cut is not None
    assert cut.ranges == (range(24, 48), range(56, 64), range(72, 80))


def test_interleaved_heads_are_one_range() -> None:
    cut = ShardPlan.of(config_of("GPT-NeoX"), 2).pieces("gpt_neox.layers.0.attention.query_key_value.bias", 1)
    assert cut is not None
    assert cut.ranges == (range(72, 120),)


def test_norms_are_whole_on_every_rank() -> None:
    assert ShardPlan.of(SMOLLM2, 2).pieces("model.norm.weight", 1) is None


def test_a_tied_head_has_the_rows_of_the_embedding() -> None:
    plan = ShardPlan.of(SMOLLM2, 2)
    assert plan.pieces("lm_head.weight", 1) == plan.pieces("model.embed_tokens.weight", 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Mixtral", "its experts are not cut yet"), ("OLMo2", "q_norm.weight spans several heads"), ("GPT-2", "neither")],
)
def test_a_family_that_cannot_be_cut_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"{reason}.*; set tensor_parallel_size: 1"):
        ShardPlan.of(config_of(name), 2)


def test_one_rank_is_not_checked() -> None:
    check_size(config_of("Mixtral"), 1)


def test_a_size_is_checked_by_the_configuration_alone() -> None:
    with pytest.raises(ConfigError, match="4 ranks cannot share 6 query heads"):
        check_size(LlamaConfig(**SHAPE), 4)


def test_where_transformers_has_no_plan_deepspeed_names_what_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def tp_parser(model: Any) -> list[tuple[type, list[str]]]:
        return [(type(model.model.layers[0]), [".self_attn.o_proj", ".mlp.down_proj"])]

    module = ModuleType("deepspeed.module_inject.auto_tp")
    module.AutoTP = SimpleNamespace(tp_parser=tp_parser)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.module_inject", ModuleType("deepspeed.module_inject"))
    monkeypatch.setitem(sys.modules, "deepspeed.module_inject.auto_tp", module)
    plan = ShardPlan.of(config_of("StableLM"), 2)
    assert plan.summed[:2] == ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
