"""Paceline: large language models served by a pool of drafters and the targets that verify them."""

from __future__ import annotations
