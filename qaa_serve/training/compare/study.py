"""A comparison from its settings to its results: what is prepared, trained, chosen, answered and scored."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from qaa_serve import __version__
from qaa_serve.training.compare import paired
from qaa_serve.training.compare.evaluate import EVALUATION_FORMAT
from qaa_serve.training.compare.files import (
    model_digest,
    owned,
    read_json,
    write_bytes,
    write_json,
)
from qaa_serve.training.compare.metrics import BertScore, text_scores, unseen_by_rouge
from qaa_serve.training.compare.plan import BASE, Variant, check_options, digest_of, options_text
from qaa_serve.training.compare.rows import Row, Rows, as_test_set, read_rows, split
from qaa_serve.training.compare.runner import (
    Evaluation,
    Reporter,
    Run,
    evaluate_all,
    failure_of,
    make_run,
    train_all,
    training_of,
)
from qaa_serve.training.compare.settings import Settings
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import Setting, configured, get_method, own_options

#: Of results.json; raised when a key changes its meaning or goes away.
RESULTS_FORMAT = 1

#: Weight of the past in the smoothed loss.
SMOOTHING = 0.9

_SCORES = ("bleu", "rouge1", "rouge2", "rouge_l", "exact_match", "bertscore", "perplexity", "test_loss")

_RECORDED = (
    "trainable", "total", "steps", "train_loss", "eval_loss", "seconds", "seconds_per_step", "adapter_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """The rows, read and checked, and the digests of everything.

    Attributes:
        train: rows to train on.
        validation: rows to choose by and to stop by; None: there are none.
        test: rows to test on.
        split: whether ``train`` and ``validation`` are parts of one source.
        digests: SHA-256 by option: ``model``, ``data``, ``eval_data``.
        test_set: what the evaluating process reads.
        notes: what the reader of the report should know about the rows.
    """

    train: Sequence[Row]
    validation: Sequence[Row] | None
    test: Rows
    split: bool
    digests: Mapping[str, str | None]
    test_set: Mapping[str, Any]
    notes: Sequence[str]


def prepare(settings: Settings) -> Material:
    """Read and check everything before the first training.

    Raises:
        TrainingError: for a base model that cannot be read or rows that cannot be used.
    """
    common = settings.plan.common
    trust = bool(common.get("trust_remote_code", False))
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=trust)
    except Exception as error:  # transformers raises what it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"the base model {settings.model!r} cannot be read: {lines[0]}") from error

    def read(source: str) -> Rows:
        return read_rows(
            source,
            tokenizer,
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
            answers=common.get("answers", "all"),
            skip_bad_rows=bool(common.get("skip_bad_rows", False)),
        )

    rows, test = read(settings.data), read(settings.eval_data)
    notes = list(dict.fromkeys([*rows.notes, *test.notes]))
    train: Sequence[Row] = rows.rows
    held: Sequence[Row] | None = None
    digests: dict[str, str | None] = {"data": rows.digest, "eval_data": None}
    validation = settings.plan.validation
    if isinstance(validation, Path):
        given = read(str(validation))
        held, digests["eval_data"] = given.rows, given.digest
    elif validation is not None:
        train, held = split(rows, validation)
        digests = {"data": _digest(train), "eval_data": _digest(held)}
    shared = test.prompts.keys() & rows.prompts.keys()
    if shared:
        notes.append(
            f"{len(shared)} of the {len(test.prompts)} test prompts are training prompts too: "
            "the scores on them say how well answers were remembered"
        )
    if held is not None and test.prompts.keys() & {row.prompt for row in held} - shared:
        notes.append("some test prompts are validation prompts too: options were chosen by them")
    directory = Path(settings.model)
    base = model_digest(directory) if directory.is_dir() else f"{settings.model}@{config._commit_hash}"
    return Material(
        train=train,
        validation=held,
        test=test,
        split=isinstance(validation, float),
        digests={"model": base, **digests},
        test_set=_fitting(as_test_set(test), config, settings),
        notes=notes,
    )


def _digest(rows: Sequence[Row]) -> str:
    return digest_of([row.value for row in rows])


def _fitting(test_set: dict[str, Any], config: Any, settings: Settings) -> dict[str, Any]:
    """The test set, once it is sure that the base has positions enough for it."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return test_set
    longest = max(len(prompt["ids"]) for prompt in test_set["prompts"])
    if longest + settings.max_new_tokens > limit:
        raise TrainingError(
            f"{settings.eval_data}: the longest prompt has {longest} tokens, which with --max-new-tokens "
            f"{settings.max_new_tokens} is more than the {limit} that the base model takes: leave out such rows "
            "or lower --max-new-tokens"
        )
    for row in test_set["rows"]:
        row["input_ids"], row["labels"] = row["input_ids"][:limit], row["labels"][:limit]
    return test_set


