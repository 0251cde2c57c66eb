"""From a kubeconfig, or from a pod's own account, to a connection with an API server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.k8s.api import Api

MISSING = "this needs the Kubernetes client: pip install paceline[k8s]"
ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""A pod finds the namespace it runs in there."""


def connect(kubeconfig: Path | None = None, context: str | None = None, namespace: str | None = None) -> Api:
    """A connection as `kubectl` would make it; in a pod without a kubeconfig, as the pod's own account.

    `namespace` None is the context's, else `default`. Raises ConfigError.
    """
    try:
        from kubernetes import client as kubernetes
        from kubernetes import config as loading
    except ModuleNotFoundError:
        raise ConfigError(MISSING) from None
    from paceline.k8s.api import Api

    if kubeconfig is not None and not kubeconfig.is_file():
        raise ConfigError(f"--kubeconfig: {kubeconfig}: there is no such file", param="kubeconfig")
    settings = kubernetes.Configuration()
    try:
        found = _from_kubeconfig(settings, kubeconfig, context)
    except loading.ConfigException as error:
        if kubeconfig is not None or context is not None:
            raise ConfigError(f"kubeconfig: {_one_line(error)}", param="kubeconfig") from None
        try:
            loading.load_incluster_config(client_configuration=settings)
        except loading.ConfigException:
            raise ConfigError(
                "no cluster: there is no kubeconfig and this is no pod; give one with --kubeconfig or in KUBECONFIG",
                param="kubeconfig",
            ) from None
        found = ACCOUNT_NAMESPACE.read_text().strip() if ACCOUNT_NAMESPACE.is_file() else None
    return Api(kubernetes.ApiClient(settings), namespace or found or "default")


def _from_kubeconfig(settings: object, kubeconfig: Path | None, context: str | None) -> str | None:
    """Fill `settings`; returns the context's namespace, if it names one."""
    from kubernetes import config as loading

    file = None if kubeconfig is None else str(kubeconfig)
    contexts, active = loading.list_kube_config_contexts(config_file=file)
    loading.load_kube_config(
        config_file=file,
        context=context,
        client_configuration=settings,
        persist_config=False,  # a command that looks must not rewrite the user's file
    )
    chosen = next((each for each in contexts if each["name"] == context), active)
    found = chosen["context"].get("namespace")
    return None if found is None else str(found)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
