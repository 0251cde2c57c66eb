"""Tensor parallelism: one model over several processes, its *ranks*, each with a share of every layer.

    rank 0    scheduler, KV account ── a step's plan, a few hundred bytes ──► rank 1, rank 2, …
              its share of the layers ◄── sums over all ranks, twice a layer ──► theirs

Rank 0 is what the engine knows as a Runner; the others do as they are told (`follower`).
"""
