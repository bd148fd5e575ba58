"""The compiled CPU backend, ``cpu.forward``, as serving uses it.

numba is loaded, and compiles, when the first circuits are made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.cpu.host import (
    as_array,
    make_tables,
    missing,
    numbers,
    one_compiler,
    over_threads,
    read_ansatz,
    workspaces,
)

__all__ = ["CompiledCircuits", "missing"]

_DTYPES = torch.float32, torch.bfloat16  # of an output that the kernel writes to


class CompiledCircuits:
    """Circuits for serving on a CPU; see ``backends.Circuits``.

    Attributes:
        form: the ansatz as the kernels read it.
        tables: what the kernels read of the angles, (circuits, numbers) float32: turns, phases.
    """

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._kernel: Any = import_module("qaa_serve.circuits.cpu.forward")
        self._ansatz = ansatz
        self._workspaces: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.form = tuple(read_ansatz(ansatz)[0])
        # Zeros: a circuit that has no angles yet gives a state, and so a z, of zero.
        turns, phases = (np.zeros((count, each), np.float32) for each in numbers(ansatz))
        self.tables = turns, phases

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        self.put_tables(first, make_tables(theta, self._ansatz))

    def put_tables(self, first: int, tables: Sequence[np.ndarray]) -> None:
        """As `put`, of circuits whose tables `make_tables` has made."""
        for target, rows in zip(self.tables, tables, strict=True):
            target[first : first + len(rows)] = rows

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``. Many tokens are shared over torch's number of threads."""
        z = torch.empty(*index.shape, self._ansatz.columns)
        if not z.numel():
            return z
        x_, index_, z_, rows = as_array(x), index.contiguous().numpy(), z.numpy(), np.arange(x.shape[0])

        def work(part: slice) -> None:
            workspace = self._workspace(x_.shape[1])
            self._kernel.run(x_, rows[part], index_[part], self.tables, self.form, workspace, z_[part])

        over_threads(work, x.shape[0])
        return z

    def add_to(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        rows: np.ndarray,
        slots: np.ndarray,
        table: np.ndarray,
        inputs: np.ndarray,
        readouts: np.ndarray,
        weights: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """output[row] += B z(x[row]) for the rows of a batch that have an adapter, all in one compiled call.

        x and z may be standardised by each adapter's own numbers: v becomes (v - offset) * scale.

        Args:
            output: (tokens, d_out), changed in place; by the kernel itself if float32 or bfloat16 and contiguous.
            x: (tokens, width) of output's dtype.
            rows: (T,) int64 row numbers.
            slots: (T,) int64, which adapter each of them has.
            table: (slots, slices * heads) int32, the circuits of each adapter, -1 for none.
            inputs: (slots, 2, width) float32, offset and scale of x's channels; (0, 2, width) to take x as it is.
            readouts: (slots, 2, slices, heads * columns) float32, those of z; or (0, ...) likewise.
            weights: (slots, heads * columns, d_out) float32, B transposed.
            ends: (slices,) int64, where each slice of a packed layer ends in d_out.
        """
        if output.dtype not in _DTYPES or not output.is_contiguous():
            update = torch.zeros(output.shape)
            self.add_to(update, x.float(), rows, slots, table, inputs, readouts, weights, ends)
            output += update.to(output.dtype)
            return
        x_, output_ = as_array(x), as_array(output)

        def work(part: slice) -> None:
            adapters = table, self.tables, self.form, inputs, readouts, weights, ends
            self._kernel.run_and_add(x_, rows[part], slots[part], *adapters, self._workspace(x_.shape[1]), output_)

        over_threads(work, len(rows))

    def _workspace(self, width: int) -> tuple[Any, ...]:
        """The calling thread's, kept here because to hash an ansatz takes longer than to look up two numbers."""
        key = threading.get_ident(), width
        if key not in self._workspaces:
            self._workspaces[key] = tuple(workspaces.of(self._ansatz, width))
        return self._workspaces[key]

    @classmethod
    def compile(cls, dtype: torch.dtype) -> None:
        """Compile all for an x of that dtype, or read what was compiled before: one code serves all circuits."""
        circuits = cls(Ansatz("ry_ring", 1, 1), 1, torch.device("cpu"))
        x, one, ends = torch.zeros(1, 2, dtype=dtype), np.zeros(1, np.int64), np.ones(1, np.int64)
        table, weights = np.full((1, 1), -1, np.int32), np.zeros((1, 1, 1), np.float32)
        standards = np.zeros((0, 2, 2), np.float32), np.zeros((0, 2, 1, 1), np.float32)
        with one_compiler(circuits._kernel.run.stats.cache_path):
            circuits.run(x, torch.from_numpy(table))
            circuits.add_to(x[:, :1].clone(), x, one, one, table, *standards, weights, ends)

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return sum(table.nbytes for table in self.tables)
