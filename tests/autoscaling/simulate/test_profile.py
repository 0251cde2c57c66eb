from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.autoscaling.simulate.profile import DraftProfile, Pace, Profile, load, shipped
from paceline.errors import ConfigError

PLAIN = Profile(
    name="plain", source="made up", step_s={1: 0.01, 11: 0.02}, prefill_tokens_per_s=10_000, chunk_tokens=100,
    max_num_seqs=20, kv_tokens=100_000, start_s=60,
)  # fmt: skip


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_profile_is_valid_and_says_where_it_is_from(name: str) -> None:
    found = load(name)
    assert (found.name, len(found.source) > 50) == (name, True)


def test_a_step_lies_on_the_line_between_two_points() -> None:
    assert Pace(PLAIN).step(np.array([6.0]))[0] == pytest.approx(0.015)


def test_a_step_beyond_the_points_goes_on_as_the_last_two() -> None:
    assert Pace(PLAIN).step(np.array([21.0]))[0] == pytest.approx(0.03)


def test_seats_leave_room_for_a_chunk() -> None:
    assert Pace(PLAIN).seats(0.0255) == 6  # a step of 6 is 15 ms, a chunk 10 ms


def test_seats_are_no_more_than_sequences_in_a_step() -> None:
    assert Pace(PLAIN).seats(10.0) == 20


def test_there_is_always_a_seat() -> None:
    assert Pace(PLAIN).seats(0.001) == 1


def test_tokens_of_a_step_with_drafts() -> None:
    drafts = DraftProfile(acceptance=0.5, depth=2, verify_s={1: 0.01}, token_s=0.001, start_s=10)
    assert drafts.tokens_per_step == pytest.approx(1 + 0.5 + 0.25)


def test_a_profile_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(PLAIN.model_dump_json())
    assert load(str(file)) == PLAIN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not readable"),
        ("- 1", "has no fields"),
        ("name: x\nspeed: 3", "profile.speed: unknown key"),
        (PLAIN.model_dump_json().replace("0.02", "0.002"), "cannot be faster"),
        (PLAIN.model_dump_json().replace("60.0", "0"), "profile.start_s"),
    ],
)
def test_a_bad_profile_names_its_field(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(str(file))


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="llama-8b-h100, smollm2-135m-2cores"):
        load("gpt-5")
