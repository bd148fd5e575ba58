"""Prefix tuning, as PEFT has it: trained keys and values before each layer's own (arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import option
from qaa_serve.training.methods.base import GROUP, Setting
from qaa_serve.training.methods.peft import PeftMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_NO_PASSED_STATE = "its keys and values are passed as a cache, which"


@dataclass
class Prefix(PeftMethod):
    """Trained keys and values."""

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "keys and values before each layer's own"
    learning_rate: ClassVar[float] = 1e-2
    config: ClassVar[Mapping[str, Any]] = {"peft_type": "PREFIX_TUNING"}
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("target_modules", "exclude_modules", "layers_to_transform"),
            "it adapts no linear layer but what attention sees",
        ),
        "packing": f"{_NO_PASSED_STATE} rows of one batch line cannot share",
        "gradient_checkpointing": f"{_NO_PASSED_STATE} checkpointing turns off",
    }

    prefix_tokens: int = option(16, "keys and values before a layer's own", group=GROUP, above=0)
    prefix_text: str | None = option(
        None, "begin with the keys and values of this text (default: at random)", group=GROUP, metavar="TEXT"
    )
    prefix_projection: bool = option(
        False, "train them through an MLP, the paper's reparametrisation, which is dropped at the end", group=GROUP
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_text is not None and self.prefix_projection:
            raise TrainingError(
                "--prefix-text and --prefix-projection exclude each other: keys and values of a text do not come "
                "out of an MLP; leave one of them out"
            )

    def values(self) -> dict[str, Any]:
        """With the prefix's keys."""
        own = {"num_virtual_tokens": self.prefix_tokens, "prefix_projection": self.prefix_projection}
        return {**super().values(), **own}

    def build(self, base: PreTrainedModel, setting: Setting) -> PeftModel:
        """The base with a prefix, begun with a text if there is one."""
        if self.prefix_projection:
            base.config.encoder_hidden_size = getattr(base.config, "encoder_hidden_size", base.config.hidden_size)
        model = super().build(base, setting)
        if self.prefix_text is not None and setting.tokenizer is not None:
            from peft import initialize_kv_prefix_from_text

            found = len(setting.tokenizer(self.prefix_text)["input_ids"])
            if found < self.prefix_tokens:
                raise TrainingError(
                    f"--prefix-text has {found} tokens, fewer than --prefix-tokens {self.prefix_tokens}: give a "
                    "longer text or fewer tokens"
                )
            initialize_kv_prefix_from_text(
                model, setting.tokenizer, text=self.prefix_text, use_chat_template=False
            )
        return model
