"""What the worker refuses before it reads an adapter's weights, and what it leaves alone on a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.lora.request import LoRARequest
from vllm_qaa import layers
from vllm_qaa.backend import check_gpu, split_graphs_at_delta
from vllm_qaa.delta import Standard
from vllm_qaa.layers import DELTA_OP, QAALayerMixin
from vllm_qaa.manager import Place, QAAModelManager
from vllm_qaa.worker import QAAWorkerManager, _check_qaa

from qaa_serve.adapters import AdapterConfig, AdapterError, ModuleWeights, save_adapter


@pytest.fixture
def adapter(tmp_path):
    config = AdapterConfig(base_model_name_or_path="base", target_modules=("q_proj",))
    weights = ModuleWeights(torch.zeros(1, *config.circuit(3).theta_shape), torch.zeros(8, 3))
    save_adapter(tmp_path / "adapter", config, {"model.layers.0.self_attn.q_proj": weights})
    return tmp_path / "adapter"


def manager(**settings):
    manager = QAAWorkerManager.__new__(QAAWorkerManager)
    manager._staged, manager._preparing = {}, threading.Lock()
    defaults = {"fully_sharded_loras": False, "enable_tower_connector_lora": False, "max_lora_rank": 16}
    manager.lora_config = SimpleNamespace(**(defaults | settings))
    return manager


@pytest.mark.parametrize("setting", ["fully_sharded_loras", "enable_tower_connector_lora"])
def test_settings_that_bypass_the_delta_are_refused_by_name(adapter, setting):
    with pytest.raises(AdapterError, match=f"--{setting.replace('_', '-')}: start the server without"):
        manager(**{setting: True})._load_adapter(LoRARequest("a", 1, str(adapter)))


def test_the_dual_stream_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", True, raising=False)
    with pytest.raises(AdapterError, match="VLLM_LORA_ENABLE_DUAL_STREAM"):
        manager()._load_adapter(LoRARequest("a", 1, str(adapter)))


def test_loading_in_place_is_refused(adapter):
    with pytest.raises(AdapterError, match="every step"):
        manager()._load_adapter(LoRARequest("a", 1, str(adapter), load_inplace=True))


def test_a_rank_above_the_servers_is_refused(adapter):
    with pytest.raises(AdapterError, match=r"rank 3 .* larger --max-lora-rank"):
        manager(max_lora_rank=1)._load_adapter(LoRARequest("a", 1, str(adapter)))


def test_a_reading_that_hangs_keeps_no_other_one_waiting(monkeypatch):
    """Nor the process's end: its thread is a daemon. And none takes the steps' cores."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # as vLLM's CPU worker does
    reading, go = [], threading.Event()

    class Reader(QAAWorkerManager):
        def __init__(self):
            self._staged = {}

        def _read_adapter(self, request):
            reading.append((request.lora_int_id, threading.current_thread().daemon, torch.get_num_threads()))
            if request.lora_int_id == 1:
                go.wait(30)
            if request.lora_int_id == 2:
                raise AdapterError("broken")
            return SimpleNamespace(loras={"x": SimpleNamespace(lora_a=torch.zeros(4), lora_b=torch.zeros(2))})

        def add_adapter(self, request):
            taken[request.lora_int_id] = self._load_adapter(request)

    taken, reader = {}, Reader()
    reader._adapter_manager = SimpleNamespace(get_adapter=taken.get)
    for number in (1, 2, 3, 4):
        reader.stage(LoRARequest(f"a{number}", number, "/nowhere"))
    wait([reader._staged[number][1] for number in (2, 3, 4)], timeout=30)
    assert reader.take_over([1, 2, 3]) == ([None, "broken", 24], False)
    assert list(taken) == [3]
    # Asked again, since another worker has not read it yet.
    assert reader.take_over([3]) == ([24], False)
    assert sorted(reading) == [(number, True, 1) for number in (1, 2, 3, 4)]
    # One that is past its time is taken over the next time, and told so; one that was removed, never.
    with monkeypatch.context() as patched:
        patched.setattr("vllm_qaa.worker._TAKE_OVER_S", -1)
        assert reader.take_over([1, 4]) == ([None, None], True)
    del reader._staged[4]
    go.set()
    wait([reader._staged[1][1]], timeout=30)
    assert reader.take_over([1, 4]) == ([24, "it was removed while it was loaded"], False)
    assert reader._staged == {}


def test_adapters_are_prepared_one_at_a_time_but_none_waits_for_one_that_hangs(adapter, monkeypatch):
    """Else the readers would take turns with each other, and the engine's steps get the smallest share."""
    monkeypatch.setattr("vllm_qaa.worker._TURN_S", 30)
    preparing, most, hangs, go = 0, 0, threading.Event(), threading.Event()

    def prepare(self, request, parsed):
        nonlocal preparing, most
        preparing += 1
        most = max(most, preparing)
        if request.lora_int_id == 9:
            hangs.set()
            go.wait(30)
        preparing -= 1

    monkeypatch.setattr(QAAWorkerManager, "_make_qaa", prepare)
    reader = manager()

    def read(numbers):
        for number in numbers:
            reader.stage(LoRARequest(f"a{number}", number, str(adapter)))
        return [reader._staged[number][1] for number in numbers]

    assert wait(read(range(1, 9)), timeout=30).not_done == set()
    assert most == 1
    (stuck,) = read([9])
    hangs.wait(30)
    monkeypatch.setattr("vllm_qaa.worker._TURN_S", 0.01)
    assert wait(read([10, 11]), timeout=30).not_done == set()
    go.set()
    stuck.result(30)


