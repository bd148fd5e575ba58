"""What an adapter must fit: the linear layers of its base model, found without loading any weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from qaa_serve.adapters.errors import AdapterError

#: Full module name, as in transformers -> (d_in, d_out).
LinearWidths: TypeAlias = Mapping[str, tuple[int, int]]


def linear_widths(base: str | Path, *, trust_remote_code: bool = False) -> LinearWidths:
    """Input and output widths of every linear layer of a base model, from its config alone.

    The output head is left out: it cannot be adapted.

    Raises:
        AdapterError: if transformers cannot make the model from ``base``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise AdapterError(f"the base model {str(base)!r} cannot be read: {error}") from error
    head = model.get_output_embeddings()
    widths: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            widths[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, stored transposed
            d_in, d_out = module.weight.shape
            widths[name] = (d_in, d_out)
    return widths
