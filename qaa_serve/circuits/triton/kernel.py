"""The kernel of ``triton.host``, which says how it works; apart, since importing this needs Triton.

Annotations are not postponed here: Triton reads ``tl.constexpr`` from them.
"""

import triton
import triton.language as tl

# Words of a record's header, and those before the steps. Triton's functions may use a global only if it is such
# a constant.
HEADS = tl.constexpr(0)  # 0: nothing is here
COLUMNS = tl.constexpr(1)
STEPS = tl.constexpr(2)
FIRST = tl.constexpr(3)
CONSTANT = tl.constexpr(4)
LENGTH = tl.constexpr(5)
INPUTS = tl.constexpr(6)
WHITENED = tl.constexpr(7)
FLOATS = tl.constexpr(8)
HEADER = tl.constexpr(12)
#: Words of a step: offsets of its phases and its turns in a table, number of its permutation; -1 for none.
STEP = tl.constexpr(4)


# By what differs from launch to launch Triton would compile anew, in a request: for 1, or a multiple of 16.
@triton.jit(do_not_specialize=["slots_token", "slots_slice", "records_count", "z_slice"])
def circuit_kernel(
    x,  # (tokens, width)
    x_token,  # strides of x
    x_element,
    width,
    slots,  # int32: the record of a token's slice; a number that is not there for none
    slots_token,  # strides of slots
    slots_slice,
    records,  # (records_count, ...) int32 words, see host.Layout
    records_count,
    record_slot,  # words from the records of one slot to those of the next
    record_slice,  # and from one slice's record to the next one's
    inputs_at,  # where in a slot's records offsets and scales of x begin
    masks_at,  # where in a record these begin
    readouts_at,
    tables_at,
    rank,  # numbers in each of the two rows at readouts_at
    permutations,  # (rings, 2**n) int16
    z,  # float32, elements side by side
    z_token,  # strides of z
    z_slice,
    QUBITS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two above the columns of any record
    TINY: tl.constexpr,  # the smallest normal number of the type in which x is scaled
):
    """Program (t, s) runs token t on the circuits of its slice s, head by head."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token * slots_token + part * slots_slice).to(tl.int64)
    if (slot < 0) | (slot >= records_count):  # vLLM leaves rows that fill up a batch as they are, or never were
        return
    record = records + slot * record_slot + part * record_slice
    heads = tl.load(record + HEADS)
    if heads == 0:
        return
    columns = tl.load(record + COLUMNS)
    column = tl.arange(0, PADDED)
    for head in tl.range(heads, disable_licm=True):  # what it would keep ready takes too many registers
        table = floats(record + tables_at + head * tl.load(record + FLOATS))

        by = floats(records + slot * record_slot + inputs_at)
        re, square, peak = embed(x + token * x_token, x_element, width, record, by, QUBITS, TINY)
        re, im = apply_steps(re, record, table, permutations, QUBITS)

        expected = walsh_hadamard(re * re + im * im, QUBITS)
        mask = tl.load(record + masks_at + column)
        expected = tl.gather(expected, mask, 0)
        total = tl.sum(tl.where(column == PADDED - 1, expected, 0.0), axis=0)  # mask 0: all the squares
        sign = tl.load(table + column, mask=column < columns, other=0.0)
        expected = expected / tl.where(total > 0, total, 1.0) * sign
        if tl.load(record + LENGTH) != 0:
            expected *= tl.sqrt(square / width) * peak
        if tl.load(record + WHITENED) != 0:
            scales = floats(record + readouts_at) + head * columns + column
            offset = tl.load(scales, mask=column < columns, other=0.0)
            expected = (expected - offset) * tl.load(scales + rank, mask=column < columns, other=0.0)
        result = z + token * z_token + part * z_slice + head * columns + column
        tl.store(result, expected, mask=column < columns)


@triton.jit
def embed(x, x_element, width, record, by, QUBITS: tl.constexpr, TINY: tl.constexpr):
    """The state of one token, (2**n,) float32 and real; its length does not matter.

    Args:
        x: where the token's numbers begin.
        x_element: from one to the next.
        width: their number.
        record: of the circuits.
        by: offsets of the input, and behind them scales.
        QUBITS: n.
        TINY: the smallest normal number of the type in which x is scaled.

    Returns:
        The state; the sum of the squares of x / peak; and peak, float32, the largest magnitude in x.
    """
    j = tl.arange(0, 2**QUBITS)
    re = tl.load(x + j * x_element, mask=j < width, other=0.0)
    if re.dtype != tl.float64:
        re = re.to(tl.float32)
    if tl.load(record + INPUTS) != 0:
        offset = tl.load(by + j, mask=j < width, other=0.0)
        re = ((re - offset) * tl.load(by + width + j, mask=j < width, other=0.0)).to(re.dtype)
    peak = tl.maximum(tl.max(tl.abs(re), axis=0), TINY)
    re = (re * (1 / peak)).to(tl.float32)
    square = tl.sum(re * re, axis=0)
    if tl.load(record + CONSTANT) != 0:
        re = tl.where(j == width, tl.where(square > 0, tl.sqrt(square), 1.0), re)
    return re, square, peak.to(tl.float32)


@triton.jit
def apply_steps(re, record, table, permutations, QUBITS: tl.constexpr):
    """A circuit on a real state, up to a factor: its real and its imaginary part."""
    DIM: tl.constexpr = 2**QUBITS
    j = tl.arange(0, DIM)
    first = tl.load(record + FIRST)
    steps = tl.load(record + STEPS)
    # The state is real before the first step, so that a first layer of RY is half the work.
    if first >= 0:
        re = _turn(re, table + first, QUBITS)
    im = tl.zeros((DIM,), tl.float32)
    for i in tl.range(steps, disable_licm=True):
        step = record + HEADER + STEP * i
        phases = tl.load(step)
        permutation = tl.load(step + 1)
        turns = tl.load(step + 2)
        if phases >= 0:
            re, im = multiply_phases(re, im, table + phases, 1, QUBITS)
        if permutation >= 0:
            source = tl.load(permutations + permutation * DIM + j).to(tl.int32)
            re = tl.gather(re, source, 0)
            im = tl.gather(im, source, 0)
        if turns >= 0:
            re = _turn(re, table + turns, QUBITS)
            im = _turn(im, table + turns, QUBITS)
    return re, im


@triton.jit
def multiply_phases(re, im, phases, SIGN: tl.constexpr, QUBITS: tl.constexpr):
    """RZ on each qubit; its inverse, up to a factor, for a SIGN of -1.

    Those of the low half of the bits, then those of the high half: all their products at once would take many
    registers.
    """
    DIM: tl.constexpr = 2**QUBITS
    HIGH: tl.constexpr = 2 ** (QUBITS // 2)
    LOW: tl.constexpr = DIM // HIGH
    re2 = tl.reshape(re, (HIGH, LOW))
    im2 = tl.reshape(im, (HIGH, LOW))
    by_low = phases + 2 * HIGH + tl.arange(0, LOW)[None, :]
    re2, im2 = _multiply(re2, im2, tl.load(by_low), SIGN * tl.load(by_low + LOW))
    by_high = phases + tl.arange(0, HIGH)[:, None]
    re2, im2 = _multiply(re2, im2, tl.load(by_high), SIGN * tl.load(by_high + HIGH))
    return tl.reshape(re2, (DIM,)), tl.reshape(im2, (DIM,))


@triton.jit
def floats(words):
    """A pointer to words as one to float32."""
    return words.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _turn(v, tangents, QUBITS: tl.constexpr):
    """RY on each qubit, up to a factor. The qubit of the last bit is turned, and that bit becomes the first."""
    for k in tl.static_range(QUBITS):
        tangent = tl.load(tangents + k)
        a, b = tl.split(tl.reshape(v, (2 ** (QUBITS - 1), 2)))
        v = tl.reshape(tl.trans(tl.join(a - tangent * b, tangent * a + b)), (2**QUBITS,))
    return v


@triton.jit
def walsh_hadamard(v, QUBITS: tl.constexpr):
    """Sums of v[j] (-1)^(number of bits that j and m have in common), for every m; bit by bit as in ``_turn``."""
    for _ in tl.static_range(QUBITS):
        a, b = tl.split(tl.reshape(v, (2 ** (QUBITS - 1), 2)))
        v = tl.reshape(tl.trans(tl.join(a + b, a - b)), (2**QUBITS,))
    return v


@triton.jit
def _multiply(re, im, cos, sin):
    """(re + i im) times (cos + i sin)."""
    return re * cos - im * sin, re * sin + im * cos
