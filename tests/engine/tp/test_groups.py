"""All ranks of a replica settle on the same collectives, or refuse them with the reason."""

from __future__ import annotations

import logging

import pytest
import torch

from paceline.config import Collectives
from paceline.engine.tp import groups, shared_memory
from paceline.engine.tp.distributed import GlooGroup, padded, side_by_side
from paceline.engine.tp.groups import check_collectives, open_group
from paceline.engine.tp.rendezvous import agree, told
from paceline.engine.tp.shared_memory import SharedMemoryGroup
from paceline.errors import ConfigError, EngineError
from tests.engine.tp.ranks import CPU, nothing, ranks, store, summed

CUDA = torch.device("cuda")


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "library", lambda: "no C++ compiler")


def test_auto_is_shared_memory_on_one_host() -> None:
    with ranks(2, "auto") as both:
        assert both.do(nothing) == ["SharedMemoryGroup"] * 2


def test_auto_is_gloo_on_several_hosts() -> None:
    with ranks(2, "auto", one_host=False) as both:
        assert both.do(nothing) == ["GlooGroup"] * 2


def test_all_ranks_take_gloo_if_one_cannot_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_compiler(monkeypatch)  # in this process, rank 0's
    with ranks(2, "auto") as both:
        assert both.do(nothing) == ["GlooGroup"] * 2


def test_all_ranks_take_gloo_if_the_memory_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory.os, "memfd_create", refused)
    with ranks(2, "auto") as both:
        assert both.do(nothing) == ["GlooGroup"] * 2


def refused(name: str) -> int:
    raise PermissionError(f"{name}: not here")


def test_the_reason_for_gloo_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without_a_compiler(monkeypatch)
    with caplog.at_level(logging.WARNING), ranks(1, "auto"):
        assert "slower than shared memory: rank 0: no C++ compiler" in caplog.text


def test_shared_memory_that_is_asked_for_and_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_compiler(monkeypatch)
    with store() as (mine, _), pytest.raises(ConfigError, match=r"engine.collectives is shm.*no C\+\+ compiler"):
        open_group(mine, 0, 1, collectives="shm", device=CPU, timeout_s=5.0, one_host=True)


@pytest.mark.parametrize(("collectives", "device"), [("shm", CUDA), ("gloo", CUDA), ("peer", CPU), ("nccl", CPU)])
def test_collectives_of_another_device_are_refused(collectives: Collectives, device: torch.device) -> None:
    with pytest.raises(ConfigError) as caught:
        check_collectives(collectives, device, one_host=True)
    assert caught.value.param == "engine.collectives"


@pytest.mark.parametrize(("collectives", "device"), [("shm", CPU), ("peer", CUDA)])
def test_shared_memory_of_several_hosts_is_refused(collectives: Collectives, device: torch.device) -> None:
    with pytest.raises(ConfigError, match="the ranks are on several hosts"):
        check_collectives(collectives, device, one_host=False)


@pytest.mark.parametrize("collectives", ["shm", "gloo"])
def test_one_store_serves_several_groups_one_after_another(collectives: Collectives) -> None:
    with store() as (mine, _):
        for _ in range(2):
            group = open_group(mine, 0, 1, collectives=collectives, device=CPU, timeout_s=5.0, one_host=True)
            assert summed(group, (3,)) == pytest.approx(summed(group, (3,)))
            group.close()


@pytest.mark.parametrize("collectives", ["shm", "gloo"])
def test_a_rank_that_never_comes_ends_the_opening(collectives: Collectives) -> None:
    with store() as (mine, _), pytest.raises(EngineError, match="join"):
        open_group(mine, 0, 2, collectives=collectives, device=CPU, timeout_s=1.0, one_host=True)


def test_the_rank_that_never_came_is_named() -> None:
    with store() as (mine, _), pytest.raises(EngineError, match="rank 1 did not join within 1 s"):
        open_group(mine, 0, 3, collectives="auto", device=CPU, timeout_s=1.0, one_host=True)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_agree_on_the_first_trouble(rank: int) -> None:
    troubles = [None, "no compiler", "no memory"]
    with store() as (mine, _):
        for other, trouble in enumerate(troubles):
            mine.set(f"topic {other}", trouble or "")
        assert agree(mine, "topic", rank, 3, troubles[rank], 5.0) == "rank 1: no compiler"


def test_a_key_that_nobody_sets_ends_with_who_should_have() -> None:
    with store() as (mine, _), pytest.raises(EngineError, match="rank 7 did not join"):
        told(mine, "key", 7, 0.1)


class Peers:
    """Stands for the GPUs' own kernel."""

    def __init__(self, trouble: str | None) -> None:
        self.trouble = trouble

    def missing(self, device: torch.device) -> str | None:
        return self.trouble

    def __call__(self, *arguments: object) -> str:
        return "peer"


@pytest.mark.parametrize(("trouble", "taken"), [(None, "peer"), ("no NVLink", "nccl")])
def test_gpus_take_nccl_where_ours_does_not_run(monkeypatch: pytest.MonkeyPatch, trouble: str, taken: str) -> None:
    monkeypatch.setattr(groups, "_peer_groups", lambda: Peers(trouble))
    monkeypatch.setattr(groups, "NcclGroup", lambda *_: "nccl")
    with store() as (mine, _):
        opened = open_group(mine, 0, 1, collectives="auto", device=CUDA, timeout_s=5.0, one_host=True)
    assert opened == taken


def test_ranks_of_unequal_widths_send_the_same_shape() -> None:
    assert padded(torch.ones(2, 3), 5).tolist() == [[1, 1, 1, 0, 0]] * 2


def test_padding_is_cut_off_again() -> None:
    parts = [padded(torch.full((1, width), float(width)), 3) for width in (3, 1)]
    assert side_by_side(parts, [3, 1]).tolist() == [[3, 3, 3, 1]]


@pytest.mark.parametrize("kind", [GlooGroup, SharedMemoryGroup])
def test_closing_twice_is_harmless(kind: type) -> None:
    collectives: Collectives = "gloo" if kind is GlooGroup else "shm"
    with ranks(1, collectives) as alone:
        alone.group.close()
        alone.group.close()
        assert type(alone.group) is kind
