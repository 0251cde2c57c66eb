"""Arrivals: requests one by one, and the same in ticks, which is what the simulation eats.

Files are JSONL, `{"t": seconds, "prompt_tokens": n, "output_tokens": n, "session": name}` with `session` optional, or
the CSV that Azure publishes (AzurePublicDataset, LLM inference traces of 2023 and 2024).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ConfigError

Array = NDArray[np.float64]
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SHAPE_POINTS = 16


@dataclass(frozen=True)
class Requests:
    """One by one, by time. `cached` tokens of a prompt are the session's from before; 0 for its first request."""

    t: Array
    prompt: Array
    output: Array
    cached: Array
    follows: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.t)

    def ticks(self, tick: float, name: str, duration: float | None = None) -> Arrivals:
        """The same in ticks of `tick` seconds."""
        last = float(self.t[-1]) if len(self.t) else 0.0
        count = max(math.ceil((duration or 0.0) / tick), int(last / tick) + 1)
        place = np.minimum((self.t / tick).astype(np.int64), count - 1)

        def total(values: Array | None = None, of: NDArray[np.bool_] | None = None) -> Array:
            where = place if of is None else place[of]
            weights = values if values is None or of is None else values[of]
            return np.bincount(where, weights, count).astype(float)

        return Arrivals(
            name=name,
            tick=tick,
            requests=total(),
            prompt=total(self.prompt),
            output=total(self.output),
            follows=total(of=self.follows),
            follow_prompt=total(self.prompt, self.follows),
            follow_cached=total(self.cached, self.follows),
            shape=shape(self.prompt),
        )


@dataclass(frozen=True)
class Arrivals:
    """Sums by tick: requests, their tokens, and of these what continues a session."""

    name: str
    tick: float
    requests: Array
    prompt: Array
    output: Array
    follows: Array
    follow_prompt: Array
    follow_cached: Array
    shape: Array
    """Lengths of prompts, as multiples of their mean: equally likely points."""

    @property
    def duration(self) -> float:
        return self.tick * len(self.requests)


def shape(prompts: Array) -> Array:
    """Equally likely points of a distribution, their mean 1."""
    if not len(prompts):
        return np.ones(SHAPE_POINTS)
    points = np.quantile(prompts, (np.arange(SHAPE_POINTS) + 0.5) / SHAPE_POINTS)
    return np.asarray(points / points.mean())


def read(path: Path) -> Requests:
    """A file of either form. Raises ConfigError with the number of the first bad line."""
    try:
        with path.open(newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            rows = list(_azure(path, lines) if first.startswith(AZURE[0]) else _jsonl(path, lines))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"trace: {path}: {reason}", param="trace") from None
    if not rows:
        raise ConfigError(f"trace: {path}: no requests in it", param="trace")
    rows.sort(key=lambda row: row[0])
    return _requests(rows)


def _requests(rows: list[tuple[float, int, int, str | None]]) -> Requests:
    """A session's earlier prompt and answer are held where it was; what is longer is new."""
    held: dict[str, int] = {}
    cached, follows = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for n, (_, prompt, output, session) in enumerate(rows):
        if session is None:
            continue
        if session in held:
            follows[n], cached[n] = True, min(held[session], prompt - 1)
        held[session] = prompt + output
    t, prompt_tokens, output_tokens = (np.array([row[k] for row in rows], dtype=float) for k in range(3))
    return Requests(t - t[0], prompt_tokens, output_tokens, cached, follows)


def _jsonl(path: Path, lines: Any) -> Iterator[tuple[float, int, int, str | None]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise _bad(path, number, "is no JSON") from None
        if not isinstance(row, dict):
            raise _bad(path, number, 'is no object such as {"t": 0.5, "prompt_tokens": 900, "output_tokens": 120}')
        unknown = set(row) - {"t", "prompt_tokens", "output_tokens", "session"}
        if unknown:
            raise _bad(path, number, f"unknown field {min(unknown)!r}")
        session = row.get("session")
        if session is not None and not isinstance(session, str):
            raise _bad(path, number, "session: give a string")
        t = row.get("t")
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t < math.inf:
            raise _bad(path, number, "t: give seconds, 0 or more")
        prompt, output = (_tokens(path, number, name, row.get(name)) for name in ("prompt_tokens", "output_tokens"))
        yield float(t), prompt, output, session


def _azure(path: Path, lines: Any) -> Iterator[tuple[float, int, int, str | None]]:
    rows = csv.DictReader(lines)
    missing = [name for name in AZURE if name not in (rows.fieldnames or ())]
    if missing:
        raise _bad(path, 1, f"column {missing[0]} is missing")
    for row in rows:
        number = rows.line_num
        stamp = (row[AZURE[0]] or "").strip()
        try:
            moment = _seconds(stamp)
        except ValueError:
            raise _bad(path, number, f"TIMESTAMP: {stamp!r} is no date and time") from None
        prompt, output = (_tokens(path, number, name, _whole(row[name])) for name in AZURE[1:])
        yield moment, prompt, output, None


def _seconds(stamp: str) -> float:
    """Of `2023-11-16 18:15:46.6805900` and `2024-05-10 00:00:00.009930+00:00`; digits past microseconds are cut."""
    head, point, rest = stamp.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    fraction = float(f"0.{rest[:digits]}") if digits else 0.0
    moment = datetime.fromisoformat(head + rest[digits:] if point else stamp)
    return (moment.replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds() + fraction


def _whole(text: str | None) -> int | None:
    try:
        return int(float(text or ""))
    except (ValueError, OverflowError):
        return None


def _tokens(path: Path, number: int, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
        raise _bad(path, number, f"{name}: give a whole number from 1 to 10000000")
    return value


def _bad(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"trace: {path}, line {number}: {what}", param="trace")
