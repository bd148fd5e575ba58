"""The circuits of training: autograd keeps x and theta alone, and a training backend has both passes."""

from __future__ import annotations

from typing import Any

import torch

from qaa_serve.circuits.ansatz import Ansatz, check_theta, check_width
from qaa_serve.circuits.backends import training_backend
from qaa_serve.circuits.embedding import standardised


def expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, standard: torch.Tensor | None = None
) -> torch.Tensor:
    """Pauli-Z expectation values of every circuit on every token, as ``torch_batched`` has them.

    Computed in float32, or in float64 for a float64 x, also under autocast. Nothing but x and theta themselves is
    kept for the backward pass: layers that read one x share it, however each standardises it. Asking for a second
    derivative (create_graph=True) is a RuntimeError there.

    Args:
        x: (tokens, width), any real floating dtype; width at most 2**n.
        theta: (circuits, rows, n).
        ansatz: the form all the circuits share.
        standard: (2, width), offset and scale of x's channels before it is embedded; None leaves x as it is.

    Returns:
        (tokens, circuits, columns) in float32 (float64 if x is). Differentiable in x and theta, once.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
    """
    check_width(x, ansatz)
    check_theta(theta, ansatz)
    z: torch.Tensor = _ExpectationValues.apply(x, theta, ansatz, standard)  # type: ignore[no-untyped-call]
    return z


def prepare(device: torch.device) -> None:
    """Compile what circuits on such a device need, or read what was compiled before; else the first call does."""
    training_backend(device, torch.float32, 1).prepare()


class _ExpectationValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, standard: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, theta, standard)
        ctx.ansatz = ansatz
        x = _embedded(x, standard)
        return training_backend(x.device, x.dtype, ansatz.qubits).forward(x, theta, ansatz)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let a constant dz pass
            raise RuntimeError(
                "these circuits' gradients cannot be differentiated again (create_graph=True); "
                "those of qaa_serve.circuits.torch_batched can"
            )
        given, theta, standard = ctx.saved_tensors
        x = _embedded(given, standard)
        backend = training_backend(x.device, x.dtype, ctx.ansatz.qubits)
        dx, dtheta = backend.backward(x, theta, ctx.ansatz, dz)
        if standard is not None:
            dx = (dx * standard[1].to(dx.dtype)).to(given.dtype)
        needs_dx, needs_dtheta, *_ = ctx.needs_input_grad
        return dx if needs_dx else None, dtheta if needs_dtheta else None, None, None


def _embedded(x: torch.Tensor, standard: torch.Tensor | None) -> torch.Tensor:
    """What of x is embedded; 16 bits are too few for a difference."""
    return x if standard is None else standardised(x if x.dtype == torch.float64 else x.float(), standard)
