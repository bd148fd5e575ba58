"""Many valid random adapters for a base model, to load a server with.

    python loadtests/make_adapters.py --base path/to/base --count 1000 --kind qaa --output adapters/

They are named qaa-00000, qaa-00001, ... and change what the base answers, to nothing that makes sense. The same
options give the same files; adapters that are there already stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    LinearWidths,
    ModuleWeights,
    linear_widths,
    matches,
    save_adapter,
    staged,
)

#: Attention's projections, as the usual architectures call them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn", "c_proj")


def make_adapters(
    base: str,
    output: Path,
    kind: str,
    count: int,
    *,
    targets: str | None = None,
    rank: int = 16,
    heads: int = 1,
    size: float = 0.1,
    seed: int = 0,
) -> Iterator[Path]:
    """Write adapters one after the other, and yield the directory of each.

    Args:
        base: directory or name of the base model.
        output: where their directories go.
        kind: qaa or lora.
        count: how many.
        targets: module names with commas between; attention's projections if None.
        rank: of LoRA adapters; that of QAA adapters is heads times the number of qubits.
        heads: circuits a module of QAA adapters.
        size: standard deviation of B.
        seed: of the first; each further one has the next.

    Raises:
        SystemExit: if the base has none of the modules.
    """
    widths = linear_widths(base)
    asked = tuple(targets.split(",")) if targets else ATTENTION
    names = tuple(name for name in asked if any(matches(module, (name,)) for module in widths))
    if not names or (targets and names != asked):
        there = ", ".join(sorted({module.rpartition(".")[2] for module in widths}))
        missing = ", ".join(sorted(set(asked) - set(names))) if targets else "such modules"
        raise SystemExit(f"the base has no {missing}; it has {there}")
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    chosen = {module: width for module, width in widths.items() if matches(module, names)}
    output.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        directory, generator = output / f"{kind}-{i:05}", torch.Generator().manual_seed(seed + i)
        if not (directory / CONFIG_FILE).exists():
            if kind == "qaa":
                config = AdapterConfig(base_model_name_or_path=base, target_modules=names, heads=heads)
                _write_qaa(directory, config, chosen, size, generator)
            else:
                _write_lora(directory, base, names, chosen, rank, size, generator)
        yield directory


def _write_qaa(
    directory: Path, config: AdapterConfig, widths: LinearWidths, size: float, generator: torch.Generator
) -> None:
    modules = {}
    for module, (d_in, d_out) in widths.items():
        n = config.qubits(d_in)
        theta = torch.randn(config.heads, *config.circuit(n).theta_shape, generator=generator)
        modules[module] = ModuleWeights(theta, torch.randn(d_out, config.rank(n), generator=generator) * size)
    save_adapter(directory, config, modules)


def _write_lora(
    directory: Path,
    base: str,
    names: tuple[str, ...],
    widths: LinearWidths,
    rank: int,
    size: float,
    generator: torch.Generator,
) -> None:
    """In the layout of PEFT."""
    tensors = {}
    for module, (d_in, d_out) in widths.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * size
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted(names), "inference_mode": True,
    }  # fmt: skip
    with staged(directory) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", metavar="DIR", required=True, help="the base model; only its config is read")
    add("--count", type=int, default=100, help="how many (default: 100)")
    add("--kind", choices=("qaa", "lora"), default="qaa", help="(default: qaa)")
    add("--output", type=Path, required=True, help="where their directories go")
    add("--targets", help="module names with commas between (default: attention's projections)")
    add("--rank", type=int, default=16, help="r of LoRA; QAA's is heads x qubits (default: 16)")
    add("--heads", type=int, default=1, help="circuits a module, of QAA (default: 1)")
    add("--size", type=float, default=0.1, help="standard deviation of B: how much answers change (default: 0.1)")
    add("--seed", type=int, default=0, help="of the first; each further one has the next")
    options = vars(parser.parse_args())
    count, total = options["count"], 0
    for directory in track(make_adapters(**options), total=count, description=f"{options['kind']} adapters"):
        total += (directory / WEIGHTS_FILE).stat().st_size
    print(f"{count} adapters in {options['output']}, {total / max(count, 1):,.0f} bytes of weights each")


if __name__ == "__main__":
    main()
