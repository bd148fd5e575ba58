"""What training a QAA adapter costs: against PennyLane's gradients, and against PEFT's LoRA on the same model.

    python benchmarks/training.py [--parts circuit step memory] [--json FILE]

circuit  forward and backward of one circuit on 64 tokens, one thread, against PennyLane's default.qubit, whose
         gradients are backpropagated (float64, which is what it computes in)
step     a training step (forward, backward, AdamW) of QAA against LoRA r = 16 on q, k, v and o of a random Llama
memory   bytes that autograd keeps for the backward pass of that model, without its parameters and beyond what
         the frozen model itself keeps

What is timed is checked first; a check that fails ends the program before any figure. Runs alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import peft
import pennylane as qml
import torch
import transformers
from circuits import LAYERS, pennylane_circuit, seconds
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qaa_serve.circuits import Ansatz, qubits_for, torch_batched
from qaa_serve.circuits.adjoint import expectation_values
from qaa_serve.training import QAAConfig
from qaa_serve.training.trainer import SavedBytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = 64
TOLERANCE = 2e-6


def medians(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Seconds of each, measured in turn after one run that does not count."""
    for function in functions.values():
        function()
    times = [[seconds(function) for function in functions.values()] for _ in range(runs)]
    return {
        name: statistics.median(column) for name, column in zip(functions, zip(*times, strict=True), strict=True)
    }


def require_close(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (found.double() - expected.double()).abs().max().item()
    if not error <= tolerance:
        raise SystemExit(f"{what} is off by {error:.1e}: nothing is measured")


# ------------------------------------------------------------------------------------------------- circuit


def circuit(qubits: int, runs: int) -> dict[str, Any]:
    ansatz = Ansatz("ryrz_ring_ry", qubits, LAYERS)
    x = torch.randn(TOKENS, 2**qubits)
    theta = torch.randn(1, *ansatz.theta_shape)
    dz = torch.randn(TOKENS, qubits) / qubits
    pennylane = pennylane_circuit(qubits)
    functions = {
        "adjoint": lambda x, theta: expectation_values(x, theta, ansatz)[:, 0],
        "autograd": lambda x, theta: torch_batched.expectation_values(x, theta, ansatz)[:, 0],
        "pennylane": lambda x, theta: pennylane(x, theta[0]),
    }

    def both(name: str) -> tuple[torch.Tensor, ...]:
        dtype = torch.float64 if name == "pennylane" else torch.float32
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, theta)]
        z = functions[name](*inputs)
        return z, *torch.autograd.grad(z, inputs, dz.to(z.dtype))

    expected = both("pennylane")
    for name in ("adjoint", "autograd"):
        for what, ours, theirs in zip(("z", "dx", "dtheta"), both(name), expected, strict=True):
            scale = TOKENS if what == "dtheta" else 1
            require_close(f"{what} of {name} at n = {qubits}", ours / scale, theirs / scale)
    median = medians({name: lambda name=name: both(name) for name in functions}, runs)
    row = {"qubits": qubits, "tokens": TOKENS, **{f"{name}_ms": 1e3 * s for name, s in median.items()}}
    row["ratio"] = median["pennylane"] / median["adjoint"]
    print(
        f"n = {qubits:2}  forward + backward  {row['adjoint_ms']:8.2f} ms  "
        f"plain autograd {row['autograd_ms']:8.2f} ms  PennyLane {row['pennylane_ms']:8.1f} ms  "
        f"{row['ratio']:5.1f} times as fast as PennyLane"
    )
    return row


# --------------------------------------------------------------------------------------------------- models


def base_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


def adapted(method: str, args: argparse.Namespace) -> torch.nn.Module:
    model = base_model(args)
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS))
    return get_peft_model(model, QAAConfig(target_modules=TARGETS, layers=LAYERS))


