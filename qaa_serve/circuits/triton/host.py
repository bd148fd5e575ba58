"""Whole circuits in one Triton kernel, which reads them as data; only x and z pass the chip's edge.

One program runs one token on the circuits of one slice of a layer. What it runs, any ansatz, depth, heads and
readouts, it reads from a record of its slot; one without circuits ends at once. So a launch depends on shapes
alone, any mix of adapters is one launch, nothing is read back, and a CUDA graph that was captured before an
adapter was loaded serves it. There is one kernel for a number of qubits. The state lies in the registers of a
program, as real and imaginary part. A circuit becomes ``schedule``'s steps:

- RY on every qubit. The state is split by the last bit of the amplitudes' index, turned, and joined so that this
  bit becomes the first: after n turns each bit has had its turn and is in its place again. A turn is (a - t b,
  t a + b) with t = tan(angle / 2), half the work of one with cosine and sine. The cosines that it leaves out are a
  factor of the whole state: the next phases have it, and the readout divides by the state's length.
- RZ on every qubit is a diagonal of phases: the product of one for the high half of the bits and one for the low
  half, of 2**(n/2) numbers each.
- CNOTs permute the amplitudes: a gather by a table of n - 1 permutations, one for each reach of a ring.

The readout makes all 2**n Walsh-Hadamard sums of the squares, each of which is the expectation value of a product
of Pauli-Z; that of the empty product is the sum of the squares.

A tangent stays within [-1, 1] since angles are reduced to [-pi/2, pi/2] when a record is made. What is taken
off is RY(pi), a Pauli-Y up to a phase, and a Pauli can move to the end of the circuit: on its way it changes signs
of angles, and there signs of readouts.

The tests compile it for Hopper and Ampere (docs/performance.md) and interpret it on a CPU. It never ran on a GPU.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from qaa_serve.circuits.ansatz import ANSATZ_NAMES, Ansatz, Cnots, check_theta, check_width
from qaa_serve.circuits.schedule import Schedule, schedule, sources

#: 16 warps hold the state of 14 qubits in their registers, of more they do not.
MOST_QUBITS = 14

#: A layer of RY makes the state up to sqrt(2)**n times too long. Before that passes sqrt(2)**80 the state is
#: multiplied by the cosines that were left out.
_MOST_GROWTH = 80

#: Words of a header and of a step, and what a section begins at a multiple of; see ``kernel``.
_HEADER, _STEP, _ALIGNED = 12, 4, 16


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device, and what to do about it."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU; only for tests, TRITON_INTERPRET=1 runs it slowly on a CPU"
    return None


def check_qubits(qubits: int) -> None:
    """Refuse what a program cannot hold.

    Raises:
        ValueError: for more qubits than ``MOST_QUBITS``.
    """
    if qubits > MOST_QUBITS:
        raise ValueError(
            f"the triton backend takes at most {MOST_QUBITS} qubits, not {qubits}; choose another one"
        )


# ------------------------------------------------------------------------------------------------- records


def rescaled(steps: Schedule, n: int) -> list[bool]:
    """Whether each step must have phases, to take back what the turns before it made the state longer by."""
    found, turned = [], int(steps.first is not None)
    for step in steps.steps:
        found.append(step.phases is not None or (turned + 1) * n > _MOST_GROWTH)
        turned = (0 if found[-1] else turned) + (step.turns is not None)
    return found


def _phase_floats(n: int) -> int:
    return 2 * ((1 << n // 2) + (1 << n - n // 2))


class TablePlan(NamedTuple):
    """Where in one circuit's table, in float32 numbers, lies what each step needs; -1 for what it does not have.

    Attributes:
        first: the tangents of the RY layer before the steps.
        steps: of each, the phases, the number of the permutation (not a place), and the tangents.
        floats: of the table; the readouts' signs are its first ones.
    """

    first: int
    steps: tuple[tuple[int, int, int], ...]
    floats: int


@lru_cache(maxsize=256)
def plan_table(ansatz: Ansatz) -> TablePlan:
    """The places in a table of such a circuit."""
    steps, n, at = schedule(ansatz), ansatz.qubits, ansatz.columns
    first, found = -1, []
    if steps.first is not None:
        first, at = at, at + n
    for step, has_phases in zip(steps.steps, rescaled(steps, n), strict=True):
        phases = permutation = tangents = -1
        if has_phases:
            phases, at = at, at + _phase_floats(n)
        if step.cnots is not None:
            permutation = _reach(step.cnots, n) - 1
        if step.turns is not None:
            tangents, at = at, at + n
        found.append((phases, permutation, tangents))
    return TablePlan(first, tuple(found), at)


def _up(words: int) -> int:
    return -(-words // _ALIGNED) * _ALIGNED


class Layout(NamedTuple):
    """What lies where in a layer's records of one slot, in words of 32 bits.

    A record for each slice, one behind the other: header, steps, masks of the readouts, their offsets and scales,
    and a table for each head. Behind the last one offsets and scales of the layer's input.

    Attributes:
        qubits: of the circuits.
        width: of the input; 0 for a layer whose input is never standardised.
        rank: readouts of all heads that there is room for.
        steps: that there is room for.
        floats: in the tables of all heads that there is room for.
        padded: a power of two above the readouts of any circuit.
        masks_at, readouts_at, tables_at: where these begin in a record.
        record: words of one slice's.
        inputs_at: where offsets and scales of the input begin.
        words: of all that a slot has.
    """

    qubits: int
    width: int
    rank: int
    steps: int
    floats: int
    padded: int
    masks_at: int
    readouts_at: int
    tables_at: int
    record: int
    inputs_at: int
    words: int


def make_layout(qubits: int, width: int, slices: int, rank: int, steps: int, floats: int) -> Layout:
    """The layout of a layer of so many slices, see ``Layout``."""
    padded = 1 << min(rank, qubits * (qubits + 1) // 2).bit_length()
    masks_at = _up(_HEADER + _STEP * steps)
    readouts_at = masks_at + _up(padded)
    tables_at = readouts_at + _up(2 * rank)
    record = tables_at + _up(floats)
    sections = masks_at, readouts_at, tables_at, record, slices * record
    return Layout(qubits, width, rank, steps, floats, padded, *sections, slices * record + _up(2 * width))


def layout_for(qubits: int, width: int, slices: int, rank: int, layers: int) -> Layout:
    """Room for circuits of so many layers of any ansatz, or for as much in more heads of fewer layers."""
    most = min(rank, qubits * (qubits + 1) // 2)
    forms = [Ansatz(name, qubits, layers, most) for name in ANSATZ_NAMES]
    steps = max(len(schedule(form).steps) for form in forms)
    return make_layout(qubits, width, slices, rank, steps, max(plan_table(form).floats for form in forms))


def pack(
    theta: torch.Tensor, ansatz: Ansatz, layout: Layout, readouts: torch.Tensor | None = None, inputs: bool = False
) -> torch.Tensor:
    """The records of slices whose circuits are alike; computed in float64.

    Args:
        theta: (slices, heads, rows, n) angles, on any device.
        ansatz: the form that the heads share.
        layout: where they go.
        readouts: (slices, 2, heads * columns) offsets and scales of z; None to take it as it is.
        inputs: whether x is standardised by what is behind the layer's records.

    Returns:
        (slices, layout.record) int32 on the CPU.

    Raises:
        ValueError: if theta's shape is not the ansatz's, or there is no room for such circuits.
    """
    circuits = theta.flatten(0, 1)
    check_theta(circuits, ansatz)
    slices, heads, plan = *theta.shape[:2], plan_table(ansatz)
    if len(plan.steps) > layout.steps or heads * plan.floats > layout.floats:
        raise ValueError(
            f"{heads} x {ansatz.layers} layers of {ansatz.name} take {heads * plan.floats} numbers in "
            f"{len(plan.steps)} steps; there is room for {layout.floats} in {layout.steps}"
        )
    records = torch.zeros(slices, layout.record, dtype=torch.int32)
    numbers = records.view(torch.float32)
    whitened = readouts is not None
    header = [heads, ansatz.columns, len(plan.steps), plan.first, ansatz.constant, ansatz.length, inputs, whitened]
    header.append(plan.floats)
    words = [word for places in plan.steps for word in (*places, 0)]
    records[:, : len(header)] = torch.tensor(header, dtype=torch.int32)
    records[:, _HEADER : _HEADER + len(words)] = torch.tensor(words, dtype=torch.int32)
    records[:, layout.masks_at :][:, : ansatz.columns] = torch.tensor(schedule(ansatz).masks, dtype=torch.int32)
    if readouts is not None:
        of_z = numbers[:, layout.readouts_at :][:, : 2 * layout.rank].view(slices, 2, layout.rank)
        of_z[..., : readouts.shape[-1]] = readouts
    tables = make_tables(circuits, ansatz).reshape(slices, heads * plan.floats)
    numbers[:, layout.tables_at :][:, : tables.shape[1]] = tables
    return records


def make_tables(theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Signs of the readouts, then what each step needs, of circuits (circuits, rows, n): (circuits, floats)."""
    n, steps = ansatz.qubits, schedule(ansatz)
    angles = theta.detach().to("cpu", torch.float64)
    # The Pauli that stands before the rest of the circuit: X and Z on each qubit; both are a Y.
    has_x = torch.zeros(len(theta), n, dtype=torch.bool)
    has_z = has_x.clone()
    left_out = torch.ones(len(theta), 1, dtype=torch.float64)
    parts: list[torch.Tensor] = []

    def turn_by(row: int) -> None:
        nonlocal has_x, has_z, left_out
        turn = torch.where(has_x ^ has_z, -1, 1) * angles[:, row]
        half_turns = torch.round(turn / math.pi)
        turn = turn - half_turns * math.pi
        has_x = has_x ^ (half_turns % 2 == 1)
        has_z = has_z ^ (half_turns % 2 == 1)
        parts.append(torch.tan(turn / 2).flip(-1))  # the kernel begins with the last bit, the last wire
        left_out = left_out * torch.cos(turn / 2).prod(-1, keepdim=True)

    if steps.first is not None:
        turn_by(steps.first)
    for step, has_phases in zip(steps.steps, rescaled(steps, n), strict=True):
        if has_phases:
            turned = torch.zeros_like(angles[:, 0]) if step.phases is None else angles[:, step.phases]
            parts += _phases(torch.where(has_x, -1, 1) * turned, left_out)
            left_out = torch.ones_like(left_out)
        for control, target in step.cnots.pairs if step.cnots else ():
            has_x[:, target] ^= has_x[:, control]
            has_z[:, control] ^= has_z[:, target]
        if step.turns is not None:
            turn_by(step.turns)
    masks = torch.tensor(steps.masks)
    flips = has_x.long() @ (masks >> torch.arange(n - 1, -1, -1).unsqueeze(-1) & 1)  # (circuits, columns)
    return torch.cat([1 - 2 * (flips % 2), *parts], dim=-1).float()


