"""What Python does for the compiled CPU kernels: circuits' forms and tables, arrays, threads, one compiler a time.

Nothing here loads numba.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.schedule import index_masks, schedule, sources

LANES = 16  # of vectors

Arrays = TypeVar("Arrays", bound=tuple[object, ...])

# ------------------------------------------------------------------------------------ circuits


class Form(NamedTuple):
    """``schedule``'s steps as the kernels read them.

    Attributes:
        rz: (steps,) the number of each step's RZ layer, -1 for none.
        gathers: (steps + 1, 2**n) int32, each step's permutation of amplitudes, then the readout's.
        moves: (steps + 1,) whether there is one.
        ry: (steps,) the number of each step's RY layer, -1 for none.
        reads_x: whether a tile reads <Z> and <X> out instead of running the last RY layer.
        constant, length: of the ansatz.
        masks: (columns,) bits of each readout, behind the readout's permutation.
        n: qubits.
    """

    rz: np.ndarray
    gathers: np.ndarray
    moves: np.ndarray
    ry: np.ndarray
    reads_x: bool
    constant: bool
    length: bool
    masks: np.ndarray
    n: int


@lru_cache(maxsize=256)
def read_ansatz(ansatz: Ansatz) -> tuple[Form, tuple[int, ...], tuple[int, ...]]:
    """The form, and the rows of theta that are RY layers and RZ layers."""
    n, steps = ansatz.qubits, schedule(ansatz)
    ry_rows = [step.turns for step in steps.all_steps if step.turns is not None]
    rz_rows = [step.phases for step in steps.all_steps if step.phases is not None]
    permutations = [*(step.cnots for step in steps.all_steps), steps.closing]
    gathers = [torch.arange(2**n) if cnots is None else sources(cnots, n) for cnots in permutations]
    form = Form(
        np.array([-1 if step.phases is None else rz_rows.index(step.phases) for step in steps.all_steps]),
        torch.stack(gathers).to(torch.int32).numpy(),
        np.array([cnots is not None for cnots in permutations]),
        np.array([-1 if step.turns is None else ry_rows.index(step.turns) for step in steps.all_steps]),
        steps.closing is None and ansatz.columns <= n,
        ansatz.constant,
        ansatz.length,
        np.array(index_masks(ansatz)),
        n,
    )
    return form, tuple(ry_rows), tuple(rz_rows)


def numbers(ansatz: Ansatz) -> tuple[int, int]:
    """How many numbers a circuit's RY gates and its RZ gates take."""
    _, ry_rows, rz_rows = read_ansatz(ansatz)
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


def make_tables(theta: torch.Tensor, ansatz: Ansatz) -> tuple[np.ndarray, np.ndarray]:
    """What circuits' gates take, (circuits, ``numbers(ansatz)``) float32 each, for angles (circuits, rows, n)."""
    _, ry_rows, rz_rows = read_ansatz(ansatz)
    n, count = ansatz.qubits, len(theta)
    turns, phases = (np.zeros((count, each), np.float32) for each in numbers(ansatz))
    half = theta.detach().double().cpu().numpy()[:, :, ::-1] / 2  # by bit
    _cos_and_sin(half[:, ry_rows], turns.reshape(count, len(ry_rows), n, 2))
    # RZ(t) = diag(exp(-i t / 2), exp(i t / 2)) on each qubit.
    if rz_rows:
        lower, upper, size = n // 2, n - n // 2, 2 ** (n - n // 2)
        tables = phases.reshape(count, len(rz_rows), size + 2**lower, 2)
        angles = half[:, rz_rows]
        _cos_and_sin(angles[..., lower:] @ _signs(upper), tables[:, :, :size])
        _cos_and_sin(angles[..., :lower] @ _signs(lower), tables[:, :, size:])
    return turns, phases


# ------------------------------------------------------------------------------------ arrays


def as_array(x: torch.Tensor) -> np.ndarray:
    """A matrix as the kernel reads it: float32, or bfloat16 as uint16 for want of such a type in numpy."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy()
    return x.float().contiguous().numpy()


def aligned(vectors: int) -> np.ndarray:
    """So many vectors of zeros, at an address that a vector may be loaded from."""
    floats = np.zeros((vectors + 1) * LANES, np.float32)
    skip = -floats.ctypes.data % 64 // 4
    return floats[skip : skip + vectors * LANES]


class Workspace(NamedTuple):
    """The arrays in which ``cpu.forward`` runs circuits on tokens of a width, for one thread; sizes in vectors.

    Attributes:
        rows: the tokens of a tile, (16, width up to a multiple of 16) numbers.
        scales: 1, what their amplitudes are multiplied by.
        lengths: 1, ||x|| / sqrt(width).
        embedded: the tile's amplitudes, 2**n, or the width if that is more, and 1 for the constant.
        state: the same of a single token, in numbers.
        states: five of 2**n, and 2 n for readouts.
        turns, phases: a circuit's tables, a vector for each number.
        z: a readout each.
    """

    rows: np.ndarray
    scales: np.ndarray
    lengths: np.ndarray
    embedded: np.ndarray
    state: np.ndarray
    states: tuple[np.ndarray, ...]
    turns: np.ndarray
    phases: np.ndarray
    z: np.ndarray


def _allocate(ansatz: Ansatz, width: int) -> Workspace:
    n, padded = ansatz.qubits, -width % LANES + width
    turns, phases = numbers(ansatz)
    return Workspace(
        aligned(padded).reshape(LANES, padded),
        aligned(1),
        np.zeros(LANES, np.float32),
        aligned(max(2**n, padded) + 1),
        aligned(max(2**n, padded) // LANES + 1),
        (*(aligned(2**n) for _ in range(5)), aligned(2 * n)),
        aligned(turns),
        aligned(phases),
        aligned(ansatz.columns),
    )


class PerThread(threading.local, Generic[Arrays]):
    """What ``allocate`` makes of an ansatz and a width, for each thread, of those that it ran last.

    Layers whose circuits are alike share it, so that it stays in the cache. It goes with the thread.
    """

    def __init__(self, allocate: Callable[[Ansatz, int], Arrays]) -> None:
        self.of = lru_cache(maxsize=4)(allocate)


workspaces = PerThread(_allocate)


# ------------------------------------------------------------------------------------ compiling, threads


@contextmanager
def one_compiler(directory: str | None) -> Iterator[None]:
    """Let one process at a time compile into a directory of numba's.

    numba names what it writes by how much is there, so that two at once may write one file for two kinds of
    arguments. And workers that start together need not all compile the same.
    """
    with ExitStack() as held:
        with suppress(OSError):  # it cannot be written to, and so nobody does
            if directory is not None:
                file = held.enter_context(open(Path(directory, ".qaa-compiling"), "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
                held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open too
        yield


_PER_THREAD = 4 * LANES  # tokens: fewer are not worth waking a thread for
_pool_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # one a process; it makes threads as they are needed


def over_threads(work: Callable[[slice], None], tokens: int) -> None:
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
