"""The widths of a base model's linear layers, from its config alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qaa_serve.adapters import (
    AdapterConfig,
    AdapterError,
    LinearWidths,
    ModuleWeights,
    linear_widths,
    load_adapter,
    resolve_base,
    save_adapter,
)

transformers = pytest.importorskip("transformers")


def saved_config(directory: Path, kind: str) -> Path:
    """A directory with config.json and nothing else."""
    small = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(
            **small, hidden_size=24, intermediate_size=40, num_key_value_heads=2, head_dim=8
        ),
        "qwen2": lambda: transformers.Qwen2Config(
            **small, hidden_size=32, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=True
        ),
        "opt": lambda: transformers.OPTConfig(**small, hidden_size=16, ffn_dim=40, word_embed_proj_dim=16),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_layer=2, n_head=4, n_embd=16),
    }[kind]()
    config.save_pretrained(directory)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    return directory


def layers(prefix: str, widths: dict[str, tuple[int, int]]) -> LinearWidths:
    return {f"{prefix}.{layer}.{name}": width for layer in range(2) for name, width in widths.items()}


EXPECTED = {
    "llama": layers(
        "model.layers",
        {
            "self_attn.q_proj": (24, 32),
            "self_attn.k_proj": (24, 16),
            "self_attn.v_proj": (24, 16),
            "self_attn.o_proj": (32, 24),
            "mlp.gate_proj": (24, 40),
            "mlp.up_proj": (24, 40),
            "mlp.down_proj": (40, 24),
        },
    ),
    "qwen2": layers(
        "model.layers",
        {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (32, 8),
            "self_attn.v_proj": (32, 8),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (32, 48),
            "mlp.up_proj": (32, 48),
            "mlp.down_proj": (48, 32),
        },
    ),
    "opt": layers(
        "model.decoder.layers",
        {
            **{f"self_attn.{name}_proj": (16, 16) for name in ("q", "k", "v", "out")},
            "fc1": (16, 40),
            "fc2": (40, 16),
        },
    ),
    "gpt2": layers(
        "transformer.h",
        {
            "attn.c_attn": (16, 48),
            "attn.c_proj": (16, 16),
            "mlp.c_fc": (16, 64),
            "mlp.c_proj": (64, 16),
        },
    ),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_widths_of_every_linear_layer_but_the_head(tmp_path: Path, kind: str) -> None:
    assert dict(linear_widths(saved_config(tmp_path / "base", kind))) == EXPECTED[kind]


def test_an_adapter_is_checked_against_a_real_base(tmp_path: Path) -> None:
    """An adapter names its base by a relative path, fits it, and does not fit another."""
    saved_config(tmp_path / "llama", "llama")
    config = AdapterConfig(base_model_name_or_path="../llama", target_modules=("o_proj",))
    qubits, d_out = 5, 24
    rows = config.circuit(qubits).rows

    module = ModuleWeights(torch.zeros(1, rows, qubits), torch.zeros(d_out, qubits))
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    save_adapter(tmp_path / "adapter", config, dict.fromkeys(names, module))

    base = resolve_base(tmp_path / "adapter", config.base_model_name_or_path)
    assert set(load_adapter(tmp_path / "adapter", linear_widths(base)).modules) == set(names)
    for kind, part in {
        "qwen2": r"is 32 -> 32 in the base model.*the adapter has 5 and 24: it was made for another base",
        "gpt2": r"no linear layer 'model\.layers\.0\.self_attn\.o_proj'.*c_attn, c_fc, c_proj",
    }.items():
        other = linear_widths(saved_config(tmp_path / kind, kind))
        with pytest.raises(AdapterError, match=part):
            load_adapter(tmp_path / "adapter", other)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no_such_model"}'])
def test_a_base_that_cannot_be_read_is_an_adapter_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdapterError, match=rf"the base model '{tmp_path}' cannot be read"):
        linear_widths(tmp_path)
