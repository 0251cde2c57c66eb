"""A metric family as a row of a table, and the ways to read its values out of a status.

A status may be of a replica of another version: what is missing or no number has no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paceline.histogram import Ranges

Kind = Literal["gauge", "counter", "histogram"]
Scope = Literal["target", "draft", "replica", "router", "cluster"]
"""Whose status is read: that of every target, every drafter, both; what the router that answers counted itself, or what
any of them would say, both in a ClusterStatus."""
Sample = tuple[tuple[str, ...], float | Ranges]
"""Values of the labels, and the value."""
Reader = Callable[[Any], Iterable[Sample]]

COMMON: Mapping[Scope, tuple[str, ...]] = {
    "target": ("model_name", "replica"),
    "draft": ("model_name", "replica"),
    "replica": ("model_name", "replica"),
    "router": ("model_name", "router"),
    "cluster": ("model_name",),
}
"""The labels that come before a family's own."""


@dataclass(frozen=True, slots=True)
class Family:
    """`name` is that of the samples, but for a histogram's endings. `labels` are its own, behind the common ones."""

    name: str
    kind: Kind
    text: str
    read: Reader
    labels: tuple[str, ...] = ()
    scope: Scope = "target"

    def __post_init__(self) -> None:
        if (self.kind == "counter") != self.name.endswith("_total") and self.name != "vllm:iteration_tokens_total":
            raise ValueError(f"{self.name}: counters end in _total, and only they do")

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*COMMON[self.scope], *self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples, as a query has them."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{ending}" for ending in ("bucket", "sum", "count"))


def number(*path: str) -> Reader:
    """The one number there."""

    def read(status: Any) -> Iterator[Sample]:
        if (value := number_at(status, *path)) is not None:
            yield (), value

    return read


def by_key(*path: str) -> Reader:
    """A number for each key of the mapping there; the key is the label."""

    def read(status: Any) -> Iterator[Sample]:
        found = mapping_at(status, *path)
        for key in found:
            if (value := number_at(found, key)) is not None:
                yield (str(key),), value

    return read


def by_name(keys: Mapping[str, str]) -> Reader:
    """A number for each value of a label, whose number has a key of its own: `{label: key}`."""

    def read(status: Any) -> Iterator[Sample]:
        for label, key in keys.items():
            if (value := number_at(status, *key.split("."))) is not None:
                yield (label,), value

    return read


def ranges(*path: str) -> Reader:
    """The histogram there."""

    def read(status: Any) -> Iterator[Sample]:
        *parents, last = path
        if (found := Ranges.read(mapping_at(status, *parents).get(last))) is not None:
            yield (), found

    return read


def ranges_by_key(*path: str) -> Reader:
    """A histogram for each key of the mapping there; the key is the label."""

    def read(status: Any) -> Iterator[Sample]:
        for key, told in mapping_at(status, *path).items():
            if (found := Ranges.read(told)) is not None:
                yield (str(key),), found

    return read


def mapping_at(status: Any, *path: str) -> Mapping[str, Any]:
    """Empty if there is none."""
    for key in path:
        status = status.get(key) if isinstance(status, Mapping) else None
    return status if isinstance(status, Mapping) else {}


def number_at(status: Any, *path: str) -> float | None:
    *parents, last = path
    value = mapping_at(status, *parents).get(last)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