def _phases(angles: torch.Tensor, factor: torch.Tensor) -> list[torch.Tensor]:
    """RZ on every qubit, (circuits, n): cosines and sines of the bits' high half, times a factor, and low half."""
    parts = []
    half = angles.shape[-1] // 2
    for some, scale in ((angles[:, :half], factor), (angles[:, half:], torch.ones_like(factor))):
        wires = some.shape[-1]
        bits = torch.arange(2**wires).unsqueeze(-1) >> torch.arange(wires - 1, -1, -1) & 1
        total = some @ (bits - 0.5).to(some.dtype).T  # RZ(t) = diag(exp(-i t / 2), exp(i t / 2))
        parts += [torch.cos(total) * scale, torch.sin(total) * scale]
    return parts


def _reach(ring: Cnots, n: int) -> int:
    control, target = ring.pairs[0]
    return (target - control) % n


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def permutations(n: int, device: torch.device) -> torch.Tensor:
    """(n - 1, 2**n) int16: where amplitudes come from behind a CNOT ring of reach 1, 2, ...; zeros for n = 1."""
    rings = [Cnots(tuple((k, (k + reach) % n) for k in range(n))) for reach in range(1, n)]
    tables = [sources(ring, n) for ring in rings] or [torch.zeros(2)]
    return torch.stack(tables).to(torch.int16).to(device)


