"""The compiled backward pass of training on a CPU: ``torch_adjoint``'s method, on the tiles of ``cpu.forward``.

A tile, sixteen tokens of one circuit, is run once more. What each RY layer acts on is kept until lambda = dL/dpsi
has come back to it: a tile's states fit the cache, and to run psi back beside lambda would take longer.

- dL/d|psi_j|**2 is the readout's transpose on dL/dz: n doublings, or a Walsh-Hadamard transform for products.
- An angle's gradient is one vector of overlaps, summed over lanes and tiles in float64.
"""

# numba has no types for mypy, and compiles functions whose arguments have none.
# mypy: ignore-errors

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from numba import njit

from qaa_serve.circuits.cpu import forward, gates, vectors
from qaa_serve.circuits.cpu.forward import embed, gather_tables, keep_compiled, permute, walsh_hadamard
from qaa_serve.circuits.cpu.gates import (
    add_product,
    add_vector,
    copy_vector,
    from_lanes,
    multiply,
    phase_back,
    phase_overlap,
    read_y,
    read_z,
    rotate,
    weigh_z,
)
from qaa_serve.circuits.cpu.vectors import LANES


@njit(nogil=True)
def _unapply_phases(re, im, to_re, to_im, phases, layer, gather, moved, n):
    """The inverse of ``forward.apply_phases``."""
    lower = n // 2
    base = layer * ((1 << (n - lower)) + (1 << lower))
    for j in range(1 << n):
        i = gather[j] if moved else j
        upper, below = base + (i >> lower), base + (1 << (n - lower)) + (i & ((1 << lower) - 1))
        phase_back(re, im, to_re, to_im, phases, j, i, 2 * upper, 2 * below)


@njit(nogil=True)
def _add_totals(sums, n, totals):
    """totals[bit] += the sum of a vector; sums is zero then."""
    for bit in range(n):
        for lane in range(LANES):
            totals[bit] += sums[bit * LANES + lane]
    sums[:] = 0


@njit(nogil=True)
def _run_back(embedded, angles, form, permuted, permuted_im, states, dz, sums_of):
    """lambda where a tile's circuit begins, (2**n vectors,) real; it lies in one of the arrays given.

    Args:
        embedded: as of ``forward._run_tile``.
        angles: turns and phases as of ``_run_tile``, between them turns with negative sines.
        form: ``host.Form``.
        permuted, permuted_im: (steps, 2**n vectors), space for both parts of what each step's RY layer acts on.
        states: three times 2**n vectors, and n.
        dz: vectors of dL/dz, by bit, or by column where there are more than n.
        sums_of: for the RY layers and the RZ layers (layers, n) float64, by bit: 2 dL/dt and -2 dL/dt are added.
    """
    turns, back_turns, phases = angles
    dturns, dphases = sums_of
    rz, gathers, moves, ry, _, _, _, masks, n = form
    a, b, p, sums = states
    size, steps = 1 << n, len(ry)
    complex_at = np.zeros(steps + 1, np.bool_)
    source, source_im = embedded, b
    for step in range(steps):
        re, im = permuted[step], permuted_im[step]
        complex_at[step + 1] = permute(
            source, source_im, complex_at[step], re, im, phases, rz[step], gathers[step], moves[step], n
        )
        source, source_im = re, im
        if ry[step] >= 0:
            rotate(re, a, turns, ry[step] * n, 0, n)
            if complex_at[step + 1]:
                rotate(im, b, turns, ry[step] * n, 0, n)
            source, source_im = a, b

    # z = sum of |psi|**2 with the readout's signs, so that lambda is twice their transpose on dz, times psi
    if len(masks) > n:
        p[:] = 0
        for column in range(len(masks)):
            copy_vector(dz, p, column, masks[column])
        walsh_hadamard(p, n)
    else:
        weigh_z(dz, p, n)
    p *= np.float32(2)
    for j in range(size):
        multiply(p, a, j, gathers[steps][j])
        if complex_at[steps]:
            multiply(p, b, j, gathers[steps][j])

    sums[:] = 0
    for step in range(steps - 1, -1, -1):
        re, im, gather = permuted[step], permuted_im[step], gathers[step]
        if ry[step] >= 0:
            rotate(a, a, back_turns, ry[step] * n, 0, n)
            read_y(a, re, sums, 0, 0, n)
            if complex_at[step + 1]:
                rotate(b, b, back_turns, ry[step] * n, 0, n)
                read_y(b, im, sums, 0, 0, n)
            _add_totals(sums, n, dturns[ry[step]])
        if rz[step] >= 0:  # phases leave the overlaps as they are; the permutation moves them
            for j in range(size):
                phase_overlap(a, b, re, im, p, j, gather[j])
            read_z(p, sums, n)
            _add_totals(sums, n, dphases[rz[step]])
            if moves[step]:
                _unapply_phases(a, b, re, im, phases, rz[step], gather, True, n)
                a, b = re, im
            else:
                _unapply_phases(a, b, a, b, phases, rz[step], gather, False, n)
        elif moves[step]:
            for j in range(size):
                copy_vector(a, re, j, gather[j])
            if complex_at[step]:
                for j in range(size):
                    copy_vector(b, im, j, gather[j])
            a, b = re, im
        # To a state that was real only the real part of lambda matters: b is not looked at again.
    return a


