"""What a training would be, said without training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qaa_serve.training.card import percent
from qaa_serve.training.data import collate
from qaa_serve.training.options import TrainOptions
from qaa_serve.training.prepare import Prepared, prepare, without_cache
from qaa_serve.training.trainer import SavedBytes, planned_steps, world_size


def dry_run(options: TrainOptions) -> None:
    """Do all that ``train`` does before its first step, and print what it found. Nothing is written.

    Raises:
        TrainingError: as ``train``.
    """
    run = prepare(options)
    console = Console(highlight=False)
    rows, lines = run.rows.source_rows, len(run.rows)
    packed = f" packed into {lines:,}" if lines != rows else ""
    parts = memory(run)
    say = [
        *run.notes,
        f"adapted layers: {', '.join(run.targets)}" if run.targets else "",
        f"trained parameters: {run.trainable:,} ({percent(run.trainable, run.total)} of the base's {run.total:,})",
        f"data: {rows:,} rows{packed}, {run.rows.tokens:,} tokens, of which the loss is on "
        f"{run.rows.answer_tokens:,}",
        f"steps: {planned_steps(options, lines, world_size()):,} of {options.batch_size} x {options.grad_accum} "
        "rows",
        f"memory: {_megabytes(sum(parts.values()))}, as an estimate: "
        + ", ".join(f"{what} {_megabytes(size)}" for what, size in parts.items()),
        "first row, the part that the loss is on in [[ ]]:" if not console.is_terminal else "first row:",
    ]
    for line in filter(None, say):
        console.print(line, markup=False, soft_wrap=True)
    example = Text()
    for text, learnt in _spans(run.rows[0], run.tokenizer):
        shown = f"[[{text}]]" if learnt and not console.is_terminal else text
        example.append(shown, style="bold green" if learnt else "dim")
    console.print(example, soft_wrap=True)


def memory(run: Prepared) -> dict[str, int]:
    """What memory is needed for -> bytes; activations are measured on the longest batch."""
    return {
        "weights": sum(p.nbytes for p in run.model.parameters()),
        "gradients": 4 * run.trainable,
        "AdamW's two moments": 8 * run.trainable,
        "activations kept for the backward pass": _measure_saved(run),
    }


def _measure_saved(run: Prepared) -> int:
    """Bytes that a forward pass over the longest batch keeps for the backward pass."""
    model: Any = run.model
    longest = sorted(run.rows.rows, key=lambda row: -len(row["input_ids"]))[: run.options.batch_size]
    device = next(run.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(longest).items()}
    if run.options.gradient_checkpointing:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    with without_cache(run.model), SavedBytes(run.model) as saved:
        run.model(**batch)
    return saved.total


def _spans(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A row's text in parts, each with whether the loss is on it."""
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if not spans or spans[-1][1] != (label >= 0):
            spans.append(([], label >= 0))
        spans[-1][0].append(token)
    return [(tokenizer.decode(ids), learnt) for ids, learnt in spans]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
