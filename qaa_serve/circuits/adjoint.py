"""The circuits of training: the function of ``torch_batched``, with a backward pass written by hand.

Plain autograd keeps every intermediate state for the backward pass, dozens of times the size of x. Here only x
and theta are kept: the backward pass takes the tokens block by block, computes a block's states once more and
goes back through them with lambda = dL/dpsi (adjoint method, arXiv:2009.02823):

- A layer's inverse is its transpose, so lambda passes it as a state does, with the matrices transposed.
- RY gates of one layer commute with each other's generators: dL/dt_k = <lambda, (-i Y_k) psi> / 2 may be taken
  before the layer, where psi is at hand, and is read off the sum of lambda psi^T over all that is not in the
  matrix that holds gate k.
- RZ gates turn amplitude j by -sum_k s_jk t_k / 2: dL/dt_k = -sum_j s_jk Im(lambda_j conj(psi_j)) / 2.

States are (2**n, columns) here: a column a token, and from the first RZ on two, real and imaginary part side by
side. A permutation moves whole rows, a phase multiplies one, and all columns pass a real matrix together.

On a CPU in float32 all of this is done by compiled kernels instead, ``cpu.training``; what is here is for GPUs,
float64 and where numba is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qaa_serve.circuits.ansatz import Ansatz, check_inputs
from qaa_serve.circuits.backends import missing
from qaa_serve.circuits.cpu import training as cpu_training
from qaa_serve.circuits.torch_batched import _schedule, _Stretch, embed, fuse, lengths

#: Amplitudes of the tokens computed together, by device: few enough for a CPU's caches (a state of 2**17 takes
#: 1 MiB, and half or twice as many are slower), enough to fill a GPU. They bound the memory in use meanwhile.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**23


def expectation_values(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Pauli-Z expectation values of every circuit on every token, as ``torch_batched`` has them.

    Computed in float32, or in float64 for a float64 x, also under autocast. Nothing but x and theta themselves
    is kept for the backward pass. Asking for a second derivative (create_graph=True) is a RuntimeError there.

    Args:
        x: (tokens, width), any real floating dtype; width at most 2**n.
        theta: (circuits, rows, n).
        ansatz: the form all the circuits share.

    Returns:
        (tokens, circuits, columns) in float32 (float64 if x is). Differentiable in x and theta, once.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
    """
    check_inputs(x, theta, ansatz)
    z: torch.Tensor = _ExpectationValues.apply(x, theta, ansatz)  # type: ignore[no-untyped-call]
    return z


def prepare(device: torch.device) -> None:
    """Compile what circuits on such a device need, or read what was compiled before; else the first call does."""
    if missing("cpu", device) is None:
        cpu_training.prepare()


class _ExpectationValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
        ctx.save_for_backward(x, theta)
        ctx.ansatz = ansatz
        if _is_compiled(x):
            return cpu_training.expectation_values(x, theta, ansatz)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            circuits = _circuits(theta.to(dtype), ansatz)
            signs = _schedule(ansatz, x.device).readout.to(dtype)
            z = torch.empty(len(x), len(theta), ansatz.columns, dtype=dtype, device=x.device)
            for tokens in _blocks(x, ansatz):
                embedded = _embed(x[tokens], ansatz)
                for number, circuit in enumerate(circuits):
                    psi = embedded
                    for layer in circuit:
                        psi = layer.rotate(layer.enter(psi))
                    sums = signs.T @ psi.square()  # (readouts, columns)
                    z[tokens, number] = sums.reshape(ansatz.columns, embedded.shape[1], -1).sum(-1).T
            if ansatz.length:
                z *= lengths(x)[:, None, None]
        return z

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let a constant dz pass
            raise RuntimeError(
                "these circuits' gradients cannot be differentiated again (create_graph=True); "
                "those of qaa_serve.circuits.torch_batched can"
            )
        x, theta = ctx.saved_tensors
        needs_dx, needs_dtheta, _ = ctx.needs_input_grad
        if _is_compiled(x):
            of_x, of_theta = cpu_training.gradients(x, theta, ctx.ansatz, dz)
            return of_x if needs_dx else None, of_theta if needs_dtheta else None, None
        dx = torch.zeros_like(x) if needs_dx else None
        dtheta = torch.zeros_like(theta, dtype=dz.dtype) if needs_dtheta else None
        with torch.autocast(x.device.type, enabled=False):
            circuits = _circuits(theta.to(dz.dtype), ctx.ansatz)
            if ctx.ansatz.length:
                dz = dz * lengths(x)[:, None, None]
            signs = _schedule(ctx.ansatz, x.device).readout.to(dz.dtype)
            for tokens in _blocks(x, ctx.ansatz):
                embedded = _embed(x[tokens], ctx.ansatz)
                lams = [
                    _back(circuit, embedded, signs, dz[tokens, number], needs_dtheta)
                    for number, circuit in enumerate(circuits)
                ]
                if dx is not None and lams:
                    dx[tokens] = _embedding_back(ctx.ansatz, x[tokens], embedded, sum(lams[1:], lams[0]))
            if dtheta is not None:
                for angles, circuit in zip(dtheta, circuits, strict=True):
                    for layer in circuit:
                        layer.add_dtheta(angles)
        return dx, None if dtheta is None else dtheta.to(theta.dtype), None


