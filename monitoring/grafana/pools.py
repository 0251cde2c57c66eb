"""Where sessions live, and how many replicas there are and why."""

from __future__ import annotations

from panels import MODEL, REPLICA, Dashboard, Panel, Query, Row, gauge, quantile, router_rate, total_rate

DECISIONS = "paceline_autoscaling_decisions_total"


def handed(what: str) -> str:
    return f'sum(increase(paceline_handoff_sessions_total{{{REPLICA},what="{what}"}}[$__rate_interval]))'


PLACES = Row(
    "Where sessions are",
    [
        Panel(
            "Sessions",
            "running: in a step now. idle: KV on the device. host, disk: KV put aside.",
            [Query(gauge("paceline_sessions", "state"), "{{state}}")],
            stack=True,
        ),
        Panel(
            "Why requests went where they went",
            "As the router placed them. Those that pass over a session's holder cost a hand-off or a prefill.",
            [Query(router_rate("paceline_routed_requests_total", "reason"), "{{reason}}")],
            "reqps",
            stack=True,
        ),
        Panel(
            "Sessions by target",
            "In any state. Uneven for long: hand some over (paceline status names them).",
            [Query(gauge("paceline_sessions", "replica"), "{{replica}}")],
        ),
    ],
)

CACHE = Row(
    "What the KV cache spares",
    [
        Panel(
            "Hit rate",
            "Share of the prompt tokens whose KV was found anywhere.",
            [
                Query(
                    f"{total_rate('vllm:prefix_cache_hits_total')} / {total_rate('vllm:prefix_cache_queries_total')}",
                    "hits",
                )
            ],
            "percentunit",
            most=1,
        ),
        Panel(
            "Prompt tokens by where their KV was",
            "device, host, disk: found there. computed: found nowhere.",
            [
                Query(total_rate("paceline_kv_hit_tokens_total", "tier"), "{{tier}}"),
                Query(
                    f"{total_rate('vllm:prefix_cache_queries_total')} - {total_rate('vllm:prefix_cache_hits_total')}",
                    "computed",
                ),
            ],
            "suffix: tok/s",
            stack=True,
        ),
        Panel(
            "Device KV in use",
            "By running sequences, by target. What is not in use holds idle sessions until it is needed.",
            [Query(gauge("vllm:kv_cache_usage_perc", "replica"), "{{replica}}")],
            "percentunit",
            limits=((0.95, "red"),),
            most=1,
        ),
        Panel(
            "KV of idle sessions",
            "Tokens: on the devices, in host memory, on disk.",
            [
                Query(gauge("paceline_kv_tokens_cached"), "device"),
                Query(gauge("paceline_kv_tier_tokens", "tier"), "{{tier}}"),
            ],
            stack=True,
        ),
        Panel(
            "Memory and disk of the tiers",
            "What KV put aside takes.",
            [Query(gauge("paceline_kv_tier_bytes", "tier"), "{{tier}}")],
            "bytes",
            stack=True,
        ),
        Panel(
            "Preemptions",
            "Sequences that lost their place to others for lack of KV, and have to be computed anew.",
            [Query(total_rate("vllm:num_preemptions_total", "replica"), "{{replica}}")],
            "ops",
        ),
    ],
)

MOVES = Row(
    "Moves",
    [
        Panel(
            "Restores",
            "Sessions put back into the KV cache from a tier; late: computed, since they did not come in time; failed: "
            "the file was damaged; dropped: no tier had room.",
            [
                Query(total_rate("paceline_kv_restores_total", "tier"), "from {{tier}}"),
                Query(total_rate("paceline_kv_late_restores_total"), "late"),
                Query(total_rate("paceline_kv_failed_restores_total"), "failed"),
                Query(total_rate("paceline_kv_tier_drops_total"), "dropped"),
            ],
            "ops",
        ),
        Panel(
            "Hand-offs",
            "Sessions whose KV changed its replica. failed, missing: computed anew from the history.",
            [Query(handed(what), what) for what in ("received", "failed", "missing")],
        ),
        Panel(
            "Hand-off traffic",
            "KV between replicas.",
            [Query(total_rate("paceline_handoff_bytes_total", "direction"), "{{direction}}")],
            "Bps",
        ),
    ],
)

