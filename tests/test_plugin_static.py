"""Updates within CUDA graphs: our kernel between vLLM's own shrink and expand, all run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_interpreter
from circuits_support import fresh_generator, random_theta
from delta_support import CPU, RANK, SLICES, SLOTS, WIDTH, Layer, adapters, filled, run_static, updates

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="the triton backend needs triton")

from vllm.config import CompilationMode, CUDAGraphMode
from vllm_qaa.delta import LayerCircuits, Standard
from vllm_qaa.manager import QAAModelManager
from vllm_qaa.plan import CircuitForm
from vllm_qaa.planned import PlannedCircuits
from vllm_qaa.static import Block, StaticDelta

from qaa_serve.adapters import AdapterError
from qaa_serve.circuits import Ansatz
from qaa_serve.circuits.backends import missing
from qaa_serve.circuits.triton.host import shapes


def test_a_mixed_batch_gets_what_each_adapter_gives() -> None:
    """Base, LoRA, four kinds of circuits, a slot without any; and rows behind the step's, which are not finite."""
    generator = fresh_generator()
    of_slot = adapters(generator)
    slots = [-1, 0, 2, 1, 5, 4, 0, -1, 3, 2]
    x = torch.randn(len(slots) + 3, WIDTH, generator=generator).half()
    x[len(slots) :] = float("nan")
    layer = filled(generator, Layer())
    again = slots[::-1]
    first, none, second = triton_interpreter.call(run_static, layer, x, slots, of_slot, again)
    right = 1 + updates(layer, x, slots, of_slot)
    torch.testing.assert_close(first[: len(slots)].double(), right[: len(slots)], rtol=2e-3, atol=2e-3)
    assert (first[[0, 7]] == 1).all(), "the base's rows are not touched"
    assert (first[len(slots) :] == 1).all(), "nor what fills up a batch"
    assert (none == 1).all()
    del of_slot[0]
    right = 1 + updates(layer, x, again, of_slot)
    torch.testing.assert_close(second[: len(slots)].double(), right[: len(slots)], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("adds", [True, False])
def test_circuits_see_the_whole_input_of_a_row_parallel_layer_and_one_rank_adds(adds: bool) -> None:
    generator = fresh_generator()
    of_slot = adapters(generator)
    slots = [0, 1, 5, -1]
    whole = torch.randn(len(slots), WIDTH, generator=generator).half()
    layer = filled(generator, Layer(whole, adds))
    x = whole[:, WIDTH // 2 :].contiguous()
    output = triton_interpreter.call(run_static, layer, x, slots, of_slot, slots)[0]
    right = 1 + updates(layer, x, slots, of_slot, with_circuits=adds)
    torch.testing.assert_close(output.double(), right, rtol=2e-3, atol=2e-3)


class Recorder:
    """Stands for the kernel and for vLLM's, and notes what is launched."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.token_mapping_meta = SimpleNamespace(
            no_lora_flag_cpu=torch.tensor([False]), token_lora_mapping=torch.empty(64, device="meta")
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.calls.append(grid)

    def add_shrink(self, z: torch.Tensor, *_: object) -> None:
        self.calls.append("shrink")

    def add_expand(self, *_: object, **__: object) -> None:
        self.calls.append("expand")


def test_what_is_launched_depends_on_shapes_alone() -> None:
    """On tensors without memory: whatever looked at a number, or waited for one, would raise."""
    layer = Layer()
    block = Block([layer], SLOTS, RANK, 8, CPU)
    block.rows = block.rows.to("meta")
    recorder = layer.punica_wrapper = Recorder()
    for stacked in ("lora_a_stacked", "lora_b_stacked"):
        setattr(layer, stacked, tuple(part.to("meta") for part in getattr(layer, stacked)))
    delta = StaticDelta(layer, block)
    delta._kernel = recorder
    x = torch.empty(7, WIDTH, dtype=torch.bfloat16, device="meta")
    delta.add(x, torch.empty(7, sum(SLICES), dtype=torch.bfloat16, device="meta"))
    assert recorder.calls == ["shrink", (7, 2), "expand"]


def test_all_that_a_step_launches_is_compiled_at_the_start() -> None:
    """In every shape of launches, once for layers alike."""
    block, recorder = Block([Layer(), Layer()], SLOTS, RANK, 8, CPU), Recorder()
    block.compile(recorder, torch.bfloat16)
    assert recorder.calls == [(1, 1)] * len(shapes(5))


def test_what_there_is_no_room_for_is_refused_with_the_remedy() -> None:
    generator = fresh_generator()
    layer = Layer()
    block = Block([layer], SLOTS, RANK, 2, CPU)
    form = CircuitForm(Ansatz("ryrz_ring_ry", 16, 9), 1)
    with pytest.raises(AdapterError, match=r"9 layers.*there is room for.*--qaa-max-layers 2, start it with more"):
        block.pack(form, {layer: LayerCircuits({0: random_theta(generator, 1, form.ansatz(5))}, Standard())})
    wide = CircuitForm(Ansatz("ry_ring", 16, 1, constant=True), 1)
    remedies = r"24 of the layer's input, so 6 qubits.*for 5 qubits.*--qaa-backend cuquantum or torch, or train"
    with pytest.raises(AdapterError, match=remedies):
        block.pack(wide, {layer: LayerCircuits({0: random_theta(generator, 1, wide.ansatz(6))}, Standard())})


@pytest.fixture
def triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    missing.cache_clear()
    yield
    missing.cache_clear()


def manager(backend: str, ranks: int = 1) -> tuple[Any, Any]:
    """A model manager with one layer, which has chosen; and the compilation's config."""
    compilation = SimpleNamespace(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        splitting_ops=["vllm::unified_attention"],
    )
    config = SimpleNamespace(
        compilation_config=compilation,
        additional_config={"qaa_backend": backend, "qaa_max_layers": 3},
        parallel_config=SimpleNamespace(world_size=ranks),
    )
    manager = QAAModelManager.__new__(QAAModelManager)
    manager.device, manager._bound = "cpu", [Layer()]
    manager.lora_config = SimpleNamespace(max_loras=SLOTS, max_lora_rank=RANK)
    manager._give_deltas(config)
    return manager, compilation


@pytest.mark.usefixtures("triton_on_a_cpu")
def test_with_triton_graphs_stay_whole_and_room_is_made_at_once() -> None:
    made, compilation = manager("triton")
    assert isinstance(made._bound[0].delta, StaticDelta)
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert compilation.splitting_ops == ["vllm::unified_attention"]
    assert made.circuit_bytes() == made.circuits.rows.nbytes > 0
    assert made.circuits.rows.shape[0] == SLOTS
    assert not made.circuits.rows.is_inference()


@pytest.mark.usefixtures("triton_on_a_cpu")
def test_all_ranks_take_the_first_ones_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, where each has timed for itself, they might gather x at unlike times."""
    first = SimpleNamespace(broadcast_object=lambda mine: mine._replace(name="torch"))
    monkeypatch.setattr("vllm_qaa.backend.get_world_group", lambda: first)
    made, _ = manager("triton", ranks=2)
    assert isinstance(made.circuits, PlannedCircuits)


def test_other_backends_have_no_block() -> None:
    made, compilation = manager("torch")
    assert isinstance(made.circuits, PlannedCircuits)
    assert not isinstance(made._bound[0].delta, StaticDelta)
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE  # of a CPU nothing is split
