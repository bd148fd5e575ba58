"""Real vLLM against transformers with reference circuits: in a mixed batch every request gets its own adapter.

Each engine has fewer slots than adapters, chunked prefill and the prefix cache. Greedy tokens must be those of
the plain model and log-probabilities may differ by 1e-4.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from safetensors.torch import load_file, save_file
from tiny_models import ATTENTION, MLP, VOCAB, ReferenceModel, make_lora, make_model, make_qaa
from vllm import LLM, SamplingParams
from vllm.compilation.backends import split_graph
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.forward_context import set_forward_context
from vllm.lora.request import LoRARequest
from vllm_qaa import register
from vllm_qaa.layers import DELTA_OP, QAALayerMixin
from vllm_qaa.plan import make_plan
from vllm_qaa.planned import PlannedDelta

from qaa_serve.adapters import WEIGHTS_FILE, Adapter

TOLERANCE = 1e-4  # |d logprob|, float32
SLOTS = 2
PREFILL_CHUNK = 64


@dataclass
class Served:
    """An engine, its adapters, and the plain model to compare with."""

    llm: LLM
    architecture: str
    root: Path
    reference: ReferenceModel
    adapters: dict[str | None, Adapter | Path | None]
    ids: dict[str, int] = field(default_factory=dict)

    def request(self, name: str | None) -> LoRARequest | None:
        if name is None:
            return None
        return LoRARequest(name, self.ids.setdefault(name, 100 + len(self.ids)), str(self.root / name))

    def generate(self, requests: list[tuple[str | None, list[int]]], max_tokens: int = 12):
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in requests],
            parameters,
            lora_request=[self.request(name) for name, _ in requests],
            use_tqdm=False,
        )
        return [
            (list(o.outputs[0].token_ids), [next(iter(p.values())).logprob for p in o.outputs[0].logprobs])
            for o in outputs
        ]

    def check(self, requests: list[tuple[str | None, list[int]]], max_tokens: int = 12) -> None:
        for (name, prompt), (tokens, logprobs) in zip(requests, self.generate(requests, max_tokens), strict=True):
            expected = self.reference.logprobs(self.adapters[name], prompt + tokens)[len(prompt) - 1 : -1]
            assert tokens == expected.argmax(-1).tolist(), f"{name}: other tokens than the reference"
            chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            error = (torch.tensor(logprobs) - chosen).abs().max().item()
            assert error <= TOLERANCE, f"{name}: log-probability off by {error:.2e}"

    def check_prompts(self, requests: list[tuple[str | None, list[int]]]) -> None:
        """Log-probabilities over a prompt: of its own tokens, and of the likeliest ones in their places."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in requests],
            SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1),
            lora_request=[self.request(name) for name, _ in requests],
            use_tqdm=False,
        )
        for (name, prompt), output in zip(requests, outputs, strict=True):
            first, *places = output.prompt_logprobs
            assert first is None
            expected = self.reference.logprobs(self.adapters[name], prompt)[:-1]
            likeliest = [max(found.logprob for found in place.values()) for place in places]
            error = (torch.tensor(likeliest) - expected.max(-1).values).abs().max().item()
            assert error <= TOLERANCE, f"{name}: log-probability over the prompt off by {error:.2e}"
            own = [place[token].logprob for place, token in zip(places, prompt[1:], strict=True)]
            chosen = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            # Random tokens are unlikely ones, e^-10 and less, and rounding errors grow with the numbers.
            torch.testing.assert_close(torch.tensor(own), chosen, rtol=TOLERANCE / 4, atol=TOLERANCE)

    @property
    def manager(self):
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def start(root: Path, architecture: str) -> Served:
    register()
    base = make_model(root / "base", architecture)
    attention, mlp = ATTENTION[architecture], MLP[architecture]
    adapters: dict[str | None, Adapter | Path | None] = {
        None: None,
        "attention": make_qaa(root / "attention", base, attention, 1),
        "everything": make_qaa(root / "everything", base, attention + mlp, 2, 0.5, ansatz="ry_ring", layers=3),
        "some": make_qaa(
            root / "some", base, (attention[0], attention[2], mlp[-1]), 3,
            ansatz="strongly_entangling", layers=1, heads=2, weight_dtype=torch.bfloat16,
        ),
        "lora": make_lora(root / "lora", base, attention + mlp, 4),
        "lora-some": make_lora(root / "lora-some", base, (attention[0], attention[2], mlp[0]), 6, rank=7),
        "options": make_qaa(
            root / "options", base, attention + mlp, 5, size=0.5, constant=True, length=True, readouts=11
        ),
        "vectors": make_qaa(root / "vectors", base, (attention[1],), 9, size=0.5, vectors=True),
        "centred": make_qaa(
            root / "centred", base, attention + mlp, 7, size=2, inputs="centred-rms", whitened=True, heads=2
        ),
        "rms": make_qaa(root / "rms", base, (attention[1], mlp[-1]), 8, size=0.5, inputs="rms", length=True),
    }  # fmt: skip
    llm = LLM(
        str(base), dtype="float32", enable_lora=True, max_loras=SLOTS, max_cpu_loras=16, max_lora_rank=32,
        max_model_len=256, max_num_seqs=20, max_num_batched_tokens=PREFILL_CHUNK, enable_chunked_prefill=True,
        enable_prefix_caching=True, enforce_eager=True, kv_cache_memory_bytes=32 << 20, seed=0,
    )  # fmt: skip
    return Served(llm, architecture, root, ReferenceModel(base), adapters)


