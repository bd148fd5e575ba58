"""Batched circuits on NVIDIA's cuStateVec, by way of cuquantum-python: the backend of GPU serving.

**Nothing here ever ran on a GPU.** The tests run it on a CPU, under an interpreter of the library calls it makes
(tests/custatevec_interpreter.py) that takes pointers, strides and bit orders as cuStateVec 1.15's header has them.

A batch of states is one buffer, a row for each token and readout, and goes through three kinds of step:

- **Rotations.** All that acts on a qubit between two CNOT rings is one 2 x 2 matrix; up to five neighbouring
  qubits share one matrix, the Kronecker product, built when angles are put in. ``apply_matrix_batched`` with
  ``MATRIX_INDEXED`` multiplies each state by the matrix of its own circuit: one call serves a mixed batch, and
  the numbers of its circuits stay on the device.
- **Rings.** A CNOT ring permutes amplitudes: a gather into a second buffer. One behind the last rotation only
  changes which signs an amplitude has, and is in the table of signs.
- **Readout.** |psi|^2 times the table of signs.

The library does not report a circuit number that does not exist. All are therefore checked on the device: -1 and
those out of range are led to a spare circuit, and a readout of a circuit that has no angles becomes zero.

Nothing in ``run`` waits for the device. Whether the library's calls can be captured in a CUDA graph is documented
nowhere, so they should not be: under vLLM the delta is an op that splits its piecewise graphs, and runs between
them. (A graph that did capture a run would hold the addresses of buffers that a larger batch replaces.)
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from qaa_serve.circuits.ansatz import Ansatz, check_theta
from qaa_serve.circuits.embedding import embed, lengths
from qaa_serve.circuits.schedule import readout_signs, schedule, sources

#: Qubits of one matrix. A call moves 16 bytes an amplitude and takes 8 * 2**qubits floating point operations; at
#: the 4.8 TB/s and 67 TFLOP/s of an H200's data sheet, 5 is where these take about equally long. Not measured.
_MOST_TARGETS = 5

#: Amplitudes in each of the two buffers, 64 MiB: larger batches run in parts, since 8,192 tokens of 13 qubits
#: would be 512 MiB. By the figures above a call on a whole part takes 30 microseconds, so that issuing the next
#: one should not hold up the GPU. Not measured.
_MOST_AMPLITUDES = 2**23

#: Amplitudes between the beginnings of two states: on Blackwell each must lie at a multiple of 128 bytes.
_LEAST_STRIDE = 16

#: ``cudaDataType_t`` of complex64, from CUDA's library_types.h.
_CUDA_C_32F = 4

#: cuquantum.bindings.custatevec, which has no types.
_Library: TypeAlias = Any

# ---------------------------------------------------------------------------------------------- the library


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device, and what to do about it; None if it can. Raises nothing."""
    if device.type != "cuda":
        return f"cuStateVec computes on an NVIDIA GPU, not on a {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU: it is a build without CUDA, or the driver is missing (see nvidia-smi)"
    try:
        library = _library()
    except Exception as error:
        return (
            f"cuquantum.bindings.custatevec cannot be imported ({_named(error)}): install cuquantum-python-cu13 "
            "and what it depends on, as pip install 'qaa-serve[cuda]' does"
        )
    try:
        with torch.cuda.device(device):
            handle = library.create()
            library.destroy(handle)
    except Exception as error:
        reason = _named(error)
        remedies = (remedy for mark, remedy in _REMEDIES.items() if mark in reason)
        return f"cuStateVec does not start on {device} ({reason}): {next(remedies, 'see its documentation')}"
    return None


_REMEDIES = {
    "DynamicLibNotFoundError": "a library is missing; pip install custatevec-cu13 nvidia-cublas, or put the "
    "folder of CUDA's libraries into LD_LIBRARY_PATH",
    "NOT_INITIALIZED": "it finds no NVIDIA driver that knows CUDA 13; version 580 or newer does (see nvidia-smi)",
    "ARCH_MISMATCH": "it does not support this GPU; choose another backend",
    "ALLOC_FAILED": "the GPU's memory is taken; leave it some, for instance by a lower --gpu-memory-utilization",
}


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _library() -> _Library:
    return import_module("cuquantum.bindings.custatevec")


