"""From finished trainings and evaluations to what results.json holds."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qaa_serve.training.compare import paired
from qaa_serve.training.compare.files import model_digest, read_json, write_json
from qaa_serve.training.compare.plan import Variant, differing, digest_of
from qaa_serve.training.compare.runner import Evaluation, Run
from qaa_serve.training.methods import get_method, own_options
from qaa_serve.training.metrics import BertScore, text_scores

#: Of results.json; raised when a key changes its meaning or goes away.
RESULTS_FORMAT = 1

#: Weight of the past in the smoothed loss.
SMOOTHING = 0.9

_SCORES = ("bleu", "rouge1", "rouge2", "rouge_l", "exact_match", "bertscore", "perplexity", "test_loss")

_RECORDED = (
    "trainable", "total", "steps", "train_loss", "eval_loss", "seconds", "seconds_per_step", "adapter_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What an evaluation comes to.

    Attributes:
        entry: its part of a run's entry: ``reason``, ``scores``, ``texts``.
        statistics: what the scores are made of, prompt by prompt; None where there are none.
        signature: BLEU's.
    """

    entry: dict[str, Any]
    statistics: paired.Statistics | None = None
    signature: str | None = None


def score(evaluation: Evaluation, references: Sequence[Sequence[str]], scorer: BertScore | None) -> Scored:
    """Score the answers of an evaluation, one a prompt, against the references of each."""
    result = evaluation.result()
    if result is None:
        log = str(evaluation.log.relative_to(evaluation.directory.parents[1]))
        return Scored({"reason": f"evaluation: {evaluation.reason()}", "log": log, "scores": None, "texts": None})
    found = text_scores(result["texts"], references)
    scores = found.scores | {"test_loss": result["loss"], "perplexity": math.exp(min(result["loss"], 700.0))}
    parts = found.statistics | {"test_loss": np.array([result["prompt_nats"], result["prompt_tokens"]]).T}
    if scorer is not None:
        by_prompt = _bertscore(evaluation, result["texts"], references, scorer)
        scores["bertscore"] = sum(by_prompt) / len(by_prompt)
        parts["bertscore"] = np.array([[value, 1] for value in by_prompt])
    entry = {"reason": None, "scores": scores, "texts": result["texts"]}
    return Scored(entry, parts, found.bleu_signature)


def _bertscore(
    evaluation: Evaluation, texts: Sequence[str], references: Sequence[Sequence[str]], scorer: BertScore
) -> list[float]:
    """From the file that it was kept in, if the same model scored the same texts before."""
    digest = digest_of(["by prompt", model_digest(scorer.model), scorer.description, evaluation.digest])
    path = evaluation.directory / f"bertscore-{digest[:10]}.json"
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("digest") != digest:
        kept = {"digest": digest, "f1": scorer(texts, references)}
        write_json(path, kept)
    by_prompt: list[float] = kept["f1"]
    return by_prompt


def run_entry(run: Run, role: str, scored: Scored | None, output: Path) -> dict[str, Any]:
    """A training and its evaluation, as ``runs`` has them.

    Args:
        run: the training.
        role: ``final`` or ``selection``.
        scored: of its evaluation; None: there is none.
        output: the report's directory.
    """
    record = run.result()
    entry = {
        "name": run.name,
        "resumed": bool((read_json(run.directory / "run.json") or {}).get("resumed")),
        "variant": run.variant,
        "seed": run.seed,
        "role": role,
        "status": "finished",
        "reason": None if record else run.reason(),
        "log": str(run.log.relative_to(output)),
        "digest": run.digest,
        "options": dict(run.options),
        "training": record,
        "steps_to_loss": None,
        "scores": None,
        "texts": None,
        **(scored.entry if scored else {}),
    }
    return entry | ({"status": "failed"} if record is None or entry["reason"] else {})


