"""The compiled CPU kernels, ``cpu.forward`` and ``cpu.backward``, as training uses them.

Angles change in every step, so that a call is given them and makes its tables itself: they are small. numba is
loaded by ``prepare`` or with the first call, and keeps on disk what it compiles.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.cpu.host import (
    LANES,
    aligned,
    as_array,
    numbers,
    one_compiler,
    over_threads,
    read_ansatz,
    tile_space,
    write_tables,
)


def forward(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Every circuit on every token: z, (tokens, circuits, columns) float32.

    Args:
        x: (tokens, width), of a dtype that is computed in float32.
        theta: (circuits, rows, n).
        ansatz: the form.
    """
    kernel, _ = _kernels()
    z = np.zeros((len(x), len(theta), ansatz.columns), np.float32)
    index = np.broadcast_to(np.arange(len(theta), dtype=np.int32), z.shape[:2]).copy()
    form, tables = tuple(read_ansatz(ansatz)[0]), _tables(theta, ansatz)
    x_, rows = as_array(x.detach().float()), np.arange(len(x))

    def work(part: slice) -> None:
        space, _ = _spaces.of(ansatz, x_.shape[1])
        kernel.run(x_, rows[part], index[part], tables, form, space, z[part])

    if z.size:
        over_threads(work, len(x))
    return torch.from_numpy(z)


def backward(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dx and dL/dtheta, of the shapes and dtypes of x and theta.

    Args:
        x: (tokens, width), as of ``forward``.
        theta: (circuits, rows, n).
        ansatz: the form.
        dz: dL/dz, (tokens, circuits, columns).
    """
    _, kernel = _kernels()
    form, ry_rows, rz_rows = read_ansatz(ansatz)
    turns, phases = _tables(theta, ansatz)
    back_turns = turns * np.tile(np.array([1, -1], np.float32), turns.shape[1] // 2)
    x_, dz_ = as_array(x.detach().float()), as_array(dz.float().flatten(1)).reshape(dz.shape)
    dx, n, heads = np.zeros(x.shape, np.float32), ansatz.qubits, len(theta)
    sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the first token of each thread's

    def work(part: slice) -> None:
        _, space = _spaces.of(ansatz, x_.shape[1])
        dturns, dphases = (np.zeros((heads, len(rows), n)) for rows in (ry_rows, rz_rows))
        sums[part.start] = dturns, dphases
        kernel.gradients(
            x_[part], dz_[part], (turns, back_turns, phases), tuple(form), space, dx[part], dturns, dphases
        )

    if dz.numel():
        over_threads(work, len(x))
    dtheta = np.zeros(theta.shape)
    for _, (dturns, dphases) in sorted(sums.items()):  # in the same order always: the same sum
        # of exp(-i t Y / 2) and exp(-i t Z / 2); the kernel counts bits, theta wires
        dtheta[:, list(ry_rows)] += dturns[:, :, ::-1] / 2
        dtheta[:, list(rz_rows)] -= dphases[:, :, ::-1] / 2
    return torch.from_numpy(dx).to(x.dtype), torch.from_numpy(dtheta).to(theta.dtype)


def _tables(theta: torch.Tensor, ansatz: Ansatz) -> tuple[np.ndarray, np.ndarray]:
    turns, phases = (np.empty((len(theta), each), np.float32) for each in numbers(ansatz))
    write_tables(theta, ansatz, turns, phases)
    return turns, phases


class _BackSpace(NamedTuple):
    """The arrays in which ``cpu.backward`` takes a tile back, for one thread; sizes in vectors.

    Attributes:
        rows, scales, lengths, embedded: those of the forward pass.
        entered, entered_im: (RY layers, 2**n), both parts of what enters each.
        states: three of 2**n, and n for sums.
        tables: a circuit's turns, turns with negative sines, phases.
        dz: by bit, or by column where there are more than bits.
        total: lambda of all circuits, as many as ``embedded``.
        ends: twice 2, for the gradient of the embedding.
        dx_rows: as ``rows``.
    """

    rows: np.ndarray
    scales: np.ndarray
    lengths: np.ndarray
    embedded: np.ndarray
    entered: np.ndarray
    entered_im: np.ndarray
    states: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, np.ndarray, np.ndarray]
    dz: np.ndarray
    total: np.ndarray
    ends: tuple[np.ndarray, np.ndarray]
    dx_rows: np.ndarray


def _make_space(ansatz: Ansatz, width: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays of the forward pass, and of the way back."""
    space = tile_space(ansatz, width)
    n, layers = ansatz.qubits, len(read_ansatz(ansatz)[1])
    entered, entered_im = (aligned(layers << n).reshape(layers, -1) for _ in range(2))
    back = _BackSpace(
        space.rows,
        space.scales,
        space.lengths,
        space.embedded,
        entered,
        entered_im,
        (*space.states[:3], aligned(n)),
        (space.turns, aligned(len(space.turns) // LANES), space.phases),
        aligned(max(n, ansatz.columns)),
        aligned(len(space.embedded) // LANES),
        (aligned(2), aligned(2)),
        aligned(space.rows.shape[1]).reshape(space.rows.shape),
    )
    return tuple(space), tuple(back)


class _Spaces(threading.local):
    """Each thread's arrays, of the forms that it ran last; they go with the thread."""

    def __init__(self) -> None:
        self.of = lru_cache(maxsize=4)(_make_space)


_spaces = _Spaces()
_is_ready = False


def _kernels() -> tuple[Any, Any]:
    """The modules of both kernels, compiled: one code serves all circuits."""
    global _is_ready
    kernels = import_module(f"{__package__}.forward"), import_module(f"{__package__}.backward")
    if not _is_ready:
        _is_ready = True  # before the calls below ask
        with one_compiler(kernels[0].run.stats.cache_path):
            x, ansatz = torch.zeros(1, 1), Ansatz("ry_ring", 1, 1)
            theta = torch.zeros(1, *ansatz.theta_shape)
            backward(x, theta, ansatz, forward(x, theta, ansatz))
    return kernels


def prepare() -> None:
    """Compile the kernels, or read what was compiled before; else the first call does."""
    _kernels()