def tokens_for(args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(args.vocab, (args.batch, args.length))


def check_models(qaa: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """A new adapter changes nothing, and a circuit of the model's size has the gradients of plain autograd."""
    with torch.no_grad(), qaa.disable_adapter():
        expected = qaa(input_ids=ids[:1]).logits
    with torch.no_grad():
        require_close("a new adapter's model", qaa(input_ids=ids[:1]).logits, expected)
    ansatz = Ansatz("ryrz_ring_ry", qubits_for(args.hidden), LAYERS)
    inputs = [torch.randn(ids.numel(), args.hidden), torch.randn(1, *ansatz.theta_shape)]
    results = []
    for function in (expectation_values, torch_batched.expectation_values):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        z = function(*leaves, ansatz)
        results.append((z, *torch.autograd.grad(z.sum() / ansatz.qubits, leaves)))
    for what, ours, theirs in zip(("z", "dx", "dtheta"), *results, strict=True):
        scale = ids.numel() if what == "dtheta" else 1
        require_close(f"{what} of the model's circuit", ours / scale, theirs / scale)


def step(args: argparse.Namespace) -> dict[str, Any]:
    ids = tokens_for(args)
    models = {"qaa": adapted("qaa", args), "lora": adapted("lora", args)}
    check_models(models["qaa"], ids, args)

    def stepper(model: torch.nn.Module) -> Callable[[], object]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-4)

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return run

    median = medians({name: stepper(model) for name, model in models.items()}, args.step_runs)
    row = {f"{name}_s": s for name, s in median.items()} | {"ratio": median["qaa"] / median["lora"]}
    print(f"step  QAA {row['qaa_s']:.2f} s  LoRA r = 16 {row['lora_s']:.2f} s  ratio {row['ratio']:.2f}")
    return row


# --------------------------------------------------------------------------------------------------- memory


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps, each once, without those of parameters and buffers."""
    # The embeddings' gradient is asked for, so that all layers keep something with and without an adapter.
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    with SavedBytes(model) as saved:
        model(inputs_embeds=embedded, labels=ids)
    return saved.total


def memory(args: argparse.Namespace) -> dict[str, Any]:
    ids = tokens_for(args)
    row: dict[str, Any] = {"base_bytes": kept_bytes(base_model(args), ids)}
    qaa = adapted("qaa", args)
    check_models(qaa, ids, args)
    row["qaa_bytes"] = kept_bytes(qaa, ids) - row["base_bytes"]
    row["lora_bytes"] = kept_bytes(adapted("lora", args), ids) - row["base_bytes"]
    row["ratio"] = row["qaa_bytes"] / row["lora_bytes"]
    print(
        f"kept  QAA {row['qaa_bytes'] / 2**20:.1f} MiB  LoRA r = 16 {row['lora_bytes'] / 2**20:.1f} MiB  "
        f"ratio {row['ratio']:.2f}  (the frozen model itself: {row['base_bytes'] / 2**20:.0f} MiB)"
    )
    return row


# ----------------------------------------------------------------------------------------------------- main


def hardware() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or it says nothing
    return f"{model}, {os.cpu_count()} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("circuit", "step", "memory")
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--qubits", type=int, nargs="+", default=[9, 12], help="of part circuit (default 9 12)")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of part circuit (default 9)")
    parser.add_argument("--step-runs", type=int, default=3, help="timed runs of part step (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of parts step and memory")
    sizes = {
        "hidden": 768,
        "layers": 12,
        "heads": 12,
        "intermediate": 2048,
        "vocab": 32000,
        "batch": 8,
        "length": 128,
    }
    for name, value in sizes.items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"of the model or its input (default {value})"
        )
    parser.add_argument("--json", help="write the figures there too")
    args = parser.parse_args()

    versions = {"torch": torch, "transformers": transformers, "peft": peft, "pennylane": qml}
    about = {
        "hardware": hardware(),
        "versions": {name: str(module.__version__) for name, module in versions.items()},
        "command": shlex.join(["python", *sys.argv]),
        "model": {name: getattr(args, name) for name in sizes},
        "threads": args.threads,
    }
    print(f"{about['hardware']}; {', '.join(f'{name} {version}' for name, version in about['versions'].items())}")
    print(about["command"])
    results: dict[str, Any] = {}
    torch.manual_seed(0)
    if "circuit" in args.parts:
        torch.set_num_threads(1)
        results["circuit"] = [circuit(qubits, args.runs) for qubits in args.qubits]
    torch.set_num_threads(args.threads)
    if {"step", "memory"} & set(args.parts):
        sizes_used = ", ".join(f"{name} {value}" for name, value in about["model"].items())
        print(f"Llama, float32, {args.threads} threads: {sizes_used}")
    if "memory" in args.parts:
        results["memory"] = memory(args)
    if "step" in args.parts:
        results["step"] = step(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(about | results, file, indent=2)


if __name__ == "__main__":
    main()
