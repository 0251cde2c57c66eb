"""Is it up, how fast is it, how full: the first page to open."""

from __future__ import annotations

from panels import MODEL, REPLICA, Dashboard, Panel, Query, Row, gauge, mean, quantile, rate, router_rate, total_rate

TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
E2E = "vllm:e2e_request_latency_seconds"
ACCEPTED, DRAFTED = "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
FAILED = router_rate("paceline_requests_total", matching=',code=~"5.."')
REQUESTS = router_rate("paceline_requests_total")


def percentiles(title: str, text: str, histogram: str, unit: str = "s", width: int = 8) -> Panel:
    queries = [Query(quantile(q, histogram), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]
    return Panel(title, text, queries, unit, width=width)


def stat(title: str, text: str, expr: str, unit: str = "short", limits: tuple[tuple[float, str], ...] = ()) -> Panel:
    return Panel(title, text, [Query(expr)], unit, "stat", width=3, height=4, limits=limits)


NOW = Row(
    "Now",
    [
        Panel(
            "Replicas",
            "Replicas that answered the last scrape.",
            [Query(gauge("paceline_replicas", "kind", MODEL), "{{kind}}")],
            kind="stat",
            width=4,
            height=4,
        ),
        stat("Running", "Sequences in the engines' steps.", gauge("vllm:num_requests_running")),
        stat(
            "Waiting",
            "Sequences that wait for a place in a target. For more than a moment: too few targets.",
            gauge("vllm:num_requests_waiting"),
            limits=((1, "yellow"), (16, "red")),
        ),
        stat("Output", "Tokens generated in a second.", total_rate("vllm:generation_tokens_total"), "suffix: tok/s"),
        stat("TTFT p95", "Time to first token.", quantile(0.95, TTFT), "s"),
        stat("ITL p95", "Time between two tokens of an answer.", quantile(0.95, ITL), "s"),
        stat(
            "Acceptance",
            "Share of the verified candidates that became output.",
            f"{total_rate(ACCEPTED)} / {total_rate(DRAFTED)}",
            "percentunit",
        ),
        Panel(
            "Failed",
            "Share of the requests answered with 5xx.",
            [Query(f"({FAILED} or vector(0)) / {REQUESTS}")],
            "percentunit",
            "stat",
            width=2,
            height=4,
            limits=((0.01, "yellow"), (0.05, "red")),
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        percentiles("Time to first token", "From a request's arrival at a target to its first token.", TTFT),
        percentiles("Time between tokens", "Inter-token latency. Accepted candidates come together.", ITL),
        percentiles(
            "Time per output token",
            "Of each request, its time after the first token by its further tokens.",
            "vllm:request_time_per_output_token_seconds",
        ),
        percentiles("Whole request", "End to end, as a target saw it.", E2E),
        Panel(
            "Where a request's time goes",
            "Means: waiting for a place, computing the prompt, generating.",
            [Query(mean(f"vllm:request_{part}_time_seconds"), part) for part in ("queue", "prefill", "decode")],
            "s",
            stack=True,
        ),
        Panel(
            "TTFT distribution",
            "Requests by time to first token: two bands are two kinds of requests, such as cached and not.",
            [Query(f"sum by (le) (increase({TTFT}_bucket{{{REPLICA}}}[$__rate_interval]))", "{{le}}", heatmap=True)],
            kind="heatmap",
        ),
    ],
)

LOAD = Row(
    "Load",
    [
        Panel(
            "Requests",
            "By endpoint and status, as the router answered. 429 is load that was refused, 5xx failed.",
            [Query(router_rate("paceline_requests_total", "endpoint, code"), "{{code}} {{endpoint}}")],
            "reqps",
            stack=True,
        ),
        Panel(
            "Running and waiting",
            "Sequences in the engines' steps, and those that wait for a place.",
            [
                Query(gauge("vllm:num_requests_running"), "running"),
                Query(gauge("vllm:num_requests_waiting"), "waiting"),
            ],
            stack=True,
        ),
        Panel(
            "Tokens",
            "Of prompts, those found in KV caches included, and of answers.",
            [
                Query(total_rate("vllm:prompt_tokens_total"), "prompt"),
                Query(total_rate("vllm:generation_tokens_total"), "output"),
            ],
            "suffix: tok/s",
        ),
        Panel(
            "How answers end",
            "stop: the model was done. length: at max_tokens. abort: client gone, or aborted.",
            [Query(total_rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
            "reqps",
            stack=True,
        ),
        Panel(
            "Prompt tokens waiting",
            "Prompt tokens that are still to be computed, by target.",
            [Query(gauge("paceline_queued_prefill_tokens", "replica"), "{{replica}}")],
        ),
        Panel(
            "Lengths",
            "Tokens of prompts and answers.",
            [
                Query(quantile(0.5, "vllm:request_prompt_tokens"), "prompt p50"),
                Query(quantile(0.95, "vllm:request_prompt_tokens"), "prompt p95"),
                Query(quantile(0.5, "vllm:request_generation_tokens"), "answer p50"),
                Query(quantile(0.95, "vllm:request_generation_tokens"), "answer p95"),
            ],
        ),
    ],
)

TARGETS = Row(
    "Targets",
    [
        Panel(
            "Share of its time a target computes, by phase",
            "Seconds a second over all targets. forward is the model; schedule includes admission, propose the wait "
            "for drafts. Flat at the number of targets: they are busy all the time.",
            [Query(total_rate("paceline_step_seconds_sum", "phase"), "{{phase}}")],
            stack=True,
            unit="s",
        ),
        Panel(
            "Step time",
            "Mean of each phase of a step.",
            [Query(mean("paceline_step_seconds", "phase"), "{{phase}}")],
            "s",
            stack=True,
        ),
        Panel(
            "Tokens a step",
            "Prompt and output tokens in a step, by target: what a forward pass is spread over.",
            [Query(mean("vllm:iteration_tokens_total", "replica"), "{{replica}}")],
        ),
        Panel(
            "Running, by target",
            "Uneven for long: sessions pull requests to one target (see Sessions and KV).",
            [Query(gauge("vllm:num_requests_running", "replica"), "{{replica}}")],
        ),
        Panel(
            "KV cache in use, by target",
            "By running sequences. Near 100% sequences are preempted.",
            [Query(gauge("vllm:kv_cache_usage_perc", "replica"), "{{replica}}")],
            "percentunit",
            limits=((0.95, "red"),),
            most=1,
        ),
        Panel(
            "Trouble",
            "Things replicas warn of (/status has the words), preemptions, targets lost in the middle of an answer.",
            [
                Query(gauge("paceline_warnings", "replica"), "warnings of {{replica}}"),
                Query(f"sum({rate('vllm:num_preemptions_total')}) * 60", "preemptions a minute"),
                Query(f"{router_rate('paceline_resumptions_total')} * 60", "answers resumed a minute"),
            ],
        ),
    ],
)

DASHBOARD = Dashboard(
    "paceline-overview",
    "Paceline: overview",
    "Is it up, how fast is it, how full.",
    [NOW, LATENCY, LOAD, TARGETS],
)
