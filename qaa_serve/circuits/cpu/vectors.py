"""Vectors of 16 float32 for numba: what the compiled kernel is written in.

numba has no vector types, and LLVM does not find the vectors in a loop over sixteen strided streams. So the few
operations that the kernel needs are written as LLVM's own instructions on ``<16 x float>``: one register with
AVX-512, two with AVX, four with NEON.

Arrays are 1-D and contiguous; an offset counts vectors, not numbers. Nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_CONTRACT = ("contract",)  # a multiplication and an addition may become one fused instruction

Registers = list[Any]


class Block:
    """What an intrinsic's code is written with: loads, stores and arithmetic on vectors."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any):
        self._builder = builder
        self._pointers = {
            number: context.make_array(kind)(context, builder, value).data
            for number, (kind, value) in enumerate(zip(signature.args, arguments, strict=True))
            if isinstance(kind, types.Array)
        }
        self.arguments = arguments

    def load(self, array: int, offset: Any) -> Any:
        """The vector at an offset of the array that is the intrinsic's argument of that number."""
        return self._builder.load(self._at(array, offset), align=64)

    def broadcast(self, array: int, number: Any) -> Any:
        """One number of an array, not a vector, in every lane."""
        place = cgutils.gep_inbounds(self._builder, self._pointers[array], number)
        first = self._builder.insert_element(
            ir.Constant(_VECTOR, ir.Undefined), self._builder.load(place), ir.Constant(ir.IntType(32), 0)
        )
        return self.shuffle(first, first, [0] * LANES)

    def store(self, value: Any, array: int, offset: Any) -> None:
        """Write a vector."""
        self._builder.store(value, self._at(array, offset), align=64)

    def offset(self, base: Any, times: int, stride: Any = None) -> Any:
        """base + times * stride (1 if there is none), as code."""
        step = ir.Constant(ir.IntType(64), times)
        return self._builder.add(base, step if stride is None else self._builder.mul(step, stride))

    def total(self, vectors: Registers) -> Any:
        """Their sum, by halves: short chains of additions that wait for each other."""
        while len(vectors) > 1:
            odd = vectors[-1:] if len(vectors) % 2 else []
            vectors = [self.plus(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=False)] + odd
        return vectors[0]

    def times(self, a: Any, b: Any) -> Any:
        """a * b."""
        return self._builder.fmul(a, b, flags=_CONTRACT)

    def plus(self, a: Any, b: Any) -> Any:
        """a + b."""
        return self._builder.fadd(a, b, flags=_CONTRACT)

    def minus(self, a: Any, b: Any) -> Any:
        """a - b."""
        return self._builder.fsub(a, b, flags=_CONTRACT)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of a (0 to 15) and b (16 to 31)."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
        return self._builder.shuffle_vector(a, b, mask)

    def _at(self, array: int, offset: Any) -> Any:
        numbers = self._builder.mul(offset, ir.Constant(ir.IntType(64), LANES))
        place = cgutils.gep_inbounds(self._builder, self._pointers[array], numbers)
        return self._builder.bitcast(place, _VECTOR.as_pointer())


def emit(arrays: int, offsets: int, code: Callable[[Block], None]) -> Any:
    """An intrinsic of so many arrays of float32, then so many integers, that returns nothing.

    Args:
        arrays: arguments that are arrays, first.
        offsets: arguments that are integers, after them.
        code: writes the instructions; called once for every compilation.
    """
    # numba reads an intrinsic's signature from the Python function's, so the parameters must be there by name.
    names = [f"a{i}" for i in range(arrays + offsets)]

    def typer(_: Any, *kinds: Any) -> Any:
        signature = types.void(*kinds[:arrays], *[types.int64] * offsets)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code(Block(context, builder, signature, arguments))
            return context.get_dummy_value()

        return signature, generate

    scope: dict[str, Any] = {"typer": typer}
    exec(f"def operation(context, {', '.join(names)}): return typer(context, {', '.join(names)})", scope)
    return intrinsic(scope["operation"])
