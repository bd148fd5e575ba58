"""The compiled CPU kernels, ``cpu.forward`` and ``cpu.backward``, as training uses them: a ``backends.Training``.

Angles change in every step, so that a call is given them and makes its tables itself: they are small. numba is
loaded by ``prepare`` or with the first call, and keeps on disk what it compiles.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.cpu.host import (
    LANES,
    PerThread,
    aligned,
    as_array,
    one_compiler,
    over_threads,
    read_ansatz,
    workspaces,
)
from qaa_serve.circuits.cpu.serving import CompiledCircuits

_is_ready = False


def prepare() -> None:
    """Compile the kernels, or read what was compiled before: one code serves all circuits."""
    global _is_ready
    if not _is_ready:
        _is_ready = True  # before the calls below ask
        with one_compiler(import_module("qaa_serve.circuits.cpu.forward").run.stats.cache_path):
            x, ansatz = torch.zeros(1, 1), Ansatz("ry_ring", 1, 1)
            theta = torch.zeros(1, *ansatz.theta_shape)
            backward(x, theta, ansatz, forward(x, theta, ansatz))


def forward(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """See ``backends.Training``; x is of a dtype that is computed in float32."""
    prepare()
    index = torch.arange(len(theta), dtype=torch.int32).expand(len(x), -1)
    return _circuits(theta, ansatz).run(x.detach().float(), index)


def backward(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``backends.Training``."""
    prepare()
    kernel: Any = import_module("qaa_serve.circuits.cpu.backward")
    _, ry_rows, rz_rows = read_ansatz(ansatz)
    circuits = _circuits(theta, ansatz)
    turns, phases = circuits.tables
    tables = turns, turns * np.tile(np.array([1, -1], np.float32), turns.shape[1] // 2), phases
    x_, dz_ = as_array(x.detach().float()), as_array(dz.float().flatten(1)).reshape(dz.shape)
    dx, n, heads = np.zeros(x.shape, np.float32), ansatz.qubits, len(theta)
    sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the first token of each thread's

    def work(part: slice) -> None:
        workspace = tuple(_workspaces.of(ansatz, x_.shape[1]))
        dturns, dphases = (np.zeros((heads, len(rows), n)) for rows in (ry_rows, rz_rows))
        sums[part.start] = dturns, dphases
        kernel.gradients(x_[part], dz_[part], tables, circuits.form, workspace, dx[part], dturns, dphases)

    if dz.numel():
        over_threads(work, len(x))
    dtheta = np.zeros(theta.shape)
    for _, (dturns, dphases) in sorted(sums.items()):  # in the same order always: the same sum
        # of exp(-i t Y / 2) and exp(-i t Z / 2); the kernel counts bits, theta wires
        dtheta[:, list(ry_rows)] += dturns[:, :, ::-1] / 2
        dtheta[:, list(rz_rows)] -= dphases[:, :, ::-1] / 2
    return torch.from_numpy(dx).to(x.dtype), torch.from_numpy(dtheta).to(theta.dtype)


def _circuits(theta: torch.Tensor, ansatz: Ansatz) -> CompiledCircuits:
    circuits = CompiledCircuits(ansatz, len(theta), theta.device)
    circuits.put(0, theta)
    return circuits


class _Workspace(NamedTuple):
    """The arrays in which ``cpu.backward`` takes a tile back, for one thread; sizes in vectors.

    Attributes:
        forward: ``host.Workspace``, whose arrays for x and for a circuit's tables are used here too.
        permuted, permuted_im: (steps, 2**n), both parts of what each step's RY layer acts on.
        states: three of 2**n, and n for sums.
        back_turns: a circuit's turns with negative sines.
        dz: by bit, or by column where there are more than bits.
        total: lambda of all circuits, as many as ``embedded``.
        ends: twice 2, for the gradient of the embedding.
        dx_rows: as ``rows``.
    """

    forward: tuple[Any, ...]
    permuted: np.ndarray
    permuted_im: np.ndarray
    states: tuple[np.ndarray, ...]
    back_turns: np.ndarray
    dz: np.ndarray
    total: np.ndarray
    ends: tuple[np.ndarray, np.ndarray]
    dx_rows: np.ndarray


def _allocate(ansatz: Ansatz, width: int) -> _Workspace:
    shared, n, steps = workspaces.of(ansatz, width), ansatz.qubits, len(read_ansatz(ansatz)[0].ry)
    permuted, permuted_im = (aligned(steps << n).reshape(steps, -1) for _ in range(2))
    return _Workspace(
        tuple(shared),
        permuted,
        permuted_im,
        (*shared.states[:3], aligned(n)),
        aligned(len(shared.turns) // LANES),
        aligned(max(n, ansatz.columns)),
        aligned(len(shared.embedded) // LANES),
        (aligned(2), aligned(2)),
        aligned(shared.rows.shape[1]).reshape(shared.rows.shape),
    )


_workspaces = PerThread(_allocate)
