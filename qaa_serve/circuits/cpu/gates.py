"""Gates and readouts on vectors of sixteen numbers: what ``cpu.forward`` builds its circuits from.

A bit here is one of a vector's number. The four bits of the place within a vector exist only where a vector holds
amplitudes of one state, and have gates of their own. RY gates are counted layer by layer and in a layer by bit: of
gate g the table of turns has the cosine of half its angle in vector 2 g, the sine in 2 g + 1.
"""

# numba has no types for mypy, and compiles functions whose arguments have none.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from qaa_serve.circuits.cpu.vectors import LANES, Block, Registers, emit

#: Bits of the place within a vector.
LANE_BITS = 4


# ------------------------------------------------------------------------------------ operations on vectors


def _pointwise(sources: int, formula: Callable[..., Any]) -> Any:
    """target[j] = formula(block, target[j], source[i], ...).

    Its arrays: the sources, the target. Its integers: i, j.
    """

    def code(block: Block) -> None:
        i, j = block.arguments[-2:]
        old = block.load(sources, j)
        block.store(formula(block, old, *(block.load(source, i) for source in range(sources))), sources, j)

    return emit(sources + 1, 2, code)


def _accumulate(block: Block, value: Any, array: int, place: Any) -> None:
    block.store(block.plus(block.load(array, place), value), array, place)


def _turn(block: Block, amplitudes: Registers, gate: Any) -> None:
    """RY on every bit of the number of a register; ``gate`` is that of the lowest bit, array 2 has the turns."""
    first = block.offset(gate, 1, gate)
    for bit in range(len(amplitudes).bit_length() - 1):
        cos, sin = (block.load(2, block.offset(first, 2 * bit + i)) for i in range(2))
        for i in range(len(amplitudes)):
            if not i >> bit & 1:
                off, on = amplitudes[i], amplitudes[i | 1 << bit]
                amplitudes[i] = block.minus(block.times(cos, off), block.times(sin, on))
                amplitudes[i | 1 << bit] = block.plus(block.times(sin, off), block.times(cos, on))


def _ry(bits: int) -> Any:
    """RY on 2**bits vectors of one state, to another or to itself; arrays and integers as of ``_by_bits``."""

    def code(block: Block) -> None:
        first, stride, gate = block.arguments[-3:]
        places = [block.offset(first, i, stride) for i in range(2**bits)]
        amplitudes: Registers = [block.load(0, place) for place in places]
        _turn(block, amplitudes, gate)
        for amplitude, place in zip(amplitudes, places, strict=True):
            block.store(amplitude, 1, place)

    return emit(3, 3, code)


def _ry_with_lanes(block: Block) -> None:
    """RY on the bits of the place within a vector, and on the lowest four of its number.

    Its integers: the first of sixteen vectors, the number of the first gate.
    """
    first, gate = block.arguments[-2:]
    places = [block.offset(first, i) for i in range(LANES)]
    amplitudes: Registers = [block.load(0, place) for place in places]
    _turn(block, amplitudes, block.offset(gate, LANE_BITS))
    _transpose(block, amplitudes)
    _turn(block, amplitudes, gate)
    _transpose(block, amplitudes)
    for amplitude, place in zip(amplitudes, places, strict=True):
        block.store(amplitude, 1, place)


def _x_overlaps(bits: int) -> Any:
    """Add <X> / 2 of each bit over 2**bits vectors of the first array; arrays and integers as of ``_by_bits``."""

    def code(block: Block) -> None:
        first, stride, number = block.arguments[-3:]
        psi: Registers = [block.load(0, block.offset(first, i, stride)) for i in range(2**bits)]
        for bit in range(bits):
            products = [block.times(psi[i], psi[i | 1 << bit]) for i in range(2**bits) if not i >> bit & 1]
            _accumulate(block, block.total(products), 2, block.offset(number, bit))

    return emit(3, 3, code)


def _y_overlaps(bits: int) -> Any:
    """As ``_x_overlaps``: add <lambda, (-i Y) psi> of each bit, of real or of imaginary parts."""

    def code(block: Block) -> None:
        first, stride, number = block.arguments[-3:]
        places = [block.offset(first, i, stride) for i in range(2**bits)]
        lam, psi = ([block.load(array, place) for place in places] for array in range(2))
        for bit in range(bits):
            pairs = [(i, i | 1 << bit) for i in range(2**bits) if not i >> bit & 1]
            gains = block.total([block.times(lam[on], psi[off]) for off, on in pairs])
            losses = block.total([block.times(lam[off], psi[on]) for off, on in pairs])
            _accumulate(block, block.minus(gains, losses), 2, block.offset(number, bit))

    return emit(3, 3, code)


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


