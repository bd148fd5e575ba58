"""QAA adapters in vLLM: the entry point that vLLM's ``vllm.general_plugins`` group loads in every process."""

import ctypes
import multiprocessing
import os
import signal
import sys

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
    parent = multiprocessing.parent_process()
    if os.environ.get("QAA_SERVE") != "1" or parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent.pid:  # it died before the kernel was asked
        os._exit(1)
