"""adapter_config.json: defaults, PEFT's own keys, and the scale."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qaa_serve.adapters import AdapterConfig, AdapterError, matches

MINIMAL = {
    "peft_type": "QAA",
    "qaa_format": 1,
    "base_model_name_or_path": "org/model",
    "target_modules": ["v_proj", "q_proj", "v_proj"],
}


def test_defaults() -> None:
    config = AdapterConfig.parse(MINIMAL)
    assert (config.ansatz, config.layers, config.heads, config.alpha) == ("ryrz_ring_ry", 2, 1, 16.0)
    assert config.task_type == "CAUSAL_LM"


def test_target_modules_have_one_order_so_that_equal_adapters_are_equal_files() -> None:
    assert AdapterConfig.parse(MINIMAL).target_modules == ("q_proj", "v_proj")


def test_what_is_written_is_read_back() -> None:
    config = AdapterConfig.parse({**MINIMAL, "ansatz": "ry_ring", "layers": 3, "heads": 2, "alpha": 4})
    assert AdapterConfig.parse(config.to_json()) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        AdapterConfig.parse(MINIMAL).alpha = 2.0  # type: ignore[misc]


def test_keys_that_peft_adds_are_taken() -> None:
    """Whatever PEFT writes for every method, with values as in real files."""
    peft = pytest.importorskip("peft")
    written: dict[str, Any] = peft.PeftConfig(base_model_name_or_path="org/model").to_dict()
    written |= {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "revision": "main"}
    config = AdapterConfig.parse({**written, **MINIMAL, "inference_mode": True})
    assert config == AdapterConfig.parse({**MINIMAL, "task_type": None})
    assert "peft_version" not in config.to_json()


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(AdapterError) as caught:
        AdapterConfig.parse({**MINIMAL, "layers": 0, "heads": 1.5, "extra": 1})
    for field in ("layers", "heads", "extra"):
        assert f"{field}: " in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "qubits", "scale"), [(1, 9, 16 * 2**4.5 / 9), (1, 12, 16 * 64 / 12), (3, 4, 16 * 4 / 12)]
)
def test_scale_and_rank_are_the_formula_s(heads: int, qubits: int, scale: float) -> None:
    config = AdapterConfig.parse({**MINIMAL, "heads": heads})
    assert config.scale(qubits) == pytest.approx(scale, rel=1e-12)
    assert config.rank(qubits) == heads * qubits


def test_the_circuit_has_the_config_s_form() -> None:
    circuit = AdapterConfig.parse({**MINIMAL, "ansatz": "ry_ring", "layers": 3}).circuit(9)
    assert (circuit.name, circuit.qubits, circuit.layers) == ("ry_ring", 9, 3)


@pytest.mark.parametrize(
    ("module", "target", "taken"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "proj", False),
        ("model.layers.0.self_attn.q_proj", "attn.q_proj", False),
        ("model.layers.0.self_attn.q_proj", "model", False),
        ("model.layers.0.self_attn.q_proj", "q.proj", False),
    ],
)
def test_targets_are_matched_by_peft_s_rule(module: str, target: str, taken: bool) -> None:
    assert matches(module, ("none", target)) is taken


def test_exclude_modules_is_refused_rather_than_ignored():
    raw = AdapterConfig(base_model_name_or_path="base", target_modules=("q_proj",)).to_json()
    assert AdapterConfig.parse(raw | {"exclude_modules": None}).target_modules == ("q_proj",)
    with pytest.raises(AdapterError, match="list the layers to adapt in target_modules"):
        AdapterConfig.parse(raw | {"exclude_modules": ["k_proj"]})
