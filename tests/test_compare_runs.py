"""Whole comparisons with real trainings of a tiny model: what is chosen, kept, repeated, reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fork_server import forked_job, training_server
from test_compare import pair, tiny_bert, write_rows
from tiny_models import make_model

pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")

from qaa_serve.training.compare import cli, runner

pytestmark = pytest.mark.slow

#: At the first rate qaa learns next to nothing; at lora's, its loss is no number after a step.
CONFIG = """
common: {max_steps: 4, batch_size: 4, threads: 1}
seeds: 2
validation: 0.25
controls: false
methods:
  qaa: {lr: [1e-9, 3e-2]}
  lora wild: {method: lora, lr: 1e30}
"""


class Comparison:
    """A comparison in a directory of its own, to be run several times."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.report = directory / "report"
        base = make_model(directory / "base", "llama")
        train = [pair(f"t{i} t{i + 1}", f"t{i + 50}") for i in range(3, 23)]
        # The same prompt with two answers: two references.
        test = [pair(f"t{i} t{i + 2}", f"t{i + k}") for i in range(3, 8) for k in (50, 60)]
        config = directory / "grid.yaml"
        config.write_text(CONFIG)
        self.arguments = ["--model", str(base), "--output", str(self.report), "--config", str(config)]
        self.arguments += ["--data", str(write_rows(directory / "train.jsonl", train))]
        self.arguments += ["--eval-data", str(write_rows(directory / "test.jsonl", test))]
        self.arguments += ["--max-new-tokens", "5", "--bertscore-model", str(tiny_bert(directory / "bert"))]

    def run(self, *more: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": forked_job}))
            return cli.main([*self.arguments, *more])

    @property
    def results(self) -> Any:
        return json.loads((self.report / "results.json").read_bytes())

    def runs(self, variant: str) -> list[Any]:
        return [run for run in self.results["runs"] if run["variant"] == variant]

    def times(self) -> dict[str, int]:
        """When the files of the runs were written."""
        files = (self.report / "runs").rglob("*")
        return {str(file.relative_to(self.report)): file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    made = Comparison(tmp_path_factory.mktemp("comparison"))
    made.status = made.run()  # type: ignore[attr-defined]
    return made


def label(comparison: Comparison) -> str:
    """Of the point that was chosen."""
    return f"qaa (lr {comparison.results['variants'][0]['options']['lr']:g})"


def test_failure_is_reported_and_the_others_are_there(comparison: Comparison) -> None:
    assert comparison.status == 1  # type: ignore[attr-defined]
    qaa, wild = comparison.results["variants"]
    assert (qaa["finished"], qaa["failures"]) == (2, [])
    assert (wild["finished"], len(wild["failures"])) == (0, 2)
    assert "training diverged at step" in wild["failures"][0]["reason"]
    assert (comparison.report / wild["failures"][0]["log"]).is_file()
    for name in ("report.md", "report.html"):
        text = (comparison.report / name).read_text()
        assert "training diverged at step" in text
        assert wild["failures"][0]["log"] in text


def test_chosen_by_validation_loss_from_training_rows_alone(comparison: Comparison) -> None:
    results = comparison.results
    points = results["variants"][0]["points"]
    assert [point["options"] for point in points] == [{"lr": 1e-9}, {"lr": 0.03}]
    best = min(points, key=lambda point: point["eval_loss"])
    assert [point["chosen"] for point in points] == [point is best for point in points]
    assert results["variants"][0]["options"]["lr"] == best["options"]["lr"]
    assert (results["data"]["train"]["rows"], results["data"]["validation"]["rows"]) == (15, 5)

    def prompts(path: Path) -> set[str]:
        return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}

    train, validation = (prompts(comparison.report / "data" / f"{name}.jsonl") for name in ("train", "validation"))
    assert not train & validation
    assert not (train | validation) & prompts(comparison.directory / "test.jsonl")
    for run in comparison.runs("qaa"):
        options = run["training"]["options"]
        assert options["data"] == str(comparison.report / "data" / "train.jsonl")
        assert options["eval_data"] == str(comparison.report / "data" / "validation.jsonl")
    # The point's training with the first seed is the selection's: three trainings, not four.
    assert sorted((run["role"], run["seed"]) for run in comparison.runs("qaa")) == [
        ("final", 0),
        ("final", 1),
        ("selection", 0),
    ]


def test_scores_of_everything_that_was_trained(comparison: Comparison) -> None:
    results = comparison.results
    assert results["data"]["test"] | {"sha256": "", "source": ""} == {
        "source": "",
        "rows": 10,
        "prompts": 5,
        "references": 10,
        "sha256": "",
    }
    names = {"bleu", "rouge1", "rouge2", "rouge_l", "exact_match", "bertscore", "test_loss", "perplexity"}
    assert results["base"]["scores"].keys() == names
    finals = [run for run in comparison.runs("qaa") if run["role"] == "final"]
    for run in finals:
        assert run["scores"].keys() == names
        assert len(run["texts"]) == 5
        assert run["scores"]["test_loss"] != results["base"]["scores"]["test_loss"]
    summary = results["variants"][0]["summary"]
    losses = [run["scores"]["test_loss"] for run in finals]
    assert summary["test_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert summary["test_loss"]["sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert summary["test_loss"]["n"] == 2
    assert summary["trainable"]["sd"] == 0
    assert {"peak_rss_bytes", "saved_for_backward_bytes", "seconds_per_step", "adapter_bytes"} <= summary.keys()
    assert results["loss_target"]["chosen"] != "given"
    assert summary["steps_to_loss"]["n"] == 2  # the default is a loss that all reached


def test_report_stands_alone(comparison: Comparison) -> None:
    html = (comparison.report / "report.html").read_text()
    bare = re.sub(r"data:image/png;base64,[^\"]*", "", html)
    assert not re.findall(r"//[a-z]|@import|<script|<link", bare)
    sources = re.findall(r'(?:src|srcset)="([^"]{0,30})', html)
    figures = {path.stem for path in (comparison.report / "figures").iterdir()}
    assert figures == {"loss", "course", "validation", "parameters", "quality", "memory", "seconds"}
    assert len(sources) == 2 * len(figures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    markdown = (comparison.report / "report.md").read_text()
    assert {Path(name).stem for name in re.findall(r"\]\((figures/[a-z]+\.png)\)", markdown)} == figures
    for text in (html, markdown):
        assert "| base |" in text or ">base<" in text
        assert "test loss" in text
        assert comparison.runs("qaa")[0]["texts"][0] in text
        assert "the one with the lowest validation loss" in text


def test_trainings_in_the_form_of_pefts_own_comparison(comparison: Comparison) -> None:
    """What its ``processing.preprocess`` reads of each file is there."""
    made = sorted((comparison.report / "peft").iterdir())
    assert [path.name for path in made] == ["qaa--qaa-seed0.json", "qaa--qaa-seed1.json"]
    row, run = json.loads(made[0].read_bytes()), comparison.runs("qaa")[0]
    assert row["train_info"]["status"] == "success"
    assert row["run_info"]["peft_config"]["peft_type"] == "QAA"
    assert {"experiment_name", "total_time", "peft_branch", "created_at", "train_config"} <= row["run_info"].keys()
    assert row["run_info"]["train_config"]["model_id"] == run["training"]["options"]["model"]
    metrics = row["train_info"]["metrics"][-1]
    assert metrics["test accuracy"] == run["scores"]["exact_match"] / 100
    assert metrics["train samples"] == 4 * 4
    assert metrics["train total tokens"] > 4 * 4 * 3
    assert {f"{name}-version" for name in ("peft", "transformers", "torch", "datasets", "bitsandbytes")} <= row[
        "meta_info"
    ]["package_info"].keys()


def test_documented_keys_are_those_of_results_json(comparison: Comparison) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
    results = comparison.results
    named = {
        *results,
        *results["runs"][0],
        *results["variants"][0],
        *results["variants"][0]["summary"],
        *results["data"],
        *results["data"]["test"],
    }
    assert [key for key in sorted(named) if f"`{key}`" not in docs] == []


def test_the_same_again_repeats_nothing(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    before, results = comparison.times(), comparison.results
    assert comparison.run() == 1
    assert comparison.times() == before
    assert comparison.results == results
    err = capsys.readouterr().err
    assert err.count(f"{label(comparison)}, seed 0: reused") == 1
    assert "lora wild, seed 0: failed before: training diverged" in err
    assert "--retry-failed" in err


def test_answers_that_are_there_are_scored_and_not_asked_for_again(comparison: Comparison) -> None:
    results, scores = comparison.results, list(comparison.report.glob("runs/*/bertscore-*.json"))
    assert len(scores) == 3  # the base and qaa's two seeds
    for path in scores:
        path.unlink()
    before = comparison.times()
    assert comparison.run() == 1
    after = comparison.times()
    assert after.keys() - before.keys() == {str(path.relative_to(comparison.report)) for path in scores}
    assert after | before == after
    assert comparison.results == results


def test_what_was_killed_is_trained_again_and_nothing_else(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = comparison.runs("qaa")[1]
    directory = comparison.report / "runs" / killed["name"]
    shutil.rmtree(directory / "model")
    before = comparison.times()
    assert comparison.run() == 1
    after = comparison.times()
    changed = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).parts[1] for name in changed} == {killed["name"]}
    again = comparison.runs("qaa")[1]
    assert again["training"]["losses"] == killed["training"]["losses"]
    assert f"{label(comparison)}, seed 1: loss" in capsys.readouterr().err


def test_another_test_set_trains_nothing_and_asks_again(comparison: Comparison) -> None:
    path = comparison.directory / "test.jsonl"
    content, before, results = path.read_text(), comparison.times(), comparison.results
    try:
        write_rows(path, [pair("t30 t31", "t9")])
        assert comparison.run("--methods", "qaa", "--seeds", "1") == 0
        changed = {name for name, time in comparison.times().items() if time != before.get(name)}
        assert changed
        assert all("/model/" not in name for name in changed)
        now = comparison.results
        assert now["data"]["test"]["prompts"] == 1
        assert now["variants"][0]["options"] == results["variants"][0]["options"]
        assert now["variants"][0]["summary"]["bleu"]["sd"] is None
    finally:
        path.write_text(content)


def test_differences_to_the_first_variant_are_in_results_and_report(comparison: Comparison) -> None:
    assert comparison.run("--methods", "qaa,lora", "--seeds", "1") == 0
    first, second = comparison.results["variants"]
    assert first["difference"] is None
    means = [variant["summary"]["test_loss"]["mean"] for variant in (first, second)]
    assert second["difference"].keys() == {"test_loss", "bleu", "rouge_l", "bertscore"}
    found = second["difference"]["test_loss"]
    assert found["difference"] == pytest.approx(means[1] - means[0])
    assert found["low"] <= found["difference"] <= found["high"]
    for name in ("report.md", "report.html"):
        text = (comparison.report / name).read_text()
        assert f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]" in text
        assert "Differences to qaa" in text


def test_sigterm_stops_the_training_and_says_how_to_go_on(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path)
    command = [sys.executable, "-m", "qaa_serve.cli", "compare", *comparison.arguments]
    out, err = tmp_path / "out", tmp_path / "err"
    for file in (out, err):
        file.touch()
    # Far more steps than there is time for.
    process = training_server().start([*command, "--max-steps", "100000"], os.environ, out, err)
    log: list[Path] = []
    while process.poll() is None and not (log and "evaluation loss" in log[0].read_text()):
        time.sleep(0.05)
        log = list(comparison.report.glob("runs/*/train.log"))
    process.terminate()
    process.wait(60)
    err = err.read_text()
    assert process.returncode == 143
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert "interrupted" in log[0].read_text().splitlines()[-1]
    assert not list(comparison.report.glob("runs/*/failure.json"))
