"""SoRA: LoRA with a gate on each rank, of which a proximal step closes those that do not earn their place.

y <- W x + b + alpha / r * B (g * A x), g in R^r, drawn from a normal distribution at the start. After each step of
the optimiser the gates are soft-thresholded, g <- sign(g) * max(|g| - xi, 0), the proximal operator of an L1 norm
(Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv:2311.11696, eq. 5 to 7). xi is the
same in every step and the gates have the learning rate of all, as in the authors' code. Ranks whose gate is zero
at the end are cut off, and g is multiplied into B: what is saved is an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qaa_serve.training.fields import option
from qaa_serve.training.methods.base import GROUP, Setting
from qaa_serve.training.methods.peft import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel, TrainerCallback

_ADAPTER = "default"


@dataclass
class Sora(Lora):
    """LoRA with gates."""

    name: ClassVar[str] = "sora"
    summary: ClassVar[str] = "LoRA that prunes the ranks it does not need"
    config: ClassVar[Mapping[str, Any]] = {"peft_type": "LORA"}

    xi: float = option(3e-4, "what a step takes off each rank's gate, as the paper has it", group=GROUP, least=0)

    def build(self, base: PreTrainedModel, setting: Setting) -> PeftModel:
        """A LoRA model whose A has gates behind it."""
        import torch
        from torch import nn

        model = super().build(base, setting)
        for layer in _layers(model).values():
            down = layer.lora_A[_ADAPTER]
            down.register_parameter("lora_gate", nn.Parameter(torch.randn_like(down.weight[:, 0])))
            down.register_forward_hook(lambda module, inputs, output: output * module.lora_gate)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The proximal step after each of the optimiser's."""
        import torch
        from transformers import TrainerCallback

        class ProximalStep(TrainerCallback):  # type: ignore[misc]
            def on_optimizer_step(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: N805
                with torch.no_grad():
                    for name, gate in kwargs["model"].named_parameters():
                        if ".lora_gate" in name:
                            gate.copy_(torch.nn.functional.softshrink(gate, self.xi))

        return [*super().callbacks(), ProximalStep()]

    def save(self, model: PeftModel, directory: Path, base: str) -> None:
        """As a LoRA adapter of the surviving ranks, scale and gates multiplied into B.

        A layer that lost every rank keeps one of zeros: readers expect tensors for each target module.
        """
        from torch import nn

        config = model.peft_config[_ADAPTER]
        ranks: dict[str, int] = {}
        for name, layer in _layers(model).items():
            gated, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
            gate = gated.lora_gate.detach()
            keep = gate != 0
            if not keep.any():
                keep[0] = True
            ranks[name] = int(keep.sum())
            down = nn.Linear(layer.in_features, ranks[name], bias=False)
            down.weight = nn.Parameter(gated.weight.detach()[keep], requires_grad=False)
            scaled = up.weight.detach()[:, keep] * (gate[keep] * layer.scaling[_ADAPTER])
            up.weight = nn.Parameter(scaled, requires_grad=False)
            layer.lora_A[_ADAPTER] = down
            layer.scaling[_ADAPTER] = 1.0
        # alpha / r = 1 for every layer, for readers that know the patterns and for those that do not.
        config.r = config.lora_alpha = max(ranks.values())
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        super().save(model, directory, base)


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)
    }
