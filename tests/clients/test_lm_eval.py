"""lm-evaluation-harness over its local-completions, on a task of two lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.server import MODEL

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytestmark = pytest.mark.slow

CHOICE = """task: dry_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GREEDY = """task: dry_greedy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "Hello"
generation_kwargs: {until: [","], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def test_likelihoods_and_greedy_answers_are_scored(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from paceline.models import resolve

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is {n} a number?"}) + "\n" for n in range(2)))
    for name, text in (("choice", CHOICE), ("greedy", GREEDY)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(resolve(MODEL, download=False).path),
            "num_concurrent": 1,
            "batch_size": 2,
        },
        tasks=["dry_choice", "dry_greedy"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert set(found["results"]) == {"dry_choice", "dry_greedy"}
    assert found["results"]["dry_choice"]["acc,none"] in (0.0, 1.0)
    assert found["results"]["dry_greedy"]["exact_match,none"] == 1.0
