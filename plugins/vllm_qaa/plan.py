"""Which tokens of a step belong to which adapter: worked out once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from qaa_serve.circuits import Ansatz


class CircuitForm(NamedTuple):
    """What adapters must share to be evaluated in one batch.

    Attributes:
        circuit: the circuits' form by the number of qubits, as a config gives it; of 16 here, the most there are.
        heads: circuits a module.
        inputs: whether the layer's input is standardised before it is embedded.
        whitened: whether the readouts are standardised.
    """

    circuit: Ansatz
    heads: int
    inputs: bool = False
    whitened: bool = False

    def ansatz(self, qubits: int) -> Ansatz:
        """The circuits' form in a layer that needs so many qubits."""
        return replace(self.circuit, qubits=qubits)


@dataclass(frozen=True)
class CircuitTokens:
    """The tokens of one step whose adapters share a form of circuits.

    Attributes:
        form: of the circuits.
        present: the slots that these tokens use.
        rows: (T,) int64 row numbers of x, ascending.
        slots: (T,) int64, the slot of each.
        span: the rows as a slice where they lie side by side, so that views do instead of copies.
    """

    form: CircuitForm
    present: tuple[int, ...]
    rows: torch.Tensor
    slots: torch.Tensor
    span: slice | None
    _indexes: dict[bytes, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """On a CPU: rows and slots as numpy sees them."""
        return self.rows.numpy(), self.slots.numpy()

    def index(self, table: torch.Tensor, key: bytes) -> torch.Tensor:
        """The tokens' rows of a table (slots, readouts); made once for all layers whose table has that key."""
        if key not in self._indexes:
            self._indexes[key] = table[self.slots]
        return self._indexes[key]


@dataclass(frozen=True)
class LoRATokens:
    """The tokens of one step that have the LoRA adapter of a slot; rows and span as for circuits."""

    slot: int
    rows: torch.Tensor
    span: slice | None


@dataclass(frozen=True)
class StepPlan:
    """The tokens of one step that have an adapter.

    Attributes:
        num_tokens: rows of x that the plan covers; rows behind them are padding.
        qaa: those of QAA adapters, form by form.
        lora: those of LoRA adapters, slot by slot.
    """

    num_tokens: int
    qaa: tuple[CircuitTokens, ...]
    lora: tuple[LoRATokens, ...]


NOTHING = StepPlan(0, (), ())


def make_plan(
    token_ids: Sequence[int],
    slot_to_id: Sequence[int | None],
    forms: Sequence[CircuitForm | None],
    device: torch.device,
) -> StepPlan:
    """Group a step's tokens by what is to be done with them.

    Args:
        token_ids: the adapter's integer id for every token, 0 for none.
        slot_to_id: the adapter id in each slot, None for a free slot.
        forms: the form of the circuits in each slot, None for LoRA.
        device: where the row and slot numbers are needed.

    Raises:
        RuntimeError: if a token's adapter is in no slot.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    slot_of = {adapter: slot for slot, adapter in enumerate(slot_to_id) if adapter is not None}
    slots = np.full(len(ids), -1)
    alike: dict[CircuitForm, list[int]] = {}
    lora = []
    for adapter in np.unique(ids[ids > 0]).tolist():
        slot = slot_of.get(adapter)
        if slot is None:
            raise RuntimeError(f"adapter {adapter} is wanted in this step but is in no slot")
        slots[ids == adapter] = slot
        form = forms[slot]
        if form is None:
            lora.append(LoRATokens(slot, *_rows(slots == slot, device)))
        else:
            alike.setdefault(form, []).append(slot)
    qaa = []
    for form, present in alike.items():
        rows, span = _rows(np.isin(slots, present), device)
        qaa.append(CircuitTokens(form, tuple(present), rows, torch.from_numpy(slots).to(device)[rows], span))
    return StepPlan(len(ids), tuple(qaa), tuple(lora))


def _rows(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, slice | None]:
    """The numbers of the rows that are chosen, and as a slice where they lie side by side."""
    rows = np.flatnonzero(chosen)
    first, last = int(rows[0]), int(rows[-1])
    span = slice(first, last + 1) if last - first + 1 == len(rows) else None
    return torch.from_numpy(rows).to(device), span
