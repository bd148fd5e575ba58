"""Which tokens of a step belong to which adapter: worked out once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from qaa_serve.circuits import Ansatz


class CircuitForm(NamedTuple):
    """What adapters must share to be evaluated in one batch.

    Attributes:
        circuit: the circuits' form by the number of qubits, as a config gives it; of 16 here, the most there are.
        heads: circuits a module.
    """

    circuit: Ansatz
    heads: int

    def ansatz(self, qubits: int) -> Ansatz:
        """The circuits' form in a layer that needs so many qubits."""
        return replace(self.circuit, qubits=qubits)


@dataclass(frozen=True)
class TokenGroup:
    """Adapter slots of one kind with equally many tokens each.

    Attributes:
        form: the circuits' form; None for LoRA slots.
        slots: (G,) slot numbers.
        tokens: (G, T) row numbers of x; row g are the tokens of slots[g].
        span: the tokens as a slice where G = 1 and they lie side by side, so that views do instead of copies.
    """

    form: CircuitForm | None
    slots: tuple[int, ...]
    tokens: torch.Tensor
    span: slice | None


@dataclass(frozen=True)
class StepPlan:
    """The tokens of one step that have an adapter.

    Attributes:
        num_tokens: rows of x that the plan covers; rows behind them are padding.
        qaa: groups of QAA slots.
        lora: groups of LoRA slots, one slot each.
    """

    num_tokens: int
    qaa: tuple[TokenGroup, ...]
    lora: tuple[TokenGroup, ...]

    @property
    def empty(self) -> bool:
        """Whether no token has an adapter."""
        return not (self.qaa or self.lora)


NOTHING = StepPlan(0, (), ())


def make_plan(
    token_ids: Sequence[int],
    slot_to_id: Sequence[int | None],
    forms: Sequence[CircuitForm | None],
    device: torch.device,
) -> StepPlan:
    """Group a step's tokens by adapter slot.

    Args:
        token_ids: the adapter's integer id for every token, 0 for none.
        slot_to_id: the adapter id in each slot, None for a free slot.
        forms: the form of the circuits in each slot, None for LoRA.
        device: where the row numbers are needed.

    Raises:
        RuntimeError: if a token's adapter is in no slot.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    slot_of = {adapter: slot for slot, adapter in enumerate(slot_to_id) if adapter is not None}
    equal: dict[tuple[CircuitForm, int], list[tuple[int, np.ndarray]]] = {}
    lora = []
    for adapter in np.unique(ids[ids > 0]).tolist():
        slot = slot_of.get(adapter)
        if slot is None:
            raise RuntimeError(f"adapter {adapter} is wanted in this step but is in no slot")
        rows = np.flatnonzero(ids == adapter)
        form = forms[slot]
        if form is None:
            lora.append(_group(None, [(slot, rows)], device))
        else:
            equal.setdefault((form, len(rows)), []).append((slot, rows))
    qaa = tuple(_group(form, members, device) for (form, _), members in equal.items())
    return StepPlan(len(ids), qaa, tuple(lora))


def _group(form: CircuitForm | None, members: list[tuple[int, np.ndarray]], device: torch.device) -> TokenGroup:
    rows = np.stack([rows for _, rows in members])
    first, last = int(rows[0, 0]), int(rows[0, -1])
    adjacent = len(members) == 1 and last - first + 1 == rows.shape[1]
    return TokenGroup(
        form,
        tuple(slot for slot, _ in members),
        torch.from_numpy(rows).to(device),
        slice(first, last + 1) if adjacent else None,
    )
