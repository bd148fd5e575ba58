"""vLLM's LoRA layers with a QAA branch: y <- W x + b + scale * B z, for the tokens that have a QAA adapter.

A slot of a layer holds a LoRA adapter (A and B in vLLM's stacked tensors) or a QAA one (circuits here, B with
scale folded in in vLLM's stacked tensor). Slices of a packed layer (q, k, v) have circuits of their own over
one embedded x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

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

from qaa_serve.circuits.torch_batched import FusedCircuits, embed, fuse, lengths, run
from vllm_qaa.plan import NOTHING, CircuitForm, StepPlan, TokenGroup
from vllm_qaa.timing import TIMER

#: One tensor, or one per slice of a packed layer (None: slice not adapted); vLLM's own convention.
PerSlice: TypeAlias = torch.Tensor | list[torch.Tensor | None]

DELTA_OP = "vllm_qaa::add_delta"


class PlanHolder:
    """The current step's plan; one for all layers of a model."""

    def __init__(self) -> None:
        self.plan: StepPlan = NOTHING


@dataclass(frozen=True)
class SlotCircuits:
    """The circuits of one slot: `slices` of the packed layer are adapted, `heads` circuits each."""

    slices: tuple[int, ...]
    heads: int
    fused: FusedCircuits  # len(slices) * heads circuits, slice by slice


