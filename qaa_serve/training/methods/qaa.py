"""QAA: angles of a circuit and the linear map B behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qaa_serve.training.circuit_options import CircuitOptions
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import option
from qaa_serve.training.methods.base import GROUP, Method, Setting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_ADAPTER = "default"


@dataclass
class QAA(CircuitOptions, Method):
    """A circuit for each layer, and B."""

    name: ClassVar[str] = "qaa"
    summary: ClassVar[str] = "a quantum circuit and a linear map back"
    learning_rate: ClassVar[float] = 3e-3

    theta_lr: float | None = option(
        None,
        "learning rate of the circuit's angles (default: 5 times --lr, or --lr with --vectors)",
        group=GROUP,
        above=0,
    )
    freeze_angles: bool = option(False, "leave the angles at random and train B alone", group=GROUP)

    def build(self, base: PreTrainedModel, setting: Setting) -> PeftModel:
        """The base with QAA layers."""
        from peft import get_peft_model

        from qaa_serve.training import QAAConfig

        circuit = {field.name: getattr(self, field.name) for field in fields(CircuitOptions)}
        config = QAAConfig(task_type="CAUSAL_LM", target_modules=setting.targets, **circuit)
        try:
            model = get_peft_model(base, config, adapter_name=_ADAPTER)
        except ValueError as error:  # more readouts than a layer's qubits have
            raise TrainingError(f"the base model cannot be adapted so: {error}") from error
        if self.freeze_angles:
            for name, parameter in model.named_parameters():
                if ".qaa_theta." in name:
                    parameter.requires_grad_(False)
        return model

    def own_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Vectors learn at 5 times the rate, which suits B, and so do angles, unless vectors stand behind."""
        angles = self.theta_lr or (learning_rate if self.vectors else 5 * learning_rate)
        return {".qaa_theta.": angles, ".qaa_lambda_": 5 * learning_rate}

    def save(self, model: Any, directory: Path, base: str) -> None:
        """Write the adapter as the server reads it."""
        from qaa_serve.adapters import save_adapter
        from qaa_serve.training.layer import QAALinear

        config = model.peft_config[_ADAPTER].checked(base)
        modules = {
            name: layer.weights(_ADAPTER)
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, QAALinear)
        }
        save_adapter(directory, config, modules)

    def prepare(self, model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Compile the circuits' kernels, and measure what inputs and readouts are standardised by."""
        from qaa_serve.circuits.adjoint import prepare
        from qaa_serve.training.model import standardise

        prepare(next(model.parameters()).device)
        standardise(model, batches, _ADAPTER)
