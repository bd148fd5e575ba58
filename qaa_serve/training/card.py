"""The README.md of what was trained: what it was made from, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaa_serve.training.options import names

if TYPE_CHECKING:
    from qaa_serve.training.methods import Method


def model_card(method: Method | type[Method], record: dict[str, Any]) -> str:
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
        "adapted layers": ", ".join(f"`{name}`" for name in record["target_modules"]),
        "data": _source(data),
        "loss on the data": f"{record['first_loss']:.4f} at the start, {record['train_loss']:.4f} at the end",
        "steps": f"{record['steps']:,}",
    }
    if eval_data is not None:
        facts["evaluation data"] = _source(eval_data)
        facts["loss on it"] = (
            f"{record['base_eval_loss']:.4f} before, {record['eval_loss']:.4f} after step "
            f"{record['best_step']:,}, which was the best"
        )
        if scores := dict(record["evaluation_scores"]):
            kept = scores[record["best_step"]]
            facts |= {f"{name} on it": f"{scores[0][name]:.1f} before, {kept[name]:.1f} after" for name in kept}
    hidden = names(card=False)
    facts |= {name.replace("_", " "): _shown(value) for name, value in options.items() if name not in hidden}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "", "no")]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"`{json.dumps(value, sort_keys=True)}`"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else value
    )


def usage(method: Method | type[Method], options: dict[str, Any]) -> str:
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
