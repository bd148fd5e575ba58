"""A safetensors file as vLLM's loader of LoRA adapters opens it, without what safetensors leaves behind.

`safetensors.safe_open` (0.6 to 0.8) cuts a tensor for torch out of its file by two ints that are never freed: 14
KB whenever a LoRA adapter on four modules of 32 layers is loaded, and one that is evicted and asked for again is
loaded each time. To load a file as a whole leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load


class LoadedWeights(dict[str, torch.Tensor]):
    """The tensors of a file by name."""

    get_tensor = dict.__getitem__


@contextmanager
def open_weights(filename: str, framework: str) -> Iterator[LoadedWeights]:
    """As `safetensors.safe_open`; the file is read now."""
    yield LoadedWeights(load(Path(filename).read_bytes()))


#: What vLLM's loader has in place of the package.
SAFETENSORS = SimpleNamespace(safe_open=open_weights)
