"""An ansatz as the steps that a statevector goes through; what stands behind the last RY is part of the readout.

CNOTs turn a product of Pauli-Z into another one, and phases such a product does not see: neither is run there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

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
        steps: then.
        masks: for each readout the wires whose Pauli-Z are multiplied, as bits of an amplitude's index.
    """

    first: int | None
    steps: tuple[Step, ...]
    masks: tuple[int, ...]


@lru_cache(maxsize=256)
def schedule(ansatz: Ansatz) -> Schedule:
    """The steps of an ansatz up to its last RY, and the readouts that take the rest into account."""
    n = ansatz.qubits
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
    masks = [sum(1 << (n - 1 - wire) for wire in wires) for wires in ansatz.observables]
    for gate in reversed(gates[last + 1 :]):
        if isinstance(gate, Cnots):
            for control, target in reversed(gate.pairs):  # Z on the target becomes Z on both
                masks = [m ^ ((m >> (n - 1 - target) & 1) << (n - 1 - control)) for m in masks]
    return Schedule(0 if begins_with_ry else None, tuple(steps), tuple(masks))


def sources(cnots: Cnots, n: int) -> torch.Tensor:
    """The g, (2**n,) int64, with (CNOTs psi)[j] = psi[g[j]]: the gates undone on j, last first."""
    found = torch.arange(2**n)
    for control, target in reversed(cnots.pairs):
        found = found ^ ((found >> (n - 1 - control) & 1) << (n - 1 - target))
    return found
