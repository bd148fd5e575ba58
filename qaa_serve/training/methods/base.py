"""What a method is: a dataclass whose fields are its own options. Nothing heavy is imported before it builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import check_ranges, flag

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

#: Parameters with the learning rate of each, as torch's optimisers take them. A group that says nothing about
#: ``weight_decay`` gets the run's.
ParameterGroups: TypeAlias = list[dict[str, Any]]

#: Heading of the methods' own options in ``--help``.
GROUP = "the adapter"

SERVED = 'serve it with: qaa-serve {model} --adapters {parent}\nand ask for "model": "{name}"'
FROM_PYTHON = (
    "use it from Python: PeftModel.from_pretrained(base, {output!r})\n"
    "(vLLM and qaa-serve do not serve this kind of adapter)"
)


@dataclass(frozen=True)
class Setting:
    """What a model is built for.

    Attributes:
        targets: names of the layers to adapt; empty: the method adapts none.
        tokenizer: the base's; None where only sizes are asked for.
        steps: optimiser steps of the training.
    """

    targets: list[str] = field(default_factory=list)
    tokenizer: PreTrainedTokenizerBase | None = None
    steps: int = 1


@dataclass
class Method:
    """One way to train. The fields of a subclass are the options that it takes besides those all methods share.

    Attributes:
        name: as given to --method.
        summary: one line for --help.
        learning_rate: the default.
        refuses: option that all methods share -> why this one cannot do with it.
        trains_base: the base's own weights are trained, so that the result is a model and no adapter.
        usage: what to do with the result; may name ``{model}``, ``{output}``, ``{parent}`` and ``{name}``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    learning_rate: ClassVar[float]
    refuses: ClassVar[Mapping[str, str]] = {}
    trains_base: ClassVar[bool] = False
    usage: ClassVar[str] = SERVED

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def adapts_layers(self) -> bool:
        """Whether layers of the base are to be chosen for it."""
        return "target_modules" not in self.refuses

    def build(self, base: PreTrainedModel, setting: Setting) -> nn.Module:
        """The model to train, only the method's own part of it trainable.

        Raises:
            TrainingError: if the base cannot be adapted so.
        """
        raise NotImplementedError

    def own_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Parts of parameters' names, and the learning rate of what is called so, which is never decayed.

        Args:
            learning_rate: of all others.
        """
        return {}

    def groups(self, model: nn.Module, learning_rate: float) -> ParameterGroups:
        """The trainable parameters by learning rate; what has no direction to keep short is not decayed."""
        rates = {"matrices": learning_rate, "plain": learning_rate, **self.own_rates(learning_rate)}
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = next((part for part in self.own_rates(learning_rate) if part in name), None)
                groups[own or ("plain" if parameter.ndim < 2 else "matrices")].append(parameter)
        return [
            {"params": groups[kind], "lr": rate, **({} if kind == "matrices" else {"weight_decay": 0.0})}
            for kind, rate in rates.items()
            if groups[kind]
        ]

    def save(self, model: Any, directory: Path, base: str) -> None:
        """Write what was trained to an empty directory; an adapter's config is to name that base."""
        raise NotImplementedError

    def callbacks(self) -> list[TrainerCallback]:
        """What else happens during the training."""
        return []

    def prepare(self, model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """What takes its time once, before the first step.

        Args:
            model: as ``build`` made it, where it is trained.
            batches: some of the rows it is trained on, one each, as it is called with them.
        """


def own_options(method: type[Method]) -> dict[str, Any]:
    """A method's own options with their defaults."""
    return {field.name: field.default for field in fields(method)}


def configured(method: type[Method], given: Mapping[str, Any]) -> Method:
    """A method with the options given over its defaults.

    Raises:
        TrainingError: for an option this method does not have, or a value out of range.
    """
    own = own_options(method)
    for name in given:
        if name not in own:
            listed = ", ".join(map(flag, own)) or "none of its own"
            raise TrainingError(f"{flag(name)} is no option of the method {method.name!r}, which has {listed}")
    return method(**given)


def check_shared(method: Method, options: object) -> None:
    """Refuse what a method cannot do with.

    Raises:
        TrainingError: names the option and the reason.
    """
    for name, reason in method.refuses.items():
        if getattr(options, name):
            raise TrainingError(f"{flag(name)} is not possible with --method {method.name}: {reason}")
