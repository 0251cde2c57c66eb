"""Fused layers of two ranks, on the CPU, against the whole model's logits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which also interprets its kernels on a CPU, is not installed")

from paceline.engine.families import runner_for
from paceline.engine.gpu.attention import PagedAttention
from paceline.engine.gpu.fused import FusedBody
from paceline.engine.gpu.runner import DeviceRunner
from paceline.engine.tp.layers import join_ranks
from paceline.models import load_config
from paceline.models.sharding import ShardPlan
from paceline.models.shares import load_share
from tests.engine.gpu.test_runner import TOLERANCE, expected, logits_of, model_of, worst
from tests.engine.tp.threads import ThreadGroup, on_all_ranks, taking_turns

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")


class OneAtATime(ThreadGroup):
    """Ranks take turns but where they wait for each other: Triton's interpreter is for one thread."""

    turn = threading.Lock()

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.turn.release()
        try:
            return super()._exchange(x)
        finally:
            self.turn.acquire()


def share_of(path: Path, group: ThreadGroup) -> DeviceRunner:
    plan = ShardPlan.of(load_config(path), group.size)
    model = load_share(path, plan, group.rank, dtype=torch.float16, device="cpu")
    join_ranks(model, plan, group)
    own = runner_for(model)
    body = FusedBody(own.model, PagedAttention("triton", torch.device("cpu")), group=group)
    return DeviceRunner(
        body, key_shift="not here", geometry=own.kv_geometry(), max_rows=64, max_sequences=4, graphs=False
    )


@pytest.mark.parametrize("family", ["qwen2", "granite"])
def test_ranks_of_fused_layers_give_the_models_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(family, torch.float16).save_pretrained(tmp_path)
    monkeypatch.setattr("tests.engine.tp.threads.ThreadGroup", OneAtATime)

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        with OneAtATime.turn:
            return logits_of(share_of(tmp_path, group))

    with taking_turns():
        first, second = on_all_ranks(2, work)
    assert worst(first, expected(family, torch.float16)) < TOLERANCE[torch.float16]
    assert all(map(torch.equal, first, second))
