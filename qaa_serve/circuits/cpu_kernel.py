"""The compiled CPU backend: sixteen circuits at a time, one in each lane of a vector.

A tile is sixteen pairs of a token and a circuit. Its states are 2**n vectors, amplitude by amplitude, so that a
gate on any qubit is plain arithmetic between whole vectors, whatever circuits the lanes have: a batch in which
every token has an adapter of its own costs what a batch of one adapter costs.

- RY gates act on four qubits at a time in registers: one pass over the state for every four qubits.
- RZ gates of a layer are one phase an amplitude: the product of a phase of its upper and one of its lower qubits.
- A CNOT ring permutes amplitudes; with the phases before it, it is one pass.
- A closing RY layer is not run: RY(t)^dagger Z RY(t) = cos(t) Z - sin(t) X, so <Z> and <X> are read out instead.
- <Z> of all qubits comes from one halving of the probabilities: sums go on, differences are the readout.

The state is real until the first RZ. Everything is float32; angles are halved and their sines taken in float64.
"""

# numba has no types for mypy, and compiles functions whose arguments have none.
# mypy: ignore-errors

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from qaa_serve.circuits import cpu_simd
from qaa_serve.circuits.cpu_simd import LANES, Block, Registers, emit

_MOST_BITS = 4  # qubits a pass: 16 amplitudes, half of AVX-512's registers


# ------------------------------------------------------------------------------------ operations on vectors


def _ry_in_registers(bits: int) -> Any:
    """RY on ``bits`` neighbouring qubits of 2**bits amplitudes, from one state to another or to itself.

    Its integers: the first amplitude, the distance to the next, the number of the lowest qubit's angle.
    """

    def code(block: Block) -> None:
        first, stride, turn = block.arguments[-3:]
        places = [block.offset(first, i, stride) for i in range(2**bits)]
        amplitudes: Registers = [block.load(0, place) for place in places]
        for bit in range(bits):
            cos = block.load(2, block.offset(turn, 2 * bit))
            sin = block.load(2, block.offset(turn, 2 * bit + 1))
            for i in range(2**bits):
                if not i >> bit & 1:
                    off, on = amplitudes[i], amplitudes[i | 1 << bit]
                    amplitudes[i] = block.minus(block.times(cos, off), block.times(sin, on))
                    amplitudes[i | 1 << bit] = block.plus(block.times(sin, off), block.times(cos, on))
        for amplitude, place in zip(amplitudes, places, strict=True):
            block.store(amplitude, 1, place)

    return emit(3, 3, code)


def _phase(parts: int) -> Any:
    """target[j] = source[i] * upper * lower, complex; its integers: i, j, the two phases' numbers."""

    def code(block: Block) -> None:
        i, j, upper, lower = block.arguments[-4:]
        phases = parts + 2
        a, b = block.load(phases, upper), block.load(phases, block.offset(upper, 1))
        c, d = block.load(phases, lower), block.load(phases, block.offset(lower, 1))
        cos = block.minus(block.times(a, c), block.times(b, d))
        sin = block.plus(block.times(a, d), block.times(b, c))
        re = block.load(0, i)
        if parts == 1:
            block.store(block.times(re, cos), 1, j)
            block.store(block.times(re, sin), 2, j)
        else:
            im = block.load(1, i)
            block.store(block.minus(block.times(re, cos), block.times(im, sin)), 2, j)
            block.store(block.plus(block.times(re, sin), block.times(im, cos)), 3, j)

    return emit(parts + 3, 4, code)


def _copy(block: Block) -> None:
    i, j = block.arguments[-2:]
    block.store(block.load(0, i), 1, j)


def _probability(parts: int) -> Any:
    """target[j] = |source[i]|**2; its integers: i, j."""

    def code(block: Block) -> None:
        i, j = block.arguments[-2:]
        squares = [block.times(a, a) for a in (block.load(part, i) for part in range(parts))]
        block.store(squares[0] if parts == 1 else block.plus(*squares), parts, j)

    return emit(parts + 1, 2, code)


def _halve(bits: int) -> Any:
    """Sum 2**bits probabilities, and add their differences over each of the qubits to z.

    Its integers: the first probability, where the sum goes, the number of the lowest qubit's z.
    """

    def code(block: Block) -> None:
        first, target, z = block.arguments[-3:]
        values: Registers = [block.load(0, block.offset(first, i)) for i in range(2**bits)]
        for bit in range(bits):
            pairs = list(zip(values[::2], values[1::2], strict=True))
            values = [block.plus(off, on) for off, on in pairs]
            difference = block.total([block.minus(off, on) for off, on in pairs])
            place = block.offset(z, bit)
            block.store(block.plus(block.load(1, place), difference), 1, place)
        block.store(values[0], 0, target)

    return emit(2, 3, code)


