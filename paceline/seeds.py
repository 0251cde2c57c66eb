"""64-bit mixing in plain integers: where every seed of Paceline's noise comes from. Imports nothing.

The mix is the finalizer of SplitMix64 (Steele, Lea, Flood 2014), a bijection of the 64-bit integers.
"""

from __future__ import annotations

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def mix(x: int) -> int:
    """A 64-bit integer that depends on every bit of `x` modulo 2**64."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def choice_seed(seed: int, index: int) -> int:
    """The seed of output `index` of a request with n > 1: mix(mix(seed) + index * GOLDEN).

    Output 0 has the request's own seed, so that it is the output of the same request with n = 1. The others
    are the outputs of the SplitMix64 generator that starts at mix(seed): different for every index.
    """
    return seed if index == 0 else mix(mix(seed) + index * GOLDEN)
