"""QAA as a PEFT tuner: puts QAALinear in the place of the target modules."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qaa_serve.training.config import QAAConfig
from qaa_serve.training.layer import QAALinear
from qaa_serve.training.targets import resolve_targets


class QAAModel(BaseTuner):  # type: ignore[misc]
    """A transformers model with QAA adapters; made by ``get_peft_model(model, QAAConfig())``."""

    prefix = "qaa_"
    tuner_layer_cls = QAALinear

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        peft_config.target_modules = set(resolve_targets(self.model, peft_config.target_modules))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: QAAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.checked(peft_config.base_model_name_or_path or "unknown")
        if isinstance(target, QAALinear):
            target.update_layer(adapter_name, config, inference_mode=peft_config.inference_mode)
        else:
            self._replace_module(parent, target_name, QAALinear(target, adapter_name, config), target)
