"""The fused Triton kernel compiled without a GPU, as a call would compile it: what it needs of the hardware.

    python benchmarks/triton_compile.py [--arch 90 80] [--qubits 8 10 12 13] [--json FILE]

Prints, of the machine code, registers and spilled bytes a thread, shared memory a program, instructions in all and
those that two layers of the default circuit run (the loop over steps twice; options they do not use are counted),
seconds to compile, and how many programs fit on one multiprocessor. That is not speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from qaa_serve.circuits.triton.host import launch, layout_for
from qaa_serve.circuits.triton.kernel import circuit_kernel

#: Shared memory that a program may have and that a multiprocessor has, in bytes, by compute capability.
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024)}
REGISTERS = 65536
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Figures:
    arch: int
    qubits: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    executed: int
    seconds: float

    @property
    def programs(self) -> int:
        """That fit on a multiprocessor; registers are given to a warp in units of 256, 8 a thread."""
        registers = 32 * self.warps * -(-self.registers // 8) * 8
        reserved = self.shared_bytes + 1024  # the driver's share
        return min(32, 64 // self.warps, REGISTERS // registers, SHARED[self.arch][1] // reserved)


class CompileOnly:
    """Stands for the kernel: compiles what a launch with these arguments would run."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: Any) -> None:
            begun = time.perf_counter()
            self.compiled: Any = circuit_kernel.warmup(*args, grid=grid, **options)
            self.seconds, self.options = time.perf_counter() - begun, options

        return launch


def compile_for(
    arch: int, qubits: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 2048, rank: int = 16
) -> Figures:
    """The figures of one kernel, for an x as wide as the state can hold, and a layer of three slices."""
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # what compiled kernels are kept by
            get_current_stream=lambda device: 0,
        )
    )
    layout = layout_for(qubits, 2**qubits, 3, rank, 8)
    records = torch.zeros(4, layout.words, dtype=torch.int32)
    x, slots = torch.zeros(tokens, 2**qubits, dtype=dtype), torch.zeros(tokens, dtype=torch.int32)
    kernel = CompileOnly()
    launch(kernel, x, slots, (1, 0), records, layout.record, layout, torch.zeros(3, tokens, rank))
    cubin = kernel.compiled.asm["cubin"]
    # The kernel has no arrays: what it keeps on its stack are spilled registers.
    found = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", cubin))
    assert found
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump("-sass", cubin), re.MULTILINE)
    places = [int(place, 16) for place, line in code if not line.startswith("NOP")]  # those pad the end
    # The branches backward end two loops; the shorter one is that over the steps.
    backward = [
        (int(place, 16), int(target[1], 16))
        for place, line in code
        if (target := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) and int(target[1], 16) < int(place, 16)
    ]
    step = min(sum(begin <= place <= end for place in places) for end, begin in backward)
    return Figures(
        arch,
        qubits,
        kernel.options["num_warps"],
        int(found[1]),
        int(found[2]),
        kernel.compiled.metadata.shared,
        len(places),
        len(places) + step,
        kernel.seconds,
    )


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [CUOBJDUMP, option, path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(rows: list[Figures]) -> str:
    heads = (
        "n",
        "sm",
        "warps",
        "registers",
        "spilled B",
        "shared B",
        "instructions",
        "two layers",
        "s",
        "programs/SM",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]
    for row in rows:
        cells = (
            row.qubits,
            row.arch,
            row.warps,
            row.registers,
            row.spilled_bytes,
            row.shared_bytes,
            row.instructions,
            row.executed,
            f"{row.seconds:.1f}",
            row.programs,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=SHARED)
    parser.add_argument("--qubits", type=int, nargs="+", default=[8, 9, 10, 11, 12, 13, 14])
    parser.add_argument("--json", help="write the figures there too")
    args = parser.parse_args()
    print(f"Triton {triton.__version__} with its own ptxas, torch {torch.__version__}")
    print("x in bfloat16, as wide as the state, many tokens; compiled, not run\n")
    rows = [compile_for(arch, qubits) for arch in args.arch for qubits in args.qubits]
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
