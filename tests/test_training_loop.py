"""Training as a whole, and its command: what is learnt, what is written, what is said when it cannot be done."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training_data import tokenizer
from training_support import ROWS, files, options, weights
from transformers import AutoModelForCausalLM

from qaa_serve.adapters import linear_widths, load_adapter, resolve_base
from qaa_serve.adapters.staging import staged
from qaa_serve.training import TrainingError, train
from qaa_serve.training import cli as training_cli
from qaa_serve.training.data import encode_row
from qaa_serve.training.loop import base_reference
from qaa_serve.training.methods import COMPARED, METHODS, get_method, own_options


class TestTrain:
    def test_result_is_learnt_and_served_as_is(self, base: Path, data: Path) -> None:
        result = train(options(base, data, max_steps=25, eval_data=data))
        assert result.train_loss < result.first_loss - 0.1
        assert result.eval_loss < result.base_eval_loss - 0.1
        assert result.steps == 25
        widths = linear_widths(base)
        adapter = load_adapter(result.output, widths)
        assert adapter.config.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
        assert len(adapter.modules) == 2 * 4
        assert result.trainable == sum(m.theta.numel() + m.weight.numel() for m in adapter.modules.values())
        assert resolve_base(result.output, adapter.config.base_model_name_or_path) == str(base)
        assert not [path for path in result.output.parent.iterdir() if path != result.output]

    def test_saved_adapter_is_the_trained_one(self, base: Path, data: Path) -> None:
        result = train(options(base, data, max_steps=10, eval_data=data))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output)
        loss, tokens = 0.0, 0
        for row in ROWS:
            ids = tokenizer().apply_chat_template(row["messages"], return_dict=False)
            labels = [-100] * 3 + ids[3:-1] + [-100]
            mean = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            loss, tokens = loss + mean.item() * len(ids[3:-1]), tokens + len(ids[3:-1])
        assert loss / tokens == pytest.approx(result.eval_loss, abs=1e-4)

    @pytest.mark.parametrize("method", COMPARED)
    def test_same_seed_same_bytes(self, base: Path, data: Path, method: str) -> None:
        output = train(options(base, data, method=method, seed=3)).output
        first = files(output)
        shutil.rmtree(output)
        train(options(base, data, method=method, seed=3))
        assert files(output) == first
        train(options(base, data, method=method, seed=4, overwrite=True))
        assert method == "full" or weights(output) != next(first[name] for name in first if "safetensors" in name)

    @pytest.mark.parametrize("packing", [False, True])
    def test_evaluation_is_a_mean_over_tokens_whatever_the_batches(
        self, base: Path, tmp_path: Path, packing: bool
    ) -> None:
        """Rows of unlike length and loss, of which a mean of batches' means would depend on the batches."""
        data = tmp_path / "rows.jsonl"
        rows = [{"prompt": "x", "completion": "abc~"[n % 4] * (1 + 5 * n)} for n in range(9)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model, total, tokens = AutoModelForCausalLM.from_pretrained(base), 0.0, 0
        for row in rows:
            ids, labels = encode_row(row, tokenizer())
            answer = sum(label != -100 for label in labels)
            total += answer * model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            tokens += answer
        for batch in (1, 4, 9):
            given = {"batch_size": batch, "packing": packing, "max_steps": 1, "overwrite": True}
            result = train(options(base, data, eval_data=data, **given))
            assert result.base_eval_loss == pytest.approx(total / tokens, abs=1e-5)

    def test_padding_token_without_an_embedding(self, base: Path, data: Path, tmp_path: Path) -> None:
        odd = shutil.copytree(base, tmp_path / "odd")
        words = tokenizer()
        words.add_special_tokens({"pad_token": "<pad>"})
        words.save_pretrained(odd)
        data.write_text(data.read_text() + '{"prompt": "a", "completion": "a longer one"}\n')
        expected = train(options(base, data, eval_data=data))
        assert train(options(odd, data, eval_data=data, overwrite=True)).evaluations == expected.evaluations

    def test_link_is_followed(self, base: Path, data: Path, tmp_path: Path) -> None:
        """An adapter that was put elsewhere is replaced there, and the link stays one."""
        output = options(base, data).output
        output.parent.mkdir()
        output.symlink_to(tmp_path / "elsewhere" / "real")
        first = weights(train(options(base, data)).output)
        again = train(options(base, data, seed=5, overwrite=True)).output
        assert output.readlink() == tmp_path / "elsewhere" / "real"
        assert weights(again) == weights(tmp_path / "elsewhere" / "real") != first
        left = [path.name for folder in (output.parent, tmp_path / "elsewhere") for path in folder.iterdir()]
        assert left == ["new", "real"]
        assert resolve_base(output, load_adapter(output).config.base_model_name_or_path) == str(base)

    def test_lora_is_an_ordinary_peft_adapter(self, base: Path, data: Path) -> None:
        result = train(options(base, data, method="lora", method_options={"rank": 3}, max_steps=10))
        assert result.train_loss < result.first_loss
        config = json.loads((result.output / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["target_modules"]) == (
            "LORA",
            3,
            ["k_proj", "o_proj", "q_proj", "v_proj"],
        )
        assert resolve_base(result.output, config["base_model_name_or_path"]) == str(base)
        tensors = load_file(result.output / "adapter_model.safetensors")
        assert len(tensors) == 2 * 4 * 2
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output)

    def test_options_of_the_method_reach_the_adapter(self, base: Path, data: Path) -> None:
        given = {"ansatz": "ry_ring", "layers": 3, "alpha": 4.0, "heads": 2}
        result = train(options(base, data, method_options=given, target_modules=("down_proj",), max_steps=1))
        config = load_adapter(result.output).config
        assert {name: getattr(config, name) for name in given} == given
        assert config.target_modules == ("down_proj",)

    def test_theta_has_a_rate_of_its_own(self, base: Path, data: Path) -> None:
        def angles(**method_options: float) -> torch.Tensor:
            output = train(options(base, data, method_options=method_options, overwrite=True)).output
            return torch.cat([m.theta.flatten() for _, m in sorted(load_adapter(output).modules.items())])

        start = angles(theta_lr=1e-30)
        assert (angles() - start).abs().max() > 1e-2
        assert torch.equal(angles(theta_lr=1e-30), start)

    def test_card_says_how_it_was_made(self, base: Path, data: Path) -> None:
        result = train(options(base, data, eval_data=data, seed=11))
        card = (result.output / "README.md").read_text()
        for fact in (
            str(base),
            f"{result.trainable:,}",
            "ryrz_ring_ry",
            f"{result.train_loss:.4f}",
            f"{result.eval_loss:.4f}",
            "| seed | 11 |",
            f"torch {torch.__version__}",
        ):
            assert fact in card
        assert card.count(__import__("hashlib").sha256(data.read_bytes()).hexdigest()) == 2

    def test_bfloat16_base_and_checkpointing(self, base: Path, data: Path) -> None:
        result = train(options(base, data, bf16=True, gradient_checkpointing=True, grad_accum=2, max_steps=8))
        assert result.train_loss < result.first_loss
        module = next(iter(load_adapter(result.output).modules.values()))
        assert module.weight.dtype == torch.float32

    def test_checkpointing_changes_nothing(self, base: Path, data: Path) -> None:
        plain = train(options(base, data)).output
        other = train(options(base, data, gradient_checkpointing=True, output=plain.with_name("other"))).output
        assert files(plain)["adapter_model.safetensors"] == files(other)["adapter_model.safetensors"]

    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
    @pytest.mark.parametrize("where", ["training", "saving"])
    def test_failure_leaves_nothing(
        self, base: Path, data: Path, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        target = (
            "transformers.Trainer.training_step" if where == "training" else "qaa_serve.training.loop.model_card"
        )
        monkeypatch.setattr(target, fail)
        with pytest.raises(type(error)):
            train(options(base, data))
        left = {path.name for path in data.parent.glob("**/*")} - {"adapters", data.name}
        assert not left if where == "training" else ".new.checkpoints" in left  # what was trained is not lost
        assert "new" not in left

    def test_failure_leaves_what_was_there(self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output = train(options(base, data)).output
        before = files(output)
        monkeypatch.setattr("qaa_serve.training.loop.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(options(base, data, seed=5, overwrite=True))
        assert files(output) == before

    def test_failed_replacement_is_undone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output = tmp_path / "adapter"
        output.mkdir()
        (output / "old").touch()
        rename = Path.rename

        def fail_once_it_is_gone(self: Path, target: Path) -> Path:
            if target == output and (self / "new").exists():
                raise OSError("disk gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_once_it_is_gone)
        with pytest.raises(OSError, match="disk gone"), staged(output) as staging:
            (staging / "new").touch()
        assert [path.name for path in output.iterdir()] == ["old"]
        assert list(tmp_path.iterdir()) == [output]

    def test_overwrite_replaces_the_whole_adapter(self, base: Path, data: Path) -> None:
        output = train(options(base, data)).output
        (output / "left-over.txt").touch()
        train(options(base, data, overwrite=True))
        assert sorted(files(output)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    def test_files_are_as_readable_as_the_umask_lets(self, base: Path, data: Path) -> None:
        before = os.umask(0o027)
        try:
            output = train(options(base, data, max_steps=1)).output
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o640}
        assert output.stat().st_mode & 0o777 == 0o750

    def test_answers_without_an_end_are_noted(self, base: Path, data: Path) -> None:
        assert train(options(base, data, max_steps=1)).notes == ()
        result = train(options(base, data, max_steps=1, max_length=5, overwrite=True))
        assert f"{data}: 8 of 8 rows were cut to 5 tokens" in result.notes
        assert any("no answer ends with '<e>'" in note for note in result.notes)

    def test_divergence_is_an_error(self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.Trainer.compute_loss", lambda self, model, inputs, **_: sum(
            p.sum() for p in model.parameters() if p.requires_grad) * math.nan)  # fmt: skip
        with pytest.raises(TrainingError, match=r"diverged at step 1 of 4.*lower --lr"):
            train(options(base, data))
        assert not (data.parent / "adapters" / "new").exists()


class TestBaseReference:
    def test_hub_name_is_kept(self, tmp_path: Path) -> None:
        assert base_reference("org/model", tmp_path) == "org/model"

    def test_directory_is_relative_to_the_adapter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models" / "base").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert base_reference("models/base", Path("out/a")) == "../../models/base"


class TestMethods:
    def test_table_and_modules_agree(self) -> None:
        assert all(get_method(name).name == name for name in METHODS)

    def test_unknown(self) -> None:
        with pytest.raises(TrainingError, match="unknown method 'nope'; known are: qaa, lora"):
            get_method("nope")

    def test_every_option_and_rate_is_in_the_help(self) -> None:
        text = re.sub(r"\s+", " ", parser().format_help())
        for method in METHODS.values():
            assert f" {method.name} {method.learning_rate:g} {method.summary}" in text
            for name, value in own_options(method).items():
                *_, place = re.finditer(f" --{name.replace('_', '-')}[ ,]", text)
                about = text[place.start() :][:330]
                assert method.name in about or "..." in about or set(METHODS) == {method.name}, name
                if isinstance(value, int | float) and value and name not in ("rank", "whitened"):
                    assert f"(default: {value:g})" in about, name


def parser() -> Any:
    import argparse

    result = argparse.ArgumentParser(prog="qaa-serve train", add_help=False)
    training_cli.add_arguments(result)
    return result


class TestCommand:
    def run(self, base: Path, data: Path, *more: str) -> int:
        output = str(data.parent / "out")
        arguments = ["--model", str(base), "--data", str(data), "--output", output, "--max-steps", "2", *more]
        return training_cli.main(arguments)

    def test_trains_and_says_what_to_do_next(
        self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data.write_text(data.read_text() + "{\n")
        assert self.run(base, data, "--skip-bad-rows", "--eval-data", str(data), "--threads", "1") == 0
        out, err = capsys.readouterr()
        assert "step 2/2, loss" in err
        assert f"{data}: left out line 9: no JSON" in out
        assert "% of the base) on 8 rows: 2 steps" in out
        assert re.search(r"evaluation loss \d\.\d+ \(before\) -> \d", out)
        assert f"qaa-serve {base} --adapters {data.parent}" in out
        assert "--max-lora-rank" not in out
        load_adapter(data.parent / "out")

    def test_says_if_a_server_has_to_be_told_of_the_rank(
        self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(base, data, "--vectors", "--heads", "4", "--threads", "1", "--accept-worse") == 0
        rank = load_adapter(data.parent / "out").rank
        assert (
            f"its rank is {rank}, and a server takes 32 by default: see --max-lora-rank" in capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model", "/nowhere/base"], "'/nowhere/base': there is no such directory"),
            (["--data", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read: No such file"),
            (["--eval-data", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
            (["--target-modules", "nope"], "no module 'nope'; it has down_proj, gate_proj"),
            (["--target-modules", "embed_tokens"], "embed_tokens', which cannot be adapted"),
            (["--method", "lora", "--target-modules", "lm_head"], "lm_head', which cannot be adapted"),
            (["--method", "lora", "--layers", "2"], "--layers is no option of the method 'lora'"),
            (["--rank", "2"], "--rank is no option of the method 'qaa'"),
            (["--lr", "0"], "--lr must be above 0, found 0.0"),
            (["--theta-lr", "-1"], "--theta-lr must be above 0, found -1.0"),
            (["--alpha", "0"], "--alpha must be above 0, found 0.0"),
            (["--method", "lora", "--alpha", "nan"], "--alpha must be above 0, found nan"),
            (["--method", "lora", "--rank", "0"], "--rank must be above 0, found 0"),
            (["--method", "prefix", "--prefix-tokens", "0"], "--prefix-tokens must be above 0, found 0"),
            (["--max-grad-norm", "nan"], "--max-grad-norm must be at least 0, found nan"),
            (["--output", "."], "output . is the current directory or one above it"),
            (["--output", "../.."], "output ../.. is the current directory or one above it"),
            (["--warmup-ratio", "1"], "--warmup-ratio must be at least 0 and below 1"),
            (["--heads", "0"], "heads: Input should be greater than or equal to 1"),
            (["--max-length", "65"], "--max-length is 65, but the base model takes 64 tokens"),
            (["--max-length", "2"], "leave nothing of the answer"),
        ],
    )
    def test_bad_input_is_one_message_and_status_2(
        self, base: Path, data: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(base, data, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("qaa-serve train: ")
        assert said in err
        assert not (data.parent / "out").exists()

    def test_output_that_exists(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = data.parent / "out"
        output.mkdir()
        (output / "precious.txt").touch()
        assert self.run(base, data) == 2
        assert f"output {output} exists; choose another --output, or replace it" in capsys.readouterr().err
        assert self.run(base, data, "--overwrite") == 2
        assert "is no adapter" in capsys.readouterr().err
        assert (output / "precious.txt").exists()

    def test_model_that_could_not_be_saved_is_not_trained(
        self, base: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """transformers reads a contradictory generation_config.json, and refuses to write it."""
        odd = shutil.copytree(base, data.parent / "odd")
        (odd / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
        assert self.run(odd, data) == 0  # an adapter has none
        shutil.rmtree(data.parent / "out")
        monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("it was trained"))
        assert self.run(odd, data, "--method", "full") == 2
        err = capsys.readouterr().err
        assert f"the generation_config.json of {odd} could not be saved" in err
        assert "temperature" in err

    def test_dry_run_counts_steps_as_training_does(
        self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data.write_text((data.read_text() * 3)[: -7 * len(data.read_text()) // 8])  # 17 rows
        course = ["--batch-size", "4", "--grad-accum", "2", "--epochs", "3"]
        arguments = ["--model", str(base), "--data", str(data), "--output", str(data.parent / "out"), *course]
        assert training_cli.main([*arguments, "--dry-run"]) == 0
        assert "17 rows" in (out := capsys.readouterr().out)
        assert "steps: 9 of 4 x 2 rows" in out
        assert training_cli.main(arguments) == 0
        assert "17 rows: 9 steps" in capsys.readouterr().out

    def test_output_that_cannot_be_made(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(base, data, "--output", str(data / "out")) == 2
        assert f"{data} is not a directory" in capsys.readouterr().err

    def test_base_without_config(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(data.parent, data) == 2
        assert "has no config.json" in capsys.readouterr().err

    def test_interrupt(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("transformers.Trainer.training_step", interrupt)
        assert self.run(base, data) == 130
        assert "interrupted; nothing was written" in capsys.readouterr().err

    def test_missing_extra(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["--model", str(base), "--data", str(data), "--output", str(data.parent / "out")]
        args = training_cli.parse(parser(), given)
        monkeypatch.setitem(sys.modules, "peft", None)
        for name in [name for name in sys.modules if name.startswith("qaa_serve.training.")]:
            monkeypatch.delitem(sys.modules, name)
        assert training_cli.run(args) == 2
        assert 'peft is not installed; training needs the extra: pip install "qaa-serve[train]"' in (
            capsys.readouterr().err
        )

    def test_help_needs_neither_torch_nor_transformers(self) -> None:
        code = (
            "import sys; from qaa_serve.training import cli; "
            "sys.argv[1:] = ['--help']\n"
            "try: cli.main()\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "example:" in done.stdout
        assert done.stdout.endswith("[]\n")
