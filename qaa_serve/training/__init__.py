"""Training of adapters: QAA as a PEFT method, the data, the loop.

``QAAConfig`` and ``QAAModel`` make PEFT know QAA when they are first asked for, so that
``from qaa_serve.training import QAAConfig`` is all that ``get_peft_model`` and ``PeftModel.from_pretrained``
need. Importing the package alone loads neither torch nor PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qaa_serve.training.errors import TrainingError

if TYPE_CHECKING:
    from qaa_serve.training.config import QAAConfig
    from qaa_serve.training.layer import QAALinear
    from qaa_serve.training.loop import train
    from qaa_serve.training.model import QAAModel, register
    from qaa_serve.training.options import TrainOptions
    from qaa_serve.training.result import TrainResult

__all__ = [
    "QAAConfig",
    "QAALinear",
    "QAAModel",
    "TrainOptions",
    "TrainResult",
    "TrainingError",
    "register",
    "train",
]

_HOMES = {
    "QAAConfig": "config",
    "QAALinear": "layer",
    "QAAModel": "model",
    "TrainOptions": "options",
    "TrainResult": "result",
    "register": "model",
    "train": "loop",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qaa_serve.training.model import register

    register()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