SESSIONS = Dashboard(
    "paceline-sessions",
    "Paceline: sessions and KV",
    "Where sessions live, what their KV spares, what moving it costs.",
    [PLACES, CACHE, MOVES],
)

SIZE = Row(
    "How many replicas",
    [
        Panel(
            f"{pool.capitalize()} replicas",
            "wanted: by the autoscaler, or by the settings. there: what answers.",
            [
                Query(f'sum(paceline_autoscaling_replicas_wanted{{{MODEL},pool="{pool}"}})', "wanted"),
                Query(f'sum(paceline_replicas{{{MODEL},kind="{pool}"}})', "there"),
            ],
            width=12,
        )
        for pool in ("target", "draft")
    ],
)

WHY = Row(
    "Why",
    [
        Panel(
            "Replicas each signal asks for: targets",
            "The highest counts, within the bounds, the step limits and the delays of the settings.",
            [Query(f'max by (signal) (paceline_autoscaling_signal{{{MODEL},pool="target"}})', "{{signal}}")],
        ),
        Panel(
            "Replicas each signal asks for: drafts",
            "Demand for drafts, late drafts, and what drafters save against what they cost.",
            [Query(f'max by (signal) (paceline_autoscaling_signal{{{MODEL},pool="draft"}})', "{{signal}}")],
        ),
        Panel(
            "Decisions",
            "Changes of size, by pool, direction and reason; the log and `paceline top` have them in words.",
            [
                Query(
                    f"sum by (pool, direction, reason) (increase({DECISIONS}{{{MODEL}}}[$__rate_interval])) > 0",
                    "{{pool}} {{direction}}: {{reason}}",
                )
            ],
        ),
        Panel(
            "Trouble",
            "Looks at the load at which the policy failed: the pools stay as they are then. Pools that wait for "
            "a replica which cannot be started: /status says why.",
            [
                Query(f"sum(increase(paceline_autoscaling_errors_total{{{MODEL}}}[$__rate_interval]))", "errors"),
                Query(f"max(paceline_autoscaling_waiting{{{MODEL}}})", "pools waiting"),
            ],
            limits=((1, "red"),),
        ),
        Panel(
            "Time to first token",
            "p95, with the objective if Prometheus has these rules (prometheus/alerts.yaml).",
            [
                Query(quantile(0.95, "vllm:time_to_first_token_seconds"), "p95"),
                Query("paceline:ttft_objective_seconds", "objective"),
            ],
            "s",
        ),
        Panel(
            "Time between tokens",
            "p95, with the objective.",
            [
                Query(quantile(0.95, "vllm:inter_token_latency_seconds"), "p95"),
                Query("paceline:itl_objective_seconds", "objective"),
            ],
            "s",
        ),
        Panel(
            "Load of a target",
            "Means over the targets: sequences running and waiting.",
            [
                Query(f"avg(vllm:num_requests_running{{{REPLICA}}})", "running"),
                Query(f"avg(vllm:num_requests_waiting{{{REPLICA}}})", "waiting"),
            ],
            stack=True,
        ),
        Panel(
            "Prompt tokens waiting",
            "Over all targets.",
            [Query(gauge("paceline_queued_prefill_tokens"), "tokens")],
        ),
        Panel(
            "Busy drafters",
            "Share of their time that drafters compute, mean.",
            [Query(f"avg(rate(paceline_drafter_busy_seconds_total{{{REPLICA}}}[$__rate_interval]))", "busy")],
            "percentunit",
            most=1,
        ),
    ],
)

AUTOSCALING = Dashboard(
    "paceline-autoscaling",
    "Paceline: autoscaling",
    "How many replicas there are, how many are wanted, and why.",
    [SIZE, WHY],
)
