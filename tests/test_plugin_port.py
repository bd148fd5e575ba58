"""The patch table: what it checks before it changes vLLM, and that it changes all or nothing."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import types
from dataclasses import replace

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.lora.utils as lora_utils
import vllm.v1.sample.sampler as sampler
import vllm.v1.worker.lora_model_runner_mixin as runner_mixin
from safetensors.torch import save_file
from server_process import gone
from vllm.lora.layers import ColumnParallelLinearWithLoRA, FusedMoEWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm_qaa import port, register
from vllm_qaa.layers import QAALayerMixin, qaa_subclass
from vllm_qaa.weights_file import open_weights
from vllm_qaa.worker import QAAWorkerManager


@pytest.fixture(autouse=True)
def patched_afterwards():
    yield
    port.undo()
    register()


def test_register_twice_patches_once():
    register()
    first = lora_utils._all_lora_classes
    register()
    assert lora_utils._all_lora_classes is first
    assert runner_mixin.LRUCacheWorkerLoRAManager is QAAWorkerManager
    assert sum(issubclass(cls, QAALayerMixin) for cls in first) == 7


def test_loading_a_lora_again_and_again_leaves_nothing_behind(tmp_path):
    """By safetensors' own reader two objects stay of each tensor."""
    names = [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight"
        for i in range(16)
        for side in "AB"
    ]
    save_file(
        {name: torch.full((4, 4), i / 4) for i, name in enumerate(names)}, tmp_path / "adapter_model.safetensors"
    )
    helper = PEFTHelper(r=4, lora_alpha=4, target_modules=["q_proj"])

    def load():
        return LoRAModel.from_local_checkpoint(str(tmp_path), {"q_proj"}, helper, lora_model_id=1, device="cpu")

    register()
    for _ in range(5):
        loaded = load()
    assert loaded.loras["model.layers.15.self_attn.q_proj"].lora_a.unique().tolist() == [30 / 4]
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(20):
        load()
    gc.collect()
    assert sys.getallocatedblocks() - before < 20 * len(names)


def test_a_file_is_read_as_safetensors_reads_it(tmp_path):
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.float64),
        "a": torch.randn(7).to(torch.bfloat16),
        "ä": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
        "float8": torch.ones(9).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    with open_weights(str(tmp_path / "file"), framework="pt") as file:
        assert {*file.keys()} == {*tensors}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.float(), tensor.float())


def test_a_forked_engine_ends_with_its_server():
    """vLLM forks where the device is a GPU, and does not load a plugin again that is loaded."""
    server = """
import os, time, vllm_qaa
vllm_qaa._end_with_parent(), vllm_qaa._end_with_parent()  # as register() does in server and engine
if pid := os.fork():
    print(pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", server], env=os.environ | {"QAA_SERVE": "1"}, stdout=subprocess.PIPE, text=True
    )
    engine = psutil.Process(int(process.stdout.readline()))
    assert engine.is_running()
    process.kill()
    process.wait()
    assert gone([engine]) == []


def test_undo_gives_vllm_its_own_classes_back():
    register()
    port.undo()
    assert not any(issubclass(cls, QAALayerMixin) for cls in lora_utils._all_lora_classes)
    assert runner_mixin.LRUCacheWorkerLoRAManager.__module__ == "vllm.lora.worker_manager"


def test_the_order_of_the_classes_stays():
    port.undo()
    before = lora_utils._all_lora_classes
    register()
    after = lora_utils._all_lora_classes
    assert [cls.__name__.removeprefix("QAA") for cls in after] == [cls.__name__ for cls in before]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM's compiled function stays")
def test_logprobs_on_a_cpu_call_no_compiler():
    register()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(3, 50)
    counts = sampler.batched_count_greater_than(x, x[:, :1])
    assert counts.tolist() == [(row >= row[0]).sum().item() for row in x]
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
def test_other_versions_are_refused(version):
    with pytest.raises(port.UnsupportedVLLMError, match=rf"vllm>=0.26,<0.34; found vLLM {version}"):
        port.check_version(version)


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.32.0", "0.32.1.dev3+g1234", "0.32.0+cpu", "0.33.0", "0.33.1+cu130"]
)
def test_supported_versions_pass(version):
    port.check_version(version)
    assert port.MIN_VERSION < port.END_VERSION


def fake_module(**attributes):
    module = types.ModuleType("fake_vllm")
    module.__dict__.update(attributes)
    return module


def test_a_changed_signature_is_named(monkeypatch):
    class Changed:
        def set_lora(self, slot, lora_a, lora_b): ...

    seam = replace(
        port.SEAMS[0],
        module="fake_vllm",
        attribute="classes",
        methods={"Changed.set_lora": ("self", "index", "lora_a"), "Changed.gone": ("self",)},
    )
    monkeypatch.setitem(__import__("sys").modules, "fake_vllm", fake_module(classes=(), Changed=Changed))
    problems = port.check_seam(seam)
    assert any("set_lora takes ('self', 'slot', 'lora_a', 'lora_b'), expected" in p for p in problems)
    assert any("has no Changed.gone" in p for p in problems)


def test_one_bad_seam_leaves_everything_as_it_was(monkeypatch):
    port.undo()
    original = lora_utils._all_lora_classes
    broken = replace(port.SEAMS[1], attribute="NoSuchManager")
    monkeypatch.setattr(port, "SEAMS", (port.SEAMS[0], broken))
    with pytest.raises(port.UnsupportedVLLMError, match="NoSuchManager"):
        port.apply()
    assert lora_utils._all_lora_classes is original


def test_classes_that_bypass_the_delta_are_left_alone():
    assert qaa_subclass(FusedMoEWithLoRA) is FusedMoEWithLoRA
    assert qaa_subclass(VocabParallelEmbeddingWithLoRA) is VocabParallelEmbeddingWithLoRA
    assert issubclass(qaa_subclass(ColumnParallelLinearWithLoRA), QAALayerMixin)


def test_the_servers_globals_are_checked_and_replaced_for_a_while(monkeypatch):
    for seam in port.SERVER_SEAMS:
        module = importlib.import_module(seam.module)
        original = getattr(module, seam.attribute)
        port.check_server()
        with port.replaced(seam.attribute, "another"):
            assert getattr(module, seam.attribute) == "another"
        assert getattr(module, seam.attribute) is original
        with monkeypatch.context() as patch:
            patch.delattr(module, seam.attribute)
            with pytest.raises(port.UnsupportedVLLMError, match=seam.attribute):
                port.check_server()
