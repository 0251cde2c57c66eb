"""What a replica tells of the prefixes it holds, and what a prompt finds of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.sessions.prefixes import BLOCK, MAX_HASHES, block_hashes, held_tokens, marks, sketch

tokens = st.lists(st.integers(0, 3), max_size=6 * BLOCK)


def sequence(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, 50_000, length).tolist()
    return found


@given(tokens, tokens)
def test_two_sequences_share_a_hash_iff_they_share_the_prefix(a: list[int], b: list[int]) -> None:
    shared = sum(x == y for x, y in zip(block_hashes(a), block_hashes(b), strict=False))
    whole = max(n for n in range(min(len(a), len(b)) // BLOCK + 1) if a[: n * BLOCK] == b[: n * BLOCK])
    assert shared == whole


def test_only_whole_blocks_have_a_hash() -> None:
    assert [len(block_hashes(sequence(n))) for n in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1)] == [0, 0, 0, 1, 1]


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from paceline.sessions.prefixes import block_hashes; print(block_hashes(range(200)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == str(block_hashes(range(200)))


def test_lists_and_arrays_are_alike() -> None:
    ids = sequence(300)
    assert block_hashes(ids) == block_hashes(np.array(ids, dtype=np.int32))


def test_the_marks_are_powers_of_two_and_the_last() -> None:
    assert [marks(n) for n in (0, 1, 2, 5, 8)] == [[], [1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def test_a_long_sequence_is_told_in_a_few_hashes() -> None:
    assert len(sketch([sequence(2000)])) == 6


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_prompt_that_goes_on_finds_all_whole_blocks(stored: int, more: int) -> None:
    prompt = sequence(stored * 13 + more)
    held = set(sketch([prompt[: stored * 13]]))
    assert held_tokens(block_hashes(prompt), held) == stored * 13 // BLOCK * BLOCK


@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 20))
def test_a_prompt_that_parts_finds_at_least_half_of_what_is_shared(shared: int, ours: int, theirs: int) -> None:
    common = sequence(shared * BLOCK)
    held = set(sketch([common + sequence(theirs * BLOCK, seed=1)]))
    found = held_tokens(block_hashes(common + sequence(ours * BLOCK, seed=2)), held)
    assert shared * BLOCK / 2 <= found <= shared * BLOCK


def test_what_is_told_does_not_depend_on_the_order() -> None:
    a, b = sequence(500, 1), sequence(700, 2)
    assert sketch([a, b]) == sketch([b, a])


def test_what_is_told_is_bounded() -> None:
    assert len(sketch(sequence(2000, seed) for seed in range(400))) == MAX_HASHES


def test_nothing_held_is_nothing_found() -> None:
    assert held_tokens(block_hashes(sequence(500)), set()) == 0
