"""Adapters on disk: what is saved comes back, what is wrong is refused with a message that helps."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    digest_of,
    load_adapter,
    read_config,
    resolve_base,
    save_adapter,
)

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
PREFIX = "base_model.model."
BASE = {Q0: (12, 8), Q1: (12, 8), "model.layers.0.self_attn.k_proj": (12, 4)}
#: Fresh at each run; QAA_TEST_SEED=<what a failing test printed> runs the same damage again.
SEED = int(os.environ.get("QAA_TEST_SEED") or random.SystemRandom().randrange(2**31))


def make_config(**changes: Any) -> AdapterConfig:
    fields = {"base_model_name_or_path": "tiny", "target_modules": ("q_proj",), **changes}
    return AdapterConfig(**fields)


def make_module(config: AdapterConfig, qubits: int = 4, d_out: int = 8, **dtype: Any) -> ModuleWeights:
    rows, rank = config.circuit(qubits).rows, config.rank(qubits)
    return ModuleWeights(
        torch.randn(config.heads, rows, qubits),
        (torch.randn(d_out), torch.randn(rank)) if config.vectors else torch.randn(d_out, rank).to(**dtype),
        torch.randn(2, 12) if config.inputs != "raw" else None,
        torch.randn(2, config.rank(qubits)) if config.whitened else None,
    )


def make_modules(config: AdapterConfig) -> dict[str, ModuleWeights]:
    return {Q0: make_module(config), Q1: make_module(config)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter for BASE: q_proj of two layers, 12 -> 8, 4 qubits."""
    config = make_config()
    save_adapter(tmp_path / "adapter", config, make_modules(config))
    return tmp_path / "adapter"


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    change(tensors)
    save_file(tensors, adapter / WEIGHTS_FILE)


