"""The fused Triton kernel compiled for Hopper and Ampere, which needs no GPU; figures: docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs triton")

from triton_compile import SHARED, compile_for

from qaa_serve.circuits.triton.kernel import circuit_kernel


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since Triton is told there that it has a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


#: Instructions that a warp runs for two layers of the default circuit, on Hopper; twice as many for twice as many
#: amplitudes a thread. The bound is what a change may add.
EXECUTED = {8: 1000, 10: 1650, 12: 2850, 13: 5300, 14: 5500}


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
        compile_for(90, 9, tokens=number, rank=8)
    return len(circuit_kernel.device_caches[90][0])


def test_one_kernel_serves_every_batch_but_the_smallest(apart: ProcessPoolExecutor) -> None:
    """Where there are fewer programs than multiprocessors another one, with more warps, is quicker."""
    assert apart.submit(_kernels_after, (2048, 161)).result() + 1 == apart.submit(_kernels_after, (40,)).result()
    assert apart.submit(_kernels_after, (31, 8192)).result() == apart.submit(_kernels_after, ()).result()
