"""The fused Triton kernel compiled without a GPU, as a call would compile it: what it needs of the hardware.

    python benchmarks/triton_compile.py [--arch 90 80] [--qubits 8 10 12 13] [--backward] [--json FILE]

Prints, of the machine code, registers and spilled bytes a thread, shared memory a program, instructions in all and
those that a warp runs for one token of two layers of the default circuit (the loop over steps twice, without the
branches of options: inputs, constant, length, whitened), barriers among these, seconds to compile, and how many
programs fit on one multiprocessor. That is not speed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
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

from qaa_serve.circuits import Ansatz
from qaa_serve.circuits.triton import backward, training
from qaa_serve.circuits.triton import kernel as kernel_module
from qaa_serve.circuits.triton.backward import gradient_kernel
from qaa_serve.circuits.triton.host import launch, layout_for
from qaa_serve.circuits.triton.kernel import circuit_kernel

#: Shared memory that a program may have and that a multiprocessor has, in bytes, by compute capability.
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024)}
REGISTERS = 65536
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Headers of options that the default circuit does not have.
OPTIONS = {"INPUTS", "CONSTANT", "LENGTH", "WHITENED"}


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
    barriers: int
    seconds: float

    @property
    def programs(self) -> int:
        """That fit on a multiprocessor; registers are given to a warp in units of 256, 8 a thread."""
        registers = 32 * self.warps * -(-self.registers // 8) * 8
        reserved = self.shared_bytes + 1024  # the driver's share
        return min(32, 64 // self.warps, REGISTERS // registers, SHARED[self.arch][1] // reserved)


class CompileOnly:
    """Stands for a kernel: compiles what a launch with these arguments would run."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: Any) -> None:
            begun = time.perf_counter()
            self.compiled: Any = self._kernel.warmup(*args, grid=grid, **options)
            self.seconds, self.options = time.perf_counter() - begun, options

        return launch


def pretend_gpu(arch: int) -> None:
    """Have Triton compile for a GPU of such a compute capability."""
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # what compiled kernels are kept by
            get_current_stream=lambda device: 0,
        )
    )


def compile_for(
    arch: int, qubits: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 2048, rank: int = 16
) -> Figures:
    """The figures of one kernel, for an x as wide as the state can hold, and a layer of three slices."""
    pretend_gpu(arch)
    layout = layout_for(qubits, 2**qubits, 3, rank, 8)
    records = torch.zeros(4, layout.words, dtype=torch.int32)
    x, slots = torch.zeros(tokens, 2**qubits, dtype=dtype), torch.zeros(tokens, dtype=torch.int32)
    kernel = CompileOnly(circuit_kernel)
    launch(kernel, x, slots, (1, 0), records, layout.record, layout, torch.zeros(3, tokens, rank))
    return figures(kernel, arch, qubits, loops=1)


def compile_backward(arch: int, qubits: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 2048) -> Figures:
    """The figures of the kernel of training's gradients, for an x as wide as the state, and one head."""
    pretend_gpu(arch)
    ansatz = Ansatz("ryrz_ring_ry", qubits, 2)
    x, dz = torch.zeros(tokens, 2**qubits, dtype=dtype), torch.zeros(tokens, 1, qubits)
    kernel = CompileOnly(gradient_kernel)
    form = training.form_for(ansatz, 1, x.device)
    training.launch_gradients(kernel, x, form, form.record, dz)
    return figures(kernel, arch, qubits, loops=2)


def figures(kernel: CompileOnly, arch: int, qubits: int, loops: int) -> Figures:
    """What was compiled, in which so many loops go over a circuit's steps."""
    cubin = kernel.compiled.asm["cubin"]
    # The kernel has no arrays: what it keeps on its stack are spilled registers.
    found = re.search(r"REG:(\d+) STACK:(\d+)", disassemble("cuobjdump", "-res-usage", cubin))
    assert found
    code = instructions(disassemble("nvdisasm", "-g", cubin))
    of_options = {
        (Path(kernels.__file__).name, line)
        for kernels in (kernel_module, backward)
        for line in option_lines(kernels)
    }
    needed = [source not in of_options for _, source, _ in code]
    # Branches backward end loops; those over the steps are the innermost, the shortest ones.
    bodies = [
        slice(target, place + 1)
        for place, (_, _, target) in enumerate(code)
        if target is not None and target < place
    ]
    steps = sorted(bodies, key=lambda body: body.stop - body.start)[:loops]

    def count(wanted: list[bool]) -> int:
        return sum(wanted) + sum(sum(wanted[body]) for body in steps)

    return Figures(
        arch,
        qubits,
        kernel.options["num_warps"],
        int(found[1]),
        int(found[2]),
        kernel.compiled.metadata.shared,
        len(code),
        count(needed),
        count([run and text.startswith("BAR") for run, (text, _, _) in zip(needed, code, strict=True)]),
        kernel.seconds,
    )


def disassemble(program: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [BINARIES / program, option, path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(listing: str) -> list[tuple[str, tuple[str, int], int | None]]:
    """Each instruction, the file and the line that it is of, and the place in the list that it branches to."""
    found: list[tuple[str, tuple[str, int], str | None]] = []
    labels: dict[str, int] = {}
    source = "", 0
    for line in listing.splitlines():
        if told := re.search(r'//## File ".*?([^/"]+)", line (\d+)', line):
            source = told[1], int(told[2])
        elif label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif (code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and not code[1].startswith("NOP"):
            branch = re.search(r"\bBRA\b.*?(\.L_\w+)", code[1])
            found.append((code[1], source, branch and branch[1]))
    return [(code, source, None if target is None else labels[target]) for code, source, target in found]


def option_lines(module: Any) -> set[int]:
    """The lines of a module of kernels that run only where a circuit has an option."""
    return {
        line
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.If)
        and OPTIONS & {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
        for line in range(node.body[0].lineno, node.body[-1].end_lineno + 1)
    }


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
        "barriers",
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
            row.barriers,
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
    parser.add_argument("--tokens", type=int, default=2048, help="of the launch, which choose its shape")
    parser.add_argument("--backward", action="store_true", help="the kernel of training's gradients")
    args = parser.parse_args()
    print(f"Triton {triton.__version__} with its own ptxas, torch {torch.__version__}")
    print("x in bfloat16, as wide as the state, many tokens; compiled, not run\n")
    compile_one = compile_backward if args.backward else compile_for
    rows = [compile_one(arch, qubits, tokens=args.tokens) for arch in args.arch for qubits in args.qubits]
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
