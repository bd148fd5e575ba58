"""The worker's side of adapters: reading QAA directories, checking every shape, and the step's plan."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import psutil
import torch
import vllm
from packaging.version import Version
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from qaa_serve.adapters import (
    CONFIG_FILE,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    load_adapter,
    misfit,
    read_config,
)
from qaa_serve.circuits import MAX_QUBITS, Ansatz, choose_backend, circuits_of
from qaa_serve.circuits.cpu.serving import CompiledCircuits
from vllm_qaa.delta import Delta, Standard
from vllm_qaa.layers import DELTA_OP, QAALayerMixin, break_graphs_at_delta
from vllm_qaa.memory import device_memory, host_free
from vllm_qaa.plan import NOTHING, CircuitForm, make_plan
from vllm_qaa.planned import CpuDelta, PlanHolder, PlannedDelta
from vllm_qaa.static import Block, StaticDelta
from vllm_qaa.timing import TIMER

_DIGEST = re.compile(r"[0-9a-f]{12,64}")

#: In the names of output heads; vLLM knows them by it too.
OUTPUT_HEAD = "lm_head"

#: How long adapters are taken over between two steps; the one that is begun is ended.
_TAKE_OVER_S = 0.02

#: Where vLLM's expand kernel may be miscompiled for Hopper, and since when it is not.
_HOPPER_RANK, _HOPPER_SAFE = 64, Version("0.33")

#: What vLLM's manager has where it finds the names of an adapter of the text model alone.
_FINDS_TEXT_NAMES = "_get_text_lora_names"

#: In vLLM's additional_config: it reaches every worker, wherever it runs.
BACKEND_KEY = "qaa_backend"
MOST_LAYERS_KEY = "qaa_max_layers"

#: Layers of gates that a module's circuits may have on a GPU, where room is made for them in advance.
MOST_LAYERS = 8

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers hang on the name "vllm"


class QAAModel(LoRAModel):
    """A loaded QAA adapter: angles as 3-D lora_a and B, scale folded in, as lora_b.

    Attributes:
        form: of its circuits.
        standards: what a layer's inputs and readouts are standardised by.
        row: of the block of all circuits, where there is one; its standards are in there.
    """

    def __init__(
        self,
        adapter_id: int,
        rank: int,
        loras: dict[str, LoRALayerWeights],
        form: CircuitForm,
        standards: Mapping[QAALayerMixin, Standard],
        row: torch.Tensor | None = None,
    ):
        super().__init__(adapter_id, rank, loras)
        self.form, self.standards, self.row = form, standards, row


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
        _check_gpu(vllm_config)
        self._context_layers = vllm_config.compilation_config.static_forward_context
        self._dtype = vllm_config.model_config.dtype
        self._bound: list[QAALayerMixin] = []
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._forms: list[CircuitForm | None] = [None] * self.lora_slots
        self._compiled: set[tuple[Ansatz, int, int]] = set()
        self.takes_slots = True
        self._give_deltas(vllm_config)

    def _give_deltas(self, vllm_config: VllmConfig) -> None:
        """Choose the circuits' backend, and with it what adds the updates in each layer."""
        device = torch.device(self.device)
        backend = _choose_circuits(vllm_config, device, self._bound)
        self._plans = PlanHolder(circuits_of(backend))
        self.block: Block | None = None
        if backend == "triton":
            most = int(vllm_config.additional_config.get(MOST_LAYERS_KEY, MOST_LAYERS))
            # Now, before vLLM measures what is left for its KV cache.
            self.block = Block(self._bound, self.lora_slots, self.lora_config.max_lora_rank, most, device)
            logger.info("Room for circuits in %d slots: %.0f MiB", self.lora_slots, self.block.rows.nbytes / 2**20)
            if device.type == "cuda":
                from qaa_serve.circuits.triton.kernel import circuit_kernel

                self.block.compile(circuit_kernel, self._dtype)
        elif device.type != "cpu":
            _split_graphs_at_delta(vllm_config)
        kind = CpuDelta if device.type == "cpu" else PlannedDelta
        for layer in self._bound:
            delta: Delta = kind(layer, self._plans) if self.block is None else StaticDelta(layer, self.block)
            layer.delta = delta

    def _create_lora_modules(self) -> None:
        """As vLLM's, but the output head stays as it is: logits are the base's product, for whichever rows.

        vLLM's layer for it knows the adapters of the rows that are sampled, one each. A prompt's log-probabilities
        are computed from other rows, with the same layer: on a CPU that ends the engine, on a GPU a row gets the
        adapter of another request.

        Raises:
            ValueError: if --lora-target-modules names the head.
        """
        if heads := [name for name in self.lora_config.target_modules or () if OUTPUT_HEAD in name]:
            raise ValueError(
                f"--lora-target-modules has {', '.join(heads)}: LoRA on the output head cannot be served, since "
                "vLLM mixes up requests when one asks for its prompt's log-probabilities. Leave it out"
            )
        others = [name for name in self.supported_lora_modules if OUTPUT_HEAD not in name]
        self.supported_lora_modules = others
        super()._create_lora_modules()
        # vLLM's loader lets a head's weights pass, so that our check can say why they are refused.
        self.supported_lora_modules = [*others, OUTPUT_HEAD]

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
        """As vLLM's: fills a slot. For a QAA adapter the circuits are built here, once.

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
                self._prepare_circuits(self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id])
        except BaseException:
            # In its slot it would pass for active, and its requests be answered by what was filled in so far.
            if lora_id in self.lora_index_to_id:
                self.deactivate_adapter(lora_id)
            raise
        return activated

    def _prepare_circuits(self, slot: int, adapter: LoRAModel) -> None:
        is_qaa = isinstance(adapter, QAAModel)
        self._forms[slot] = adapter.form if is_qaa else None
        if self.block is not None:
            self.block.put(slot, adapter.row if is_qaa else None)
        for layer in self._bound if is_qaa else ():
            layer.prepare_circuits(slot, adapter.form, adapter.standards.get(layer, Standard()))

    def circuit_bytes(self) -> int:
        """Bytes of all slots' circuits, and of what else is kept beside vLLM's stacked tensors."""
        block = 0 if self.block is None else self.block.rows.nbytes
        return block + sum(layer.delta.nbytes for layer in self._bound if layer.delta is not None)

    def compile_circuits(self, form: CircuitForm, runs: Iterable[tuple[int, int, int]]) -> None:
        """Compile what circuits of a form would be compiled for in their first step.

        Args:
            form: the circuits'.
            runs: (qubits, width of x, readouts of a token) of the layers that have such circuits.
        """
        for qubits, width, readouts in runs:
            if (run := (form.ansatz(qubits), width, readouts)) not in self._compiled:
                self._plans.circuits.compile(*run, self._dtype, torch.device(self.device))
                self._compiled.add(run)

    def remove_all_adapters(self) -> None:
        """As vLLM's; no step may use a plan made for slots that are gone."""
        super().remove_all_adapters()
        self._plans.plan = NOTHING

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super()._set_adapter_mapping(mapping)
        if mapping.type == LoRAMappingType.LANGUAGE and self.block is None:
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


class QAAWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads QAA and LoRA adapters in the worker."""

    _manager_cls = QAAModelManager
    _adapter_manager: QAAModelManager

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._staged: dict[int, tuple[LoRARequest, Future[LoRAModel]]] = {}  # of the worker's own thread alone

    def stage(self, request: LoRARequest) -> None:
        """Start to read an adapter beside the engine's steps; `take_over` takes what was read.

        Each in a thread of its own: if its files never come, it keeps no other one waiting, nor the worker's end.
        """
        reading: Future[LoRAModel] = Future()
        self._staged[request.lora_int_id] = request, reading
        Thread(target=self._read_into, args=(reading, request), name="qaa-reader", daemon=True).start()

    def take_over(self, lora_ids: Sequence[int]) -> tuple[list[int | str | None], bool]:
        """Take over adapters that were read, for no longer than running requests can wait.

        Returns:
            for each its bytes of host memory, or why it cannot be had, or None if it is not there yet; and whether
            some were read that wait for the next time.
        """
        end = time.perf_counter() + _TAKE_OVER_S
        answers: list[int | str | None] = []
        goes_on = False
        for lora_id in lora_ids:
            request, reading = self._staged.get(lora_id, (None, None))
            if request is None or reading is None:
                # Another worker is slower; or somebody did not wait for it.
                adapter = self._adapter_manager.get_adapter(lora_id)
                answers.append("it was removed while it was loaded" if adapter is None else _host_bytes(adapter))
            elif not reading.done():
                answers.append(None)
            elif time.perf_counter() > end:
                answers.append(None)
                goes_on = True
            else:
                answers.append(self._take_over(request, reading))
        return answers, goes_on

    def _take_over(self, request: LoRARequest, reading: Future[LoRAModel]) -> int | str:
        try:
            nbytes = _host_bytes(reading.result())
            self.add_adapter(request)
        except Exception as error:
            self._staged.pop(request.lora_int_id, None)
            if not isinstance(error, (AdapterError, ValueError)):
                logger.exception("Loading %s", request.lora_name)
            return str(error) or type(error).__name__
        return nbytes

    def _read_into(self, reading: Future[LoRAModel], request: LoRARequest) -> None:
        torch.set_num_threads(1)  # it would bring OpenMP threads of its own, which take the steps' cores
        try:
            reading.set_result(self._read_adapter(request))
        except BaseException as error:
            reading.set_exception(error)

    def adapter_bytes(self) -> list[tuple[int, int, int]]:
        """(id, bytes in host memory, bytes in its slot or 0) of every adapter here."""
        manager = self._adapter_manager
        slot_bytes = sum(tensor[0].nbytes for tensor in self._slot_tensors())
        slot_bytes += self._own_bytes() // manager.lora_slots
        return [
            (lora_id, _host_bytes(adapter), slot_bytes if lora_id in manager.lora_index_to_id else 0)
            for lora_id, adapter in manager.list_adapters().items()
        ]

    def memory(self, runner: Any) -> dict[str, int]:
        """Bytes by kind; on a CPU `other` is of this process, and `free` of the machine or its container."""
        sizes = {
            "weights": _distinct_bytes([*runner.model.parameters(), *runner.model.buffers()]),
            "kv_cache": _distinct_bytes(runner.kv_caches),
            "adapters": sum(tensor.nbytes for tensor in self._slot_tensors()) + self._own_bytes(),
        }
        device = torch.device(self.device)
        if device.type == "cuda":
            free, used = device_memory(device)
        else:
            free, used = host_free(), psutil.Process().memory_info().rss
        # Pages that were never written are not resident yet, so the parts may sum to more.
        return {**sizes, "other": max(used - sum(sizes.values()), 0), "free": free}

    def _own_bytes(self) -> int:
        return self._adapter_manager.circuit_bytes()

    def _slot_tensors(self) -> Iterator[torch.Tensor]:
        for layer in self._adapter_manager.modules.values():
            if isinstance(layer, QAALayerMixin):
                yield from (*layer.lora_a_stacked, *layer.lora_b_stacked)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """As vLLM's, ahead of any request."""
        self._adapter_manager.takes_slots = False
        try:
            return super().add_adapter(lora_request)
        finally:
            self._adapter_manager.takes_slots = True

    def remove_adapter(self, adapter_id: int) -> bool:
        """As vLLM's; what was read for an adapter that did not come is let go too."""
        self._staged.pop(adapter_id, None)
        return bool(super().remove_adapter(adapter_id))

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """As vLLM's, in an engine step: the adapters of its requests take slots."""
        if len(lora_requests) > self._adapter_manager.lora_slots:
            raise RuntimeError(
                f"{len(lora_requests)} adapters in one step, and {self._adapter_manager.lora_slots} slots"
            )
        manager = self._adapter_manager
        active = {lora_id for lora_id in manager.lora_index_to_id if lora_id is not None}
        # Those in a slot first: they are touched, so that no other one of this step takes their place.
        for request in sorted(lora_requests, key=lambda request: request.lora_int_id not in active):
            # vLLM's own way lists all adapters for each of them, milliseconds where there are thousands.
            if manager.get_adapter(request.lora_int_id) is None or request.load_inplace:
                super().add_adapter(request)
            else:
                manager.activate_adapter(request.lora_int_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        _, staged = self._staged.pop(lora_request.lora_int_id, (None, None))
        return self._read_adapter(lora_request) if staged is None else staged.result()

    def _read_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        directory = Path(get_adapter_absolute_path(lora_request.lora_path))
        # A missing config is left to vLLM, whose error its API server knows how to report.
        if (directory / CONFIG_FILE).is_file() and read_config(directory).get("peft_type") == "QAA":
            return self._load_qaa(lora_request, directory)
        try:
            lora = super()._load_adapter(lora_request)
        except ValueError as error:
            if "max_lora_rank" not in str(error):
                raise
            raise AdapterError(f"{error} Start the server with a larger --max-lora-rank (at most 512)") from error
        self._check_lora(lora)
        return lora

    def _load_qaa(self, request: LoRARequest, directory: Path) -> QAAModel:
        self._refuse_settings(request)
        adapter = load_adapter(directory)
        _, at, digest = request.lora_name.rpartition("@")
        if at and _DIGEST.fullmatch(digest) and not adapter.digest.startswith(digest):
            raise AdapterError(f"its files are not those of {request.lora_name}: they were changed or damaged")
        if adapter.rank > self.lora_config.max_lora_rank:
            raise AdapterError(
                f"the adapter has rank {adapter.rank} (heads x readouts) and the server takes ranks up to "
                f"{self.lora_config.max_lora_rank}: start it with a larger --max-lora-rank (vLLM's limit is 512)"
            )
        config = adapter.config
        form = CircuitForm(config.circuit(MAX_QUBITS), config.heads, config.inputs != "raw", config.whitened)
        loras = {}
        standards: dict[QAALayerMixin, Standard] = {}
        angles: dict[QAALayerMixin, dict[int, torch.Tensor]] = {}
        runs: set[tuple[int, int, int]] = set()  # qubits, width of x, readouts of a token
        for name, weights in adapter.modules.items():
            module = self._adapter_manager.full_name(self._served_name(name))
            # Modules of other pipeline stages are kept too; vLLM takes what is here.
            if (place := self._adapter_manager.find(module)) is not None:
                _check_qaa(name, config, weights, place)
                runs.add((weights.qubits, place.widths()[0], place.layer.n_slices * form.heads))
                standard = standards.get(place.layer, Standard())
                standards[place.layer] = standard.with_module(name, weights, place.part, place.layer.n_slices)
                slices = range(place.layer.n_slices) if place.part is None else [place.part]
                angles.setdefault(place.layer, {}).update(dict.fromkeys(slices, weights.theta))
            b = weights.weight.float() * config.scale(weights.qubits)
            loras[module] = LoRALayerWeights(
                module,
                rank=weights.rank,
                lora_alpha=1,
                lora_a=weights.theta,
                lora_b=b.to(self.lora_config.lora_dtype),
                scaling=1.0,
            )
        if (block := self._adapter_manager.block) is None:
            self._adapter_manager.compile_circuits(form, runs)
            return QAAModel(request.lora_int_id, adapter.rank, loras, form, standards)
        row = block.pack(form, {layer: (of_layer, standards[layer]) for layer, of_layer in angles.items()})
        return QAAModel(request.lora_int_id, adapter.rank, loras, form, {}, row)

    def _refuse_settings(self, request: LoRARequest) -> None:
        """Refuse what would lead round the layers' output hook, or change weights under running requests."""
        refused = {
            "--fully-sharded-loras": self.lora_config.fully_sharded_loras,
            "VLLM_LORA_ENABLE_DUAL_STREAM": envs.VLLM_LORA_ENABLE_DUAL_STREAM,
            "--enable-tower-connector-lora": self.lora_config.enable_tower_connector_lora,
        }
        for setting, on in refused.items():
            if on:
                raise AdapterError(f"QAA adapters cannot be served with {setting}: start the server without it")
        if request.load_inplace:
            raise AdapterError(
                "QAA adapters cannot be loaded with load_inplace, which reads them from disk in every step: load "
                "changed weights under a new name and path"
            )

    @cached_property
    def _renaming(self) -> Any:
        """vLLM's mapper from transformers' names to the model's, None if they are the same."""
        mapper: Any = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        # Newer vLLM: without stacking and deletions.
        return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper

    def _served_name(self, name: str) -> str:
        """A module's name in vLLM's model, from its name in transformers'."""
        if self._renaming is None:
            return name
        mapped: str | None = self._renaming._map_name(f"{name}.weight")
        if mapped is None:
            raise AdapterError(f"vLLM does not load {name!r} of this model, so it cannot be adapted")
        return mapped.removesuffix(".weight")

    def _check_lora(self, lora: LoRAModel) -> None:
        """Refuse LoRA weights whose shapes do not fit: vLLM copies what is there and says nothing."""
        on_cpu = torch.device(self.device).type == "cpu"
        for name, weights in lora.loras.items():
            if OUTPUT_HEAD in name:
                raise AdapterError(
                    f"LoRA on the output head {name!r} cannot be served: vLLM mixes up requests when one asks for "
                    f"its prompt's log-probabilities. Leave {OUTPUT_HEAD!r} out of target_modules and train again"
                )
            if ".experts" in name or not isinstance(weights.lora_a, torch.Tensor):
                continue
            # vLLM finds a text model's shorter names since 0.33; before, it would leave such weights out.
            full = self._adapter_manager.full_name(name) if hasattr(LoRAModelManager, _FINDS_TEXT_NAMES) else name
            place = self._adapter_manager.find(full)
            if place is None or not place.is_one_slice:
                continue
            if not isinstance(place.layer, QAALayerMixin):
                if on_cpu:
                    raise AdapterError(
                        f"LoRA on {name!r} cannot be served on a CPU: vLLM would apply it to requests for the "
                        "base model too. Leave it out of target_modules"
                    )
                continue
            d_in, d_out = place.widths()
            expected = (weights.rank, d_in), (d_out, weights.rank)
            actual = tuple(weights.lora_a.shape), tuple(weights.lora_b.shape)
            if actual != expected:
                raise AdapterError(
                    f"{name!r}: lora_A and lora_B have shapes {actual[0]} and {actual[1]}; the served model needs "
                    f"{expected[0]} and {expected[1]}: the adapter was made for another base"
                )


def _host_bytes(adapter: LoRAModel) -> int:
    parts = [part for weights in adapter.loras.values() for part in (weights.lora_a, weights.lora_b)]
    if isinstance(adapter, QAAModel):
        parts += [part for standard in adapter.standards.values() for part in standard] + [adapter.row]
    return _distinct_bytes(tensor for part in parts for tensor in (part if isinstance(part, list) else [part]))


def _distinct_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each counted once: packed layers and tied weights share theirs."""
    sizes = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor)}
    return sum(sizes.values())


class AdapterRPC:
    """What the server asks workers by `collective_rpc`; mixed into vLLM's worker by --worker-extension-cls."""

    model_runner: Any

    def qaa_load(
        self, new: Sequence[tuple[str, int, str]], lora_ids: Sequence[int]
    ) -> tuple[list[int | str | None], bool]:
        """Start to read (name, id, path) of new adapters in the background, and take over what has been read.

        Returns:
            of each id: bytes of host memory that it takes, a reason why it is not taken, None while it is being
            read; and whether more could be taken over at once.
        """
        manager = self.model_runner.lora_manager
        for name, lora_id, path in new:
            manager.stage(LoRARequest(name, lora_id, path))
        taken: tuple[list[int | str | None], bool] = manager.take_over(lora_ids)
        return taken

    def qaa_memory(self) -> dict[str, int]:
        """Bytes of this worker's memory: weights, kv_cache, adapters (slots), other, free."""
        return self.model_runner.lora_manager.memory(self.model_runner)

    def qaa_circuit_times(self) -> tuple[str, list[float], list[int], float]:
        """(backend, bucket bounds, counts of each bucket and beyond, sum) of sampled circuit times in seconds."""
        return TIMER.snapshot()

    def qaa_adapter_bytes(self) -> list[tuple[int, int, int]]:
        """(id, bytes in host memory, bytes in its slot or 0) of every adapter in this worker."""
        return list(self.model_runner.lora_manager.adapter_bytes())


def _check_qaa(name: str, config: AdapterConfig, weights: ModuleWeights, place: Place) -> None:
    """Refuse QAA weights that the layer cannot take."""
    if not isinstance(place.layer, QAALayerMixin):
        raise AdapterError(
            f"{name!r} is served by {type(place.layer).__name__}, which cannot take a QAA adapter: embeddings, "
            "output heads, MoE experts and fully sharded layers are not supported"
        )
    if place.layer.delta is None:
        raise AdapterError(
            f"{name!r} is outside the language model: towers and connectors of multimodal models cannot take QAA "
            "adapters. Leave it out of target_modules"
        )
    if not place.is_one_slice:
        raise AdapterError(
            f"{name!r} is one of {place.parts} modules that vLLM packs in a layer of {place.layer.n_slices} "
            "slices; such layers cannot take QAA adapters. Leave it out of target_modules"
        )
    d_in, d_out = place.widths()
    if problem := misfit(weights, config.qubits(d_in), d_in, d_out):
        raise AdapterError(
            f"{name!r} is {d_in} -> {d_out} in the served model, {problem}: it was made for another base"
        )


def _check_gpu(vllm_config: VllmConfig) -> None:
    """Refuse on a GPU what vLLM's LoRA kernels answer with an assertion, or wrongly.

    Raises:
        ValueError: names the option to change.
    """
    if vllm_config.device_config.device_type != "cuda":
        return
    dtype = vllm_config.model_config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"on a GPU adapters need 16-bit numbers, which vLLM's LoRA kernels take alone, found {dtype}: start "
            "with --dtype bfloat16"
        )
    rank = vllm_config.lora_config.max_lora_rank
    if (
        rank >= _HOPPER_RANK
        and torch.cuda.get_device_capability()[0] == 9
        and Version(vllm.__version__) < _HOPPER_SAFE
    ):
        raise ValueError(
            f"--max-lora-rank {rank} is not safe on this GPU with vLLM {vllm.__version__}: its expand kernel may "
            f"be compiled wrongly for Hopper from rank {_HOPPER_RANK} on: take less, or vLLM {_HOPPER_SAFE}"
        )


