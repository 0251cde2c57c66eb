"""What the Router knows of the model: enough to refuse at the edge what no target would take."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from paceline.config import AppSettings
from paceline.errors import InvalidRequest
from paceline.serving.router import Router, _load
from paceline.sessions.window import StreamingWindow
from paceline.types import SamplingParams
from paceline.v1 import inference_pb2 as pb
from tests import tiny
from tests.engine.families import model_of


def settings(folder: Path, name: str, **engine: int) -> AppSettings:
    model_of(name).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(tiny.VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return AppSettings.model_validate({"model": str(folder), "target": {"engine": engine}})


def test_the_target_s_window_is_known(tmp_path: Path) -> None:
    _, windows = _load(settings(tmp_path, "Llama", ctx_size=64, n_keep=2))
    assert windows.resolve(SamplingParams()).window == StreamingWindow(64, 2)


def test_a_family_that_cannot_shift_is_known_by_its_configuration(tmp_path: Path) -> None:
    _, windows = _load(settings(tmp_path, "OPT"))
    with pytest.raises(InvalidRequest, match="ctx_size: no streaming window with this model: opt has learned"):
        windows.resolve(SamplingParams(ctx_size=64))


def test_every_rpc_is_a_method_that_takes_the_context() -> None:
    for method in pb.DESCRIPTOR.services_by_name["Inference"].methods:
        assert list(inspect.signature(getattr(Router, method.name)).parameters) == ["self", "request", "grpc_context"]
