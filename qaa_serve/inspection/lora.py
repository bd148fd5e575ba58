"""The matrices of a LoRA adapter, and their norms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qaa_serve.adapters import WEIGHTS_FILE, AdapterError

_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<kind>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer: dW = scale * B A.

    Attributes:
        a: (rank, d_in).
        b: (d_out, rank).
        scale: lora_alpha / rank, or / sqrt(rank) for rank-stabilised LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def norms(self) -> tuple[float, float]:
        """(Frobenius, spectral) norm of dW, without making it: those of two small triangular factors."""
        right = torch.linalg.qr(self.a.double().T, mode="r").R
        left = torch.linalg.qr(self.b.double(), mode="r").R
        values = torch.linalg.svdvals(left @ right.T) * abs(self.scale)
        return float(torch.linalg.vector_norm(values)), float(values.max())


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter's layers by module name, and what it holds besides."""

    modules: Mapping[str, LoraPair]
    nbytes: int
    other_parameters: int
    notes: tuple[str, ...]


def read_lora(directory: Path, config: Mapping[str, Any]) -> Lora:
    """Read a LoRA adapter as PEFT writes it.

    Args:
        directory: holds adapter_model.safetensors.
        config: its parsed adapter_config.json.

    Raises:
        AdapterError: if its tensors cannot be read or are no pairs of matrices.
    """
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except Exception as error:  # SafetensorError, and whatever its conversion to torch stumbles over
        raise AdapterError(
            f"{WEIGHTS_FILE} is damaged or no safetensors file: {error!s:.200}; copy or save it again"
        ) from error
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    other = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            other[name] = tensor
        else:
            pairs.setdefault(match["module"], {})[match["kind"]] = tensor
    if not pairs:
        raise AdapterError(f"{WEIGHTS_FILE} has no lora_A and lora_B matrices; save the adapter again with PEFT")
    modules = {module: _pair(module, pair, config) for module, pair in pairs.items()}
    notes = []
    if other:
        notes.append(
            f"{len(other)} tensors are no lora_A or lora_B, the first {next(iter(other))!r}; they count as "
            "parameters and are in no norm"
        )
    if config.get("use_dora"):
        notes.append("the adapter uses DoRA; norms are those of scale * B A alone")
    return Lora(
        modules,
        sum(tensor.nbytes for tensor in tensors.values()),
        sum(tensor.numel() for tensor in other.values()),
        tuple(notes),
    )


def _pair(module: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LoraPair:
    for kind in ("A", "B"):
        if kind not in pair:
            raise AdapterError(f"{module}: lora_{kind} is missing")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{module}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}; (rank, d_in) and "
            "(d_out, rank) are needed"
        )
    for kind, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise AdapterError(f"{module}: lora_{kind} has values that are no finite numbers")
    rank = a.shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if not isinstance(alpha, (int, float)):
        raise AdapterError(f"adapter_config.json has lora_alpha {alpha!r}; a number is needed")
    return LoraPair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: object, module: str, default: object) -> object:
    """PEFT's rule: a pattern is a regular expression for the whole name or its end after a dot."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            try:
                if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                    return value
            except re.error:
                continue
    return default