@pytest.fixture(scope="module", params=["llama", "qwen2", "opt"])
def served(request, tmp_path_factory):
    served = start(tmp_path_factory.mktemp(request.param), request.param)
    yield served
    del served.llm
    gc.collect()
    cleanup_dist_env_and_memory()


def test_twenty_mixed_requests_are_exact(served):
    """Base, 7 QAA adapters of different ansatz, depth, options and modules, and 2 of LoRA, in 2 slots."""
    names = list(served.adapters)
    served.check([(names[i % len(names)], prompt(1 + (i * 17) % 60, i)) for i in range(20)])


def test_the_adapters_matter(served):
    """Else the comparison above would show nothing."""
    same = prompt(20, 99)
    answers = [tuple(tokens) for tokens, _ in served.generate([(name, same) for name in served.adapters])]
    assert len(set(answers)) == len(answers)


def test_base_stays_base_when_every_slot_is_taken(served):
    names = ["everything", None, "lora", None]
    served.check([(names[i % 4], prompt(5 + i, 200 + i)) for i in range(8)])


def test_only_base_requests(served):
    served.check([(None, prompt(9, 300)), (None, prompt(30, 301))])


def test_prompts_longer_than_a_prefill_chunk(served):
    length = 2 * PREFILL_CHUNK + 7
    served.check([(name, prompt(length, 400)) for name in ("attention", None, "some")], max_tokens=6)


def test_prompt_log_probabilities_of_mixed_requests(served):
    """Rows that are not sampled: vLLM's own layer for output heads ends the engine here."""
    names = list(served.adapters)
    served.check_prompts([(names[i % len(names)], prompt(2 + (i * 17) % 40, 1000 + i)) for i in range(20)])
    served.check_prompts([("some", prompt(2 * PREFILL_CHUNK + 7, 1100)), (None, prompt(9, 1101))])


def test_a_seed_gives_the_same_tokens_however_the_prompt_runs(served):
    """In three parts, and once most of it is in the prefix cache, in one. vLLM's own runner ends the engine."""
    long = prompt(2 * PREFILL_CHUNK + 20, 1200)  # of which one block of 128 tokens is cached

    def sampled():
        parameters = SamplingParams(temperature=1, seed=5, max_tokens=12, ignore_eos=True)
        (output,) = served.llm.generate(
            {"prompt_token_ids": long}, parameters, lora_request=served.request("some"), use_tqdm=False
        )
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    (cached, first), (cached_later, again) = sampled(), sampled()
    assert (cached, cached_later) == (0, 2 * PREFILL_CHUNK)
    assert first == again


def test_the_prefix_cache_keeps_adapters_apart(served):
    """The same long prompt for all, twice: the second round is answered from the cache."""
    long = prompt(PREFILL_CHUNK * 3, 500)
    requests = [(name, [*long, 7, 8]) for name in (None, "attention", "centred", "some", "lora", "lora-some")]
    served.check(requests, max_tokens=4)
    served.check(requests, max_tokens=4)


