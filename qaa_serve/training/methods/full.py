"""Full fine-tuning: every weight of the base is trained, and the result is a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qaa_serve.training.methods.base import Method, ParameterGroups


def _build(model: PreTrainedModel, targets: list[str], options: Mapping[str, Any]) -> PreTrainedModel:
    return model


def _groups(model: nn.Module, learning_rate: float, options: Mapping[str, Any]) -> ParameterGroups:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Biases and the gains of norms have no direction that decay could keep short.
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": learning_rate},
        {"params": [p for p in parameters if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]


def _save(model: PreTrainedModel, directory: Path, base: str) -> None:
    model.save_pretrained(directory)


METHOD = Method(
    name="full",
    learning_rate=5e-5,
    options={},
    build=_build,
    groups=_groups,
    save=_save,
    refuses={"target_modules": "it trains the whole base"},
    trains_base=True,
    usage="serve it as a base of its own: qaa-serve {output}",
)
