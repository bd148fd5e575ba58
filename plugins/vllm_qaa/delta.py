"""What adds the adapters' updates in one layer, and what it is given of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from qaa_serve.adapters import AdapterError, ModuleWeights
from vllm_qaa.plan import CircuitForm


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


class LayerCircuits(NamedTuple):
    """What a layer has of an adapter beside B: angles (heads, rows, n) by slice, and what standardises."""

    angles: dict[int, torch.Tensor]
    standard: Standard


class CircuitStore(Protocol):
    """The circuits of all layers, in all slots, as a backend runs them.

    An adapter's circuits are packed when it is read, in the reader's thread; a slot is then filled by copies.
    """

    def pack(self, form: CircuitForm, circuits: Mapping[Any, LayerCircuits]) -> Any:
        """An adapter's circuits, of one form, by layer, ready for a slot: something in host memory with `nbytes`.

        Raises:
            AdapterError: if there is no room for such circuits.
        """

    def put(self, slot: int, packed: Any) -> None:
        """Fill a slot, whose B is stacked already; None: with no circuits."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots' circuits."""


class Delta:
    """A layer's updates, for all slots. One that keeps nothing beside vLLM's stacked tensors only adds."""

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps beside vLLM's stacked tensors and the circuits' store."""
        return 0

    def put_lora(self, slot: int, rank: int) -> None:
        """Note that a slot has a LoRA adapter of that rank; A and B are stacked already."""

    def clear(self, slot: int) -> None:
        """Empty a slot."""

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add to ``output`` (tokens, columns), in place, what each row's adapter makes of x (tokens, width)."""
        raise NotImplementedError
