"""Processes that begin with everything imported, as copies of one that has done so: milliseconds, not five seconds."""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing.context import ForkServerContext

IMPORTED = ["paceline.engine.load", "tests.engine.tp.ranks", "transformers.models.llama.modeling_llama"]


@cache
def forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
