"""QAA: angles of a circuit and the linear map B behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from qaa_serve.adapters import AdapterConfig, ModuleWeights, save_adapter
from qaa_serve.circuits.adjoint import prepare
from qaa_serve.training.config import CIRCUIT_OPTIONS, QAAConfig
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.layer import QAALinear
from qaa_serve.training.methods.base import Method, ParameterGroups, two_groups

_ADAPTER = "default"


def _build(model: PreTrainedModel, targets: list[str], options: Mapping[str, Any]) -> PeftModel:
    config = QAAConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        **{name: value for name, value in options.items() if name != "theta_lr"},
    )
    try:
        return get_peft_model(model, config, adapter_name=_ADAPTER)
    except ValueError as error:  # more readouts than a layer's qubits have
        raise TrainingError(f"the base model cannot be adapted so: {error}") from error


def _groups(model: nn.Module, learning_rate: float, options: Mapping[str, Any]) -> ParameterGroups:
    return two_groups(model, learning_rate, ".qaa_theta.", options["theta_lr"])


def _save(model: PeftModel, directory: Path, base: str) -> None:
    config = model.peft_config[_ADAPTER].checked(base)
    modules = {
        name: ModuleWeights(
            layer.qaa_theta[_ADAPTER].view(config.heads, *layer.qaa_form[_ADAPTER].ansatz.theta_shape),
            layer.qaa_weight[_ADAPTER],
        )
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, QAALinear)
    }
    save_adapter(directory, config, modules)


_FIELDS = AdapterConfig.model_fields

METHOD = Method(
    name="qaa",
    learning_rate=5e-3,
    options={name: _FIELDS[name].default for name in CIRCUIT_OPTIONS} | {"theta_lr": None},
    build=_build,
    groups=_groups,
    save=_save,
    prepare=prepare,
)
