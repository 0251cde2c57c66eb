"""A model of the Hugging Face Hub, in the Hub's own cache, where other programs find it too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.errors import ModelError
from paceline.models.progress import Progress, Task

ALLOWED = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja"]
CONFIG = "config.json"
IGNORED = ["*/*", "consolidated*"]
"""Transformers reads the top folder only; below it and in `consolidated` are second copies of the weights."""


def snapshot(repo_id: str, *, progress: Progress, download: bool) -> Path:
    """Folder of `repo_id`, downloaded or resumed if `download`.

    Raises ModelError: not on this disk, no such repository, no access, no network.
    """
    from huggingface_hub import snapshot_download

    with _in_one_line(repo_id, download), progress.task(f"downloading {repo_id} from the Hub") as task, _quiet():
        folder = snapshot_download(
            repo_id,
            allow_patterns=ALLOWED,
            ignore_patterns=IGNORED,
            local_files_only=not download,
            tqdm_class=_bar(task),
        )
    return Path(folder)


def config_file(repo_id: str, folder: Path, *, progress: Progress) -> Path:
    """The repository's config.json alone: from the Hub's cache, else fetched into `folder`.

    Not into the cache: there a folder without weights would look like a download cut short. Raises ModelError.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, CONFIG)
    if isinstance(cached, str):
        return Path(cached)
    label = f"reading {CONFIG} of {repo_id} on the Hub"
    with _in_one_line(repo_id, download=True), progress.task(label) as task, _quiet():
        snapshot_download(repo_id, allow_patterns=[CONFIG], local_dir=folder, tqdm_class=_bar(task))
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{repo_id}: it has no {CONFIG}, so it is no model Transformers knows")
    return folder / CONFIG


@contextlib.contextmanager
def _in_one_line(repo_id: str, download: bool) -> Iterator[None]:
    """What the Hub's client raises, as a ModelError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{repo_id}: its owner asks for consent first; accept on its Hub page, then: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(
            f"{repo_id}: no folder of that name and no such model on the Hub (or it is private: hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError:
        if not download:
            raise ModelError(
                f"{repo_id}: not in the Hub's cache; fetch it with: paceline models pull {repo_id}"
            ) from None
        raise ModelError(_unreachable(repo_id)) from None
    except (errors.HfHubHTTPError, OSError, RuntimeError) as error:
        raise _failed(repo_id, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _failed(repo_id, error) from None


def _unreachable(repo_id: str) -> str:
    return (
        f"{repo_id}: no folder of that name, and the Hub cannot be reached; check the network, "
        "or name a model folder or a .gguf file"
    )


def _failed(repo_id: str, error: Exception) -> ModelError:
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # the disk, not the Hub: reported with its path by the caller
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(f"{repo_id}: the download failed ({reason}); run the same command to resume")


def _bar(task: Task) -> type[Any]:
    """A tqdm class that shows nothing and passes the bytes written on to `task`."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Bar(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The Hub reports two bars of bytes, received and written; the second also counts what was there already.
            self._counts = kwargs.get("unit") == "B" and "econstruct" in str(kwargs.get("desc"))
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                task.advance(int(n))
            return None

    return Bar


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the Hub's log lines ("unauthenticated requests", retries): what matters is in the error."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
