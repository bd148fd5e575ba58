"""The cuStateVec calls of the backend ``cuquantum``, executed by numpy on CPU memory.

It knows nothing of circuits: it takes the pointers, strides, layouts and bit orders that the library would be
given, checks them as the header of cuStateVec 1.15 states them, and multiplies. Where the library would read or
write wherever an invalid argument points to, this one raises. Not in the header, and taken from how Qiskit Aer
calls the library: the first of several targets is the least significant bit of the matrix's rows and columns.

``test_custatevec.py`` compares parameters and enumerators with the real bindings where these are installed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from unittest import mock

import numpy as np

from qaa_serve.circuits import custatevec

#: cudaDataType_t of complex64 and complex128.
DTYPES = {4: np.dtype(np.complex64), 5: np.dtype(np.complex128)}


class MatrixMapType(IntEnum):
    BROADCAST = 0
    MATRIX_INDEXED = 1


class MatrixLayout(IntEnum):
    COL = 0
    ROW = 1


class ComputeType(IntEnum):
    COMPUTE_DEFAULT = 0
    COMPUTE_32F = 4
    COMPUTE_64F = 16
    COMPUTE_TF32 = 4096


class InterpreterError(Exception):
    """What the library would answer by an error, or by undefined behaviour."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InterpreterError(message)


@dataclass
class Stream:
    """What the backend uses of a torch.cuda.Stream."""

    cuda_stream: int

    def __post_init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, stream: Stream) -> None:
        self.waited_for.append(stream)


@dataclass(frozen=True)
class Call:
    """One call of ``apply_matrix_batched``: its arguments, and what its pointers pointed to."""

    arguments: dict[str, Any]
    indices: list[int]
    matrices: np.ndarray[Any, Any]


