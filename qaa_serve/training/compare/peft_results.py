"""A comparison's trainings in the form of PEFT's own method comparison, to be shown beside its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qaa_serve.adapters import CONFIG_FILE
from qaa_serve.training.compare.files import read_json, write_json
from qaa_serve.training.compare.plan import slug

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_peft_results(results: Mapping[str, Any], output: Path) -> Path:
    """Write a file for each finished training, as PEFT's ``method_comparison`` names and fills them.

    Args:
        results: as in results.json.
        output: the report's directory, with the trainings in it.

    Returns:
        The directory of the files.
    """
    folder = output / "peft"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for name, result in _results(results, output):
        write_json(folder / f"{name}.json", result)
    return folder


def _results(results: Mapping[str, Any], output: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for run in results["runs"]:
        record, scores = run["training"], run["scores"]
        if run["role"] != "final" or not record or not scores:
            continue
        options, memory = record["options"], record["memory"]
        made = output / "runs" / run["name"] / "model"
        written = (made / "training.json").stat().st_mtime
        method, name = slug(record["method"]), f"{slug(run['variant'])}-seed{run['seed']}"
        cuda = memory["peak_cuda_bytes"] or 0  # their figures are of the accelerator alone
        yield (
            f"{method}--{name}",
            {
                "run_info": {
                    "created_at": datetime.fromtimestamp(written, UTC).isoformat(),
                    "total_time": record["seconds"],
                    "experiment_name": f"{method}/{name}",
                    "peft_branch": "main",
                    "train_config": {
                        "model_id": options["model"],
                        "dtype": "bfloat16" if options["bf16"] else "float32",
                        "max_seq_length": options["max_length"],
                        "batch_size": options["batch_size"] * options["grad_accum"],
                        "max_steps": record["steps"],
                        "use_gc": options["gradient_checkpointing"],
                        "seed": run["seed"],
                        "grad_norm_clip": options["max_grad_norm"],
                        "optimizer_type": options["optim"],
                        "optimizer_kwargs": {"lr": options["lr"], "weight_decay": options["weight_decay"]},
                        "lr_scheduler": options["schedule"],
                        "attn_implementation": options["attn_implementation"],
                    },
                    "peft_config": read_json(made / CONFIG_FILE),
                    "error_msg": "",
                },
                "train_info": {
                    "accelerator_memory_reserved_avg": cuda,
                    "accelerator_memory_max": cuda,
                    "accelerator_memory_reserved_99th": cuda,
                    "train_time": record["seconds"],
                    "file_size": record["adapter_bytes"],
                    "num_trainable_params": record["trainable"],
                    "num_total_params": record["total"],
                    "status": "success",
                    "metrics": [
                        {
                            "step": record["steps"],
                            "train loss": record["train_loss"],
                            "train samples": record["steps"] * options["batch_size"] * options["grad_accum"],
                            "train total tokens": record["tokens"],
                            "test accuracy": scores["exact_match"] / 100,
                            "test loss": scores["test_loss"],
                        }
                    ],
                },
                "meta_info": {
                    "model_info": {"sha": results["model"]["digest"], "created_at": None},
                    "dataset_info": {results["data"]["train"]["source"]: {"sha": None, "created_at": None}},
                    "package_info": {f"{name}-version": record["versions"].get(name) for name in _PACKAGES},
                    "system_info": results["hardware"],
                    "pytorch_info": "",
                },
            },
        )
