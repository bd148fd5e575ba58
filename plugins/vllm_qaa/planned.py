"""Updates by a step's plan: y += scale * B z for the rows of each group of tokens, group by group.

The layer's circuits of one form, of all slots, lie in one backend's tables, so that a mixed batch is one call.
Which rows are whose is decided in Python, so on a GPU this runs between CUDA graphs; ``static`` runs within them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from qaa_serve.circuits import Ansatz, Circuits, standardised
from qaa_serve.circuits.cpu.host import make_tables
from qaa_serve.circuits.cpu.serving import CompiledCircuits
from vllm_qaa.delta import Delta, LayerCircuits, Standard
from vllm_qaa.plan import NOTHING, CircuitForm, CircuitTokens, LoRATokens, StepPlan
from vllm_qaa.timing import TIMER


class PlanHolder:
    """The current step's plan and the circuits' backend; one for all layers of a model."""

    def __init__(self, circuits: type[Circuits]) -> None:
        self.plan: StepPlan = NOTHING
        self.circuits = circuits


class PackedLayer(NamedTuple):
    """A layer's circuits of one adapter, ready to be copied to a slot.

    Attributes:
        qubits: of each.
        numbers: (slices * heads,) int32, which of them each readout has, slice by slice; -1 for none.
        circuits: for each its angles; or what the compiled backend makes of them, turns and phases.
        standard: what x and z are standardised by.
    """

    qubits: int
    numbers: np.ndarray
    circuits: tuple[Any, ...]
    standard: Standard


@dataclass(frozen=True)
class PackedCircuits:
    """An adapter's circuits, of one form, by layer."""

    form: CircuitForm
    layers: Mapping[Any, PackedLayer]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = (part for layer in self.layers.values() for part in (*layer.circuits, *layer.standard))
        return sum(part.nbytes for part in parts if part is not None)


class PlannedCircuits:
    """The circuits of all layers, each layer's in its delta; see ``CircuitStore``."""

    def __init__(self, circuits: type[Circuits]):
        self._circuits = circuits

    def pack(self, form: CircuitForm, circuits: Mapping[Any, LayerCircuits]) -> PackedCircuits:
        """See ``CircuitStore``."""
        alike: dict[int, list[torch.Tensor]] = {}
        for angles, _ in circuits.values():
            for theta in angles.values():
                alike.setdefault(theta.shape[-1], []).append(theta)
        made = {qubits: self._make(torch.cat(thetas), form.ansatz(qubits)) for qubits, thetas in alike.items()}
        taken = dict.fromkeys(made, 0)
        layers = {}
        for layer, (angles, standard) in circuits.items():
            qubits = next(iter(angles.values())).shape[-1]
            begin, count = taken[qubits], form.heads * len(angles)
            taken[qubits] += count
            numbers = np.full((layer.n_slices, form.heads), -1, np.int32)
            numbers[list(angles)] = np.arange(count, dtype=np.int32).reshape(-1, form.heads)
            part = tuple(rows[begin : begin + count] for rows in made[qubits])
            layers[layer] = PackedLayer(qubits, numbers.reshape(-1), part, standard)
        return PackedCircuits(form, layers)

    def _make(self, theta: torch.Tensor, ansatz: Ansatz) -> tuple[Any, ...]:
        if issubclass(self._circuits, CompiledCircuits):
            return make_tables(theta, ansatz)
        return (theta,)  # what else there is on a device, between two steps

    def put(self, slot: int, packed: PackedCircuits | None) -> None:
        """See ``CircuitStore``; what a slot had was cleared with its layers."""
        if packed is not None:
            for layer, part in packed.layers.items():
                layer.delta.put(slot, packed.form, part)

    @property
    def nbytes(self) -> int:
        """Bytes that are in no delta: none."""
        return 0


