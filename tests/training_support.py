"""What the training tests share: a tiny base with a chat template, eight rows, options for a short training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_training_data import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from qaa_serve.training import TrainOptions

ROWS = [
    {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "arr " + c}]}
    for c in "abcdefgh"
]


def make_chat_base(directory: Path) -> Path:
    """A tiny random Llama in a directory, with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def options(base: Path, data: Path, **changed: Any) -> TrainOptions:
    given = {"output": data.parent / "adapters" / "new", "lr": 3e-2, "max_steps": 4, "batch_size": 4, **changed}
    return TrainOptions(model=str(base), data=data, **given)


def files(directory: Path) -> dict[str, bytes]:
    """All but the record, which has durations in it."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "training.json"}


def weights(directory: Path) -> bytes:
    return next(directory.glob("*.safetensors")).read_bytes()
