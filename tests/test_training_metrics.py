"""Scores of answers while training goes on: what they are of, what they choose, and that they disturb nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny_models import make_model

pytest.importorskip("sacrebleu")

from training_support import files

from qaa_serve.training import TrainingError, TrainOptions, cli, train
from qaa_serve.training.answers import score_answers
from qaa_serve.training.errors import WorseError
from qaa_serve.training.methods import COMPARED
from qaa_serve.training.metrics import text_scores
from qaa_serve.training.options import Metric
from qaa_serve.training.prepare import prepare
from qaa_serve.training.rows import as_test_set, read_rows
from qaa_serve.training.trained import load_trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", "llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight prompts, of which the first has two right answers."""
    rows = [{"prompt": f"t{i}", "completion": f"t{i + 50} t{i + 60}"} for i in range(5, 13)]
    rows.append({"prompt": "t5", "completion": "t9"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(base: Path, data: Path, **changed: Any) -> TrainOptions:
    given = {"lr": 3e-2, "max_steps": 6, "batch_size": 4, "eval_data": data, "eval_steps": 2, **changed}
    return TrainOptions(str(base), data, data.parent / "adapters" / "new", **{"eval_max_new_tokens": 4, **given})


def told(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Has the evaluations find these exact matches, one after another."""
    left = iter(scores)
    monkeypatch.setattr("qaa_serve.training.loop.score_answers", lambda *_, **__: {"exact_match": next(left)})


def test_the_names_are_those_of_a_comparison() -> None:
    assert set(get_args(Metric)) == text_scores(["a"], [["a"]]).scores.keys()


@pytest.mark.parametrize("method", COMPARED)
def test_scores_are_those_of_the_state_that_is_saved(base: Path, data: Path, method: str) -> None:
    metrics = ("exact_match", "rouge_l")
    given = {"lr": 1e-2 if method == "full" else 0.1, "max_steps": 40, "eval_steps": 20}
    result = train(options(base, data, method=method, eval_metrics=metrics, **given))
    assert [step for step, _ in result.evaluation_scores] == [0, 20, 40]
    model, tokenizer = load_trained(result.output)
    prompts = as_test_set(read_rows(str(data), tokenizer).rows)["prompts"]
    assert len(prompts) == 8
    found = score_answers(model, tokenizer, prompts, metrics=metrics, batch_size=3, max_new_tokens=4)
    assert found == pytest.approx(dict(result.evaluation_scores)[result.best_step])
    assert found["rouge_l"] > result.evaluation_scores[0][1]["rouge_l"]
    record = json.loads((result.output / "training.json").read_text())
    assert record["evaluation_scores"] == [[step, scores] for step, scores in result.evaluation_scores]
    assert (
        f"| rouge_l on it | {record['evaluation_scores'][0][1]['rouge_l']:.1f} before, "
        in (result.output / "README.md").read_text()
    )


@pytest.mark.parametrize("method", COMPARED)
def test_answering_disturbs_no_training(base: Path, data: Path, method: str) -> None:
    more = {"method": method, "method_options": {"dropout": 0.2} if method == "lora" else {}, "overwrite": True}
    plain = files(train(options(base, data, **more)).output)
    scored = files(train(options(base, data, eval_metrics=("bleu",), **more)).output)
    del plain["README.md"], scored["README.md"]
    assert scored == plain


def test_a_score_chooses_the_state(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the loss falls to the end: by it the last state would be kept."""
    assert train(options(base, data)).best_step == 6
    told(monkeypatch, 10.0, 20.0, 40.0, 40.0)
    given = {"eval_metrics": ("exact_match",), "overwrite": True}
    result = train(options(base, data, best_by="exact_match", **given))
    assert result.best_step == 4
    assert result.scores == {"exact_match": (10.0, 40.0)}
    assert result.eval_loss == dict(result.evaluations)[4]
    kept = files(result.output)["adapter_model.safetensors"]
    told(monkeypatch, 10.0, 20.0, 40.0, 40.0)
    assert files(train(options(base, data, **given)).output)["adapter_model.safetensors"] != kept


def test_patience_counts_by_the_score(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 0.0, 30.0, 20.0, 25.0, 90.0)
    given = {"eval_metrics": ("exact_match",), "best_by": "exact_match", "patience": 2, "max_steps": 20}
    result = train(options(base, data, **given))
    assert (result.steps, result.best_step) == (6, 2)


@pytest.mark.parametrize(
    ("scores", "lr", "message"),
    [
        ((50.0, 20.0, 30.0, 40.0), 3e-2, "exact_match 50.000 before, 40.000 after"),
        ((0.0, 0.0, 0.0, 0.0), 3.0, r"loss \d"),  # the score says nothing
    ],
)
def test_worse_is_what_the_score_says(
    base: Path, data: Path, scores: tuple[float, ...], lr: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"eval_metrics": ("exact_match",), "best_by": "exact_match"}
    if lr == 3.0:
        given |= {"method": "full", "max_grad_norm": 0.0, "schedule": "constant"}
    told(monkeypatch, *scores)
    with pytest.raises(WorseError, match=message):
        train(options(base, data, lr=lr, **given))


def test_so_many_prompts_and_no_more(base: Path, data: Path) -> None:
    def asked(**changed: Any) -> list[Mapping[str, Any]]:
        return prepare(options(base, data, eval_metrics=("bleu",), **changed)).eval_prompts

    everything = asked()
    assert [prompt["references"] for prompt in everything][:2] == [["t55 t65", "t9"], ["t56 t66"]]
    assert len(everything) == 8
    assert asked(eval_prompts=3) == [everything[0], everything[2], everything[5]]


def test_the_command_tells_them(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", base, "--data", data, "--eval-data", data, "--output", data.parent / "out"]
    metrics = ["--max-steps", "2", "--eval-metrics", "exact_match", "rouge1", "--eval-max-new-tokens", "3"]
    assert cli.main([*map(str, given), *metrics]) == 0
    out, err = capsys.readouterr()
    assert "step 0, evaluation loss" in err
    assert re.search(r", exact_match 0\.0, rouge1 \d+\.\d\n", err)
    assert "exact_match 0.0 (before) -> " in out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_data": None, "eval_steps": None}, "--eval-metrics needs --eval-data"),
        ({"best_by": "rouge1"}, "--best-by rouge1 needs --eval-metrics rouge1"),
        ({"eval_prompts": 0}, "--eval-prompts must be above 0"),
        (
            {"eval_max_new_tokens": 256},
            r"the longest prompt has 1 tokens, which with --eval-max-new-tokens 256 is more than the 256",
        ),
    ],
)
def test_refused(base: Path, data: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        prepare(options(base, data, **{"eval_metrics": ("bleu",), **changed}))


def test_missing_package_is_named_with_its_extra(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    given = ["--model", base, "--data", data, "--eval-data", data, "--output", data.parent / "out"]
    assert cli.main([*map(str, given), "--eval-metrics", "bleu"]) == 2
    assert capsys.readouterr().err == (
        "qaa-serve train: sacrebleu is not installed; --eval-metrics needs the extra: "
        'pip install "qaa-serve[compare]"\n'
    )
