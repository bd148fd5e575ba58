"""The kernel of ``triton_fused``, which says how it works; apart, since importing this needs Triton.

Annotations are not postponed here: Triton reads ``tl.constexpr`` from them.
"""

import triton
import triton.language as tl

#: Kinds of a step. Triton's functions may use a global only if it is such a constant.
RY = tl.constexpr(0)
PHASE = tl.constexpr(1)
SHIFT = tl.constexpr(2)
GATHER = tl.constexpr(3)


@triton.jit
def circuit_kernel(
    x,  # (tokens, width)
    x_token,  # strides of x
    x_element,
    width,
    index,  # (tokens, readouts) int32
    index_token,
    index_readout,
    readouts,
    tables,  # (circuits, FLOATS) float32
    masks,  # (PADDED,) int32: a column's Pauli-Z product as the bits of its wires; zeros behind the columns
    z,  # (tokens, readouts, COLUMNS) float32, contiguous
    QUBITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two above COLUMNS
    FLOATS: tl.constexpr,
    STEPS: tl.constexpr,  # flat, since Triton 3.7 does not take tuples of tuples
    TINY: tl.constexpr,  # the smallest normal number of the type in which x is scaled
    CONSTANT: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Program p runs token p // readouts on the circuit of its readout p % readouts."""
    DIM: tl.constexpr = 2**QUBITS
    HIGH: tl.constexpr = 2 ** (QUBITS // 2)
    LOW: tl.constexpr = DIM // HIGH
    program = tl.program_id(0).to(tl.int64)
    token = program // readouts
    circuit = tl.load(index + token * index_token + program % readouts * index_readout).to(tl.int64)
    column = tl.arange(0, PADDED)
    result = z + program * COLUMNS + column
    if circuit < 0:
        tl.store(result, tl.zeros((PADDED,), tl.float32), mask=column < COLUMNS)
        return
    table = tables + circuit * FLOATS

    # Amplitude embedding, not normalised: the readout divides by the sum of the squares.
    j = tl.arange(0, DIM)
    re = tl.load(x + token * x_token + j * x_element, mask=j < width, other=0.0)
    if re.dtype != tl.float64:
        re = re.to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(re), axis=0), TINY)
    re = (re * (1 / peak)).to(tl.float32)
    if CONSTANT or LENGTH:
        square = tl.sum(re * re, axis=0)
    if CONSTANT:
        re = tl.where(j == width, tl.where(square > 0, tl.sqrt(square), 1.0), re)

    # A step is four numbers: its kind, an offset, whether the state is complex before it, and one more.
    im = re  # nothing looks at it before the first phases
    source = j  # of each amplitude in the next gather
    for i in tl.static_range(0, len(STEPS), 4):
        if STEPS[i] == RY:  # table offset of the tangents; of a factor of the state, 0 for none
            re = _turn(re, table + STEPS[i + 1], QUBITS)
            if STEPS[i + 2]:
                im = _turn(im, table + STEPS[i + 1], QUBITS)
            if STEPS[i + 3]:
                factor = tl.load(table + STEPS[i + 3])
                re *= factor
                if STEPS[i + 2]:
                    im *= factor
        elif STEPS[i] == PHASE:  # table offset of the cosines and sines
            # Those of the low half of the bits, then those of the high half: all their products at once would take
            # many registers.
            high = table + STEPS[i + 1] + tl.arange(0, HIGH)[:, None]
            low = table + STEPS[i + 1] + 2 * HIGH + tl.arange(0, LOW)[None, :]
            re = tl.reshape(re, (HIGH, LOW))
            if STEPS[i + 2]:
                re, im = _multiply(re, tl.reshape(im, (HIGH, LOW)), tl.load(low), tl.load(low + LOW))
            else:
                im = re * tl.load(low + LOW)
                re = re * tl.load(low)
            re, im = _multiply(re, im, tl.load(high), tl.load(high + HIGH))
            re = tl.reshape(re, (DIM,))
            im = tl.reshape(im, (DIM,))
        elif STEPS[i] == SHIFT:  # mask; how far what it leaves is moved, to the left or, negative, to the right
            if STEPS[i + 3] > 0:
                source ^= (source & STEPS[i + 1]) << STEPS[i + 3]
            else:
                source ^= (source & STEPS[i + 1]) >> -STEPS[i + 3]
        else:  # GATHER
            re = tl.gather(re, source, 0)
            if STEPS[i + 2]:
                im = tl.gather(im, source, 0)
            source = j

    squares = re * re
    if STEPS[len(STEPS) - 2]:
        squares += im * im
    expected = tl.gather(_walsh_hadamard(squares, QUBITS), tl.load(masks + column), 0)
    total = tl.sum(tl.where(column == COLUMNS, expected, 0.0), axis=0)  # mask 0: all the squares
    sign = tl.load(table + column, mask=column < COLUMNS, other=0.0)
    expected = expected / tl.where(total > 0, total, 1.0) * sign
    if LENGTH:
        expected *= tl.sqrt(square / width) * peak.to(tl.float32)
    tl.store(result, expected, mask=column < COLUMNS)


@triton.jit
def _turn(v, tangents, QUBITS: tl.constexpr):
    """RY on each qubit, up to a factor. The qubit of the last bit is turned, and that bit becomes the first."""
    for k in tl.static_range(QUBITS):
        tangent = tl.load(tangents + k)
        a, b = tl.split(tl.reshape(v, (2 ** (QUBITS - 1), 2)))
        v = tl.reshape(tl.trans(tl.join(a - tangent * b, tangent * a + b)), (2**QUBITS,))
    return v


@triton.jit
def _walsh_hadamard(v, QUBITS: tl.constexpr):
    """Sums of v[j] (-1)^(number of bits that j and m have in common), for every m; bit by bit as in ``_turn``."""
    for _ in tl.static_range(QUBITS):
        a, b = tl.split(tl.reshape(v, (2 ** (QUBITS - 1), 2)))
        v = tl.reshape(tl.trans(tl.join(a + b, a - b)), (2**QUBITS,))
    return v


@triton.jit
def _multiply(re, im, cos, sin):
    """(re + i im) times (cos + i sin)."""
    return re * cos - im * sin, re * sin + im * cos
