"""The adapted linear layer: y = W x + b + scale * B z."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qaa_serve.adapters import AdapterConfig
from qaa_serve.circuits import Ansatz
from qaa_serve.circuits.adjoint import expectation_values

_CANNOT_MERGE = (
    "a QAA adapter cannot be merged into the base weights: its update B z is not linear in x. "
    "Keep it beside the base (PeftModel.from_pretrained, qaa-serve), or use unload() to drop it"
)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of an nn.Linear or of GPT-2's Conv1D, None for any other module."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        d_in, d_out = layer.weight.shape
        return d_in, d_out
    return None


@dataclass(frozen=True)
class _Form:
    """What an adapter's config says about this layer."""

    ansatz: Ansatz
    heads: int
    scale: float


class QAALinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with any number of QAA adapters, of which the active ones add to its output.

    The adapters' parameters are float32 whatever the base layer's dtype, and so is the circuit.

    Attributes:
        qaa_theta: adapter name -> angles, (rows, n), or (heads, rows, n) for more than one head.
        qaa_weight: adapter name -> B, (d_out, heads * readouts).

    Args:
        base_layer: nn.Linear or Conv1D.
        adapter_name: name of the first adapter.
        config: its config.

    Raises:
        TypeError: for another kind of base layer.
        ValueError: for an input that no circuit embeds, see ``qubits_for``.
    """

    adapter_layer_names = ("qaa_theta", "qaa_weight")
    other_param_names = ("qaa_form",)

    # BaseTunerLayer has these; type checkers know nothing of PEFT and would find nn.Module.__getattr__.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    weight: torch.Tensor  # the base layer's

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = linear_shape(self.get_base_layer())
        if shape is None:
            raise TypeError(f"QAA adapts linear layers, not {type(base_layer).__name__}")
        self.in_features, self.out_features = shape
        self.qaa_theta = nn.ParameterDict()
        self.qaa_weight = nn.ParameterDict()
        self.qaa_form: dict[str, _Form] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AdapterConfig, inference_mode: bool = False) -> None:
        """Add an adapter: angles uniform in (-pi, pi) from torch's random generator, B zero."""
        qubits = config.qubits(self.in_features)
        ansatz = config.circuit(qubits)
        shape = ansatz.theta_shape if config.heads == 1 else (config.heads, *ansatz.theta_shape)
        theta = torch.empty(shape, dtype=torch.float32).uniform_(-math.pi, math.pi)
        weight = torch.zeros(self.out_features, config.rank(qubits), dtype=torch.float32)
        self.qaa_theta[adapter_name] = nn.Parameter(theta)
        self.qaa_weight[adapter_name] = nn.Parameter(weight)
        self.qaa_form[adapter_name] = _Form(ansatz, config.heads, config.scale(qubits))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but without its cast to the base's dtype: 16 bits are too few for angles."""
        device = device or self.weight.device
        for parameters in (self.qaa_theta, self.qaa_weight):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., d_in) -> (..., d_out), in the base layer's output dtype."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.qaa_theta:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """scale * B z of one adapter: (..., d_in) -> (..., d_out) float32."""
        form = self.qaa_form[adapter_name]
        theta = self.qaa_theta[adapter_name].float().reshape(form.heads, *form.ansatz.theta_shape)
        weight = self.qaa_weight[adapter_name].float()
        with torch.autocast(x.device.type, enabled=False):
            z = expectation_values(x.reshape(-1, self.in_features), theta, form.ansatz)  # (tokens, heads, columns)
            z = z.reshape(*x.shape[:-1], form.heads * form.ansatz.columns)
            # Scaling z, not B or the result: what is kept for the backward pass is then z and B itself.
            return linear(form.scale * z, weight)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: a circuit has no matrix that could be added to W."""
        raise NotImplementedError(_CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Refused, as ``merge`` is."""
        raise NotImplementedError(_CANNOT_MERGE)

    def __repr__(self) -> str:
        return f"qaa.{super().__repr__()}"
