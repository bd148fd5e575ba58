"""Options: each reaches what it is for, from its one place; and what made the model worse is not saved."""

from __future__ import annotations

import argparse
import graphlib
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from training_support import ROWS, files, options, weights

import qaa_serve.training
from qaa_serve.adapters import AdapterConfig, load_adapter
from qaa_serve.training import QAAConfig, TrainingError, TrainOptions, cli, train
from qaa_serve.training.circuit_options import CircuitOptions
from qaa_serve.training.errors import WorseError
from qaa_serve.training.prepare import prepare
from qaa_serve.training.trainer import AdapterTrainer


def run(base: Path, data: Path, *more: str) -> int:
    given = ["--model", str(base), "--data", str(data), "--output", str(data.parent / "out"), "--max-steps", "4"]
    return cli.main([*given, *more])


class TestOnePlace:
    def test_circuits_are_described_alike_for_training_and_serving(self) -> None:
        described = {field.name: field.default for field in fields(CircuitOptions)}
        format_alone = {"peft_type", "qaa_format", "task_type", "base_model_name_or_path", "target_modules"}
        served = {name: field.default for name, field in AdapterConfig.model_fields.items()}
        assert (described.pop("inputs"), described.pop("whitened")) == ("centred-rms", True)
        assert (served.pop("inputs"), served.pop("whitened")) == ("raw", False)  # what an older file means
        assert described == {name: value for name, value in served.items() if name not in format_alone}
        assert described.keys() <= {field.name for field in fields(QAAConfig)}

    def test_modules_import_in_one_direction(self) -> None:
        """Imports inside functions count too; the package itself hands its names out lazily and does not."""
        root = Path(qaa_serve.training.__file__).parent
        graph: dict[str, set[str]] = {}
        for path in root.rglob("*.py"):
            name = ".".join(("qaa_serve", "training", *path.relative_to(root).with_suffix("").parts))
            if name != "qaa_serve.training.__init__":
                found = re.findall(r"(?:from|import) (qaa_serve\.training\.[\w.]+)", path.read_text())
                graph[name.removesuffix(".__init__")] = set(found)
        assert len(graph) > 30
        tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError

    def test_every_option_is_on_the_command_line_and_in_the_record(self, base: Path, data: Path) -> None:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        known = {action.dest for action in parser._actions}
        options_of_train = {field.name for field in fields(TrainOptions)} - {"method_options"}
        assert options_of_train <= known
        record = json.loads((train(options(base, data, max_steps=1)).output / "training.json").read_text())
        assert options_of_train <= record["options"].keys()


