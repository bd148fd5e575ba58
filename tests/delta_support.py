"""A layer of two slices with a LoRA adapter and four of circuits, and what each row of a step should get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from circuits_support import random_theta
from vllm_qaa.delta import LayerCircuits, Standard
from vllm_qaa.plan import CircuitForm
from vllm_qaa.static import Block, StaticDelta

from qaa_serve.circuits import Ansatz, get_backend

CPU = torch.device("cpu")
RANK, SLOTS, WIDTH, SLICES = 16, 6, 24, (32, 16)


class Layer:
    """What a delta asks of one of vLLM's LoRA layers."""

    def __init__(self, whole: torch.Tensor | None = None, adds: bool = True):
        self.n_slices, self.output_slices = len(SLICES), SLICES
        self.whole, self.adds = whole, adds
        self.qaa_name, self.device = "layer.qaa", CPU
        width = WIDTH if whole is None else WIDTH // 2
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, width, dtype=torch.float16) for _ in SLICES)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, size, RANK, dtype=torch.float16) for size in SLICES)

    def full_widths(self) -> tuple[int, tuple[int, ...]]:
        return WIDTH, SLICES

    def whole_input(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.whole is None else self.whole

    def adds_b_z(self) -> bool:
        return self.adds

    def columns(self) -> list[slice]:
        return [slice(0, SLICES[0]), slice(SLICES[0], sum(SLICES))]


def gpu_punica(tokens: int) -> Any:
    """vLLM's wrapper for GPUs on a CPU, where it takes Triton for missing and has no pinned memory."""
    import vllm.platforms
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    vllm.platforms.vllm_version_matches_substr = lambda _: False
    from vllm.utils import torch_utils

    torch_utils.async_tensor_h2d = lambda data, dtype, **_: torch.tensor(data, dtype=dtype)
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=False, max_lora_rank=RANK)
    return PunicaWrapperGPU(tokens, 8, CPU, lora_config=config)


def run_static(layer: Layer, x: torch.Tensor, slots: list[int], adapters: Any, again: list[int]) -> Any:
    """The outputs of two steps; the second one behind a step without adapters, and with slot 0 emptied."""
    block = Block([layer], SLOTS, RANK, 8, CPU)
    for slot, (form, angles, standard) in adapters.items():
        block.put(slot, block.pack(form, {layer: LayerCircuits(angles, standard)}))
    layer.punica_wrapper = gpu_punica(len(x))
    delta = StaticDelta(layer, block)
    outputs = []
    for step in (slots, [-1] * len(slots), again):
        layer.punica_wrapper.token_mapping_meta.prepare_tensors(torch.tensor(step, dtype=torch.int32))
        output = torch.ones(len(x), sum(SLICES), dtype=torch.float16)
        delta.add(x, output)
        outputs.append(output)
        block.put(0, None)
    return outputs


def adapters(generator: torch.Generator) -> dict[int, tuple[CircuitForm, dict[int, torch.Tensor], Standard]]:
    """Of four slots, no two alike: standardised and whitened; heads and pairs; a constant and length; deep."""

    def make(circuit: Ansatz, heads: int, slices: tuple[int, ...], standard: Standard) -> Any:
        form = CircuitForm(circuit, heads, standard.inputs is not None, standard.readouts is not None)
        return form, {i: random_theta(generator, heads, form.ansatz(5)) for i in slices}, standard

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(2, *shape, generator=generator) + 0.5

    return {
        0: make(Ansatz("ryrz_ring_ry", 16, 2), 1, (0, 1), Standard(numbers(WIDTH), numbers(2, 5))),
        2: make(Ansatz("ry_ring", 16, 1, readouts=7), 2, (1,), Standard()),
        4: make(Ansatz("strongly_entangling", 16, 1, 9, constant=True, length=True), 1, (0,), Standard()),
        5: make(Ansatz("ryrz_ring_ry", 16, 8), 1, (0, 1), Standard(numbers(WIDTH))),
    }


def updates(
    layer: Layer, x: torch.Tensor, slots: list[int], adapters: Any, with_circuits: bool = True
) -> torch.Tensor:
    """What every row should get, in float64."""
    found = torch.zeros(len(x), sum(SLICES), dtype=torch.float64)
    whole = layer.whole_input(x).double()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        parts = []
        for i in range(len(SLICES)):
            z = layer.lora_a_stacked[i][slot, 0].double() @ x[row].double()
            form, angles, standard = adapters.get(slot, (None, {}, Standard()))
            if i in angles and with_circuits:
                inputs, readouts = standard.inputs, standard.readouts
                one = whole[row] if inputs is None else (whole[row] - inputs[0]) * inputs[1]
                by_head = (
                    get_backend("reference")(one[None], angles[i], form.ansatz(5), None)[0].flatten().double()
                )
                if readouts is not None:
                    by_head = (by_head - readouts[0, i]) * readouts[1, i]
                z[: len(by_head)] = by_head
            parts.append(layer.lora_b_stacked[i][slot, 0].double() @ z)
        found[row] = torch.cat(parts)
    return found


def filled(generator: torch.Generator, layer: Layer) -> Layer:
    """B in every slot, and a LoRA adapter's A in slot 1."""
    for b in layer.lora_b_stacked:
        b.copy_(torch.randn(b.shape, generator=generator) / 4)
    for a in layer.lora_a_stacked:
        a[1, 0, :4] = (torch.randn(4, a.shape[-1], generator=generator) / 4).half()
    return layer