def variant_entry(
    variant: Variant,
    point: Mapping[str, Any] | None,
    point_runs: Sequence[Run],
    runs: Sequence[Mapping[str, Any]],
    difference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A row of the tables, as ``variants`` has it.

    Args:
        variant: the row.
        point: the one that was chosen; None: none could be trained.
        point_runs: the training of each point.
        runs: the entries of all trainings.
        difference: to the first variant.
    """
    own = [entry for entry in runs if entry["variant"] == variant.name]
    finals = [entry for entry in own if entry["role"] == "final"]
    good = [entry for entry in finals if entry["status"] == "finished"]
    failed = [entry for entry in finals if entry["status"] == "failed"] if point is not None else own
    points = [
        {
            "options": differing(options, variant.points),
            "run": run.name,
            "eval_loss": (run.result() or {}).get("eval_loss"),
            "reason": run.reason(),
            "chosen": options == point,
        }
        for options, run in zip(variant.points, point_runs, strict=True)
    ]
    used = None
    if point is not None:  # the method's own options and the rate as they were used, and what else the point sets
        options = good[0]["training"]["options"] if good else {}
        names = ("lr", *own_options(get_method(variant.method)))
        used = {name: options[name] for name in names if options.get(name) is not None} | dict(point)
    return {
        "name": variant.name,
        "method": variant.method,
        "options": used,
        "points": points if len(points) > 1 else [],
        "runs": len(finals),
        "finished": len(good),
        "failures": [{key: entry[key] for key in ("name", "seed", "reason", "log")} for entry in failed],
        "summary": summarise(good),
        "difference": difference,
    }


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for fewer than two) and number of each quantity over runs."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        record = entry["training"]
        found = {name: (entry["scores"] or {}).get(name) for name in _SCORES}
        found |= {name: record[name] for name in _RECORDED}
        found |= {**record["memory"], "steps_to_loss": entry["steps_to_loss"]}
        for name, value in found.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {
        name: {
            "mean": statistics.fmean(found),
            "sd": statistics.stdev(found) if len(found) > 1 else None,
            "n": len(found),
        }
        for name, found in values.items()
    }


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average of the losses, the start corrected for having no past."""
    out, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        out.append(mean / (1 - SMOOTHING**step))
    return out


def take_steps_to_loss(given: float | None, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write into the entries of all trainings when they reached a loss.

    Args:
        given: the loss; None: the lowest that every final training reached, those left out that do not learn.
        runs: the entries.

    Returns:
        The loss, as ``loss_target``.
    """
    curves = {entry["name"]: smoothed(entry["training"]["losses"]) for entry in runs if entry["training"]}
    finals = [curves[entry["name"]] for entry in runs if entry["role"] == "final" and entry["name"] in curves]
    # One that does not learn would make the target a loss that all the others begin with.
    learning = [curve for curve in finals if min(curve) <= 0.9 * curve[0]]
    chosen = "the lowest that every final training reached"
    if learning and len(learning) < len(finals):
        chosen += " whose loss fell by a tenth at least"
    target = max(map(min, learning or finals), default=0.0) if given is None else given
    for entry in runs:
        curve = curves.get(entry["name"], [])
        entry["steps_to_loss"] = next((step for step, loss in enumerate(curve, 1) if loss <= target), None)
    return {"value": target, "chosen": chosen if given is None else "given"}


def at_the_edge(variant: Variant, chosen: Mapping[str, Any]) -> Iterator[str]:
    """Where a grid of numbers should go on, since its best point is its first or last one."""
    for key, best in differing(chosen, variant.points).items():
        tried = {value for point in variant.points if isinstance(value := point.get(key), (int, float))}
        if len(tried) > 2 and best in (min(tried), max(tried)):
            yield (
                f"{variant.name}: the best {key} of those tried, {best:g}, is at the end of its grid "
                f"({min(tried):g} to {max(tried):g}): a value beyond it may be better"
            )


def hardware() -> dict[str, Any]:
    """The machine."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }
