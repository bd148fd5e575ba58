"""The kernels of ``triton.training``, which says how they work; apart, since importing this needs Triton.

Annotations are not postponed here: Triton reads ``tl.constexpr`` from them.
"""

import triton
import triton.language as tl

from qaa_serve.circuits.triton.kernel import (
    CONSTANT,
    FIRST,
    FLOATS,
    HEADER,
    LENGTH,
    STEP,
    STEPS,
    apply_steps,
    embed,
    floats,
    multiply_phases,
    walsh_hadamard,
)

#: Words of a row of ``tables_kernel``'s program.
ROW = tl.constexpr(5)
PI = tl.constexpr(3.141592653589793)


# One kernel for a number of qubits, whatever the form: compiling takes seconds.
@triton.jit(do_not_specialize=["rows", "count", "masks_at", "tables_at", "columns"])
def tables_kernel(
    theta,  # (heads, rows, n) float32
    rows,
    program,  # (count, 5) int32: offset of phases, reach of a ring, offset of tangents, rows of theta; -1 for none
    count,
    record,  # its header and masks are there, its tables are written
    masks_at,
    tables_at,
    columns,
    weights,  # (heads, rows, n) float32, written: what an angle's overlap is multiplied by
    QUBITS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two above the columns
):
    """Program h writes the tables of head h, as ``host.make_tables`` has them, and its weights, in float64."""
    HIGH: tl.constexpr = QUBITS // 2
    head = tl.program_id(0)
    table = floats(record + tables_at + head * tl.load(record + FLOATS))
    theta += head * rows * QUBITS
    weights += head * rows * QUBITS
    bit = tl.arange(0, 16)
    wire = QUBITS - 1 - bit
    there = bit < QUBITS
    # The Pauli that stands before the rest of the circuit, by bits: X and Z on each qubit; both are a Y.
    has_x = tl.zeros((), tl.int32)
    has_z = tl.zeros((), tl.int32)
    left_out = tl.zeros((), tl.float64) + 1
    for i in range(count):
        phases = tl.load(program + ROW * i)
        reach = tl.load(program + ROW * i + 1)
        tangents = tl.load(program + ROW * i + 2)
        phase_row = tl.load(program + ROW * i + 3)
        turn_row = tl.load(program + ROW * i + 4)
        if phases >= 0:
            _write_phases(theta, phase_row, has_x, left_out, table + phases, 0, HIGH, QUBITS)
            at = table + phases + 2 * 2**HIGH
            _write_phases(theta, phase_row, has_x, tl.zeros((), tl.float64) + 1, at, HIGH, QUBITS, QUBITS)
            sign = 1.0 - 2.0 * ((has_x >> bit) & 1)
            tl.store(weights + phase_row * QUBITS + wire, sign, mask=bit < tl.where(phase_row >= 0, QUBITS, 0))
            left_out = tl.zeros((), tl.float64) + 1
        if reach > 0:
            for k in range(QUBITS):
                control = QUBITS - 1 - k
                target = QUBITS - 1 - (k + reach) % QUBITS
                has_x ^= ((has_x >> control) & 1) << target
                has_z ^= ((has_z >> target) & 1) << control
        if tangents >= 0:
            angle = tl.load(theta + turn_row * QUBITS + wire, mask=there, other=0.0).to(tl.float64)
            sign = 1.0 - 2.0 * (((has_x ^ has_z) >> bit) & 1)
            angle = angle * sign
            half_turns = tl.floor(angle / PI + 0.5)
            half = (angle - half_turns * PI) / 2
            odd = half_turns - 2 * tl.floor(half_turns / 2)
            flips = tl.sum(tl.where(odd > 0, 1 << bit, 0), axis=0)
            has_x ^= flips
            has_z ^= flips
            cosine = tl.cos(half)
            tl.store(table + tangents + bit, (tl.sin(half) / cosine).to(tl.float32), mask=there)
            tl.store(weights + turn_row * QUBITS + wire, sign, mask=there)
            last = tl.sum(tl.where(bit == 15, tl.cumprod(cosine, axis=0), 0.0), axis=0)
            left_out = left_out * last
    column = tl.arange(0, PADDED)
    flips = tl.load(record + masks_at + column, mask=column < columns, other=0) & has_x
    for shift in tl.static_range(4):
        flips ^= flips >> (8 >> shift)
    tl.store(table + column, 1.0 - 2.0 * (flips & 1), mask=column < columns)
    tl.debug_barrier()  # other threads read what was written

    # On the way back, psi and lambda are longer than they were at the end; an overlap of both is divided by that.
    scale = tl.zeros((), tl.float64) + 1
    for back in range(count):
        i = count - 1 - back
        phases = tl.load(program + ROW * i)
        tangents = tl.load(program + ROW * i + 2)
        phase_row = tl.load(program + ROW * i + 3)
        turn_row = tl.load(program + ROW * i + 4)
        if tangents >= 0:
            tangent = tl.load(table + tangents + bit, mask=there, other=0.0).to(tl.float64)
            squares = tl.cumprod(1 / (1 + tangent * tangent), axis=0)
            at = weights + turn_row * QUBITS + wire
            before = squares * (1 + tangent * tangent)  # that of the qubits that were turned back before it
            tl.store(at, (tl.load(at, mask=there, other=0.0) * scale * before).to(tl.float32), mask=there)
            scale = scale * tl.sum(tl.where(bit == 15, squares, 0.0), axis=0)
        if phases >= 0:
            at = weights + phase_row * QUBITS + wire
            known = bit < tl.where(phase_row >= 0, QUBITS, 0)
            tl.store(at, (tl.load(at, mask=known, other=0.0) * scale).to(tl.float32), mask=known)
            cosine = tl.load(table + phases).to(tl.float64)
            sine = tl.load(table + phases + 2**HIGH).to(tl.float64)
            scale = scale / (cosine * cosine + sine * sine)


