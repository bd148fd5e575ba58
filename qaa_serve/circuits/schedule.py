"""An ansatz as the steps that a statevector goes through: the one lowering, which every fast backend walks.

What stands behind the last RY is part of the readout: CNOTs turn a product of Pauli-Z into another one, and phases
such a product does not see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from qaa_serve.circuits.ansatz import Ansatz, Cnots, Rotation


@dataclass(frozen=True)
class Step:
    """RZ on every qubit, then CNOTs, then RY on every qubit; each may be missing.

    Attributes:
        phases: the row of theta that RZ turns by.
        cnots: what permutes the amplitudes.
        turns: the row of theta that RY turns by.
    """

    phases: int | None = None
    cnots: Cnots | None = None
    turns: int | None = None


@dataclass(frozen=True)
class Schedule:
    """What a statevector goes through.

    Attributes:
        first: the row of theta of an RY layer before the first step, while the state is real; or None.
        steps: then; the last one has an RY layer.
        masks: for each readout the wires whose Pauli-Z are multiplied, as bits of an amplitude's index.
        closing: the CNOTs that the masks take into account; or None. A backend that reads the probabilities
            permuted by them reads the ansatz's own observables.
    """

    first: int | None
    steps: tuple[Step, ...]
    masks: tuple[int, ...]
    closing: Cnots | None

    @cached_property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps, with the first RY layer as one."""
        return self.steps if self.first is None else (Step(turns=self.first), *self.steps)


@lru_cache(maxsize=256)
def schedule(ansatz: Ansatz) -> Schedule:
    """The steps of an ansatz up to its last RY, and the readouts that take the rest into account."""
    gates = list(ansatz.gates())
    last = max(i for i, gate in enumerate(gates) if isinstance(gate, Rotation) and gate.axis == "Y")
    begins_with_ry = gates[0] == Rotation("Y", 0)
    steps: list[Step] = []
    for gate in gates[begins_with_ry : last + 1]:
        if isinstance(gate, Cnots):
            begun = steps.pop() if steps and not steps[-1].cnots and steps[-1].turns is None else Step()
            steps.append(replace(begun, cnots=gate))
        elif gate.axis == "Z":
            steps.append(Step(phases=gate.row))
        else:
            begun = steps.pop() if steps and steps[-1].turns is None else Step()
            steps.append(replace(begun, turns=gate.row))
    closing = tuple(pair for gate in gates[last + 1 :] if isinstance(gate, Cnots) for pair in gate.pairs)
    masks = index_masks(ansatz)
    for control, target in reversed(closing):  # Z on the target becomes Z on both
        shift = ansatz.qubits - 1
        masks = tuple(m ^ ((m >> (shift - target) & 1) << (shift - control)) for m in masks)
    return Schedule(0 if begins_with_ry else None, tuple(steps), masks, Cnots(closing) if closing else None)


def index_masks(ansatz: Ansatz) -> tuple[int, ...]:
    """The wires of the ansatz's observables as bits of an amplitude's index."""
    return tuple(sum(1 << (ansatz.qubits - 1 - wire) for wire in wires) for wires in ansatz.observables)


def sources(cnots: Cnots, n: int) -> torch.Tensor:
    """The g, (2**n,) int64, with (CNOTs psi)[j] = psi[g[j]]: the gates undone on j, last first."""
    found = torch.arange(2**n)
    for control, target in reversed(cnots.pairs):
        found = found ^ ((found >> (n - 1 - control) & 1) << (n - 1 - target))
    return found


def z_signs(n: int) -> torch.Tensor:
    """(2**n, n) float32: each wire's Pauli-Z on each basis state, 1 or -1."""
    return 1.0 - 2.0 * (torch.arange(2**n)[:, None] >> torch.arange(n - 1, -1, -1) & 1)


def readout_signs(ansatz: Ansatz) -> torch.Tensor:
    """(2**n, columns) float32: what each probability behind the last step counts for in each readout."""
    n, signs = ansatz.qubits, z_signs(ansatz.qubits)
    wires = [[k for k in range(n) if mask >> (n - 1 - k) & 1] for mask in schedule(ansatz).masks]
    return torch.stack([signs[:, some].prod(-1) for some in wires], dim=-1)
