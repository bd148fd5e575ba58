"""The adapted linear layer: y = W x + b + scale * B z.

Real models have a few channels that hold most of ||x||^2, whatever the token, so that z hardly depends on it. An
adapter may have x standardised before it is embedded, and z before B: fixed offsets and scales, channel by
channel, that are measured once before B is anything but zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qaa_serve.adapters import AdapterConfig, Inputs, ModuleWeights
from qaa_serve.circuits import Ansatz, standardised
from qaa_serve.circuits.adjoint import expectation_values

#: What lambda_d begins as. VeRA begins with 0.1 behind features of its scale; ours are alpha times as large.
_FIRST_LAMBDA_D = 1 / 64

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
    inputs: Inputs
    whitened: bool


class Moments:
    """Sum and sum of squares, channel by channel, of all that was added."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        """Take (..., channels) in."""
        values = values.detach().reshape(-1, values.shape[-1]).double()
        sums = torch.stack([values.sum(0), (values * values).sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(values)

    def standard(self, centred: bool) -> torch.Tensor:
        """Offset and scale, (2, channels) float32: to mean 0 and spread 1, or to a mean square of 1.

        A channel of next to no spread is taken for one of a hundredth of the middle one's: noise is not blown up.
        """
        assert self._sums is not None
        mean, square = self._sums / max(self._count, 1)
        offset = mean if centred else torch.zeros_like(mean)
        spread = (square - offset * offset).clamp_min(0).sqrt()
        spread = spread.clamp_min(max(0.01 * spread.median().item(), 1e-12))
        return torch.stack([offset, 1 / spread]).float()


class QAALinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with any number of QAA adapters, of which the active ones add to its output.

    The adapters' parameters are float32 whatever the base layer's dtype, and so is the circuit.

    Attributes:
        qaa_theta: adapter name -> angles, (rows, n), or (heads, rows, n) for more than one head.
        qaa_weight: adapter name -> B, (d_out, heads * readouts), unless it is made of vectors.
        qaa_lambda_b, qaa_lambda_d: adapter name -> those, (d_out,) and (heads * readouts,).
        qaa_inputs: adapter name -> offset and scale of x's channels, (2, d_in), unless inputs are raw. They are
            measured by ``standardise``, or else on the first batch of a training.
        qaa_readouts: adapter name -> those of z, (2, heads * readouts), where it is whitened.

    Args:
        base_layer: nn.Linear or Conv1D.
        adapter_name: name of the first adapter.
        config: its config.

    Raises:
        TypeError: for another kind of base layer.
        ValueError: for an input that no circuit embeds, see ``qubits_for``.
    """

    adapter_layer_names = ("qaa_theta", "qaa_weight", "qaa_lambda_b", "qaa_lambda_d")
    other_param_names = ("qaa_form", "qaa_inputs", "qaa_readouts")

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
        self.qaa_lambda_b = nn.ParameterDict()
        self.qaa_lambda_d = nn.ParameterDict()
        self.qaa_inputs = BufferDict({}, persistent=True)
        self.qaa_readouts = BufferDict({}, persistent=True)
        self.qaa_form: dict[str, _Form] = {}
        self._unmeasured: set[str] = set()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AdapterConfig, inference_mode: bool = False) -> None:
        """Add an adapter: angles uniform in (-pi, pi) from torch's random generator, B zero."""
        qubits = config.qubits(self.in_features)
        ansatz = config.circuit(qubits)
        shape = ansatz.theta_shape if config.heads == 1 else (config.heads, *ansatz.theta_shape)
        theta = torch.empty(shape, dtype=torch.float32).uniform_(-math.pi, math.pi)
        rank = config.rank(qubits)
        self.qaa_theta[adapter_name] = nn.Parameter(theta)
        if config.vectors:
            self.qaa_lambda_b[adapter_name] = nn.Parameter(torch.zeros(self.out_features))
            self.qaa_lambda_d[adapter_name] = nn.Parameter(torch.full((rank,), _FIRST_LAMBDA_D))
        else:
            self.qaa_weight[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank))
        form = _Form(ansatz, config.heads, config.scale(qubits), config.inputs, config.whitened)
        self.qaa_form[adapter_name] = form
        nothing = torch.tensor([[0.0], [1.0]])
        if form.inputs != "raw":
            self.qaa_inputs[adapter_name] = nothing.repeat(1, self.in_features)
        if form.whitened:
            self.qaa_readouts[adapter_name] = nothing.repeat(1, rank)
        if self.stages(adapter_name):
            self._unmeasured.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but without its cast to the base's dtype: 16 bits are too few for angles."""
        device = device or self.weight.device
        for tensors in (getattr(self, name) for name in (*self.adapter_layer_names, "qaa_inputs", "qaa_readouts")):
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name].data = tensors[adapter_name].data.to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What was measured before an adapter was saved is not measured again."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._unmeasured -= {name for name in self._unmeasured if f"{prefix}qaa_theta.{name}" in state_dict}

    def stages(self, adapter_name: str) -> list[str]:
        """What is to be measured, in this order: ``inputs``, ``readouts``."""
        form = self.qaa_form[adapter_name]
        return ["inputs"] * (form.inputs != "raw") + ["readouts"] * form.whitened

    def seen(self, adapter_name: str, stage: str, x: torch.Tensor) -> torch.Tensor:
        """What a stage standardises: x itself, or z of x as the stage before leaves it."""
        return x if stage == "inputs" else self._z(adapter_name, x)

    def standardise(self, adapter_name: str, stage: str, moments: Moments) -> None:
        """Take what was measured."""
        centred = stage == "readouts" or self.qaa_form[adapter_name].inputs == "centred-rms"
        buffers = self.qaa_inputs if stage == "inputs" else self.qaa_readouts
        buffers[adapter_name] = moments.standard(centred).to(self.weight.device)
        if stage == self.stages(adapter_name)[-1]:
            self._unmeasured.discard(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., d_in) -> (..., d_out), in the base layer's output dtype."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.qaa_theta:
                if self.training and name in self._unmeasured:
                    self._measure(name, x)
                result = result + self._update(name, x).to(result.dtype)
        return result

    @torch.no_grad()
    def _measure(self, adapter_name: str, x: torch.Tensor) -> None:
        """Whoever trains without ``qaa_serve.training.model.standardise`` has the first batch measured."""
        for stage in self.stages(adapter_name):
            moments = Moments()
            moments.add(self.seen(adapter_name, stage, x))
            self.standardise(adapter_name, stage, moments)

    def _z(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Readouts of all heads, (..., d_in) -> (..., heads * readouts) float32, not standardised themselves."""
        form = self.qaa_form[adapter_name]
        theta = self.qaa_theta[adapter_name].float().reshape(form.heads, *form.ansatz.theta_shape)
        with torch.autocast(x.device.type, enabled=False):
            # (tokens, heads, columns)
            z = expectation_values(
                x.reshape(-1, self.in_features), theta, form.ansatz, _find(self.qaa_inputs, adapter_name)
            )
        return z.reshape(*x.shape[:-1], form.heads * form.ansatz.columns)

    def _update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """scale * B z of one adapter: (..., d_in) -> (..., d_out) float32."""
        with torch.autocast(x.device.type, enabled=False):
            z = self._z(adapter_name, x)
            if adapter_name in self.qaa_readouts:
                z = standardised(z, self.qaa_readouts[adapter_name])
            # Scaling z, not B or the result: what is kept for the backward pass is then z and B itself.
            return linear(self.qaa_form[adapter_name].scale * z, self.weights(adapter_name).weight.float())

    def weights(self, adapter_name: str) -> ModuleWeights:
        """What is stored of one adapter."""
        form = self.qaa_form[adapter_name]
        b = _find(self.qaa_weight, adapter_name)
        return ModuleWeights(
            self.qaa_theta[adapter_name].view(form.heads, *form.ansatz.theta_shape),
            (self.qaa_lambda_b[adapter_name], self.qaa_lambda_d[adapter_name]) if b is None else b,
            _find(self.qaa_inputs, adapter_name),
            _find(self.qaa_readouts, adapter_name),
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: a circuit has no matrix that could be added to W."""
        raise NotImplementedError(_CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Refused, as ``merge`` is."""
        raise NotImplementedError(_CANNOT_MERGE)

    def __repr__(self) -> str:
        return f"qaa.{super().__repr__()}"


def _find(tensors: Any, adapter_name: str) -> torch.Tensor | None:
    """An adapter's one of them, where it has one."""
    return dict(tensors.items()).get(adapter_name)