def refusal(adapter: Path, base: dict[str, tuple[int, int]] | None = BASE) -> str:
    """The message with which an adapter is refused."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(adapter, base)
    message = str(caught.value)
    assert len(message) < 1000, "a message is to be read"
    return message


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# --------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ansatz", ["ryrz_ring_ry", "ry_ring", "strongly_entangling"])
def test_what_is_saved_comes_back(tmp_path: Path, heads: int, dtype: torch.dtype, ansatz: str) -> None:
    config = make_config(heads=heads, ansatz=ansatz, layers=3, alpha=-2.5, target_modules=("q_proj", "down_proj"))
    modules = {Q0: make_module(config, dtype=dtype), DOWN0: make_module(config, 6, 12, dtype=dtype)}
    save_adapter(tmp_path / "a", config, modules)
    loaded = load_adapter(tmp_path / "a", {Q0: (16, 8), DOWN0: (33, 12)})
    assert loaded.config == config
    assert set(loaded.modules) == {Q0, DOWN0}
    for name, weights in modules.items():
        assert torch.equal(loaded.modules[name].theta, weights.theta)
        assert torch.equal(loaded.modules[name].weight, weights.weight)
        assert loaded.modules[name].weight.dtype == dtype
    assert (loaded.modules[Q0].qubits, loaded.modules[DOWN0].qubits) == (4, 6)
    assert loaded.rank == heads * 6
    assert loaded.nbytes == sum(m.theta.nbytes + m.weight.nbytes for m in modules.values())


def test_the_layout_on_disk_is_the_contract(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((adapter / CONFIG_FILE).read_text()) == {
        "peft_type": "QAA",
        "qaa_format": 1,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "target_modules": ["q_proj"],
        "ansatz": "ryrz_ring_ry",
        "layers": 2,
        "alpha": 16.0,
        "heads": 1,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    assert shapes == {
        f"{PREFIX}{module}.qaa_{kind}": shape
        for module in (Q0, Q1)
        for kind, shape in {"theta": (5, 4), "weight": (8, 4)}.items()
    }


def test_heads_are_an_axis_of_theta_on_disk(tmp_path: Path) -> None:
    config = make_config(heads=3)
    save_adapter(tmp_path / "a", config, {Q0: make_module(config)})
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert tensors[f"{PREFIX}{Q0}.qaa_theta"].shape == (3, 5, 4)
    assert tensors[f"{PREFIX}{Q0}.qaa_weight"].shape == (8, 12)


def test_loading_without_a_base_checks_all_but_the_fit(adapter: Path) -> None:
    assert set(load_adapter(adapter).modules) == {Q0, Q1}


def test_a_directory_may_be_given_as_text(adapter: Path) -> None:
    assert load_adapter(str(adapter), BASE).digest == digest_of(adapter)


# --------------------------------------------------------------------------------------------- identity


def test_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    config = make_config()
    modules = make_modules(config)
    save_adapter(tmp_path / "a", config, modules)
    save_adapter(tmp_path / "b", config, dict(reversed(modules.items())))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")


def test_the_digest_is_64_hex_digits_and_the_same_from_both_ways(adapter: Path) -> None:
    digest = load_adapter(adapter).digest
    assert digest == digest_of(adapter)
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")


def test_each_file_changes_the_digest(adapter: Path) -> None:
    digests = [digest_of(adapter)]
    edit_config(adapter, alpha=17.0)
    digests.append(digest_of(adapter))
    edit_tensors(adapter, lambda tensors: tensors[f"{PREFIX}{Q0}.qaa_weight"].mul_(2))
    digests.append(digest_of(adapter))
    (adapter / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text() + "\n")
    digests.append(digest_of(adapter))
    assert len(set(digests)) == 4


def test_other_files_do_not_change_the_digest(adapter: Path) -> None:
    before = digest_of(adapter)
    (adapter / "README.md").write_text("a model card")
    assert digest_of(adapter) == before


def test_the_digest_of_a_missing_file_is_an_adapter_error(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is missing"):
        digest_of(adapter)


# ------------------------------------------------------------------------------------------- config errors

_DROPPED = object()

BAD_CONFIGS = {
    "another format": ({"qaa_format": 2}, ["qaa_format 2", "reads qaa_format 1", "update qaa-serve"]),
    "no format": ({"qaa_format": _DROPPED}, ["qaa_format None", "reads qaa_format 1"]),
    "format as text": ({"qaa_format": "1"}, ["qaa_format '1'"]),
    "format true": ({"qaa_format": True}, ["qaa_format True"]),
    "another type": ({"peft_type": "LORA"}, ["peft_type 'LORA'", '"QAA"']),
    "no type": ({"peft_type": _DROPPED}, ["peft_type None", '"QAA"']),
    "unknown ansatz": ({"ansatz": "rx"}, ["ansatz", "'rx'", "known are: ryrz_ring_ry, ry_ring, strongly"]),
    "ansatz a list": ({"ansatz": ["ry_ring"]}, ["ansatz", "valid string", "['ry_ring']"]),
    "no layers": ({"layers": 0}, ["layers", "greater than or equal to 1", "found 0"]),
    "too many layers": ({"layers": 65}, ["layers", "less than or equal to 64", "found 65"]),
    "layers as text": ({"layers": "2"}, ["layers", "valid integer", "found '2'"]),
    "layers true": ({"layers": True}, ["layers", "valid integer", "found True"]),
    "layers broken": ({"layers": 1.5}, ["layers", "valid integer", "found 1.5"]),
    "layers null": ({"layers": None}, ["layers", "valid integer", "found None"]),
    "no heads": ({"heads": 0}, ["heads", "greater than or equal to 1", "found 0"]),
    "too many heads": ({"heads": 65}, ["heads", "less than or equal to 64"]),
    "alpha as text": ({"alpha": "16"}, ["alpha", "valid number", "found '16'"]),
    "alpha NaN": ({"alpha": float("nan")}, ["alpha", "nan"]),
    "alpha infinite": ({"alpha": float("inf")}, ["alpha", "inf"]),
    "alpha huge": ({"alpha": -1e300}, ["alpha", "greater than or equal to -1000000", "found -1e+300"]),
    "no base": ({"base_model_name_or_path": _DROPPED}, ["base_model_name_or_path: Field required"]),
    "base null": ({"base_model_name_or_path": None}, ["base_model_name_or_path", "found None"]),
    "base empty": ({"base_model_name_or_path": " "}, ["base_model_name_or_path", "at least 1 character"]),
    "no targets": ({"target_modules": _DROPPED}, ["target_modules: Field required"]),
    "targets empty": ({"target_modules": []}, ["target_modules", "at least 1 item"]),
    "targets as text": ({"target_modules": "all-linear"}, ["target_modules", '["q_proj"', "'all-linear'"]),
    "targets not names": ({"target_modules": ["q_proj", 3]}, ["target_modules", "module names", "3]"]),
    "a target empty": ({"target_modules": ["q_proj", ""]}, ["target_modules", "module names"]),
    "task a number": ({"task_type": 1}, ["task_type", "valid string", "found 1"]),
    "unknown keys": ({"rank": 8, "lora_alpha": 16}, ["rank", "lora_alpha", "not permitted", "found 16"]),
    "modules to save": ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "not permitted"]),
    "a long value": ({"ansatz": "x" * 9999}, ["ansatz", "xxx...", "known are"]),
}


@pytest.mark.parametrize(("changes", "parts"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_wrong_config_is_refused(adapter: Path, changes: dict[str, Any], parts: list[str]) -> None:
    config = {**json.loads((adapter / CONFIG_FILE).read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not _DROPPED}
    (adapter / CONFIG_FILE).write_text(json.dumps(kept))
    assert_says(refusal(adapter), "adapter_config.json", *parts)


BAD_JSON = {
    "empty": (b"", "is not JSON"),
    "cut": (b'{"peft_type": "QA', "is not JSON"),
    "not UTF-8": (b'{"peft_type": "\xff\xfe"}', "is not JSON"),
    "deep": (b"[" * 200_000, "is not JSON"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not JSON"),
    "a long number": (b'{"layers": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "a key twice": (
        b'{"peft_type": "QAA", "r": 1, "x": {"a": 1, "a": 2}}',
        "is not JSON: the key 'a' is there twice",
    ),
    "NaN in a list": (b'{"x": [[1, NaN]]}', "is not JSON: Out of range float values"),
    "a number beyond all": (b'{"x": 1e999}', "is not JSON: 'x' is inf"),
    "half a character": (b'{"x": {"\\ud800": 1}}', "is not JSON: 'utf-8' codec can't encode"),
    "half a character as bytes": (b'{"x": "\xed\xa0\x80"}', "is not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "is not JSON"),
    "UTF-16": ('{"peft_type": "QAA"}'.encode("utf-16"), "is not JSON"),
    "a list": (b'[{"peft_type": "QAA"}]', "holds a JSON list, not an object"),
    "null": (b"null", "holds a JSON NoneType, not an object"),
    "too large": (b" " * (1 << 20) + b"{}", "has 1,048,578 bytes; at most 1,048,576 are read"),
}


@pytest.mark.parametrize(("content", "part"), BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_json_object_is_refused(adapter: Path, content: bytes, part: str) -> None:
    (adapter / CONFIG_FILE).write_bytes(content)
    assert_says(refusal(adapter), CONFIG_FILE, part)
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        read_config(adapter)


def test_a_config_of_another_method_can_be_read_as_it_is(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 8}')
    assert read_config(adapter) == {"peft_type": "LORA", "r": 8}


# ------------------------------------------------------------------------------------------- tensor errors

THETA, WEIGHT = f"{PREFIX}{Q0}.qaa_theta", f"{PREFIX}{Q0}.qaa_weight"


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def put_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[3:5].fill_(value)


def put_module(module: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update(
        {f"{PREFIX}{module}.qaa_theta": torch.zeros(5, 4), f"{PREFIX}{module}.qaa_weight": torch.zeros(8, 4)}
    )


BAD_TENSORS = {
    "theta, a row short": (put(THETA, torch.zeros(4, 4)), ["q_proj.qaa_theta", "(4, 4)", "(5, 4)", "2 layers"]),
    "theta, a row more": (put(THETA, torch.zeros(6, 4)), ["q_proj.qaa_theta", "(6, 4)", "(5, 4)"]),
    "theta, 3-D with one head": (put(THETA, torch.zeros(1, 5, 4)), ["(1, 5, 4)", "(5, 4)", "1 heads"]),
    "theta flat": (put(THETA, torch.zeros(20)), ["q_proj.qaa_theta", "(20,)", "qubits"]),
    "theta a number": (put(THETA, torch.tensor(1.0)), ["q_proj.qaa_theta", "()", "1 to 16 qubits"]),
    "theta, no qubits": (put(THETA, torch.zeros(5, 0)), ["(5, 0)", "1 to 16 qubits, not 0"]),
    "theta, 17 qubits": (put(THETA, torch.zeros(5, 17)), ["(5, 17)", "1 to 16 qubits, not 17"]),
    "weight too narrow": (put(WEIGHT, torch.zeros(8, 3)), ["q_proj.qaa_weight", "(8, 3)", "(d_out, 4)"]),
    "weight too wide": (put(WEIGHT, torch.zeros(8, 5)), ["q_proj.qaa_weight", "(8, 5)", "(d_out, 4)"]),
    "weight flat": (put(WEIGHT, torch.zeros(4)), ["q_proj.qaa_weight", "(4,)", "(d_out, 4)"]),
    "weight without rows": (put(WEIGHT, torch.zeros(0, 4)), ["q_proj.qaa_weight", "(0, 4)"]),
    "weight, a row short": (put(WEIGHT, torch.zeros(7, 4)), ["12 -> 8", "8 rows", "4 and 7", "another base"]),
    "both, another width": (
        lambda tensors: tensors.update({THETA: torch.zeros(5, 5), WEIGHT: torch.zeros(8, 5)}),
        ["12 -> 8", "4 qubits", "has 5 and 8", "another base", "'tiny'"],
    ),
    "theta double": (put(THETA, torch.zeros(5, 4).double()), ["qaa_theta", "float64", "float32 is needed"]),
    "theta bf16": (put(THETA, torch.zeros(5, 4).bfloat16()), ["qaa_theta", "bfloat16", "float32 is needed"]),
    "weight double": (put(WEIGHT, torch.zeros(8, 4).double()), ["qaa_weight", "torch.float64", "bfloat16"]),
    "weight int8": (put(WEIGHT, torch.zeros(8, 4).to(torch.int8)), ["qaa_weight", "torch.int8", "float16"]),
    "weight complex": (put(WEIGHT, torch.zeros(8, 4).cfloat()), ["qaa_weight", "torch.complex64"]),
    "no theta": (lambda tensors: tensors.pop(THETA), [THETA, "is missing"]),
    "no weight": (lambda tensors: tensors.pop(WEIGHT), [WEIGHT, "is missing"]),
    "a LoRA tensor": (
        put(f"{PREFIX}{Q0}.lora_A.weight", torch.zeros(4, 12)),
        [f"{Q0}.lora_A.weight", "does not belong", "qaa_theta"],
    ),
    "no prefix": (put(f"{Q0}.qaa_theta", torch.zeros(5, 4)), [f"'{Q0}.qaa_theta'", "does not belong"]),
    "a longer name": (put(THETA + ".default", torch.zeros(5, 4)), ["qaa_theta.default", "does not belong"]),
    "theta NaN": (put_value(THETA, float("nan")), ["qaa_theta", "2 values that are NaN or infinite"]),
    "theta infinite": (put_value(THETA, float("inf")), ["qaa_theta", "2 values that are NaN or infinite"]),
    "weight NaN": (put_value(WEIGHT, float("nan")), ["qaa_weight", "2 values that are NaN or infinite"]),
    "weight infinite": (put_value(WEIGHT, -float("inf")), ["qaa_weight", "2 values that are NaN or infinite"]),
    "weight fp16 infinite": (put(WEIGHT, torch.full((8, 4), 1e6).half()), ["qaa_weight", "32 values"]),
    "a module not targeted": (
        put_module("model.layers.0.self_attn.k_proj"),
        ["self_attn.k_proj", "not among the target_modules ['q_proj']"],
    ),
    "a module the base lacks": (
        put_module("model.layers.7.self_attn.q_proj"),
        ["no linear layer 'model.layers.7.self_attn.q_proj'", "k_proj, q_proj", "another base, 'tiny'"],
    ),
    "a layer left out": (
        lambda tensors: [tensors.pop(f"{PREFIX}{Q1}.qaa_{kind}") for kind in ("theta", "weight")],
        [Q1, "are missing", "target_modules"],
    ),
    "theta without numbers": (put(THETA, torch.zeros(0, 2**40)), ["qaa_theta", "(0, 1099511627776)"]),
    "nothing": (lambda tensors: tensors.clear(), ["target module 'q_proj' has no tensors", WEIGHTS_FILE]),
}


INPUTS, READOUTS = f"{PREFIX}{Q0}.qaa_inputs", f"{PREFIX}{Q0}.qaa_readouts"

BAD_STANDARDS = {
    "inputs missing": (lambda tensors: tensors.pop(INPUTS), [INPUTS, "is missing"]),
    "readouts missing": (lambda tensors: tensors.pop(READOUTS), [READOUTS, "is missing"]),
    "inputs of other qubits": (
        put(INPUTS, torch.zeros(2, 17)),
        ["qaa_inputs", "(2, 17)", "(2, d_in)", "4 qubits"],
    ),
    "inputs, one row": (put(INPUTS, torch.zeros(1, 12)), ["qaa_inputs", "(1, 12)"]),
    "inputs flat": (put(INPUTS, torch.zeros(24)), ["qaa_inputs", "(24,)"]),
    "inputs of another width": (
        put(INPUTS, torch.zeros(2, 11)),
        ["12 -> 8", "12 columns", "has 11", "another base"],
    ),
    "inputs bf16": (put(INPUTS, torch.zeros(2, 12).bfloat16()), ["qaa_inputs", "bfloat16", "float32 is needed"]),
    "inputs NaN": (put_value(INPUTS, float("nan")), ["qaa_inputs", "2 values that are NaN or infinite"]),
    "readouts of another rank": (put(READOUTS, torch.zeros(2, 5)), ["qaa_readouts", "(2, 5)", "(2, 4)"]),
    "readouts infinite": (put_value(READOUTS, float("inf")), ["qaa_readouts", "2 values"]),
}


@pytest.mark.parametrize(("change", "parts"), BAD_STANDARDS.values(), ids=BAD_STANDARDS)
def test_wrong_offsets_and_scales_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], parts: list[str]
) -> None:
    config = make_config(inputs="rms", whitened=True)
    modules = make_modules(config)
    save_adapter(tmp_path / "a", config, modules)
    read = load_adapter(tmp_path / "a", BASE).modules[Q0]
    assert read.inputs is not None
    assert torch.equal(read.inputs, modules[Q0].inputs)
    assert read.readouts is not None
    assert torch.equal(read.readouts, modules[Q0].readouts)
    edit_tensors(tmp_path / "a", change)
    with pytest.raises(AdapterError) as refused:
        load_adapter(tmp_path / "a", BASE)
    for part in parts:
        assert part in str(refused.value)


def test_offsets_and_scales_that_the_config_says_nothing_of_are_refused(adapter: Path) -> None:
    edit_tensors(adapter, put(INPUTS, torch.zeros(2, 12)))
    with pytest.raises(AdapterError, match="qaa_inputs does not belong in an adapter with inputs 'raw'"):
        load_adapter(adapter, BASE)


LAMBDA_B, LAMBDA_D = f"{PREFIX}{Q0}.qaa_lambda_b", f"{PREFIX}{Q0}.qaa_lambda_d"


def test_vectors_in_place_of_a_matrix(tmp_path: Path) -> None:
    config = make_config(vectors=True, heads=2)
    modules = make_modules(config)
    save_adapter(tmp_path / "a", config, modules)
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert tensors[LAMBDA_B].shape == (8,)
    assert tensors[LAMBDA_D].shape == (2 * 10,)  # all of 4 qubits' expectation values, singles and pairs
    assert not any("qaa_weight" in name for name in tensors)
    read = load_adapter(tmp_path / "a", BASE).modules[Q0]
    # The signs as the format has them, bit by bit.
    stream = int.from_bytes(hashlib.shake_256(b"qaa-serve 8x20").digest(20))
    s = torch.tensor([1.0 if stream >> (159 - i) & 1 else -1.0 for i in range(160)]).view(8, 20)
    b, d = modules[Q0].b
    torch.testing.assert_close(read.weight, torch.diag(b) @ s @ torch.diag(d))
    assert (read.rank, read.d_out, read.trained) == (20, 8, 2 * 5 * 4 + 8 + 20)
    assert config.scale(4) == pytest.approx(16 * 4 / 20**0.5)
    assert config.to_json()["vectors"] is True


BAD_VECTORS = {
    "lambda_b too short": (put(LAMBDA_B, torch.zeros(7)), ["8 rows of qaa_lambda_b", "4 and 7", "another base"]),
    "lambda_b of nothing": (put(LAMBDA_B, torch.zeros(0)), ["qaa_lambda_b", "(0,)", "(d_out,)"]),
    "lambda_b, a matrix": (put(LAMBDA_B, torch.zeros(8, 1)), ["qaa_lambda_b", "(8, 1)", "(d_out,)"]),
    "lambda_d too long": (put(LAMBDA_D, torch.zeros(11)), ["qaa_lambda_d", "(11,)", "(10,)"]),
    "lambda_d bf16": (
        put(LAMBDA_D, torch.zeros(10).bfloat16()),
        ["qaa_lambda_d", "bfloat16", "float32 is needed"],
    ),
    "lambda_d infinite": (put_value(LAMBDA_D, float("inf")), ["qaa_lambda_d", "2 values"]),
    "no lambda_d": (lambda tensors: tensors.pop(LAMBDA_D), ["qaa_lambda_d is missing"]),
    "a matrix too": (put(WEIGHT, torch.zeros(8, 10)), ["qaa_weight does not belong", "vectors True"]),
    # A file of a few megabytes must not become a matrix of gigabytes to be refused.
    "lambda_b for 2^21 outputs": (put(LAMBDA_B, torch.zeros(1 << 21)), ["8 rows of qaa_lambda_b", "2097152"]),
}


@pytest.mark.parametrize(("change", "parts"), BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_wrong_vectors_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], parts: list[str]
) -> None:
    config = make_config(vectors=True)
    save_adapter(tmp_path / "a", config, make_modules(config))
    edit_tensors(tmp_path / "a", change)
    assert_says(refusal(tmp_path / "a"), *parts)


@pytest.mark.parametrize(("change", "parts"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_wrong_tensors_are_refused(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], None], parts: list[str]
) -> None:
    edit_tensors(adapter, change)
    assert_says(refusal(adapter), *parts)


def test_heads_need_a_theta_each(tmp_path: Path) -> None:
    config = make_config(heads=3)
    save_adapter(tmp_path / "a", config, {Q0: make_module(config)})
    edit_config(tmp_path / "a", heads=2)
    assert_says(refusal(tmp_path / "a"), "qaa_theta", "(3, 5, 4)", "(2, 5, 4)", "2 heads")


def test_a_target_without_tensors_is_refused_even_without_a_base(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "v_proj"])
    assert_says(refusal(adapter, base=None), "target module 'v_proj' has no tensors")


@pytest.mark.parametrize(
    "module",
    ["lm_head", "model.embed_tokens", "transformer.wte", "model.layers.0.mlp.experts.3.up_proj"],
)
def test_what_cannot_be_adapted_is_refused(adapter: Path, module: str) -> None:
    edit_config(adapter, target_modules=["q_proj", module.rpartition(".")[2]])
    edit_tensors(adapter, put_module(module))
    base = {**BASE, module: (12, 8)}
    assert_says(refusal(adapter, base), repr(module), "cannot be adapted", "embeddings", "MoE experts")


def test_a_layer_too_wide_for_a_circuit_is_refused(adapter: Path) -> None:
    base = {**BASE, Q0: (70_000, 8)}
    assert_says(refusal(adapter, base), Q0, "cannot be adapted", "width 70000", "2 to 65536")


def test_a_target_is_a_whole_name_or_the_end_after_a_dot(adapter: Path) -> None:
    """PEFT's rule: ``proj`` does not take ``q_proj``; a longer end chooses one layer."""
    edit_config(adapter, target_modules=["proj"])
    assert_says(refusal(adapter), "target module 'proj' has no tensors")
    edit_config(adapter, target_modules=["layers.0.self_attn.q_proj", Q1])
    assert set(load_adapter(adapter, BASE).modules) == {Q0, Q1}


