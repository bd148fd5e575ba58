"""QAA as a PEFT tuner: puts QAALinear in the place of the target modules, and makes PEFT know the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from torch import nn

from qaa_serve.training.config import QAAConfig
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.layer import Moments, QAALinear
from qaa_serve.training.peft_type import qaa_type
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


@torch.no_grad()
def standardise(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], adapter_name: str) -> None:
    """Measure, once for a new adapter, what its layers standardise inputs and readouts by.

    The base runs over the batches alone, once for each of the two.

    Args:
        model: with QAA layers whose B is zero.
        batches: what the model is called with; every token counts, so that there should be no padding.
        adapter_name: the adapter's.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, QAALinear)]
    training = model.training
    model.eval()
    for stage in layers[0].stages(adapter_name) if layers else ():
        hooks, moments = [], {layer: Moments() for layer in layers}
        for layer in layers:

            def add(
                layer: QAALinear, inputs: tuple[torch.Tensor, ...], stage: str = stage, seen: Any = moments
            ) -> None:
                seen[layer].add(layer.seen(adapter_name, stage, inputs[0]))

            layer._disable_adapters = True  # PEFT's own switch has a say in what is trained, too
            hooks.append(layer.register_forward_pre_hook(add))
        for batch in batches:
            model(**batch)
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            layer._disable_adapters = False
            layer.standardise(adapter_name, stage, moments[layer])
    model.train(training)


def register() -> PeftType:
    """Add QAA to PEFT's methods, through private tables that have no public door, once; later calls do nothing.

    Returns:
        The member ``PeftType.QAA``.

    Raises:
        TrainingError: for a PEFT whose tables are not known to be the same, or that has another QAA.
    """
    member = qaa_type()
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name="qaa", config_cls=QAAConfig, model_cls=QAAModel)
        registered = PEFT_TYPE_TO_CONFIG_MAPPING[member]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"QAA could not be entered into the tables of peft {peft.__version__}: {error}"
        ) from error
    if registered is not QAAConfig:
        raise TrainingError(
            f"PEFT's method QAA belongs to {registered.__module__}.{registered.__qualname__} already: "
            "do not import that package together with this one"
        )
    return member
