"""What a load test leaves: a page with tables and plots, its figures, and a line for each request."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from records import COLD, TIERS, WARM, Record, by_asked_share

Summary = Mapping[str, Any]

COLOURS = dict(
    zip(TIERS, ("#777777", "#1b7837", "#7fbf7b", "#d95f02", "#a50026", "#1f77b4"), strict=True)
)  # from grey for the base over greens for warm to reds for cold
#: Labels by which a series is told apart; over all others it is summed.
LABELS = ("outcome", "result", "reason", "tier", "kind", "state")
#: Of vLLM's series these are shown; summary.json has all.
SHOWN = (
    "qaa_", "vllm:num_preemptions", "vllm:prefix_cache", "vllm:prompt_tokens_total", "vllm:generation_tokens",
    "vllm:request_queue_time", "vllm:iteration_tokens", "vllm:kv_cache_usage",
)  # fmt: skip
HIDDEN = ("qaa_catalogue_fingerprint", "qaa_engine_account_age_seconds", "qaa_source_age_seconds")


# ---------------------------------------------------------------------------------------- the server's series


def read_series(text: str) -> dict[str, float]:
    """Our and vLLM's series of a page of /metrics: `name{outcome="success"}` -> value. Buckets are left out."""
    from prometheus_client.parser import text_string_to_metric_families

    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(("qaa_", "vllm:")) and not sample.name.endswith(
                ("_bucket", "_created", "_info")
            ):
                labels = ",".join(f'{name}="{sample.labels[name]}"' for name in LABELS if name in sample.labels)
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] += sample.value
    return dict(found)


def series_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A head, how far counters went, how many values histograms got and their mean, and gauges' values."""
    rows: list[tuple[str, ...]] = [("series", "change", "mean, or before -> after")]
    for name, value in sorted(after.items()):
        change = value - before.get(name, 0.0)
        series, brace, labels = name.partition("{")
        total = f"{series.removesuffix('_count')}_sum{brace}{labels}"
        if not change or series.endswith("_sum") or not name.startswith(SHOWN) or name in HIDDEN:
            continue
        if series.endswith("_count") and total in after:
            mean = (after[total] - before.get(total, 0.0)) / change
            rows.append((f"`{name.replace('_count', '', 1)}`", f"{change:,.0f}", f"{mean:.4g}"))
        elif series.endswith("_total"):
            rows.append((f"`{name}`", f"{change:,.0f}", ""))
        else:
            rows.append((f"`{name}`", "", f"{before.get(name, 0.0):,.6g} -> {value:,.6g}"))
    return rows


# -------------------------------------------------------------------------------------------------- tables


def milliseconds(seconds: float | None) -> str:
    """A time for a table; a dash if it is not known."""
    return "-" if seconds is None else f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def percentiles(figures: Mapping[str, float | None], *which: str) -> str:
    """Such as `12 / 18` milliseconds."""
    return " / ".join(milliseconds(figures[name]) for name in which)