class SlotCircuits:
    """A layer's circuits of one form, in all slots.

    Attributes:
        circuits: room for `slots * slices * heads` of them.
        table: (slots, slices * heads) int32, the number of each slot's circuits, slice by slice; -1 for none.
        key: the table's content.
        inputs: (slots, 2, d_in) float32, what x is standardised by; empty for raw ones.
        readouts: (slots, 2, slices, heads * columns) float32, what z is standardised by; empty unless whitened.
        weights: on a CPU (slots, heads * columns, d_out) float32, B transposed; else empty.
        arrays: on a CPU all of them as numpy sees them, and where the slices end in d_out.
    """

    def __init__(
        self,
        make: type[Circuits],
        form: CircuitForm,
        qubits: int,
        slots: int,
        d_in: int,
        slices: Sequence[int],
        device: torch.device,
    ):
        ansatz = form.ansatz(qubits)
        self.circuits = make(ansatz, slots * len(slices) * form.heads, device)
        self.table = torch.full((slots, len(slices) * form.heads), -1, dtype=torch.int32, device=device)
        self.key = b""
        rank = form.heads * ansatz.columns
        self.inputs = torch.zeros((slots if form.inputs else 0, 2, d_in), device=device)
        self.readouts = torch.zeros((slots if form.whitened else 0, 2, len(slices), rank), device=device)
        self.weights = torch.zeros((slots, rank, sum(slices)) if device.type == "cpu" else (0,), device=device)
        if device.type == "cpu":
            tensors = self.table, self.inputs, self.readouts, self.weights
            self.arrays = *(tensor.numpy() for tensor in tensors), np.cumsum(slices)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        own = (self.table, self.inputs, self.readouts, self.weights)
        return self.circuits.nbytes + sum(tensor.nbytes for tensor in own)

    def put(self, slot: int, part: PackedLayer) -> None:
        """Give a slot its circuits, and what they standardise by."""
        first = slot * self.table.shape[1]
        numbers = torch.from_numpy(np.where(part.numbers < 0, -1, part.numbers + np.int32(first)))
        self.table[slot] = numbers
        self.key = self.table.cpu().numpy().tobytes()
        if isinstance(self.circuits, CompiledCircuits):
            self.circuits.put_tables(first, part.circuits)
        else:
            self.circuits.put(first, *part.circuits)
        for target, source in zip((self.inputs, self.readouts), part.standard, strict=True):
            if source is not None:
                target[slot] = source

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.table[slot] = -1
        self.readouts[slot : slot + 1] = 0  # no offset is taken off where there is no readout
        self.key = self.table.cpu().numpy().tobytes()