def _is_compiled(x: torch.Tensor) -> bool:
    """Whether the kernels compute it; torch.compile cannot look into them, and has torch's operations instead."""
    return x.dtype != torch.float64 and not torch.compiler.is_compiling() and missing("cpu", x.device) is None


def _back(
    circuit: list[_Layer], embedded: torch.Tensor, signs: torch.Tensor, dz: torch.Tensor, collect: bool
) -> torch.Tensor:
    """lambda where the circuit begins, (2**n, tokens); the layers collect what they need on the way.

    Args:
        circuit: its layers.
        embedded: (2**n, tokens).
        signs: of the readout, (2**n, n).
        dz: dL/dz, (tokens, n).
        collect: whether gradients of the angles are wanted.
    """
    psi, entered = embedded, []
    for layer in circuit:
        entered.append(layer.enter(psi))
        psi = layer.rotate(entered[-1])
    # z = |psi|**2 @ signs, and real and imaginary part of an amplitude lie side by side
    lam = signs @ (2 * dz.T).repeat_interleave(psi.shape[1] // len(dz), dim=1)
    lam *= psi
    for layer in reversed(circuit):
        psi = entered.pop()
        lam = layer.rotate_back(lam)
        if collect:
            layer.collect(lam, psi)
        lam = layer.enter_back(lam)
    return lam


@dataclass
class _Layer:
    """A layer of RY gates and the stretch before it, of one circuit.

    States are (2**n, columns). The sums over columns, of all tokens so far, are what the gradients of angles need.
    """

    stretch: _Stretch
    high: torch.Tensor  # (2**h, 2**h), with h = n // 2
    low: torch.Tensor  # (2**(n-h), 2**(n-h))
    phase: torch.Tensor | None  # (2**n, 1) complex
    real: bool  # whether the state is, before

    def __post_init__(self) -> None:
        self.high_sum = torch.zeros_like(self.high)  # lambda psi^T
        self.low_sum = torch.zeros_like(self.low)
        self.phase_sum = self.high.new_zeros(len(self.high) * len(self.low))  # Im(lambda conj(psi))

    def enter(self, psi: torch.Tensor) -> torch.Tensor:
        """Permutation and phases."""
        if self.stretch.gather is not None:
            psi = psi.index_select(0, self.stretch.gather)
        if self.phase is None:
            return psi
        if self.real:
            return _parts(psi * self.phase)
        _complex(psi).mul_(self.phase)  # in place, as below: it is the last layer's output, used nowhere else
        return psi

    def enter_back(self, lam: torch.Tensor) -> torch.Tensor:
        """The inverse of ``enter``; to a state that was real only the real part of lambda matters."""
        if self.phase is not None:
            turned = _complex(lam).mul_(self.phase.conj())
            lam = turned.real.contiguous() if self.real else lam
        return lam if self.stretch.ungather is None else lam.index_select(0, self.stretch.ungather)

    def rotate(self, psi: torch.Tensor) -> torch.Tensor:
        """The RY gates."""
        return self._rotate(psi, self.high, self.low)

    def rotate_back(self, lam: torch.Tensor) -> torch.Tensor:
        """The inverse of ``rotate``."""
        return self._rotate(lam, self.high.T, self.low.T)

    def _rotate(self, psi: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        block = torch.bmm(low.expand(len(high), -1, -1), self._by_wires(psi))
        return (high @ block.flatten(1)).reshape(psi.shape)

    def _by_wires(self, psi: torch.Tensor) -> torch.Tensor:
        return psi.reshape(len(self.high), len(self.low), -1)

    def collect(self, lam: torch.Tensor, psi: torch.Tensor) -> None:
        """Add some tokens' lambda and psi, both taken between ``enter`` and ``rotate``, to the sums."""
        if self.phase is not None:
            self.phase_sum += torch.linalg.vecdot(_complex(psi), _complex(lam)).imag
        lam, psi = self._by_wires(lam), self._by_wires(psi)
        self.high_sum += lam.flatten(1) @ psi.flatten(1).T
        self.low_sum += torch.bmm(lam, psi.mT).sum(0)

    def add_dtheta(self, dtheta: torch.Tensor) -> None:
        """Add this layer's share to the gradient of one circuit's angles, (rows, n)."""
        dtheta[self.stretch.ry_row] += torch.cat([_turns(self.high_sum), _turns(self.low_sum)]) / 2
        for row, signs in self.stretch.phases:
            dtheta[row] -= self.phase_sum @ signs.to(dtheta.dtype) / 2


def _turns(overlaps: torch.Tensor) -> torch.Tensor:
    """sum_ij lambda_i (-i Y_k)_ij psi_j for each wire k of a block: (2**m, 2**m) sums -> (m,)."""
    m = (len(overlaps) - 1).bit_length()
    basis = torch.arange(len(overlaps), device=overlaps.device).unsqueeze(1)
    bits = 1 << torch.arange(m - 1, -1, -1, device=overlaps.device)
    # -i Y has a single entry in a row: -1 at column 1 of row 0, 1 at column 0 of row 1
    sign = torch.where((basis & bits) > 0, 1, -1)
    return (overlaps[basis, basis ^ bits] * sign).sum(0)


def _circuits(theta: torch.Tensor, ansatz: Ansatz) -> list[list[_Layer]]:
    fused = fuse(theta, ansatz)
    circuits: list[list[_Layer]] = [[] for _ in theta]
    real = True
    for stretch, high, low, phase in zip(
        _schedule(ansatz, theta.device).stretches, fused.high, fused.low, fused.phase, strict=True
    ):
        for number, circuit in enumerate(circuits):
            turns = None if phase is None else torch.complex(*phase[number].unsqueeze(-1))
            circuit.append(_Layer(stretch, high[number], low[number], turns, real))
        real = real and phase is None
    return circuits


def _blocks(x: torch.Tensor, ansatz: Ansatz) -> Iterator[slice]:
    step = max(1, _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) >> ansatz.qubits)
    return (slice(start, start + step) for start in range(0, len(x), step))


def _complex(psi: torch.Tensor) -> torch.Tensor:
    """(2**n, 2 * tokens), contiguous -> (2**n, tokens), a view."""
    return torch.view_as_complex(psi.reshape(len(psi), -1, 2))


def _parts(psi: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_complex``."""
    return torch.view_as_real(psi).flatten(1)


def _embed(x: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    return embed(x, ansatz).T.contiguous()


def _embedding_back(ansatz: Ansatz, x: torch.Tensor, psi: torch.Tensor, dpsi: torch.Tensor) -> torch.Tensor:
    """dL/dx of psi = (c u, ...) with u = x / ||x||: c (dpsi - u <u, dpsi>) / ||x||, and 0 for x = 0.

    c is 1, or sqrt(1/2) beside a constant. Where z is r times the expectation values, r = ||x|| / sqrt(width),
    there is u sum_k dz_k z_k / sqrt(width) too, which is u <psi, dpsi> / (2 ||x||): dpsi is that of r z, and z is
    quadratic in psi. ||x|| is max |x| / max |u|: as in ``embed``, no square of x is taken, which might overflow or
    vanish.

    Args:
        ansatz: the circuits' form.
        x: (tokens, width).
        psi: (2**n, tokens), x embedded.
        dpsi: (2**n, tokens).
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
