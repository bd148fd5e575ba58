"""Training in torch, for GPUs, float64 and where numba is missing: ``torch_batched`` with a backward pass by hand.

Plain autograd keeps every intermediate state, dozens of times the size of x. Here the backward pass takes the
tokens block by block, computes a block's states once more and goes back through them with lambda = dL/dpsi (the
adjoint method, arXiv:2009.02823):

- A layer's inverse is its transpose, so lambda passes it as a state does, with the matrices transposed.
- RY gates of one layer commute with each other's generators: dL/dt_k = <lambda, (-i Y_k) psi> / 2 may be taken
  before the layer, where psi is at hand, and is read off the sum of lambda psi^T over all that is not in the
  matrix that holds gate k.
- RZ gates turn amplitude j by -sum_k s_jk t_k / 2: dL/dt_k = -sum_j s_jk Im(lambda_j conj(psi_j)) / 2.
"""

from __future__ import annotations

import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.embedding import embed_backward, lengths
from qaa_serve.circuits.torch_batched import Layer, as_complex, blocks, columns_of, fuse, plan_layers, run


def prepare() -> None:
    """Nothing is compiled."""


def forward(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """See ``backends.Training``; in float64 if x is."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        circuits, (_, signs) = fuse(theta.to(dtype), ansatz), plan_layers(ansatz, x.device)
        z = torch.empty(len(x), len(theta), ansatz.columns, dtype=dtype, device=x.device)
        for tokens in blocks(len(x), ansatz, x.device):
            psi = columns_of(x[tokens], ansatz)
            for number, circuit in enumerate(circuits):
                z[tokens, number] = run(psi, circuit, signs)
        return z * lengths(x)[:, None, None] if ansatz.length else z


def backward(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``backends.Training``; dL/dtheta is zero where theta is frozen."""
    dx, dtheta = torch.zeros_like(x), torch.zeros_like(theta, dtype=dz.dtype)
    with torch.autocast(x.device.type, enabled=False):
        circuits, (_, signs) = fuse(theta.to(dz.dtype), ansatz), plan_layers(ansatz, x.device)
        overlaps = [[_Overlaps(layer) for layer in circuit] for circuit in circuits]
        if ansatz.length:
            dz = dz * lengths(x)[:, None, None]
        for tokens in blocks(len(x), ansatz, x.device):
            psi = columns_of(x[tokens], ansatz)
            weights = signs.to(dz.dtype)
            lams = [
                _back(sums, psi, weights, dz[tokens, k], theta.requires_grad) for k, sums in enumerate(overlaps)
            ]
            if lams:
                dx[tokens] = embed_backward(x[tokens], psi, sum(lams[1:], lams[0]), ansatz).to(x.dtype)
        for angles, sums in zip(dtheta, overlaps, strict=True):
            for layer in sums:
                layer.add_dtheta(angles)
    return dx, dtheta.to(theta.dtype)


def _back(
    circuit: list[_Overlaps], psi: torch.Tensor, signs: torch.Tensor, dz: torch.Tensor, sums_up: bool
) -> torch.Tensor:
    """lambda where the circuit begins, (2**n, tokens).

    Args:
        circuit: its layers.
        psi: (2**n, tokens), x embedded.
        signs: (2**n, columns) of the readout.
        dz: (tokens, columns), dL/dz.
        sums_up: whether overlaps are summed on the way.
    """
    permuted = []
    for each in circuit:
        permuted.append(each.layer.permute(psi))
        psi = each.layer.rotate(permuted[-1])
    # z = |psi|**2 @ signs, and real and imaginary part of an amplitude lie side by side
    lam = signs @ (2 * dz.T).repeat_interleave(psi.shape[1] // len(dz), dim=1)
    lam *= psi
    for each in reversed(circuit):
        lam = each.layer.unrotate(lam)
        if sums_up:
            each.add(lam, permuted.pop())
        lam = each.layer.unpermute(lam)
    return lam


class _Overlaps:
    """Sums over the columns, of all tokens so far, that the gradients of a layer's angles are read off."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self._high = torch.zeros_like(layer.high)  # lambda psi^T
        self._low = torch.zeros_like(layer.low)
        self._phase = layer.high.new_zeros(len(layer.high) * len(layer.low))  # Im(lambda conj(psi))

    def add(self, lam: torch.Tensor, psi: torch.Tensor) -> None:
        """Take some tokens' lambda and psi, both from between ``permute`` and ``rotate``."""
        if self.layer.phase is not None:
            self._phase += torch.linalg.vecdot(as_complex(psi), as_complex(lam)).imag
        lam, psi = self.layer.by_wires(lam), self.layer.by_wires(psi)
        self._high += lam.flatten(1) @ psi.flatten(1).T
        self._low += torch.bmm(lam, psi.mT).sum(0)

    def add_dtheta(self, dtheta: torch.Tensor) -> None:
        """Add this layer's share to the gradient of one circuit's angles, (rows, n)."""
        dtheta[self.layer.plan.turns] += torch.cat([_turns(self._high), _turns(self._low)]) / 2
        for row, signs in self.layer.plan.phases:
            dtheta[row] -= self._phase @ signs.to(dtheta.dtype) / 2


def _turns(overlaps: torch.Tensor) -> torch.Tensor:
    """sum_ij lambda_i (-i Y_k)_ij psi_j for each wire k of a block: (2**m, 2**m) sums -> (m,)."""
    m = (len(overlaps) - 1).bit_length()
    basis = torch.arange(len(overlaps), device=overlaps.device).unsqueeze(1)
    bits = 1 << torch.arange(m - 1, -1, -1, device=overlaps.device)
    # -i Y has a single entry in a row: -1 at column 1 of row 0, 1 at column 0 of row 1
    sign = torch.where((basis & bits) > 0, 1, -1)
    return (overlaps[basis, basis ^ bits] * sign).sum(0)
