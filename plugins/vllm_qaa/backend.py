"""What the circuits run on: which backend, what of a GPU is refused, and what it asks of vLLM's CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import vllm
from packaging.version import Version
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from qaa_serve.circuits import Choice, choose_backend, circuits_of
from qaa_serve.circuits.cpu.serving import CompiledCircuits
from vllm_qaa.layers import DELTA_OP, QAALayerMixin, break_graphs_at_delta
from vllm_qaa.timing import TIMER

#: In vLLM's additional_config: it reaches every worker, wherever it runs.
BACKEND_KEY = "qaa_backend"
MOST_LAYERS_KEY = "qaa_max_layers"

#: Layers of gates that a module's circuits may have on a GPU, where room is made for them in advance.
MOST_LAYERS = 8

#: Where vLLM's expand kernel may be miscompiled for Hopper, and since when it is not.
_HOPPER_RANK, _HOPPER_SAFE = 64, Version("0.33")

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers hang on the name "vllm"


def check_gpu(vllm_config: VllmConfig) -> None:
    """Refuse on a GPU what vLLM's LoRA kernels answer with an assertion, or wrongly.

    Raises:
        ValueError: names the option to change.
    """
    if vllm_config.device_config.device_type != "cuda":
        return
    dtype = vllm_config.model_config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"on a GPU adapters need 16-bit numbers, which vLLM's LoRA kernels take alone, found {dtype}: start "
            "with --dtype bfloat16"
        )
    rank = vllm_config.lora_config.max_lora_rank
    if (
        rank >= _HOPPER_RANK
        and torch.cuda.get_device_capability()[0] == 9
        and Version(vllm.__version__) < _HOPPER_SAFE
    ):
        raise ValueError(
            f"--max-lora-rank {rank} is not safe on this GPU with vLLM {vllm.__version__}: its expand kernel may "
            f"be compiled wrongly for Hopper from rank {_HOPPER_RANK} on: take less, or vLLM {_HOPPER_SAFE}"
        )


def choose_circuits(vllm_config: VllmConfig, device: torch.device, layers: Sequence[QAALayerMixin]) -> Choice:
    """The circuits' backend that --qaa-backend names, or `qaa_backend` in vLLM's --additional-config.

    Raises:
        ValueError: if it cannot run here, or not in these layers.
    """
    asked = vllm_config.additional_config.get(BACKEND_KEY, "auto")
    shapes = {(layer.full_widths()[0], layer.n_slices) for layer in layers}
    choice = choose_backend(asked, device, sorted(shapes))
    if vllm_config.parallel_config.world_size > 1:
        # Each rank has timed for itself; with unlike backends they would gather x at unlike times, and hang.
        choice = get_world_group().broadcast_object(choice)
    logger.info("QAA circuits run on the backend %r (%s)", choice.name, choice.reason)
    TIMER.backend = choice.name
    if circuits_of(choice.name) is CompiledCircuits:
        logger.info("Compiling the circuits for this CPU, unless that was done before: up to a minute")
        begun = time.perf_counter()
        CompiledCircuits.compile(vllm_config.model_config.dtype)
        logger.info("Compiled for this CPU, or found compiled, in %.1f s", time.perf_counter() - begun)
    return choice


def split_graphs_at_delta(vllm_config: VllmConfig) -> None:
    """Keep a planned delta out of CUDA graphs: which tokens it touches is decided in Python, step by step.

    Between the splits vLLM's piecewise graphs are captured as ever; models that vLLM does not compile break out of
    a capture where they can. Written from vLLM's source; it has not been run on a GPU.
    """
    config = vllm_config.compilation_config
    if config.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    if config.mode == CompilationMode.VLLM_COMPILE and config.splitting_ops:
        if DELTA_OP not in config.splitting_ops:
            config.splitting_ops.append(DELTA_OP)
        mode = CUDAGraphMode.PIECEWISE
    else:
        mode = CUDAGraphMode.PIECEWISE if break_graphs_at_delta() else CUDAGraphMode.NONE
    if config.cudagraph_mode != mode:
        logger.warning(
            "CUDA graph mode set from %s to %s: QAA circuits run between graphs",
            config.cudagraph_mode.name,
            mode.name,
        )
        config.cudagraph_mode = mode
