"""Gates and readouts on vectors of sixteen numbers: what ``cpu.forward`` builds its circuits from.

A bit here is one of a vector's number. The four bits of the place within a vector exist only where a vector holds
amplitudes of one state, and have gates of their own.
"""

# numba has no types for mypy, and compiles functions whose arguments have none.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

from numba import njit

from qaa_serve.circuits.cpu.vectors import LANES, Block, Registers, emit

_MOST_BITS = 4  # qubits a pass: 16 amplitudes, half of AVX-512's registers

#: Bits of the place within a vector.
LANE_BITS = 4


# ------------------------------------------------------------------------------------ operations on vectors


def _turn(block: Block, amplitudes: Registers, array: int, turn: Any) -> None:
    """RY on every bit of the number of a register; ``turn`` is where the lowest bit's cosine is in the array."""
    for bit in range(len(amplitudes).bit_length() - 1):
        cos = block.load(array, block.offset(turn, 2 * bit))
        sin = block.load(array, block.offset(turn, 2 * bit + 1))
        for i in range(len(amplitudes)):
            if not i >> bit & 1:
                off, on = amplitudes[i], amplitudes[i | 1 << bit]
                amplitudes[i] = block.minus(block.times(cos, off), block.times(sin, on))
                amplitudes[i | 1 << bit] = block.plus(block.times(sin, off), block.times(cos, on))


def _ry_in_registers(bits: int) -> Any:
    """RY on ``bits`` neighbouring bits of 2**bits vectors, from one state to another or to itself.

    Its integers: the first vector, the distance to the next, the number of the lowest bit's cosine.
    """

    def code(block: Block) -> None:
        first, stride, turn = block.arguments[-3:]
        places = [block.offset(first, i, stride) for i in range(2**bits)]
        amplitudes: Registers = [block.load(0, place) for place in places]
        _turn(block, amplitudes, 2, turn)
        for amplitude, place in zip(amplitudes, places, strict=True):
            block.store(amplitude, 1, place)

    return emit(3, 3, code)


def _ry_with_lanes(block: Block) -> None:
    """RY on the bits of the place within a vector, and on the lowest four of its number.

    Its integers: the first of sixteen vectors, the number of the first cosine.
    """
    first, turn = block.arguments[-2:]
    places = [block.offset(first, i) for i in range(LANES)]
    amplitudes: Registers = [block.load(0, place) for place in places]
    _turn(block, amplitudes, 2, block.offset(turn, 2 * LANE_BITS))
    _transpose(block, amplitudes)
    _turn(block, amplitudes, 2, turn)
    _transpose(block, amplitudes)
    for amplitude, place in zip(amplitudes, places, strict=True):
        block.store(amplitude, 1, place)


def _phase(parts: int, back: bool = False) -> Any:
    """target[j] = source[i] * upper * lower, complex, or their conjugates to go back.

    Its integers: i, j, the two phases' numbers.
    """

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
            a, b, c, d = block.times(re, cos), block.times(im, sin), block.times(re, sin), block.times(im, cos)
            block.store(block.plus(a, b) if back else block.minus(a, b), 2, j)
            block.store(block.minus(d, c) if back else block.plus(c, d), 3, j)

    return emit(parts + 3, 4, code)


def _copy(block: Block) -> None:
    i, j = block.arguments[-2:]
    block.store(block.load(0, i), 1, j)


def _spread(block: Block) -> None:
    i, j = block.arguments[-2:]
    block.store(block.spread(0, i), 1, j)


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


def _turn_overlaps(bits: int) -> Any:
    """As ``_overlaps``: add <lambda, (-i Y) psi> of the qubits, of the real or of the imaginary parts."""

    def code(block: Block) -> None:
        first, stride, z = block.arguments[-3:]
        places = [block.offset(first, i, stride) for i in range(2**bits)]
        lam, psi = ([block.load(array, place) for place in places] for array in range(2))
        for bit in range(bits):
            pairs = [(i, i | 1 << bit) for i in range(2**bits) if not i >> bit & 1]
            gains = block.total([block.times(lam[on], psi[off]) for off, on in pairs])
            losses = block.total([block.times(lam[off], psi[on]) for off, on in pairs])
            place = block.offset(z, bit)
            block.store(block.plus(block.load(2, place), block.minus(gains, losses)), 2, place)

    return emit(3, 3, code)


