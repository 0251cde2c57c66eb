"""The application builder: deployments decorated and bound. `import_path: paceline.serving.app:build`."""

# No `from __future__ import annotations` here: Ray Serve reads the builder's annotation to check `args:`.

from typing import Any

import ray
from pydantic import SecretStr
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application

from paceline.config import AppSettings
from paceline.config_autoscaling import ReplicaRange
from paceline.rpc.draft_credentials import new_token
from paceline.serving import bundles
from paceline.serving.draft import Draft
from paceline.serving.leaving import draft_leaving_s, router_leaving_s, target_leaving_s
from paceline.serving.logs import logging_config
from paceline.serving.router import Router
from paceline.serving.routing import SessionRouter
from paceline.serving.target import Target
from paceline.telemetry.tracing import check_packages

ROUTING_STATS_PERIOD_S = 2.0
ROUTER = "Router"
SCALED_BY = {"autoscaling", "target", "draft"}
"""Settings that the policy sees: none of them has a secret."""
HELD_POLICY = "paceline.serving.autoscaling:Held"
SPARE_REQUESTS = 16
"""Requests a target accepts beyond what its engine runs and queues, so that the engine refuses, not Serve."""


def build(args: AppSettings) -> Application:
    """Router, Target and, unless there are none, Draft. Raises ConfigError for ranks that cannot work."""
    bundles.check(args, ray.nodes() if ray.is_initialized() else None)
    check_packages(args.telemetry)
    # Drafts and targets of one deployment know each other by it; neither settings nor status have it.
    token = new_token() if args.draft.security.mode == "auto" else None
    draft = _draft(args, token)
    target = _target(args, draft is not None, token)
    router = serve.deployment(
        serve.ingress()(Router),
        name=ROUTER,
        logging_config=logging_config(args.telemetry),
        num_replicas=args.num_routers,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=router_leaving_s(args),
    )
    return router.bind(args, target, draft) if draft is not None else router.bind(args, target)


def _target(args: AppSettings, with_drafts: bool, token: SecretStr | None) -> Application:
    engine = args.target.engine
    return serve.deployment(
        Target,
        name="Target",
        logging_config=logging_config(args.telemetry),
        **_count(args, args.target_replicas),
        max_ongoing_requests=engine.max_num_seqs + engine.max_queued_requests + SPARE_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=target_leaving_s(args),
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter,
            request_router_kwargs={"mode": args.sessions.routing, "load_bound": args.sessions.load_bound},
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
        ),
        **bundles.options(args.target),
    ).bind(args, "Draft" if with_drafts and args.speculation.enabled else None, ROUTER, token)


def _draft(args: AppSettings, token: SecretStr | None) -> Application | None:
    if args.draft_replicas.most == 0:
        return None
    return serve.deployment(
        Draft,
        name="Draft",
        logging_config=logging_config(args.telemetry),
        **_count(args, args.draft_replicas),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=draft_leaving_s(args),
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),  # knows calls for one replica
        **bundles.options(args.draft),
    ).bind(args, token)


def _count(args: AppSettings, replicas: ReplicaRange) -> dict[str, Any]:
    """Of a deployment, in Ray Serve's words.

    Our policy has delays of its own; Serve's would come on top. It finds the settings in the kwargs of the deployment's
    policy, and the deployment has one so that Serve's own does not scale it if the application has none.
    """
    if not args.autoscaling.enabled:
        return {"num_replicas": replicas.first}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.fewest,
            "initial_replicas": replicas.first,
            "max_replicas": replicas.most,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "downscale_to_zero_delay_s": 0.0,
            "look_back_period_s": 5 * args.autoscaling.interval_s,  # Serve asks replicas five times in it
            "metrics_interval_s": args.autoscaling.interval_s,
            "policy": {
                "policy_function": HELD_POLICY,
                "policy_kwargs": args.model_dump(mode="json", include=SCALED_BY, exclude_defaults=True),
            },
        }
    }
