"""Where the time of the compiled CPU kernel goes, part by part.

    python benchmarks/cpu_kernel.py [--qubits 8 10 12] [--json FILE]

The default ansatz, 2 layers, one thread. A tile is sixteen tokens with a circuit each; "one" is a single token.
Both are compared with the reference first. Then each part is called many times in a row from compiled code, on
numbers as the kernel has them; printed is the least of many such measurements, in microseconds a call, since
whatever else the machine does only adds to it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from circuits import hardware, versions
from numba import njit

from qaa_serve.circuits import Ansatz, get_backend
from qaa_serve.circuits.cpu import forward, gates
from qaa_serve.circuits.cpu.host import LANES
from qaa_serve.circuits.cpu.serving import CompiledCircuits

CPU = torch.device("cpu")
TOLERANCE = 2e-6
_MEASUREMENTS = 40
_MEASUREMENT = 1e-3


def microseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """A call of a compiled function, from compiled code."""

    @njit
    def calls(times: int, *arguments: Any) -> None:
        for _ in range(times):
            function(*arguments)

    calls(1, *arguments)
    begun = time.perf_counter()
    calls(10, *arguments)
    times = max(10, int(_MEASUREMENT / max(time.perf_counter() - begun, 1e-9) * 10))
    least = np.inf
    for _ in range(_MEASUREMENTS):
        begun = time.perf_counter()
        calls(times, *arguments)
        least = min(least, time.perf_counter() - begun)
    return least / times * 1e6


def parts(qubits: int) -> dict[str, float]:
    """The parts' times; fails if z is not the reference's."""
    ansatz = Ansatz("ryrz_ring_ry", qubits, 2)
    width = 2**qubits
    theta = torch.randn(LANES, *ansatz.theta_shape)
    circuits = CompiledCircuits(ansatz, LANES, CPU)
    circuits.put(0, theta)
    tokens = torch.randn(LANES, width)
    numbers = torch.arange(LANES, dtype=torch.int32)[:, None]
    expected = get_backend("reference")(tokens, theta, ansatz, numbers.long())
    for some in (slice(0, LANES), slice(0, 1)):
        error = float((circuits.run(tokens[some], numbers[some]) - expected[some]).abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"n = {qubits}: z is off by {error:.1e}; nothing is measured")

    gathers, constant = circuits.form[1], circuits.form[5]
    rows, scales, lengths, embedded, state, states, turns, phases, z = circuits._workspace(width)
    a, b, c, d, p, sums = states
    x, of_each, one_z = tokens.numpy(), np.arange(LANES), np.zeros(qubits, np.float32)
    identity, ring, n = np.arange(2**qubits, dtype=np.int32), gathers[1], qubits
    turns_of, phases_of = circuits.tables
    found = {
        "tile: embed": microseconds(forward.embed, x, of_each, constant, rows, scales, lengths, embedded),
        "tile: angles to the lanes": microseconds(forward.gather_tables, turns_of, of_each, turns)
        + microseconds(forward.gather_tables, phases_of, of_each, phases),
        "tile: RY layer, real": microseconds(gates.rotate, embedded, a, turns, 0, 0, n),
    }
    found["tile: RY layer, complex"] = microseconds(gates.rotate, a, a, turns, 0, 0, n) * 2
    found["tile: phases and ring, of a real state"] = microseconds(
        forward.apply_phases, embedded, b, False, c, d, phases, 0, ring, True, n, n // 2
    )
    found["tile: phases and ring, of a complex state"] = microseconds(
        forward.apply_phases, embedded, b, True, c, d, phases, 1, ring, True, n, n // 2
    )
    found["tile: all Z"] = microseconds(gates.read_z, p, sums, n)
    found["tile: all X, for the closing RY layer"] = microseconds(gates.read_x, embedded, a, sums, 0, 0, n) * 2
    found["tile: all of it but embedding and angles"] = microseconds(
        forward._run_tile, embedded, turns, phases, circuits.form, states, z
    )
    if n < forward._LEAST_QUBITS:
        return found
    vectors, lower = n - gates.LANE_BITS, n // 2 - gates.LANE_BITS
    found |= {
        "one: embed": microseconds(forward._embed_one, x[0], constant, state),
        "one: angles": microseconds(forward._broadcast_tables, turns_of[0], phases_of[0], n, turns, phases),
        "one: RY layer, real": microseconds(gates.rotate_lanes, state, a, turns, 0, vectors),
        "one: phases, of a complex state": microseconds(
            forward.apply_phases, state, b, True, c, d, phases, 0, identity, False, vectors, lower
        ),
        "one: ring, complex": microseconds(forward._permute_numbers, a, c, ring) * 2,
        "one: all of it but embedding and angles": microseconds(
            forward._run_one, state, turns, phases, circuits.form, states, one_z
        ),
    }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qubits", type=int, nargs="+", default=[8, 10, 12])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = {
        "command": shlex.join(["python", "benchmarks/cpu_kernel.py", *sys.argv[1:]]),
        "hardware": hardware(CPU),
        "versions": versions("numba", "numpy", "torch"),
    }
    print(*(f"{key}: {value}" for key, value in head.items()), sep="\n")
    found = {qubits: parts(qubits) for qubits in args.qubits}
    for name in dict.fromkeys(name for times in found.values() for name in times):
        times = "  ".join(f"n = {n}: {of[name]:8.2f}" for n, of in found.items() if name in of)
        print(f"{name:45s} {times} us")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**head, "microseconds": found}, file, indent=2)


if __name__ == "__main__":
    main()