def _phase_overlap(block: Block) -> None:
    """target[j] = Im(lambda[i] conj(psi[i])); arrays: both parts of lambda, of psi, the target."""
    i, j = block.arguments[-2:]
    lam_re, lam_im, re, im = (block.load(part, i) for part in range(4))
    block.store(block.minus(block.times(lam_im, re), block.times(lam_re, im)), 4, j)


def _double(bits: int) -> Any:
    """What ``_halve`` is to sums, backwards: a number, plus or minus the z of each of the qubits.

    Its integers: as of ``_halve``.
    """

    def code(block: Block) -> None:
        first, source, z = block.arguments[-3:]
        values: Registers = [block.load(0, source)]
        for bit in reversed(range(bits)):
            weight = block.load(1, block.offset(z, bit))
            values = [signed(value, weight) for value in values for signed in (block.plus, block.minus)]
        for i, value in enumerate(values):
            block.store(value, 0, block.offset(first, i))

    return emit(2, 3, code)


def _multiply(block: Block) -> None:
    """target[j] *= source[i]."""
    i, j = block.arguments[-2:]
    block.store(block.times(block.load(0, i), block.load(1, j)), 1, j)


def _add_product(block: Block) -> None:
    """total[j] += a[i] * b[i]."""
    i, j = block.arguments[-2:]
    block.store(block.plus(block.load(2, j), block.times(block.load(0, i), block.load(1, i))), 2, j)


def _add(block: Block) -> None:
    """target[j] += source[i]."""
    i, j = block.arguments[-2:]
    block.store(block.plus(block.load(0, i), block.load(1, j)), 1, j)


def _from_lanes(block: Block) -> None:
    """(a - b * factors[1]) * factors[0] of sixteen vectors, to sixteen numbers of each of sixteen rows.

    Its arrays: a, b, factors, rows. Its integers: the first vector, where the first row goes, a row's length, both
    in vectors.
    """
    first, target, length = block.arguments[-3:]
    one = first.type(1)
    scale, share = block.load(2, first.type(0)), block.load(2, one)
    columns: Registers = []
    for i in range(LANES):
        place = block.offset(first, i)
        rest = block.minus(block.load(0, place), block.times(block.load(1, place), share))
        columns.append(block.times(rest, scale))
    _transpose(block, columns)
    for i, column in enumerate(columns):
        block.store(column, 3, block.offset(target, i, length))


def _sum_and_difference(block: Block) -> None:
    i, j = block.arguments[-2:]
    off, on = block.load(0, i), block.load(0, j)
    block.store(block.plus(off, on), 0, i)
    block.store(block.minus(off, on), 0, j)


def _transpose(block: Block, rows: Registers) -> None:
    """Sixteen vectors as the rows of a matrix, to its columns."""
    step = 1
    while step < LANES:  # swap the blocks off the diagonal, of one number, then of 2 x 2, ...
        low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = block.shuffle(a, b, low), block.shuffle(a, b, high)
        step *= 2


def _to_lanes(block: Block) -> None:
    """Sixteen numbers of each of sixteen rows, to sixteen vectors; each row times its scale.

    Its integers: the first number in vectors, a row's length in vectors, where they go, where the scales are.
    """
    first, length, target, scales = block.arguments[-4:]
    rows: Registers = [block.load(0, block.offset(first, i, length)) for i in range(LANES)]
    _transpose(block, rows)
    scale = block.load(1, scales)
    for i, row in enumerate(rows):
        block.store(block.times(row, scale), 2, block.offset(target, i))


