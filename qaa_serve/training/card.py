"""The README.md of what was trained: what it was made from, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaa_serve.training.methods import Method

#: Facts of the record that are said in words of their own, or that people need no card for.
_SAID_OTHERWISE = {
    "model", "data", "eval_data", "output", "method", "target_modules", "lr", "schedule", "warmup_ratio",
    "batch_size", "grad_accum", "max_length", "max_grad_norm", "answers", "bf16", "seed", "overwrite", "resume",
    "threads", "epochs", "max_steps", "save_steps", "skip_bad_rows", "trust_remote_code", "gradient_checkpointing",
}  # fmt: skip


def model_card(method: Method, record: dict[str, Any]) -> str:
    """Markdown with a hub's header; no date and no duration: the same training writes the same card.

    Args:
        method: how it was trained.
        record: the object of training.json.
    """
    options = record["options"]
    output = Path(options["output"])
    kind = "model, fine-tuned" if method.trains_base else f"{method.name.upper()} adapter, trained"
    lines = [
        "---",
        f"base_model: {json.dumps(options['model'])}",
        f"library_name: {'transformers' if method.trains_base else 'peft'}",
        "pipeline_tag: text-generation",
        f"tags: [{method.name}, qaa-serve]",
        "---",
        "",
        f"# {output.name}",
        "",
        f"A {kind} with `qaa-serve train`. How to use it:",
        "",
        *("    " + line for line in usage(method, options).splitlines()),
        "",
        "| | |",
        "|---|---|",
    ]
    data, eval_data = record["data"], record["eval_data"]
    facts: dict[str, object] = {
        "base model": f"`{options['model']}`",
        "trained parameters": f"{record['trainable']:,} ({percent(record['trainable'], record['total'])} of the "
        f"base's {record['total']:,})",
        "adapted layers": ", ".join(f"`{name}`" for name in record["target_modules"]) or None,
        "data": _source(data),
        "loss on the data": f"{record['first_loss']:.4f} at the start, {record['train_loss']:.4f} at the end",
    }
    if eval_data is not None:
        facts["evaluation data"] = _source(eval_data)
        facts["loss on it"] = (
            f"{record['base_eval_loss']:.4f} before, {record['eval_loss']:.4f} after step "
            f"{record['best_step']:,}, which was the best"
        )
    facts |= {name.replace("_", " "): value for name, value in options.items() if name not in _SAID_OTHERWISE}
    facts |= {
        "learning rate": f"{options['lr']:g}, {options['schedule']}",
        "warm-up": f"{options['warmup_ratio']:g} of the steps",
        "steps": f"{record['steps']:,} of {options['batch_size']} x {options['grad_accum']} rows",
        "longest row": f"{options['max_length']} tokens",
        "gradient norm at most": f"{options['max_grad_norm']:g}",
        "loss on": f"{options['answers']} answers",
        "computed in": "bfloat16, what is trained in float32" if options["bf16"] else "float32",
        "seed": options["seed"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    shown = {name: value for name, value in facts.items() if value is not None and value is not False}
    lines += [f"| {name} | {'yes' if value is True else value} |" for name, value in shown.items()]
    return "\n".join(lines) + "\n"


def usage(method: Method, options: dict[str, Any]) -> str:
    """What to do with the result."""
    output = Path(options["output"])
    return method.usage.format(
        model=options["model"], output=str(output), parent=str(output.parent), name=output.name
    )


def percent(trainable: int, total: int) -> str:
    """Trained parameters as a share of the base's."""
    return f"{100 * trainable / total:.3g} %"


def _source(source: dict[str, Any]) -> str:
    return f"`{Path(source['source']).name}`, {source['rows']:,} rows, SHA-256 `{source['sha256']}`"
