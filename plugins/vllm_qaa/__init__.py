"""QAA adapters in vLLM: the entry point that vLLM's ``vllm.general_plugins`` group loads in every process."""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    """Under qaa-serve, have the kernel end this engine or worker process when the one that started it dies.

    vLLM stops its processes when its server stops in good order; a killed server would leave them running.
    """
    if os.environ.get("QAA_SERVE") != "1" or multiprocessing.parent_process() is None or os.name != "posix":
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