def _broadcast(block: Block) -> None:
    i, j = block.arguments[-2:]
    block.store(block.broadcast(0, i), 1, j)


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
            _accumulate(block, difference, 1, block.offset(z, bit))
        block.store(values[0], 0, target)

    return emit(2, 3, code)


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


def _from_lanes(block: Block) -> None:
    """(a - b * factors[1]) * factors[0] of sixteen vectors, to sixteen numbers of each of sixteen rows.

    Its arrays: a, b, factors, rows. Its integers: the first vector, where the first row goes, a row's length, both
    in vectors.
    """
    first, target, length = block.arguments[-3:]
    one = first.type(1)
    scale, overlap = block.load(2, first.type(0)), block.load(2, one)
    columns: Registers = []
    for i in range(LANES):
        place = block.offset(first, i)
        rest = block.minus(block.load(0, place), block.times(block.load(1, place), overlap))
        columns.append(block.times(rest, scale))
    _transpose(block, columns)
    for i, column in enumerate(columns):
        block.store(column, 3, block.offset(target, i, length))


copy_vector = _pointwise(1, lambda block, old, a: a)
multiply = _pointwise(1, lambda block, old, a: block.times(a, old))
add_vector = _pointwise(1, lambda block, old, a: block.plus(a, old))
add_product = _pointwise(2, lambda block, old, a, b: block.plus(old, block.times(a, b)))
probability_1 = _pointwise(1, lambda block, old, a: block.times(a, a))
probability_2 = _pointwise(2, lambda block, old, re, im: block.plus(block.times(re, re), block.times(im, im)))
#: Im(lambda conj(psi)); arrays: both parts of lambda, of psi, the target.
phase_overlap = _pointwise(
    4, lambda block, old, lam_re, lam_im, re, im: block.minus(block.times(lam_im, re), block.times(lam_re, im))
)
phase_1, phase_2, phase_back = _phase(1), _phase(2), _phase(2, back=True)
_halve1, _halve2, _halve3 = (_halve(bits) for bits in (1, 2, 3))
_double1, _double2, _double3 = (_double(bits) for bits in (1, 2, 3))
_ry_lanes, broadcast = emit(3, 2, _ry_with_lanes), emit(2, 2, _broadcast)
butterfly = emit(1, 2, _sum_and_difference)
to_lanes, from_lanes = emit(3, 4, _to_lanes), emit(4, 3, _from_lanes)


# ------------------------------------------------------------------------------------ steps of a circuit


def _by_bits(name: str, operation: Callable[[int], Any], most: int, moves: bool) -> Any:
    """A function that takes an operation to the bits from low to below high of a state of 2**high vectors.

    Args:
        name: the function's, its own: numba names what it compiles by it and by a count that begins anew in each
            process, so that kernels which two processes compiled would call each other's functions of one name.
        operation: of a number of neighbouring bits makes what acts on 2**bits vectors. Its arrays are the three of
            the function, its integers the first vector, the distance to the next, the lowest bit's number.
        most: bits of one pass over the state.
        moves: whether the first pass leads from the first array to the second, where the others stay.
    """
    op1, op2, op3 = (operation(bits) for bits in (1, 2, 3))
    op4 = operation(4) if most == 4 else op1

    def apply(a, b, c, number, low, high):
        """``number`` is that of bit 0."""
        while low < high:
            bits, stride = min(high - low, most), 1 << low
            for outer in range(0, 1 << high, stride << bits):
                for first in range(outer, outer + stride):
                    if bits == 4:
                        op4(a, b, c, first, stride, number + low)
                    elif bits == 3:
                        op3(a, b, c, first, stride, number + low)
                    elif bits == 2:
                        op2(a, b, c, first, stride, number + low)
                    else:
                        op1(a, b, c, first, stride, number + low)
            low += bits
            if moves:
                a = b

    apply.__qualname__ = name
    return njit(nogil=True)(apply)


#: RY from a state to another, by the turns; of one part where it is complex. 16 amplitudes are half of AVX-512's
#: registers.
rotate = _by_bits("rotate", _ry, 4, moves=True)
#: Add what the real or the imaginary part, the first array, gives to <X> / 2 of each bit.
read_x = _by_bits("read_x", _x_overlaps, 3, moves=False)
#: Add <lambda, (-i Y) psi> of each bit, of the real or of the imaginary parts.
read_y = _by_bits("read_y", _y_overlaps, 3, moves=False)


@njit(nogil=True)
def rotate_lanes(source, target, turns, gate, high):
    """RY on every qubit of one state of 2**high vectors, sixteen at least; the first four gates are the lanes'."""
    for first in range(0, 1 << high, LANES):
        _ry_lanes(source, target, turns, first, gate)
    rotate(target, target, turns, gate + LANE_BITS, LANE_BITS, high)


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
