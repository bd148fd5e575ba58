"""What a method is, and the table of them. Nothing heavy is imported before a method is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qaa_serve.training.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, TrainerCallback

#: name -> (module, one line for --help)
METHODS = {
    "qaa": ("qaa_serve.training.methods.qaa", "a quantum circuit and a linear map back"),
    "lora": ("qaa_serve.training.methods.lora", "two low-rank matrices"),
    "sora": ("qaa_serve.training.methods.sora", "LoRA that prunes the ranks it does not need"),
    "prefix": ("qaa_serve.training.methods.prefix", "keys and values before each layer's own"),
    "full": ("qaa_serve.training.methods.full", "every weight of the base"),
}

#: Parameters with the learning rate of each, as torch's optimisers take them. A group that says nothing about
#: ``weight_decay`` gets the run's.
ParameterGroups: TypeAlias = list[dict[str, Any]]

_SERVED = 'serve it with: qaa-serve {model} --adapters {parent}\nand ask for "model": "{name}"'


def _no_callbacks(options: Mapping[str, Any]) -> list[TrainerCallback]:
    return []


def _nothing_to_prepare(device: torch.device) -> None:
    pass


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as given to --method.
        learning_rate: the default.
        options: the options it takes besides those all methods share, with their defaults.
        build: (base model, target modules, options) -> the model to train, only its own part trainable.
        groups: (model, learning rate, options) -> the trainable parameters by learning rate.
        save: (model, empty directory, base): writes what was trained; an adapter's config is to name that base.
        callbacks: (options) -> what else happens during the training.
        prepare: (device) -> None: what takes its time once, before the first step.
        refuses: option that all methods share -> why this one cannot do with it.
        trains_base: the base's own weights are trained, so that the result is a model and no adapter.
        usage: what to do with the result; may name ``{model}``, ``{output}``, ``{parent}`` and ``{name}``.
    """

    name: str
    learning_rate: float
    options: Mapping[str, Any]
    build: Callable[[PreTrainedModel, list[str], Mapping[str, Any]], nn.Module]
    groups: Callable[[nn.Module, float, Mapping[str, Any]], ParameterGroups]
    save: Callable[[Any, Path, str], None]
    callbacks: Callable[[Mapping[str, Any]], list[TrainerCallback]] = _no_callbacks
    prepare: Callable[[torch.device], None] = _nothing_to_prepare
    refuses: Mapping[str, str] = field(default_factory=dict)
    trains_base: bool = False
    usage: str = _SERVED

    def with_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to use: those given over the defaults.

        Raises:
            TrainingError: for an option this method does not have.
        """
        for name in given:
            if name not in self.options:
                own = ", ".join(f"--{option.replace('_', '-')}" for option in self.options) or "none of its own"
                raise TrainingError(
                    f"--{name.replace('_', '-')} is no option of the method {self.name!r}, which has {own}"
                )
        return {**self.options, **given}

    def check(self, options: object) -> None:
        """Refuse what this method cannot do with.

        Raises:
            TrainingError: names the option and the reason.
        """
        for name, reason in self.refuses.items():
            if getattr(options, name):
                raise TrainingError(
                    f"--{name.replace('_', '-')} is not possible with --method {self.name}: {reason}"
                )


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


def two_groups(
    model: nn.Module, learning_rate: float, special: str, special_rate: float | None
) -> ParameterGroups:
    """The trainable parameters, those with ``special`` in their name at a rate of their own and never decayed."""
    apart: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (apart if special in name else others).append(parameter)
    rate = learning_rate if special_rate is None else special_rate
    return [{"params": others, "lr": learning_rate}, {"params": apart, "lr": rate, "weight_decay": 0.0}]
