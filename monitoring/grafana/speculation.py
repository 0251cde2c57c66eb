"""What drafts bring, what they cost, and where they are lost."""

from __future__ import annotations

from panels import MODEL, SIGNED, Dashboard, Panel, Query, Row, gauge, mean, quantile, total_rate

ACCEPTED, DRAFTED = "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
SAVED = f"sum(deriv(paceline_draft_saved_seconds{{{MODEL}}}[5m]))"
RUNS = "vllm:spec_decode_num_drafts_total"


def share(part: str, whole: str, by: str = "") -> str:
    return f"{total_rate(part, by)} / {total_rate(whole, by)}"


BRINGS = Row(
    "What drafts bring",
    [
        Panel(
            "Acceptance",
            "Share of the verified candidates that became output, by source.",
            [
                Query(share(ACCEPTED, DRAFTED), "all"),
                Query(share("paceline_accepted_tokens_total", "paceline_drafted_tokens_total", "source"), "{{source}}"),
            ],
            "percentunit",
            most=1,
        ),
        Panel(
            "Acceptance by place in the run",
            "Of the candidates at each place. The depth is worth it as far as this holds up.",
            [
                Query(
                    share("paceline_accepted_tokens_total", "paceline_drafted_tokens_total", "position"), "{{position}}"
                )
            ],
            "percentunit",
            most=1,
        ),
        Panel(
            "Tokens from a run of candidates",
            "Mean of accepted candidates, and the token of the target's own behind them. 1 is what a step without "
            "drafts gives.",
            [Query(f"1 + {share(ACCEPTED, RUNS)}", "tokens")],
        ),
        Panel(
            "Depth chosen",
            "Candidates verified in a window, mean by source. The depth controller lowers it under load.",
            [Query(mean("paceline_speculation_depth", "source"), "{{source}}")],
        ),
        Panel(
            "Depth, p50 and p95",
            "Over all sources.",
            [Query(quantile(q, "paceline_speculation_depth"), f"p{q * 100:g}") for q in (0.5, 0.95)],
        ),
        Panel(
            "Where candidates end",
            "accepted: output. rolled back: verified in vain. wasted: in time, but the step had no room.",
            [
                Query(total_rate(ACCEPTED), "accepted"),
                Query(total_rate("paceline_rolled_back_tokens_total"), "rolled back"),
                Query(total_rate("paceline_wasted_tokens_total"), "wasted"),
            ],
            "suffix: tok/s",
            stack=True,
        ),
    ],
)

PAYS = Row(
    "Whether drafters pay",
    [
        Panel(
            "Target seconds saved a second",
            "As measured by the targets: the steps that drafts spared, less what verifying them cost. Below 0 drafts "
            "slow the targets down.",
            [Query(SAVED, "saved")],
            SIGNED,
        ),
        Panel(
            "Saved for a second of drafting",
            "Target seconds saved for each second a drafter computes. Less than a drafter's price "
            "(autoscaling.draft.price): it does not pay, and the autoscaler lets it go.",
            [
                # Of all replicas: one drafter works for all targets.
                Query(f"{SAVED} / sum(rate(paceline_drafter_busy_seconds_total{{{MODEL}}}[5m]))", "gain")
            ],
            SIGNED,
        ),
        Panel(
            "Late drafts",
            "Share of the sequences' steps that wanted candidates and found none in time. High: drafters are too few, "
            "too slow or too far away.",
            [
                Query(
                    f"{total_rate('paceline_late_drafts_total')} / "
                    f"({total_rate('paceline_late_drafts_total')} + {total_rate(RUNS)})",
                    "late",
                )
            ],
            "percentunit",
            limits=((0.1, "yellow"), (0.3, "red")),
            most=1,
        ),
    ],
)

DRAFTERS = Row(
    "Drafters",
    [
        Panel(
            "Busy",
            "Share of its time each drafter computes.",
            [Query(total_rate("paceline_drafter_busy_seconds_total", "replica"), "{{replica}}")],
            "percentunit",
            most=1,
        ),
        Panel(
            "Drafted",
            "Tokens each drafter draws.",
            [Query(total_rate("paceline_drafter_tokens_total", "replica"), "{{replica}}")],
            "suffix: tok/s",
        ),
        Panel(
            "Asked for and drawn",
            "Candidates the targets want, and what drafters draw. Drafters run ahead: more is normal.",
            [
                Query(total_rate("paceline_draft_tokens_wanted_total"), "wanted"),
                Query(total_rate("paceline_drafter_tokens_total"), "drawn"),
                Query(total_rate("paceline_drafter_rolled_back_tokens_total"), "drawn in vain"),
            ],
            "suffix: tok/s",
        ),
        Panel(
            "Sequences",
            "That each drafter follows.",
            [Query(gauge("paceline_drafter_sequences", "replica"), "{{replica}}")],
        ),
        Panel(
            "Connections",
            "Draft streams that are up, by target, and by drafter.",
            [
                Query(gauge("paceline_drafters_connected", "replica"), "target {{replica}}"),
                Query(gauge("paceline_drafter_streams", "replica"), "draft {{replica}}"),
            ],
        ),
        Panel(
            "Traffic",
            "Between targets and drafters: token ids, no logits.",
            [Query(total_rate("paceline_draft_link_bytes_total", "direction"), "{{direction}}")],
            "Bps",
        ),
    ],
)

DASHBOARD = Dashboard(
    "paceline-speculation",
    "Paceline: speculation",
    "What drafts bring, what they cost, and where they are lost.",
    [BRINGS, PAYS, DRAFTERS],
)
