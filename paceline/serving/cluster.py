"""A whole cluster on this machine: a private Ray, Serve on it, one application."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.config import APP_NAME, IMPORT_PATH, AppSettings, DraftSettings, TargetSettings, parse_settings
from paceline.config_autoscaling import ReplicaRange
from paceline.errors import ConfigError, PacelineError, Unavailable
from paceline.hardware import usable_cores
from paceline.ports import ALL_INTERFACES, require_free
from paceline.serving import bundles
from paceline.serving.environment import ray_environment
from paceline.telemetry.tracing import check_packages

DEPLOY_TIMEOUT_S = 900.0
POLL_S = 0.25
POLICY = "paceline.serving.autoscaling:Autoscaler"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a cluster listens."""

    http: str
    grpc: str


class LocalCluster:
    """Starts a Ray of its own, deploys a Ray Serve config, waits until every replica is up; and takes it all down.

    `on_status` hears short lines about the progress. A context manager; `stop` is idempotent.
    """

    def __init__(self, deployment: Mapping[str, Any], *, on_status: Callable[[str], None] = lambda _: None) -> None:
        self._config = scaled(share_cores(deployment, usable_cores()))
        self._on_status = on_status
        self._started = False

    def start(self) -> Endpoints:
        """Raises ConfigError for a taken port or a wrong setting, Unavailable if the replicas do not come up."""
        http, grpc = self._config.get("http_options") or {}, self._config.get("grpc_options") or {}
        host = str(http.get("host", "127.0.0.1"))
        http_port, grpc_port = int(http.get("port", 8000)), int(grpc.get("port", 9000))
        require_free(host, http_port, key="http_options.port", option="--port")
        require_free(ALL_INTERFACES, grpc_port, key="grpc_options.port", option="--grpc-port")
        settings = parse_settings(_application(self._config).get("args") or {})
        bundles.check(settings)
        check_packages(settings.telemetry)
        try:
            self._start_ray()
            self._deploy()
        except BaseException:
            self.stop()
            raise
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        scheme = "https" if http.get("ssl_certfile") else "http"
        return Endpoints(f"{scheme}://{shown}:{http_port}", f"{shown}:{grpc_port}")

    def stop(self) -> None:
        """Serve first, so that replicas end gracefully; then Ray."""
        if not self._started:
            return
        import ray
        from ray import serve

        self._started = False
        # The controller kills itself when it is done, which Ray reports on stdout as a failed task.
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                serve.shutdown()
            finally:
                ray.shutdown()
                self._folder.cleanup()
                for name in self._set:
                    os.environ.pop(name, None)

    def scale(self, deployment: str, num_replicas: int, timeout_s: float = DEPLOY_TIMEOUT_S) -> None:
        """Apply the config again with another number of replicas of one deployment; the others stay as they are.

        Returns when so many run and none is leaving. Raises Unavailable if that takes longer.
        """
        from ray import serve

        application = _application(self._config)
        others = [each for each in application.get("deployments", ()) if each["name"] != deployment]
        application["deployments"] = [*others, {"name": deployment, "num_replicas": num_replicas}]
        self._apply()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            states = serve.status().applications[_app_name(self._config)].deployments[deployment].replica_states
            if {state: count for state, count in states.items() if count} == {"RUNNING": num_replicas}:
                return
            time.sleep(POLL_S)
        raise Unavailable(f"{deployment} did not get to {num_replicas} replicas in {timeout_s:g} s: {states}")

    def __enter__(self) -> Endpoints:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_ray(self) -> None:
        self._on_status("starting Ray")
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        telemetry = parse_settings(_application(self._config).get("args") or {}).telemetry
        environment = ray_environment(self._config.get("http_options") or {}, Path(self._folder.name), telemetry)
        self._set = {name: value for name, value in environment.items() if name not in os.environ}
        os.environ.update(self._set)
        import ray

        self._started = True
        ray.init(
            address="local",
            num_cpus=_cpus(self._config),
            resources=_custom_resources(self._config),
            object_store_memory=128 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )

    def _deploy(self) -> None:
        from ray import serve

        self._on_status("starting Serve")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            proxy_location=self._config.get("proxy_location", "HeadOnly"),
            http_options=self._config.get("http_options"),
            grpc_options=self._config.get("grpc_options"),
        )
        self._apply()
        self._wait_until_running()

    def _apply(self) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(self._config), _blocking=False)

    def _wait_until_running(self) -> None:
        from ray import serve

        deadline = time.monotonic() + DEPLOY_TIMEOUT_S
        while time.monotonic() < deadline:
            application = serve.status().applications.get(_app_name(self._config))
            if application is not None:
                if application.status == "RUNNING":
                    return
                failed = application.status in ("DEPLOY_FAILED", "UNHEALTHY")
                problem = _problem(application)
                if failed or problem:
                    raise problem or Unavailable(f"the deployment failed: {_one_line(application.message)}")
                self._on_status(_progress(application))
            time.sleep(POLL_S)
        raise Unavailable(f"the replicas were not up after {DEPLOY_TIMEOUT_S:g} s")


def scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with our autoscaling policy, if its settings want one and it names none."""
    found = copy.deepcopy(dict(config))
    application = _application(found)
    if parse_settings(application.get("args") or {}).autoscaling.enabled:
        application.setdefault("autoscaling_policy", {"policy_function": POLICY})
    return found


def share_cores(config: Mapping[str, Any], cores: int) -> dict[str, Any]:
    """The config with every engine's `threads: auto` replaced by its share of the cores.

    On a host of its own a replica takes every core; here all of them, and their ranks, are on one, and twice as many
    threads as cores cost more than half the speed. Ranks that are told their cores have threads for these.
    """
    shared = copy.deepcopy(dict(config))
    args = _application(shared).setdefault("args", {})
    settings = parse_settings(args)
    threads = max(1, cores // _processes(settings))
    for role, engine in (("target", settings.target.engine), ("draft", settings.draft.engine)):
        if engine.threads == "auto" and engine.cores_per_rank == "auto":
            args[role] = {**(args.get(role) or {})}
            args[role]["engine"] = {**(args[role].get("engine") or {}), "threads": threads}
    return shared


def _application(config: Mapping[str, Any]) -> dict[str, Any]:
    found = [app for app in config.get("applications", ()) if app.get("import_path") == IMPORT_PATH]
    if len(found) != 1:
        raise ConfigError(f"applications: exactly one with import_path {IMPORT_PATH} is needed", param="applications")
    application: dict[str, Any] = found[0]
    return application


def _app_name(config: Mapping[str, Any]) -> str:
    return str(_application(config).get("name", APP_NAME))


def _cpus(config: Mapping[str, Any]) -> int:
    """CPUs to tell Ray of: what the replicas ask for and a little more, however many there are really."""
    settings: AppSettings = parse_settings(_application(config).get("args") or {})
    asked = sum(_ranks(engine, replicas) * engine.num_cpus for engine, replicas in _pools(settings))
    return max(4, os.cpu_count() or 1, int(asked) + 2)


def _custom_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """Those that a cluster's nodes offer to replicas by name, all on this machine: as many as there may be."""
    found: dict[str, float] = {}
    for engine, replicas in _pools(parse_settings(_application(config).get("args") or {})):
        ranks = _ranks(engine, replicas)
        for name, amount in engine.resources.items() if ranks else ():
            found[name] = found.get(name, 0.0) + amount * ranks
    return found


def _processes(settings: AppSettings) -> int:
    """Of all replicas that there may be, with all their ranks."""
    return sum(_ranks(engine, replicas) for engine, replicas in _pools(settings))


def _pools(settings: AppSettings) -> tuple[tuple[TargetSettings | DraftSettings, ReplicaRange], ...]:
    return (settings.target, settings.target_replicas), (settings.draft, settings.draft_replicas)


def _ranks(settings: TargetSettings | DraftSettings, replicas: ReplicaRange) -> int:
    return replicas.most * settings.engine.tensor_parallel_size


def _progress(application: Any) -> str:
    parts = []
    for name, deployment in application.deployments.items():
        running = deployment.replica_states.get("RUNNING", 0)
        total = sum(deployment.replica_states.values())
        parts.append(f"{name} {running}/{total}")
    return "starting replicas: " + ", ".join(parts) if parts else "starting replicas"


def _problem(application: Any) -> PacelineError | None:
    """The first error of ours in a status message: the line a person can act on, out of Ray's traceback."""
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    for text in texts:
        found = re.search(r"paceline\.errors\.(\w+): (.+)", text or "")
        if found:
            return Unavailable(found.group(2).strip())
    return None


def _one_line(message: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
