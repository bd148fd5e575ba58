"""Prefix tuning, as PEFT has it: trained keys and values before each layer's own (arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import lora
from qaa_serve.training.methods.base import Method, one_group


def _build(model: PreTrainedModel, targets: list[str], options: Mapping[str, Any]) -> PeftModel:
    if options["prefix_tokens"] < 1:
        raise TrainingError(f"--prefix-tokens must be at least 1, found {options['prefix_tokens']}")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options["prefix_tokens"])
    return get_peft_model(model, config)


_NO_PASSED_STATE = "its keys and values are passed as a cache, which"

METHOD = Method(
    name="prefix",
    learning_rate=1e-2,
    options={"prefix_tokens": 16},
    build=_build,
    groups=one_group,
    save=lora.save,
    refuses={
        "target_modules": "it adapts no linear layer but what attention sees",
        "packing": f"{_NO_PASSED_STATE} rows of one batch line cannot share",
        "gradient_checkpointing": f"{_NO_PASSED_STATE} checkpointing turns off",
    },
    usage=(
        "use it from Python: PeftModel.from_pretrained(base, {output!r})\n"
        "(vLLM and qaa-serve do not serve prefix tuning)"
    ),
)
