"""Amplitude embedding in torch: psi = pad(x, 2**n) / ||x||, the length that it leaves out, and its gradient.

Rows are divided by their largest magnitude before any square is taken: squares neither overflow nor vanish.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from qaa_serve.circuits.ansatz import Ansatz, check_width


def standardised(values: torch.Tensor, by: torch.Tensor | None) -> torch.Tensor:
    """(values - offset) * scale, of each channel: values (..., channels), by (2, channels), None for neither."""
    return values if by is None else (values - by[0].to(values.dtype)) * by[1].to(values.dtype)


def embed(x: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Amplitude embedding: (tokens, width) -> (tokens, 2**n) of norm 1; without a constant a zero row stays zero.

    Computed in float32, or float64 for a float64 x.

    Raises:
        ValueError: if ``x`` is wider than the state.
    """
    check_width(x, ansatz)
    x, peak = _scaled(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    psi = x / torch.where(peak > 0, norm, 1)
    if ansatz.constant:
        beside = torch.full_like(peak, math.sqrt(0.5)).masked_fill(peak == 0, 1)
        psi = torch.cat([psi * math.sqrt(0.5), beside], dim=-1)
    return pad(psi, (0, 2**ansatz.qubits - psi.shape[-1]))


def lengths(x: torch.Tensor) -> torch.Tensor:
    """||x|| / sqrt(width), what ``Ansatz.length`` multiplies z by: (tokens, width) -> (tokens,), as ``embed``."""
    x, peak = _scaled(x)
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm * peak.squeeze(-1) / math.sqrt(x.shape[-1])


def embed_backward(x: torch.Tensor, psi: torch.Tensor, dpsi: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """dL/dx of psi = (c u, ...) with u = x / ||x||: c (dpsi - u <u, dpsi>) / ||x||, and 0 for x = 0.

    c is 1, or sqrt(1/2) beside a constant. Where z is r times the expectation values, r = ||x|| / sqrt(width),
    there is u sum_k dz_k z_k / sqrt(width) too, which is u <psi, dpsi> / (2 ||x||): dpsi is that of r z, and z is
    quadratic in psi. ||x|| is max |x| / max |u|.

    Args:
        x: (tokens, width).
        psi: (2**n, tokens), x embedded.
        dpsi: (2**n, tokens).
        ansatz: the circuits' form.

    Returns:
        (tokens, width) of psi's dtype.
    """
    c = math.sqrt(0.5) if ansatz.constant else 1.0
    peak = x.abs().amax(-1).to(psi.dtype)
    overlaps = psi * dpsi
    radial = overlaps[: x.shape[1]].sum(0)
    if ansatz.length:
        radial -= overlaps.sum(0) / 2
    psi = psi[: x.shape[1]]
    total = torch.addcmul(c * dpsi[: x.shape[1]], psi, radial, value=-1 / c)
    return (total * psi.abs().amax(0) / (c * torch.where(peak > 0, peak, 1))).T


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x over its rows' largest magnitudes, and those: (tokens, width), (tokens, 1); zero rows stay zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    return x / torch.where(peak > 0, peak, 1), peak
