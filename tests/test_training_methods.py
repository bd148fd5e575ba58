"""The methods beside QAA: what they train, what they leave on disk, and that it is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training_data import tokenizer
from training_support import ROWS, options
from transformers import AutoModelForCausalLM

from qaa_serve.training import TrainingError, train
from qaa_serve.training.loop import _fit
from qaa_serve.training.methods import COMPARED
from qaa_serve.training.prepare import prepare
from qaa_serve.training.trained import load_trained


def loss_of(model: torch.nn.Module) -> float:
    """Mean loss over the answers' tokens of ROWS."""
    total, tokens = 0.0, 0
    for row in ROWS:
        ids = tokenizer().apply_chat_template(row["messages"], return_dict=False)
        labels = torch.tensor([[-100] * 3 + ids[3:-1] + [-100]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[:, :-1]
        kept = labels[0, 1:] >= 0
        total += torch.nn.functional.cross_entropy(logits[0, kept], labels[0, 1:][kept], reduction="sum").item()
        tokens += int(kept.sum())
    return total / tokens


@pytest.mark.parametrize("method", COMPARED)
def test_what_is_saved_is_what_was_trained(base: Path, data: Path, method: str) -> None:
    result = train(options(base, data, method=method, max_steps=12, eval_data=data))
    assert result.train_loss < result.first_loss
    model, _ = load_trained(result.output)
    assert loss_of(model) == pytest.approx(result.eval_loss, abs=1e-4)
    assert result.eval_loss < result.base_eval_loss


@pytest.mark.parametrize("method", COMPARED)
def test_record(base: Path, data: Path, method: str) -> None:
    result = train(options(base, data, method=method, max_steps=5, eval_data=data, eval_steps=2))
    record = json.loads((result.output / "training.json").read_text())
    assert (record["format"], record["method"], record["steps"]) == (1, method, 5)
    assert len(record["losses"]) == 5
    assert [step for step, _ in record["evaluations"]] == [0, 2, 4, 5]
    best = min(record["evaluations"][1:], key=lambda pair: pair[1])
    assert (record["best_step"], record["eval_loss"]) == tuple(best)
    assert record["options"]["lr"] == 3e-2
    assert record["options"]["seed"] == 0
    assert record["data"]["rows"] == len(ROWS)
    assert record["adapter_bytes"] >= 4 * result.trainable * (method != "sora")
    memory = record["memory"]
    assert 0 < memory["base_rss_bytes"] <= memory["peak_rss_bytes"]
    assert memory["saved_for_backward_bytes"] > 0
    assert memory["peak_cuda_bytes"] is None or torch.cuda.is_available()
    assert record["seconds_per_step"] > 0


def gates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gates of SoRA by the name of their layer."""
    return {
        name.removesuffix(".lora_A.default.lora_gate").removeprefix(
            "base_model.model."
        ): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith(".lora_gate")
    }


class TestSoRA:
    def trained(self, base: Path, data: Path, xi: float, **changed: Any) -> Any:
        run = prepare(options(base, data, method="sora", method_options={"xi": xi, "rank": 6}, **changed))
        self.before = gates(run.model)
        _fit(run, data.parent / f"checkpoints-{xi}", None)
        return run

    def test_a_step_takes_xi_off_every_gate(self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With no rate, gates move by the proximal step alone, the same in each step, and stay at 0."""
        run = self.trained(base, data, 0.2, max_steps=3, lr=1e-30)
        for name, gate in gates(run.model).items():
            before = self.before[name]
            expected = before.sign() * (before.abs() - 3 * 0.2).clamp(min=0)
            assert torch.allclose(gate, expected, atol=1e-6)

    def test_prunes_more_the_larger_xi(self, base: Path, data: Path) -> None:
        counts = [
            sum(int((gate != 0).sum()) for gate in gates(self.trained(base, data, xi, max_steps=8).model).values())
            for xi in (0.0, 0.03, 0.1)
        ]
        assert counts[0] == 8 * 6
        assert counts[0] > counts[1] > counts[2]

    def test_export_is_an_ordinary_lora_of_the_surviving_ranks(self, base: Path, data: Path) -> None:
        run = self.trained(base, data, 0.1, max_steps=8)
        ids = torch.randint(3, 90, (2, 9))
        with torch.no_grad():
            trained = run.model(input_ids=ids).logits
        alive = {name: max(1, int((gate != 0).sum())) for name, gate in gates(run.model).items()}
        assert len(set(alive.values())) > 1, "the ranks should differ for this test"
        directory = data.parent / "exported"
        directory.mkdir()
        run.method.save(run.model, directory, str(base))
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"] == max(alive.values())
        tensors = load_file(directory / "adapter_model.safetensors")
        assert len(tensors) == 2 * len(alive)
        for name, rank in alive.items():
            assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
            assert tensors[f"base_model.model.{name}.lora_B.weight"].shape[1] == rank
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
        with torch.no_grad():
            assert torch.allclose(loaded(input_ids=ids).logits, trained, atol=1e-5)

    def test_xi_out_of_range(self, base: Path, data: Path) -> None:
        with pytest.raises(TrainingError, match=r"--xi must be at least 0, found -0\.1"):
            train(options(base, data, method="sora", method_options={"xi": -0.1}))


class TestPrefix:
    def test_counts_keys_and_values_of_each_layer(self, base: Path, data: Path) -> None:
        result = train(options(base, data, method="prefix", method_options={"prefix_tokens": 5}, max_steps=1))
        assert result.trainable == 2 * 2 * 5 * 8  # keys and values, layers, tokens, width of one head
        assert result.target_modules == ()

    def test_says_that_it_cannot_be_served(self, base: Path, data: Path) -> None:
        card = (train(options(base, data, method="prefix", max_steps=1)).output / "README.md").read_text()
        assert "PeftModel.from_pretrained" in card
        assert "do not serve this kind of adapter" in card

    @pytest.mark.parametrize(
        "given", [{"packing": True}, {"gradient_checkpointing": True}, {"target_modules": ("q_proj",)}]
    )
    def test_refuses_what_does_not_go_together(self, base: Path, data: Path, given: dict[str, Any]) -> None:
        with pytest.raises(TrainingError, match="is not possible with --method prefix: "):
            train(options(base, data, method="prefix", **given))


class TestFull:
    def test_is_a_model_that_can_be_a_base(self, base: Path, data: Path) -> None:
        result = train(options(base, data, method="full", lr=1e-3, max_steps=3, bf16=True))
        assert result.trainable == result.total
        assert not (result.output / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(result.output)
        assert model.config.use_cache
        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        assert all((tensor != before[name]).any() for name, tensor in model.state_dict().items())
        again = train(options(result.output, data, output=data.parent / "adapters" / "on-it", max_steps=1))
        assert again.first_loss == pytest.approx(loss_of(model), rel=0.05)

    def test_decay_spares_norms(self, base: Path, data: Path) -> None:
        run = prepare(options(base, data, method="full", weight_decay=0.5))
        decayed, spared = run.method.groups(run.model, 1e-3)
        assert all(p.ndim == 2 for p in decayed["params"])
        assert "weight_decay" not in decayed
        assert spared["weight_decay"] == 0.0
        assert len(spared["params"]) == 2 * 2 + 1


def test_angles_are_not_decayed(base: Path, data: Path) -> None:
    run = prepare(options(base, data, weight_decay=0.5))
    groups = run.method.groups(run.model, 1e-3)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    assert {p.shape for p in groups[1]["params"]} == {(5, 4)}
    run = prepare(options(base, data, output=data.parent / "v", method_options={"vectors": True}))
    angles, vectors = run.method.groups(run.model, 1e-3)
    assert (angles["lr"], angles["weight_decay"], vectors["lr"], vectors["weight_decay"]) == (1e-3, 0, 5e-3, 0)
    assert {p.ndim for p in vectors["params"]} == {1}


class TestPacking:
    def test_changes_no_loss(self, base: Path, data: Path) -> None:
        """Rows in one line neither see each other nor shift a position: the same loss before any training."""
        run = prepare(options(base, data, packing=True))
        assert len(run.rows) < run.rows.source_rows == len(ROWS)
        plain = train(options(base, data, max_steps=1, eval_data=data))
        packed = train(options(base, data, max_steps=1, eval_data=data, packing=True, overwrite=True))
        assert packed.base_eval_loss == pytest.approx(plain.base_eval_loss, abs=1e-5)
        assert packed.rows == len(ROWS)

    def test_base_that_cannot_keep_rows_apart_is_refused(
        self,
        base: Path,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
        with pytest.raises(TrainingError, match="does not keep packed rows apart"):
            train(options(base, data, packing=True))
