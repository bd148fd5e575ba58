"""report.md, report.html and the figures, from the results alone."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from qaa_serve.training.compare.figures import draw
from qaa_serve.training.compare.files import write_bytes
from qaa_serve.training.compare.plan import BASE, options_text

#: Figure -> what it shows.
CAPTIONS = {
    "quality": "Scores on the test set; lines: standard deviation over seeds.",
    "parameters": "Trained parameters against the loss on the test set; mean over seeds, bars: standard "
    "deviation; a line joins the variants of a method.",
    "loss": "Smoothed training loss; band: smallest to largest over seeds; dashed: the loss of 'steps to loss'. "
    "Curves that rise far above the start are cut.",
    "course": "Gradient norm and learning rate of each variant's first seed.",
    "validation": "Loss on the validation rows, and scores of answers to them, of each variant's first seed.",
    "memory": "Memory of a training; lines: standard deviation over seeds.",
    "seconds": "Time of an optimiser step; lines: standard deviation over seeds.",
}

_QUALITY = (
    ("test_loss", "test loss", 3),
    ("perplexity", "perplexity", 2),
    ("bleu", "BLEU", 2),
    ("rouge1", "ROUGE-1", 2),
    ("rouge2", "ROUGE-2", 2),
    ("rouge_l", "ROUGE-L", 2),
    ("exact_match", "exact match", 1),
    ("bertscore", "BERTScore", 2),
)


def write_report(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write the report of the results.

    Args:
        results: as in results.json.
        directory: where report.md, report.html and figures/ go.

    Returns:
        The two reports.
    """
    light, dark = draw(results, "light"), draw(results, "dark")
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        if old.stem not in light:
            old.unlink()
    for name, content in light.items():
        write_bytes(folder / f"{name}.png", content)
    environment = Environment(
        loader=PackageLoader("qaa_serve.training.compare"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "quoted": _quoted}
    context = {
        "r": results,
        "command": shlex.join(results["command"]),
        "quality": _quality_table(results),
        "differences": _difference_table(results),
        "cost": _cost_table(results),
        "selection": _selection_table(results),
        "options": [
            (variant["name"], variant["method"], _own_options(variant, results["common"]))
            for variant in results["variants"]
        ],
        "failures": _failures(results),
        "examples": _examples(results),
        "statements": _statements(results),
        "figures": [
            {"name": name, "caption": caption, "light": _inline(light[name]), "dark": _inline(dark[name])}
            for name, caption in CAPTIONS.items()
            if name in light
        ],
    }
    written = []
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.j2").render(context)
        write_bytes(directory / name, text.encode())
        written.append(directory / name)
    return written


def quality_lines(results: Mapping[str, Any]) -> str:
    """The scores as lines of text."""
    table = _quality_table(results)
    lines = [table["head"], *table["rows"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _quality_table(results: Mapping[str, Any]) -> dict[str, Any]:
    scores = results["base"]["scores"] or {}
    found = {key for variant in results["variants"] for key in variant["summary"]} | scores.keys()
    columns = [column for column in _QUALITY if column[0] in found]
    rows = [[BASE, "0", "", *(_number(scores.get(key), places) for key, _, places in columns), "-"]]
    for variant in results["variants"]:
        summary = variant["summary"]
        size = ["-", "-"]
        if "trainable" in summary:
            trained, total = summary["trainable"]["mean"], summary["total"]["mean"]
            size = [f"{trained:,.0f}", f"{100 * trained / total:.3g} %"]
        finished = f"{variant['finished']} of {variant['runs']}, failed" if variant["runs"] else "failed"
        rows.append(
            [
                variant["name"],
                *size,
                *(_spread(summary.get(key), places) for key, _, places in columns),
                finished if variant["failures"] else str(variant["finished"]),
            ]
        )
    return {
        "head": ["", "trained parameters", "of the base", *(title for _, title, _ in columns), "seeds"],
        "rows": rows,
    }


def _difference_table(results: Mapping[str, Any]) -> dict[str, Any] | None:
    scores = {key for variant in results["variants"] for key in variant["difference"] or ()}
    columns = [column for column in _QUALITY if column[0] in scores]
    rows = [
        [
            variant["name"],
            *(
                f"{found['difference']:+.{places}f} [{found['low']:+.{places}f}, {found['high']:+.{places}f}]"
                for key, _, places in columns
                for found in (variant["difference"][key],)
            ),
        ]
        for variant in results["variants"]
        if variant["difference"]
    ]
    return {"head": ["", *(title for _, title, _ in columns)], "rows": rows} if rows else None


def _cost_table(results: Mapping[str, Any]) -> dict[str, Any]:
    cuda = any("peak_cuda_bytes" in variant["summary"] for variant in results["variants"])
    columns = [column for column in _COST if cuda or column[0] != "peak_cuda_bytes"]
    rows = []
    for variant in results["variants"]:
        cells = {key: shown(variant["summary"].get(key)) for key, _, shown in columns}
        reached = variant["summary"].get("steps_to_loss", {"n": 0})["n"]
        total = variant["summary"].get("steps", {"n": 0})["n"]
        if reached < total:
            cells["steps_to_loss"] = (
                f"{cells['steps_to_loss']} ({reached} of {total} seeds)" if reached else "not reached"
            )
        rows.append([variant["name"], *cells.values()])
    target = results["loss_target"]["value"]
    return {"head": ["", *(title.format(target=target) for _, title, _ in columns)], "rows": rows}


def _selection_table(results: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = [
        [
            variant["name"],
            options_text(point["options"]),
            _number(point["eval_loss"], 4) if point["eval_loss"] is not None else f"failed: {point['reason']}",
            "chosen" if point["chosen"] else "",
        ]
        for variant in results["variants"]
        for point in variant["points"]
    ]
    return {"head": ["", "options", "validation loss", ""], "rows": rows} if rows else None


def _own_options(variant: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    if variant["options"] is None:
        return "none could be trained"
    return options_text({key: value for key, value in variant["options"].items() if common.get(key) != value})


def _failures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    failures = [
        {"variant": variant["name"], **failure}
        for variant in results["variants"]
        for failure in variant["failures"]
    ]
    if results["base"]["reason"]:
        failures.insert(
            0, {"variant": BASE, "seed": None, "reason": results["base"]["reason"], "log": results["base"]["log"]}
        )
    return failures


def _examples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each prompt with every variant's text, of its first finished seed."""
    first: dict[str, Mapping[str, Any]] = {}
    for run in results["runs"]:
        if run["role"] == "final" and run["texts"] is not None:
            first.setdefault(run["variant"], run)
    shown = []
    for example in results["examples"]:
        place = example["place"]
        answers = []
        if results["base"]["texts"] is not None:
            answers.append({"name": BASE, "text": results["base"]["texts"][place]})
        answers += [{"name": name, "text": run["texts"][place]} for name, run in first.items()]
        for answer in answers:
            answer["exact"] = answer["text"].strip() in {ref.strip() for ref in example["references"]}
        shown.append({**example, "answers": answers})
    return shown


def _statements(results: Mapping[str, Any]) -> list[str]:
    """How the numbers came about, in sentences."""
    data, common, seeds = results["data"], results["common"], results["seeds"]
    train, test, validation = data["train"], data["test"], data["validation"]
    lines = [
        f"Base model: {results['model']['name']}. Trained on {train['source']}: {train['rows']:,} rows, "
        f"{train['prompts']:,} prompts. Tested on {test['source']}: {test['rows']:,} rows, {test['prompts']:,} "
        f"prompts with {test['references']:,} references. The test set is used for nothing but the scores."
    ]
    listed = ", ".join(map(str, seeds))
    if len(seeds) > 1:
        lines.append(
            f"Every variant is trained with the seeds {listed}; a figure is the mean over them ± the sample "
            f"standard deviation (n = {len(seeds)}, or as the table says)."
        )
    else:
        lines.append(f"One seed ({listed}): nothing is known about how much a figure varies from seed to seed.")
    lines.append(
        f"Shared by all: {options_text(common)}; what is not listed is the default of qaa-serve train."
        if common
        else "What is not listed is the default of qaa-serve train."
    )
    if validation is not None:
        origin = (
            f"{validation['split']:.0%} of the training prompts with all of their rows, none of them trained on"
            if validation["split"]
            else str(validation["source"])
        )
        text = (
            f"Validation: {validation['rows']:,} rows, {origin}. A training keeps the state with the lowest "
            "loss on them"
        )
        if any(variant["points"] for variant in results["variants"]):
            text += (
                ". Where a variant has a grid, each of its points is trained once, with seed "
                f"{seeds[0]}; the one with the lowest validation loss is then trained with all seeds"
            )
        lines.append(text + ".")
    tokens = results["generation"]["max_new_tokens"]
    lines += [
        f"Answers: greedy, at most {tokens} new tokens, up to the end token; space around texts is cut off, case "
        "counts.",
        "Test loss: mean over all answer tokens of all test rows, in nats; perplexity: its exponential.",
        "BLEU: sacrebleu's corpus score with all references of a prompt, signature "
        f"{results['metrics']['bleu'] or '-'}.",
        "ROUGE: F1 of rouge-score without stemming, against the best of a prompt's references, mean over prompts, "
        "in percent. Exact match: percent of answers that are one of the references.",
    ]
    if results["metrics"]["bertscore"]:
        lines.append(
            "BERTScore (Zhang et al. 2020): F1 in percent, against the best of a prompt's references, mean over "
            f"prompts; {results['metrics']['bertscore']}."
        )
    bootstrap = results["bootstrap"]
    if any(variant["difference"] for variant in results["variants"]):
        lines.append(
            f"Differences to {bootstrap['against']}: a variant's score less that of {bootstrap['against']}, both "
            f"means over the seeds, with the {bootstrap['level']:.0%} interval of a paired bootstrap: "
            f"both are scored on {bootstrap['resamples']:,} samples of as many prompts, drawn with replacement. "
            "Where 0 is in the interval, these prompts do not tell the two apart. How much seeds vary is not in "
            "it; the ± of the first table is that."
        )
    target = results["loss_target"]
    machine = results["hardware"]
    lines += [
        "Steps to loss: the first step at which the smoothed training loss (moving average, 0.9 of the past) is "
        f"at most {target['value']:.4f}, {target['chosen']}.",
        "Peak RSS: that of the training's process, base model and libraries included. Kept for backward: bytes "
        "that the first step keeps for its backward pass, parameters left out. Seconds a step: median over a "
        "training's steps, evaluations left out. Saved: bytes of the weight files.",
        f"Hardware: {machine['device']}, {machine['processor']}, {machine['cores']} cores, {machine['system']}. "
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    return [*lines, *(f"Note: {note}." for note in results["notes"])]


def _number(value: float | None, places: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.{places}f}" if abs(value) < 1e7 else f"{value:.2e}"


def _spread(found: Mapping[str, Any] | None, places: int) -> str:
    if found is None:
        return "-"
    text = _number(found["mean"], places)
    if found["sd"] is None or (found["sd"] == 0 and places == 0):
        return text
    return f"{text} ± {_number(found['sd'], places)}"


def _size(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if found["mean"] >= unit),
        (1, "B"),
    )
    return f"{found['mean'] / unit:.4g} {name}"


def _duration(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    seconds = round(found["mean"])
    if seconds < 60:
        return f"{found['mean']:.1f} s"
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


#: Of the table of costs: key of the summaries, title, how it is shown.
_COST: tuple[tuple[str, str, Callable[[Mapping[str, Any] | None], str]], ...] = (
    ("peak_rss_bytes", "peak RSS", _size),
    ("peak_cuda_bytes", "peak CUDA", _size),
    ("saved_for_backward_bytes", "kept for backward", _size),
    ("seconds_per_step", "s a step", partial(_spread, places=3)),
    ("seconds", "training time", _duration),
    ("adapter_bytes", "saved", _size),
    ("steps", "steps", partial(_spread, places=0)),
    ("steps_to_loss", "steps to loss {target:.3f}", partial(_spread, places=0)),
    ("train_loss", "train loss at the end", partial(_spread, places=3)),
)


def _cell(text: object) -> str:
    """For a table of Markdown."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _quoted(text: object) -> str:
    """A text of any kind as an indented block of Markdown."""
    lines: Sequence[str] = str(text).splitlines() or [""]
    return "\n".join(f"    {line}" for line in lines)
