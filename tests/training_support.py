"""What the training tests share: a tiny base with a chat template, eight rows, options for a short training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_training_data import tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qaa_serve.training import TrainOptions

ROWS = [
    {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "arr " + c}]}
    for c in "abcdefgh"
]

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

#: Names the tools, and writes their calls and results; has a variable of its own.
TOOLS = """\
{%- if shout is defined %}{{ shout }}!{% endif -%}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ ' ' + message.name if message.name else '' }}
{{ '<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '' }}
{{- message.content }}
{%- for call in message.tool_calls %}
<call>{{ call | tojson }} {{ call.function.arguments | length }}</call>
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

#: Takes a list of parts as well as a string, and writes the two differently.
PARTS = CHATML.replace(
    "{{ message.content }}",
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}",
)


def chatml_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's and SmolLM2's, in which blank lines are one token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = ["Where is my parcel? It is on its way.\n\n", "assistant\n\n\nuser\n\nsystem\n", "Paris\n\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=template)


def make_chat_base(directory: Path, given: PreTrainedTokenizerFast | None = None) -> Path:
    """A tiny random Llama in a directory, with a tokenizer."""
    words = given or tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)
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
