"""Paceline: large language models served by a pool of drafters and the targets that verify them."""

from __future__ import annotations

from importlib.metadata import version

from paceline.errors import PacelineError
from paceline.llm import LLM
from paceline.types import FinishReason, Metrics, RequestOutput, SamplingParams

__version__ = version("paceline")

__all__ = ["LLM", "FinishReason", "Metrics", "PacelineError", "RequestOutput", "SamplingParams", "__version__"]