@dataclass(frozen=True)
class LoRAMatrices:
    """A slot's LoRA adapter as a CPU multiplies with it: in float32, cut to its rank.

    Without instructions for them, torch's products of 16-bit numbers take several times as long.

    Attributes:
        columns: of the output, from the first slice that is adapted to the last.
        a: (slices * rank, d_in), their A, one below the other.
        b: (rank, d_out) for each of them, B transposed.
    """

    columns: slice
    a: torch.Tensor
    b: tuple[torch.Tensor, ...]

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """B A x for every row of x, (T, d_in) -> (T, columns) float32."""
        parts = (x.float() @ self.a.T).chunk(len(self.b), dim=1)
        return torch.cat([part @ b for part, b in zip(parts, self.b, strict=True)], dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.a.nbytes + sum(b.nbytes for b in self.b)


class PlannedDelta(Delta):
    """On a GPU, with a backend that cannot run within CUDA graphs; z goes through vLLM's expand kernel."""

    def __init__(self, layer: Any, plans: PlanHolder):
        self._layer, self._plans = layer, plans
        slots = layer.lora_b_stacked[0].shape[0]
        self._forms: list[CircuitForm | None] = [None] * slots
        self._circuits: dict[CircuitForm, SlotCircuits] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots' circuits."""
        return sum(here.nbytes for here in self._circuits.values())

    def put(self, slot: int, form: CircuitForm, part: PackedLayer) -> None:
        """Give a slot its circuits; its B is stacked already."""
        if form not in self._circuits:
            self._circuits[form] = self._make_circuits(form, part.qubits)
        here = self._circuits[form]
        self._forms[slot] = form
        here.put(slot, part)
        if here.weights.numel():
            adapted = part.numbers.reshape(self._layer.n_slices, -1)[:, 0] >= 0
            for i in np.flatnonzero(adapted).tolist():
                b = self._layer.lora_b_stacked[i][slot, 0, :, : here.weights.shape[1]]
                here.weights[slot, :, self._layer.columns()[i]] = b.T

    def _make_circuits(self, form: CircuitForm, qubits: int) -> SlotCircuits:
        layer = self._layer
        device, d_in = torch.device(layer.device), layer.full_widths()[0]
        with torch.inference_mode(False):  # tensors of a step may not be changed outside of one
            return SlotCircuits(
                self._plans.circuits, form, qubits, len(self._forms), d_in, layer.output_slices, device
            )

    def clear(self, slot: int) -> None:
        """See ``Delta``; the tables of a form that no slot has any more are let go."""
        form, self._forms[slot] = self._forms[slot], None
        if form is not None:
            self._circuits[form].clear(slot)
            if form not in self._forms:
                del self._circuits[form]

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """See ``Delta``.

        Raises:
            RuntimeError: if x has fewer rows than the step's plan.
        """
        plan = self._plans.plan
        if not (plan.lora or (plan.qaa and self._circuits)):
            return
        if x.shape[0] < plan.num_tokens:
            raise RuntimeError(
                f"{self._layer.qaa_name} was given {x.shape[0]} tokens in a step of {plan.num_tokens}: this model "
                "runs the layer on part of the tokens, which adapters do not support"
            )
        self._add(plan, x, output)

    def _add(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # QAA slots have A = 0, so vLLM's shrink leaves their rows at zero for z to be written to.
        layer = self._layer
        rank = layer.lora_b_stacked[0].shape[-1]
        z_all = x.new_zeros(layer.n_slices, x.shape[0], rank, dtype=torch.float32)
        if plan.lora:
            layer.punica_wrapper.add_shrink(z_all, x, layer.lora_a_stacked, 1.0)
        groups, x = self._groups(plan, x)
        with TIMER.sample(x.device) if groups else nullcontext():
            readouts = [(group, self._readout(group, here, x)) for group, here in groups]
        for group, z in readouts if layer.adds_b_z() else ():
            z_all[:, group.rows, : z.shape[-1]] = z.transpose(0, 1)
        layer.punica_wrapper.add_expand(output, z_all, layer.lora_b_stacked, layer.output_slices, add_inputs=True)

    def _groups(
        self, plan: StepPlan, x: torch.Tensor
    ) -> tuple[list[tuple[CircuitTokens, SlotCircuits]], torch.Tensor]:
        """The groups that have circuits in this layer, and the whole x where the input is cut over the ranks."""
        groups = [
            (group, self._circuits[group.form])
            for group in plan.qaa
            if any(self._forms[slot] is not None for slot in group.present)
        ]
        return groups, self._layer.whole_input(x) if groups else x

    def _readout(self, group: CircuitTokens, here: SlotCircuits, x: torch.Tensor) -> torch.Tensor:
        """z of a group's tokens, (T, slices, heads * columns)."""
        x = _gather_rows(x, group)
        if here.inputs.numel():
            x = standardised(x.float(), here.inputs[group.slots].transpose(0, 1))
        z = here.circuits.run(x, group.index(here.table, here.key))
        z = z.reshape(len(z), self._layer.n_slices, -1)
        return standardised(z, here.readouts[group.slots].transpose(0, 1)) if here.readouts.numel() else z


class CpuDelta(PlannedDelta):
    """On a CPU: products by slot, and with the compiled backend circuits and B z in one call."""

    def __init__(self, layer: Any, plans: PlanHolder):
        super().__init__(layer, plans)
        self._lora: dict[int, LoRAMatrices] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots' circuits, and of the LoRA matrices beside the stacked ones."""
        return super().nbytes + sum(lora.nbytes for lora in self._lora.values())

    def put_lora(self, slot: int, rank: int) -> None:
        """Take a LoRA adapter's matrices from the stacked ones, which hold this rank's part of them."""
        layer = self._layer
        adapted = [i for i, b in enumerate(layer.lora_b_stacked) if b[slot].any()]
        if not adapted:
            return
        columns, here = layer.columns(), slice(adapted[0], adapted[-1] + 1)
        self._lora[slot] = LoRAMatrices(
            slice(columns[adapted[0]].start, columns[adapted[-1]].stop),
            torch.cat([a[slot, 0, :rank].float() for a in layer.lora_a_stacked[here]]),
            tuple(b[slot, 0, :, :rank].float().T.contiguous() for b in layer.lora_b_stacked[here]),
        )

    def clear(self, slot: int) -> None:
        """See ``Delta``."""
        super().clear(slot)
        self._lora.pop(slot, None)

    def _add(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # vLLM's torch kernels gather the whole A and B for every token, and with index -1, those of the last
        # slot for tokens without an adapter. Products by slot are right and several times faster.
        for tokens in plan.lora:
            if (lora := self._lora.get(tokens.slot)) is not None:
                _add(output[:, lora.columns], tokens, lora.update(_gather_rows(x, tokens)))
        groups, x = self._groups(plan, x)
        with TIMER.sample(x.device) if groups else nullcontext():
            for group, here in groups:
                self._add_circuits(group, here, x, output)

    def _add_circuits(
        self, group: CircuitTokens, here: SlotCircuits, x: torch.Tensor, output: torch.Tensor
    ) -> None:
        if not self._layer.adds_b_z():
            return
        if isinstance(here.circuits, CompiledCircuits):
            here.circuits.add_to(output, x, *group.arrays, *here.arrays)
            return
        z = self._readout(group, here, x)  # (T, slices, rank)
        for slot in group.present:
            chosen = group.slots == slot
            for i, columns in enumerate(self._layer.columns()):
                update = z[chosen, i] @ here.weights[slot, :, columns]
                output[:, columns].index_add_(0, group.rows[chosen], update.to(output.dtype))


def _gather_rows(x: torch.Tensor, tokens: CircuitTokens | LoRATokens) -> torch.Tensor:
    """The rows of x that are meant: (T, d_in)."""
    return x[tokens.span] if tokens.span is not None else x[tokens.rows]


def _add(columns: torch.Tensor, group: LoRATokens, update: torch.Tensor) -> None:
    """columns[rows of the group] += update."""
    update = update.to(columns.dtype)
    if group.span is not None:
        columns[group.span] += update
    else:
        columns.index_add_(0, group.rows, update)
