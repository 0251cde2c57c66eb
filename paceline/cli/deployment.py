"""From a config file and command-line options to the Ray Serve config that is deployed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paceline
from paceline.config import (
    DEFAULT_MODEL,
    GRPC_SERVICER,
    IMPORT_PATH,
    AppSettings,
    default_deployment,
    load_deployment,
    parse_settings,
)
from paceline.errors import ConfigError
from paceline.ports import ALL_INTERFACES, is_loopback, require_free

LOCAL_CPU = Path("deployments") / "local-cpu.yaml"


@dataclass(frozen=True, slots=True)
class Overrides:
    """Command-line options that replace what the config says. None leaves it alone."""

    model: str | None = None
    drafts: int | None = None
    targets: int | None = None
    host: str | None = None
    port: int | None = None
    grpc_port: int | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """A checked Ray Serve config with exactly one Paceline application, and what the CLI reads from it."""

    config: dict[str, Any]
    settings: AppSettings

    @property
    def host(self) -> str:
        return str(self._options("http_options").get("host") or "127.0.0.1")

    @property
    def http_port(self) -> int:
        return int(self._options("http_options").get("port", 8000))

    @property
    def grpc_port(self) -> int | None:
        """None where the config starts no gRPC server."""
        options = self._options("grpc_options")
        return int(options.get("port", 9000)) if options.get("grpc_servicer_functions") else None

    @property
    def open_to_strangers(self) -> str | None:
        """In words, if others than this machine's users may reach it and need no key."""
        if self.settings.api_keys.enabled:
            return None
        if not is_loopback(self.host):
            return f"whoever reaches {self.host}:{self.http_port} may use this server, see its status and end sessions"
        if self.grpc_port is not None:
            return f"Ray Serve's gRPC port {self.grpc_port} listens on every interface of this machine"
        return None

    def require_free_ports(self) -> None:
        """Raise ConfigError if a port it listens on is taken. Serve's gRPC server takes all interfaces."""
        require_free(self.host, self.http_port, key="http_options.port", option="--port")
        if self.grpc_port is not None:
            require_free(ALL_INTERFACES, self.grpc_port, key="grpc_options.port", option="--grpc-port")

    def _options(self, section: str) -> dict[str, Any]:
        return self.config.get(section) or {}


def read_deployment(path: Path | None, overrides: Overrides) -> Deployment:
    """The config at `path` (None: the built-in default) with `overrides` applied, checked.

    Raises ConfigError naming the file or the key.
    """
    config = default_deployment() if path is None else copy.deepcopy(load_deployment(path))
    application = _application(config, path)
    args = application["args"] = dict(application.get("args") or {})
    if overrides.model is not None:
        _replace_model(args, _absolute(overrides.model))
    for section, count in (("draft", overrides.drafts), ("target", overrides.targets)):
        if count is not None:
            _refuse_shadowed(application, section)
            args[section] = {**(args.get(section) or {}), "num_replicas": count}
    _set(config, "http_options", host=overrides.host, port=overrides.port)
    _set_tls(config, overrides)
    if overrides.grpc_port is not None:
        _set(config, "grpc_options", port=overrides.grpc_port)
        config["grpc_options"].setdefault("grpc_servicer_functions", [GRPC_SERVICER])
    return Deployment(config, parse_settings(args))


def _set_tls(config: dict[str, Any], overrides: Overrides) -> None:
    """Certificate and key of the HTTP port, which only work together."""
    if (overrides.tls_cert is None) != (overrides.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key: give both, or neither", param="http_options.ssl_certfile")
    for option, path in (("ssl_keyfile", overrides.tls_key), ("ssl_certfile", overrides.tls_cert)):
        if path is not None:
            if not path.expanduser().is_file():
                raise ConfigError(f"{path}: no such file (http_options.{option})", param=f"http_options.{option}")
            _set(config, "http_options", **{option: str(path.expanduser().absolute())})


def find_local_cpu(start: Path) -> Path | None:
    """`deployments/local-cpu.yaml` in `start`, else in the checkout this package runs from; None in neither."""
    candidates = (start / LOCAL_CPU, Path(paceline.__file__).parent.parent / LOCAL_CPU)
    return next((path for path in candidates if path.is_file()), None)


def _absolute(model: str) -> str:
    """A path to a model in a form that means the same in a replica; names and Hub ids as they are."""
    looks_like_path = "/" in model or model.endswith(".gguf")
    return str(Path(model).expanduser().absolute()) if looks_like_path and Path(model).expanduser().exists() else model


def _replace_model(args: dict[str, Any], model: str) -> None:
    """A draft goes with its target: another model does without the config's."""
    if model != args.get("model", DEFAULT_MODEL) and args.get("draft"):
        args["draft"] = {name: value for name, value in args["draft"].items() if name != "model"}
    args["model"] = model


def _application(config: dict[str, Any], path: Path | None) -> dict[str, Any]:
    found = [app for app in config["applications"] if app.get("import_path") == IMPORT_PATH]
    if len(found) != 1:
        raise ConfigError(
            f"{path}: applications: needs exactly one with import_path {IMPORT_PATH}, has {len(found)}",
            param="applications",
        )
    application: dict[str, Any] = found[0]
    return application


def _refuse_shadowed(application: dict[str, Any], section: str) -> None:
    """An entry under `deployments:` wins over `args:`, so an option that sets `args:` would do nothing."""
    for entry in application.get("deployments") or ():
        if str(entry.get("name", "")).lower() == section and not {"num_replicas", "autoscaling_config"}.isdisjoint(
            entry
        ):
            key = f"deployments.{entry['name']}"
            raise ConfigError(f"--{section}s: the config sets the replicas under {key}; change it there", param=key)


def _set(config: dict[str, Any], section: str, **values: Any) -> None:
    given = {name: value for name, value in values.items() if value is not None}
    if given:
        config[section] = {**(config.get(section) or {}), **given}
