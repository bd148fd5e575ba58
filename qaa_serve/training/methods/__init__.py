"""The ways to train, by name."""

from __future__ import annotations

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods.base import Method, Setting, check_shared, configured, own_options
from qaa_serve.training.methods.full import Full
from qaa_serve.training.methods.peft import PRESETS, Lora, PeftMethod
from qaa_serve.training.methods.prefix import Prefix
from qaa_serve.training.methods.qaa import QAA
from qaa_serve.training.methods.sora import Sora

_ALL: tuple[type[Method], ...] = (QAA, Lora, Sora, Prefix, Full, *PRESETS, PeftMethod)

METHODS = {method.name: method for method in _ALL}

#: What is compared where nothing is named.
COMPARED = ("qaa", "lora", "sora", "prefix", "full")


def get_method(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        TrainingError: for an unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise TrainingError(f"unknown method {name!r}; known are: {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["COMPARED", "METHODS", "Method", "Setting", "check_shared", "configured", "get_method", "own_options"]
