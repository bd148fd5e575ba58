"""Updates within CUDA graphs: the circuits are data, at addresses that never change.

All slots' circuits lie in one block on the device, a row for each slot with a part for each layer, made before
vLLM sizes its KV cache. A layer runs any mix of adapters by one launch, which finds a token's slot where vLLM's
LoRA kernels find it, and writes z to the buffer that vLLM's shrink kernel has left at zero there; its expand
kernel adds B z as it adds B A x. Nothing depends on what the step's adapters are, so that a graph that was
captured with none of them serves all.

An adapter's row is made when it is read, and put into a slot by one copy. It never ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qaa_serve.adapters import AdapterError
from qaa_serve.circuits.ansatz import qubits_for
from qaa_serve.circuits.triton.host import (
    Layout,
    check_qubits,
    compile_kernels,
    launch,
    layout_for,
    multiprocessors,
    pack,
    permutations,
)
from vllm_qaa.delta import Delta, LayerCircuits
from vllm_qaa.plan import CircuitForm


class Block:
    """The circuits of all layers, (slots, words) int32 on the device.

    Args:
        layers: those that may have circuits.
        slots: for adapters.
        rank: readouts of all heads that a module may have.
        most_layers: of gates that a module's circuits may have, in all its heads.
        device: where x will be.

    Raises:
        ValueError: if a layer is too wide.
    """

    def __init__(self, layers: Sequence[Any], slots: int, rank: int, most_layers: int, device: torch.device):
        self._parts: dict[Any, tuple[int, Layout]] = {}
        self._most_layers = most_layers
        words = 0
        for layer in layers:
            width = layer.full_widths()[0]
            check_qubits(qubits_for(width))
            self._parts[layer] = words, layout_for(qubits_for(width), width, layer.n_slices, rank, most_layers)
            words += self._parts[layer][1].words
        self.rows = torch.zeros(slots, words, dtype=torch.int32, device=device)
        # Made now: a graph that is being captured cannot wait for numbers from the host.
        multiprocessors(device)
        for _, layout in self._parts.values():
            permutations(layout.qubits, device)

    def compile(self, kernel: Any, dtype: torch.dtype) -> None:
        """Compile all that a step will launch on an x of that dtype, so that no request waits for it."""
        for layout in {layout for _, layout in self._parts.values()}:
            compile_kernels(kernel, layout, layout.width, dtype, self.rows.device)

    def part(self, layer: Any) -> tuple[torch.Tensor, Layout]:
        """A layer's part of all rows, and what lies where in it."""
        begin, layout = self._parts[layer]
        return self.rows[:, begin : begin + layout.words], layout

    def pack(self, form: CircuitForm, circuits: Mapping[Any, LayerCircuits]) -> torch.Tensor:
        """An adapter's row, (words,) int32, pinned for a GPU; see ``CircuitStore``."""
        row = torch.zeros(self.rows.shape[1], dtype=torch.int32, pin_memory=self.rows.is_cuda)
        alike: dict[int, list[tuple[int, torch.Tensor, torch.Tensor | None]]] = {}  # by qubits
        layouts: dict[int, Layout] = {}
        for layer, (angles, standard) in circuits.items():
            begin, layout = self._parts[layer]
            layouts[layout.qubits] = layout
            for i, theta in angles.items():
                if (qubits := theta.shape[-1]) != layout.qubits:
                    raise AdapterError(
                        f"`constant` takes an amplitude beside the {layout.width} of the layer's input, so "
                        f"{qubits} qubits; triton has one kernel a layer, here for {layout.qubits} qubits: start "
                        "the server with --qaa-backend cuquantum or torch, or train the adapter without `constant`"
                    )
                readouts = None if standard.readouts is None else standard.readouts[:, i]
                alike.setdefault(qubits, []).append((begin + i * layout.record, theta, readouts))
            if standard.inputs is not None:
                row.view(torch.float32)[begin + layout.inputs_at :][: 2 * layout.width] = standard.inputs.flatten()
        for qubits, slices in alike.items():
            places, thetas, standards = zip(*slices, strict=True)
            readouts = torch.stack(standards) if form.whitened else None
            layout = layouts[qubits]  # records of as many qubits are laid out alike
            try:
                records = pack(torch.stack(thetas), form.ansatz(qubits), layout, readouts, form.inputs)
            except ValueError as error:
                raise AdapterError(
                    f"{error}: the server was started with --qaa-max-layers {self._most_layers}, start it "
                    "with more"
                ) from error
            row[torch.tensor(places)[:, None] + torch.arange(layout.record)] = records
        return row

    def put(self, slot: int, packed: torch.Tensor | None) -> None:
        """See ``CircuitStore``."""
        if packed is None:
            self.rows[slot].zero_()
        else:
            self.rows[slot].copy_(packed, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots' circuits."""
        return self.rows.nbytes


class StaticDelta(Delta):
    """One layer's updates from the block, which is filled, cleared and counted as a whole."""

    def __init__(self, layer: Any, block: Block):
        from qaa_serve.circuits.triton.kernel import circuit_kernel

        self._layer, self._kernel = layer, circuit_kernel
        self._records, self._layout = block.part(layer)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """See ``Delta``. What is launched depends on shapes alone; where x is cut over ranks it is gathered."""
        layer, meta = self._layer, self._layer.punica_wrapper.token_mapping_meta
        if meta.no_lora_flag_cpu.item():  # in host memory; and the slots are those of an earlier step
            return
        b = layer.lora_b_stacked
        z = torch.empty(len(b), x.shape[0], b[0].shape[-1], dtype=torch.float32, device=x.device)
        layer.punica_wrapper.add_shrink(z, x, layer.lora_a_stacked, 1.0)  # zeros where A is
        whole = layer.whole_input(x)
        if layer.adds_b_z():
            slots = meta.token_lora_mapping
            launch(self._kernel, whole, slots, (1, 0), self._records, self._layout.record, self._layout, z)
        layer.punica_wrapper.add_expand(output, z, b, layer.output_slices, add_inputs=True)
