"""Full fine-tuning: every weight of the base is trained, and the result is a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qaa_serve.training.methods.base import Method, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Full(Method):
    """Trains the base itself."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every weight of the base"
    learning_rate: ClassVar[float] = 5e-5
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform"), "it trains the whole base"),
        "load_in_4bit": "weights of 4 bits cannot be trained",
    }
    trains_base: ClassVar[bool] = True
    usage: ClassVar[str] = "serve it as a base of its own: qaa-serve {output}"

    def build(self, base: PreTrainedModel, setting: Setting) -> PreTrainedModel:
        """The base as it is."""
        return base

    def save(self, model: PreTrainedModel, directory: Path, base: str) -> None:
        """Write the model."""
        model.save_pretrained(directory)
