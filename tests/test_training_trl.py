"""QAA inside other people's training loops: TRL's trainers and transformers' own take its config as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_training_methods import loss_of
from training_support import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from qaa_serve.adapters import load_adapter
from qaa_serve.training import QAAConfig
from qaa_serve.training.trained import load_trained

#: Every trainer's.
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "learning_rate": 3e-2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def served_as_trained(trainer: Any, directory: Path, base: Path) -> None:
    """What the trainer saves is an adapter that the server reads, and says what the trained model says."""
    trainer.save_model(str(directory))
    load_adapter(directory)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        trained = trainer.model.eval()(input_ids=ids).logits
        loaded = load_trained(directory, str(base))[0](input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert torch.allclose(loaded, trained, atol=1e-5)
    assert not torch.allclose(plain, trained, atol=1e-3)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in ROWS]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), QAAConfig(task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "run"), **SHORT),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    served_as_trained(trainer, tmp_path / "adapter", base)


class TestTRL:
    trl = None

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        self.trl = pytest.importorskip("trl", reason="trl is not installed")

    def test_sft(self, base: Path, tmp_path: Path) -> None:
        from datasets import Dataset

        trainer = self.trl.SFTTrainer(
            model=str(base),
            args=self.trl.SFTConfig(str(tmp_path / "run"), max_length=32, bf16=False, **SHORT),
            train_dataset=Dataset.from_list(ROWS),
            peft_config=QAAConfig(task_type="CAUSAL_LM", layers=1),
        )
        before = loss_of(trainer.model.eval())
        trainer.train()
        assert loss_of(trainer.model.eval()) < before
        served_as_trained(trainer, tmp_path / "adapter", base)

    def test_dpo(self, base: Path, tmp_path: Path) -> None:
        from datasets import Dataset

        pairs = [{"prompt": c, "chosen": f"arr {c}", "rejected": f"{c} {c}"} for c in "abcdefgh"]
        trainer = self.trl.DPOTrainer(
            model=str(base),
            args=self.trl.DPOConfig(str(tmp_path / "run"), max_length=32, bf16=False, **SHORT),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=QAAConfig(task_type="CAUSAL_LM", layers=1),
        )
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
        served_as_trained(trainer, tmp_path / "adapter", base)
