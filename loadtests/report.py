"""Plots and a short report.md from the summary of a load test and locust's CSV files.

    python loadtests/report.py reports/load/summary.json --csv reports/load/load --output reports/load

The plots over time need locust's --csv PREFIX with --csv-full-history; without them they are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

#: One colour for a class in every plot.
COLOURS = {"base": "#555555", "qaa": "#1f77b4", "lora": "#d95f02", "adapter": "#1b9e77", "all": "#000000"}

History = Mapping[tuple[str, str], Sequence[Mapping[str, str]]]


def read_history(path: Path) -> History:
    """Rows of locust's PREFIX_stats_history.csv by type and name, in the order of time; none if it is missing."""
    rows: defaultdict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows[row["Type"], row["Name"]].append(row)
    return rows


def column(rows: Sequence[Mapping[str, str]], name: str, began: float) -> tuple[list[float], list[float]]:
    """Seconds since the beginning, and a column; rows in which it is not a number are left out."""
    pairs = [(float(row["Timestamp"]) - began, row[name]) for row in rows if row[name] not in ("", "N/A")]
    return [pair[0] for pair in pairs], [float(pair[1]) for pair in pairs]


# --------------------------------------------------------------------------------------------------- plots


def plot_throughput(axes: Axes, summary: Mapping[str, Any], history: History) -> None:
    """HTTP requests a second, and users (or requests under way, if arrivals are open) over time."""
    rows = history[("", "Aggregated")]
    axes.plot(*column(rows, "Requests/s", summary["began"]), color=COLOURS["qaa"], label="requests/s")
    axes.plot(*column(rows, "Failures/s", summary["began"]), color="#c00000", label="failures/s")
    axes.set(xlabel="seconds", ylabel="HTTP requests a second", ylim=(0, None))
    right = axes.twinx()
    if summary["open"] is not None and summary["in_flight"]:
        right.step(*zip(*summary["in_flight"], strict=True), color="#999999", where="post")
        right.set(ylabel="requests under way (grey)", ylim=(0, None))
    else:
        right.step(*column(rows, "User Count", summary["began"]), color="#999999", where="post")
        right.set(ylabel="users (grey)", ylim=(0, None))
    axes.legend(loc="lower right")


