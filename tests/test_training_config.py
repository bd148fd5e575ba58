"""Options from a file, and the dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_support import ROWS, options, weights

from qaa_serve.training import cli, train


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "model: {base}\ndata: {data}\nmax_steps: 3\nlr: 3e-2\ntarget-modules: [q_proj]\nheads: 2\n"),
        ("run.toml", 'model = "{base}"\ndata = "{data}"\nmax_steps = 3\nlr = 3e-2\ntarget_modules = ["q_proj"]\n'
         "heads = 2"),
        ("run.json", '{{"model": "{base}", "data": "{data}", "max_steps": 3, "lr": 0.03, "heads": 2,'
         '"target_modules": "q_proj"}}'),
    ],
)  # fmt: skip
def test_file_is_the_command_line(base: Path, data: Path, name: str, text: str) -> None:
    config = data.parent / name
    config.write_text(text.format(base=base, data=data))
    given = {"batch_size": 4, "max_steps": 3, "target_modules": ("q_proj",), "method_options": {"heads": 2}}
    expected = train(options(base, data, output=data.parent / "expected", **given)).output
    assert run("--config", config, "--output", data.parent / "out", "--batch-size", 4) == 0
    assert weights(data.parent / "out") == weights(expected)


def test_command_line_goes_before_the_file(base: Path, data: Path) -> None:
    config = data.parent / "run.yaml"
    config.write_text(f"model: {base}\ndata: {data}\noutput: {data.parent / 'no'}\nmax_steps: 3\nbf16: true\n")
    assert run("--config", config, "--max-steps", 2, "--output", data.parent / "out") == 0
    record = json.loads((data.parent / "out" / "training.json").read_text())
    assert record["steps"] == 2
    assert record["options"]["bf16"] is True
    assert not (data.parent / "no").exists()


@pytest.mark.parametrize("method", ["qaa", "sora", "full"])
def test_record_is_a_config_that_repeats_the_training(base: Path, data: Path, method: str) -> None:
    first = train(options(base, data, method=method, eval_data=data, weight_decay=0.1, seed=7)).output
    assert run("--config", first / "training.json", "--output", data.parent / "again") == 0
    assert weights(data.parent / "again") == weights(first)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", "epoch: 3", "unknown option 'epoch'; known are: accept_worse, alpha, "),
        ("run.yaml", "epochs: many", "--epochs: invalid float value: 'many'"),
        ("run.yaml", "epochs: [1, 2]", "epochs takes one value, found [1, 2]"),
        ("run.yaml", "bf16: 1", "bf16 must be true or false, found 1"),
        ("run.yaml", "method: qlora", "--method: invalid choice: 'qlora' (choose from"),
        ("run.yaml", "a: [", "cannot be read: while parsing"),
        ("run.yaml", "- a", "holds list; a table of options is needed"),
        ("run.toml", "a =", "cannot be read: "),
        ("run.json", "{", "cannot be read: "),
        ("run.ini", "a = 1", "its name ends in '.ini'; .yaml, .yml, .toml and .json are read"),
        ("run.yaml", None, "cannot be read: No such file"),
    ],
)
def test_bad_file_is_one_message(
    tmp_path: Path, name: str, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / name
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        run("--config", config)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("qaa-serve train: --config ")
    assert said in error


class TestDryRun:
    @pytest.mark.parametrize("method", ["qaa", "prefix", "full"])
    def test_says_what_training_would_do(
        self, base: Path, data: Path, method: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("--model", base, "--data", data, "--method", method, "--epochs", 3, "--batch-size", 3)
        before = sorted(data.parent.iterdir())
        assert run(*arguments, "--output", data.parent / "out", "--dry-run") == 0
        out = capsys.readouterr().out
        assert sorted(data.parent.iterdir()) == before
        result = train(options(base, data, method=method, max_steps=None, epochs=3.0, batch_size=3, lr=1e-4))
        assert f"trained parameters: {result.trainable:,} (" in out
        assert f"steps: {result.steps} of 3 x 1 rows" in out
        assert f"{len(ROWS)} rows, 80 tokens, of which the loss is on 48" in out
        assert "<u>a<a>[[arra<e>]]<n>" in out.replace(" ", "")  # the tests' tokenizer puts spaces
        assert "memory: " in out

    def test_memory_is_what_the_step_keeps(self, base: Path, data: Path) -> None:
        """The estimate's activations are those of the longest batch; here all batches are alike."""
        from qaa_serve.training.dry_run import memory
        from qaa_serve.training.prepare import prepare

        for method in ("qaa", "lora", "prefix"):
            result = train(options(base, data, method=method, overwrite=True))
            estimated = memory(prepare(options(base, data, method=method, overwrite=True)))
            kept = estimated["activations kept for the backward pass"]
            assert kept == pytest.approx(result.memory["saved_for_backward_bytes"], rel=0.02)

    def test_counts_packed_rows(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--model", base, "--data", data, "--packing", "--max-length", 30, "--batch-size", 2)
        assert run(*arguments, "--output", data.parent / "out", "--epochs", 1, "--dry-run") == 0
        out = capsys.readouterr().out
        assert "8 rows packed into 3, 80 tokens" in out
        assert "steps: 2 of 2 x 1 rows" in out

    def test_bad_input_is_found(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data.write_text("{")
        assert run("--model", base, "--data", data, "--output", data.parent / "out", "--dry-run") == 2
        assert "line 1: no JSON" in capsys.readouterr().err