def _choose_circuits(vllm_config: VllmConfig, device: torch.device, layers: Sequence[QAALayerMixin]) -> str:
    """The circuits' backend that --qaa-backend names, or `qaa_backend` in vLLM's --additional-config.

    Raises:
        ValueError: if it cannot run here, or not in these layers.
    """
    asked = vllm_config.additional_config.get(BACKEND_KEY, "auto")
    shapes = {(layer.full_widths()[0], layer.n_slices) for layer in layers}
    name, reason = choose_backend(asked, device, sorted(shapes))
    if vllm_config.parallel_config.world_size > 1:
        # Each rank has timed for itself; with unlike backends they would gather x at unlike times, and hang.
        name, reason = get_world_group().broadcast_object((name, reason))
    logger.info("QAA circuits run on the backend %r (%s)", name, reason)
    TIMER.backend = name
    if circuits_of(name) is CompiledCircuits:
        logger.info("Compiling the circuits for this CPU, unless that was done before: up to a minute")
        begun = time.perf_counter()
        any_form = Ansatz("ryrz_ring_ry", 1, 1)  # one code serves all
        CompiledCircuits.compile(any_form, 2, 1, vllm_config.model_config.dtype, device)
        logger.info("Compiled for this CPU, or found compiled, in %.1f s", time.perf_counter() - begun)
    return name


def _split_graphs_at_delta(vllm_config: VllmConfig) -> None:
    """Keep a planned delta out of CUDA graphs: which tokens it touches is decided in Python, step by step.

    Between the splits vLLM's piecewise graphs are captured as ever; models that vLLM does not compile break out of
    a capture where they can. Written from vLLM's source; it has not been run on a GPU.
    """
    config = vllm_config.compilation_config
    if config.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    if config.mode == CompilationMode.VLLM_COMPILE and config.splitting_ops:
        if DELTA_OP not in config.splitting_ops:
            config.splitting_ops.append(DELTA_OP)
        mode = CUDAGraphMode.PIECEWISE
    else:
        mode = CUDAGraphMode.PIECEWISE if break_graphs_at_delta() else CUDAGraphMode.NONE
    if config.cudagraph_mode != mode:
        logger.warning(
            "CUDA graph mode set from %s to %s: QAA circuits run between graphs",
            config.cudagraph_mode.name,
            mode.name,
        )
        config.cudagraph_mode = mode
