"""What a training wrote, read back as a model that generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qaa_serve.adapters import CONFIG_FILE, AdapterError, resolve_base
from qaa_serve.training.errors import TrainingError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_trained(
    directory: Path,
    model: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load what ``qaa-serve train`` wrote, by any of its methods.

    Args:
        directory: an adapter on its base, or a whole model.
        model: the base of an adapter, in place of the one its config names: a directory or a hub's name.
        dtype: of the base or the whole model; an adapter's own weights are float32 in any case.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model in evaluation mode, on the CPU, and the base's tokenizer.

    Raises:
        TrainingError: if the directory holds neither, or cannot be loaded.
    """
    config = directory / CONFIG_FILE
    if config.is_file():
        base = model or _base_of(config)
    elif (directory / "config.json").is_file():
        base = str(directory)
    else:
        raise TrainingError(f"{directory} holds neither an adapter ({CONFIG_FILE}) nor a model (config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=trust_remote_code)
        if config.is_file():
            from peft import PeftModel

            from qaa_serve.training.model import register

            register()
            loaded = PeftModel.from_pretrained(loaded, directory)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"{directory} cannot be loaded: {error}") from error
    return loaded.eval(), tokenizer


def _base_of(config: Path) -> str:
    try:
        named = json.loads(config.read_bytes())["base_model_name_or_path"]
        return resolve_base(config.parent, named)
    except (OSError, ValueError, KeyError, TypeError, AdapterError) as error:
        raise TrainingError(f"{config} names no base model that can be found: {error}") from error
