"""vLLM's LoRA layers with a QAA branch: y <- W x + b + scale * B z, for the tokens that have a QAA adapter.

A slot of a layer holds a LoRA adapter (A and B in vLLM's stacked tensors) or a QAA one (circuits here, B with
scale folded in in vLLM's stacked tensor). Slices of a packed layer (q, k, v) have circuits of their own over
one x. All slots' circuits of one form lie in one backend's tables, so that a mixed batch is one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qaa_serve.adapters import AdapterError, ModuleWeights
from qaa_serve.circuits import Circuits
from qaa_serve.circuits.cpu_fused import CompiledCircuits
from vllm_qaa.plan import NOTHING, CircuitForm, CircuitTokens, LoRATokens, StepPlan
from vllm_qaa.timing import TIMER

#: One tensor, or one per slice of a packed layer (None: slice not adapted); vLLM's own convention.
PerSlice: TypeAlias = torch.Tensor | list[torch.Tensor | None]

DELTA_OP = "vllm_qaa::add_delta"


class PlanHolder:
    """The current step's plan and the circuits' backend; one for all layers of a model."""

    def __init__(self, circuits: type[Circuits]) -> None:
        self.plan: StepPlan = NOTHING
        self.circuits = circuits


class Standard(NamedTuple):
    """What one slot's circuits in a layer standardise by: a number v becomes (v - offset) * scale.

    Attributes:
        inputs: (2, d_in), offset and scale of the channels of x; None for raw ones.
        readouts: (2, slices, rank), those of z, zeros for slices without circuits; None unless it is whitened.
    """

    inputs: torch.Tensor | None = None
    readouts: torch.Tensor | None = None

    def with_module(self, name: str, weights: ModuleWeights, part: int | None, slices: int) -> Standard:
        """The same with a module of the layer: one of its slices, or, if part is None, all of them.

        Raises:
            AdapterError: if modules that read one x do not embed the same.
        """
        inputs, readouts = weights.inputs, self.readouts
        if self.inputs is not None and inputs is not None and not torch.equal(self.inputs, inputs):
            raise AdapterError(
                f"{name!r} has other qaa_inputs than another module that reads the same input: all that do need "
                "the same ones, as qaa-serve train writes them"
            )
        if weights.readouts is not None:
            rank = weights.readouts.shape[1]
            readouts = torch.zeros(2, slices, rank) if readouts is None else readouts
            readouts[:, slice(None) if part is None else slice(part, part + 1)] = weights.readouts[:, None]
        return Standard(inputs, readouts)


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

    def put(self, slot: int, angles: dict[int, torch.Tensor]) -> None:
        """Give a slot the circuits (heads, rows, n) of some slices."""
        readouts = self.table.shape[1]
        numbers = [-1] * readouts
        for i, theta in angles.items():
            here = range(i * len(theta), (i + 1) * len(theta))
            numbers[here.start : here.stop] = [slot * readouts + readout for readout in here]
            self.circuits.put(slot * readouts + here.start, theta)
        self.table[slot] = torch.tensor(numbers, dtype=torch.int32)
        self.key = self.table.cpu().numpy().tobytes()

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.table[slot] = -1
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


class QAALayerMixin(BaseLayerWithLoRA):
    """What every QAA layer adds to the vLLM layer it is mixed into."""

    _plans: PlanHolder | None = None  # None: not bound, and vLLM's own branch is taken
    _qaa_name: str

    def bind(self, name: str, plans: PlanHolder) -> None:
        """Give the layer its name among the forward context's layers, and where it finds the step's plan."""
        self._qaa_name = name
        self._plans = plans

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """As vLLM's, and room for circuits in each slot."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._theta: list[dict[int, torch.Tensor] | None] = [None] * max_loras
        self._forms: list[CircuitForm | None] = [None] * max_loras
        self._in_slots: list[SlotCircuits | None] = [None] * max_loras  # of those forms
        self._circuits: dict[CircuitForm, SlotCircuits] = {}
        self._lora: dict[int, LoRAMatrices] = {}  # on a CPU

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        super().reset_lora(index)
        self._lora.pop(index, None)
        self._theta[index] = None
        form, self._forms[index] = self._forms[index], None
        if form is not None:
            self._in_slots[index] = None
            self._circuits[form].clear(index)
            if form not in self._forms:
                del self._circuits[form]

    def set_lora(self, index: int, lora_a: PerSlice, lora_b: PerSlice) -> None:
        """Fill a slot.

        A 3-D lora_a, (heads, rows, n), is the angles of a QAA adapter and lora_b its B, scale folded in; the
        circuits are built by `prepare_circuits`. Anything else goes to vLLM's own method.
        """
        parts = lora_a if isinstance(lora_a, list) else [lora_a]
        angles = {i: part for i, part in enumerate(parts) if part is not None and part.ndim == 3}
        if not angles:
            super().set_lora(index, lora_a, lora_b)
            if torch.device(self.device).type == "cpu":
                self._keep_for_cpu(index, max(len(part) for part in parts if part is not None))
            return
        # vLLM copies a lora_a of shape (r, w) to the corner of its stacked A: of an empty one nothing, A stays 0.
        empty = [None if part is None else part.new_empty(0, 0) for part in parts]
        super().set_lora(index, empty if isinstance(lora_a, list) else empty[0], lora_b)
        if not isinstance(lora_a, list) and self.n_slices > 1:
            angles = dict.fromkeys(range(self.n_slices), angles[0])
        self._theta[index] = angles

    def _keep_for_cpu(self, index: int, rank: int) -> None:
        """Take a LoRA adapter's matrices from the stacked ones, which hold this rank's part of them."""
        adapted = [i for i, b in enumerate(self.lora_b_stacked) if b[index].any()]
        if not adapted:
            return
        columns, here = self._columns(), slice(adapted[0], adapted[-1] + 1)
        self._lora[index] = LoRAMatrices(
            slice(columns[adapted[0]].start, columns[adapted[-1]].stop),
            torch.cat([a[index, 0, :rank].float() for a in self.lora_a_stacked[here]]),
            tuple(b[index, 0, :, :rank].float().T.contiguous() for b in self.lora_b_stacked[here]),
        )

    def prepare_circuits(self, index: int, form: CircuitForm, standard: Standard) -> None:
        """Build the circuits of a slot from the angles that `set_lora` was given."""
        angles = self._theta[index]
        if angles is None:
            return
        if form not in self._circuits:
            qubits = next(iter(angles.values())).shape[-1]
            self._circuits[form] = self._make_circuits(form, qubits)
        slot_circuits = self._circuits[form]
        self._forms[index], self._in_slots[index] = form, slot_circuits
        slot_circuits.put(index, {i: theta.to(self.device, torch.float32) for i, theta in angles.items()})
        for target, source in zip((slot_circuits.inputs, slot_circuits.readouts), standard, strict=True):
            if source is not None:
                target[index] = source
        if slot_circuits.weights.numel():
            for i in angles:
                b = self.lora_b_stacked[i][index, 0, :, : slot_circuits.weights.shape[1]]
                slot_circuits.weights[index, :, self._columns()[i]] = b.T

    def _make_circuits(self, form: CircuitForm, qubits: int) -> SlotCircuits:
        assert self._plans is not None  # only bound layers are given circuits
        device, d_in = torch.device(self.device), self.full_widths()[0]
        with torch.inference_mode(False):  # tensors of a step may not be changed outside of one
            return SlotCircuits(
                self._plans.circuits, form, qubits, len(self._forms), d_in, self.output_slices, device
            )

    def own_bytes(self) -> int:
        """Bytes of all slots' circuits, and of what else is kept beside vLLM's stacked tensors."""
        circuits = sum(here.nbytes for here in self._circuits.values())
        return circuits + sum(lora.nbytes for lora in self._lora.values())

    def full_widths(self) -> tuple[int, tuple[int, ...]]:
        """(d_in, d_out of each slice) of the whole layer, before tensor parallelism cuts it."""
        base = self.base_layer
        if isinstance(base, QKVParallelLinear):
            kv = base.total_num_kv_heads * base.head_size
            v = base.total_num_kv_heads * getattr(base, "v_head_size", base.head_size)
            outputs = (base.total_num_heads * base.head_size, kv, v)
            return base.input_size, outputs if self.n_slices == 3 else (sum(outputs),)
        if self.n_slices > 1:
            return base.input_size, tuple(base.output_sizes)
        return base.input_size, (base.output_size,)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self._plans is None:
            return super()._apply_lora_to_output(x, output)
        if x.ndim > 2:  # models of the transformers backend carry a batch axis of one
            flat = self._apply_lora_to_output(x.flatten(0, -2), output.flatten(0, -2))
            return flat.view(output.shape)
        if torch.compiler.is_compiling():
            torch.ops.vllm_qaa.add_delta(x, output, self._qaa_name)
        else:
            self.add_delta(x, output)
        return output

    def add_delta(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add every adapter's update to the rows of ``output`` that belong to it.

        Args:
            x: (tokens, d_in) the layer's input (this rank's part of it for row-parallel layers).
            output: (tokens, sum of the slices' d_out on this rank), changed in place.
        """
        assert self._plans is not None  # only bound layers come here
        plan = self._plans.plan
        if not (plan.lora or (plan.qaa and self._circuits)):
            return
        if x.shape[0] < plan.num_tokens:
            raise RuntimeError(
                f"{self._qaa_name} was given {x.shape[0]} tokens in a step of {plan.num_tokens}: this model "
                "runs the layer on part of the tokens, which adapters do not support"
            )
        if x.is_cpu:
            self._add_on_cpu(plan, x, output)
        else:
            self._add_with_punica(plan, x, output)

    def _add_on_cpu(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # vLLM's torch kernels gather the whole A and B for every token, and with index -1, those of the last
        # slot for tokens without an adapter. Products by slot are right and several times faster.
        for tokens in plan.lora:
            if (lora := self._lora.get(tokens.slot)) is not None:
                _add(output[:, lora.columns], tokens, lora.update(_take(x, tokens)))
        groups, x = self._groups(plan, x)
        with TIMER.sample(x.device) if groups else nullcontext():
            for group, here in groups:
                self._add_circuits(group, here, x, output)

    def _add_circuits(
        self, group: CircuitTokens, here: SlotCircuits, x: torch.Tensor, output: torch.Tensor
    ) -> None:
        if isinstance(here.circuits, CompiledCircuits):
            if not self._adds_b_z():
                return
            here.circuits.add_to(output, x, *group.arrays, *here.arrays)
            return
        z = self._readout(group, here, x)  # (T, slices, rank)
        for slot in group.present if self._adds_b_z() else ():
            chosen = group.slots == slot
            for i, columns in enumerate(self._columns()):
                update = z[chosen, i] @ here.weights[slot, :, columns]
                output[:, columns].index_add_(0, group.rows[chosen], update.to(output.dtype))

    def _add_with_punica(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # QAA slots have A = 0, so vLLM's shrink leaves their rows at zero for z to be written to.
        rank = self.lora_b_stacked[0].shape[-1]
        z_all = x.new_zeros(self.n_slices, x.shape[0], rank, dtype=torch.float32)
        if plan.lora:
            self.punica_wrapper.add_shrink(z_all, x, self.lora_a_stacked, 1.0)
        groups, x = self._groups(plan, x)
        with TIMER.sample(x.device) if groups else nullcontext():
            readouts = [(group, self._readout(group, here, x)) for group, here in groups]
        for group, z in readouts:
            if self._adds_b_z():
                z_all[:, group.rows, : z.shape[-1]] = z.transpose(0, 1)
        self.punica_wrapper.add_expand(output, z_all, self.lora_b_stacked, self.output_slices, add_inputs=True)

    def _groups(
        self, plan: StepPlan, x: torch.Tensor
    ) -> tuple[list[tuple[CircuitTokens, SlotCircuits]], torch.Tensor]:
        """The groups that have circuits in this layer, and the whole x where the input is cut over the ranks."""
        groups = []
        for group in plan.qaa:
            for slot in group.present:
                if (here := self._in_slots[slot]) is not None:
                    groups.append((group, here))  # a group's slots share a form
                    break
        if groups and self._input_is_sharded():
            # z is a function of the whole x, unlike A x, which is a sum over its parts.
            x = tensor_model_parallel_all_gather(x)
        return groups, x

    def _readout(self, group: CircuitTokens, here: SlotCircuits, x: torch.Tensor) -> torch.Tensor:
        """z of a group's tokens, (T, slices, heads * columns)."""
        x = _take(x, group)
        if here.inputs.numel():
            x = _standardise(x.float(), here.inputs[group.slots])
        z = here.circuits.run(x, group.index(here.table, here.key))
        z = z.view(len(z), self.n_slices, -1)
        return _standardise(z, here.readouts[group.slots]) if here.readouts.numel() else z

    def _input_is_sharded(self) -> bool:
        return self.tp_size > 1 and isinstance(self.base_layer, RowParallelLinear)

    def _adds_b_z(self) -> bool:
        """Row-parallel outputs are summed over the ranks: one rank adds B z, which all of them know."""
        return not self._input_is_sharded() or self.tp_rank == 0

    def _columns(self) -> list[slice]:
        """The columns of each slice in this rank's output."""
        ends = list(accumulate(self.output_slices))
        return [slice(end - size, end) for end, size in zip(ends, self.output_slices, strict=True)]


def _take(x: torch.Tensor, tokens: CircuitTokens | LoRATokens) -> torch.Tensor:
    """The rows of x that are meant: (T, d_in)."""
    return x[tokens.span] if tokens.span is not None else x[tokens.rows]


def _standardise(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """(T, ...) by their offsets and scales, (T, 2, ...)."""
    return (values - by[:, 0]) * by[:, 1]


def _add(columns: torch.Tensor, group: LoRATokens, update: torch.Tensor) -> None:
    """columns[rows of the group] += update."""
    update = update.to(columns.dtype)
    if group.span is not None:
        columns[group.span] += update
    else:
        columns.index_add_(0, group.rows, update)


def _delta_op(x: torch.Tensor, output: torch.Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].add_delta(x, output)


def _delta_op_fake(x: torch.Tensor, output: torch.Tensor, layer: str) -> None:
    """Changes output in place and makes nothing new."""


# In a compiled graph the layer is one opaque operation: which tokens have which adapter is data, which Dynamo
# cannot trace. (torch.library.Library has less overhead a call than torch.library.custom_op.)
_library = torch.library.Library("vllm_qaa", "DEF")
_library.define("add_delta(Tensor x, Tensor(a!) output, str layer) -> ()")
_library.impl("add_delta", _delta_op, "CompositeExplicitAutograd")
torch.library.register_fake(DELTA_OP, _delta_op_fake, lib=_library)


_ADAPTABLE = (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
)


@cache
def qaa_subclass(cls: type) -> type:
    """The QAA version of one of vLLM's LoRA layer classes; classes that cannot have one are returned as is.

    Left alone are embeddings, output heads and MoE experts, and the fully sharded classes, which cut A along
    the rank: QAA adapters that would need them are refused when they are loaded.
    """
    if cls not in _ADAPTABLE:
        return cls
    return type(f"QAA{cls.__name__}", (QAALayerMixin, cls), {"__doc__": f"{cls.__name__} with a QAA branch."})
