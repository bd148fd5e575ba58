"""The fused Triton kernel compiled for Hopper and Ampere, which needs no GPU; figures: docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz

pytest.importorskip("triton", reason="the triton backend needs triton")

from triton_compile import SHARED, compile_for

from qaa_serve.circuits.triton_fused import TritonCircuits
from qaa_serve.circuits.triton_kernel import circuit_kernel

#: Bytes a thread may keep in memory for want of registers, where it is not none: in registers it has 512.
SPILLED = {13: 128, 14: 256}


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since Triton is told there that it has a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(("qubits", "arch"), [*product([8, 10, 12, 13], [90, 80]), (14, 90)])
def test_sizes_in_use_fit_the_hardware(apart: ProcessPoolExecutor, qubits: int, arch: int) -> None:
    found = apart.submit(compile_for, arch, Ansatz("ryrz_ring_ry", qubits, 2)).result()
    assert found.spilled_bytes <= SPILLED.get(qubits, 0), found
    assert found.shared_bytes <= SHARED[arch][0], found
    assert found.programs >= (2 if qubits < 14 else 1), found


def _compiled_ahead_and_at_the_launch(ansatz: Ansatz, dtype: torch.dtype) -> tuple[int, ...]:
    """How many kernels there are after a launch in a layer of three slices, and after compiling ahead."""
    compile_for(90, ansatz, dtype)
    kernels = circuit_kernel.device_caches[90][0]
    counts = [len(kernels)]
    for other in (dtype, torch.float16):
        TritonCircuits.compile(ansatz, 2**ansatz.qubits, 3, other, torch.device("cpu"))
        counts.append(len(kernels))
    return tuple(counts)


def test_what_is_compiled_ahead_is_what_is_launched(apart: ProcessPoolExecutor) -> None:
    launched, ahead, other = apart.submit(
        _compiled_ahead_and_at_the_launch, Ansatz("ry_ring", 6, 3), torch.bfloat16
    ).result()
    assert (ahead, other) == (launched, launched + 1)


@pytest.mark.parametrize(
    ("ansatz", "dtype"),
    [
        *((Ansatz(name, 1, 1), torch.float32) for name in ANSATZ_NAMES),
        *((Ansatz(name, 5, 2), torch.float16) for name in ANSATZ_NAMES),
        (Ansatz("ryrz_ring_ry", 4, 1, readouts=10, constant=True, length=True), torch.float64),
        (Ansatz("ry_ring", 4, 25), torch.bfloat16),  # deep enough for the state to be scaled down
    ],
    ids=str,
)
def test_every_form_compiles(apart: ProcessPoolExecutor, ansatz: Ansatz, dtype: torch.dtype) -> None:
    found = apart.submit(compile_for, 90, ansatz, dtype).result()
    assert found.spilled_bytes == 0, found
