"""The backends by name. Nothing heavy is imported before one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

import torch

from qaa_serve.circuits.ansatz import Ansatz

ExpectationValues: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Ansatz, torch.Tensor | None], torch.Tensor]

#: name -> (module that holds `expectation_values`, what it is for)
BACKENDS = {
    "reference": ("qaa_serve.circuits.reference", "complex128, gate by gate, CPU; for checking"),
    "torch": ("qaa_serve.circuits.torch_batched", "float32, fused gates, CPU or GPU, differentiable"),
}


def get_backend(name: str) -> ExpectationValues:
    """The function ``expectation_values(x, theta, ansatz, index)`` of a backend.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in BACKENDS:
        known = "; ".join(f"{key} ({purpose})" for key, (_, purpose) in BACKENDS.items())
        raise ValueError(f"unknown circuit backend {name!r}; known are: {known}")
    function: ExpectationValues = import_module(BACKENDS[name][0]).expectation_values
    return function
