from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.autoscaling.simulate.generators import KINDS, Sessions, generate
from paceline.autoscaling.simulate.traces import read, shape
from paceline.errors import ConfigError

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,9,8\n"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def test_azures_csv_is_read(trace: Path) -> None:
    trace.write_text(AZURE_2023)
    found = read(trace)
    assert (found.t.round(6).tolist(), found.prompt.tolist(), found.output.tolist()) == (
        [0.0, 4.314579],
        [374, 396],
        [44, 109],
    )


def test_the_form_of_2024_is_read(trace: Path) -> None:
    trace.write_text(AZURE_2024)
    assert read(trace).t.round(6).tolist() == [0.0, 0.99007]


def test_jsonl_is_sorted_by_time(trace: Path) -> None:
    trace.write_text(
        '{"t": 5, "prompt_tokens": 7, "output_tokens": 1}\n\n{"t": 2, "prompt_tokens": 9, "output_tokens": 1}'
    )
    assert read(trace).prompt.tolist() == [9, 7]


def test_a_later_request_of_a_session_has_the_earlier_tokens_cached(trace: Path) -> None:
    trace.write_text(
        '{"t": 0, "prompt_tokens": 100, "output_tokens": 20, "session": "a"}\n'
        '{"t": 9, "prompt_tokens": 150, "output_tokens": 20, "session": "a"}\n'
    )
    found = read(trace)
    assert (found.follows.tolist(), found.cached.tolist()) == ([False, True], [0, 120])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1}\nnonsense', "line 2: is no JSON"),
        ("[1]", "line 1: is no object"),
        ('{"t": -1, "prompt_tokens": 1, "output_tokens": 1}', "line 1: t: give seconds"),
        ('{"t": true, "prompt_tokens": 1, "output_tokens": 1}', "line 1: t: give seconds"),
        ('{"t": 1e999, "prompt_tokens": 1, "output_tokens": 1}', "line 1: t: give seconds"),
        ('{"t": 0, "prompt_tokens": 0, "output_tokens": 1}', "line 1: prompt_tokens: give a whole number"),
        ('{"t": 0, "prompt_tokens": 1}', "line 1: output_tokens: give a whole number"),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "user": 1}', "line 1: unknown field 'user'"),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "session": 1}', "line 1: session: give a string"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,1", "line 1: column GeneratedTokens is missing"),
        (AZURE_2023 + "yesterday,1,1\n", "line 4: TIMESTAMP: 'yesterday' is no date and time"),
        (AZURE_2023 + "2023-11-16 18:15:51,many,1\n", "line 4: ContextTokens: give a whole number"),
        ("\n", "no requests in it"),
    ],
)
def test_a_bad_line_is_named(trace: Path, text: str, said: str) -> None:
    trace.write_text(text)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        read(trace)


def test_a_missing_file_is_an_error(trace: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(trace)


def test_ticks_have_all_requests_and_tokens(trace: Path) -> None:
    trace.write_text(AZURE_2023)
    found = read(trace).ticks(2.0, "azure")
    assert (found.requests.tolist(), found.prompt.sum(), found.output.sum()) == ([1, 0, 1], 770, 153)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_trace_has_the_rate_asked_for(kind: str) -> None:
    found = generate(kind, 10.0, 2.0, 0, 1.0)
    assert found.requests.sum() == pytest.approx(72_000, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_is_the_same_trace(kind: str) -> None:
    first, second = (generate(kind, 5.0, 0.5, 7, 1.0).prompt for _ in range(2))
    assert np.array_equal(first, second)


def test_another_seed_is_another_trace() -> None:
    first, second = (generate("bursts", 5.0, 0.5, seed, 1.0).requests for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_lengths_are_those_of_azures_conversations() -> None:
    found = generate("poisson", 20.0, 1.0, 0, 1.0)
    means = found.prompt.sum() / found.requests.sum(), found.output.sum() / found.requests.sum()
    assert means == pytest.approx((1155, 211), rel=0.02)


def test_many_requests_are_sums_of_the_same_lengths() -> None:
    found = generate("poisson", 20_000.0, 0.1, 0, 1.0)
    means = found.prompt.sum() / found.requests.sum(), found.output.sum() / found.requests.sum()
    assert means == pytest.approx((1155, 211), rel=0.01)


def test_bursts_come_higher_than_chance() -> None:
    assert (
        generate("bursts", 50.0, 3.0, 0, 10.0).requests.max() > 1.5 * generate("poisson", 50, 3, 0, 10).requests.max()
    )


def test_a_day_is_quiet_at_four() -> None:
    hourly = generate("diurnal", 5.0, 24.0, 0, 60.0).requests.reshape(24, 60).sum(axis=1)
    assert hourly[3:5].max() < hourly[12:20].min() / 1.5


def test_sessions_have_their_share() -> None:
    found = generate("poisson", 50.0, 0.2, 0, 1.0, Sessions(follows=0.25, cached=0.5))
    shares = found.follows.sum() / found.requests.sum(), found.follow_cached.sum() / found.follow_prompt.sum()
    assert shares == pytest.approx((0.25, 0.5), rel=0.05)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sinus: no such file, nor one of poisson, bursts, diurnal"):
        generate("sinus", 1.0, 1.0, 0, 1.0)


def test_a_shape_has_the_mean_one() -> None:
    assert shape(np.array([1.0, 10.0, 100.0])).mean() == pytest.approx(1.0)
