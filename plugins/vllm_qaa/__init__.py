"""QAA adapters in vLLM: the entry point that vLLM's ``vllm.general_plugins`` group loads in every process."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_forker: int | None = None  # the process that forked last; None before forks are watched


def register() -> None:
    """Put the QAA layers and the QAA-aware adapter manager where vLLM looks for its LoRA ones.

    Called by vLLM, in every process and possibly more than once; calls after the first change nothing.

    Raises:
        UnsupportedVLLMError: if this vLLM is not one the plugin knows. Nothing has been changed then.
    """
    from vllm_qaa import port

    port.apply()
    _end_with_parent()


def _end_with_parent() -> None:
    """Under qaa-serve, have the kernel end engine and worker processes when the one that started them dies.

    vLLM stops its processes when its server stops in good order; a killed server would leave them running, and
    its socket open. vLLM starts them as new processes, and each calls ``register``; or it forks, and nothing is
    registered a second time.
    """
    if os.environ.get("QAA_SERVE") != "1" or sys.platform != "linux":
        return
    if (parent := multiprocessing.parent_process()) is not None:
        _end_with(parent.pid)
    if _forker is None:
        _note_forker()
        os.register_at_fork(before=_note_forker, after_in_child=lambda: _end_with(_forker))


def _note_forker() -> None:
    global _forker
    _forker = os.getpid()


def _end_with(parent: int | None) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)