@triton.jit
def _write_phases(theta, row, has_x, factor, at, BEGIN: tl.constexpr, END: tl.constexpr, QUBITS: tl.constexpr):
    """RZ on the wires BEGIN to END, (2**wires,) cosines and behind them sines, times a factor."""
    index = tl.arange(0, 2 ** (END - BEGIN))
    total = tl.zeros((2 ** (END - BEGIN),), tl.float64)
    for w in tl.static_range(BEGIN, END):
        angle = tl.load(theta + row * QUBITS + w, mask=row >= 0, other=0.0).to(tl.float64)
        angle = angle * (1.0 - 2.0 * ((has_x >> (QUBITS - 1 - w)) & 1))
        total += angle * (((index >> (END - 1 - w)) & 1) - 0.5)
    tl.store(at + index, (tl.cos(total) * factor).to(tl.float32))
    tl.store(at + 2 ** (END - BEGIN) + index, (tl.sin(total) * factor).to(tl.float32))


# And whatever the batch.
@triton.jit(do_not_specialize=["tokens", "turn_layers", "phase_layers"])
def gradient_kernel(
    x,  # (tokens, width)
    x_token,  # strides of x
    x_element,
    tokens,
    width,
    record,  # int32 words, one slice's of host.Layout
    tables_at,
    permutations,  # (rings, 2**n) int16
    inverses,  # of permutations
    column_of,  # (2**n,) int16: the readout whose mask an index is; -1 for none
    dz,  # (tokens, heads, columns) float32, columns side by side
    dz_token,
    dz_head,
    dx,  # (heads, tokens, width), side by side; written
    sums,  # (programs, heads, turn_layers + phase_layers, 2**n) float32, side by side; added to
    turn_layers,  # of RY
    phase_layers,  # of RZ
    QUBITS: tl.constexpr,
    TINY: tl.constexpr,  # as in kernel.circuit_kernel
):
    """Program (p, h) takes every so many-th token, from p on, through the circuit of head h and back."""
    DIM: tl.constexpr = 2**QUBITS
    head = tl.program_id(1)
    programs = tl.num_programs(0)
    j = tl.arange(0, DIM)
    table = floats(record + tables_at + head * tl.load(record + FLOATS))
    sums += (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64) * (turn_layers + phase_layers) * DIM
    first = tl.load(record + FIRST)
    steps = tl.load(record + STEPS)
    token = tl.program_id(0).to(tl.int64)
    for _ in tl.range(tl.program_id(0), tokens, programs, disable_licm=True):
        psi, square, peak = embed(x + token * x_token, x_element, width, record, table, QUBITS, TINY)
        psi, psi_im = apply_steps(psi, record, table, permutations, QUBITS)
        total = tl.sum(psi * psi + psi_im * psi_im, axis=0)
        scale = tl.where(total > 0, tl.rsqrt(total), 0.0)
        psi *= scale
        psi_im *= scale

        # z = sum of |psi|**2 with the readouts' signs: lambda = dL/dpsi / 2 is their transpose on dz, times psi
        column = tl.load(column_of + j).to(tl.int32)
        weight = tl.load(dz + token * dz_token + head * dz_head + column, mask=column >= 0, other=0.0)
        weight *= tl.load(table + column, mask=column >= 0, other=0.0)
        length = tl.sqrt(square)
        if tl.load(record + LENGTH) != 0:
            weight *= length * tl.rsqrt(width.to(tl.float32)) * peak
        weight = walsh_hadamard(weight, QUBITS)
        lam = weight * psi
        lam_im = weight * psi_im

        turn = turn_layers
        phase = phase_layers
        for back in tl.range(steps, disable_licm=True):
            step = record + HEADER + STEP * (steps - 1 - back)
            phases = tl.load(step)
            permutation = tl.load(step + 1)
            tangents = tl.load(step + 2)
            if tangents >= 0:
                turn -= 1
                psi, psi_im, lam, lam_im = _turn_back(
                    psi, psi_im, lam, lam_im, table + tangents, sums + turn * DIM, True, QUBITS
                )
            if permutation >= 0:
                source = tl.load(inverses + permutation * DIM + j).to(tl.int32)
                psi = tl.gather(psi, source, 0)
                psi_im = tl.gather(psi_im, source, 0)
                lam = tl.gather(lam, source, 0)
                lam_im = tl.gather(lam_im, source, 0)
            if phases >= 0:
                phase -= 1
                to = sums + (turn_layers + phase) * DIM + j
                tl.store(to, tl.load(to) + lam * psi_im - lam_im * psi)
                psi, psi_im = multiply_phases(psi, psi_im, table + phases, -1, QUBITS)
                lam, lam_im = multiply_phases(lam, lam_im, table + phases, -1, QUBITS)
        # The state was real before the steps: only the real part of lambda matters.
        if first >= 0:
            psi, psi_im, lam, lam_im = _turn_back(psi, psi_im, lam, lam_im, table + first, sums, False, QUBITS)

        # dL/dx, as ``embedding.embed_backward`` has it
        total = tl.sum(psi * psi, axis=0)
        scale = tl.where(total > 0, tl.rsqrt(total), 0.0)
        psi *= scale
        lam *= 2 * scale
        overlap = psi * lam
        radial = tl.sum(tl.where(j < width, overlap, 0.0), axis=0)
        if tl.load(record + LENGTH) != 0:
            radial -= tl.sum(overlap, axis=0) / 2
        shrunk = tl.where(tl.load(record + CONSTANT) != 0, 0.7071067811865476, 1.0)
        found = (shrunk * lam - psi * (radial / shrunk)) * tl.where(length > 0, 1 / length, 0.0) / peak
        tl.store(dx + (head * tokens + token) * width + j, found.to(dx.dtype.element_ty), mask=j < width)
        token += programs


