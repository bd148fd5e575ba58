"""LoRA, as PEFT has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qaa_serve.adapters import CONFIG_FILE
from qaa_serve.training.methods.base import Method, one_group


def build(model: PreTrainedModel, targets: list[str], options: Mapping[str, Any]) -> PeftModel:
    """The base with LoRA layers."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=options["rank"],
        lora_alpha=options["alpha"],
        # GPT-2's linear layers store their weights transposed; no model mixes the two kinds.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def save(model: PeftModel, directory: Path, base: str) -> None:
    """Write a PEFT model's adapter, with a config whose bytes do not depend on the order of a set."""
    model.save_pretrained(directory)
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if config.get("target_modules"):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


METHOD = Method(
    name="lora",
    learning_rate=1e-3,
    options={"rank": 8, "alpha": 16.0},
    build=build,
    groups=one_group,
    save=save,
)