@njit(nogil=True)
def _embed_backward(lam, embedded, constant, length, lengths, width, n, overlaps, factors, rows):
    """dL/dx of a tile's tokens to ``rows``, from lambda; as ``embedding.embed_backward``, which has the formula.

    ``overlaps`` and ``factors``, two vectors each, are space: for <psi, lambda> over x's places and over all, and
    for what ``from_lanes`` multiplies by.
    """
    overlaps[:] = 0
    c_squared = 0.5 if constant else 1.0  # of |psi|**2, what is x's
    for i in range(width):
        add_product(lam, embedded, overlaps, i, 0)
    if length:
        for i in range(1 << n):
            add_product(lam, embedded, overlaps, i, 1)
    for lane in range(LANES):
        norm = lengths[lane] * math.sqrt(width)
        # The rows of zeros, and those so near to them that 1 / norm would overflow, have no gradient.
        factors[lane] = math.sqrt(c_squared) / norm if norm > 3e-39 else 0.0
        radial = overlaps[lane] - np.float32(0.5) * overlaps[LANES + lane]
        factors[LANES + lane] = radial / np.float32(c_squared)
    blocks = rows.shape[1] // LANES
    flat = rows.reshape(-1)
    for block in range(blocks):
        from_lanes(lam, embedded, factors, flat, block * LANES, block, blocks)


@njit(nogil=True)
def _gradients(x, dz, circuits, form, workspace, dx, dturns, dphases):
    """The gradients of a batch; dx is written, the angles' are added."""
    turns_of, back_turns_of, phases_of = circuits
    constant, length, masks, n = form[5:]
    forward_workspace, permuted, permuted_im, states, back_turns, lane_dz, total, ends, dx_rows = workspace
    rows, scales, lengths, embedded, _, _, turns, phases, _ = forward_workspace
    overlaps, factors = ends
    count, width = x.shape
    tokens, wanted = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    had = -1
    for start in range(0, count, LANES):
        for lane in range(LANES):
            tokens[lane] = start + lane if start + lane < count else -1
        embed(x, tokens, constant, rows, scales, lengths, embedded)
        total[:] = 0
        for circuit in range(len(turns_of)):
            if had != circuit:
                had = circuit
                wanted[:] = circuit
                gather_tables(turns_of, wanted, turns)
                gather_tables(back_turns_of, wanted, back_turns)
                gather_tables(phases_of, wanted, phases)
            lane_dz[:] = 0
            for column in range(len(masks)):
                place = column if len(masks) > n else n - 1 - column
                for lane in range(min(LANES, count - start)):
                    weight = dz[start + lane, circuit, column]
                    lane_dz[place * LANES + lane] = weight * lengths[lane] if length else weight
            angles = turns, back_turns, phases
            sums_of = dturns[circuit], dphases[circuit]
            lam = _run_back(embedded, angles, form, permuted, permuted_im, states, lane_dz, sums_of)
            for i in range(1 << n):
                add_vector(lam, total, i, i)
        _embed_backward(total, embedded, constant, length, lengths, width, n, overlaps, factors, dx_rows)
        for lane in range(min(LANES, count - start)):
            dx[start + lane] = dx_rows[lane, :width]


def _entry_point(source: str) -> Any:
    """What Python calls; see ``cpu.forward``."""

    def gradients(x, dz, circuits, form, workspace, dx, dturns, dphases):
        len(source)
        _gradients(x, dz, circuits, form, workspace, dx, dturns, dphases)

    return keep_compiled(gradients)


gradients = _entry_point("".join(inspect.getsource(module) for module in (vectors, gates, forward)))
