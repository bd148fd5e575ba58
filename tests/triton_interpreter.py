"""The triton backend on a machine without a GPU: in a process of its own, where Triton interprets its kernels.

Triton decides that when it is imported, for all kernels of a process, vLLM's too.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import cache, lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from qaa_serve.circuits import Ansatz, get_backend


def expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The backend's function."""
    result: torch.Tensor = call(_expectation_values, x.detach(), theta.detach(), ansatz, index)
    return result


def _expectation_values(*arguments: Any) -> torch.Tensor:
    return get_backend("triton")(*arguments)


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function of some module returns, or raises, over there."""
    pipe = _process()
    # pickled here: a pipe's own pickling would share the tensors' memory
    pipe.send_bytes(pickle.dumps((function, arguments)))
    answer = pickle.loads(pipe.recv_bytes())
    if isinstance(answer, Exception):
        raise answer
    return answer


@lru_cache
def _process() -> Connection:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), daemon=True).start()
    theirs.close()
    return ours


def _serve(pipe: Connection) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty hands out NaN here too
    torch.set_num_threads(1)
    _patch_language_once()
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:  # the tests are over, however they ended
            return
        try:
            function, arguments = pickle.loads(request)
            answer = function(*arguments)
        except Exception as error:
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


def _patch_language_once() -> None:
    """Have what a function calls of triton.language replaced at its first call, and not at each and every one.

    The interpreter goes through the whole module whenever one function calls another, which takes most of its
    time, and puts everything back behind a launch. Nothing in this process uses the language but kernels.
    """
    from triton.runtime import interpreter

    interpreter._LangPatchScope.restore = lambda self: None
    interpreter._patch_lang = cache(interpreter._patch_lang)