# -------------------------------------------------------------------------------------------- file errors


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    assert_says(refusal(adapter), f"{name} is missing", CONFIG_FILE, WEIGHTS_FILE)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert_says(refusal(tmp_path / "none"), "none is not a directory")


def test_a_file_in_the_place_of_the_directory_is_refused(adapter: Path) -> None:
    assert_says(refusal(adapter / CONFIG_FILE), f"{CONFIG_FILE} is not a directory")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_directory_in_the_place_of_a_file_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    (adapter / name).mkdir()
    assert_says(refusal(adapter), f"{name} is no regular file")


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    os.mkfifo(adapter / WEIGHTS_FILE)
    assert_says(refusal(adapter), f"{WEIGHTS_FILE} is no regular file")


class Bomb:
    """Unpickling it raises, and would be code of an attacker's choice."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled!')",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "weights.pkl"])
def test_a_pickle_is_never_read(adapter: Path, name: str) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    assert_says(refusal(adapter), "missing", f"{name} is a pickle, which is never read", "as safetensors")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "torch"])
def test_a_pickle_under_the_name_of_safetensors_is_refused(adapter: Path, protocol: int | str) -> None:
    path = adapter / WEIGHTS_FILE
    if protocol == "torch":
        torch.save({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(), protocol=int(protocol)))
    assert_says(refusal(adapter), WEIGHTS_FILE, "is a pickle file, which is never read", "as safetensors")


def header(content: dict[str, Any] | bytes, size: int | None = None) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw


def one_tensor(**changes: Any) -> dict[str, Any]:
    return {THETA: {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80], **changes}}


BAD_SAFETENSORS = {
    "empty": b"",
    "eight bytes": b"\0" * 8,
    "zeros": b"\0" * 1000,
    "text": b"this is no safetensors file, although its name says so",
    "a web page": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a header of 2**63 bytes": header(b"{}", 2**63),
    "a header of 1 GB": header(b"{}", 10**9),
    "a header beyond the file": header(b"{}", 100),
    "a header that is no JSON": header(b"{" * 100),
    "a deep header": header(b"[" * 100_000),
    "a header that is a list": header(b"[]"),
    "no data": header(one_tensor()),
    "data beyond the file": header(one_tensor(data_offsets=[0, 10**12])) + bytes(80),
    "offsets in reverse": header(one_tensor(data_offsets=[80, 0])) + bytes(80),
    "negative offsets": header(one_tensor(data_offsets=[-80, 0])) + bytes(80),
    "a shape too large": header(one_tensor(shape=[2**40, 2**40])) + bytes(80),
    "an unknown dtype": header(one_tensor(dtype="F33")) + bytes(80),
    "a dtype that torch lacks": header(one_tensor(dtype="F8_E8M0", shape=[80])) + bytes(80),
    "half a byte a number": header(one_tensor(dtype="F4", shape=[160])) + bytes(80),
    "bytes left over": header(one_tensor()) + bytes(81),
}


@pytest.mark.parametrize("content", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS)
def test_what_is_no_safetensors_file_is_refused(adapter: Path, content: bytes) -> None:
    (adapter / WEIGHTS_FILE).write_bytes(content)
    message = refusal(adapter)
    assert WEIGHTS_FILE in message
    assert "damaged" in message
    assert "pickle" not in message


def test_damage_is_found_or_harmless(adapter: Path) -> None:
    """Cut, flip and overwrite the weights at random: an AdapterError, or finite tensors of the right shapes."""
    print(f"QAA_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    path = adapter / WEIGHTS_FILE
    sound = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", sound[:8])[0]
    refused = 0
    for attempt in range(600):
        damaged = bytearray(sound)
        kind = attempt % 4
        if kind == 0:
            del damaged[dice.randrange(len(sound)) :]
        elif kind == 1:  # one bit, in the header
            damaged[dice.randrange(header_end)] ^= 1 << dice.randrange(8)
        elif kind == 2:  # one bit, in the numbers
            damaged[dice.randrange(header_end, len(sound))] ^= 1 << dice.randrange(8)
        else:
            start = dice.randrange(len(sound))
            damaged[start : start + dice.randrange(1, 40)] = dice.randbytes(dice.randrange(40))
        path.write_bytes(damaged)
        try:
            loaded = load_adapter(adapter, BASE)
        except AdapterError:
            refused += 1
            continue
        assert set(loaded.modules) == {Q0, Q1}
        for weights in loaded.modules.values():
            assert weights.theta.shape == (1, 5, 4)
            assert weights.weight.shape == (8, 4)
            assert weights.theta.isfinite().all()
            assert weights.weight.isfinite().all()
    assert refused > 200


def test_damage_of_the_config_is_found_or_harmless(adapter: Path) -> None:
    print(f"QAA_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    path = adapter / CONFIG_FILE
    sound = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(sound)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        if dice.random() < 0.3:
            del damaged[dice.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            loaded = load_adapter(adapter, BASE)
        except AdapterError:
            continue
        assert loaded.config.peft_type == "QAA"
        assert set(loaded.modules) == {Q0, Q1}


# -------------------------------------------------------------------------------------- links, permissions


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_that_leaves_the_directory_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).rename(tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    parts = [f"{name} is a link that leaves the adapter's directory", "copy the file into it"]
    assert_says(refusal(adapter), *parts)
    with pytest.raises(AdapterError, match="leaves the adapter's directory"):
        digest_of(adapter)


def test_a_relative_link_through_a_linked_directory_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (adapter / WEIGHTS_FILE).rename(tmp_path / "elsewhere" / WEIGHTS_FILE)
    (adapter / "files").symlink_to("../elsewhere", target_is_directory=True)
    (adapter / WEIGHTS_FILE).symlink_to(f"files/{WEIGHTS_FILE}")
    assert_says(refusal(adapter), f"{WEIGHTS_FILE} is a link that leaves the adapter's directory")


def test_a_neighbour_whose_name_begins_alike_is_elsewhere(adapter: Path) -> None:
    twin = shutil.copytree(adapter, adapter.with_name(adapter.name + "-2"))
    (adapter / WEIGHTS_FILE).unlink()
    (adapter / WEIGHTS_FILE).symlink_to(twin / WEIGHTS_FILE)
    assert_says(refusal(adapter), "leaves the adapter's directory")


def test_links_inside_the_directory_and_to_the_directory_are_followed(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS_FILE).rename(adapter / "v2.safetensors")
    (adapter / WEIGHTS_FILE).symlink_to("v2.safetensors")
    (tmp_path / "current").symlink_to(adapter, target_is_directory=True)
    assert load_adapter(tmp_path / "current", BASE).digest == digest_of(adapter)


@pytest.mark.parametrize("target", ["nowhere", WEIGHTS_FILE])
def test_a_link_to_nothing_or_to_itself_is_refused(adapter: Path, target: str) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    (adapter / WEIGHTS_FILE).symlink_to(target)
    assert_says(refusal(adapter), f"{WEIGHTS_FILE} is no regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", [".", CONFIG_FILE, WEIGHTS_FILE])
def test_what_may_not_be_read_is_refused(adapter: Path, place: str) -> None:
    (adapter / place).chmod(0)
    try:
        assert_says(refusal(adapter), "cannot be read: Permission denied", "permissions")
    finally:
        (adapter / place).chmod(0o700)


@pytest.mark.parametrize(("owner", "function"), [(Path, "is_file"), (Path, "stat"), (os, "open")])
def test_an_error_of_the_file_system_is_an_adapter_error(
    adapter: Path, owner: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a directory without the right to enter it, or a disk that fails, gives it; root can have it too."""
    original = getattr(owner, function)

    def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == WEIGHTS_FILE:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(owner, function, fail)
    assert_says(refusal(adapter), f"{WEIGHTS_FILE} cannot be read: Permission denied", "permissions")


