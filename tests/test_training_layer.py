"""QAA as a PEFT method: the layer's arithmetic, several adapters, saving and reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from qaa_serve.adapters import AdapterConfig, AdapterError, load_adapter, signs
from qaa_serve.circuits import ANSATZ_NAMES, torch_batched
from qaa_serve.circuits.reference import expectation_values
from qaa_serve.training import QAAConfig, QAALinear, TrainingError, register
from qaa_serve.training.layer import Moments
from qaa_serve.training.model import standardise
from qaa_serve.training.targets import resolve_targets

IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 1, 0]])


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=64)).eval()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=12,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=12,
    )
    return OPTForCausalLM(config).eval()


def config(**values: object) -> AdapterConfig:
    return AdapterConfig(base_model_name_or_path="base", target_modules=("q_proj",), **values)


def set_weights(model: torch.nn.Module, adapter: str = "default") -> None:
    """B is zero at the start; give it values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, QAALinear):
            for tensors in (module.qaa_weight, module.qaa_lambda_b):
                if adapter in tensors:
                    tensors[adapter].data = torch.randn(tensors[adapter].shape, generator=generator) * 0.1


def by_definition(layer: QAALinear, x: torch.Tensor, heads: int, alpha: float) -> torch.Tensor:
    """W x + b + scale * B z as DESIGN.md has it, with the reference circuit, in float64."""
    form = layer.qaa_form["default"]
    n = form.ansatz.qubits
    theta = layer.qaa_theta["default"].reshape(heads, *form.ansatz.theta_shape)
    flat = x.reshape(-1, x.shape[-1])
    z = expectation_values(flat, theta, form.ansatz).reshape(len(flat), heads * n)
    scale = alpha * 2 ** (n / 2) / (heads * n)
    update = scale * z @ layer.qaa_weight["default"].double().T
    return layer.base_layer(flat).double().add(update).reshape(*x.shape[:-1], -1)