def _overlaps(bits: int) -> Any:
    """Add <X> / 2 of ``bits`` neighbouring qubits over 2**bits amplitudes; integers as for RY, the last z's."""

    def code(block: Block) -> None:
        first, stride, z = block.arguments[-3:]
        amplitudes: Registers = [block.load(0, block.offset(first, i, stride)) for i in range(2**bits)]
        for bit in range(bits):
            overlap = block.total(
                [block.times(amplitudes[i], amplitudes[i | 1 << bit]) for i in range(2**bits) if not i >> bit & 1]
            )
            place = block.offset(z, bit)
            block.store(block.plus(block.load(1, place), overlap), 1, place)

    return emit(2, 3, code)


def _sum_and_difference(block: Block) -> None:
    i, j = block.arguments[-2:]
    off, on = block.load(0, i), block.load(0, j)
    block.store(block.plus(off, on), 0, i)
    block.store(block.minus(off, on), 0, j)


def _transpose(block: Block) -> None:
    """Sixteen numbers of each of sixteen rows, to sixteen vectors; each row times its scale.

    Its integers: the first number in vectors, a row's length in vectors, where they go, where the scales are.
    """
    first, length, target, scales = block.arguments[-4:]
    rows: Registers = [block.load(0, block.offset(first, i, length)) for i in range(LANES)]
    step = 1
    while step < LANES:  # swap the blocks off the diagonal, of one number, then of 2 x 2, ...
        low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = block.shuffle(a, b, low), block.shuffle(a, b, high)
        step *= 2
    scale = block.load(1, scales)
    for i, row in enumerate(rows):
        block.store(block.times(row, scale), 2, block.offset(target, i))


_ry1, _ry2, _ry3, _ry4 = (_ry_in_registers(bits) for bits in (1, 2, 3, 4))
_phase_1, _phase_2 = _phase(1), _phase(2)
_probability_1, _probability_2 = _probability(1), _probability(2)
_halve1, _halve2, _halve3 = (_halve(bits) for bits in (1, 2, 3))
_overlaps1, _overlaps2, _overlaps3 = (_overlaps(bits) for bits in (1, 2, 3))
_copy_vector, _butterfly, _transpose_16 = (
    emit(2, 2, _copy),
    emit(1, 2, _sum_and_difference),
    emit(3, 4, _transpose),
)


# ------------------------------------------------------------------------------------ the circuit of a tile


@njit(nogil=True)
def _rotate(source, target, turns, row, n):
    """A layer of RY on a real state, or on the real or the imaginary part of a complex one."""
    low = 0
    while low < n:
        bits, stride, turn = min(n - low, _MOST_BITS), 1 << low, 2 * (row * n + low)
        for outer in range(0, 1 << n, stride << bits):
            for first in range(outer, outer + stride):
                if bits == 4:
                    _ry4(source, target, turns, first, stride, turn)
                elif bits == 3:
                    _ry3(source, target, turns, first, stride, turn)
                elif bits == 2:
                    _ry2(source, target, turns, first, stride, turn)
                else:
                    _ry1(source, target, turns, first, stride, turn)
        low += bits
        source = target


@njit(nogil=True)
def _read_z(p, z, n):
    """Add <Z> of the qubit of each bit to z[bit]; p is used up."""
    bit, size = 0, 1 << n
    while bit < n:
        bits = min(n - bit, 3)
        size >>= bits
        for i in range(size):
            if bits == 3:
                _halve3(p, z, i << 3, i, bit)
            elif bits == 2:
                _halve2(p, z, i << 2, i, bit)
            else:
                _halve1(p, z, i << 1, i, bit)
        bit += bits


@njit(nogil=True)
def _read_x(part, x, n):
    """Add what the real or the imaginary part gives to <X> / 2 of the qubit of each bit to x[bit]."""
    low = 0
    while low < n:
        bits, stride = min(n - low, 3), 1 << low
        for outer in range(0, 1 << n, stride << bits):
            for first in range(outer, outer + stride):
                if bits == 3:
                    _overlaps3(part, x, first, stride, low)
                elif bits == 2:
                    _overlaps2(part, x, first, stride, low)
                else:
                    _overlaps1(part, x, first, stride, low)
        low += bits


@njit(nogil=True)
def _run_tile(embedded, turns, phases, before, gathers, moves, after, closing, masks, n, spaces, z):
    """Sixteen circuits on sixteen embedded states.

    Args:
        embedded: (2**n vectors,) real amplitudes; left as they are.
        turns: (RY layers, n, 2) vectors, cosine and sine of half angles, by bit.
        phases: (RZ layers, 2**upper + 2**lower, 2) vectors, cosine and sine.
        before, after: (stretches + 1,) the RZ layer before and after the permutation, -1 for none.
        gathers: (stretches + 1, 2**n) the permutations; the last one is the readout's.
        moves: (stretches + 1,) whether there is one.
        closing: whether the last RY layer is read out instead of run.
        masks: (columns,) bits of each readout.
        n: qubits.
        spaces: five times 2**n vectors, and 2 n for readouts.
        z: (columns,) vectors, written.
    """
    size, lower = 1 << n, n // 2
    table = (1 << lower) + (1 << (n - lower))
    a, b, c, d, p, sums = spaces
    stretches = len(moves) - 1
    source, is_complex = embedded, False
    for stretch in range(stretches):
        if before[stretch] >= 0:
            base = before[stretch] * table
            gather = gathers[stretch]
            for j in range(size):
                i = gather[j]
                upper_phase = 2 * (base + (i >> lower))
                lower_phase = 2 * (base + (1 << (n - lower)) + (i & ((1 << lower) - 1)))
                if is_complex:
                    _phase_2(source, b, c, d, phases, i, j, upper_phase, lower_phase)
                else:
                    _phase_1(source, c, d, phases, i, j, upper_phase, lower_phase)
            is_complex = True
            source, a, b, c, d = c, c, d, a, b
        elif moves[stretch]:
            gather = gathers[stretch]
            for j in range(size):
                _copy_vector(source, c, gather[j], j)
            if is_complex:
                for j in range(size):
                    _copy_vector(b, d, gather[j], j)
            source, a, b, c, d = c, c, d, a, b
        if after[stretch] >= 0:
            base = after[stretch] * table
            for j in range(size):
                upper_phase = 2 * (base + (j >> lower))
                lower_phase = 2 * (base + (1 << (n - lower)) + (j & ((1 << lower) - 1)))
                if is_complex:
                    _phase_2(source, b, c, d, phases, j, j, upper_phase, lower_phase)
                else:
                    _phase_1(source, c, d, phases, j, j, upper_phase, lower_phase)
            is_complex = True
            source, a, b, c, d = c, c, d, a, b
        if closing and stretch == stretches - 1:
            break
        _rotate(source, a, turns, stretch, n)
        if is_complex:
            _rotate(b, b, turns, stretch, n)
        source = a
    gather = gathers[stretches]
    for j in range(size):
        if is_complex:
            _probability_2(source, b, p, gather[j], j)
        else:
            _probability_1(source, p, gather[j], j)
    if len(masks) > n:  # products of Pauli-Z: a Walsh-Hadamard transform holds all of them
        for bit in range(n):
            for outer in range(0, size, 2 << bit):
                for i in range(outer, outer + (1 << bit)):
                    _butterfly(p, i, i + (1 << bit))
        for column in range(len(masks)):
            _copy_vector(p, z, masks[column], column)
        return
    sums[:] = 0
    _read_z(p, sums, n)
    if closing:
        x = sums[n * LANES :]
        _read_x(source, x, n)
        if is_complex:
            _read_x(b, x, n)
        row = (stretches - 1) * n
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


# ------------------------------------------------------------------------------------ batches of tokens


@njit(nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _copy_and_square(source, row):
    """row[i] = source[i]; the sum of their squares."""
    total = np.float32(0)
    for i in range(len(source)):
        row[i] = source[i]
        total += row[i] * row[i]
    return total


@njit(nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _widen_and_square(source, row):
    """As _copy_and_square, of bfloat16: the upper halves of float32."""
    total, bits = np.float32(0), row.view(np.uint32)
    for i in range(len(source)):
        bits[i] = np.uint32(source[i]) << np.uint32(16)
    for i in range(len(source)):
        total += row[i] * row[i]
    return total


def _read_row(source, row):
    """Choose by the type of source: float32, or bfloat16 as uint16."""


@overload(_read_row)
def _(source, row):
    if source.dtype == types.uint16:
        return lambda source, row: _widen_and_square(source, row)
    return lambda source, row: _copy_and_square(source, row)


@njit(nogil=True)
def _embed(x, tokens, constant, rows, scales, lengths, embedded):
    """The tokens of a tile as amplitudes, a token a lane; a lane without a token (-1) gets zeros.

    ``rows``, (16, a multiple of 16), is space, zero behind x; ``lengths`` gets ||x|| / sqrt(width).
    """
    width, padded = x.shape[1], rows.shape[1]
    for lane in range(LANES):
        scales[lane] = lengths[lane] = 0
        row = rows[lane]
        if tokens[lane] < 0:
            row[:] = 0
            continue
        squares, unit = _read_row(x[tokens[lane]], row), np.float32(1)
        if not 1e-30 < squares < 1e30:  # they overflow or vanish, or all are 0: over the largest
            unit = np.max(np.abs(row))
            if unit == 0:
                continue
            row /= unit
            squares = np.sum(row * row)
        norm = math.sqrt(squares)
        scales[lane] = (math.sqrt(0.5) if constant else 1.0) / norm
        lengths[lane] = norm / math.sqrt(width) * unit
    flat = rows.reshape(-1)
    for block in range(padded // LANES):
        _transpose_16(flat, scales, embedded, block, padded // LANES, block * LANES, 0)
    if constant:
        for lane in range(LANES):
            embedded[width * LANES + lane] = math.sqrt(0.5) if scales[lane] > 0 else 1.0


@njit(nogil=True)
def _spread(table, circuits, lanes):
    """Each lane's row of a table, (circuits, numbers), as vectors; zeros for circuit -1."""
    first = circuits[0]
    if np.all(circuits == first):
        for i in range(table.shape[1]):
            lanes[i * LANES : (i + 1) * LANES] = table[first, i] if first >= 0 else 0
        return
    for lane in range(LANES):
        circuit = circuits[lane]
        for i in range(table.shape[1]):
            lanes[i * LANES + lane] = table[circuit, i] if circuit >= 0 else 0


@njit(nogil=True)
def _run_batch(x, rows_of_x, index, circuits, form, space, begin, end, z):
    """The circuits of the tokens from begin to end, token t being row rows_of_x[t] of x."""
    turns_of, phases_of = circuits
    before, after, gathers, moves, closing, constant, length, masks, n = form
    rows, scales, lengths, embedded, spaces, lane_turns, lane_phases, lane_z = space
    readouts, columns = index.shape[1], len(masks)
    tokens, parts, wanted = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    places = np.empty(LANES, np.int64)
    had, spread = np.full(LANES, -2, np.int64), np.full(LANES, -2, np.int64)
    # Whole tiles hold sixteen tokens for one readout; what is left over, tokens with all their readouts.
    whole = (end - begin) // LANES
    rest = ((end - begin) % LANES) * readouts
    for tile in range(whole * readouts + (rest + LANES - 1) // LANES):
        for lane in range(LANES):
            if tile < whole * readouts:
                token, part = begin + tile // readouts * LANES + lane, tile % readouts
            else:
                entry = (tile - whole * readouts) * LANES + lane
                token, part = begin + whole * LANES + entry // readouts, entry % readouts
            inside = token < end
            tokens[lane], parts[lane] = token if inside else -1, part
            places[lane] = rows_of_x[token] if inside else -1
            wanted[lane] = index[token, part] if inside else -1
        if np.all(wanted < 0):
            for lane in range(LANES):
                if tokens[lane] >= 0:
                    z[tokens[lane], parts[lane]] = 0
            continue
        if not np.all(places == had):
            _embed(x, places, constant, rows, scales, lengths, embedded)
            had[:] = places
        if not np.all(wanted == spread):
            _spread(turns_of, wanted, lane_turns)
            _spread(phases_of, wanted, lane_phases)
            spread[:] = wanted
        _run_tile(
            embedded, lane_turns, lane_phases, before, gathers, moves, after, closing, masks, n, spaces, lane_z
        )
        for lane in range(LANES):
            if tokens[lane] >= 0:
                scale = lengths[lane] if length else np.float32(1)
                for column in range(columns):
                    z[tokens[lane], parts[lane], column] = lane_z[column * LANES + lane] * scale


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


def _entry_points(source: str) -> Any:
    """The functions that Python calls.

    numba keeps what it compiled beside this file, by this file's date and by what a function closes over: here
    the text of the other file that the code is made from.
    """

    def run(x, rows_of_x, index, circuits, form, space, begin, end, z):
        len(source)
        _run_batch(x, rows_of_x, index, circuits, form, space, begin, end, z)

    def run_and_add(
        x, rows, slots, table, circuits, form, space, weights, ends, total, begin, end, index, z, output
    ):
        len(source)
        for token in range(begin, end):
            index[token] = table[slots[token]]
        _run_batch(x, rows, index, circuits, form, space, begin, end, z)
        slices, rank = len(ends), weights.shape[1]
        for token in range(begin, end):
            of_slices = z[token].reshape(slices, rank)
            _add_to(of_slices, weights[slots[token]], ends, total, output[rows[token]])

    try:
        return njit(nogil=True, cache=True)(run), njit(nogil=True, cache=True)(run_and_add)
    except RuntimeError:  # there is no directory that may be written to: compiled anew at every start
        return njit(nogil=True)(run), njit(nogil=True)(run_and_add)


run, run_and_add = _entry_points(inspect.getsource(cpu_simd))
