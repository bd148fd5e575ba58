"""A comparison from its settings to its results: what is prepared, trained, chosen, answered and scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from qaa_serve import __version__
from qaa_serve.training.compare import paired
from qaa_serve.training.compare.display import Display
from qaa_serve.training.compare.evaluate import EVALUATION_FORMAT
from qaa_serve.training.compare.files import model_digest, owned, write_bytes, write_json
from qaa_serve.training.compare.plan import BASE, Variant, check_options, differing, digest_of, options_text
from qaa_serve.training.compare.results import (
    RESULTS_FORMAT,
    Scored,
    at_the_edge,
    hardware,
    run_entry,
    score,
    take_steps_to_loss,
    variant_entry,
)
from qaa_serve.training.compare.runner import Evaluation, Run, execute, make_evaluation, make_run
from qaa_serve.training.compare.settings import Settings
from qaa_serve.training.data import Usable
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import Setting, configured, get_method, own_options
from qaa_serve.training.metrics import BertScore, unseen_by_rouge
from qaa_serve.training.rows import Row, as_test_set, by_prompt, check_positions, notes_on, read_rows, split


@dataclass(frozen=True)
class Material:
    """The rows, read and checked, and the digests of everything.

    Attributes:
        train: rows to train on.
        validation: rows to choose by and to stop by; None: there are none.
        test: rows to test on.
        digests: SHA-256 by option: ``model``, ``data``, ``eval_data``.
        test_set: what the evaluating process reads.
        notes: what the reader of the report should know about the rows.
    """

    train: Sequence[Row]
    validation: Sequence[Row] | None
    test: Usable[Row]
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

    def read(source: str) -> Usable[Row]:
        return read_rows(
            source,
            tokenizer,
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
            answers=common.get("answers", "all"),
            skip_bad_rows=bool(common.get("skip_bad_rows", False)),
            remedy="skip_bad_rows: true among the common options",
        )

    rows, test = read(settings.data), read(settings.eval_data)
    notes = list(dict.fromkeys([*notes_on(rows), *notes_on(test)]))
    asked = by_prompt(test.rows)
    train: Sequence[Row] = rows.rows
    held: Sequence[Row] | None = None
    digests: dict[str, str | None] = {"data": rows.digest, "eval_data": None}
    validation = settings.plan.validation
    if isinstance(validation, Path):
        given = read(str(validation))
        held, digests["eval_data"] = given.rows, given.digest
    elif validation is not None:
        train, held = split(rows.rows, validation)
        digests = {
            name: digest_of([row.value for row in part]) for name, part in (("data", train), ("eval_data", held))
        }
    shared = asked.keys() & by_prompt(rows.rows).keys()
    if shared:
        notes.append(
            f"{len(shared)} of the {len(asked)} test prompts are training prompts too: "
            "the scores on them say how well answers were remembered"
        )
    if held is not None and asked.keys() & {row.prompt for row in held} - shared:
        notes.append("some test prompts are validation prompts too: options were chosen by them")
    unseen = unseen_by_rouge([[row.reference for row in group] for group in asked.values()])
    if unseen:
        notes.append(
            f"{unseen} of the {len(asked)} test prompts have references without any letter a-z or digit, "
            "which is all that ROUGE sees"
        )
    test_set = as_test_set(test.rows)
    limit = getattr(config, "max_position_embeddings", None)
    check_positions(test_set["prompts"], limit, settings.max_new_tokens, settings.eval_data, "--max-new-tokens")
    for row in test_set["rows"]:
        row["input_ids"], row["labels"] = row["input_ids"][:limit], row["labels"][:limit]
    directory = Path(settings.model)
    base = model_digest(directory) if directory.is_dir() else f"{settings.model}@{config._commit_hash}"
    return Material(
        train=train,
        validation=held,
        test=test,
        digests={"model": base, **digests},
        test_set=test_set,
        notes=notes,
    )


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
            own = {key: options[key] for key in own_options(method) if key in options}
            targets = resolve_targets(
                base,
                options.get("target_modules"),
                exclude=options.get("exclude_modules", ()),
                blocks=options.get("layers_to_transform", ()),
            )
            steps = planned_steps(check_options(variant.name, variant.method, options), 1)
            trained = configured(method, own).build(base, Setting(targets, None, steps))
        return sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    except Exception:  # an estimate: no reason to stop a dry run
        return None


@dataclass
class Study:
    """A comparison under way."""

    settings: Settings
    material: Material

    def point_runs(self, variant: Variant) -> list[Run]:
        """One training a point of the variant's grid, all with the first seed."""
        return [self._run(variant, point, self.settings.plan.seeds[0]) for point in variant.points]

    def _run(self, variant: Variant, point: Mapping[str, Any], seed: int) -> Run:
        validation = self.settings.plan.validation
        data, eval_data = self.settings.data, None if validation is None else str(validation)
        if isinstance(validation, float):
            folder = self.settings.output / "data"
            data, eval_data = str(folder / "train.jsonl"), str(folder / "validation.jsonl")
        options = {
            **point,
            "method": variant.method,
            "model": self.settings.model,
            "data": data,
            "eval_data": eval_data,
        }
        options = {key: value for key, value in options.items() if value is not None}
        own = differing(point, variant.points)
        label = f"{variant.name} ({options_text(own)})" if own else variant.name
        return make_run(self.settings.output / "runs", variant.name, label, options, seed, self.material.digests)

    def execute(self, display: Display) -> dict[str, Any]:
        """Train, choose, evaluate and score whatever is missing.

        Returns:
            What results.json is to hold.

        Raises:
            TrainingError: if the output cannot be used.
        """
        settings, plan = self.settings, self.settings.plan
        scorer = None
        if settings.bertscore_model is not None:
            scorer = BertScore(settings.bertscore_model, settings.bertscore_layers)
        tried: set[Path] = set()
        with owned(settings.output) as lock:

            def do(jobs: Sequence[Run] | Sequence[Evaluation]) -> None:
                execute(jobs, display, lock=lock, retry_failed=settings.retry_failed, tried=tried)

            self._write_data()
            chosen: dict[str, Mapping[str, Any] | None] = {}
            for variant in plan.variants:
                points = self.point_runs(variant)
                do(points if len(points) > 1 else [])
                chosen[variant.name] = best_point(variant, points)
            finals = {
                variant.name: [self._run(variant, point, seed) for seed in plan.seeds]
                for variant in plan.variants
                if (point := chosen[variant.name]) is not None
            }
            # Seed by seed, so that a comparison that is stopped has something of everything.
            in_turn = [run for runs in zip(*finals.values(), strict=True) for run in runs]
            do(in_turn)
            evaluations = {BASE: self._evaluation(None)} | {
                run.name: self._evaluation(run) for run in in_turn if run.result() is not None
            }
            do(list(evaluations.values()))
            references = [prompt["references"] for prompt in self.material.test_set["prompts"]]
            scored = {name: score(each, references, scorer) for name, each in evaluations.items()}
            results = self._results(chosen, finals, scored)
            results["metrics"]["bertscore"] = scorer.description if scorer else None
            write_json(settings.output / "results.json", results)
        return results

    def _write_data(self) -> None:
        folder = self.settings.output / "data"
        folder.mkdir(exist_ok=True)
        write_json(folder / "test.json", self.material.test_set)
        if isinstance(self.settings.plan.validation, float):
            for name, rows in (("train", self.material.train), ("validation", self.material.validation or ())):
                lines = "".join(json.dumps(row.value, default=str) + "\n" for row in rows)
                write_bytes(folder / f"{name}.jsonl", lines.encode())

    def _evaluation(self, run: Run | None) -> Evaluation:
        """Of what was trained, or of the base."""
        settings, common = self.settings, self.settings.plan.common
        limits = {"max_new_tokens": settings.max_new_tokens, "bf16": bool(common.get("bf16", False))}
        job = {
            **limits,
            "model": settings.model,
            "directory": run and str(run.model),
            "test": str(settings.output / "data" / "test.json"),
            "batch_size": settings.eval_batch_size,
            "threads": common.get("threads"),
            "trust_remote_code": bool(common.get("trust_remote_code", False)),
        }
        depends = {
            **limits,
            "format": EVALUATION_FORMAT,
            "test": digest_of(self.material.test_set),
            "model": self.material.digests["model"],
        }
        if run is None:
            return make_evaluation(BASE, settings.output / "runs" / BASE, job, depends)
        depends |= {"run": run.digest, "variant": run.variant}
        return make_evaluation(f"{run.variant}, seed {run.seed}", run.directory, job, depends)

    def _results(
        self,
        chosen: Mapping[str, Mapping[str, Any] | None],
        finals: Mapping[str, Sequence[Run]],
        scored: Mapping[str, Scored],
    ) -> dict[str, Any]:
        settings, material, plan = self.settings, self.material, self.settings.plan
        prompts = material.test_set["prompts"]
        runs = []
        for variant in plan.variants:
            final = {run.name: run for run in finals.get(variant.name, [])}
            points = {run.name: run for run in self.point_runs(variant)} if len(variant.points) > 1 else {}
            for name, run in {**final, **points}.items():
                role = "final" if name in final else "selection"
                runs.append(run_entry(run, role, scored.get(name) if name in final else None, settings.output))
        target = take_steps_to_loss(settings.loss_target, runs)
        differences = paired.differences(
            {
                variant.name: [
                    found
                    for run in finals.get(variant.name, ())
                    if run.name in scored and (found := scored[run.name].statistics) is not None
                ]
                for variant in plan.variants
            }
        )
        variants = [
            variant_entry(variant, chosen[variant.name], self.point_runs(variant), runs, differences[variant.name])
            for variant in plan.variants
        ]
        notes = list(material.notes)
        for variant in plan.variants:
            if (point := chosen[variant.name]) is not None:
                notes += at_the_edge(variant, point)
        trained = [entry["training"] for entry in runs if entry["training"]]
        if len({json.dumps(record["versions"], sort_keys=True) for record in trained}) > 1:
            notes.append("the trainings were made with different versions of packages; results.json has them")
        if resumed := sum(entry["resumed"] for entry in runs):
            notes.append(
                f"{resumed} of the trainings were interrupted and resumed; their time and memory are those of the "
                "last part"
            )
        split_off = isinstance(plan.validation, float)
        shown = min(settings.examples, len(prompts))
        return {
            "format": RESULTS_FORMAT,
            "command": list(settings.command),
            "model": {"name": settings.model, "digest": material.digests["model"]},
            "data": {
                "train": _described(settings.data, material.train, material.digests["data"]),
                "validation": None
                if material.validation is None
                else {
                    **_described(
                        settings.data if split_off else str(plan.validation),
                        material.validation,
                        material.digests["eval_data"],
                    ),
                    "split": plan.validation if split_off else None,
                },
                "test": {
                    **_described(settings.eval_data, material.test.rows, material.test.digest),
                    "references": sum(len(prompt["references"]) for prompt in prompts),
                },
            },
            "common": dict(plan.common),
            "seeds": list(plan.seeds),
            "generation": {"max_new_tokens": settings.max_new_tokens, "greedy": True},
            "metrics": {"bleu": next((each.signature for each in scored.values() if each.signature), None)},
            "bootstrap": {
                "against": plan.variants[0].name,
                "resamples": paired.RESAMPLES,
                "level": paired.LEVEL,
                "seed": paired.SEED,
            },
            "loss_target": target,
            "hardware": hardware(),
            "versions": {"qaa-serve": __version__, **(trained[-1]["versions"] if trained else {})},
            "notes": notes,
            "base": scored[BASE].entry,
            "variants": variants,
            "runs": runs,
            "examples": [  # evenly over the test set
                {"prompt": prompts[place]["shown"], "references": prompts[place]["references"], "place": place}
                for place in (number * len(prompts) // shown for number in range(shown))
            ],
        }


def _described(source: str, rows: Sequence[Row], digest: str | None) -> dict[str, Any]:
    return {"source": source, "rows": len(rows), "prompts": len({row.prompt for row in rows}), "sha256": digest}


def best_point(variant: Variant, runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """The point whose training has the lowest loss on the validation rows, the first of equals.

    Returns:
        The only point if there is one only; None if no point could be trained.
    """
    if len(variant.points) == 1:
        return variant.points[0]
    losses = [(run.result() or {}).get("eval_loss") for run in runs]
    found = [(loss, place) for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return variant.points[min(found)[1]] if found else None
