"""The circuits of training on a GPU: one launch makes the tables, one runs the circuits, one takes them back.

Angles change in every step, so that each call makes its tables, on the device: nothing waits for the host. Forward
it is the kernel of serving. The backward pass is the adjoint method (arXiv:2009.02823), as in ``torch_adjoint``: a
program runs a token once more, makes lambda = dL/dpsi of dz, and undoes the steps of both in its registers. No
state is stored. On the way it collects

- for RY <lambda, -i Y_k psi>, qubit by qubit where k is turned back, since there the amplitudes that it pairs are
  at hand; what is summed up then rides along in a third array (``backward._collect``);
- for RZ Im(conj(lambda) psi), amplitude by amplitude; the signs of Z on a qubit come at the end.

A turn back by a tangent, like one forward, leaves out a cosine. By how much psi and lambda are too long where an
overlap is taken depends on the angles alone, as does the sign that an angle has once Paulis are moved to the end
(``host``): ``tables_kernel`` makes a weight of both for each angle.

Sums over tokens take two stages: each program adds up the tokens it takes, one after the other, in memory of its
own, a layer's 2**n numbers each by the same thread; then torch adds up programs, in float64. Atomics would need
less memory, but add in an order that differs from run to run, and a training could not be repeated to the bit.
How tokens are shared out depends on the GPU's number of multiprocessors, so another GPU rounds otherwise.

x standardised before it is embedded is torch's, as z standardised behind is: see ``training.layer``.

It is interpreted and compiled in the tests. It never ran on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qaa_serve.circuits.ansatz import Ansatz
from qaa_serve.circuits.schedule import schedule, z_signs
from qaa_serve.circuits.triton import host
from qaa_serve.circuits.triton.host import Layout

#: By qubits: warps of a backward program, registers that a thread may have, programs that fit on a multiprocessor.
#: Compiled for Hopper, see docs/performance.md; below 8 qubits, of which there is room for more, one warp and 16.
_SHAPES = {
    8: (2, None, 21),
    9: (2, None, 12),
    10: (4, None, 7),
    11: (4, 128, 4),
    12: (8, 128, 2),
    13: (16, 128, 1),
}

#: psi and lambda of 13 qubits fit the registers of a program, of more they do not.
MOST_QUBITS = 13


def prepare() -> None:
    """Triton compiles at the first call, and keeps on disk what it compiles."""


def forward(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Every circuit on every token: z, (tokens, circuits, columns) float32.

    Args:
        x: (tokens, width), of a dtype that is computed in float32.
        theta: (circuits, rows, n).
        ansatz: the form.
    """
    from qaa_serve.circuits.triton.kernel import circuit_kernel

    z = torch.zeros(len(x), len(theta), ansatz.columns, device=x.device)
    if z.numel():
        form, record, _ = _make_record(theta, ansatz)
        slots = _first_slot(x.device)
        host.launch(circuit_kernel, x, slots, (0, 0), record[None], 0, form.layout, z.flatten(1)[None])
    return z