@triton.jit
def _turn_back(psi, psi_im, lam, lam_im, tangents, sums, COMPLEX: tl.constexpr, QUBITS: tl.constexpr):
    """The inverse of ``kernel``'s RY, up to a factor; adds overlaps to sums, see ``_collect``.

    If not COMPLEX, the imaginary parts stay as they are, and are not looked at.
    """
    found = tl.zeros((2**QUBITS,), tl.float32)
    for k in tl.static_range(QUBITS):
        tangent = tl.load(tangents + k)
        psi, lam, overlaps = _turn_qubit_back(psi, lam, tangent, QUBITS)
        if COMPLEX:
            psi_im, lam_im, of_im = _turn_qubit_back(psi_im, lam_im, tangent, QUBITS)
            overlaps += of_im
        found = _collect(found, overlaps, QUBITS)
    to = sums + tl.arange(0, 2**QUBITS)
    tl.store(to, tl.load(to) + found)
    return psi, psi_im, lam, lam_im


@triton.jit
def _turn_qubit_back(psi, lam, tangent, QUBITS: tl.constexpr):
    """Both turned back at their last bit, which becomes the first; and (2**(n-1),) lambda times -i Y psi there."""
    a, b = tl.split(tl.reshape(psi, (2 ** (QUBITS - 1), 2)))
    c, d = tl.split(tl.reshape(lam, (2 ** (QUBITS - 1), 2)))
    psi = tl.reshape(tl.trans(tl.join(a + tangent * b, b - tangent * a)), (2**QUBITS,))
    lam = tl.reshape(tl.trans(tl.join(c + tangent * d, d - tangent * c)), (2**QUBITS,))
    return psi, lam, d * a - c * b


@triton.jit
def _collect(found, overlaps, QUBITS: tl.constexpr):
    """Sum what was found over the last bit, which becomes the first: 0 for these sums, 1 for new overlaps."""
    a, b = tl.split(tl.reshape(found, (2 ** (QUBITS - 1), 2)))
    return tl.reshape(tl.trans(tl.join(a + b, overlaps)), (2**QUBITS,))
