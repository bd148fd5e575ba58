"""Adapters in a worker: read beside the engine's steps, checked against the model, taken over; their memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import psutil
import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from qaa_serve.adapters import (
    CONFIG_FILE,
    DIGEST_PATTERN,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    misfit,
    parse_adapter,
    parse_config,
    read_file,
)
from qaa_serve.circuits import MAX_QUBITS
from vllm_qaa.delta import LayerCircuits, Standard
from vllm_qaa.layers import QAALayerMixin
from vllm_qaa.manager import Place, QAAModel, QAAModelManager
from vllm_qaa.memory import host_free
from vllm_qaa.plan import CircuitForm
from vllm_qaa.timing import TIMER

#: How long adapters are taken over between two steps; the one that is begun is ended.
_TAKE_OVER_S = 0.02

#: How long an adapter waits for its turn to be prepared.
_TURN_S = 1.0

#: What vLLM's manager has where it finds the names of an adapter of the text model alone.
_FINDS_TEXT_NAMES = "_get_text_lora_names"

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers hang on the name "vllm"


class QAAWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads QAA and LoRA adapters in the worker."""

    _manager_cls = QAAModelManager
    _adapter_manager: QAAModelManager

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._staged: dict[int, tuple[LoRARequest, Future[LoRAModel]]] = {}  # of the worker's own thread alone
        self._preparing = Lock()

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
        # Or it would bring OpenMP threads of its own, which take the steps' cores. (What torch.set_num_threads is;
        # vLLM's CPU worker puts there what only complains.)
        torch._C.set_num_threads(1)
        try:
            reading.set_result(self._read_adapter(request))
        except BaseException as error:
            reading.set_exception(error)

    def adapter_bytes(self) -> list[tuple[int, int, int]]:
        """(id, bytes in host memory, bytes in its slot or 0) of every adapter here."""
        manager = self._adapter_manager
        slot_bytes = self._slots_bytes() // manager.lora_slots
        return [
            (lora_id, _host_bytes(adapter), slot_bytes if lora_id in manager.lora_index_to_id else 0)
            for lora_id, adapter in manager.list_adapters().items()
        ]

    def memory(self, runner: Any) -> dict[str, int]:
        """Bytes by kind; on a CPU `other` is of this process, and `free` of the machine or its container."""
        sizes = {
            "weights": _distinct_bytes([*runner.model.parameters(), *runner.model.buffers()]),
            "kv_cache": _distinct_bytes(runner.kv_caches),
            "adapters": self._slots_bytes(),
        }
        device = torch.device(self.device)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)  # over all processes on it
            used = total - free
        else:
            free, used = host_free(), psutil.Process().memory_info().rss
        # Pages that were never written are not resident yet, so the parts may sum to more.
        return {**sizes, "other": max(used - sum(sizes.values()), 0), "free": free}

    def _slots_bytes(self) -> int:
        """Of all slots: vLLM's stacked tensors, and what circuits take beside them."""
        layers = (layer for layer in self._adapter_manager.modules.values() if isinstance(layer, QAALayerMixin))
        stacked = sum(t.nbytes for layer in layers for t in (*layer.lora_a_stacked, *layer.lora_b_stacked))
        return stacked + self._adapter_manager.circuit_bytes()

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
        config = read_file(directory, CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else b"{}"
        if parse_config(config).get("peft_type") == "QAA":
            self._refuse_settings(lora_request)
            weights = read_file(directory, WEIGHTS_FILE)
            with self._turn():
                return self._make_qaa(lora_request, parse_adapter(config, weights))
        with self._turn():
            return self._load_lora(lora_request)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Prepare one adapter at a time: it is Python's work, and many at once would leave the steps no time.

        One that reads and does not come to an end keeps the others waiting for a second each, no longer.
        """
        taken = self._preparing.acquire(timeout=_TURN_S)
        try:
            yield
        finally:
            if taken:
                self._preparing.release()

    def _load_lora(self, request: LoRARequest) -> LoRAModel:
        try:
            lora = super()._load_adapter(request)
        except ValueError as error:
            if "max_lora_rank" not in str(error):
                raise
            raise AdapterError(f"{error} Start the server with a larger --max-lora-rank (at most 512)") from error
        self._check_lora(lora)
        return lora

    def _make_qaa(self, request: LoRARequest, adapter: Adapter) -> QAAModel:
        _, at, digest = request.lora_name.rpartition("@")
        if at and DIGEST_PATTERN.fullmatch(digest) and not adapter.digest.startswith(digest):
            raise AdapterError(f"its files are not those of {request.lora_name}: they were changed or damaged")
        if adapter.rank > self.lora_config.max_lora_rank:
            raise AdapterError(
                f"the adapter has rank {adapter.rank} (heads x readouts) and the server takes ranks up to "
                f"{self.lora_config.max_lora_rank}: start it with a larger --max-lora-rank (vLLM's limit is 512)"
            )
        config = adapter.config
        form = CircuitForm(config.circuit(MAX_QUBITS), config.heads, config.inputs != "raw", config.whitened)
        loras = {}
        circuits: dict[QAALayerMixin, LayerCircuits] = {}
        no_a = torch.empty(0, 0, dtype=self.lora_config.lora_dtype)
        for (name, weights), b in zip(adapter.modules.items(), self._scaled(adapter), strict=True):
            module = self._adapter_manager.full_name(self._served_name(name))
            # Modules of other pipeline stages are kept too; vLLM takes what is here.
            if (place := self._adapter_manager.find(module)) is not None:
                _check_qaa(name, config, weights, place)
                slices = range(place.layer.n_slices) if place.part is None else [place.part]
                angles, standard = circuits.get(place.layer, LayerCircuits({}, Standard()))
                angles |= dict.fromkeys(slices, weights.theta)
                standard = standard.with_module(name, weights, place.part, place.layer.n_slices)
                circuits[place.layer] = LayerCircuits(angles, standard)
            loras[module] = LoRALayerWeights(module, weights.rank, 1, no_a, b, scaling=1.0)
        packed = self._adapter_manager.circuits.pack(form, circuits)
        return QAAModel(request.lora_int_id, adapter.rank, loras, form, packed)

    def _scaled(self, adapter: Adapter) -> list[torch.Tensor]:
        """B of each module times its scale, (d_out, rank) in the slots' dtype; all in one piece of host memory."""
        matrices = [module.weight for module in adapter.modules.values()]
        sizes = [matrix.numel() for matrix in matrices]
        scale = cache(adapter.config.scale)
        scales = torch.tensor([scale(module.qubits) for module in adapter.modules.values()])
        factors = scales.repeat_interleave(torch.tensor(sizes))
        # Pinned for a GPU: vLLM would do it when the adapter is taken over, between two steps.
        pinned = torch.device(self.device).type == "cuda"
        whole = torch.empty(sum(sizes), dtype=self.lora_config.lora_dtype, pin_memory=pinned)
        whole.copy_(torch.cat([matrix.flatten() for matrix in matrices]).float() * factors)
        parts = whole.split(sizes)
        return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]

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
            if reason := self._adapter_manager.refusal(name):
                raise AdapterError(f"{reason}. Leave it out of target_modules and train again")
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
    nbytes = _distinct_bytes(tensor for part in parts for tensor in (part if isinstance(part, list) else [part]))
    return nbytes + (adapter.packed.nbytes if isinstance(adapter, QAAModel) else 0)


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

    def qaa_circuits_backend(self) -> tuple[str, dict[str, float]]:
        """The backend that circuits run on, and the seconds of each that was timed for the choice."""
        choice = self.model_runner.lora_manager._adapter_manager.backend
        return choice.name, choice.seconds

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