# ------------------------------------------------------------------------------------------------- launches


class Shape(NamedTuple):
    """How a program is compiled, and what benchmarks/triton_compile.py says of it, for Hopper and two layers.

    Attributes:
        warps: of a program.
        registers: that a thread may have; None for as many as the compiler wants.
        instructions: that a warp runs.
        barriers: among these.
        resident: programs that fit on a multiprocessor.
    """

    warps: int
    registers: int | None
    instructions: int
    barriers: int
    resident: int

    def options(self) -> dict[str, Any]:
        """Triton's options for a launch."""
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": self.registers, "enable_fp_fusion": True}


#: By qubits, that for many programs first: 4 to 32 amplitudes a thread, and less for few programs. More warps
#: exchange more, fewer run out of registers.
_SHAPES = {
    8: (Shape(2, None, 830, 60, 32),),
    9: (Shape(2, None, 1283, 48, 25),),
    10: (Shape(2, None, 2270, 70, 16), Shape(8, None, 903, 72, 6), Shape(4, None, 1419, 60, 10)),
    11: (Shape(4, 80, 2343, 58, 6), Shape(8, None, 1469, 72, 5)),
    12: (Shape(8, 80, 2451, 52, 3), Shape(16, None, 1473, 60, 2)),
    13: (Shape(8, 128, 4656, 78, 2), Shape(16, None, 2627, 106, 1)),
    14: (Shape(16, None, 4873, 66, 1),),
}
_FEWER_QUBITS = (Shape(1, None, 700, 0, 32),)

#: Clock cycles from one instruction of a warp to its next one, and for numbers to pass through shared memory at a
#: barrier. Both are assumptions.
_INSTRUCTION_CYCLES, _BARRIER_CYCLES = 2, 40


def shapes(qubits: int) -> tuple[Shape, ...]:
    """The shapes that launches of so many qubits take."""
    return _SHAPES.get(qubits, _FEWER_QUBITS)