# ------------------------------------------------------------------------------------------------- saving


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its content; directories as empty content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


def without_rows(module: ModuleWeights) -> ModuleWeights:
    return ModuleWeights(module.theta[:, 1:], module.weight)


UNSOUND = {
    "theta of another shape": lambda c, m: {Q0: without_rows(m[Q0])},
    "theta without heads": lambda c, m: {Q0: ModuleWeights(m[Q0].theta[0], m[Q0].weight)},
    "theta of more heads": lambda c, m: {Q0: ModuleWeights(m[Q0].theta.expand(2, -1, -1), m[Q0].weight)},
    "weight of another shape": lambda c, m: {Q0: ModuleWeights(m[Q0].theta, m[Q0].weight[:, 1:])},
    "weight in double": lambda c, m: {Q0: ModuleWeights(m[Q0].theta, m[Q0].weight.double())},
    "weight NaN": lambda c, m: {Q0: ModuleWeights(m[Q0].theta, m[Q0].weight * float("nan"))},
    "theta beyond float32": lambda c, m: {Q0: ModuleWeights(m[Q0].theta.double() * 1e300, m[Q0].weight)},
    "no modules": lambda c, m: {},
    "a module not targeted": lambda c, m: {**m, "model.layers.0.self_attn.k_proj": m[Q0]},
    "a head": lambda c, m: {**m, "lm_head": m[Q0]},
}


