"""lm-eval's own evaluator over our engine, on tasks written here; skipped where lm-eval is not installed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from paceline.cli.app import app
from paceline.config import EngineSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.errors import ConfigError
from tests import tiny
from tests.bench.folders import words, write_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'paceline[eval]')")

from lm_eval.api.instance import Instance

from paceline.bench.lm_tasks import EngineLM, TaskResult, run_tasks

MODEL = tiny.tiny_llama()
QUESTIONS = [words(6, seed=n) for n in range(5)]
CHOICES = ["w11", "w12 w13", "w14"]
CHOICE_TASK = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER_TASK = """\
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def log_likelihood(context: str, continuation: str) -> float:
    return log_likelihood_of(ids(context), ids(continuation))


def log_likelihood_of(seen: list[int], following: list[int]) -> float:
    """By the model's own code."""
    logits = MODEL(input_ids=torch.tensor([seen + following])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(seen) - 1 + n, token]) for n, token in enumerate(following))


def likeliest(question: str) -> int:
    scores = [log_likelihood(question, choice) for choice in CHOICES]
    return scores.index(max(scores))


def answer(question: str) -> str:
    """What greedy decoding says, up to the end of the text."""
    found = tiny.generate(MODEL, tuple(ids(question)), 4)
    return " ".join(f"w{token}" for token in (found[: found.index(2)] if 2 in found else found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, EngineSettings(device="cpu", threads=1, kv_tokens=512, linear_backend="torch"))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first three questions are labelled as the model would answer, the last two otherwise."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for n, question in enumerate(QUESTIONS):
        right = n < 3
        label = likeliest(question) if right else (likeliest(question) + 1) % 3
        said = answer(question) if right else "something else"
        rows.append({"question": question, "choices": CHOICES, "label": label, "answer": said})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choose.yaml").write_text(CHOICE_TASK.format(data=data))
    (folder / "answer.yaml").write_text(ANSWER_TASK.format(data=data))
    return folder


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_accuracy_of_choices(model: LoadedModel, tasks: Path) -> None:
    found = run_tasks(model, ["choose"], tasks)
    assert found == [TaskResult("choose", "acc", 0.6, pytest.approx(math.sqrt(0.3 / 5)))]


def test_accuracy_of_greedy_answers(model: LoadedModel, tasks: Path) -> None:
    assert [(one.metric, one.value) for one in run_tasks(model, ["answer"], tasks)] == [("exact_match", 0.6)]


def test_a_limit_takes_the_first_documents(model: LoadedModel, tasks: Path) -> None:
    assert [one.value for one in run_tasks(model, ["choose"], tasks, limit=3)] == [1.0]


def test_every_choice_is_counted(model: LoadedModel, tasks: Path) -> None:
    told: list[int] = []
    run_tasks(model, ["choose"], tasks, on_request=lambda done, _: told.append(done))
    assert told == list(range(1, 16))


def test_the_likelihood_of_a_continuation_is_the_models_own(model: LoadedModel) -> None:
    (found,) = EngineLM(model).loglikelihood([asked("loglikelihood", QUESTIONS[0], " w12 w13")])
    assert found[0] == pytest.approx(log_likelihood(QUESTIONS[0], "w12 w13"), abs=1e-3)


def test_a_rolling_likelihood_begins_behind_the_first_special_token(model: LoadedModel) -> None:
    (found,) = EngineLM(model).loglikelihood_rolling([asked("loglikelihood_rolling", QUESTIONS[0])])
    assert found == pytest.approx(log_likelihood_of([1], ids(QUESTIONS[0])), abs=1e-3)


def test_the_command_reports_tasks_alone(model: LoadedModel, tasks: Path, folder: Path) -> None:
    options = ["--set", "device=cpu", "--set", "threads=1", "--json"]
    result = CliRunner().invoke(app, ["eval", str(folder), "--tasks", "choose", "--tasks-path", str(tasks), *options])
    found = json.loads(result.stdout)
    assert (found["tasks"][0]["value"], "kl" in found) == (0.6, False)


def test_an_unknown_task_is_named(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="--tasks: no-such-task: no such task"):
        run_tasks(model, ["no-such-task"])


def test_a_task_without_its_data_is_named_and_fetches_nothing(model: LoadedModel, tasks: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks: arc_easy: its data is not on this machine"):
        run_tasks(model, ["arc_easy"])


def test_a_folder_of_tasks_that_is_not_there_is_named(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks-path"):
        run_tasks(model, ["choose"], tmp_path / "none")
