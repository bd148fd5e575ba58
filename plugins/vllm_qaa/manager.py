"""The worker's adapters in slots: where a module is in vLLM's model, what fills a slot, and the step's plan."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.model_executor.models.utils import PPMissingLayer

from qaa_serve.adapters import AdapterError
from qaa_serve.circuits import circuits_of
from vllm_qaa.backend import MOST_LAYERS, MOST_LAYERS_KEY, check_gpu, choose_circuits, split_graphs_at_delta
from vllm_qaa.delta import CircuitStore
from vllm_qaa.layers import QAALayerMixin
from vllm_qaa.plan import NOTHING, CircuitForm, make_plan
from vllm_qaa.planned import CpuDelta, PlanHolder, PlannedCircuits, PlannedDelta
from vllm_qaa.static import Block, StaticDelta

#: In the names of output heads; vLLM knows them by it too.
OUTPUT_HEAD = "lm_head"

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers hang on the name "vllm"


class QAAModel(LoRAModel):
    """A loaded QAA adapter: B, scale folded in, as lora_b, lora_a of no rows, and the circuits beside them.

    Attributes:
        form: of its circuits.
        packed: its circuits, as the store packs them.
    """

    def __init__(
        self, adapter_id: int, rank: int, loras: dict[str, LoRALayerWeights], form: CircuitForm, packed: Any
    ):
        super().__init__(adapter_id, rank, loras)
        self.form, self.packed = form, packed


class Place(NamedTuple):
    """Where a module of the checkpoint is in vLLM's model.

    Attributes:
        layer: the wrapped layer that holds it.
        part: its number among the modules packed in that layer; None if it is the whole layer.
        parts: how many modules are packed there.
    """

    layer: Any
    part: int | None = None
    parts: int = 1

    @property
    def is_one_slice(self) -> bool:
        """Whether the module is the whole layer, or one of the slices that the layer's output is cut into."""
        return self.part is None or self.layer.n_slices == self.parts

    def widths(self) -> tuple[int, int]:
        """(d_in, d_out) of the module before tensor parallelism cuts it."""
        d_in, d_out = self.layer.full_widths()
        return d_in, sum(d_out) if self.part is None else d_out[self.part]


