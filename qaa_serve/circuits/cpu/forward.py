"""The compiled CPU backend: circuits on vectors of sixteen numbers, in one of two ways.

**A tile** is sixteen pairs of a token and a circuit, one in each lane. Its states are 2**n vectors, amplitude by
amplitude, so that a gate on any qubit is plain arithmetic between whole vectors, whatever circuits the lanes have:
a batch in which every token has an adapter of its own costs what a batch of one adapter costs.

**A few pairs** would leave lanes of a tile empty. From 8 qubits on they run one by one instead, with sixteen
amplitudes of the one state in a vector.

- RY gates act on four qubits at a time in registers, one pass over the state for every four qubits. Within a
  vector they act on the transpose of sixteen vectors, together with the four qubits above: one pass for eight.
- RZ gates of a layer are one phase an amplitude: the product of a phase of its upper and one of its lower qubits.
- A CNOT ring permutes amplitudes; in a tile it is one pass with the phases before it.
- In a tile a closing RY layer is not run: RY(t)^dagger Z RY(t) = cos(t) Z - sin(t) X, so <Z> and <X> are read out
  instead.
- <Z> of all qubits comes from one halving of the probabilities: sums go on, differences are the readout.

The state is real until the first RZ. Everything is float32; angles are halved and their sines taken in float64.
"""

# numba has no types for mypy, and compiles functions whose arguments have none.
# mypy: ignore-errors

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from qaa_serve.circuits.cpu import gates, vectors
from qaa_serve.circuits.cpu.gates import (
    LANE_BITS,
    broadcast,
    butterfly,
    copy_vector,
    phase_1,
    phase_2,
    probability_1,
    probability_2,
    read_x,
    read_z,
    rotate,
    rotate_lanes,
    to_lanes,
)
from qaa_serve.circuits.cpu.vectors import LANES

#: Pairs of a token and a circuit that are run one by one instead of as a tile.
_FEW = 6

#: Qubits that this takes: 2**8 amplitudes are the sixteen vectors of one transpose.
_LEAST_QUBITS = 8

# ------------------------------------------------------------------------------------ a circuit


@njit(nogil=True)
def apply_phases(re, im, is_complex, to_re, to_im, phases, layer, gather, moved, bits, lower):
    """A layer of RZ, and behind it a permutation where there is one, on a state of 2**bits vectors.

    ``phases`` has for every layer the cosine and sine of each number that the upper bits may be, then of each that
    the ``lower`` bits may be.
    """
    upper_phases = 1 << (bits - lower)
    base = layer * (upper_phases + (1 << lower))
    for j in range(1 << bits):
        i = gather[j] if moved else j
        upper, below = 2 * (base + (i >> lower)), 2 * (base + upper_phases + (i & ((1 << lower) - 1)))
        if is_complex:
            phase_2(re, im, to_re, to_im, phases, i, j, upper, below)
        else:
            phase_1(re, to_re, to_im, phases, i, j, upper, below)