def planned_parameters(model: str, variant: Variant, options: Mapping[str, Any]) -> int | None:
    """Trainable parameters of a training, found without any weight; None where that does not go."""
    import torch
    from transformers import AutoModelForCausalLM

    from qaa_serve.training.targets import resolve_targets
    from qaa_serve.training.trainer import planned_steps

    method = get_method(variant.method)
    try:
        with torch.device("meta"):
            trust = bool(options.get("trust_remote_code", False))
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
            configured_method = configured(
                method, {key: options[key] for key in own_options(method) if key in options}
            )
            targets = resolve_targets(
                base,
                options.get("target_modules"),
                exclude=options.get("exclude_modules", ()),
                blocks=options.get("layers_to_transform", ()),
            )
            steps = planned_steps(check_options(variant.name, variant.method, options), 1)
            trained = configured_method.build(base, Setting(targets, None, steps))
        return sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    except Exception:  # an estimate: no reason to stop a dry run
        return None


@dataclass(frozen=True)
class _Scored:
    """An evaluation: its part of a run's entry, what its scores are made of, and BLEU's signature."""

    entry: dict[str, Any]
    statistics: paired.Statistics | None
    signature: str | None


@dataclass
class Study:
    """A comparison under way."""

    settings: Settings
    material: Material

    def point_runs(self, variant: Variant) -> list[Run]:
        """One training a point of the variant's grid, all with the first seed."""
        return [self._run(variant, point, self.settings.plan.seeds[0]) for point in variant.points]

    def final_runs(self, variant: Variant, point: Mapping[str, Any]) -> list[Run]:
        """One training a seed."""
        return [self._run(variant, point, seed) for seed in self.settings.plan.seeds]

    def _run(self, variant: Variant, point: Mapping[str, Any], seed: int) -> Run:
        data, validation = self._paths()
        options = {
            **point,
            "method": variant.method,
            "model": self.settings.model,
            "data": data,
            "eval_data": validation,
        }
        options = {key: value for key, value in options.items() if value is not None}
        differing = _differing(point, variant.points)
        label = f"{variant.name} ({options_text(differing)})" if differing else variant.name
        return make_run(self.settings.output / "runs", variant.name, label, options, seed, self.material.digests)

    def _paths(self) -> tuple[str, str | None]:
        if self.material.split:
            folder = self.settings.output / "data"
            return str(folder / "train.jsonl"), str(folder / "validation.jsonl")
        validation = self.settings.plan.validation
        return self.settings.data, None if validation is None else str(validation)

    def execute(self, reporter: Reporter) -> dict[str, Any]:
        """Train, choose, evaluate and score whatever is missing.

        Returns:
            What results.json is to hold.

        Raises:
            TrainingError: if the output cannot be used.
        """
        settings = self.settings
        scorer = None
        if settings.bertscore_model is not None:
            scorer = BertScore(settings.bertscore_model, settings.bertscore_layers)
        with owned(settings.output) as lock:
            self._write_data()
            tried: set[str] = set()
            chosen: dict[str, Mapping[str, Any] | None] = {}
            for variant in settings.plan.variants:
                points = self.point_runs(variant)
                if len(points) > 1:
                    train_all(points, reporter, lock=lock, retry_failed=settings.retry_failed, tried=tried)
                chosen[variant.name] = best_point(variant, points)
            # Seed by seed, so that a comparison that is stopped has something of everything.
            finals = {
                variant.name: self.final_runs(variant, point)
                for variant in settings.plan.variants
                if (point := chosen[variant.name]) is not None
            }
            in_turn = [runs[number] for number in range(len(settings.plan.seeds)) for runs in finals.values()]
            train_all(in_turn, reporter, lock=lock, retry_failed=settings.retry_failed, tried=tried)
            evaluations = self._evaluations(in_turn)
            common = settings.plan.common
            evaluate_all(
                list(evaluations.values()),
                {
                    "model": settings.model,
                    "test": str(settings.output / "data" / "test.json"),
                    "batch_size": settings.eval_batch_size,
                    "max_new_tokens": settings.max_new_tokens,
                    "bf16": bool(common.get("bf16", False)),
                    "threads": common.get("threads"),
                    "trust_remote_code": bool(common.get("trust_remote_code", False)),
                },
                settings.output / "evaluation.log",
                reporter,
                lock=lock,
                retry_failed=settings.retry_failed,
            )
            results = self._results(chosen, finals, evaluations, scorer)
            write_json(settings.output / "results.json", results)
        return results

    def _write_data(self) -> None:
        folder = self.settings.output / "data"
        folder.mkdir(exist_ok=True)
        write_json(folder / "test.json", self.material.test_set)
        if self.material.split:
            for name, rows in (("train", self.material.train), ("validation", self.material.validation or ())):
                lines = "".join(json.dumps(row.value, default=str) + "\n" for row in rows)
                write_bytes(folder / f"{name}.jsonl", lines.encode())

    def _evaluations(self, runs: Sequence[Run]) -> dict[str, Evaluation]:
        """By name of the run; the base's under ``BASE``."""
        common = self.settings.plan.common
        depends = {
            "format": EVALUATION_FORMAT,
            "test": digest_of(self.material.test_set),
            "model": self.material.digests["model"],
            "max_new_tokens": self.settings.max_new_tokens,
            "bf16": bool(common.get("bf16", False)),
        }
        folder = self.settings.output / "runs"
        found = {BASE: Evaluation(BASE, None, folder / BASE, digest_of(depends))}
        for run in runs:
            if training_of(run) is not None:
                digest = digest_of({**depends, "run": run.digest, "variant": run.variant})
                found[run.name] = Evaluation(f"{run.variant}, seed {run.seed}", run.model, run.directory, digest)
        return found

    def _results(
        self,
        chosen: Mapping[str, Mapping[str, Any] | None],
        finals: Mapping[str, Sequence[Run]],
        evaluations: Mapping[str, Evaluation],
        scorer: BertScore | None,
    ) -> dict[str, Any]:
        settings, material = self.settings, self.material
        prompts = material.test_set["prompts"]
        references = [prompt["references"] for prompt in prompts]
        notes = list(material.notes)
        unseen = unseen_by_rouge(references)
        if unseen:
            notes.append(
                f"{unseen} of the {len(prompts)} test prompts have references without any letter a-z or digit, "
                "which is all that ROUGE sees"
            )
        scored = {name: self._scored(each, references, scorer) for name, each in evaluations.items()}
        runs = []
        for variant in settings.plan.variants:
            points = self.point_runs(variant) if len(variant.points) > 1 else []
            final = finals.get(variant.name, [])
            names = {run.name for run in final}
            for run in [*final, *(run for run in points if run.name not in names)]:
                entry = self._entry(run, "final" if run.name in names else "selection")
                if run.name in evaluations:
                    entry |= scored[run.name].entry
                    if entry["reason"]:
                        entry["status"] = "failed"
                runs.append(entry)
        target = _loss_target(settings.loss_target, runs)
        for entry in runs:
            if entry["training"]:
                curve = smoothed(entry["training"]["losses"])
                entry["steps_to_loss"] = next(
                    (i for i, loss in enumerate(curve, 1) if loss <= target["value"]), None
                )
        for variant in settings.plan.variants:
            if (point := chosen[variant.name]) is not None:
                notes += _at_the_edge(variant.name, point, variant.points)
        variants = [self._summary(variant, chosen[variant.name], runs) for variant in settings.plan.variants]
        differences = paired.differences(
            {
                name: [
                    statistics
                    for run in finals.get(name, ())
                    if run.name in scored and (statistics := scored[run.name].statistics) is not None
                ]
                for name in chosen
            }
        )
        variants = [{**entry, "difference": differences[entry["name"]]} for entry in variants]
        trained = [entry["training"] for entry in runs if entry["training"]]
        versions = {json.dumps(record["versions"], sort_keys=True) for record in trained}
        if len(versions) > 1:
            notes.append("the trainings were made with different versions of packages; results.json has them")
        resumed = sum(entry["resumed"] for entry in runs)
        if resumed:
            notes.append(
                f"{resumed} of the trainings were interrupted and resumed; their time and memory are those of the "
                "last part"
            )
        return {
            "format": RESULTS_FORMAT,
            "command": list(settings.command),
            "model": {"name": settings.model, "digest": material.digests["model"]},
            "data": {
                "train": {
                    "source": settings.data,
                    "rows": len(material.train),
                    "prompts": len({row.prompt for row in material.train}),
                    "sha256": material.digests["data"],
                },
                "validation": None
                if material.validation is None
                else {
                    "source": settings.data if material.split else str(settings.plan.validation),
                    "split": settings.plan.validation if material.split else None,
                    "rows": len(material.validation),
                    "prompts": len({row.prompt for row in material.validation}),
                    "sha256": material.digests["eval_data"],
                },
                "test": {
                    "source": settings.eval_data,
                    "rows": len(material.test.rows),
                    "prompts": len(prompts),
                    "references": sum(map(len, references)),
                    "sha256": material.test.digest,
                },
            },
            "common": dict(settings.plan.common),
            "seeds": list(settings.plan.seeds),
            "generation": {"max_new_tokens": settings.max_new_tokens, "greedy": True},
            "metrics": {
                "bleu": next((each.signature for each in scored.values() if each.signature), None),
                "bertscore": scorer.description if scorer else None,
            },
            "bootstrap": {
                "against": settings.plan.variants[0].name,
                "resamples": paired.RESAMPLES,
                "level": paired.LEVEL,
                "seed": paired.SEED,
            },
            "loss_target": target,
            "hardware": _hardware(),
            "versions": {"qaa-serve": __version__, **(trained[-1]["versions"] if trained else {})},
            "notes": notes,
            "base": scored[BASE].entry,
            "variants": variants,
            "runs": runs,
            "examples": [
                {"prompt": prompt["shown"], "references": prompt["references"], "place": place}
                for place, prompt in _spread(prompts, settings.examples)
            ],
        }

    def _entry(self, run: Run, role: str) -> dict[str, Any]:
        record = training_of(run)
        reason = None if record else failure_of(run)
        kept = read_json(run.directory / "run.json") or {}
        return {
            "name": run.name,
            "resumed": bool(kept.get("resumed")),
            "variant": run.variant,
            "seed": run.seed,
            "role": role,
            "status": "finished" if record else "failed",
            "reason": reason,
            "log": str(run.log.relative_to(self.settings.output)),
            "digest": run.digest,
            "options": dict(run.options),
            "training": record,
            "steps_to_loss": None,
            "scores": None,
            "texts": None,
        }

    def _scored(
        self, evaluation: Evaluation, references: Sequence[Sequence[str]], scorer: BertScore | None
    ) -> _Scored:
        result = evaluation.result()
        if result is None:
            return _Scored({"reason": evaluation.reason(), "scores": None, "texts": None}, None, None)
        found = text_scores(result["texts"], references)
        scores = found.scores | {"test_loss": result["loss"], "perplexity": math.exp(min(result["loss"], 700.0))}
        if scorer is not None:
            scores["bertscore"] = self._bertscore(evaluation, result, references, scorer)
        losses = np.array([result["prompt_nats"], result["prompt_tokens"]]).T
        return _Scored(
            {"reason": None, "scores": scores, "texts": result["texts"]},
            {**found.statistics, "test_loss": losses},
            found.bleu_signature,
        )

    def _bertscore(
        self,
        evaluation: Evaluation,
        result: Mapping[str, Any],
        references: Sequence[Sequence[str]],
        scorer: BertScore,
    ) -> float:
        """From the file that it was kept in, if the same model scored the same texts before."""
        model = self.settings.bertscore_model
        digest = digest_of([model_digest(model) if model else None, scorer.description, evaluation.digest])
        path = evaluation.directory / f"bertscore-{digest[:10]}.json"
        kept = read_json(path)
        if not isinstance(kept, dict) or kept.get("digest") != digest:
            kept = {"digest": digest, "f1": scorer(result["texts"], references)}
            write_json(path, kept)
        return float(kept["f1"])

    def _summary(
        self, variant: Variant, point: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        own = [entry for entry in runs if entry["variant"] == variant.name]
        finals = [entry for entry in own if entry["role"] == "final"]
        good = [entry for entry in finals if entry["status"] == "finished"]
        failed = [entry for entry in finals if entry["status"] == "failed"]
        if point is None:
            failed = own
        points = []
        if len(variant.points) > 1:
            for options, run in zip(variant.points, self.point_runs(variant), strict=True):
                record = training_of(run)
                points.append(
                    {
                        "options": _differing(options, variant.points),
                        "run": run.name,
                        "eval_loss": record["eval_loss"] if record else None,
                        "reason": failure_of(run),
                        "chosen": options == point,
                    }
                )
        return {
            "name": variant.name,
            "method": variant.method,
            "options": None if point is None else _options_of(variant, point, good),
            "points": points,
            "runs": len(finals),
            "finished": len(good),
            "failures": [{key: entry[key] for key in ("name", "seed", "reason", "log")} for entry in failed],
            "summary": summarise(good),
        }


def _options_of(
    variant: Variant, point: Mapping[str, Any], finished: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The method's own options and the learning rate as they were used, and whatever else the point sets."""
    used = finished[0]["training"]["options"] if finished else {}
    own = {key: used[key] for key in ("lr", *own_options(get_method(variant.method))) if used.get(key) is not None}
    return own | dict(point)


def _at_the_edge(name: str, chosen: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where a grid of numbers should go on, since its best point is its first or last one."""
    for key, best in _differing(chosen, points).items():
        tried = {value for point in points if isinstance(value := point.get(key), (int, float))}
        if len(tried) < 3:
            continue
        if best in (min(tried), max(tried)):
            yield (
                f"{name}: the best {key} of those tried, {best:g}, is at the end of its grid "
                f"({min(tried):g} to {max(tried):g}): a value beyond it may be better"
            )


def _differing(options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if any(point.get(key) != value for point in points)}


def best_point(variant: Variant, runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """The point whose training has the lowest loss on the validation rows, the first of equals.

    Returns:
        The only point if there is one only; None if no point could be trained.
    """
    if len(variant.points) == 1:
        return variant.points[0]
    losses = []
    for point, run in zip(variant.points, runs, strict=True):
        record = training_of(run)
        if record is not None and record["eval_loss"] is not None and math.isfinite(record["eval_loss"]):
            losses.append((record["eval_loss"], point))
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average of the losses, the start corrected for having no past."""
    out, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        out.append(mean / (1 - SMOOTHING**step))
    return out


def _loss_target(given: float | None, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if given is not None:
        return {"value": given, "chosen": "given"}
    curves = [
        smoothed(entry["training"]["losses"]) for entry in runs if entry["training"] and entry["role"] == "final"
    ]
    # One that does not learn would make the target a loss that all the others begin with.
    learning = [curve for curve in curves if min(curve) <= 0.9 * curve[0]]
    chosen = "the lowest that every final training reached"
    if learning and len(learning) < len(curves):
        chosen += " whose loss fell by a tenth at least"
    return {"value": max(map(min, learning or curves), default=0.0), "chosen": chosen}


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for fewer than two) and number of each quantity over runs."""
    values: dict[str, list[float]] = {}

    def add(name: str, value: float | None) -> None:
        if value is not None:
            values.setdefault(name, []).append(value)

    for entry in entries:
        for name in _SCORES:
            add(name, (entry["scores"] or {}).get(name))
        record = entry["training"]
        for name in _RECORDED:
            add(name, record[name])
        for name, value in record["memory"].items():
            add(name, value)
        add("steps_to_loss", entry["steps_to_loss"])
    return {
        name: {
            "mean": statistics.fmean(found),
            "sd": statistics.stdev(found) if len(found) > 1 else None,
            "n": len(found),
        }
        for name, found in values.items()
    }


def _spread(prompts: Sequence[Any], number: int) -> list[tuple[int, Any]]:
    """So many prompts, evenly over the test set."""
    number = min(number, len(prompts))
    return [(place, prompts[place]) for place in (i * len(prompts) // number for i in range(number))]


def _hardware() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }
