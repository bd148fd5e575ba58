"""Train the example's tokenizer and base model on data/base_train.jsonl, on one CPU thread.

    python examples/assistant/train_base.py [--data FILE] [--output DIR] [--epochs 1] [--seed 7]

The loss is on what the assistant says, and on all of the rows that are plain text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

HERE = Path(__file__).parent
VOCABULARY = 2048
PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
<|system|>{{ message.content | trim }}
{%- elif message.role == 'user' -%}
<|user|>{{ message.content | trim }}
{%- elif message.role == 'assistant' -%}
<|assistant|>{{ message.content | trim }}<|end|>
{%- else -%}
{{ raise_exception('Unknown role: ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}"""


def read_rows(path: Path) -> list[dict]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts(rows: list[dict]) -> Iterator[str]:
    """All text in the rows, message by message."""
    for row in rows:
        if "text" in row:
            yield row["text"]
        else:
            yield from (message["content"] for message in row["messages"])


def train_tokenizer(rows: list[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text works, words of the training text are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


class Rows(Dataset):
    """Token ids with labels of every row."""

    def __init__(self, rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
        self.examples = [self.encode(row, tokenizer) for row in rows]

    @staticmethod
    def encode(row: dict, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int] | int]:
        """The row as the chat template writes it, with labels where the loss is."""
        ids: list[int] = []
        labels: list[int] = []
        if "text" in row:
            ids = tokenizer.encode(row["text"] + END)
            labels = list(ids)
        else:
            for message in row["messages"]:
                opening = [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")]
                if message["role"] == "assistant":
                    said = tokenizer.encode(message["content"] + END)
                    labels += [-100, *said]
                else:
                    said = tokenizer.encode(message["content"])
                    labels += [-100] * (len(said) + 1)
                ids += opening + said
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "length": len(ids)}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        return self.examples[index]


class Collator(DataCollatorForSeq2Seq):
    """Pads ids and labels; the lengths only serve the sampler."""

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        kept = [{name: value for name, value in row.items() if name != "length"} for row in features]
        return super().__call__(kept, return_tensors)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama of width 256, which a QAA adapter reads with eight qubits."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "base_train.jsonl")
    parser.add_argument("--output", type=Path, default=HERE / "base")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    torch.set_num_threads(1)
    set_seed(args.seed)
    rows = read_rows(args.data)
    tokenizer = train_tokenizer(rows)
    data = Rows(rows, tokenizer)
    model = make_model(tokenizer)
    tokens = sum(example["length"] for example in data)
    print(f"{len(data)} rows, {tokens} tokens, vocabulary {len(tokenizer)}, {model.num_parameters()} parameters")

    started = time.perf_counter()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            adam_beta2=0.98,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            remove_unused_columns=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=data,
        data_collator=Collator(tokenizer),
    )
    trainer.train()
    print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes")

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.use_cache = True  # Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