def middle(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Median (least to most)."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{form(statistics.median(known))} ({form(min(known))} to {form(max(known))})"


HEAD = (
    "", "answered", "failed", "429", "requests/s", "tokens/s", "TTFT p50 / p95 / p99, ms", "ITL p50 / p95, ms",
    "longest gap p50 / p95, ms", "end to end p50 / p95, ms",
)  # fmt: skip


def latency_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A head, and a line for each tier, each kind (`base` is both) and all."""
    rows: list[tuple[str, ...]] = [HEAD]
    for name, f in (summary["tiers"] | summary["kinds"] | {"all": summary["all"]}).items():
        counts = (str(f[key]) for key in ("answered", "failed", "refused"))
        rates = (f"{f['requests_per_second'] or 0:.2f}", f"{f['tokens_per_second'] or 0:.1f}")
        times = (percentiles(f[key], "p50", "p95") for key in ("inter_token_s", "longest_gap_s", "end_to_end_s"))
        rows.append((name, *counts, *rates, percentiles(f["ttft_s"], "p50", "p95", "p99"), *times))
    return rows


def text_table(summary: Summary) -> list[str]:
    """The essence, for a terminal."""
    rows = [row[:8] for row in latency_rows(summary)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return [*lines, *notes(summary)]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, numbers to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|---|{'---:|' * (len(rows[0]) - 1)}", *lines[1:]]


def cold_over_warm(summary: Summary) -> str | None:
    """How much later the first token of a cold adapter comes, in words; None if there was none of either."""
    cold, warm = (summary["ttft_s"][which]["p50"] for which in ("cold", "warm"))
    if not cold or not warm:
        return None
    return (
        f"First token of a cold adapter ({', '.join(COLD)}) after {milliseconds(cold)} ms, of a warm one "
        f"({', '.join(WARM)}) after {milliseconds(warm)} ms (medians): {cold / warm:.2f} times; "
        f"{summary['cold_share']:.1%} were cold."
    )


def notes(summary: Summary) -> list[str]:
    """What else there is to say, a line each."""
    lines = [line] if (line := cold_over_warm(summary)) else []
    if slo := summary["slo"]:
        labels = {"first_s": "TTFT", "inter_token_s": "ITL", "seconds": "the whole answer"}
        limits = [f"{label} at most {slo[key]:g} s" for key, label in labels.items() if key in slo]
        reached = summary["all"]["attainment"]
        lines.append(
            f"SLO {'met' if slo['met'] else 'missed'}: {', '.join(limits)}, for {slo['share']:.1%} of the requests"
            + ("; none ended." if reached is None else f"; {reached:.2%} did.")
        )
    for asked, turns in by_asked_share(summary["turns"]).items():
        shares = [turn["cold_share"] for turn in turns if turn["cold_share"] is not None]
        if shares and abs((were := statistics.median(shares)) - asked) > 0.2:
            lines.append(
                f"{asked:.0%} were to be cold, {were:.0%} were: the server's memory (--adapter-cache-bytes) holds "
                + ("some of those that were to be cold." if were < asked else "not all that were to be hot.")
            )
    if unfinished := summary["all"]["unfinished"]:
        lines.append(f"{unfinished} requests still ran at the end and count nowhere (--stop-timeout).")
    lines += [f"{name}: swapped {n['done']} times, {n['failed']} failed." for name, n in summary["swaps"].items()]
    return [*lines, *(f"Failed {count} times: {problem}" for problem, count in summary["failures"].items())]


def share_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A head, and rates for each share of cold requests that was asked for, median over its turns (spread)."""
    rows: list[tuple[str, ...]] = [
        ("asked to be cold", "turns", "were cold", "requests/s", "tokens/s", "TTFT warm, ms", "TTFT cold, ms")
    ]
    for asked, turns in by_asked_share(summary["turns"]).items():
        forms = {"cold_share": "{:.0%}", "requests_per_second": "{:.2f}", "tokens_per_second": "{:.0f}"}
        columns = [middle((turn[key] for turn in turns), form.format) for key, form in forms.items()]
        firsts = [turn["ttft_p50_s"] for turn in turns]
        columns += [middle((first[which] for first in firsts), milliseconds) for which in ("warm", "cold")]
        rows.append((f"{asked:.0%}", str(len(turns)), *columns))
    return rows


# --------------------------------------------------------------------------------------------------- plots


def label_decades(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade: a few times to first token are seldom a decade apart."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def streamed(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The requests that had a first token, by where the adapter was."""
    for tier in TIERS:
        if mine := [record for record in records if record.tier == tier and record.first_s is not None]:
            yield tier, mine


def plot_first_token(axes: Any, summary: Summary, records: Sequence[Record]) -> None:
    """How many of a tier's requests have their first token after so long."""
    for tier, mine in streamed([record for record in records if record.at >= summary["began"]]):
        firsts = [1000 * (record.first_s or 0) for record in mine]
        axes.ecdf(firsts, color=COLOURS[tier], label=f"{tier} ({len(firsts)})")
    axes.set(xscale="log", xlabel="time to first token, ms", ylabel="share of the requests", ylim=(0, 1.02))
    label_decades(axes.xaxis)
    axes.legend(title="adapter was in")


def plot_cold_share(axes: Any, summary: Summary, records: Sequence[Record]) -> None:
    """Answers a second against the share of cold requests, a point for each turn."""
    turns = [turn for turn in summary["turns"] if turn["cold_share"] is not None]
    middles = [
        {key: statistics.median(turn[key] for turn in mine) for key in ("cold_share", "requests_per_second")}
        for mine in by_asked_share(turns).values()
    ]
    dots = {"marker": "o", "linestyle": "", "alpha": 0.6, "label": "a turn"}
    for points, look in ((turns, dots), (middles, {"label": "median"})):
        x = [100 * point["cold_share"] for point in points]
        axes.plot(x, [point["requests_per_second"] for point in points], color=COLOURS["store"], **look)
    axes.set(xlabel="requests for cold adapters, %", ylabel="answers a second", ylim=(0, None), xlim=(-2, 102))
    axes.legend()


def plot_time(axes: Any, summary: Summary, records: Sequence[Record]) -> None:
    """Each request's time to first token, when it was sent, the warm-up too."""
    for tier, mine in streamed(records):
        times = [1000 * (record.first_s or 0) for record in mine]
        axes.plot([record.at for record in mine], times, ".", markersize=3, color=COLOURS[tier], label=tier)
    if summary["began"]:
        axes.axvspan(0, summary["began"], color="#eeeeee", label="warm-up")
    axes.set(xlabel="seconds", ylabel="time to first token, ms", yscale="log")
    label_decades(axes.yaxis)
    axes.legend(markerscale=3, ncols=2)


PLOTS = {"first-token": plot_first_token, "cold-share": plot_cold_share, "time": plot_time}


def draw(path: Path, plot: Callable[[Any, Summary, Sequence[Record]], None], *data: Any) -> None:
    """One plot as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plot(axes, *data)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------- report


def write_report(directory: Path, summary: Summary, records: Sequence[Record]) -> None:
    """Write report.md with its plots, summary.json and records.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    with (directory / "records.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record._asdict()) + "\n" for record in records)
    plots = list(PLOTS) if any(record.first_s is not None for record in records) else []
    if not any(turn["cold_share"] is not None for turn in summary["turns"]):
        plots = [name for name in plots if name != "cold-share"]
    for name in plots:
        draw(directory / f"{name}.png", PLOTS[name], summary, records)
    models = ", ".join(f"{count} {kind}" for kind, count in summary["models"].items())
    shares, series = share_rows(summary), series_rows(summary["server"]["before"], summary["server"]["after"])
    lines = [
        "# Load test", "", f"    {summary['command']}", "",
        f"{summary['seconds']:.0f} seconds after {summary['began']:.0f} of warm-up, {summary['users']} users, "
        f"against {summary['host']} with {models}; locust {summary['locust']}.", "",
        *markdown(latency_rows(summary)), "", *(f"- {line}" for line in notes(summary)), "",
        *(["## Cold requests", "", *markdown(shares), ""] if shares[1:] else []),
        *(f"![{name}]({name}.png)" for name in plots), "",
        *(["## The server's series", "", *markdown(series)] if series[1:] else []),
    ]  # fmt: skip
    (directory / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
