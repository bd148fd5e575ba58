"""The fused Triton kernel compiled for Hopper and Ampere, which needs no GPU; figures: docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs triton")

from triton_compile import SHARED, CompileOnly, compile_backward, compile_for, pretend_gpu

from qaa_serve.circuits.triton.backward import gradient_kernel
from qaa_serve.circuits.triton.host import compile_kernels, launch, layout_for
from qaa_serve.circuits.triton.kernel import circuit_kernel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since Triton is told there that it has a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


#: Instructions that a warp runs for two layers of the default circuit, on Hopper; twice as many for twice as many
#: amplitudes a thread. The bound is what a change may add.
EXECUTED = {8: 900, 10: 2400, 12: 2600, 13: 4900, 14: 5150}


@pytest.mark.slow
@pytest.mark.parametrize(("qubits", "arch"), [*product([8, 10, 12, 13], [90, 80]), (14, 90)])
def test_sizes_in_use_fit_the_hardware(apart: ProcessPoolExecutor, qubits: int, arch: int) -> None:
    found = apart.submit(compile_for, arch, qubits).result()
    assert found.spilled_bytes == 0, found
    assert found.shared_bytes <= SHARED[arch][0], found
    assert found.programs >= (2 if qubits < 14 else 1), found
    assert arch != 90 or found.executed <= EXECUTED[qubits], found


@pytest.mark.parametrize(("qubits", "dtype"), [(1, torch.float32), (5, torch.float16), (4, torch.float64)])
def test_other_sizes_and_types_compile(apart: ProcessPoolExecutor, qubits: int, dtype: torch.dtype) -> None:
    assert apart.submit(compile_for, 90, qubits, dtype, rank=8).result().spilled_bytes == 0


def _kernels_after(tokens: tuple[int, ...]) -> int:
    """How many kernels there are after launches of so many tokens on an H200, with z of no round size."""
    for number in tokens:
        compile_for(90, 10, tokens=number, rank=8)
    return len(circuit_kernel.device_caches[90][0])


def test_one_kernel_serves_every_batch_but_the_smallest(apart: ProcessPoolExecutor) -> None:
    """Where there are few programs for a multiprocessor others, with more warps, are quicker."""
    of_many = apart.submit(_kernels_after, (2048, 1049)).result()
    assert apart.submit(_kernels_after, (161, 40)).result() == of_many + 2
    assert apart.submit(_kernels_after, (31, 150, 8192)).result() == of_many + 2


def _kernels_of_a_start_and_of_steps() -> tuple[int, int]:
    """How many kernels a start compiles for a layer of two slices, and how many there are after its steps."""
    pretend_gpu(90)
    layout, kernel = layout_for(5, 24, 2, 16, 2), CompileOnly(circuit_kernel)
    compile_kernels(kernel, layout, 24, torch.bfloat16, CPU)
    of_start = len(circuit_kernel.device_caches[90][0])
    for slots, tokens in ((1, 1), (16, 33), (3, 2048)):
        records = torch.zeros(slots, 3 * layout.words, dtype=torch.int32)[:, layout.words : 2 * layout.words]
        x, z = torch.zeros(tokens, 24, dtype=torch.bfloat16), torch.zeros(2, tokens, 16)
        launch(kernel, x, torch.zeros(64, dtype=torch.int32), (1, 0), records, layout.record, layout, z)
    return of_start, len(circuit_kernel.device_caches[90][0])


def test_what_a_start_compiles_is_what_steps_launch(apart: ProcessPoolExecutor) -> None:
    of_start, after_steps = apart.submit(_kernels_of_a_start_and_of_steps).result()
    assert of_start == after_steps


#: Of the backward kernel as ``EXECUTED`` of the forward one, and bytes that a thread may spill.
BACKWARD = {8: (2300, 0), 10: (4450, 0), 12: (8350, 32), 13: (9250, 96)}


@pytest.mark.slow
@pytest.mark.parametrize(("qubits", "arch"), [*product(BACKWARD, [90, 80])])
def test_the_backward_kernel_fits_the_hardware(apart: ProcessPoolExecutor, qubits: int, arch: int) -> None:
    found = apart.submit(compile_backward, arch, qubits).result()
    executed, spilled = BACKWARD[qubits]
    assert found.spilled_bytes <= (spilled if arch == 90 else 2 * spilled), found
    assert found.shared_bytes <= SHARED[arch][0], found
    assert arch != 90 or found.executed <= executed, found


def _kernels_after_backward(tokens: tuple[int, ...]) -> int:
    for number in tokens:
        compile_backward(90, 5, tokens=number)
    return len(gradient_kernel.device_caches[90][0])


def test_one_backward_kernel_serves_every_batch(apart: ProcessPoolExecutor) -> None:
    first = apart.submit(_kernels_after_backward, (1,)).result()
    assert apart.submit(_kernels_after_backward, (31, 2048)).result() == first