@pytest.mark.parametrize("unsound", UNSOUND.values(), ids=UNSOUND)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unsound_adapter_is_not_written(tmp_path: Path, unsound: Any, overwrite: bool) -> None:
    config = make_config()
    modules = make_modules(config)
    if overwrite:
        save_adapter(tmp_path / "a", config, modules)
    before = tree(tmp_path)
    with pytest.raises(AdapterError):
        save_adapter(tmp_path / "a", config, unsound(config, modules), overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("step", ["write", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_on_the_way_leaves_what_was_there(
    tmp_path: Path, step: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a rename that fails: the old adapter stays, and nothing lies beside it."""
    config = make_config()
    if overwrite:
        save_adapter(tmp_path / "a", config, make_modules(config))
    before = tree(tmp_path)
    rename = Path.rename

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def rename_into_place(path: Path, target: Path) -> Path:
        return full() if target == tmp_path / "a" and not path.name.endswith(".old") else rename(path, target)

    if step == "write":
        monkeypatch.setattr("qaa_serve.adapters.files.save_file", full)
    else:
        monkeypatch.setattr(Path, "rename", rename_into_place)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "a", config, make_modules(config), overwrite=overwrite)
    assert tree(tmp_path) == before


def test_an_adapter_that_is_there_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    config = make_config(alpha=1.0)
    with pytest.raises(FileExistsError, match=r"exists; choose another output or allow overwriting"):
        save_adapter(adapter, config, make_modules(config))
    assert tree(tmp_path) == before


def test_overwriting_replaces_the_whole_directory_and_leaves_nothing_beside_it(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / "old-notes.txt").write_text("of the old one")
    config = make_config(alpha=1.0)
    save_adapter(adapter, config, make_modules(config), overwrite=True)
    assert load_adapter(adapter, BASE).config.alpha == 1.0
    assert set(tree(tmp_path)) == {"adapter", f"adapter/{CONFIG_FILE}", f"adapter/{WEIGHTS_FILE}"}


def test_a_reader_never_sees_half_an_adapter(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename, the adapter's place holds the old one whole, the new one whole, or nothing."""
    seen = []
    rename = Path.rename
    old = digest_of(adapter)

    def look_and_rename(path: Path, target: Path) -> Path:
        result = rename(path, target)
        seen.append(digest_of(adapter) if adapter.exists() else None)
        return result

    monkeypatch.setattr(Path, "rename", look_and_rename)
    config = make_config(alpha=1.0)
    save_adapter(adapter, config, make_modules(config), overwrite=True)
    assert seen[-1] == digest_of(adapter) != old
    assert set(seen) <= {old, None, seen[-1]}


def test_an_empty_directory_may_be_filled_and_parents_are_made(tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "new" / "deeper" / "adapter"):
        save_adapter(place, config, make_modules(config))
        assert load_adapter(place, BASE).config == config
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    config = make_config()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not a directory"):
            save_adapter(tmp_path / "a", config, make_modules(config), overwrite=overwrite)
    assert tree(tmp_path) == {"a": b"precious"}


def test_saving_over_a_link_replaces_what_it_points_to(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(adapter, target_is_directory=True)
    config = make_config(alpha=1.0)
    save_adapter(tmp_path / "current", config, make_modules(config), overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert load_adapter(adapter, BASE).config.alpha == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "current"]


@pytest.mark.parametrize("contiguous", [True, False])
def test_modules_may_share_their_tensors_of_any_layout(tmp_path: Path, contiguous: bool) -> None:
    """As at the start of training, when each B is the same zeros."""
    config = make_config()
    theta, weight = torch.randn(4, 5).T.unsqueeze(0), torch.zeros(1, 4).expand(8, -1)
    shared = ModuleWeights(theta.contiguous(), weight.contiguous()) if contiguous else ModuleWeights(theta, weight)
    save_adapter(tmp_path / "a", config, {Q0: shared, Q1: shared})
    loaded = load_adapter(tmp_path / "a", BASE)
    assert torch.equal(loaded.modules[Q1].theta, theta)
    assert torch.equal(loaded.modules[Q1].weight, weight)


def test_trained_parameters_can_be_saved_as_they_are(tmp_path: Path) -> None:
    config = make_config()
    module = ModuleWeights(
        torch.nn.Parameter(torch.randn(1, 5, 4, dtype=torch.float64)), torch.nn.Parameter(torch.randn(8, 4))
    )
    save_adapter(tmp_path / "a", config, {Q0: module})
    loaded = load_adapter(tmp_path / "a").modules[Q0]
    assert not loaded.theta.requires_grad
    assert torch.equal(loaded.theta, module.theta.detach().float())


def test_extra_files_are_written_beside_the_adapter(tmp_path: Path) -> None:
    config = make_config()
    save_adapter(tmp_path / "a", config, make_modules(config), extra_files={"README.md": "größer"})
    assert (tmp_path / "a" / "README.md").read_text(encoding="utf-8") == "größer"
    load_adapter(tmp_path / "a", BASE)


@pytest.mark.parametrize(
    "name", ["../README.md", "/tmp/README.md", "sub/a.md", "", ".", "..", CONFIG_FILE, WEIGHTS_FILE]
)
def test_extra_files_neither_leave_the_directory_nor_replace_the_adapter(tmp_path: Path, name: str) -> None:
    config = make_config()
    with pytest.raises(ValueError, match="plain file name"):
        save_adapter(tmp_path / "a", config, make_modules(config), extra_files={name: "x"})
    assert tree(tmp_path) == {}


def test_saved_files_can_be_read_by_the_server_s_own_user(adapter: Path) -> None:
    """A temporary directory is its maker's alone; an adapter is not."""
    assert adapter.stat().st_mode & 0o777 == 0o755


# --------------------------------------------------------------------------------------------- resolve_base


def test_a_base_beside_the_adapter_is_found_from_anywhere(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir("/")
    assert resolve_base(adapter, "../base") == str((tmp_path / "base").resolve())


@pytest.mark.parametrize("name", ["org/model", "../not-there", "x" * 5000, "nul\0byte"])
def test_any_other_name_of_a_base_stays_as_it_is(adapter: Path, name: str) -> None:
    assert resolve_base(adapter, name) == name


def test_an_absolute_path_of_a_base_is_kept(adapter: Path, tmp_path: Path) -> None:
    assert resolve_base(adapter, str(tmp_path)) == str(tmp_path.resolve())
