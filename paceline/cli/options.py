"""Options and arguments of the commands: names, bounds, help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from paceline.config import EngineSettings, config_error, parse_settings
from paceline.errors import ConfigError
from paceline.types import MAX_SEED

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULTS = parse_settings({})


def group(help_text: str, epilog: str | None = None) -> typer.Typer:
    """A command with commands of its own, `paceline` itself included."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,  # plain help: it starts fast and reads the same in a pipe, a log and the docs
        pretty_exceptions_enable=False,
    )


def engine_settings(pairs: Sequence[str], option: str) -> EngineSettings:
    """`key=value` each, the value as in YAML; keys may begin with `engine.`. Raises ConfigError."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{option}: {pair!r}: give key=value, such as kv_dtype=int8", param="engine")
        try:
            values[key.strip().removeprefix("engine.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option}: {pair!r}: the value is not readable as YAML", param="engine") from None
    try:
        return EngineSettings(**values)
    except ValidationError as error:
        raise config_error(error, "engine") from None


Url = Annotated[str, typer.Option("--url", metavar="URL", help="The server.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", help="Sent as a bearer token; by default PACELINE_API_KEY.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

# serve: None leaves the choice to the config; the defaults named are those of the built-in one

Config = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG",
        help="Ray Serve config, as in deployments/. Options override what it says.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help=f"Target model: a known name, a folder, a .gguf file or a Hub id.  [default: {DEFAULTS.model}]",
        show_default=False,
    ),
]
Drafts = Annotated[
    int | None,
    typer.Option(
        "--drafts",
        metavar="N",
        min=0,
        help=f"Draft replicas; 0 serves without drafts.  [default: {DEFAULTS.draft.num_replicas}]",
        show_default=False,
    ),
]
Targets = Annotated[
    int | None,
    typer.Option(
        "--targets",
        metavar="N",
        min=1,
        help=f"Target replicas.  [default: {DEFAULTS.target.num_replicas}]",
        show_default=False,
    ),
]
Host = Annotated[
    str | None,
    typer.Option("--host", metavar="ADDRESS", help="Where HTTP listens.  [default: 127.0.0.1]", show_default=False),
]
Port = Annotated[
    int | None,
    typer.Option("--port", metavar="PORT", min=1, max=65535, help="HTTP port.  [default: 8000]", show_default=False),
]
GrpcPort = Annotated[
    int | None,
    typer.Option(
        "--grpc-port", metavar="PORT", min=1, max=65535, help="gRPC port.  [default: 9000]", show_default=False
    ),
]

TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="PATH", help="Certificate of the HTTP port, PEM.", show_default=False),
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", metavar="PATH", help="Its private key, PEM.", show_default=False)
]

# demo

FreePort = Annotated[
    int | None,
    typer.Option(
        "--port", metavar="PORT", min=1, max=65535, help="HTTP port; by default a free one.", show_default=False
    ),
]
FreeGrpcPort = Annotated[
    int | None,
    typer.Option(
        "--grpc-port", metavar="PORT", min=1, max=65535, help="gRPC port; by default a free one.", show_default=False
    ),
]
DemoConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Ray Serve config; by default deployments/local-cpu.yaml if it is here, else the built-in equal.",
        show_default=False,
    ),
]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the server running until Ctrl-C.")]

# chat

Question = Annotated[
    str | None,
    typer.Argument(metavar="MESSAGE", help="One question; without it, an interactive chat.", show_default=False),
]
Session = Annotated[
    str | None,
    typer.Option(
        "--session", metavar="ID", help="Name of the session whose KV cache is used and kept.", show_default=False
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.", show_default=False)]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, max=100.0, help="0 is greedy.")]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=MAX_SEED,
        help="Fixes the answer. Without it, a new one each time, shown below the answer.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")]
CtxSize = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        metavar="N",
        min=0,
        help="Streaming window: a conversation without an end, of which the model sees so many tokens, the first and "
        "the latest; 0 is none.",
        show_default="the server's",
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Text as it comes, without Markdown; so too where no terminal reads.")
]
NoSpeculation = Annotated[
    bool, typer.Option("--no-speculation", help="Decode without drafts; the tokens are the same.")
]

# status

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show it anew until Ctrl-C.")]
Every = Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.2, max=3600.0, help="Pause of --watch.")]
Looks = Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.2, max=3600.0, help="Between two looks.")]
Once = Annotated[bool, typer.Option("--once", help="Two looks, print what lies between them, end.")]
AllFacts = Annotated[bool, typer.Option("--all", help="Everything each replica reports.")]