def _current(tensor: torch.Tensor) -> torch.cuda.device:
    """A context in which the tensor's GPU is the current one, as the library expects."""
    return torch.cuda.device(tensor.get_device())  # -1, which changes nothing, on a CPU


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


class _Session:
    """A thread's use of the library on one device: handle, stream, workspace and buffers for states.

    Circuits of all forms share it, since they run one after the other.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._library = _library()
        self._handle: int = self._library.create()
        self._stream: torch.cuda.Stream | None = None
        self._needs: dict[tuple[int, ...], int] = {}
        self.drop_memory()
        # When its thread has ended. The end of the process frees everything anyway, CUDA perhaps before us.
        weakref.finalize(self, self._library.destroy, self._handle).atexit = False

    def use_stream(self, stream: torch.cuda.Stream) -> None:
        """Run what comes now on that stream, behind what ran on another."""
        if stream == self._stream:
            return
        if self._stream is not None:
            # The handle has memory of its own, which one stream at a time may use.
            stream.wait_stream(self._stream)
        self._library.set_stream(self._handle, stream.cuda_stream)
        self._stream = stream
        # torch hands freed memory on in the order of the stream that it was made for.
        self.drop_memory()

    def drop_memory(self) -> None:
        """Let go of buffers and workspace."""
        self._states = self._empty(2, 0, dtype=torch.complex64)
        self._workspace = self._empty(0, dtype=torch.uint8)

    @torch.inference_mode(False)
    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that can be written to inside and outside inference mode, whichever it is asked for in.

        torch aligns what lies on a GPU to 512 bytes; the library wants 128 for states and 256 for a workspace.
        """
        return torch.empty(shape, dtype=dtype, device=self._device)

    def state_buffers(self, states: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers (states, stride) complex64: the same ones until a batch is larger than all before."""
        amplitudes = states * stride
        if amplitudes > self._states.shape[1]:
            # A power of two: slowly growing batches do not make new buffers each time, and the second is aligned.
            self._states = self._empty(2, 1 << (amplitudes - 1).bit_length(), dtype=torch.complex64)
        first, second = self._states[:, :amplitudes].view(2, states, stride)
        return first, second

    def apply(
        self,
        states: torch.Tensor,
        qubits: int,
        targets: tuple[int, ...],
        matrices: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Multiply some bits of each state by a matrix of its own, in place.

        Args:
            states: (states, stride) complex64; the first 2**qubits of a row are a state.
            qubits: of a state.
            targets: bits of an amplitude's index, bit 0 the least significant; the first of them is the least
                significant bit of the matrices' rows and columns.
            matrices: (m, 2**targets, 2**targets) complex64.
            slots: (states,) int32, each in [0, m): the matrix of each state.
        """
        library = self._library
        batch = {
            "handle": self._handle,
            "sv_data_type": _CUDA_C_32F,
            "n_index_bits": qubits,
            "n_svs": states.shape[0],
            "sv_stride": states.shape[1],
            "map_type": library.MatrixMapType.MATRIX_INDEXED,
            "matrix_indices": slots.data_ptr(),
            "matrices": matrices.data_ptr(),
            "matrix_data_type": _CUDA_C_32F,
            "layout": library.MatrixLayout.ROW,
            "adjoint": 0,
            "n_matrices": matrices.shape[0],
            "n_targets": len(targets),
            "n_controls": 0,
            "compute_type": library.ComputeType.COMPUTE_32F,
        }
        sizes = (qubits, *states.shape, len(targets), matrices.shape[0])
        if sizes not in self._needs:
            self._needs[sizes] = library.apply_matrix_batched_get_workspace_size(**batch)
        if self._needs[sizes] > self._workspace.numel():
            self._workspace = self._empty(self._needs[sizes], dtype=torch.uint8)
        library.apply_matrix_batched(
            **batch,
            batched_sv=states.data_ptr(),
            targets=targets,
            controls=0,
            control_bit_values=0,
            extra_workspace=self._workspace.data_ptr(),
            extra_workspace_size_in_bytes=self._workspace.numel(),
        )


_THREAD = threading.local()


def _session(device: torch.device) -> _Session:
    """The calling thread's session on a device: a handle must not be used by two threads at once."""
    sessions: dict[torch.device, _Session] = _THREAD.__dict__.setdefault("sessions", {})
    if device not in sessions:
        sessions[device] = _Session(device)
    return sessions[device]


def release(device: torch.device) -> None:
    """Let go of the calling thread's buffers on a device; the next run makes them anew."""
    for here, session in _THREAD.__dict__.get("sessions", {}).items():
        if here.type == device.type:
            session.drop_memory()
    torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------- the circuits


@dataclass(frozen=True)
class _Layer:
    """A permutation psi[j] <- psi[gather[j]], then rotations of every qubit.

    Attributes:
        gather: (stride,) int64; None: as it is.
        rotations: axis and row of theta of each, in the order in which they act.
    """

    gather: torch.Tensor | None
    rotations: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Group:
    """Neighbouring qubits that share a matrix."""

    wires: range
    targets: tuple[int, ...]  # their bits, the last wire's first


@dataclass(frozen=True)
class _Plan:
    stride: int
    layers: tuple[_Layer, ...]
    groups: tuple[_Group, ...]
    signs: torch.Tensor  # (2 * stride, columns): what squared real and imaginary parts count for


@lru_cache(maxsize=256)
def _plan(ansatz: Ansatz, device: torch.device) -> _Plan:
    """The schedule's steps, cut at the CNOTs: all that acts on a qubit between two rings is one rotation."""
    n = ansatz.qubits
    stride = max(2**n, _LEAST_STRIDE)
    layers: list[_Layer] = []
    gather, rotations = None, list[tuple[str, int]]()
    for step in schedule(ansatz).all_steps:
        if step.phases is not None:
            rotations.append(("Z", step.phases))
        if step.cnots is not None:
            if rotations:
                layers.append(_Layer(gather, tuple(rotations)))
                gather, rotations = None, []
            # What lies between two states stays where it is.
            moved = torch.cat([sources(step.cnots, n), torch.arange(2**n, stride)]).to(device)
            gather = moved if gather is None else gather[moved]
        if step.turns is not None:
            rotations.append(("Y", step.turns))
    layers.append(_Layer(gather, tuple(rotations)))
    signs = torch.nn.functional.pad(readout_signs(ansatz), (0, 0, 0, stride - 2**n))
    return _Plan(stride, tuple(layers), _groups(n), signs.repeat_interleave(2, dim=0).to(device))


def _groups(n: int) -> tuple[_Group, ...]:
    """As few groups as the largest matrix allows, as equal as can be."""
    count = -(-n // _MOST_TARGETS)
    edges = [-(-n * k // count) for k in range(count + 1)]
    wires = [range(*pair) for pair in pairwise(edges)]
    return tuple(_Group(w, tuple(n - 1 - wire for wire in reversed(w))) for w in wires)


class CuStateVecCircuits:
    """Circuits for serving; see ``backends.Circuits``.

    Raises:
        ImportError: where cuquantum-python-cu13 is not installed. ``missing`` tells what else may be wrong.
    """

    @torch.inference_mode(False)
    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._ansatz = ansatz
        self._count = count
        # One more than asked for: where states without a circuit go. Its matrices stay zero.
        self._ready = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self._device = self._ready.device  # with its number
        self._plan = _plan(ansatz, self._device)
        sizes = [2 ** len(group.wires) for group in self._plan.groups]
        self._matrices = [
            [torch.zeros(count + 1, size, size, dtype=torch.complex64, device=device) for size in sizes]
            for _ in self._plan.layers
        ]
        with _current(self._ready):
            _session(self._device)  # the handle is made now, not under the first token

    @torch.no_grad()
    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n), on any device, of some circuits.

        Raises:
            ValueError: if theta's shape is not the ansatz's.
            IndexError: if there are no such circuits.
        """
        check_theta(theta, self._ansatz)
        last = first + theta.shape[0]
        if not 0 <= first <= last <= self._count:
            raise IndexError(f"there are {self._count} circuits, counted from 0; not {first} to {last - 1}")
        theta = theta.to(self._device, torch.float64)
        for layer, matrices in zip(self._plan.layers, self._matrices, strict=True):
            gates = _product([_rotation(axis, theta[:, row]) for axis, row in layer.rotations])
            for group, target in zip(self._plan.groups, matrices, strict=True):
                target[first:last] = _kron([gates[:, wire] for wire in group.wires])
        self._ready[first:last] = True

    @torch.no_grad()
    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``; a number that is not there gives zeros.

        In steady state no memory is made but what torch's own allocator hands out; a batch that is larger than all
        before it makes the buffers grow. Work goes to the current stream.

        Raises:
            ValueError: if x is wider than the state.
        """
        tokens, readouts = index.shape
        z = torch.zeros(tokens, readouts, self._ansatz.columns, device=self._device)
        if z.numel() == 0:
            return z
        known = (index >= 0) & (index < self._count)
        slots = torch.where(known, index, self._count).to(torch.int32).contiguous()
        part = max(1, _MOST_AMPLITUDES // (readouts * self._plan.stride))
        with _current(z):
            session = _session(self._device)
            session.use_stream(_current_stream(self._device))
            for rows in (slice(first, first + part) for first in range(0, tokens, part)):
                self._run(session, x[rows], slots[rows].flatten(), z[rows].flatten(0, 1))
        if self._ansatz.length:
            z *= lengths(x).float()[:, None, None]
        # The zero matrices alone would give NaN where x is not finite, as in rows that only fill up a batch.
        return z.masked_fill_(~self._ready[slots].unsqueeze(-1), 0)

    def _run(self, session: _Session, x: torch.Tensor, slots: torch.Tensor, z: torch.Tensor) -> None:
        """Part of a batch: x (tokens, width), slots (tokens * readouts,), to z (tokens * readouts, columns)."""
        plan, n = self._plan, self._ansatz.qubits
        states, spare = session.state_buffers(len(slots), plan.stride)
        by_token = states.view(len(x), -1, plan.stride)
        by_token[..., : 2**n] = embed(x, self._ansatz).unsqueeze(1)
        by_token[..., 2**n :] = 0
        for layer, matrices in zip(plan.layers, self._matrices, strict=True):
            if layer.gather is not None:
                torch.index_select(states, 1, layer.gather, out=spare)
                states, spare = spare, states
            for group, matrix in zip(plan.groups, matrices, strict=True):
                session.apply(states, n, group.targets, matrix, slots)
        parts, squares = torch.view_as_real(states).flatten(1), torch.view_as_real(spare).flatten(1)
        torch.mm(torch.mul(parts, parts, out=squares), plan.signs, out=z)

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return sum(matrices.nbytes for layer in self._matrices for matrices in layer)


def _rotation(axis: str, angle: torch.Tensor) -> torch.Tensor:
    """RY or RZ: (circuits, n) float64 -> (circuits, n, 2, 2) complex128."""
    cos, sin = torch.cos(angle / 2), torch.sin(angle / 2)
    if axis == "Y":
        entries = torch.stack([cos, -sin, sin, cos], dim=-1).to(torch.complex128)
    else:
        zero = torch.zeros_like(cos)
        entries = torch.complex(
            torch.stack([cos, zero, zero, cos], dim=-1), torch.stack([-sin, zero, zero, sin], dim=-1)
        )
    return entries.reshape(*angle.shape, 2, 2)


def _product(gates: list[torch.Tensor]) -> torch.Tensor:
    """The matrix of gates that act from the first to the last."""
    product = gates[0]
    for gate in gates[1:]:
        product = gate @ product
    return product


def _kron(gates: list[torch.Tensor]) -> torch.Tensor:
    """Kronecker product of m (circuits, 2, 2), the first one's bit most significant: (circuits, 2**m, 2**m)."""
    product = gates[0]
    for gate in gates[1:]:
        product = torch.einsum("cij,ckl->cikjl", product, gate).flatten(1, 2).flatten(2, 3)
    return product
