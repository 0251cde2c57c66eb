"""Openings, the chat format, rows of text and the streams that write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.distill.chat import ChatFormat, chat_format, prompts
from paceline.distill.openings import normalized, openings, read_prompts
from paceline.distill.streams import StreamWriter
from paceline.distill.teacher import Teacher
from paceline.distill.text import Rows, TextStore, free_of, pack
from paceline.errors import ConfigError
from paceline.models import ModelFiles, load_tokenizer
from tests.tiny import VOCAB, tiny_llama

CHAT = ChatFormat("", (5, 6, 7), (8, 9), writes_users=True, template=True)
STARTS = [([10, 11, 12], True), ([20, 21], False)]


@pytest.fixture(scope="module")
def written() -> tuple[Rows, torch.Tensor]:
    writer = StreamWriter(tiny_llama(), CHAT, STARTS, [2, 3, 4], streams=8, length=64, seed=0, keep_states=True)
    rows, states = writer.write()
    assert states is not None
    return rows, states


def test_openings_are_the_same_for_the_same_seed() -> None:
    assert openings(50, seed=3) == openings(50, seed=3)


def test_an_opening_to_avoid_never_comes() -> None:
    avoid = {normalized(each.text) for each in openings(200, seed=1) if each.whole}
    assert not avoid & {normalized(each.text) for each in openings(200, seed=1, avoid=avoid) if each.whole}


def test_openings_leave_no_slot_open() -> None:
    assert not [each.text for each in openings(2000, seed=0) if "{" in each.text and each.whole]


def test_a_file_with_one_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("only one\n")
    with pytest.raises(ConfigError, match="at least 2"):
        read_prompts(tmp_path / "p.txt")


def test_prompts_are_what_the_chat_template_renders(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2.path)
    turns = [{"role": "user", "content": "Why is the sky blue?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompts(tokenizer, chat_format(tokenizer, {2}), ["Why is the sky blue?"]) == [list(expected)]


def test_streams_compute_what_one_pass_over_the_text_computes(written: tuple[Rows, torch.Tensor]) -> None:
    rows, states = written
    again = Teacher(tiny_llama(), torch.arange(VOCAB)).compute(rows)
    assert float((again - states).abs().max()) < 1e-4


def test_the_words_before_an_answer_follow_the_end_of_a_line(written: tuple[Rows, torch.Tensor]) -> None:
    rows, _ = written
    for tokens, answers in zip(rows.tokens.tolist(), rows.answers.tolist(), strict=True):
        for n in range(len(tokens) - 3):
            if answers[n + 3] and not answers[n + 2] and tokens[n + 2] == 7:
                assert tokens[n : n + 3] == [5, 6, 7]


def test_a_conversation_begins_with_an_opening(written: tuple[Rows, torch.Tensor]) -> None:
    rows, _ = written
    for tokens, starts in zip(rows.tokens.tolist(), rows.starts.tolist(), strict=True):
        begun = [tokens[n : n + 2] for n in set(starts) if n + 1 < len(tokens)]
        assert all(pair in ([10, 11], [20, 21]) for pair in begun)


def test_greedy_streams_answer_as_the_model_does(written: tuple[Rows, torch.Tensor]) -> None:
    """Some stream answers greedily, and every token it draws is the likeliest there."""
    rows, states = written
    best = (states @ tiny_llama().lm_head.weight.T).argmax(dim=-1)[:, :-1]
    same = (best == rows.tokens[:, 1:]) | ~rows.answers[:, 1:]
    assert bool((same.all(dim=1) & rows.answers.any(dim=1)).any())


def test_rows_with_a_held_out_phrase_are_found() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 6]], dtype=torch.int32)
    rows = Rows(tokens, torch.zeros_like(tokens), tokens > 0)
    assert free_of(rows, [[2, 3, 4]]).tolist() == [False, True]


def test_a_token_sees_its_own_conversation_only() -> None:
    rows = pack([([1, 2], [False, True]), ([3, 4], [False, True])], length=5)
    seen = rows.mask()[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_stored_text_reads_back(tmp_path: Path) -> None:
    rows = pack([([1, 2], [False, True])], length=4)
    TextStore(tmp_path).add(rows)
    TextStore(tmp_path).add(rows)
    found = TextStore(tmp_path).read()
    assert found is not None
    assert found.tokens.tolist() == [[1, 2, 0, 0], [1, 2, 0, 0]]