class TestWorse:
    @pytest.mark.parametrize("evaluates", [True, False])
    def test_what_ends_worse_is_refused_and_can_be_kept(
        self, base: Path, data: Path, evaluates: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A rate far too high: what `qaa-serve train` once saved with status 0 and an invitation to serve it."""
        wild = ["--lr", "3", "--method", "full", "--max-grad-norm", "0", "--schedule", "constant"]
        wild += ["--eval-data", str(data), "--eval-steps", "4"] if evaluates else []
        assert run(base, data, *wild) == 1
        out, err = capsys.readouterr()
        assert "serve it with" not in out
        assert "the training made it worse: loss " in err
        assert ("on the evaluation data" if evaluates else "on the training data") in err
        assert not (data.parent / "out").exists()
        assert run(base, data, *wild, "--resume", "--accept-worse") == 0
        record = json.loads((data.parent / "out" / "training.json").read_text())
        assert record["steps"] == 4
        assert len(record["losses"]) == 4

    def test_what_helps_passes_though_a_batch_be_harder(self, base: Path, data: Path) -> None:
        result = train(options(base, data, batch_size=1, max_steps=8))
        before, after = result.probe
        assert after < before

    def test_it_is_an_error_of_its_own(self, base: Path, data: Path) -> None:
        with pytest.raises(WorseError, match=r"loss \d\.\d+ before, \d+\.\d+ after"):
            train(options(base, data, lr=3.0, method="full", max_grad_norm=0.0, schedule="constant"))


class TestSources:
    def read(self, base: Path, data: Path, weights: tuple[float, ...]) -> list[tuple[int, ...]]:
        other = data.with_name("other.jsonl")
        other.write_text(data.read_text().replace("arr", "zzz"))
        given = {"output": data.parent / "out", "data_weights": weights, "seed": 1}
        run = prepare(TrainOptions(model=str(base), data=(data, other), **given))
        return [tuple(row["input_ids"]) for row in run.rows.rows]

    def test_a_weight_is_how_often_rows_come(self, base: Path, data: Path) -> None:
        plain = self.read(base, data, ())
        assert len(plain) == len(set(plain)) == 2 * len(ROWS)
        weighted = self.read(base, data, (2.0, 0.5))
        counts = [weighted.count(row) for row in plain]
        assert counts[: len(ROWS)] == [2] * len(ROWS)
        assert sorted(counts[len(ROWS) :]) == [0] * 4 + [1] * 4
        assert self.read(base, data, (2.0, 0.5)) == weighted

    def test_both_are_recorded(self, base: Path, data: Path) -> None:
        other = data.with_name("other.jsonl")
        other.write_text(data.read_text().replace("arr", "zzz"))
        assert run(base, data, "--data", str(data), str(other), "--data-weights", "1", "0.25") == 0
        record = json.loads((data.parent / "out" / "training.json").read_text())
        assert record["options"]["data"] == [str(data), str(other)]
        assert record["data"]["rows"] == len(ROWS) + 2
        again = ["--config", str(data.parent / "out" / "training.json"), "--output", str(data.parent / "again")]
        assert cli.main(again) == 0
        assert weights(data.parent / "again") == weights(data.parent / "out")

    def test_a_weight_for_each(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(base, data, "--data-weights", "1", "2") == 2
        assert "--data-weights has 2 numbers for 1 sources of --data" in capsys.readouterr().err


class TestLayers:
    @pytest.mark.parametrize("method", ["qaa", "lora"])
    def test_left_out_and_kept_to(self, base: Path, data: Path, method: str) -> None:
        given = {"exclude_modules": ("o_proj", "layers.1.self_attn.q_proj"), "layers_to_transform": (1,)}
        result = train(options(base, data, method=method, max_steps=2, **given))
        assert result.target_modules == ("1.self_attn.k_proj", "1.self_attn.v_proj")
        if method == "qaa":
            modules = load_adapter(result.output).modules
            assert sorted(modules) == [f"model.layers.1.self_attn.{name}_proj" for name in "kv"]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"exclude_modules": ("nope",)}, "no module 'nope'"),
            ({"layers_to_transform": (2,)}, r"no block 2; it has \[0, 1\]"),
            ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "no layer is left"),
        ],
    )
    def test_refused(self, base: Path, data: Path, given: dict[str, Any], said: str) -> None:
        with pytest.raises(TrainingError, match=said):
            train(options(base, data, **given))


class TestLog:
    def test_every_step_is_recorded_and_read_only_when_due(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[int] = []
        read = AdapterTrainer._read
        monkeypatch.setattr(
            AdapterTrainer, "_read", lambda self: (reads.append(self.state.global_step), read(self))
        )
        each = train(options(base, data, logging_steps=1, max_steps=7, save_steps=100))
        assert len(reads) >= 7
        reads.clear()
        few = train(options(base, data, logging_steps=3, max_steps=7, save_steps=100, overwrite=True))
        assert sorted(set(reads)) == [1, 3, 6, 7]
        for name in ("losses", "grad_norms", "learning_rates"):
            assert getattr(few, name) == getattr(each, name)
            assert len(getattr(few, name)) == 7
        assert few.learning_rates[-1] < max(few.learning_rates)
        assert all(norm > 0 for norm in few.grad_norms)

    def test_the_line_says_rate_and_norm(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(base, data) == 0
        assert "step 4/4, loss " in (err := capsys.readouterr().err)
        assert ", rate " in err
        assert ", gradient norm " in err


class TestMachinery:
    def test_another_optimiser(self, base: Path, data: Path) -> None:
        plain = train(options(base, data)).output
        other = train(options(base, data, optim="adafactor", output=plain.with_name("other"))).output
        assert weights(plain) != weights(other)

    def test_dropout_is_lora_s_own(self, base: Path, data: Path) -> None:
        output = train(options(base, data, method="lora", method_options={"dropout": 0.25}, max_steps=1)).output
        assert json.loads((output / "adapter_config.json").read_text())["lora_dropout"] == 0.25

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (("--optim", "adamx"), "transformers cannot train so: adamx is not a valid OptimizerNames"),
            (("--optim", "adamw_8bit"), "transformers cannot train so: .*bitsandbytes"),
            (("--report-to", "nobody"), "transformers cannot train so: .*nobody"),
            (("--report-to", "tensorboard"), "transformers cannot train so: .*tensorboard"),
            (("--attn-implementation", "nope"), "cannot be loaded: .*nope"),
            (("--load-in-4bit",), "needs a GPU, and there is none"),
            (("--dropout", "0.1"), "--dropout is no option of the method 'qaa'"),
        ],
    )
    def test_what_is_missing_is_said(
        self, base: Path, data: Path, given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        installed = {"adamw_8bit": "bitsandbytes", "tensorboard": "tensorboard"}.get(given[-1])
        if installed and importlib.util.find_spec(installed):
            pytest.skip(f"{installed} is installed")
        assert run(base, data, *given) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.search(said, err.replace("\n", " ")), err


class Hub:
    """Stands for huggingface_hub's client."""

    calls: list[tuple[str, dict[str, Any]]]
    refuses = ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **given: Any) -> None:
            type(self).calls.append((name, {**given, "args": args}))
            if name == self.refuses:
                raise OSError("no route to the hub")

        return call


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Hub.calls, Hub.refuses = [], ""
        monkeypatch.setattr("huggingface_hub.HfApi", Hub)

    def test_the_result_is_uploaded_once_it_is_saved(self, base: Path, data: Path) -> None:
        output = train(options(base, data, max_steps=1, push_to_hub="me/support")).output
        assert [name for name, _ in Hub.calls] == ["whoami", "create_repo", "upload_folder"]
        assert Hub.calls[1][1]["private"]
        assert Hub.calls[2][1] == {"repo_id": "me/support", "folder_path": output, "args": ()}
        assert "adapter_config.json" in files(output)

    def test_who_may_not_upload_learns_it_before_training(self, base: Path, data: Path) -> None:
        Hub.refuses = "whoami"
        with pytest.raises(TrainingError, match=r"does not take uploads .*no route.*hf auth login"):
            train(options(base, data, push_to_hub="me/support"))
        assert not (data.parent / "adapters").exists()

    def test_a_failed_upload_leaves_the_result(self, base: Path, data: Path) -> None:
        Hub.refuses = "upload_folder"
        with pytest.raises(TrainingError, match="is saved, but not uploaded to me/support: no route"):
            train(options(base, data, max_steps=1, push_to_hub="me/support"))
        load_adapter(data.parent / "adapters" / "new")
