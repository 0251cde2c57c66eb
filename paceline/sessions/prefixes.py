"""Which replica has computed the beginning of this prompt? Told in a few kilobytes, without the tokens.

A sequence is cut into blocks of 64 tokens. Block n's hash covers everything up to its end, so that two sequences
share a hash iff they share the whole prefix. Of what it holds a replica tells only the hashes of its blocks number
1, 2, 4, 8, … and the last: eight for 2,000 tokens. Whoever looks a prompt up compares all of its blocks' hashes, and
finds at least half of what is shared, and all of it where the stored sequence is a beginning of the prompt, as the
turn before is of the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Sequence

import numpy as np

BLOCK = 64
"""Tokens. A shorter shared prefix is not worth going anywhere for."""
MAX_HASHES = 1024
"""A replica tells at most: 8 KiB, pushed to every router when it changes."""


def block_hashes(tokens: Sequence[int] | np.ndarray) -> list[int]:
    """Of every leading whole block, the hash of all tokens up to its end: 64 bits, the same in every process."""
    data = np.asarray(tokens, dtype=np.int32).tobytes()
    width, found, last = BLOCK * 4, [], b""
    for start in range(0, len(data) - width + 1, width):
        last = hashlib.blake2b(last + data[start : start + width], digest_size=8).digest()
        found.append(int.from_bytes(last, "little"))
    return found


def sketch(sequences: Iterable[Sequence[int] | np.ndarray], limit: int = MAX_HASHES) -> list[int]:
    """The hashes to tell of some sequences, of the first ones if there are too many. In order, so that a change of
    order is no change."""
    found: set[int] = set()
    for sequence in sequences:
        hashes = block_hashes(sequence)
        found.update(hashes[number - 1] for number in marks(len(hashes)))
        if len(found) > limit:
            break
    return sorted(found)[:limit]


def marks(blocks: int) -> list[int]:
    """Numbers of the blocks that are told: the powers of two, and the last."""
    return sorted({blocks, *(1 << n for n in range(blocks.bit_length()))} - {0})


def held_tokens(hashes: Sequence[int], held: Container[int]) -> int:
    """Tokens of the longest prefix of a prompt, given by its `block_hashes`, that is among what is held."""
    return BLOCK * next((number for number in range(len(hashes), 0, -1) if hashes[number - 1] in held), 0)
