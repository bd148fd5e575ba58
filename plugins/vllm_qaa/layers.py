"""vLLM's LoRA layers with a QAA branch: y <- W x + b + scale * B z, for the tokens that have a QAA adapter.

A slot of a layer holds a LoRA adapter (A and B in vLLM's stacked tensors) or a QAA one (B with scale folded in in
vLLM's stacked tensor, circuits in the layer's delta). Slices of a packed layer (q, k, v) have circuits of their
own over one x.
"""

from __future__ import annotations

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

from vllm_qaa.delta import Delta

#: One tensor, or one per slice of a packed layer (None: slice not adapted); vLLM's own convention.
PerSlice: TypeAlias = torch.Tensor | list[torch.Tensor | None]

DELTA_OP = "vllm_qaa::add_delta"


class QAALayerMixin(BaseLayerWithLoRA):
    """What every QAA layer adds to the vLLM layer it is mixed into.

    Attributes:
        qaa_name: the layer's name among the forward context's layers.
        delta: what adds the updates; None: the layer is not bound, and vLLM's own branch is taken.
    """

    qaa_name: str
    delta: Delta | None = None

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """As vLLM's."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._filled: dict[int, bool] = {}  # slot -> whether there is an A in it

    def reset_lora(self, index: int) -> None:
        """Empty a slot: what was put there, nothing if it is empty, as most are in layers without adapters."""
        has_a = self._filled.pop(index, None)
        if has_a is None:
            return
        if has_a:
            super().reset_lora(index)
        else:
            for b in self.lora_b_stacked:
                b[index] = 0
        if self.delta is not None:
            self.delta.clear(index)

    def set_lora(self, index: int, lora_a: PerSlice, lora_b: PerSlice) -> None:
        """Fill a slot. That of a QAA adapter has B, scale folded in, and an A of no rows, which stays zero."""
        parts = lora_a if isinstance(lora_a, list) else [lora_a]
        rank = max(len(part) for part in parts if part is not None)
        try:
            super().set_lora(index, lora_a, lora_b)  # which resets it first
        finally:
            self._filled[index] = rank > 0  # if only in part
        if self.delta is not None and rank:
            self.delta.put_lora(index, rank)

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

    def columns(self) -> list[slice]:
        """The columns of each slice in this rank's output."""
        ends = list(accumulate(self.output_slices))
        return [slice(end - size, end) for end, size in zip(ends, self.output_slices, strict=True)]

    def whole_input(self, x: torch.Tensor) -> torch.Tensor:
        """x of all ranks where tensor parallelism cuts it: z is no sum over its parts, as A x is."""
        return tensor_model_parallel_all_gather(x) if self._input_is_sharded() else x

    def adds_b_z(self) -> bool:
        """Row-parallel outputs are summed over the ranks: one rank adds B z, which all of them know."""
        return not self._input_is_sharded() or self.tp_rank == 0

    def _input_is_sharded(self) -> bool:
        return self.tp_size > 1 and isinstance(self.base_layer, RowParallelLinear)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.delta is None:
            return super()._apply_lora_to_output(x, output)
        if x.ndim > 2:  # models of the transformers backend carry a batch axis of one
            flat = self._apply_lora_to_output(x.flatten(0, -2), output.flatten(0, -2))
            return flat.view(output.shape)
        if torch.compiler.is_compiling():
            torch.ops.vllm_qaa.add_delta(x, output, self.qaa_name)
        else:
            self.delta.add(x, output)
        return output


def _add_delta(x: torch.Tensor, output: torch.Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].delta.add(x, output)


_delta = _add_delta


def _delta_op(x: torch.Tensor, output: torch.Tensor, layer: str) -> None:
    _delta(x, output, layer)


def break_graphs_at_delta() -> bool:
    """Have a CUDA graph that is being captured end before a layer's delta and go on behind it.

    Returns:
        Whether this vLLM can do so, and does in this process: only with models that it does not compile.
    """
    global _delta
    try:
        from vllm.compilation.breakable_cudagraph import (
            eager_break_during_capture,
            is_breakable_cudagraph_enabled,
        )
    except ImportError:
        return False
    _delta = eager_break_during_capture(_add_delta)
    return bool(is_breakable_cudagraph_enabled())


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
