"""Circuit backends against PennyLane's default.qubit, in one process, after checking that they agree.

    python benchmarks/circuits.py [--qubits 8 9 12] [--tokens 1 64] [--json FILE]

Prints the time of one forward evaluation of a batch of tokens and the ratio to PennyLane's, alternating runs,
medians. One thread, float32 (PennyLane: float64, which is what it computes in).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import pennylane as qml
import torch

from qaa_serve.circuits import Ansatz, get_backend
from qaa_serve.circuits.torch_batched import embed, fuse, run

LAYERS = 2
TOLERANCE = 2e-6


def pennylane_circuit(qubits: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The default ansatz on default.qubit, broadcast over tokens: (tokens, 2**n), (rows, n) -> (tokens, n)."""
    wires = range(qubits)

    @qml.qnode(qml.device("default.qubit", wires=qubits), interface="torch", diff_method="backprop")
    def circuit(psi: torch.Tensor, theta: torch.Tensor) -> list[torch.Tensor]:
        qml.StatePrep(psi, wires=wires)
        for layer in range(LAYERS):
            for k in wires:
                qml.RY(theta[2 * layer, k], wires=k)
            for k in wires:
                qml.RZ(theta[2 * layer + 1, k], wires=k)
            for k in wires:
                qml.CNOT([k, (k + 1) % qubits])
        for k in wires:
            qml.RY(theta[2 * LAYERS, k], wires=k)
        return [qml.expval(qml.PauliZ(k)) for k in wires]

    def evaluate(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        psi = torch.nn.functional.normalize(x.double())
        return torch.stack(circuit(psi, theta.double()), dim=-1)

    return evaluate


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(qubits: int, tokens: int, runs: int) -> dict[str, float]:
    ansatz = Ansatz("ryrz_ring_ry", qubits, LAYERS)
    theta = torch.randn(1, *ansatz.theta_shape)
    x = torch.randn(tokens, 2**qubits)
    pennylane = pennylane_circuit(qubits)
    fused = fuse(theta, ansatz)  # made once, when an adapter is activated

    def ours() -> torch.Tensor:
        return run(embed(x, ansatz).unsqueeze(0), fused)[0]

    reference = get_backend("reference")(x[:4], theta, ansatz, None)[:, 0]
    for name, z in (("torch", ours()), ("PennyLane", pennylane(x, theta[0]))):
        error = (z[:4] - reference).abs().max().item()
        if error > TOLERANCE:
            raise SystemExit(f"{name} is off by {error:.1e} at n = {qubits}: not timed")
    times: dict[str, list[float]] = {"torch": [], "pennylane": []}
    for _ in range(runs):
        times["torch"].append(seconds(ours))
        times["pennylane"].append(seconds(lambda: pennylane(x, theta[0])))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "qubits": qubits,
        "tokens": tokens,
        "torch_ms": 1e3 * median["torch"],
        "pennylane_ms": 1e3 * median["pennylane"],
        "ratio": median["pennylane"] / median["torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qubits", type=int, nargs="+", default=[8, 9, 12])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, PennyLane {qml.version()}")
    rows = []
    for qubits in args.qubits:
        for tokens in args.tokens:
            row = compare(qubits, tokens, args.runs)
            rows.append(row)
            print(
                f"n = {qubits:2}  tokens = {tokens:3}  torch {row['torch_ms']:8.3f} ms  "
                f"PennyLane {row['pennylane_ms']:8.2f} ms  {row['ratio']:6.1f} times as fast"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