@njit(nogil=True)
def permute(re, im, is_complex, to_re, to_im, phases, layer, gather, moved, n):
    """What a step has before its RY: phases, -1 for none, and a permutation. Whether the state is complex then."""
    if layer >= 0:
        apply_phases(re, im, is_complex, to_re, to_im, phases, layer, gather, moved, n, n // 2)
        return True
    for j in range(1 << n):
        copy_vector(re, to_re, gather[j], j)
    if is_complex:
        for j in range(1 << n):
            copy_vector(im, to_im, gather[j], j)
    return is_complex


@njit(nogil=True)
def walsh_hadamard(p, n):
    """For each set of qubits the sum of p with the signs of their Pauli-Z's product, in place."""
    for bit in range(n):
        for outer in range(0, 1 << n, 2 << bit):
            for i in range(outer, outer + (1 << bit)):
                butterfly(p, i, i + (1 << bit))


@njit(nogil=True)
def _run_tile(embedded, turns, phases, form, workspace, z):
    """Sixteen circuits on sixteen embedded states.

    Args:
        embedded: (2**n vectors,) real amplitudes; left as they are.
        turns: (RY layers, n, 2) vectors, cosine and sine of half angles, by bit.
        phases: (RZ layers, 2**upper + 2**lower, 2) vectors, cosine and sine.
        form: ``host.Form``.
        workspace: five times 2**n vectors, and 2 n for readouts.
        z: (columns,) vectors, written.
    """
    rz, gathers, moves, ry, reads_x, _, _, masks, n = form
    a, b, c, d, p, sums = workspace
    steps, source, is_complex = len(ry), embedded, False
    for step in range(steps):
        if moves[step] or (step == 0 and rz[step] >= 0):
            is_complex = permute(source, b, is_complex, c, d, phases, rz[step], gathers[step], moves[step], n)
            source, a, b, c, d = c, c, d, a, b
        elif rz[step] >= 0:
            apply_phases(a, b, is_complex, a, b, phases, rz[step], gathers[step], False, n, n // 2)
            is_complex = True
        if ry[step] >= 0 and not (reads_x and step == steps - 1):
            rotate(source, a, turns, ry[step] * n, 0, n)
            if is_complex:
                rotate(b, b, turns, ry[step] * n, 0, n)
            source = a
    gather = gathers[steps]
    for j in range(1 << n):
        if is_complex:
            probability_2(source, b, p, gather[j], j)
        else:
            probability_1(source, p, gather[j], j)
    if len(masks) > n:  # products of Pauli-Z: a Walsh-Hadamard transform holds all of them
        walsh_hadamard(p, n)
        for column in range(len(masks)):
            copy_vector(p, z, masks[column], column)
        return
    sums[:] = 0
    read_z(p, sums, n)
    if reads_x:
        x = sums[n * LANES :]
        read_x(source, source, x, 0, 0, n)
        if is_complex:
            read_x(b, b, x, 0, 0, n)
        row = ry[steps - 1] * n
        for bit in range(n):  # the angle is twice the half angle
            for lane in range(LANES):
                cos = turns[(2 * (row + bit)) * LANES + lane]
                sin = turns[(2 * (row + bit) + 1) * LANES + lane]
                sums[bit * LANES + lane] = (cos * cos - sin * sin) * sums[bit * LANES + lane] - 4 * cos * sin * x[
                    bit * LANES + lane
                ]
    for column in range(len(masks)):
        bit = n - 1 - column
        z[column * LANES : (column + 1) * LANES] = sums[bit * LANES : (bit + 1) * LANES]


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _total(vector):
    """The sum of a vector's lanes."""
    total = np.float32(0)
    for lane in range(LANES):
        total += vector[lane]
    return total


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _difference(vector, bit):
    """The sum of the lanes whose number has a bit off, less those that have it on."""
    total = np.float32(0)
    for lane in range(LANES):
        total += -vector[lane] if lane >> bit & 1 else vector[lane]
    return total


@njit(nogil=True)
def _permute_numbers(source, target, gather):
    """target[j] = source[gather[j]]."""
    for j in range(len(gather)):
        target[j] = source[np.uint32(gather[j])]  # numba looks whether a signed number counts from the end


@njit(nogil=True)
def _run_one(embedded, turns, phases, form, workspace, z):
    """One circuit on one embedded state.

    Arguments as of ``_run_tile``, but a state and ``z`` are numbers instead of vectors. A vector of ``turns`` is
    one number sixteen times. ``phases`` has (RZ layers, 2**upper + 2**lower / 16, 2) vectors: those of the upper
    bits are such too, those of the lower bits are of sixteen neighbours.
    """
    rz, gathers, moves, ry, _, _, _, masks, n = form
    size, vectors, lower = 1 << n, n - LANE_BITS, n // 2 - LANE_BITS
    a, b, c, d, p, sums = workspace
    source, is_complex = embedded, False
    for step in range(len(ry)):
        gather = gathers[step]
        if rz[step] >= 0:
            apply_phases(source, b, is_complex, c, d, phases, rz[step], gather, False, vectors, lower)
            is_complex = True
            source, a, b, c, d = c, c, d, a, b
        if moves[step]:
            _permute_numbers(source, c, gather)
            if is_complex:
                _permute_numbers(b, d, gather)
            source, a, b, c, d = c, c, d, a, b
        if ry[step] >= 0:
            rotate_lanes(source, a, turns, ry[step] * n, vectors)
            if is_complex:
                rotate_lanes(b, b, turns, ry[step] * n, vectors)
            source = a
    for j in range(1 << vectors):
        if is_complex:
            probability_2(source, b, p, j, j)
        else:
            probability_1(source, p, j, j)
    if moves[len(ry)]:
        _permute_numbers(p, c, gathers[len(ry)])
        p = c
    if len(masks) > n:
        for bit in range(n):
            for outer in range(0, size, 2 << bit):
                for i in range(outer, outer + (1 << bit)):
                    p[i], p[i + (1 << bit)] = p[i] + p[i + (1 << bit)], p[i] - p[i + (1 << bit)]
        for column in range(len(masks)):
            z[column] = p[masks[column]]
        return
    sums[:] = 0
    read_z(p, sums, vectors)  # leaves in p the sums over the vectors
    for column in range(len(masks)):
        bit = n - 1 - column
        z[column] = _total(sums[(bit - LANE_BITS) * LANES :]) if bit >= LANE_BITS else _difference(p, bit)


# ------------------------------------------------------------------------------------ batches of tokens


def _read_row(source, row):
    """row[i] = source[i], of float32, or of bfloat16 as uint16: the upper halves of float32."""


@overload(_read_row)
def _(source, row):
    if source.dtype == types.uint16:
        return lambda source, row: _widen(source, row)
    return lambda source, row: _copy(source, row)


@njit(nogil=True)
def _copy(source, row):
    for i in range(len(source)):
        row[i] = source[i]


@njit(nogil=True)
def _widen(source, row):
    bits = row.view(np.uint32)
    for i in range(len(source)):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@njit(nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _squares(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@njit(nogil=True)
def _read_token(source, row, constant):
    """A token to ``row``: what its amplitudes are multiplied by, and ||x|| / sqrt(width)."""
    width = len(source)
    _read_row(source, row)
    squares, unit = _squares(row), np.float32(1)
    if not 1e-30 < squares < 1e30:  # they overflow or vanish, or all are 0: over the largest
        unit = np.max(np.abs(row))
        if unit == 0:
            return 0.0, 0.0
        row /= unit
        squares = np.sum(row * row)
    norm = math.sqrt(squares)
    return (math.sqrt(0.5) if constant else 1.0) / norm, norm / math.sqrt(width) * unit


@njit(nogil=True)
def embed(x, tokens, constant, rows, scales, lengths, embedded):
    """The tokens of a tile as amplitudes, a token a lane; a lane without a token (-1) gets zeros.

    ``rows``, (16, a multiple of 16), is space, zero behind x; ``lengths`` gets ||x|| / sqrt(width).
    """
    width, padded = x.shape[1], rows.shape[1]
    for lane in range(LANES):
        scales[lane] = lengths[lane] = 0
        if tokens[lane] < 0:
            rows[lane] = 0
        else:
            scales[lane], lengths[lane] = _read_token(x[tokens[lane]], rows[lane][:width], constant)
    flat = rows.reshape(-1)
    for block in range(padded // LANES):
        to_lanes(flat, scales, embedded, block, padded // LANES, block * LANES, 0)
    if constant:
        for lane in range(LANES):
            embedded[width * LANES + lane] = math.sqrt(0.5) if scales[lane] > 0 else 1.0


@njit(nogil=True)
def _embed_one(source, constant, embedded):
    """A token as the amplitudes of one state, zeros behind it: ||x|| / sqrt(width)."""
    width = len(source)
    scale, length = _read_token(source, embedded[:width], constant)
    for i in range(width):
        embedded[i] *= np.float32(scale)
    if constant:
        embedded[width] = math.sqrt(0.5) if scale > 0 else 1.0
    return length


@njit(nogil=True)
def gather_tables(table, circuits, lanes):
    """Each lane's row of a table, (circuits, numbers), as vectors; zeros for circuit -1."""
    first = circuits[0]
    if np.all(circuits == first):
        row = table[first]
        for i in range(len(row)):
            broadcast(row, lanes, i, i)
        return
    for lane in range(LANES):
        circuit = circuits[lane]
        for i in range(table.shape[1]):
            lanes[i * LANES + lane] = table[circuit, i] if circuit >= 0 else 0


@njit(nogil=True)
def _broadcast_tables(turns, phases, n, lane_turns, lane_phases):
    """A circuit's rows of the tables as the vectors that ``_run_one`` reads."""
    for i in range(len(turns)):
        broadcast(turns, lane_turns, i, i)
    uppers, lowers = 1 << (n - n // 2), 1 << (n // 2)
    vector = 0
    for first in range(0, len(phases), 2 * (uppers + lowers)):
        for i in range(first, first + 2 * uppers):
            broadcast(phases, lane_phases, i, vector)
            vector += 1
        for block in range(first + 2 * uppers, first + 2 * (uppers + lowers), 2 * LANES):
            for i in range(2):  # cosines, sines
                for lane in range(LANES):
                    lane_phases[vector * LANES + lane] = phases[block + 2 * lane + i]
                vector += 1


@njit(nogil=True)
def _run_batch(x, rows_of_x, index, circuits, form, workspace, z):
    """The circuits of a batch, token t being row rows_of_x[t] of x."""
    turns_of, phases_of = circuits
    constant, length, n = form[5], form[6], form[8]
    rows, scales, lengths, embedded, state, states, lane_turns, lane_phases, lane_z = workspace
    count, readouts = index.shape
    tokens, parts, wanted = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    places = np.empty(LANES, np.int64)
    had, had_circuits, had_one = np.full(LANES, -2, np.int64), np.full(LANES, -2, np.int64), -1
    few, length_of_one = _FEW if n >= _LEAST_QUBITS else 0, 0.0
    # Whole tiles hold sixteen tokens for one readout; what is left over, tokens with all their readouts.
    whole = count // LANES
    rest = (count % LANES) * readouts
    for tile in range(whole * readouts + (rest + LANES - 1) // LANES):
        for lane in range(LANES):
            if tile < whole * readouts:
                token, part = tile // readouts * LANES + lane, tile % readouts
            else:
                entry = (tile - whole * readouts) * LANES + lane
                token, part = whole * LANES + entry // readouts, entry % readouts
            inside = token < count
            tokens[lane], parts[lane] = token if inside else -1, part
            places[lane] = rows_of_x[token] if inside else -1
            wanted[lane] = index[token, part] if inside else -1
        as_tile = np.sum(wanted >= 0) > few
        if as_tile:
            if not np.all(places == had):
                embed(x, places, constant, rows, scales, lengths, embedded)
                had[:] = places
            if not np.all(wanted == had_circuits):
                gather_tables(turns_of, wanted, lane_turns)
                gather_tables(phases_of, wanted, lane_phases)
                had_circuits[:] = wanted
            _run_tile(embedded, lane_turns, lane_phases, form, states, lane_z)
        for lane in range(LANES):
            if tokens[lane] < 0:
                continue
            row = z[tokens[lane], parts[lane]]
            if wanted[lane] < 0:
                row[:] = 0
            elif as_tile:
                for column in range(len(row)):
                    row[column] = lane_z[column * LANES + lane]
                if length:
                    row *= lengths[lane]
            else:
                if places[lane] != had_one:
                    had_one = places[lane]
                    length_of_one = _embed_one(x[had_one], constant, state)
                _broadcast_tables(turns_of[wanted[lane]], phases_of[wanted[lane]], n, lane_turns, lane_phases)
                had_circuits[:] = -2  # they were in the same arrays
                _run_one(state, lane_turns, lane_phases, form, states, row)
                if length:
                    row *= np.float32(length_of_one)


@njit(nogil=True)
def _standardise(values, offsets, scales):
    """values <- (values - offsets) * scales."""
    for i in range(len(values)):
        values[i] = (values[i] - offsets[i]) * scales[i]


@njit(nogil=True, fastmath={"contract"})
def _add_row(z, weights, ends, total):
    """total += B z for each slice of a packed layer: z (slices, rank), weights (rank, d_out), ends of slices."""
    begin = 0
    for part in range(len(ends)):
        end = ends[part]
        here = total[begin:end]
        k = 0 if np.any(z[part] != 0) else z.shape[1]  # without circuits nothing is added, not even to -0.0
        while k + 3 < z.shape[1]:  # four at a time: the sums are read and written less often
            a, b, c, d = z[part, k], z[part, k + 1], z[part, k + 2], z[part, k + 3]
            w, x = weights[k][begin:end], weights[k + 1][begin:end]
            u, v = weights[k + 2][begin:end], weights[k + 3][begin:end]
            for i in range(len(here)):  # from 0, or LLVM does not make vectors of it
                here[i] += (a * w[i] + b * x[i]) + (c * u[i] + d * v[i])
            k += 4
        while k < z.shape[1]:
            a, w = z[part, k], weights[k][begin:end]
            for i in range(len(here)):
                here[i] += a * w[i]
            k += 1
        begin = end


@njit(nogil=True)
def _add_to_float32(z, weights, ends, total, row):
    _add_row(z, weights, ends, row)


@njit(nogil=True)
def _add_to_bfloat16(z, weights, ends, total, row):
    bits = total.view(np.uint32)
    for i in range(len(row)):
        bits[i] = np.uint32(row[i]) << np.uint32(16)
    _add_row(z, weights, ends, total)
    for i in range(len(row)):  # to the nearest, ties to even; a NaN must not be rounded to something else
        rounded = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        row[i] = np.uint16(0x7FC0) if total[i] != total[i] else np.uint16(rounded)


def _add_to(z, weights, ends, total, row):
    """row += B z; ``total`` is float32 space of its length."""


@overload(_add_to)
def _(z, weights, ends, total, row):
    if row.dtype == types.uint16:
        return lambda z, weights, ends, total, row: _add_to_bfloat16(z, weights, ends, total, row)
    return lambda z, weights, ends, total, row: _add_to_float32(z, weights, ends, total, row)


def keep_compiled(function: Callable[..., Any]) -> Any:
    """Have a function compiled, once for this machine if there is a directory that may be written to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is none: at every start
        return njit(nogil=True)(function)


def _entry_points(source: str) -> Any:
    """The functions that Python calls.

    numba keeps what it compiled beside this file, by this file's date and by what a function closes over: here
    the text of the other files that the code is made from.
    """

    def run(x, rows_of_x, index, circuits, form, workspace, z):
        len(source)
        _run_batch(x, rows_of_x, index, circuits, form, workspace, z)

    def run_and_add(x, rows, slots, table, circuits, form, inputs, readouts, weights, ends, workspace, output):
        len(source)
        count, on_part = len(rows), table.shape[1]
        index, taken = np.empty((count, on_part), np.int32), np.empty((count, x.shape[1]), np.float32)
        for token in range(count):
            slot = slots[token]
            index[token] = table[slot]
            _read_row(x[rows[token]], taken[token])
            if len(inputs) > 0:
                _standardise(taken[token], inputs[slot, 0], inputs[slot, 1])
        z = np.empty((count, len(ends), weights.shape[1]), np.float32)
        _run_batch(taken, np.arange(count), index, circuits, form, workspace, z.reshape(count, on_part, -1))
        total = np.empty(output.shape[1], np.float32)
        for token in range(count):
            slot = slots[token]
            if len(readouts) > 0:
                _standardise(z[token].reshape(-1), readouts[slot, 0].reshape(-1), readouts[slot, 1].reshape(-1))
            _add_to(z[token], weights[slot], ends, total, output[rows[token]])

    return keep_compiled(run), keep_compiled(run_and_add)


run, run_and_add = _entry_points(inspect.getsource(vectors) + inspect.getsource(gates))
