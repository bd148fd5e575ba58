"""The README.md of an adapter: what it was made from, and how."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers

from qaa_serve import __version__

if TYPE_CHECKING:
    from qaa_serve.training.data import Examples
    from qaa_serve.training.loop import TrainOptions, TrainResult


def model_card(
    options: TrainOptions,
    method_options: Mapping[str, Any],
    learning_rate: float,
    max_length: int,
    rows: Examples,
    eval_rows: Examples | None,
    result: TrainResult,
) -> str:
    """Markdown with a hub's header; no date and no duration: the same training writes the same card."""
    lines = [
        "---",
        f"base_model: {json.dumps(options.model)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"tags: [{options.method}, qaa-serve]",
        "---",
        "",
        f"# {options.output.name}",
        "",
        f"A {options.method.upper()} adapter, trained with `qaa-serve train`.",
        "",
        "| | |",
        "|---|---|",
    ]
    facts: dict[str, object] = {
        "base model": f"`{options.model}`",
        "trained parameters": f"{result.trainable:,} ({percent(result)} of the base's {result.total:,})",
        "adapted layers": ", ".join(f"`{name}`" for name in result.target_modules),
        "data": f"`{options.data.name}`, {len(rows):,} rows, SHA-256 `{rows.digest}`",
        "loss on the data": f"{result.first_loss:.4f} at the start, {result.train_loss:.4f} at the end",
    }
    if eval_rows is not None and options.eval_data is not None:
        facts["evaluation data"] = (
            f"`{options.eval_data.name}`, {len(eval_rows):,} rows, SHA-256 `{eval_rows.digest}`"
        )
        facts["loss on it"] = f"{result.base_eval_loss:.4f} before, {result.eval_loss:.4f} after"
    facts |= {name.replace("_", " "): value for name, value in method_options.items() if value is not None}
    facts |= {
        "learning rate": f"{learning_rate:g}, {options.schedule}",
        "warm-up": f"{options.warmup_ratio:g} of the steps",
        "steps": f"{result.steps:,} of {options.batch_size} x {options.grad_accum} rows",
        "longest row": f"{max_length} tokens",
        "gradient norm at most": f"{options.max_grad_norm:g}",
        "loss on": f"{options.answers} answers",
        "base kept in": "bfloat16" if options.bf16 else "float32",
        "seed": options.seed,
        "versions": (
            f"qaa-serve {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"peft {peft.__version__}, Python {platform.python_version()}"
        ),
    }
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def percent(result: TrainResult) -> str:
    """Trained parameters as a share of the base's."""
    return f"{100 * result.trainable / result.total:.3g} %"