def plot_percentiles(kind: str) -> Callable[[Axes, Mapping[str, Any], History], None]:
    """A plot of the median and the 95th percentile of the last ten seconds by class, for a type of statistic."""

    def plot(axes: Axes, summary: Mapping[str, Any], history: History) -> None:
        for name in summary["classes"]:
            rows = history[kind, name]
            for percentile, style in (("50%", "-"), ("95%", ":")):
                pairs = zip(*column(rows, percentile, summary["began"]), strict=True)
                known = [(when, value) for when, value in pairs if value]  # 0: none in the last ten seconds
                label = f"{name} {percentile}"
                axes.plot(
                    [w for w, _ in known], [v for _, v in known], style, color=COLOURS.get(name), label=label
                )
        limit = (summary["slo"] or {}).get({"TTFT": "ttft_ms", "inter-token": "inter_token_ms"}[kind])
        if limit:
            axes.axhline(limit, color="#c00000", linewidth=0.8, label="SLO")
        # A limit may be a hundred times what is measured.
        axes.set(xlabel="seconds", ylabel=f"{kind}, ms (last 10 s)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(ncols=2, fontsize="small")

    return plot


def plot_attainment(axes: Axes, summary: Mapping[str, Any], history: History) -> None:
    """Share of requests that met the SLO by class, beside the share that was wanted."""
    figures = [*summary["classes"].items(), ("all", summary["all"])]
    shares = [(name, 100 * f["attainment"]) for name, f in figures if f["attainment"] is not None]
    bars = axes.bar(
        [n for n, _ in shares], [s for _, s in shares], color=[COLOURS.get(n, "#777777") for n, _ in shares]
    )
    axes.bar_label(bars, fmt="%.1f %%")
    if summary["slo"] is not None:
        axes.axhline(100 * summary["slo"]["share"], color="#c00000", linewidth=0.8)
    axes.set(ylabel="requests that met the SLO, %" if summary["slo"] else "requests that were answered, %")
    axes.set(ylim=(0, 110))


def plot_ramp(axes: Axes, summary: Mapping[str, Any], history: History) -> None:
    """Answers a second against users, with the knee."""
    ramp = summary["ramp"]
    steps = ramp["steps"]
    axes.plot([s["users"] for s in steps], [s["requests_per_second"] for s in steps], "o-", color=COLOURS["qaa"])
    if ramp["knee"]:
        axes.axvline(ramp["knee"]["users"], color="#c00000", linewidth=0.8, label=f"knee: {ramp['knee']['users']}")
        axes.legend()
    axes.set(xlabel="users", ylabel="answers a second", ylim=(0, None))


def draw(path: Path, plot: Callable[[Axes, Mapping[str, Any], History], None], *data: Any) -> None:
    """One plot as a PNG file."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    plot(axes, *data)
    axes.grid(alpha=0.3)
    axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------- report


def milliseconds(seconds: float | None) -> str:
    """A time for a table; a dash if it is not known."""
    return "-" if seconds is None else f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def table(summary: Mapping[str, Any]) -> list[str]:
    """Markdown rows, one for each class and one for all."""
    rows = [
        "| class | models | answered | failed | 429 | requests/s | tokens/s | TTFT p50 / p95 / p99, ms "
        "| inter-token p50 / p95 / p99, ms | end to end p50 / p95, s | SLO |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, f in [*summary["classes"].items(), ("all", summary["all"])]:
        models = summary["models"].get(name, sum(summary["models"].values()) if name == "all" else 0)
        ttft, gap = (
            " / ".join(milliseconds(f[key][p]) for p in ("p50", "p95", "p99"))
            for key in ("ttft_s", "inter_token_s")
        )
        ends = " / ".join(
            "-" if f["end_to_end_s"][p] is None else f"{f['end_to_end_s'][p]:.2f}" for p in ("p50", "p95")
        )
        share = "-" if f["attainment"] is None else f"{f['attainment']:.1%}"
        rates = f"{f['requests_per_second'] or 0:.2f} | {f['tokens_per_second'] or 0:.1f}"
        cells = (name, models, f["answered"], f["failed"], f["refused"], rates, ttft, gap, ends, share)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What else there is to say, a line each."""
    lines = []
    if slo := summary["slo"]:
        limits = [
            f"{label} at most {slo[key]:g}{unit}"
            for key, label, unit in (
                ("ttft_ms", "TTFT", " ms"), ("inter_token_ms", "mean inter-token time", " ms"),
                ("seconds", "the whole answer", " s"),
            )
            if slo[key] is not None
        ]  # fmt: skip
        reached = "no request ended" if slo["attainment"] is None else f"{slo['attainment']:.2%} did"
        lines.append(
            f"SLO **{'met' if slo['met'] else 'missed'}**: {', '.join(limits) or 'an answer'}, for "
            f"{slo['share']:.1%} of the requests; {reached}."
        )
    else:
        lines.append("No SLO was given; the column SLO is the share of requests that were answered.")
    if unfinished := summary["all"]["unfinished"]:
        lines.append(f"{unfinished} requests still ran when the test ended, and count nowhere (--stop-timeout).")
    if summary["open"]:
        late = summary["open"]["late"]
        lines.append(
            f"Open arrivals: {summary['open']['sent']} requests sent, {late} of them late"
            + (
                f", by up to {summary['open']['late_s']['max']:.2f} s; times count from when they were due."
                if late
                else "."
            )
        )
    for name, swap in summary["swaps"].items():
        took = " and ".join(milliseconds(swap["seconds"][key]) for key in ("p50", "max"))
        lines.append(
            f"`{name}` was swapped {swap['done']} times, {swap['failed']} failed; median and most: {took} ms."
        )
    if ramp := summary["ramp"]:
        knee = ramp["knee"]
        found = f"{knee['users']} users, {knee['requests_per_second']:.2f} answers/s" if knee else "none"
        lines.append(f"Knee: {found}. The ramp ended because {ramp['ended']}.")
    lines += [f"Failed {count} times: {problem}" for problem, count in summary["failures"].items()]
    return lines


def write_report(summary: Mapping[str, Any], history: History, output: Path) -> Path:
    """Write report.md and the plots.

    Returns:
        the path of report.md.
    """
    output.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Axes, Mapping[str, Any], History], None]] = {}
    if history:
        plots["throughput"] = plot_throughput
        for kind, name in (("TTFT", "first-token"), ("inter-token", "inter-token")):
            if any(history[kind, model_class] for model_class in summary["classes"]):
                plots[name] = plot_percentiles(kind)
    plots["attainment"] = plot_attainment
    if summary["ramp"] and summary["ramp"]["steps"]:
        plots["ramp"] = plot_ramp
    for name, plot in plots.items():
        draw(output / f"{name}.png", plot, summary, history)
    lines = [
        "# Load test", "", f"    {summary['command']}", "",
        f"{summary['seconds']:.0f} seconds against {summary['host']}, locust {summary['locust']}.", "",
        *table(summary), "", *(f"- {line}" for line in notes(summary)), "",
        *(f"![{name}]({name}.png)" for name in plots),
    ]  # fmt: skip
    path = output / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="what locust wrote for --summary")
    parser.add_argument("--csv", metavar="PREFIX", type=Path, help="what locust was given for --csv")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="where to (default: here)")
    args = parser.parse_args()
    summary = json.loads(args.summary.read_text(encoding="utf-8"))
    history = read_history(Path(f"{args.csv}_stats_history.csv")) if args.csv else {}
    print(write_report(summary, history, args.output))


if __name__ == "__main__":
    main()
