"""The report's figures, each in colours for light and for dark paper."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from qaa_serve.training.compare.plan import BASE
from qaa_serve.training.compare.results import smoothed

#: Told apart by people who see few colours too; readable on white and on black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")
_BASE_COLOUR = "#888888"
_MARKERS = "os^Dv<>P"

_PAPER = {
    "light": {"ink": "#222222", "paper": "#ffffff", "grid": "#dddddd"},
    "dark": {"ink": "#dddddd", "paper": "#1b1d20", "grid": "#3a3d42"},
}

#: Figure of bars -> what each panel shows: a key of the summaries, the unit in which it is drawn, its title.
_BARS = {
    "quality": (
        ("bleu", 1, "BLEU, more is better"),
        ("rouge_l", 1, "ROUGE-L (F1, %), more is better"),
        ("exact_match", 1, "exact match (%), more is better"),
        ("bertscore", 1, "BERTScore (F1, %), more is better"),
        ("test_loss", 1, "test loss (nats a token), less is better"),
    ),
    "memory": (
        ("peak_rss_bytes", 2**20, "peak resident memory of the process (MiB)"),
        ("saved_for_backward_bytes", 2**20, "kept for the backward pass, first step (MiB)"),
        ("peak_cuda_bytes", 2**30, "peak of the CUDA allocator (GiB)"),
    ),
    "seconds": (("seconds_per_step", 1, "seconds a step (median of a training, mean over seeds)"),),
}


def draw(results: Mapping[str, Any], paper: str = "light") -> dict[str, bytes]:
    """All figures that the results have something for.

    Args:
        results: as in results.json.
        paper: ``light`` or ``dark``.

    Returns:
        PNG files by name: those of ``report.CAPTIONS``.
    """
    look = _PAPER[paper]
    drawn = {}
    makers: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
        "loss": _loss,
        "course": _course,
        "validation": _validation,
        "parameters": _parameters,
        **{name: partial(_bars, panels=panels) for name, panels in _BARS.items()},
    }
    style: Any = {
        "font.size": 9,
        "figure.facecolor": look["paper"],
        "axes.facecolor": look["paper"],
        "axes.edgecolor": look["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": look["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    } | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), look["ink"])
    with mpl.rc_context(style):
        for name, maker in makers.items():
            figure = maker(results)
            if figure is not None:
                file = io.BytesIO()
                # No date and no version of matplotlib: the same results draw the same file.
                figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
                drawn[name] = file.getvalue()
    return drawn


def _colours(results: Mapping[str, Any]) -> dict[str, str]:
    names = [variant["name"] for variant in results["variants"]]
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)} | {BASE: _BASE_COLOUR}


def _lines(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each variant's lines look like: dashed where the colours begin anew."""
    colours = _colours(results)
    names = [variant["name"] for variant in results["variants"]]
    return {
        name: {"color": colours[name], "ls": ("-", "--", ":")[place // len(_COLOURS) % 3], "label": name}
        for place, name in enumerate(names)
    }


def _finals(results: Mapping[str, Any], variant: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A variant's final trainings."""
    return [
        run
        for run in results["runs"]
        if run["variant"] == variant["name"] and run["role"] == "final" and run["training"]
    ]


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _loss(results: Mapping[str, Any]) -> Figure | None:
    figure, (axes,) = _new(7, 3.6)
    looks = _lines(results)
    starts: list[float] = []
    highest = 0.0
    for variant in results["variants"]:
        curves = [smoothed(run["training"]["losses"]) for run in _finals(results, variant)]
        if not curves:
            continue
        starts += [curve[0] for curve in curves]
        highest = max(highest, *map(max, curves))
        steps = min(map(len, curves))  # early stopping ends them at different steps
        columns = [[curve[step] for curve in curves] for step in range(steps)]
        numbers = range(1, steps + 1)
        look = looks[variant["name"]]
        axes.plot(numbers, [sum(column) / len(column) for column in columns], lw=1.6, **look)
        if len(curves) > 1:
            lowest, most = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(numbers, lowest, most, color=look["color"], alpha=0.2, lw=0)
    if not starts:
        return None
    if highest > 1.5 * max(starts):  # one that went astray would press the others flat
        axes.set_ylim(0, 1.5 * max(starts))
    axes.axhline(results["loss_target"]["value"], color=_BASE_COLOUR, lw=0.8, ls="--")
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    axes.set_xlim(left=1)
    axes.legend(ncols=2)
    return figure


def _first_seeds(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By variant, the record of its first seed's training."""
    finals = {variant["name"]: _finals(results, variant) for variant in results["variants"]}
    return {name: runs[0]["training"] for name, runs in finals.items() if runs}


def _course(results: Mapping[str, Any]) -> Figure | None:
    """Gradient norm and learning rate of every step, of each variant's first seed."""
    first, looks = _first_seeds(results), _lines(results)
    if not any(record.get("grad_norms") for record in first.values()):
        return None
    figure, axes = _new(8, 3.2, 2)
    for place, key, text in zip(
        axes, ("grad_norms", "learning_rates"), ("gradient norm before clipping", "learning rate"), strict=True
    ):
        for name, record in first.items():
            values = record.get(key) or ()
            place.plot(range(1, len(values) + 1), values, lw=1, **looks[name])
        place.set_yscale("log", nonpositive="mask")
        place.set(xlabel="step", ylabel=text)
    axes[0].legend()
    return figure


def _validation(results: Mapping[str, Any]) -> Figure | None:
    """Loss and scores of every evaluation on the validation rows, of each variant's first seed."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}  # title -> variant -> step and value
    for name, record in _first_seeds(results).items():
        for step, loss in record["evaluations"]:
            panels.setdefault("validation loss (nats a token)", {}).setdefault(name, []).append((step, loss))
        for step, scores in record.get("evaluation_scores", ()):
            for metric, score in scores.items():
                panels.setdefault(f"{metric} (%)", {}).setdefault(name, []).append((step, score))
    if not panels:
        return None
    figure, axes = _new(4 * len(panels), 3.2, len(panels))
    looks = _lines(results)
    for place, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            place.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, **looks[name])
        place.set(xlabel="step", ylabel=title)
    axes[0].legend()
    return figure


def _curve(variant: Mapping[str, Any]) -> str:
    """Which curve of loss against size a variant is on: that of its method, and of what is no matter of size."""
    options = variant["options"] or {}
    method = (options.get("peft") or {}).get("peft_type", variant["method"]).lower()
    return f"{method} frozen" if options.get("freeze_angles") else method


def _parameters(results: Mapping[str, Any]) -> Figure | None:
    figure, (axes,) = _new(7, 3.8)
    curves: dict[str, list[tuple[str, float, list[float]]]] = {}  # names of variants, sizes, losses by seed
    for variant in results["variants"]:
        runs = [run for run in _finals(results, variant) if run["scores"]]
        if runs:
            size = fmean(run["training"]["trainable"] for run in runs)
            losses = [run["scores"]["test_loss"] for run in runs]
            curves.setdefault(_curve(variant), []).append((variant["name"], size, losses))
    if not curves:
        return None
    axes.set_xscale("log")
    for place, (curve, points) in enumerate(curves.items()):
        points.sort(key=lambda point: point[1])
        sizes, means = [size for _, size, _ in points], [fmean(losses) for _, _, losses in points]
        spreads = [stdev(losses) if len(losses) > 1 else 0.0 for _, _, losses in points]
        label = curve if len(points) > 1 else points[0][0]
        look: Any = {"color": _COLOURS[place % len(_COLOURS)], "lw": 1.2}
        edge = {"mec": axes.get_facecolor(), "mew": 0.8}  # markers of one size and loss are told apart
        axes.plot(sizes, means, marker=_MARKERS[place % len(_MARKERS)], ms=7.5, label=label, **edge, **look)
        axes.errorbar(sizes, means, spreads, fmt="none", capsize=2 + place, **look)
    scores = results["base"]["scores"]
    if scores:
        losses = [loss for points in curves.values() for _, _, losses in points for loss in losses]
        look = {"color": _BASE_COLOUR, "lw": 1, "ls": "--"}
        if scores["test_loss"] <= 2 * max(losses) - min(losses):
            axes.axhline(scores["test_loss"], label=BASE, **look)
        else:  # far above all: it would press the others together
            axes.plot([], [], label=f"{BASE}: {scores['test_loss']:.3f}", **look)
    axes.set(xlabel="trained parameters", ylabel="test loss (nats a token)")
    axes.margins(x=0.12, y=0.12)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1M
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper")
    return figure


def _bars(results: Mapping[str, Any], panels: Sequence[tuple[str, float, str]]) -> Figure | None:
    base = results["base"]["scores"] or {}
    shown = []
    for key, unit, title in panels:
        bars = [(BASE, base[key] / unit, 0.0)] if key in base else []
        bars += [
            (variant["name"], found["mean"] / unit, (found["sd"] or 0.0) / unit)
            for variant in results["variants"]
            if (found := variant["summary"].get(key))
        ]
        if bars:
            shown.append((title, bars))
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    height = 0.8 + 0.3 * max(len(bars) for _, bars in shown)
    figure = Figure(figsize=(8 if columns > 1 else 7, rows * height), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, bars) in zip(places, shown, strict=False):
        _draw_bars(axes, bars, _colours(results))
        axes.set_title(title, loc="left")
    for axes in places[len(shown) :]:
        axes.remove()
    return figure


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, float, float]], colours: Mapping[str, str]) -> None:
    """Of names with value and standard deviation each."""
    widest = max(value + sd for _, value, sd in bars) or 1.0
    for place, (name, value, sd) in enumerate(bars):
        axes.barh(place, value, height=0.62, color=colours[name])
        if sd:
            axes.errorbar(value, place, xerr=sd, color=mpl.rcParams["text.color"], lw=1, capsize=2)
        axes.text(value + sd + 0.015 * widest, place, f"{value:.4g}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_xlim(0, 1.17 * widest)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
