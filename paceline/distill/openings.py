"""How conversations begin: whole requests, and first words that the target continues in the user's place.

Written for this project; what follows them is the target's own text.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from paceline.errors import ConfigError

BEGUN_SHARE = 0.4
"""Of the conversations, how many the target begins itself after at most a few words."""
REPEATS = 3
"""How often the same request may come: its greedy answer is the same each time."""
PAIRED = ("2", "3")


@dataclass(frozen=True, slots=True)
class Opening:
    """The user's first line, or its beginning."""

    text: str
    whole: bool


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """Templates by kind, first words, and what fills the templates' slots."""

    whole: dict[str, list[str]]
    begun: list[str]
    fillings: dict[str, list[str]]


def built_in() -> BuiltIn:
    """The openings that come with the package."""
    data = json.loads(files("paceline.distill").joinpath("data/openings.json").read_text(encoding="utf-8"))
    return BuiltIn(data.pop("whole"), data.pop("begun"), data)


def openings(count: int, seed: int, avoid: Collection[str] = ()) -> list[Opening]:
    """`count` openings, every kind as often as any other; none of them is among the normalized texts `avoid`."""
    source, chance = built_in(), random.Random(seed)
    kinds = sorted(source.whole)
    found: list[Opening] = []
    seen: Counter[str] = Counter()
    while len(found) < count:
        if chance.random() < BEGUN_SHARE:
            found.append(Opening(chance.choice(source.begun), whole=False))
            continue
        text = _filled(chance.choice(source.whole[chance.choice(kinds)]), source.fillings, chance)
        if normalized(text) not in avoid and seen[text] < REPEATS:
            seen[text] += 1
            found.append(Opening(text, whole=True))
    return found


def from_lines(lines: Sequence[str], count: int, seed: int, avoid: Collection[str] = ()) -> list[Opening]:
    """Openings from a user's own prompts, each as often as any other."""
    usable = [line for line in lines if normalized(line) not in avoid]
    chance = random.Random(seed)
    return [Opening(chance.choice(usable), whole=True) for _ in range(count)]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; of .jsonl, the field `prompt`. Raises ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if path.suffix == ".jsonl":
            lines = [str(json.loads(line)["prompt"]) for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path}: {error}", param="prompts") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f'--prompts: {path}: each line must be JSON with a "prompt"', param="prompts") from None
    found = list(dict.fromkeys(line for line in lines if line))
    if len(found) < 2:
        raise ConfigError(f"--prompts: {path}: holds {len(found)} prompts; at least 2 are needed", param="prompts")
    return found


def normalized(text: str) -> str:
    """What two prompts share that differ in case, spaces and punctuation only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _filled(template: str, fillings: dict[str, list[str]], chance: random.Random) -> str:
    used: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        slot = match[1].rstrip("".join(PAIRED))
        if slot == "n":
            return str(chance.choice((chance.randint(2, 12), chance.randint(2, 100), chance.randint(2, 1000))))
        while (word := chance.choice(fillings[slot])) in used:
            pass
        used.add(word)
        return word

    text = re.sub(r"\{(\w+)\}", fill, template)
    return text[0].upper() + text[1:]
