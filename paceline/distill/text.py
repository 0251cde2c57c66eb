"""The target's own text, packed into rows of equal length: what is written, stored and trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True)
class Rows:
    """Conversations back to back, cut at the end of a row.

    `tokens` int32 [n, T]; `starts` int32 [n, T], the index in its row at which a token's conversation begins;
    `answers` bool [n, T], true for tokens the target drew as an answer. A token sees those from its start on.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    answers: torch.Tensor

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.starts.shape == self.answers.shape

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    def at(self, index: torch.Tensor | slice) -> Rows:
        return Rows(self.tokens[index], self.starts[index], self.answers[index])

    def to(self, device: torch.device | str) -> Rows:
        return Rows(self.tokens.to(device), self.starts.to(device), self.answers.to(device))

    def positions(self) -> torch.Tensor:
        """Of every token in its conversation: int64 [n, T]."""
        return (torch.arange(self.length, device=self.tokens.device) - self.starts).clamp_(min=0)

    def mask(self) -> torch.Tensor:
        """True where the token of a row sees another: bool [n, 1, T, T]. Each sees itself, whatever its start."""
        at = torch.arange(self.length, device=self.tokens.device)
        own = (at[None, None, :] >= self.starts[:, :, None]) & (at[None, None, :] <= at[None, :, None])
        return (own | (at[None, None, :] == at[None, :, None]))[:, None]

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs: int64 [vocab]."""
        return torch.bincount(self.tokens.flatten().long(), minlength=vocab_size)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To `device` without waiting for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def join(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "starts", "answers")))


def free_of(rows: Rows, phrases: Sequence[Sequence[int]]) -> torch.Tensor:
    """Which rows contain none of the token sequences, bool [n]: so held-out prompts stay out, whoever wrote them."""
    found = torch.zeros(len(rows), dtype=torch.bool, device=rows.tokens.device)
    for phrase in phrases:
        room = rows.length - len(phrase) + 1
        if room <= 0:
            continue
        here = rows.tokens[:, :room] == phrase[0]
        for n, token in enumerate(phrase[1:], start=1):
            if n % 8 == 1 and not bool(here.any()):
                break
            here = here & (rows.tokens[:, n : n + room] == token)
        found |= here.any(dim=1)
    return ~found


def pack(documents: Sequence[tuple[Sequence[int], Sequence[bool]]], length: int) -> Rows:
    """Documents (tokens, answers) laid end to end in rows; one that would not fit begins the next row."""
    tokens, starts, answers = [], [], []
    row: tuple[list[int], list[int], list[bool]] = ([], [], [])

    def flush() -> None:
        missing = length - len(row[0])
        # Padding is a conversation of its own that nobody learns from.
        tokens.append(row[0] + [0] * missing)
        starts.append(row[1] + [len(row[0])] * missing)
        answers.append(row[2] + [False] * missing)
        for part in row:
            part.clear()

    for ids, drawn in documents:
        ids, drawn = list(ids[:length]), list(drawn[:length])
        if len(row[0]) + len(ids) > length:
            flush()
        row[1].extend([len(row[0])] * len(ids))
        row[0].extend(ids)
        row[2].extend(drawn)
    if row[0]:
        flush()
    return Rows(
        torch.tensor(tokens, dtype=torch.int32).view(-1, length),
        torch.tensor(starts, dtype=torch.int32).view(-1, length),
        torch.tensor(answers, dtype=torch.bool).view(-1, length),
    )


class TextStore:
    """Rows on disk, a file for each batch written, so that an interrupted run goes on where it stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Rows) -> None:
        path = self._folder / f"text-{len(self._files()):05d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(
            {
                "tokens": rows.tokens.cpu().contiguous(),
                "starts": rows.starts.to("cpu", torch.int16).contiguous(),
                "answers": rows.answers.cpu().contiguous(),
            },
            partial,
        )
        partial.replace(path)

    def read(self) -> Rows | None:
        """Everything written so far, or None."""
        parts = [
            Rows(part["tokens"], part["starts"].to(torch.int32), part["answers"])
            for part in (load_file(path) for path in self._files())
        ]
        return join(parts) if parts else None

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("text-*.safetensors"))

    def __iter__(self) -> Iterator[Path]:
        return iter(self._files())