class TestLayer:
    @pytest.mark.parametrize("ansatz", ANSATZ_NAMES)
    @pytest.mark.parametrize("heads", [1, 2])
    @pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
    def test_forward_is_the_definition(self, ansatz: str, heads: int, kind: str) -> None:
        torch.manual_seed(0)
        base = Conv1D(7, 12) if kind == "conv1d" else torch.nn.Linear(12, 7, bias=kind == "linear")
        layer = QAALinear(base, "default", config(ansatz=ansatz, heads=heads, layers=2, alpha=3.0))
        set_weights(layer)
        x = torch.randn(2, 3, 12)
        x[0, 1] = 0
        expected = by_definition(layer, x, heads, alpha=3.0)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    def test_shapes_are_those_on_disk(self) -> None:
        layer = QAALinear(torch.nn.Linear(12, 7), "default", config(layers=2))
        assert layer.qaa_theta["default"].shape == (5, 4)
        assert layer.qaa_weight["default"].shape == (7, 4)
        layer = QAALinear(torch.nn.Linear(12, 7), "default", config(layers=2, heads=3))
        assert layer.qaa_theta["default"].shape == (3, 5, 4)
        assert layer.qaa_weight["default"].shape == (7, 12)

    def test_starts_as_the_base_with_random_angles(self) -> None:
        torch.manual_seed(0)
        base = torch.nn.Linear(12, 7)
        layer = QAALinear(base, "default", config(layers=20))
        x = torch.randn(3, 12)
        assert torch.equal(layer(x), base(x))
        theta = layer.qaa_theta["default"]
        assert theta.min() < -3 < 3 < theta.max()
        assert theta.abs().max() <= torch.pi
        torch.manual_seed(0)
        torch.nn.Linear(12, 7)
        assert torch.equal(QAALinear(base, "default", config(layers=20)).qaa_theta["default"], theta)

    def test_gradients_reach_b_first_and_the_angles_and_x_once_b_is_not_zero(self) -> None:
        layer = QAALinear(torch.nn.Linear(12, 7).requires_grad_(False), "default", config())
        x = torch.randn(3, 12, requires_grad=True)
        layer(x).square().sum().backward()
        assert layer.qaa_weight["default"].grad.abs().max() > 0
        assert layer.qaa_theta["default"].grad.abs().max() == 0
        set_weights(layer)
        layer(x).square().sum().backward()
        assert (layer.qaa_theta["default"].grad.abs().amax(1) > 0).all()
        assert layer.base_layer.weight.grad is None

    def test_vectors_are_the_definition_and_all_are_trained(self) -> None:
        torch.manual_seed(0)
        form = config(vectors=True, heads=2, alpha=3.0)
        layer = QAALinear(torch.nn.Linear(12, 7).requires_grad_(False), "default", form)
        x = torch.randn(5, 12)
        assert torch.equal(layer(x), layer.base_layer(x))
        set_weights(layer)
        layer.qaa_lambda_d["default"].data.uniform_(-1, 1)
        y = layer(x)
        theta = layer.qaa_theta["default"].detach()
        z = expectation_values(x, theta, layer.qaa_form["default"].ansatz).reshape(5, 2 * 10)
        s = signs(7, 20).double()
        b, d = (getattr(layer, f"qaa_lambda_{of}")["default"].detach().double() for of in "bd")
        expected = layer.base_layer(x).double() + 3.0 * 4 / 20**0.5 * b * ((z * d) @ s.T)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"qaa_theta", "qaa_lambda_b", "qaa_lambda_d"}
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_circuit_is_float32_over_a_16_bit_base(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        base = torch.nn.Linear(12, 7).to(dtype)
        layer = QAALinear(base, "default", config())
        set_weights(layer)
        assert layer.qaa_theta["default"].dtype == layer.qaa_weight["default"].dtype == torch.float32
        x = torch.randn(4, 12).to(dtype)
        got = layer(x)
        assert got.dtype == dtype
        update = by_definition(layer, x, 1, 16.0) - base(x).double()
        assert torch.equal(got, base(x) + update.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            in_autocast = layer._update("default", x)
        assert torch.equal(in_autocast, layer._update("default", x))

    def test_no_tokens(self) -> None:
        layer = QAALinear(torch.nn.Linear(12, 7), "default", config())
        assert layer(torch.empty(0, 12)).shape == (0, 7)

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(TypeError, match="Embedding"):
            QAALinear(torch.nn.Embedding(4, 12), "default", config())


def outliers(*shape: int) -> torch.Tensor:
    """Inputs as real models have them: one channel large and nearly constant, one of zeros, the others small."""
    x = torch.randn(*shape) * torch.linspace(0.5, 2, shape[-1])
    x[..., 0] += 40
    x[..., 1] = 0
    return x


class TestStandardised:
    """x and z by fixed offsets and scales."""

    @pytest.mark.parametrize("heads", [1, 2])
    @pytest.mark.parametrize("whitened", [False, True])
    @pytest.mark.parametrize("inputs", ["raw", "rms", "centred-rms"])
    def test_the_first_training_batch_is_measured_and_the_definition_holds(
        self, inputs: str, whitened: bool, heads: int
    ) -> None:
        torch.manual_seed(0)
        form = config(inputs=inputs, whitened=whitened, heads=heads, alpha=3.0)
        layer = QAALinear(torch.nn.Linear(12, 7), "default", form)
        set_weights(layer)
        x = outliers(2, 30, 12)
        layer.eval()(outliers(1, 3, 12))  # nothing is measured here
        layer.train()(x)
        seen = x.reshape(-1, 12).double()
        if inputs == "centred-rms":
            seen = seen - seen.mean(0)
        if inputs != "raw":
            power = (seen * seen).mean(0).sqrt()
            seen = seen / power.clamp_min(0.01 * power.median())
        angles = layer.qaa_form["default"].ansatz
        theta = layer.qaa_theta["default"].detach().reshape(heads, *angles.theta_shape)
        z = expectation_values(seen, theta, angles).reshape(len(seen), -1)
        if whitened:
            z = (z - z.mean(0)) / z.std(0, correction=0)
        scale = 3.0 * (1 if whitened else 4) / (4 * heads)
        expected = layer.base_layer(x).double() + (scale * z @ layer.qaa_weight["default"].double().T).view(
            2, 30, 7
        )
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        layer.train()(outliers(4, 5, 12) * 7)  # nor is it measured again
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_are_those_of_the_definition_and_layers_keep_the_one_x_they_read(
        self, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        x = outliers(9, 12).to(dtype).requires_grad_()
        layers = [QAALinear(torch.nn.Linear(12, 5), "default", config(inputs="centred-rms")) for _ in range(2)]
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            z = [layer.eval().seen("default", "readouts", x) for layer in layers]
        assert {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()} == {x.data_ptr()}
        for layer in layers:
            moments = Moments()
            moments.add(x)
            layer.standardise("default", "inputs", moments)
        z = [layer.seen("default", "readouts", x) for layer in layers]
        weights = torch.randn_like(z[0])
        found = torch.autograd.grad(sum((each * weights).sum() for each in z), [x, layers[1].qaa_theta["default"]])
        exact = x.detach().double().requires_grad_()
        thetas = [layer.qaa_theta["default"].detach().double().requires_grad_() for layer in layers]
        total = torch.zeros(())
        for layer, theta in zip(layers, thetas, strict=True):
            by, ansatz = layer.qaa_inputs["default"].double(), layer.qaa_form["default"].ansatz
            right = torch_batched.expectation_values((exact - by[0]) * by[1], theta[None], ansatz)
            total = total + (right.flatten(1) * weights.double()).sum()
        expected = torch.autograd.grad(total, [exact, thetas[1]])
        rtol = 1e-4 if dtype == torch.float32 else 2e-2
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())
        assert found[0].dtype == dtype

    def test_all_layers_are_measured_beforehand_on_the_base_alone(self) -> None:
        model = get_peft_model(llama(), QAAConfig(target_modules="all-linear"))
        set_weights(model)
        batches = [{"input_ids": IDS[:1, :4]}, {"input_ids": IDS[1:]}]
        seen: dict[str, list[torch.Tensor]] = {}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QAALinear)}
        plain = llama()
        for name, layer in plain.named_modules():
            if f"base_model.model.{name}" in layers:
                layer.register_forward_pre_hook(
                    lambda _, x, name=name: seen.setdefault(f"base_model.model.{name}", []).append(x[0][0])
                )
        with torch.no_grad():
            for batch in batches:
                plain(**batch)
        standardise(model, batches, "default")
        for name, layer in layers.items():
            x = torch.cat(seen[name])
            offset, scale = layer.qaa_inputs["default"]
            torch.testing.assert_close(offset, x.mean(0), rtol=1e-4, atol=1e-6)
            here = (x - offset) * scale
            z = expectation_values(
                here, layer.qaa_theta["default"].detach()[None], layer.qaa_form["default"].ansatz
            )
            torch.testing.assert_close(
                layer.qaa_readouts["default"][0].double(), z.mean(0)[0], rtol=1e-3, atol=1e-5
            )
        before = {name: layer.qaa_readouts["default"].clone() for name, layer in layers.items()}
        model.train()(**batches[0])
        assert all(torch.equal(before[name], layer.qaa_readouts["default"]) for name, layer in layers.items())

    def test_saved_and_loaded_nothing_is_measured_again(self, tmp_path: Path) -> None:
        model = get_peft_model(llama(), QAAConfig())
        set_weights(model)
        model.train()(IDS)
        expected = model.eval()(IDS).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        again.train()(IDS.flip(0) + 3)
        torch.testing.assert_close(again.eval()(IDS).logits, expected)

    def test_a_file_that_says_nothing_of_it_is_older_than_it(self, tmp_path: Path) -> None:
        model = get_peft_model(llama(), QAAConfig(inputs="raw", whitened=False))
        set_weights(model)
        model.save_pretrained(tmp_path)
        said = json.loads((tmp_path / "adapter_config.json").read_text())
        del said["inputs"], said["whitened"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
        again = PeftModel.from_pretrained(llama(), tmp_path)
        assert (again.peft_config["default"].inputs, again.peft_config["default"].whitened) == ("raw", False)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
        assert (QAAConfig().inputs, QAAConfig().whitened) == ("centred-rms", True)


class TestModel:
    def test_only_the_adapter_is_trained(self) -> None:
        model = get_peft_model(llama(), QAAConfig(target_modules=["q_proj", "v_proj"]))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 2 * 2
        assert all(".qaa_theta." in name or ".qaa_weight." in name for name in trained)

    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (llama, ["k_proj", "o_proj", "q_proj", "v_proj"]),
            (opt, ["k_proj", "out_proj", "q_proj", "v_proj"]),
            (gpt2, ["attn.c_proj", "c_attn"]),
        ],
    )
    def test_attention_is_adapted_by_default(self, make: object, expected: list[str]) -> None:
        model = get_peft_model(make(), QAAConfig())
        assert sorted(model.peft_config["default"].target_modules) == expected
        assert not any("mlp" in name for name in model.base_model.targeted_module_names)

    def test_all_linear_leaves_out_the_head(self) -> None:
        names = get_peft_model(llama(), QAAConfig(target_modules="all-linear")).base_model.targeted_module_names
        assert len(names) == 2 * 7
        assert "lm_head" not in names

    def test_second_adapter(self) -> None:
        model = get_peft_model(llama(), QAAConfig(target_modules=["q_proj"], layers=1))
        set_weights(model)
        first = model(IDS).logits
        model.add_adapter("other", QAAConfig(target_modules=["q_proj", "o_proj"], layers=3, heads=2))
        set_weights(model, "other")
        assert torch.equal(model(IDS).logits, first)
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".other" in name)
        model.set_adapter("other")
        assert (model(IDS).logits - first).abs().max() > 1e-4
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(name.endswith(".other") for name in trained)
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)
        model.delete_adapter("other")
        assert torch.equal(model(IDS).logits, first)

    def test_disabled_or_unloaded_it_is_the_base(self) -> None:
        base = llama()
        expected = base(IDS).logits
        model = get_peft_model(base, QAAConfig())
        set_weights(model)
        assert (model(IDS).logits - expected).abs().max() > 1e-4
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.unload()(IDS).logits, expected)

    @pytest.mark.parametrize("make", [llama, gpt2, opt])
    def test_saved_and_loaded_it_says_the_same(self, make: object, tmp_path: Path) -> None:
        model = get_peft_model(make(), QAAConfig(heads=2, layers=1, ansatz="ry_ring"))
        set_weights(model)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(loaded(IDS).logits, expected)
        assert loaded.peft_config["default"].ansatz == "ry_ring"
        second = get_peft_model(make(), QAAConfig())
        second.load_adapter(tmp_path, "again")
        second.set_adapter("again")
        assert torch.equal(second(IDS).logits, expected)

    def test_angles_stay_float32_when_loaded_onto_a_bfloat16_base(self, tmp_path: Path) -> None:
        model = get_peft_model(llama(), QAAConfig())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
        pairs = zip(model.named_parameters(), loaded.named_parameters(), strict=True)
        angles = [(a, b) for (name, a), (_, b) in pairs if "qaa_theta" in name]
        assert len(angles) == 8
        assert all(torch.equal(a, b) for a, b in angles)

    @pytest.mark.parametrize("vectors", [False, True])
    def test_peft_writes_what_the_server_reads(self, tmp_path: Path, vectors: bool) -> None:
        config = QAAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], vectors=vectors)
        model = get_peft_model(llama(), config)
        model.peft_config["default"].base_model_name_or_path = "base"
        set_weights(model)
        model.save_pretrained(tmp_path)
        adapter = load_adapter(tmp_path)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        saved = adapter.modules["model.layers.0.self_attn.q_proj"]
        assert saved.weight.abs().max() > 0
        assert torch.equal(saved.weight, layer.weights("default").weight)
        assert torch.equal(saved.theta[0], layer.qaa_theta["default"])
        again = PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)

    def test_merging_is_refused(self) -> None:
        model = get_peft_model(llama(), QAAConfig())
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter, layer.merge):
            with pytest.raises(NotImplementedError, match="cannot be merged"):
                merge()
        assert isinstance(layer, QAALinear)

    @pytest.mark.parametrize("targets", [["nope"], ["q_proj", "nope"]])
    def test_unknown_target(self, targets: list[str]) -> None:
        with pytest.raises(TrainingError, match=r"no module 'nope'.*down_proj.*q_proj"):
            get_peft_model(llama(), QAAConfig(target_modules=targets))

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "self_attn", "norm"])
    def test_what_cannot_be_adapted_is_refused(self, target: str) -> None:
        with pytest.raises(TrainingError, match=f"{target}.*cannot be adapted"):
            get_peft_model(llama(), QAAConfig(target_modules=[target]))

    def test_experts_are_refused(self) -> None:
        model = torch.nn.Module()
        model.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        model.attn = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
        assert resolve_targets(model, None) == ["q"]
        with pytest.raises(TrainingError, match=r"experts\.0.*cannot be adapted"):
            resolve_targets(model, ["0"])

    def test_wrong_config_is_refused(self) -> None:
        with pytest.raises(AdapterError, match=r"ansatz.*ryrz_ring_ry"):
            QAAConfig(ansatz="nope")
        with pytest.raises(AdapterError, match="heads"):
            QAAConfig(heads=0)


class TestRegistration:
    def test_twice_is_once(self) -> None:
        assert register() is register() is QAAConfig().peft_type

    def test_config_is_found_by_its_type(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "QAA", "layers": 4}))
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(loaded, QAAConfig)
        assert loaded.layers == 4

    def test_unknown_peft_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("peft.__version__", "0.30.0")
        with pytest.raises(TrainingError, match=r"peft 0\.30\.0.*peft>=0\.21,<0\.22"):
            register()

    def test_a_strangers_qaa_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, register(), PeftConfig)
        with pytest.raises(TrainingError, match="belongs to peft"):
            register()
