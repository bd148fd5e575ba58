"""vLLM's own check of a LoRA adapter, as far as it needs no engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

from qaa_serve.adapters import MAX_RANK, AdapterError


def check(directory: Path, tensors: Iterable[str]) -> None:
    """Ask vLLM's loader about an adapter's config and the names of its tensors.

    Raises:
        AdapterError: if vLLM refuses them, in its words.
    """
    try:
        helper = PEFTHelper.from_local_dir(str(directory), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=MAX_RANK))
        for name in tensors:
            if not is_base_embedding_weights(name):
                helper.get_rank_and_scaling(parse_fine_tuned_lora_name(name)[0])
    except Exception as error:
        raise AdapterError(f"vLLM refuses it: {error}") from error
