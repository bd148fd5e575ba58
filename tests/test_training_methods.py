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
from qaa_serve.training.loop import _fit, _prepare
from qaa_serve.training.methods import METHODS
from qaa_serve.training.methods.sora import TRAVEL, Gated
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


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_trained(base: Path, data: Path, method: str) -> None:
    result = train(options(base, data, method=method, max_steps=12, eval_data=data))
    assert result.train_loss < result.first_loss
    model, _ = load_trained(result.output)
    assert loss_of(model) == pytest.approx(result.eval_loss, abs=1e-4)
    assert result.eval_loss < result.base_eval_loss


@pytest.mark.parametrize("method", METHODS)
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


class TestSoRA:
    def gates(self, base: Path, data: Path, **changed: Any) -> list[torch.Tensor]:
        run = _prepare(options(base, data, method="sora", **changed))
        _fit(run, data.parent / f"checkpoints-{run.method_options['sparsity']}", None)
        return [m.gate.detach() for m in run.model.modules() if isinstance(m, Gated)]

    def test_without_sparsity_and_gates_it_is_lora(self, base: Path, data: Path) -> None:
        """At the first step gates are 1, so that loss and gradients are LoRA's."""
        results = {
            name: train(options(base, data, method=name, max_steps=1, output=data.parent / name)).losses
            for name in ("lora", "sora")
        }
        assert results["sora"] == results["lora"]

    def test_threshold_follows_the_formula(self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With gradients of zero gates only fade: by the sum of lr * lambda over the steps, and never below 0."""
        monkeypatch.setattr(Gated, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
        rate = {"schedule": "constant", "warmup_ratio": 0.0, "max_steps": 8}
        rises = [min(1.0, (step + 1) / 4) for step in range(8)]
        for sparsity in (0.25, 0.9):
            gates = self.gates(base, data, method_options={"sparsity": sparsity}, **rate)
            expected = max(0.0, 1 - sum(TRAVEL / 8 * sparsity * rise for rise in rises))
            assert all(torch.allclose(gate, torch.full_like(gate, expected), atol=1e-6) for gate in gates)

    def test_prunes_more_the_sparser(self, base: Path, data: Path) -> None:
        def open_gates(sparsity: float) -> int:
            gates = self.gates(base, data, max_steps=30, method_options={"sparsity": sparsity})
            return sum(int((gate != 0).sum()) for gate in gates)

        none, some, most = map(open_gates, (0.0, 0.5, 0.95))
        assert none == 8 * 8
        assert none > some > most

    def test_export_is_an_ordinary_lora_of_the_surviving_ranks(self, base: Path, data: Path) -> None:
        given = {"rank": 6, "sparsity": 0.7}
        run = _prepare(options(base, data, method="sora", method_options=given, max_steps=30))
        _fit(run, data.parent / "checkpoints", None)
        ids = torch.randint(3, 90, (2, 9))
        with torch.no_grad():
            trained = run.model(input_ids=ids).logits
        alive = {
            name.removesuffix(".lora_A.default"): max(1, int((m.gate != 0).sum()))
            for name, m in run.model.get_base_model().named_modules()
            if isinstance(m, Gated)
        }
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

    @pytest.mark.parametrize("sparsity", [-0.1, 1.0])
    def test_sparsity_out_of_range(self, base: Path, data: Path, sparsity: float) -> None:
        with pytest.raises(TrainingError, match="--sparsity must be at least 0"):
            train(options(base, data, method="sora", method_options={"sparsity": sparsity}))


class TestPrefix:
    def test_counts_keys_and_values_of_each_layer(self, base: Path, data: Path) -> None:
        result = train(options(base, data, method="prefix", method_options={"prefix_tokens": 5}, max_steps=1))
        assert result.trainable == 2 * 2 * 5 * 8  # keys and values, layers, tokens, width of one head
        assert result.target_modules == ()

    def test_says_that_it_cannot_be_served(self, base: Path, data: Path) -> None:
        card = (train(options(base, data, method="prefix", max_steps=1)).output / "README.md").read_text()
        assert "PeftModel.from_pretrained" in card
        assert "do not serve prefix tuning" in card

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
        run = _prepare(options(base, data, method="full", weight_decay=0.5))
        decayed, spared = run.method.groups(run.model, 1e-3, {})
        assert all(p.ndim == 2 for p in decayed["params"])
        assert "weight_decay" not in decayed
        assert spared["weight_decay"] == 0.0
        assert len(spared["params"]) == 2 * 2 + 1


def test_angles_are_not_decayed(base: Path, data: Path) -> None:
    run = _prepare(options(base, data, weight_decay=0.5))
    groups = run.method.groups(run.model, 1e-3, run.method_options)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    assert {p.shape for p in groups[1]["params"]} == {(5, 4)}


class TestPacking:
    def test_changes_no_loss(self, base: Path, data: Path) -> None:
        """Rows in one line neither see each other nor shift a position: the same loss before any training."""
        run = _prepare(options(base, data, packing=True))
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