_ry1, _ry2, _ry3, _ry4 = (_ry_in_registers(bits) for bits in (1, 2, 3, 4))
phase_1, phase_2, phase_back = _phase(1), _phase(2), _phase(2, back=True)
probability_1, probability_2 = _probability(1), _probability(2)
_halve1, _halve2, _halve3 = (_halve(bits) for bits in (1, 2, 3))
_overlaps1, _overlaps2, _overlaps3 = (_overlaps(bits) for bits in (1, 2, 3))
_turn_overlaps1, _turn_overlaps2, _turn_overlaps3 = (_turn_overlaps(bits) for bits in (1, 2, 3))
_double1, _double2, _double3 = (_double(bits) for bits in (1, 2, 3))
_ry_lanes = emit(3, 2, _ry_with_lanes)
copy_vector, spread = emit(2, 2, _copy), emit(2, 2, _spread)
butterfly, to_lanes = emit(1, 2, _sum_and_difference), emit(3, 4, _to_lanes)
phase_overlap, from_lanes = emit(5, 2, _phase_overlap), emit(4, 3, _from_lanes)
multiply, add_vector, add_product = emit(2, 2, _multiply), emit(2, 2, _add), emit(3, 2, _add_product)


# ------------------------------------------------------------------------------------ steps of a circuit


@njit(nogil=True)
def rotate(source, target, turns, turn, low, high):
    """RY on the bits from low to below high of a state of 2**high vectors; of one part where it is complex.

    ``turn`` is where the cosine of bit 0 is, or would be, in turns: cosine and sine of half an angle, bit by bit.
    """
    while low < high:
        bits, stride, here = min(high - low, _MOST_BITS), 1 << low, turn + 2 * low
        for outer in range(0, 1 << high, stride << bits):
            for first in range(outer, outer + stride):
                if bits == 4:
                    _ry4(source, target, turns, first, stride, here)
                elif bits == 3:
                    _ry3(source, target, turns, first, stride, here)
                elif bits == 2:
                    _ry2(source, target, turns, first, stride, here)
                else:
                    _ry1(source, target, turns, first, stride, here)
        low += bits
        source = target


@njit(nogil=True)
def rotate_lanes(source, target, turns, turn, high):
    """RY on every qubit of one state of 2**high vectors, sixteen at least; turns begin with the lanes' bits."""
    for first in range(0, 1 << high, LANES):
        _ry_lanes(source, target, turns, first, turn)
    rotate(target, target, turns, turn + 2 * LANE_BITS, LANE_BITS, high)


@njit(nogil=True)
def read_z(p, z, n):
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
def read_x(part, x, n):
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
def read_turns(lam, psi, sums, n):
    """Add <lambda, (-i Y) psi> of the qubit of each bit to sums[bit]; of the real or the imaginary parts."""
    low = 0
    while low < n:
        bits, stride = min(n - low, 3), 1 << low
        for outer in range(0, 1 << n, stride << bits):
            for first in range(outer, outer + stride):
                if bits == 3:
                    _turn_overlaps3(lam, psi, sums, first, stride, low)
                elif bits == 2:
                    _turn_overlaps2(lam, psi, sums, first, stride, low)
                else:
                    _turn_overlaps1(lam, psi, sums, first, stride, low)
        low += bits


@njit(nogil=True)
def weigh_z(z, p, n):
    """p[j] = sum over the bits of z[bit], or of -z[bit] where j has the bit on: the transpose of ``read_z``."""
    p[:LANES] = 0
    bit, size = n, 1
    while bit > 0:
        bits = bit % 3 or 3
        bit -= bits
        for i in range(size - 1, -1, -1):  # from the end: what is read must not be written before
            if bits == 3:
                _double3(p, z, i << 3, i, bit)
            elif bits == 2:
                _double2(p, z, i << 2, i, bit)
            else:
                _double1(p, z, i << 1, i, bit)
        size <<= bits
