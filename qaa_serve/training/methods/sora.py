"""SoRA: LoRA with a gate on each rank, of which a proximal step closes those that do not earn their place.

y <- W x + b + alpha / r * B (g * A x), g in R^r. After each step of the optimiser the gates are soft-thresholded,
g <- sign(g) * max(|g| - xi, 0) with xi = (the gates' learning rate) * lambda: the proximal operator of an L1
penalty (Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv:2311.11696, eq. 5 to 7).
Ranks whose gate is zero at the end are cut off, and g is multiplied into B: what is saved is an ordinary LoRA.

AdamW moves a gate by its learning rate at most, and by |m| / sqrt(v) times that when its gradient's sign wavers.
So a gate grows where that ratio is above lambda and fades where it is below, whatever the scale of the loss. How
far gates can get at all depends on the rate and the number of steps; their rate is therefore chosen so that the
steps of a whole training add up to ``TRAVEL``. Gates begin at 1, where the model is the LoRA of the same rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import lora
from qaa_serve.training.methods.base import Method, ParameterGroups, two_groups

_ADAPTER = "default"

#: Number of the gates' parameter group: ``two_groups`` puts what is special second.
_GATES = 1

#: What the learning rates of the gates add up to over a training.
TRAVEL = 4.0

#: Part of the steps over which lambda rises from 0, so that gates are judged after they have learnt something.
RAMP = 0.5


class Gated(nn.Module):
    """LoRA's A with a gate on each of its outputs: x -> g * A x, (..., d_in) -> (..., r)."""

    def __init__(self, down: nn.Linear) -> None:
        super().__init__()
        self.weight = down.weight
        self.gate = nn.Parameter(torch.ones(down.out_features, dtype=down.weight.dtype, device=down.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) -> (..., r)."""
        return linear(x, self.weight) * self.gate


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def _build(model: PreTrainedModel, targets: list[str], options: Mapping[str, Any]) -> PeftModel:
    if not 0 <= options["sparsity"] < 1:
        raise TrainingError(
            f"--sparsity must be at least 0 (no rank is pruned) and below 1, found {options['sparsity']}"
        )
    peft_model = lora.build(model, targets, options)
    for layer in _layers(peft_model).values():
        layer.lora_A[_ADAPTER] = Gated(layer.lora_A[_ADAPTER])
    return peft_model


def _groups(model: nn.Module, learning_rate: float, options: Mapping[str, Any]) -> ParameterGroups:
    return two_groups(model, learning_rate, ".gate", 1.0)  # ProximalStep sets the gates' rate


class ProximalStep(TrainerCallback):  # type: ignore[misc]
    """Soft-thresholds the gates after each step of the optimiser.

    Args:
        sparsity: lambda after the ramp; 0 leaves a LoRA with a trained gate.
    """

    def __init__(self, sparsity: float) -> None:
        self._sparsity = sparsity

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses the gates' peak learning rate by the sum of the schedule's factors over the steps."""
        schedule, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        factor = schedule.lr_lambdas[_GATES]
        total = sum(factor(step) for step in range(state.max_steps))
        peak = TRAVEL / total if total else 0.0
        schedule.base_lrs[_GATES] = peak
        optimizer.param_groups[_GATES]["lr"] = peak * factor(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The proximal step."""
        group = kwargs["optimizer"].param_groups[_GATES]
        rise = min(1.0, (state.global_step + 1) / max(1.0, RAMP * state.max_steps))
        threshold = group["lr"] * self._sparsity * rise
        with torch.no_grad():
            for gate in group["params"]:
                gate.copy_(torch.nn.functional.softshrink(gate, threshold))


def _save(model: PeftModel, directory: Path, base: str) -> None:
    """As a LoRA adapter of the surviving ranks, scale and gates multiplied into B.

    A layer that lost every rank keeps one of zeros: readers expect tensors for each target module.
    """
    config = model.peft_config[_ADAPTER]
    ranks: dict[str, int] = {}
    for name, layer in _layers(model).items():
        gated, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        keep = gated.gate.detach() != 0
        if not keep.any():
            keep[0] = True
        ranks[name] = int(keep.sum())
        down = nn.Linear(layer.in_features, ranks[name], bias=False)
        down.weight = nn.Parameter(gated.weight.detach()[keep], requires_grad=False)
        scaled = up.weight.detach()[:, keep] * (gated.gate.detach()[keep] * layer.scaling[_ADAPTER])
        up.weight = nn.Parameter(scaled, requires_grad=False)
        layer.lora_A[_ADAPTER] = down
        layer.scaling[_ADAPTER] = 1.0
    # alpha / r = 1 for every layer, for readers that know the patterns and for those that do not.
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    lora.save(model, directory, base)


METHOD = Method(
    name="sora",
    learning_rate=1e-3,
    options={"rank": 8, "alpha": 16.0, "sparsity": 0.5},
    build=_build,
    groups=_groups,
    save=_save,
    callbacks=lambda options: [ProximalStep(options["sparsity"])],
)
