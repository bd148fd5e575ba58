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


def targets_of(widths: LinearWidths, asked: str | None) -> tuple[str, ...]:
    """The module names to adapt: those asked for, or attention's.

    Raises:
        SystemExit: if the base has none of them.
    """
    names = tuple(asked.split(",")) if asked else ATTENTION
    found = tuple(name for name in names if any(matches(module, (name,)) for module in widths))
    if missing := set(names) - set(found) if asked else not found:
        there = ", ".join(sorted({module.rpartition(".")[2] for module in widths}))
        raise SystemExit(
            f"the base has no {', '.join(sorted(missing)) if asked else 'such modules'}; it has {there}"
        )
    return found


def write_qaa(
    directory: Path,
    base: str,
    widths: LinearWidths,
    targets: tuple[str, ...],
    seed: int,
    size: float,
    heads: int = 1,
) -> None:
    """A random QAA adapter; its rank is heads times the number of qubits, which follows from a layer's width."""
    generator = torch.Generator().manual_seed(seed)
    config = AdapterConfig(base_model_name_or_path=base, target_modules=targets, heads=heads)
    modules = {}
    for name, (d_in, d_out) in widths.items():
        if matches(name, targets):
            n = config.qubits(d_in)
            theta = torch.randn(heads, *config.circuit(n).theta_shape, generator=generator)
            modules[name] = ModuleWeights(theta, torch.randn(d_out, config.rank(n), generator=generator) * size)
    save_adapter(directory, config, modules)


def write_lora(
    directory: Path,
    base: str,
    widths: LinearWidths,
    targets: tuple[str, ...],
    seed: int,
    size: float,
    rank: int = 16,
) -> None:
    """A random LoRA adapter in the layout of PEFT."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_in, d_out) in widths.items():
        if matches(name, targets):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * size
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted(targets), "inference_mode": True,
    }  # fmt: skip
    with staged(directory) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
        rank: of LoRA adapters.
        heads: circuits a module of QAA adapters.
        size: standard deviation of B.
        seed: of the first; each further one has the next.
    """
    widths = linear_widths(base)
    names = targets_of(widths, targets)
    named = str(Path(base).resolve()) if Path(base).is_dir() else base
    output.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        directory = output / f"{kind}-{i:05}"
        if not (directory / CONFIG_FILE).exists():
            if kind == "qaa":
                write_qaa(directory, named, widths, names, seed + i, size, heads)
            else:
                write_lora(directory, named, widths, names, seed + i, size, rank)
        yield directory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="DIR", required=True, help="the base model; only its config is read")
    parser.add_argument("--count", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--kind", choices=("qaa", "lora"), default="qaa", help="(default: qaa)")
    parser.add_argument("--output", type=Path, required=True, help="where their directories go")
    parser.add_argument("--targets", help="module names with commas between (default: attention's projections)")
    parser.add_argument("--rank", type=int, default=16, help="r of LoRA; QAA's is heads x qubits (default: 16)")
    parser.add_argument("--heads", type=int, default=1, help="circuits a module, of QAA (default: 1)")
    parser.add_argument(
        "--size", type=float, default=0.1, help="standard deviation of B: how much answers change (default: 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first; each further one has the next")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("targets", "rank", "heads", "size", "seed")}
    made = make_adapters(args.base, args.output, args.kind, args.count, **settings)
    total = 0
    for directory in track(made, total=args.count, description=f"{args.kind} adapters"):
        total += (directory / WEIGHTS_FILE).stat().st_size
    print(f"{args.count} adapters in {args.output}, {total / max(args.count, 1):,.0f} bytes of weights each")


if __name__ == "__main__":
    main()
