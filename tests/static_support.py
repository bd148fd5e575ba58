"""A layer's static delta between vLLM's own kernels for GPUs, on a CPU; for Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm_qaa.static import Block, StaticDelta

CPU = torch.device("cpu")
RANK, SLOTS, WIDTH, SLICES = 16, 6, 24, (32, 16)


class Layer:
    """What a delta asks of one of vLLM's LoRA layers."""

    def __init__(self, whole: torch.Tensor | None = None, adds: bool = True):
        self.n_slices, self.output_slices = len(SLICES), SLICES
        self.whole, self.adds = whole, adds
        self.qaa_name = "layer.qaa"
        width = WIDTH if whole is None else WIDTH // 2
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, width, dtype=torch.float16) for _ in SLICES)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, size, RANK, dtype=torch.float16) for size in SLICES)

    def full_widths(self) -> tuple[int, tuple[int, ...]]:
        return WIDTH, SLICES

    def whole_input(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.whole is None else self.whole

    def adds_b_z(self) -> bool:
        return self.adds


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
        block.put(slot, block.pack(form, {layer: (angles, standard)}))
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
