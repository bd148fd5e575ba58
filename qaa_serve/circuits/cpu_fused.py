"""The compiled CPU backend, ``cpu_kernel``, as serving uses it.

numba is loaded, and compiles, when the first circuits are made.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from qaa_serve.circuits.ansatz import Ansatz, Cnots, Rotation

LANES = 16  # of cpu_simd
_DTYPES = torch.float32, torch.bfloat16  # of an output that the kernel writes to


class _Form(NamedTuple):
    """An ansatz as the kernel reads it; see ``cpu_kernel._run_tile``."""

    before: np.ndarray
    after: np.ndarray
    gathers: np.ndarray
    moves: np.ndarray
    closing: bool
    constant: bool
    length: bool
    masks: np.ndarray
    n: int


@lru_cache(maxsize=256)
def _read_ansatz(ansatz: Ansatz) -> tuple[_Form, tuple[int, ...], tuple[int, ...]]:
    """The form, and the rows of theta that are RY layers and RZ layers."""
    n = ansatz.qubits
    basis = np.arange(2**n)
    stretches: list[list[Any]] = [[-1, basis, -1]]  # RZ layer, permutation, RZ layer; an RY layer ends each
    ry_rows: list[int] = []
    rz_rows: list[int] = []
    for gate in ansatz.gates():
        stretch = stretches[-1]
        if isinstance(gate, Cnots):
            source = basis
            for control, target in reversed(gate.pairs):
                source = source ^ (((source >> (n - 1 - control)) & 1) << (n - 1 - target))
            stretch[1] = stretch[1][source]
        elif gate.axis == "Z":
            stretch[0 if stretch[1] is basis and stretch[0] < 0 else 2] = len(rz_rows)
            rz_rows.append(gate.row)
        else:
            ry_rows.append(gate.row)
            stretches.append([-1, basis, -1])
    closing = isinstance(gate, Rotation) and gate.axis == "Y" and ansatz.columns <= n  # the last one
    stretches[-1][0] = stretches[-1][2] = -1  # phases behind the last RY are not seen
    before, gathers, after = zip(*stretches, strict=True)
    masks = [sum(1 << (n - 1 - wire) for wire in wires) for wires in ansatz.observables]
    form = _Form(
        np.array(before),
        np.array(after),
        np.array(gathers, np.int32),
        np.array([gather is not basis for gather in gathers]),
        closing,
        ansatz.constant,
        ansatz.length,
        np.array(masks),
        n,
    )
    return form, tuple(ry_rows), tuple(rz_rows)


def _numbers(ansatz: Ansatz) -> tuple[int, int]:
    """How many numbers a circuit's RY gates and its RZ gates take."""
    _, ry_rows, rz_rows = _read_ansatz(ansatz)
    n = ansatz.qubits
    return 2 * len(ry_rows) * n, 2 * len(rz_rows) * (2 ** (n // 2) + 2 ** (n - n // 2))


@lru_cache
def _signs(bits: int) -> np.ndarray:
    """(bits, 2**bits) float64: -1 where a bit of a number is 0, 1 where it is 1."""
    signs: np.ndarray = 2.0 * ((np.arange(2**bits) >> np.arange(bits)[:, None]) & 1) - 1
    return signs


def _cos_and_sin(angles: np.ndarray, target: np.ndarray) -> None:
    """Write them, taken in float64, to target[..., 0] and target[..., 1]."""
    np.cos(angles, out=target[..., 0], casting="same_kind")
    np.sin(angles, out=target[..., 1], casting="same_kind")


class _Space:
    """Room for a tile, of one thread: the arrays that the kernel is given."""

    def __init__(self, ansatz: Ansatz, width: int):
        self.arrays = _room(ansatz, width)


#: All layers whose circuits are alike use the same, so that it stays in the cache; it goes with the last of them.
_spaces: WeakValueDictionary[tuple[int, Ansatz, int], _Space] = WeakValueDictionary()


def _room(ansatz: Ansatz, width: int) -> tuple[Any, ...]:
    n, padded = ansatz.qubits, -width % LANES + width
    turns, phases = _numbers(ansatz)
    return (
        _aligned(padded).reshape(LANES, padded),
        _aligned(1),
        np.zeros(LANES, np.float32),
        _aligned(max(2**n, padded) + 1),
        _aligned(max(2**n, padded) // LANES + 1),
        (*(_aligned(2**n) for _ in range(5)), _aligned(2 * n)),
        _aligned(turns),
        _aligned(phases),
        _aligned(ansatz.columns),
    )


def _array(x: torch.Tensor) -> np.ndarray:
    """A matrix as the kernel reads it: float32, or bfloat16 as uint16 for want of such a type in numpy."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy()
    return x.float().contiguous().numpy()


def _aligned(vectors: int) -> np.ndarray:
    """So many vectors of zeros, at an address that a vector may be loaded from."""
    numbers = np.zeros((vectors + 1) * LANES, np.float32)
    skip = -numbers.ctypes.data % 64 // 4
    return numbers[skip : skip + vectors * LANES]


class CompiledCircuits:
    """Circuits for serving on a CPU; see ``backends.Circuits``."""

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._kernel: Any = import_module("qaa_serve.circuits.cpu_kernel")
        self._ansatz = ansatz
        form, self._ry_rows, self._rz_rows = _read_ansatz(ansatz)
        self._form = tuple(form)
        self._spaces: dict[tuple[int, int], _Space] = {}
        turns, phases = _numbers(ansatz)
        # Zeros: a circuit that has no angles yet gives a state, and so a z, of zero.
        self._turns = np.zeros((count, turns), np.float32)
        self._phases = np.zeros((count, phases), np.float32)
        self._tables = self._turns, self._phases

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        if not len(theta):
            return
        n, count = self._ansatz.qubits, len(theta)
        half = theta.detach().double().cpu().numpy()[:, :, ::-1] / 2  # by bit
        turns = self._turns[first : first + count].reshape(count, -1, n, 2)
        _cos_and_sin(half[:, self._ry_rows], turns)
        # RZ(t) = diag(exp(-i t / 2), exp(i t / 2)) on each qubit.
        if self._rz_rows:
            phases = self._phases[first : first + count].reshape(count, len(self._rz_rows), -1, 2)
            lower, upper, size = n // 2, n - n // 2, 2 ** (n - n // 2)
            angles = half[:, self._rz_rows]
            _cos_and_sin(angles[..., lower:] @ _signs(upper), phases[:, :, :size])
            _cos_and_sin(angles[..., :lower] @ _signs(lower), phases[:, :, size:])

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``. Many tokens are shared over torch's number of threads."""
        z = torch.empty(*index.shape, self._ansatz.columns)
        if not z.numel():
            return z
        x_, index_, z_, rows = _array(x), index.contiguous().numpy(), z.numpy(), np.arange(x.shape[0])

        def work(part: slice) -> None:
            space = self._space(x_.shape[1])
            self._kernel.run(x_, rows[part], index_[part], self._tables, self._form, space, z_[part])

        _share(work, x.shape[0])
        return z

    def add_to(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        rows: np.ndarray,
        slots: np.ndarray,
        table: np.ndarray,
        weights: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """output[row] += B z(x[row]) for the rows of a batch that have an adapter, all in one compiled call.

        Args:
            output: (tokens, d_out), changed in place; by the kernel itself if float32 or bfloat16 and contiguous.
            x: (tokens, width) of output's dtype.
            rows: (T,) int64 row numbers.
            slots: (T,) int64, which adapter each of them has.
            table: (slots, slices * heads) int32, the circuits of each adapter, -1 for none.
            weights: (slots, heads * columns, d_out) float32, B transposed.
            ends: (slices,) int64, where each slice of a packed layer ends in d_out.
        """
        if output.dtype not in _DTYPES or not output.is_contiguous():
            update = torch.zeros(output.shape)
            self.add_to(update, x.float(), rows, slots, table, weights, ends)
            output += update.to(output.dtype)
            return
        x_, output_ = _array(x), _array(output)

        def work(part: slice) -> None:
            space = self._space(x_.shape[1])
            self._kernel.run_and_add(
                x_, rows[part], slots[part], table, self._tables, self._form, space, weights, ends, output_
            )

        _share(work, len(rows))

    def _space(self, width: int) -> tuple[Any, ...]:
        """The calling thread's, kept here because to hash an ansatz takes longer than to look up two numbers."""
        key = threading.get_ident(), width
        if key not in self._spaces:
            shared = key[0], self._ansatz, width
            self._spaces[key] = _spaces.get(shared) or _spaces.setdefault(shared, _Space(self._ansatz, width))
        return self._spaces[key].arrays

    @classmethod
    def compile(cls, ansatz: Ansatz, width: int, readouts: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile everything for a dtype, or read what was compiled before: one code serves all circuits."""
        circuits = cls(ansatz, 1, device)
        x, one = torch.zeros(1, width, dtype=dtype), np.zeros(1, np.int64)
        table, weights = np.full((1, readouts), -1, np.int32), np.zeros((1, ansatz.columns, 1), np.float32)
        output, ends = torch.zeros(1, 1, dtype=dtype), np.ones(readouts, np.int64)
        with _alone(circuits._kernel.run.stats.cache_path):
            circuits.run(x, torch.from_numpy(table))
            circuits.add_to(output, x, one, one, table, weights, ends)

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return int(self._turns.nbytes + self._phases.nbytes)


@contextmanager
def _alone(directory: str | None) -> Iterator[None]:
    """Let one process at a time compile into a directory of numba's.

    numba names what it writes by how much is there, so that two at once may write one file for two kinds of
    arguments. And workers that start together need not all compile the same.
    """
    with ExitStack() as held:
        with suppress(OSError):  # it cannot be written to, and so nobody does
            if directory is not None:
                file = held.enter_context(open(Path(directory, ".qaa-compiling"), "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------ threads

_PER_THREAD = 4 * LANES  # tokens: fewer are not worth waking a thread for
_pool_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # one a process; it makes threads as they are needed


def _share(work: Callable[[slice], None], tokens: int) -> None:
    """work(part) over so many tokens, on at most as many threads as torch uses.

    The kernel holds no lock of Python's. OpenMP's own threads are left out of it: they would spin beside these.
    """
    threads = min(torch.get_num_threads(), tokens // _PER_THREAD) if tokens >= 2 * _PER_THREAD else 1
    if threads <= 1:
        work(slice(0, tokens))
        return
    ends = [tokens * (i + 1) // threads // LANES * LANES for i in range(threads - 1)] + [tokens]
    with _pool_lock:
        if (pool := _pools.get(os.getpid())) is None:
            pool = _pools[os.getpid()] = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="qaa-circuits")
    others = [pool.submit(work, slice(ends[i - 1], ends[i])) for i in range(1, threads)]
    work(slice(0, ends[0]))
    for other in others:
        other.result()


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device, and what to do about it."""
    if device.type != "cpu":
        return "it is for CPUs"
    return None if find_spec("numba") else "numba is not installed: pip install numba"