def test_an_adapter_that_cannot_be_activated_gives_its_slot_back(served, monkeypatch):
    """Else it would pass for active, and its requests be answered without circuits."""
    served.check([("attention", prompt(5, 800))])
    served_id, manager = served.ids["attention"], served.manager
    manager.deactivate_adapter(served_id)

    def fail(*_):
        raise torch.OutOfMemoryError("no room for circuits")

    with monkeypatch.context() as patched:
        patched.setattr(manager.circuits, "put", fail)
        with pytest.raises(torch.OutOfMemoryError):
            manager.activate_adapter(served_id)
    assert served_id not in manager.lora_index_to_id
    assert served_id not in manager._active_adapters
    served.check([("attention", prompt(5, 801)), ("some", prompt(7, 802))])


@pytest.mark.parametrize("before", ["lora", "everything"])
@pytest.mark.parametrize("after", ["attention", "lora-some"])
def test_a_slot_has_nothing_left_of_the_adapter_before(served, before, after):
    """On a GPU what is stacked is used for every token of a slot, whatever kind its adapter is of."""
    served.check([(name, prompt(5, 805)) for name in (before, after)])
    manager = served.manager
    for lora_id in filter(None, list(manager.lora_index_to_id)):
        manager.deactivate_adapter(lora_id)
    layers = [layer for layer in manager.modules.values() if isinstance(layer, QAALayerMixin)]

    def stacked(name):
        manager.activate_adapter(served.ids[name])
        slot = manager.lora_index_to_id.index(served.ids[name])
        manager.deactivate_adapter(served.ids[name])
        return [part[slot] for layer in layers for part in (*layer.lora_a_stacked, *layer.lora_b_stacked)]

    with torch.inference_mode():
        for part in stacked(after):
            part.zero_()
        expected = [part.clone() for part in stacked(after)]
        stacked(before)
        found = stacked(after)
    assert any(part.any() for part in expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", [("attention", "everything"), ("everything", "attention")])
def test_adapters_of_one_step_do_not_put_each_other_out(served, monkeypatch, order):
    """Two slots, both taken, of which a step needs the one that was used longest ago, and a new one."""
    for name in ("attention", "everything", "options"):
        served.check([(name, prompt(5, 810))])
    manager = served.manager
    for lora_id in filter(None, list(manager.lora_index_to_id)):
        manager.deactivate_adapter(lora_id)
    for name in ("everything", "options"):
        manager.activate_adapter(served.ids[name])
    slot = manager.lora_index_to_id.index(served.ids["everything"])
    filled, layer = [], next(layer for layer in manager.modules.values() if isinstance(layer, QAALayerMixin))
    original = layer.set_lora
    monkeypatch.setattr(layer, "set_lora", lambda index, *rest: (filled.append(index), original(index, *rest)))
    worker = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    worker._apply_adapters(dict.fromkeys(map(served.request, order)))
    assert manager.lora_index_to_id[slot] == served.ids["everything"]
    assert filled == [1 - slot]


def test_one_token_prompts_of_one_adapter(served):
    served.check([("attention", prompt(1, 600 + i)) for i in range(7)])


def test_the_folder_of_a_loaded_adapter_may_vanish(served, tmp_path):
    """Slots are fewer than adapters, so each is activated anew: from memory, not from disk."""
    shutil.copytree(served.root / "some", served.root / "vanishing")
    served.adapters["vanishing"] = served.adapters["some"]
    request = [("vanishing", prompt(12, 700))]
    served.check(request)
    shutil.rmtree(served.root / "vanishing")
    others = [(name, prompt(6, 701)) for name in ("attention", "everything", "lora")]
    served.check(others)
    served.check(request)
    del served.adapters["vanishing"]


def damaged(served: Served, source: str, change) -> LoRARequest:
    """A copy of an adapter with changed tensors (or config), as a request with an id of its own."""
    directory = served.root / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(served.root / source, directory)
    tensors = load_file(directory / WEIGHTS_FILE)
    config = json.loads((directory / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("damaged", 999, str(directory))


def first(tensors, suffix):
    return next(name for name in sorted(tensors) if name.endswith(suffix))


def cut_rows(suffix):
    def change(tensors, _config):
        tensors[first(tensors, suffix)] = tensors[first(tensors, suffix)][:-1].contiguous()

    return change


def add_rows(suffix):
    def change(tensors, _config):
        old = tensors[first(tensors, suffix)]
        tensors[first(tensors, suffix)] = torch.cat([old, old[:1]])

    return change


def other_module(tensors, config):
    for name in list(tensors):
        tensors[name.replace(".layers.0.", ".layers.7.")] = tensors.pop(name)


def higher_rank(tensors, config):
    config["heads"] = 6
    for name in list(tensors):
        if name.endswith("theta"):
            tensors[name] = tensors[name].expand(6, *tensors[name].shape).contiguous()
        else:
            tensors[name] = tensors[name].repeat(1, 6).contiguous()


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("attention", cut_rows("qaa_weight"), "made for another base"),
        ("attention", add_rows("qaa_weight"), "made for another base"),
        ("attention", other_module, r"no adaptable layer .*layers\.7"),
        ("attention", higher_rank, "larger --max-lora-rank"),
        ("lora", cut_rows("lora_B.weight"), "made for another base"),
        ("lora", add_rows("lora_B.weight"), "made for another base"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_else_is_disturbed(served, source, change, message):
    with pytest.raises(ValueError, match=message):
        served.llm.llm_engine.add_lora(damaged(served, source, change))
    assert 999 not in served.llm.llm_engine.list_loras()
    served.check([("attention", prompt(8, 800)), (None, prompt(8, 801)), ("lora", prompt(8, 802))], max_tokens=4)


def test_lora_on_embeddings_is_refused_on_a_cpu(served):
    """vLLM's CPU kernels would give the last slot's embedding update to base requests too: none are made."""
    assert not [name for name in served.manager.modules if "embed" in name]

    def add_embedding(tensors, config):
        width = served.reference.model.config.hidden_size
        prefix = "base_model.model.model." + ("decoder." if "decoder" in first(tensors, "weight") else "")
        tensors[f"{prefix}embed_tokens.lora_embedding_A"] = torch.zeros(4, VOCAB)
        tensors[f"{prefix}embed_tokens.lora_embedding_B"] = torch.zeros(width, 4)
        config["target_modules"] = [*config["target_modules"], "embed_tokens"]

    with pytest.raises(ValueError, match="embed_tokens"):
        served.llm.llm_engine.add_lora(damaged(served, "lora", add_embedding))


def test_lora_on_the_output_head_is_refused_by_name(served):
    def add_head(tensors, config):
        width = served.reference.model.config.hidden_size
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, width)
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(VOCAB, 4)
        config["target_modules"] = [*config["target_modules"], "lm_head"]

    with pytest.raises(ValueError, match=r"output head 'lm_head' cannot be served.* out of target_modules"):
        served.llm.llm_engine.add_lora(damaged(served, "lora", add_head))


# --- the layer itself, taken from the running engine ---------------------------------------------------------


def activate(served: Served, *names: str) -> list[int]:
    """Load adapters into slots; returns their ids."""
    requests = [served.request(name) for name in names]
    for request in requests:
        served.llm.llm_engine.add_lora(request)  # takes a slot only if one is free, as a step does anyhow
        served.manager.activate_adapter(request.lora_int_id)
    return [request.lora_int_id for request in requests]


def plan_for(served: Served, ids: list[int]):
    manager = served.manager
    return make_plan(ids, manager.lora_index_to_id, manager._forms, torch.device("cpu"))


@pytest.mark.parametrize("pattern", ["prefill", "decode", "skewed"])
def test_the_gpu_path_adds_what_the_cpu_path_adds(served, pattern):
    """z through vLLM's shrink and expand (its torch kernels here) against the products by slot."""
    qaa, lora = activate(served, "everything", "lora")
    # Every token has an adapter: with -1 among the indices vLLM's CPU kernels are wrong (DESIGN: traps).
    ids = {"prefill": [qaa] * 9 + [lora] * 4, "decode": [qaa, lora], "skewed": [qaa, lora, qaa, qaa]}[pattern]
    plan = plan_for(served, ids)
    for name, layer in served.manager.modules.items():
        if not isinstance(layer, QAALayerMixin):
            continue
        x = torch.randn(len(ids), layer.full_widths()[0])
        out_cpu = torch.randn(len(ids), sum(layer.output_slices))
        out_punica = out_cpu.clone()
        layer.delta._add(plan, x, out_cpu)
        slots = torch.tensor([served.manager.lora_index_to_id.index(i) for i in ids])
        layer.punica_wrapper._token_lora_indices[: len(ids)] = slots
        layer.punica_wrapper.indices_len[0] = len(ids)
        layer.punica_wrapper.is_prefill = False
        PlannedDelta._add(layer.delta, plan, x, out_punica)
        torch.testing.assert_close(out_punica, out_cpu, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    served.manager._last_mapping = None  # the wrapper's metadata was changed by hand


def test_two_adapters_of_one_form_in_one_group(served):
    """Slots with equally many tokens are stacked; here one lacks the slices that the other has."""
    base = served.root / "base"
    targets = ATTENTION[served.architecture]
    served.adapters["left"] = make_qaa(served.root / "left", base, (targets[0], targets[3]), 11)
    served.adapters["right"] = make_qaa(served.root / "right", base, (targets[1], targets[2]), 12)
    try:
        served.check([("left", prompt(4, 900)), ("right", prompt(4, 901)), (None, prompt(4, 902))])
    finally:
        del served.adapters["left"], served.adapters["right"]


def test_rows_without_adapter_and_padding_are_untouched(served):
    (adapter,) = activate(served, "attention")
    layer = next(m for n, m in served.manager.modules.items() if "qkv" in n)
    plan = plan_for(served, [0, adapter, 0])
    x = torch.full((5, layer.full_widths()[0]), float("nan"))
    x[1] = torch.randn_like(x[1])
    output = torch.full((5, sum(layer.output_slices)), 3.0)
    layer.delta._add(plan, x, output)
    assert (output[[0, 2, 3, 4]] == 3.0).all()
    assert output[1].isfinite().all()
    assert (output[1] != 3.0).any()


def test_the_delta_is_one_opaque_op_in_a_compiled_graph(served):
    """Under torch.compile the layer's branch must not be traced, and must still change the output."""
    (adapter,) = activate(served, "attention")
    manager = served.manager
    layer = next(m for n, m in manager.modules.items() if "qkv" in n)
    manager._plans.plan = plan_for(served, [adapter, 0, adapter])
    x = torch.randn(3, layer.full_widths()[0])
    output = torch.randn(3, sum(layer.output_slices))
    expected = output.clone()
    layer.delta.add(x, expected)

    graphs = []

    def backend(graph, _inputs):
        """As vLLM cuts a model for a backend that runs between CUDA graphs."""
        whole, parts = split_graph(graph, [DELTA_OP])
        graphs.append([DELTA_OP.split("::")[1] in part.graph.print_readable(print_output=False) for part in parts])
        return whole

    def step(x, output):
        return layer._apply_lora_to_output(x, output * 1.0) * 2.0

    config = served.llm.llm_engine.vllm_config
    with set_forward_context(None, config):
        result = torch.compile(step, fullgraph=True, backend=backend)(x, output)
        torch.library.opcheck(torch.ops.vllm_qaa.add_delta, (x, output, layer.qaa_name), test_utils="test_schema")
    torch.testing.assert_close(result, 2 * expected)
    assert graphs == [[False, True, False]], "the delta is a part of its own"
    manager._last_mapping = None


def test_the_op_has_a_fake_implementation(served):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, output = torch.randn(3, 8), torch.randn(3, 8)
        assert torch.ops.vllm_qaa.add_delta(x, output, "no such layer") is None


def test_fewer_rows_than_planned_is_an_error(served):
    (adapter,) = activate(served, "attention")
    layer = next(m for n, m in served.manager.modules.items() if "qkv" in n)
    served.manager._plans.plan = plan_for(served, [adapter] * 4)
    with pytest.raises(RuntimeError, match="part of the tokens"):
        layer.delta.add(torch.randn(2, layer.full_widths()[0]), torch.randn(2, sum(layer.output_slices)))
    served.manager._last_mapping = None
