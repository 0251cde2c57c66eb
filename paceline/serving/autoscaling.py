"""What a Serve config names as its `autoscaling_policy`.

Serve pickles this module's classes by value into its controller: everything else is imported there.
"""

from __future__ import annotations

from typing import Any


class Autoscaler:
    """The application's policy: `policy_function: paceline.serving.autoscaling:Autoscaler`.

    It has no arguments: its settings are the `autoscaling` section of the application's `args`.
    """

    def __init__(self) -> None:
        from paceline.autoscaling.load_policy import LoadPolicy
        from paceline.serving import victims
        from paceline.serving.journal import ClusterKeyValue, Journal
        from paceline.serving.scaling import Scaling

        store = ClusterKeyValue()
        held = victims.install()
        self._scaling = Scaling(LoadPolicy, lambda app: Journal(app, store), on_sessions=held.put)

    def __call__(self, contexts: Any) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        return self._scaling.decide(contexts), {}


class Held:
    """The policy of each deployment, which counts if the application has none: it stays as it is, and says why."""

    def __init__(self, **_: Any) -> None:
        self._told = False

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if not self._told:
            import logging

            self._told = True
            logging.getLogger("ray.serve").error(
                "autoscaling.enabled is set, and the application %r has no autoscaling_policy: %s stays as it is. Add "
                "`autoscaling_policy: {policy_function: 'paceline.serving.autoscaling:Autoscaler'}` to the application",
                context.app_name,
                context.deployment_name,
            )
        return context.target_num_replicas, {}
