"""What a method is, and the table of them. Nothing heavy is imported before a method is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qaa_serve.training.errors import TrainingError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

#: name -> (module, one line for --help)
METHODS = {
    "qaa": ("qaa_serve.training.methods.qaa", "a quantum circuit and a linear map back"),
    "lora": ("qaa_serve.training.methods.lora", "two low-rank matrices"),
}

#: Parameters with the learning rate of each, as torch's optimisers take them.
ParameterGroups: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One way to train an adapter.

    Attributes:
        name: as given to --method.
        learning_rate: the default.
        options: the options it takes besides those all methods share, with their defaults.
        build: (base model, target modules, options) -> the model to train, only the adapter trainable.
        groups: (model, learning rate, options) -> the trainable parameters by learning rate.
        save: (model, empty directory, base): writes the adapter, whose config is to name that base.
    """

    name: str
    learning_rate: float
    options: Mapping[str, Any]
    build: Callable[[PreTrainedModel, list[str], Mapping[str, Any]], PeftModel]
    groups: Callable[[nn.Module, float, Mapping[str, Any]], ParameterGroups]
    save: Callable[[PeftModel, Path, str], None]

    def with_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to use: those given over the defaults.

        Raises:
            TrainingError: for an option this method does not have.
        """
        for name in given:
            if name not in self.options:
                raise TrainingError(
                    f"--{name.replace('_', '-')} is no option of the method {self.name!r}, which has "
                    + ", ".join(f"--{option.replace('_', '-')}" for option in self.options)
                )
        return {**self.options, **given}


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
        TrainingError: for an unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise TrainingError(f"unknown method {name!r}; known are: {', '.join(METHODS)}")
    method: Method = import_module(METHODS[name][0]).METHOD
    return method


def one_group(model: nn.Module, learning_rate: float, options: Mapping[str, Any]) -> ParameterGroups:
    """All trainable parameters at one learning rate."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}]
