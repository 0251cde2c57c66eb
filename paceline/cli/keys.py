"""`paceline keys`: make API keys, and look at a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import group

EPILOG = """\b
Examples:
  paceline keys create alice --requests-per-minute 60 --file keys.yaml
  paceline keys check keys.yaml
"""

keys_app = group("API keys of a server: made here, kept by it as hashes alone.", EPILOG)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Who it is for: letters, digits, dots, dashes.")]
Bound = Annotated[int | None, typer.Option(metavar="N", min=1, show_default=False)]
Admin = Annotated[
    bool, typer.Option("--admin", help="May see everybody's sessions and the status, move sessions, drain replicas.")
]
AppendTo = Annotated[
    Path | None,
    typer.Option("--file", metavar="PATH", help="Append the hashed line to this file too.", show_default=False),
]
KeysFile = Annotated[Path, typer.Argument(metavar="PATH", help="File of hashed keys, as in api_keys.file.")]


@keys_app.command("create", epilog=EPILOG)
def create(
    name: Name,
    requests_per_minute: Bound = None,
    tokens_per_minute: Bound = None,
    max_concurrent: Bound = None,
    admin: Admin = False,
    file: AppendTo = None,
) -> None:
    """Make a key. It is printed once; the server gets the hashed line.

    A second line of the same name, with the same bounds, is a second key of the same caller: add the new one, hand it
    out, remove the old one. Bounds are per router.
    """
    from pydantic import ValidationError

    from paceline.api.keys import KeyEntry, hash_of, new_key
    from paceline.config import config_error

    key = new_key()
    try:
        entry = KeyEntry(
            name=name,
            hash=hash_of(key),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_concurrent=max_concurrent,
            admin=admin,
        )
    except ValidationError as error:
        raise config_error(error) from None
    if file is not None:
        _append(file, entry.line())
    typer.echo(f"key   {key}")
    typer.echo(f"line  {entry.line()}")


@keys_app.command("check", epilog=EPILOG)
def check(file: KeysFile) -> None:
    """Read a file of keys as a server would, and say whose there are.

    With a key in PACELINE_API_KEY, also say whose that is.
    """
    from paceline.api.keys import KeyFile, KeyRing, parse_keys
    from paceline.config import API_KEY_VARIABLE, secret

    ring = KeyRing(KeyFile(file))
    for entry in parse_keys(file.read_text()):
        typer.echo(", ".join((entry.name, *entry.words())))
    if (key := secret(API_KEY_VARIABLE)) is not None:
        typer.echo(f"the key in {API_KEY_VARIABLE} is {ring.caller(key).name}'s")


def _append(path: Path, line: str) -> None:
    """To a file that its owner alone may read, if it is new. Raises ConfigError if it cannot be written."""
    from paceline.api.keys import parse_keys
    from paceline.errors import ConfigError

    try:
        before = path.read_text() if path.exists() else ""
        parse_keys(f"{before}\n{line}\n")
        path.touch(mode=0o600)
        path.write_text(before + ("" if before.endswith("\n") or not before else "\n") + line + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="file") from None