def launch_cycles(shape: Shape, programs: int, multiprocessors: int) -> int:
    """Clock cycles that a launch takes by a model of waves; docs/performance.md explains it.

    Programs run in waves of as many as fit on all multiprocessors, the last one spread evenly. Each of a
    multiprocessor's four schedulers starts one instruction a cycle, of any of its warps. So a wave takes the
    instructions of a scheduler's warps, and not less than one warp takes alone: one instruction after the other,
    and what it waits for at barriers.
    """
    alone = _INSTRUCTION_CYCLES * shape.instructions + _BARRIER_CYCLES * shape.barriers

    def wave(resident: int) -> int:
        return max(-(-resident * shape.warps // 4) * shape.instructions, alone)

    full, rest = divmod(programs, shape.resident * multiprocessors)
    return full * wave(shape.resident) + (wave(-(-rest // multiprocessors)) if rest else 0)


def choose_shape(qubits: int, programs: int, multiprocessors: int) -> Shape:
    """The shape in which a launch of so many programs takes the fewest cycles."""
    return min(shapes(qubits), key=lambda shape: launch_cycles(shape, programs, multiprocessors))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on anything else those of a Hopper, so that tests launch what one would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def tiny(dtype: torch.dtype) -> float:
    """The smallest normal number of the type in which an x of that dtype is scaled."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).tiny


def launch(
    kernel: Any,
    x: torch.Tensor,
    slots: torch.Tensor,
    slots_strides: tuple[int, int],
    records: torch.Tensor,
    record_slice: int,
    layout: Layout,
    z: torch.Tensor,
    shape: Shape | None = None,
) -> None:
    """Run every token on the circuits that its slot has in the layer. One launch, which waits for nothing.

    Args:
        kernel: ``kernel.circuit_kernel``, or what stands for it.
        x: (tokens, width) of any floating dtype, any strides.
        slots: int32, the slot of a token's slice; a number that is not there for none.
        slots_strides: of tokens and slices in it.
        records: (slots, at least layout.words) int32, rows of any stride.
        record_slice: words from one slice's record to the next one's.
        layout: of the records.
        z: (slices, tokens, at least the readouts) float32; only where there are circuits it is written to.
        shape: of the launch; None for the quickest one.
    """
    grid = x.shape[0], z.shape[0]
    shape = shape or choose_shape(layout.qubits, grid[0] * grid[1], multiprocessors(x.device))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[grid](
            x,
            *x.stride(),
            x.shape[1],
            slots,
            *slots_strides,
            records,
            records.shape[0],
            records.stride(0),
            record_slice,
            layout.inputs_at,
            layout.masks_at,
            layout.readouts_at,
            layout.tables_at,
            layout.rank,
            permutations(layout.qubits, x.device),
            z,
            z.stride(1),
            z.stride(0),
            QUBITS=layout.qubits,
            PADDED=layout.padded,
            TINY=tiny(x.dtype),
            **shape.options(),
        )


def compile_kernels(kernel: Any, layout: Layout, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what ``launch`` runs, in every shape, by launching it on no circuit.

    Args:
        kernel: ``kernel.circuit_kernel``, or what stands for it.
        layout: of the records.
        width: of x.
        dtype: of x.
        device: where x will be.
    """
    records = torch.zeros(1, layout.words, dtype=torch.int32, device=device)
    x = torch.zeros(1, width, dtype=dtype, device=device)
    nobody = torch.full((1,), -1, dtype=torch.int32, device=device)
    z = torch.zeros(1, 1, layout.rank, device=device)
    for shape in shapes(layout.qubits):
        launch(kernel, x, nobody, (1, 0), records, layout.record, layout, z, shape)


class TritonCircuits:
    """Circuits one by one; see ``backends.Circuits``. Under vLLM layers launch the kernel on all slots' records.

    Raises:
        ValueError: for more qubits than ``MOST_QUBITS``.
    """

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        check_qubits(ansatz.qubits)
        from qaa_serve.circuits.triton.kernel import circuit_kernel

        self._kernel = circuit_kernel
        self._ansatz = ansatz
        steps = len(schedule(ansatz).steps)
        self._layout = make_layout(ansatz.qubits, 0, 1, ansatz.columns, steps, plan_table(ansatz).floats)
        self._records = torch.zeros(count, self._layout.words, dtype=torch.int32, device=device)

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        records = pack(theta[:, None], self._ansatz, self._layout)
        self._records[first : first + len(theta)] = records.to(self._records.device)

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``."""
        check_width(x, self._ansatz)
        tokens, readouts = index.shape
        z = torch.zeros(readouts, tokens, self._ansatz.columns, device=x.device)
        if index.numel():
            strides = index.stride(0), index.stride(1)
            launch(self._kernel, x, index, strides, self._records, 0, self._layout, z)
        return z.transpose(0, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' records."""
        return self._records.nbytes