class Interpreter:
    """Stands for the module cuquantum.bindings.custatevec."""

    MatrixMapType = MatrixMapType
    MatrixLayout = MatrixLayout
    ComputeType = ComputeType

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}  # of the handles
        self.owners: dict[int, int] = {}  # threads of the handles
        self.set_streams: list[tuple[int, int]] = []
        self.applied: list[Call] = []
        self.asked = 0  # calls of apply_matrix_batched_get_workspace_size

    def create(self) -> int:
        handle = 0x1000 + len(self.owners)
        self.owners[handle], self.streams[handle] = threading.get_ident(), 0
        return handle

    def destroy(self, handle: int) -> None:
        del self.streams[handle]

    def set_stream(self, handle: int, stream_id: int) -> None:
        self._check_handle(handle)
        self.streams[handle] = stream_id
        self.set_streams.append((handle, stream_id))

    def _check_handle(self, handle: int) -> None:
        check(handle in self.streams, "NOT_INITIALIZED: no such handle")
        check(self.owners[handle] == threading.get_ident(), "a handle is used by a thread that did not make it")

    def apply_matrix_batched_get_workspace_size(
        self,
        handle: int,
        sv_data_type: int,
        n_index_bits: int,
        n_svs: int,
        sv_stride: int,
        map_type: int,
        matrix_indices: int | Sequence[int],
        matrices: int,
        matrix_data_type: int,
        layout: int,
        adjoint: int,
        n_matrices: int,
        n_targets: int,
        n_controls: int,
        compute_type: int,
    ) -> int:
        self._check_handle(handle)
        self.asked += 1
        return self._workspace_size(n_svs, n_targets)

    def _workspace_size(self, n_svs: int, n_targets: int) -> int:
        """Made up: none for small matrices, else more for more states."""
        return 0 if n_targets < 3 else 16 * n_svs * n_targets

    def apply_matrix_batched(
        self,
        handle: int,
        batched_sv: int,
        sv_data_type: int,
        n_index_bits: int,
        n_svs: int,
        sv_stride: int,
        map_type: int,
        matrix_indices: int | Sequence[int],
        matrices: int,
        matrix_data_type: int,
        layout: int,
        adjoint: int,
        n_matrices: int,
        targets: int | Sequence[int],
        n_targets: int,
        controls: int | Sequence[int],
        control_bit_values: int | Sequence[int],
        n_controls: int,
        compute_type: int,
        extra_workspace: int,
        extra_workspace_size_in_bytes: int,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self._check_handle(handle)
        check(sv_data_type in DTYPES and matrix_data_type in DTYPES, "INVALID_VALUE: a data type")
        wanted = {4: (ComputeType.COMPUTE_32F, ComputeType.COMPUTE_DEFAULT), 5: (ComputeType.COMPUTE_64F, 0)}
        check(compute_type in wanted[sv_data_type], "INVALID_VALUE: the compute type is not that of the states")
        check(matrix_data_type >= sv_data_type, "INVALID_VALUE: matrices of less precision than the states")
        check(map_type in tuple(MatrixMapType) and layout in tuple(MatrixLayout), "INVALID_VALUE: an enumerator")
        check(adjoint in (0, 1) and n_svs > 0 and n_matrices > 0, "INVALID_VALUE: a number")
        check(bool(batched_sv) and bool(matrices), "INVALID_VALUE: a null pointer")
        dtype = DTYPES[sv_data_type]
        check(sv_stride >= 2**n_index_bits, "states overlap")
        check(sv_stride * dtype.itemsize % 128 == 0, "INVALID_VALUE on Blackwell: states not aligned to 128 bytes")

        bits, held = host_array(targets, n_targets), host_array(controls, n_controls)
        check(0 < len(bits) <= n_index_bits, "INVALID_VALUE: the number of targets")
        check(all(0 <= bit < n_index_bits for bit in bits + held), "INVALID_VALUE: a bit outside the index")
        check(len(set(bits + held)) == len(bits + held), "INVALID_VALUE: a bit twice")
        values = host_array(control_bit_values, n_controls) if control_bit_values else [1] * n_controls

        # What is in the workspace may be overwritten, and its whole size is believed.
        check(
            extra_workspace_size_in_bytes >= self._workspace_size(n_svs, n_targets),
            "INSUFFICIENT_WORKSPACE",
        )
        if extra_workspace_size_in_bytes:
            memory(extra_workspace, extra_workspace_size_in_bytes, np.dtype(np.uint8))[:] = 0xFF

        if map_type == MatrixMapType.MATRIX_INDEXED:
            indices = (
                memory(matrix_indices, n_svs, np.dtype(np.int32)).tolist()
                if isinstance(matrix_indices, int)
                else list(matrix_indices)
            )
            check(len(indices) == n_svs, "a matrix index for each state")
        else:
            indices = [0] * n_svs
        check(all(0 <= i < n_matrices for i in indices), "a matrix index that is not there: undefined behaviour")

        size = 2**n_targets
        table = memory(matrices, n_matrices * size**2, DTYPES[matrix_data_type]).reshape(n_matrices, size, size)
        self.applied.append(Call(arguments, indices, table.copy()))
        if layout == MatrixLayout.COL:
            table = table.swapaxes(1, 2)
        if adjoint:
            table = table.swapaxes(1, 2).conj()

        # Amplitudes by what their other bits are (a row) and what their target bits spell (a column).
        others = np.arange(2**n_index_bits)
        others = others[[all((j >> bit) & 1 == 0 for bit in bits) for j in others]]
        others = others[[all((j >> bit) & 1 == v for bit, v in zip(held, values, strict=True)) for j in others]]
        spelled = sum(((np.arange(size) >> k) & 1) << bit for k, bit in enumerate(bits))
        places = others[:, None] | spelled[None, :]

        states = memory(batched_sv, (n_svs - 1) * sv_stride + 2**n_index_bits, dtype)
        for state, matrix in enumerate(indices):
            amplitudes = states[state * sv_stride :][: 2**n_index_bits]
            amplitudes[places] = amplitudes[places] @ table[matrix].T.astype(dtype)


def memory(pointer: int, count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """``count`` numbers at an address, not copied."""
    check(pointer % dtype.itemsize == 0 and pointer > 0, "a pointer that is null or not aligned")
    content = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(content, dtype)


def host_array(values: int | Sequence[int], count: int) -> list[int]:
    """An argument that is a sequence, or the address of int32 numbers."""
    if isinstance(values, int):
        return memory(values, count, np.dtype(np.int32)).tolist() if count else []
    check(len(values) == count, "INVALID_VALUE: a length that is not the sequence's")
    return list(values)


@contextmanager
def interpreted() -> Iterator[Interpreter]:
    """The backend runs under a fresh interpreter, on CPU tensors, on stream 7 unless a test says otherwise."""
    interpreter = Interpreter()
    stream = Stream(7)
    with mock.patch.multiple(
        custatevec,
        _library=lambda: interpreter,
        _current_stream=lambda device: stream,
        _THREAD=threading.local(),
    ):
        yield interpreter
