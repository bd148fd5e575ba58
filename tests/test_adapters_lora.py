"""LoRA adapters on disk: what vLLM would serve as it was trained is taken, the rest is refused with its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from registry_support import make_lora
from safetensors.torch import load_file, save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    MAX_RANK,
    WEIGHTS_FILE,
    AdapterError,
    LoraConfig,
    check_lora,
    digest_of,
    judge,
)
from qaa_serve.registry import read_revision

ROOT = Path(__file__).parents[1]
Q0, LAYER = "model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"
DROPPED = object()


def write(directory: Path, **changes: Any) -> Path:
    """A sound adapter with another config."""
    make_lora(directory)
    file = directory / CONFIG_FILE
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not DROPPED}))
    return directory


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        judge(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert CONFIG_FILE in message or WEIGHTS_FILE in message
    return message


def test_what_peft_writes_is_taken() -> None:
    lora = check_lora(ROOT / "examples" / "assistant" / "adapters" / "brief-lora")
    assert len(lora.modules) == 16
    assert lora.config.rank == 8
    pair = lora.modules[Q0]
    assert (tuple(pair.a.shape), tuple(pair.b.shape), pair.scale) == ((8, 256), (256, 8), 2.0)
    assert lora.digest == digest_of(ROOT / "examples" / "assistant" / "adapters" / "brief-lora")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": None},
        {"lora_alpha": 16.5},
        {"lora_alpha": -1},
        {"use_rslora": True},
        {"rank_pattern": None, "alpha_pattern": {"self_attn.q_proj": 0.5}},
        {"rank_pattern": {r".*\.layers\.\d+\..*\.(q|k)_proj": 4}},
        {"rank_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 4}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"corda_config": {"cache_file": "x"}, "exclude_modules": ["k_proj"], "layers_to_transform": [0]},
        {"fan_in_fan_out": True, "megatron_config": {"a": 1}, "lora_dropout": 0.1, "loftq_config": {}},
        {"modules_to_save": [], "target_parameters": None, "alora_invocation_tokens": None},
        {"a_key_of_a_later_peft": {"x": [1, 2]}},
    ],
    ids=str,
)
def test_what_changes_nothing_or_what_vllm_does_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = write(tmp_path / "a", **changes)
    sound = judge(directory)
    assert sound.kind == "LORA"
    assert sound.digest == digest_of(directory)


@pytest.mark.parametrize("base", [None, "", DROPPED], ids=["null", "empty", "none"])
def test_an_adapter_may_name_no_base(tmp_path: Path, base: Any) -> None:
    """Its own directory is not one."""
    assert read_revision(write(tmp_path / "a", base_model_name_or_path=base)).base == ""


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "r huge": ({"r": 100_000}, ["positive integer r", "512 or less", "vLLM's largest rank", "found 100000"]),
    "r just too large": ({"r": 513}, ["512 or less", "found 513"]),
    "r zero": ({"r": 0}, ["positive integer r", "found 0"]),
    "r negative": ({"r": -8}, ["positive integer r", "found -8"]),
    "r true": ({"r": True}, ["positive integer r", "found True"]),
    "r a float": ({"r": 8.0}, ["positive integer r", "found 8.0"]),
    "r text": ({"r": "8"}, ["positive integer r", "found '8'"]),
    "r null": ({"r": None}, ["positive integer r", "found None"]),
    "r beyond every number": ({"r": 10**4000}, ["positive integer r", "found 1000"]),
    "no r": ({"r": DROPPED}, ["r: Field required"]),
    "no alpha": ({"lora_alpha": DROPPED}, ["lora_alpha: Field required"]),
    "alpha text": ({"lora_alpha": "16"}, ["lora_alpha: a number is needed", "found '16'"]),
    "alpha NaN": ({"lora_alpha": math.nan}, ["'lora_alpha' is nan"]),
    "alpha infinite": ({"lora_alpha": math.inf}, ["'lora_alpha' is inf"]),
    "alpha true": ({"lora_alpha": True}, ["lora_alpha: a number", "found True"]),
    "alpha huge": ({"lora_alpha": 10**400}, ["lora_alpha: a number", "1e+06 or less"]),
    "rank_pattern a list": ({"rank_pattern": [8]}, ["rank_pattern: an object is needed", "found [8]"]),
    "rank_pattern text": ({"rank_pattern": "x"}, ["rank_pattern: an object is needed"]),
    "rank_pattern huge": ({"rank_pattern": {"q_proj": 1024}}, ["'q_proj' is 1024", "512 or less"]),
    "rank_pattern a float": ({"rank_pattern": {"q_proj": 4.0}}, ["'q_proj' is 4.0", "positive integer"]),
    "rank_pattern no expression": ({"rank_pattern": {"(": 4}}, ["rank_pattern: '(' is 4"]),
    "rank_pattern without end": ({"rank_pattern": {"(a+)+$": 4}}, ["no name that is simple to search for"]),
    "rank_pattern without end too": ({"rank_pattern": {".*.*.*.*x": 4}}, ["no name that is simple to search for"]),
    "alpha_pattern a number": ({"alpha_pattern": 3}, ["alpha_pattern: an object is needed", "found 3"]),
    "alpha_pattern text": ({"alpha_pattern": {"q_proj": "8"}}, ["'q_proj' is '8': a number is needed"]),
    "alpha_pattern a list": ({"alpha_pattern": {"q_proj": [1]}}, ["'q_proj' is [1]"]),
    "base a number": ({"base_model_name_or_path": 7}, ["base_model_name_or_path", "found 7"]),
    "base half a character": ({"base_model_name_or_path": "\ud800"}, ["is not JSON", "surrogates"]),
    "targets a number": ({"target_modules": 3}, ["target_modules: a list of names", "found 3"]),
    "targets an object": ({"target_modules": {"q_proj": 1}}, ["target_modules: a list of names"]),
    "targets not names": ({"target_modules": ["q_proj", None]}, ["target_modules: a list of names"]),
    "no targets": ({"target_modules": DROPPED}, ["target_modules: Field required"]),
    "DoRA": ({"use_dora": True}, ["use_dora: vLLM has no DoRA", "found True"]),
    "QALoRA": ({"use_qalora": True}, ["use_qalora: vLLM has no QALoRA"]),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora: vLLM has no block-diagonal LoRA"]),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens: vLLM has no activated", "[1, 2]"]),
    "Arrow": ({"arrow_config": {}}, ["arrow_config: vLLM does not route"]),
    "KaSA": ({"kasa_config": {}}, ["kasa_config: KaSA changes the base's weights"]),
    "lora_bias": ({"lora_bias": True}, ["lora_bias: vLLM has no bias"]),
    "bias": ({"bias": "all"}, ["bias", "found 'all'"]),
    "bias null": ({"bias": None}, ["bias", "found None"]),
    "layer_replication": ({"layer_replication": [[0, 4]]}, ["layer_replication", "found [[0, 4]]"]),
    "tokens": ({"trainable_token_indices": [5]}, ["trainable_token_indices", "found [5]"]),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, ["modules_to_save: vLLM serves no whole modules"]),
    "modules_to_save text": ({"modules_to_save": "score"}, ["modules_to_save"]),
    "target_parameters": ({"target_parameters": ["mlp.weight"]}, ["target_parameters: vLLM serves"]),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, ["init_lora_weights", "conversion", "'pissa_niter_16'"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["init_lora_weights", "found 'olora'"]),
    "LoftQ": ({"init_lora_weights": "loftq"}, ["init_lora_weights", "found 'loftq'"]),
    "CorDA": ({"init_lora_weights": "corda"}, ["init_lora_weights", "found 'corda'"]),
    "init a number": ({"init_lora_weights": 7}, ["init_lora_weights", "found 7"]),
    "rsLoRA text": ({"use_rslora": "yes"}, ["use_rslora", "found 'yes'"]),
    "all that is wrong": ({"use_dora": True, "r": 0, "bias": "all"}, ["use_dora", "r: a positive", "bias"]),
    "another method": ({"peft_type": "IA3"}, ["peft_type 'IA3'", "QAA and LORA"]),
    "a method of its own kind": ({"peft_type": ["LORA"]}, ["peft_type ['LORA']"]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_vllm_cannot_serve_is_refused(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(write(tmp_path / "a", **changes))
    assert message.startswith(CONFIG_FILE)
    for part in parts:
        assert part in message, message


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
HEAD = "base_model.model.lm_head"

BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], list[str]]] = {
    "float8": ({A: torch.ones(4, 16).to(torch.float8_e4m3fn)}, [A[:60], "dtype F8_E4M3", "full precision"]),
    "int8": ({B: torch.ones(16, 4).to(torch.int8)}, ["lora_B.weight", "dtype I8"]),
    "no numbers": ({A: torch.ones(4, 0)}, ["lora_A.weight", "is empty, its shape is [4, 0]"]),
    "no A": ({A: None}, [Q0, "lora_A is missing"]),
    "no B": ({B: None}, [Q0, "lora_B is missing"]),
    "flat": ({A: torch.ones(64)}, ["lora_A has shape (64,)", "(rank, d_in)"]),
    "3-D": ({A: torch.ones(1, 4, 16)}, ["lora_A has shape (1, 4, 16)"]),
    "A of another rank": ({A: torch.ones(3, 16)}, ["lora_A has shape (3, 16)", "of rank 4"]),
    "both of another rank": ({A: torch.ones(8, 16), B: torch.ones(16, 8)}, ["of rank 4", CONFIG_FILE]),
    "a name of its own": ({"x": torch.ones(1)}, ["tensor 'x' is none that vLLM serves", "lora_A.weight"]),
    "an adapter's name in it": ({f"{LAYER}.lora_A.default.weight": torch.ones(4, 16)}, ["none that vLLM serves"]),
    "DoRA's vector": ({f"{LAYER}.lora_magnitude_vector": torch.ones(16)}, ["none that vLLM serves"]),
    "a bias": ({f"{LAYER}.lora_B.bias": torch.ones(16)}, ["lora_B.bias", "none that vLLM serves"]),
    "whole embeddings": ({"model.embed_tokens.weight": torch.ones(4, 4)}, ["save_embedding_layers"]),
    "a head that was not named": ({"base_model.model.score.weight": torch.ones(2, 4)}, ["none that vLLM serves"]),
    "a QAA tensor": ({f"{LAYER}.qaa_theta": torch.ones(5, 4)}, ["qaa_theta", "none that vLLM serves"]),
    "twice": ({A.removeprefix("base_model.model."): torch.ones(4, 16)}, ["is there twice"]),
    "the output head": (
        {f"{HEAD}.lora_A.weight": torch.ones(4, 16), f"{HEAD}.lora_B.weight": torch.ones(9, 4)},
        ["LoRA on the output head cannot be served", "target_modules"],
    ),
    "NaN": ({B: torch.full((16, 4), math.nan)}, [B, "64 values that are NaN or infinite"]),
    "infinite": ({B: torch.full((16, 4), 1e6).half()}, [B, "64 values that are NaN or infinite"]),
    "a name of two lines": ({"a\nb\x1b.lora_A.weight": torch.ones(4, 4)}, [r"a\nb\x1b", "none that vLLM serves"]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_vllm_cannot_serve_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], parts: list[str]
) -> None:
    directory = make_lora(tmp_path / "a")
    tensors = {**load_file(directory / WEIGHTS_FILE), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, directory / WEIGHTS_FILE)
    message = refusal(directory)
    assert message.startswith(WEIGHTS_FILE)
    for part in parts:
        assert part in message, message


def test_what_belongs_to_other_models_is_left_to_the_engine(tmp_path: Path) -> None:
    """Classification heads that are named, experts in the layouts of MoE models, embeddings."""
    directory = write(tmp_path / "a", modules_to_save=["score"], target_parameters=["mlp.experts.down_proj"])
    more = {
        "base_model.model.score.weight": torch.ones(2, 16),
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(32, 16),
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.ones(16, 32),
        "base_model.model.model.layers.1.mlp.experts.w1.lora_A.weight": torch.ones(8, 4, 16),
        "base_model.model.model.layers.1.mlp.experts.w1.lora_B.weight": torch.ones(8, 16, 4),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 30),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(16, 4),
        "base_model.model.model.embed_tokens.base_layer.weight": torch.ones(30, 16),
    }
    save_file({**load_file(directory / WEIGHTS_FILE), **more}, directory / WEIGHTS_FILE)
    lora = check_lora(directory)
    assert lora.modules["model.embed_tokens"].a.shape == (4, 30)
    assert len(lora.other) == 4
    assert lora.nbytes == sum(t.nbytes for t in load_file(directory / WEIGHTS_FILE).values())
    assert "base_layer.weight: vLLM passes over it" in lora.notes[0]


def test_embeddings_that_are_tied_to_the_head_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", ensure_weight_tying=True)
    tables = {f"model.embed_tokens.lora_embedding_{kind}": torch.ones(4, 4) for kind in "AB"}
    save_file({**load_file(directory / WEIGHTS_FILE), **tables}, directory / WEIGHTS_FILE)
    assert "ensure_weight_tying" in refusal(directory)


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ({Q0: (32, 16)}, ["is 32 -> 16 in the base model and 16 -> 16 here", "another base, 'org/base'"]),
        ({Q0.replace("0", "1"): (16, 16)}, ["the base model has no layer", "others like it", "another base"]),
    ],
)
def test_what_the_base_has_otherwise_is_refused(tmp_path: Path, base: Any, parts: list[str]) -> None:
    message = refusal(make_lora(tmp_path / "a"), base=base)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("base", [{Q0: (16, 16)}, {"decoder.blocks.0.attn": (16, 16)}, None])
def test_what_fits_the_base_or_has_names_of_its_own_is_taken(tmp_path: Path, base: Any) -> None:
    assert judge(make_lora(tmp_path / "a"), base=base).rank == 4


def test_ranks_and_scales_are_those_of_peft_and_vllm(tmp_path: Path) -> None:
    helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed").PEFTHelper
    raw = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_rslora": True,
        "rank_pattern": {"layers.1.mlp": 4, "q_proj": 2, r"layers\.\d\.k_proj": 3},
        "alpha_pattern": {"q_proj": 5.5, "up": 1},
    }  # fmt: skip
    ours, theirs = LoraConfig.parse(raw), helper.from_dict(raw)
    for module in (
        "model.layers.1.mlp",
        "model.layers.0.q_proj",
        "layers.7.k_proj",
        "xq_proj",
        "mlp.up",
        "q_proj.x",
    ):
        assert (ours.rank_of(module), ours.scale_of(module)) == theirs.get_rank_and_scaling(module)
    assert ours.rank == 8


def test_the_largest_rank_is_vllm_s() -> None:
    lora = pytest.importorskip("vllm.config.lora", reason="vLLM is not installed")
    assert max(lora.MaxLoRARanks.__args__) == MAX_RANK