def test_modules_that_read_one_input_embed_the_same(adapter):
    """Three slices of a packed layer: q and v are adapted, v with other offsets and scales than q."""
    theta, b = torch.zeros(1, 5, 3), torch.zeros(8, 3)
    same, other = torch.randn(2, 8), torch.randn(2, 8)
    q = ModuleWeights(theta, b, same, torch.randn(2, 3))
    v = ModuleWeights(theta, b, same, torch.randn(2, 3))
    standard = Standard().with_module("q_proj", q, 0, 3).with_module("v_proj", v, 2, 3)
    assert torch.equal(standard.inputs, same)
    assert torch.equal(standard.readouts[:, 0], q.readouts)
    assert torch.equal(standard.readouts[:, 1], torch.zeros(2, 3))  # without circuits z stays 0
    assert torch.equal(standard.readouts[:, 2], v.readouts)
    with pytest.raises(AdapterError, match="'v_proj' has other qaa_inputs than another module"):
        Standard().with_module("q_proj", q, 0, 3).with_module("v_proj", replace(v, inputs=other), 2, 3)


def test_a_layer_outside_the_language_model_is_refused():
    """It keeps vLLM's branch, which knows no circuits: its requests would be answered without them, silently."""
    tower = QAALayerMixin.__new__(QAALayerMixin)
    config = AdapterConfig(base_model_name_or_path="base", target_modules=("fc1",))
    weights = ModuleWeights(torch.zeros(1, 5, 3), torch.zeros(8, 3))
    with pytest.raises(AdapterError, match=r"'vision\.fc1' is outside the language model"):
        _check_qaa("vision.fc1", config, weights, Place(tower))


def test_files_that_are_not_those_of_the_name_are_refused(adapter):
    for digest in ("0" * 12, "0" * 64):
        with pytest.raises(AdapterError, match="its files are not those of a@0"):
            manager()._load_adapter(LoRARequest(f"a@{digest}", 1, str(adapter)))


def graphs(mode, cudagraph_mode, splitting_ops):
    compilation = SimpleNamespace(mode=mode, cudagraph_mode=cudagraph_mode, splitting_ops=splitting_ops)
    return SimpleNamespace(compilation_config=compilation), compilation


def test_cuda_graphs_are_split_at_the_delta():
    config, compilation = graphs(
        CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE, ["vllm::unified_attention"]
    )
    split_graphs_at_delta(config)
    split_graphs_at_delta(config)
    assert compilation.splitting_ops == ["vllm::unified_attention", DELTA_OP]
    assert compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE


def test_without_compilation_there_are_no_cuda_graphs():
    config, compilation = graphs(CompilationMode.NONE, CUDAGraphMode.FULL, [])
    split_graphs_at_delta(config)
    assert compilation.cudagraph_mode == CUDAGraphMode.NONE


def test_what_vllm_does_not_compile_breaks_out_of_its_graphs_where_it_can(monkeypatch):
    """As models do that vLLM captures without compiling: the delta runs between two parts of the capture."""
    breakable = pytest.importorskip("vllm.compilation.breakable_cudagraph", reason="this vLLM has no such graphs")
    monkeypatch.setattr(breakable, "is_breakable_cudagraph_enabled", lambda: True)
    config, compilation = graphs(CompilationMode.NONE, CUDAGraphMode.FULL, [])
    try:
        split_graphs_at_delta(config)
        assert compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE
        assert layers._delta is not layers._add_delta
        assert layers._delta.__wrapped__ is layers._add_delta
    finally:
        layers._delta = layers._add_delta


def on_gpu(dtype, rank, monkeypatch, capability=(9, 0), version="0.32.0"):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("vllm.__version__", version)
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        model_config=SimpleNamespace(dtype=dtype),
        lora_config=SimpleNamespace(max_lora_rank=rank),
    )


def test_what_vllms_kernels_for_gpus_cannot_do_is_refused_at_the_start(monkeypatch):
    with pytest.raises(ValueError, match=r"16-bit numbers.*found torch.float32.*--dtype bfloat16"):
        check_gpu(on_gpu(torch.float32, 16, monkeypatch))
    with pytest.raises(ValueError, match=r"--max-lora-rank 64 is not safe on this GPU with vLLM 0\.32\.0"):
        check_gpu(on_gpu(torch.bfloat16, 64, monkeypatch))
    check_gpu(on_gpu(torch.bfloat16, 32, monkeypatch))
    check_gpu(on_gpu(torch.bfloat16, 64, monkeypatch, capability=(8, 0)))
    check_gpu(on_gpu(torch.float16, 512, monkeypatch, version="0.33.0"))


def test_make_serve_starts_the_example_in_16_bits_on_a_gpu():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "SERVE_ARGS_cuda := --dtype bfloat16" in makefile
    assert "float32" not in makefile.partition("SERVE_ARGS :=")[2].partition("SERVE_ENV_cpu")[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("model.layers.0.self_attn.k_proj", "language_model.model.layers.0.self_attn.k_proj"),
        ("model.norm", "language_model.norm"),
        ("language_model.model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("model.layers.9.mlp.down_proj", "model.layers.9.mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("multimodal", [True, False])
def test_an_adapter_of_the_text_model_fits_the_multimodal_one(name, found, multimodal):
    attention = "language_model.model.layers.0.self_attn."
    manager = SimpleNamespace(
        supports_mm=multimodal,
        mm_mapping=SimpleNamespace(language_model=["language_model."]),
        modules={
            "language_model.model.layers.0.mlp.down_proj": 0,
            f"{attention}qkv_proj": 1,
            "language_model.norm": 2,
        },
        packed_modules={f"{attention}qkv_proj": [f"{attention}{part}_proj" for part in "qkv"]},
    )
    assert QAAModelManager.full_name(manager, name) == (found if multimodal else name)