class QAAModelManager(LRUCacheLoRAModelManager):
    """vLLM's slots and host cache, with a plan of each step's tokens."""

    supported_lora_modules: list[str]

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any):
        check_gpu(vllm_config)
        self._context_layers = vllm_config.compilation_config.static_forward_context
        self._dtype = vllm_config.model_config.dtype
        self._bound: list[QAALayerMixin] = []
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._forms: list[CircuitForm | None] = [None] * self.lora_slots
        self.takes_slots = True
        self._give_deltas(vllm_config)

    def _give_deltas(self, vllm_config: VllmConfig) -> None:
        """Choose the circuits' backend, and with it what adds the updates in each layer."""
        device = torch.device(self.device)
        self.backend = choose_circuits(vllm_config, device, self._bound)
        circuits = circuits_of(self.backend.name)
        self._plans = PlanHolder(circuits)
        self.circuits: CircuitStore
        if self.backend.name == "triton":
            most = int(vllm_config.additional_config.get(MOST_LAYERS_KEY, MOST_LAYERS))
            # Now, before vLLM measures what is left for its KV cache.
            block = Block(self._bound, self.lora_slots, self.lora_config.max_lora_rank, most, device)
            logger.info("Room for circuits in %d slots: %.0f MiB", self.lora_slots, block.nbytes / 2**20)
            if device.type == "cuda":
                from qaa_serve.circuits.triton.kernel import circuit_kernel

                block.compile(circuit_kernel, self._dtype)
            self.circuits = block
            for layer in self._bound:
                layer.delta = StaticDelta(layer, block)
            return
        if device.type != "cpu":
            split_graphs_at_delta(vllm_config)
        self.circuits = PlannedCircuits(circuits)
        kind = CpuDelta if device.type == "cpu" else PlannedDelta
        for layer in self._bound:
            layer.delta = kind(layer, self._plans)

    def _create_lora_modules(self) -> None:
        """As vLLM's, but what no adapter may change stays as it is: the output head, and on a CPU embeddings.

        vLLM's layer for the head knows the adapters of the rows that are sampled, one each. A prompt's
        log-probabilities are computed from other rows, with the same layer: on a CPU that ends the engine, on a
        GPU a row gets the adapter of another request. Its layer for embeddings takes the last slot's adapter on a
        CPU, for tokens that have none.

        Raises:
            ValueError: if --lora-target-modules names one of them.
        """
        for name in self.lora_config.target_modules or ():
            if reason := self.refusal(name):
                raise ValueError(f"--lora-target-modules has {name}: {reason}. Leave it out")
        all_modules = self.supported_lora_modules
        self.supported_lora_modules = [name for name in all_modules if not self.refusal(name)]
        super()._create_lora_modules()
        # vLLM's loader lets their weights pass, so that our check can say why they are refused.
        self.supported_lora_modules = sorted({*all_modules, OUTPUT_HEAD})

    @cached_property
    def _embeddings(self) -> frozenset[str]:
        """Last parts of the names that vLLM has for the model's embeddings."""
        modules = self.model.modules()
        return frozenset(name for module in modules for name in getattr(module, "embedding_modules", None) or ())

    def refusal(self, module: str) -> str | None:
        """Why no LoRA adapter may change a module of that name; None if one may."""
        if OUTPUT_HEAD in module:
            return (
                f"LoRA on the output head {module!r} cannot be served, since vLLM mixes up requests when one asks "
                "for its prompt's log-probabilities"
            )
        if torch.device(self.device).type == "cpu" and module.rpartition(".")[2] in self._embeddings:
            return f"LoRA on {module!r} cannot be served on a CPU, where vLLM would apply it to the base model too"
        return None

    def register_module(self, module_name: str, module: Any) -> None:
        """As vLLM's, and gives a layer of the language model its name and the plan.

        Towers of multimodal models run on other tokens than those the plan is for; they keep vLLM's branch.
        """
        super().register_module(module_name, module)
        language = self.mm_mapping.language_model[0] if self.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        in_language_model = self._get_punica_wrapper(module_name) is self.punica_wrapper_mapping[language]
        if isinstance(module, QAALayerMixin) and in_language_model:
            module.qaa_name = f"{module_name}.qaa"
            self._context_layers[module.qaa_name] = module
            self._bound.append(module)

    def activate_adapter(self, lora_id: int) -> bool:
        """As vLLM's: fills a slot.

        An adapter that is loaded ahead of its requests takes no slot that another one is in. (A LoRA adapter
        does, as in vLLM: what is wrong with one may show only here, and must not show in a step.)
        """
        is_qaa = isinstance(self._registered_adapters[lora_id], QAAModel)
        if is_qaa and not self.takes_slots and None not in self.lora_index_to_id:
            return False
        try:
            activated = super().activate_adapter(lora_id)
            if activated:
                self._last_mapping = None  # a slot has changed: the next step makes a new plan
                self._put_circuits(self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id])
        except BaseException:
            # In its slot it would pass for active, and its requests be answered by what was filled in so far.
            if lora_id in self.lora_index_to_id:
                self.deactivate_adapter(lora_id)
            raise
        return activated

    def _put_circuits(self, slot: int, adapter: LoRAModel) -> None:
        is_qaa = isinstance(adapter, QAAModel)
        self._forms[slot] = adapter.form if is_qaa else None
        self.circuits.put(slot, adapter.packed if is_qaa else None)

    def circuit_bytes(self) -> int:
        """Bytes of all slots' circuits, and of what else is kept beside vLLM's stacked tensors."""
        return self.circuits.nbytes + sum(layer.delta.nbytes for layer in self._bound if layer.delta is not None)

    def remove_all_adapters(self) -> None:
        """As vLLM's; no step may use a plan made for slots that are gone."""
        super().remove_all_adapters()
        self._plans.plan = NOTHING

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super()._set_adapter_mapping(mapping)
        if mapping.type == LoRAMappingType.LANGUAGE and not isinstance(self.circuits, Block):
            self._plans.plan = make_plan(
                mapping.index_mapping, self.lora_index_to_id, self._forms, torch.device(self.device)
            )

    def full_name(self, module: str) -> str:
        """A module's name here, which in a multimodal model is longer than in the text model that it holds."""
        if not self.supports_mm:
            return module
        known = {*self.modules, *(part for parts in self.packed_modules.values() for part in parts)}
        prefix = self.mm_mapping.language_model[0].rstrip(".")
        candidates = (module, f"{prefix}.{module}", f"{prefix}.{module.removeprefix('model.')}")
        return next((name for name in candidates if name in known), module)

    def find(self, module: str) -> Place | None:
        """Where a module of the checkpoint is; None if it is on another pipeline stage.

        Raises:
            AdapterError: if the model has no such module, or it cannot be adapted.
        """
        if module in self.modules:
            return Place(self.modules[module])
        for packed, parts in self.packed_modules.items():
            if module in parts:
                return Place(self.modules[packed], parts.index(module), len(parts))
        if self._on_other_stage(module):
            return None
        known = sorted({name.rpartition(".")[2] for parts in self.packed_modules.values() for name in parts})
        known += sorted({name.rpartition(".")[2] for name in self.modules} - set(self.packed_modules_mapping))
        raise AdapterError(
            f"the served model has no adaptable layer {module!r}; its adaptable layers end in {', '.join(known)}"
        )

    def _on_other_stage(self, module: str) -> bool:
        here = self.model
        for part in module.split("."):
            here = getattr(here, part, None)
            if here is None or isinstance(here, PPMissingLayer):
                return here is not None
        return False