def backward(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dx and dL/dtheta, of the shapes and dtypes of x and theta; the same to the bit for the same arguments.

    Args:
        x: (tokens, width), as of ``forward``.
        theta: (circuits, rows, n).
        ansatz: the form.
        dz: dL/dz, (tokens, circuits, columns).
    """
    from qaa_serve.circuits.triton.backward import gradient_kernel

    if not dz.numel():
        return torch.zeros_like(x), torch.zeros_like(theta)
    form, record, weights = _make_record(theta, ansatz)
    dx, sums = launch_gradients(gradient_kernel, x, form, record, dz.float().contiguous())
    dx = dx[0] if len(dx) == 1 else dx.sum(0).to(x.dtype)
    return dx, (form.add_up(sums) * weights).to(theta.dtype)


def launch_gradients(
    kernel: Any, x: torch.Tensor, form: Form, record: torch.Tensor, dz: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take every token through the circuits and back, in one launch.

    Args:
        kernel: ``backward.gradient_kernel``, or what stands for it.
        x: (tokens, width) of any floating dtype, any strides.
        form: of the circuits.
        record: (layout.words,) int32.
        dz: (tokens, heads, columns) float32, contiguous.

    Returns:
        dL/dx, (heads, tokens, width); and what ``Form.add_up`` takes, (programs, heads, layers, 2**n) float32.
    """
    (tokens, heads, _), n = dz.shape, form.layout.qubits
    warps, registers, resident = _SHAPES.get(n, (1, None, 16))
    programs = min(tokens, -(-host.multiprocessors(x.device) * resident // heads))
    sums = torch.zeros(programs, heads, len(form.turn_rows) + len(form.phase_rows), 2**n, device=x.device)
    # Several heads are added up in float32, whatever x is.
    dx = torch.empty(heads, *x.shape, dtype=x.dtype if heads == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[programs, heads](
            x,
            *x.stride(),
            *x.shape,
            record,
            form.layout.tables_at,
            host.permutations(n, x.device),
            _inverses(n, x.device),
            form.column_of,
            dz,
            dz.stride(0),
            dz.stride(1),
            dx,
            sums,
            len(form.turn_rows),
            len(form.phase_rows),
            QUBITS=n,
            TINY=host.tiny(x.dtype),
            num_warps=warps,
            num_stages=1,
            maxnreg=registers,
            enable_fp_fusion=True,
        )
    return dx, sums


@dataclass(frozen=True)
class Form:
    """What the circuits of one form share, on a device.

    Attributes:
        layout: of a record with all heads.
        record: without tables, (layout.words,) int32.
        program: for ``tables_kernel``.
        turn_rows, phase_rows: the rows of theta, in the order in which they act; None for phases that only
            shorten the state.
        column_of: (2**n,) int16, the readout whose mask an index is; -1 for none.
        highest: (2**n, n) float64, 1 where the highest bit that is set is a wire's: see ``backward._collect``.
        signs: (2**n, n) float64, of Z.
        theta_shape: (rows, n).
    """

    layout: Layout
    record: torch.Tensor
    program: torch.Tensor
    turn_rows: list[int]
    phase_rows: list[int | None]
    column_of: torch.Tensor
    highest: torch.Tensor
    signs: torch.Tensor
    theta_shape: tuple[int, int]

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """Gradients of the angles as the tables have them: (programs, heads, layers, 2**n) -> (heads, rows, n)."""
        total, turns = sums.sum(0, dtype=torch.float64), len(self.turn_rows)
        of_rows = torch.cat([total[:, :turns] @ self.highest, total[:, turns:] @ self.signs], dim=1)
        found = of_rows.new_zeros(len(total), *self.theta_shape)
        for row, of_row in zip((*self.turn_rows, *self.phase_rows), of_rows.unbind(1), strict=True):
            if row is not None:  # one by one: a list of rows would be copied to the device
                found[:, row] = of_row
        return found


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def form_for(ansatz: Ansatz, heads: int, device: torch.device) -> Form:
    """What such circuits share."""
    n, steps, plan = ansatz.qubits, schedule(ansatz), host.plan_table(ansatz)
    layout = host.make_layout(n, 0, 1, heads * ansatz.columns, len(steps.steps), heads * plan.floats)
    (record,) = host.pack(torch.zeros(1, heads, *ansatz.theta_shape), ansatz, layout)
    program: list[tuple[int, ...]] = []
    turn_rows: list[int] = []
    phase_rows: list[int | None] = []
    places = plan.steps if plan.first < 0 else ((-1, -1, plan.first), *plan.steps)
    for step, (phases, permutation, tangents) in zip(steps.all_steps, places, strict=True):
        rows = (-1 if row is None else row for row in (step.phases, step.turns))
        program.append((phases, permutation + 1, tangents, *rows))
        if step.turns is not None:
            turn_rows.append(step.turns)
        if phases >= 0:
            phase_rows.append(step.phases)
    column_of = torch.full((2**n,), -1, dtype=torch.int16)
    column_of[list(steps.masks)] = torch.arange(ansatz.columns, dtype=torch.int16)
    signs = z_signs(n).double()
    return Form(
        layout,
        record.to(device),
        torch.tensor(program, dtype=torch.int32, device=device),
        turn_rows,
        phase_rows,
        column_of.to(device),
        ((signs < 0) & ((signs < 0).cumsum(1) == 1)).to(device, torch.float64),
        signs.to(device),
        ansatz.theta_shape,
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _inverses(n: int, device: torch.device) -> torch.Tensor:
    """As ``host.permutations``, the inverse ones."""
    return host.permutations(n, device).argsort(1).to(torch.int16)


@lru_cache
@torch.inference_mode(False)
def _first_slot(device: torch.device) -> torch.Tensor:
    """(1,) int32: the only record there is, for tokens with stride 0."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _make_record(theta: torch.Tensor, ansatz: Ansatz) -> tuple[Form, torch.Tensor, torch.Tensor]:
    """The form, and of circuits theta (heads, rows, n) the record and the weights of the overlaps, as theta."""
    from qaa_serve.circuits.triton.backward import tables_kernel

    form = form_for(ansatz, len(theta), theta.device)
    record = form.record.clone()
    theta = theta.detach().contiguous()
    weights = torch.zeros(theta.shape, device=theta.device)
    with torch.cuda.device_of(theta):  # type: ignore[no-untyped-call]
        tables_kernel[(len(theta),)](
            theta,
            theta.shape[1],
            form.program,
            len(form.program),
            record,
            form.layout.masks_at,
            form.layout.tables_at,
            ansatz.columns,
            weights,
            QUBITS=ansatz.qubits,
            PADDED=1 << (ansatz.columns - 1).bit_length(),
            num_warps=1,
        )
    return form, record, weights