@dataclass(frozen=True)
class SlotStack:
    """The circuits and B of the slots of a token group.

    Attributes:
        slices: the slices of the packed layer that any of the slots adapts.
        heads: circuits a slice.
        fused: G * len(slices) * heads circuits, slot by slot, slice by slice.
        weights: B of each of the slices, (G, d_out, heads * columns).
    """

    slices: tuple[int, ...]
    heads: int
    fused: FusedCircuits
    weights: tuple[torch.Tensor, ...]


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
        self._slots: list[SlotCircuits | None] = [None] * max_loras
        self._stacks: dict[tuple[int, ...], SlotStack] = {}
        self._stacks_plan: StepPlan = NOTHING

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        super().reset_lora(index)
        self._theta[index] = self._slots[index] = None
        self._stacks.clear()

    def set_lora(self, index: int, lora_a: PerSlice, lora_b: PerSlice) -> None:
        """Fill a slot.

        A 3-D lora_a, (heads, rows, n), is the angles of a QAA adapter and lora_b its B, scale folded in; the
        circuits are built by `prepare_circuits`. Anything else goes to vLLM's own method.
        """
        parts = lora_a if isinstance(lora_a, list) else [lora_a]
        angles = {i: part for i, part in enumerate(parts) if part is not None and part.ndim == 3}
        if not angles:
            super().set_lora(index, lora_a, lora_b)
            return
        # vLLM copies a lora_a of shape (r, w) to the corner of its stacked A: of an empty one nothing, A stays 0.
        empty = [None if part is None else part.new_empty(0, 0) for part in parts]
        super().set_lora(index, empty if isinstance(lora_a, list) else empty[0], lora_b)
        if not isinstance(lora_a, list) and self.n_slices > 1:
            angles = dict.fromkeys(range(self.n_slices), angles[0])
        self._theta[index] = angles

    def prepare_circuits(self, index: int, form: CircuitForm) -> None:
        """Build the fused circuits of a slot from the angles that `set_lora` was given."""
        angles = self._theta[index]
        if angles is None:
            return
        qubits = next(iter(angles.values())).shape[-1]
        theta = torch.cat(list(angles.values())).to(self.device, torch.float32)
        self._slots[index] = SlotCircuits(tuple(angles), form.heads, fuse(theta, form.ansatz(qubits)))

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
        # Models of the transformers backend carry a batch axis of one.
        flat_x, flat_output = x.flatten(0, -2), output.flatten(0, -2)
        if torch.compiler.is_compiling():
            torch.ops.vllm_qaa.add_delta(flat_x, flat_output, self._qaa_name)
        else:
            self.add_delta(flat_x, flat_output)
        return flat_output.view(output.shape)

    def add_delta(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add every adapter's update to the rows of ``output`` that belong to it.

        Args:
            x: (tokens, d_in) the layer's input (this rank's part of it for row-parallel layers).
            output: (tokens, sum of the slices' d_out on this rank), changed in place.
        """
        assert self._plans is not None  # only bound layers come here
        plan = self._plans.plan
        if plan.empty:
            return
        if x.shape[0] < plan.num_tokens:
            raise RuntimeError(
                f"{self._qaa_name} was given {x.shape[0]} tokens in a step of {plan.num_tokens}: this model "
                "runs the layer on part of the tokens, which adapters do not support"
            )
        if plan is not self._stacks_plan:
            self._stacks.clear()
            self._stacks_plan = plan
        if x.device.type == "cpu":
            self._add_on_cpu(plan, x, output)
        else:
            self._add_with_punica(plan, x, output)

    def _add_on_cpu(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # vLLM's torch kernels gather the whole A and B for every token, and with index -1, those of the last
        # slot for tokens without an adapter. Products by slot are right and several times faster.
        for group in plan.lora:
            (slot,) = group.slots
            rows = _take(x, group)
            for i, columns in enumerate(self._columns()):
                a, b = self.lora_a_stacked[i][slot, 0], self.lora_b_stacked[i][slot, 0]
                _add(output[:, columns], group, rows.to(a.dtype) @ a.T @ b.T)
        for group, stack, z in self._readouts(plan, x):
            if not self._adds_b_z():
                continue
            for position, i in enumerate(stack.slices):
                b = stack.weights[position]  # (G, d_out, heads * columns)
                update = z[:, position].to(b.dtype) @ b.transpose(1, 2)  # (G, T, d_out)
                _add(output[:, self._columns()[i]], group, update.flatten(0, 1))

    def _add_with_punica(self, plan: StepPlan, x: torch.Tensor, output: torch.Tensor) -> None:
        # QAA slots have A = 0, so vLLM's shrink leaves their rows at zero for z to be written to.
        rank = self.lora_b_stacked[0].shape[-1]
        z_all = x.new_zeros(self.n_slices, x.shape[0], rank, dtype=torch.float32)
        if plan.lora:
            self.punica_wrapper.add_shrink(z_all, x, self.lora_a_stacked, 1.0)
        for group, stack, z in self._readouts(plan, x):
            if not self._adds_b_z():
                continue
            for position, i in enumerate(stack.slices):
                z_all[i, group.tokens.flatten(), : z.shape[-1]] = z[:, position].flatten(0, 1)
        self.punica_wrapper.add_expand(output, z_all, self.lora_b_stacked, self.output_slices, add_inputs=True)

    def _readouts(self, plan: StepPlan, x: torch.Tensor) -> list[tuple[TokenGroup, SlotStack, torch.Tensor]]:
        """(group, its slots' circuits, z (G, slices, T, heads * columns)) for every group with circuits here."""
        groups = [g for g in plan.qaa if any(self._slots[slot] is not None for slot in g.slots)]
        if groups and self._input_is_sharded():
            # z is a function of the whole x, unlike A x, which is a sum over its parts.
            x = tensor_model_parallel_all_gather(x)
        if groups and TIMER.is_due():
            with TIMER.measure(x.device):
                return [self._readout(group, x) for group in groups]
        return [self._readout(group, x) for group in groups]

    def _readout(self, group: TokenGroup, x: torch.Tensor) -> tuple[TokenGroup, SlotStack, torch.Tensor]:
        """(the group, its slots' circuits, z) of one group."""
        stack = self._stack_of(group.slots)
        ansatz, rows = stack.fused.ansatz, _take(x, group)
        psi = embed(rows, ansatz).view(*group.tokens.shape, -1)  # (G, T, 2**n)
        if len(group.slots) > 1:
            psi = psi.repeat_interleave(len(stack.slices) * stack.heads, dim=0)
        z = run(psi, stack.fused)  # (G * slices * heads, T, n)
        z = z.view(len(group.slots), len(stack.slices), stack.heads, *z.shape[1:]).transpose(2, 3).flatten(3)
        if ansatz.length:
            z = z * lengths(rows).view(len(group.slots), 1, -1, 1)
        return group, stack, z

    def _stack_of(self, slots: tuple[int, ...]) -> SlotStack:
        """The circuits of some slots, of which at least one has any; kept as long as the plan and the slots."""
        if slots not in self._stacks:
            self._stacks[slots] = self._stack(slots)
        return self._stacks[slots]

    def _stack(self, slots: tuple[int, ...]) -> SlotStack:
        present = [circuits for slot in slots if (circuits := self._slots[slot]) is not None]
        heads, rank = present[0].heads, present[0].heads * present[0].fused.ansatz.columns
        if len(slots) == 1:
            slices, fused = present[0].slices, present[0].fused
        else:
            slices = tuple(sorted({i for circuits in present for i in circuits.slices}))
            fused = present[0].fused.empty(len(slots) * len(slices) * heads)
            for tensor in fused.tensors():
                tensor.zero_()  # a slot without circuits for a slice gives z = 0 there
            for position, slot in enumerate(slots):
                if (circuits := self._slots[slot]) is None:
                    continue
                for part, i in enumerate(circuits.slices):
                    to = (position * len(slices) + slices.index(i)) * heads
                    for target, source in zip(fused.tensors(), circuits.fused.tensors(), strict=True):
                        target[to : to + heads] = source[part * heads : (part + 1) * heads]
        index = slice(slots[0], slots[0] + 1) if len(slots) == 1 else list(slots)
        weights = tuple(self.lora_b_stacked[i][index, 0, :, :rank] for i in slices)
        return SlotStack(slices, heads, fused, weights)

    def _input_is_sharded(self) -> bool:
        return self.tp_size > 1 and isinstance(self.base_layer, RowParallelLinear)

    def _adds_b_z(self) -> bool:
        """Row-parallel outputs are summed over the ranks: one rank adds B z, which all of them know."""
        return not self._input_is_sharded() or self.tp_rank == 0

    def _columns(self) -> list[slice]:
        """The columns of each slice in this rank's output."""
        ends = list(accumulate(self.output_slices))
        return [slice(end - size, end) for end, size in zip(ends, self.output_slices, strict=True)]


def _take(x: torch.Tensor, group: TokenGroup) -> torch.Tensor:
    """The rows of x that belong to a group, slot by slot: (G * T, d_in)."""
    return x[group.span] if group.span is not None else x[group.tokens.flatten()]


def _add(columns: torch.Tensor, group: TokenGroup, update: torch.Tensor) -> None:
    """columns[rows of the group] += update; a row belongs to one slot only."""
    update = update.to(columns.dtype)
    if group.span is not None:
        columns[group.span] += update
    else:
        columns.index_add_(0, group.tokens.flatten(), update)


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
