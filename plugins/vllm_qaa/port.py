"""Where vLLM is touched: module globals that name classes are pointed at subclasses of those classes.

No method is replaced. Every seam is checked first, on the class that is there, and either all of the plugin's are
changed or none. The server's are changed while it makes its engine and its app, by `replaced`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from packaging.version import Version

#: The range in which the seams below were read; 0.32 is what the tests run (docs/plugin.md, Versions).
MIN_VERSION, END_VERSION = Version("0.26"), Version("0.34")

#: Since when the slots of adapters are kept through a sleep of level 2, which throws the weights' memory away.
SLOTS_SLEEP = Version("0.33")

#: Functions that vLLM has moved, and the modules in which they were, the newest first.
MOVED = {
    "make_arg_parser": ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"),
    "validate_parsed_serve_args": ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"),
    "cli_env_setup": ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils"),
}


class UnsupportedVLLMError(RuntimeError):
    """This vLLM differs from those the plugin was written for."""


@dataclass(frozen=True)
class Seam:
    """One global of vLLM that is given another value.

    Attributes:
        module: the module whose global it is.
        attribute: the global's name.
        methods: what the new value relies on, as "Class.method" in `module` -> parameter names.
        why: what the change is for.
        until: when it can be dropped.
        replace: old value -> new value; None where the server has the new value.
        cpu_only: whether it is for CPUs; elsewhere it is neither checked nor changed.
    """

    module: str
    attribute: str
    methods: Mapping[str, tuple[str, ...]]
    why: str
    until: str
    replace: Callable[[Any], Any] | None = None
    cpu_only: bool = False


def _qaa_layers(classes: tuple[type, ...]) -> tuple[type, ...]:
    from vllm_qaa.layers import qaa_subclass

    return tuple(map(qaa_subclass, classes))


def _subclass(module: str, name: str) -> Callable[[type], type]:
    """What replaces a class by one of ours, which must be a subclass of it."""

    def replace(original: type) -> type:
        ours: type = getattr(import_module(module), name)
        if not issubclass(ours, original):
            raise UnsupportedVLLMError(f"{original} is not the class that {module}.{name} extends")
        return ours

    return replace


def _as_written(compiled: Any) -> Any:
    """The function that torch.compile was given."""
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


SEAMS = (
    Seam(
        module="vllm.lora.utils",
        attribute="_all_lora_classes",
        replace=_qaa_layers,
        methods={
            "ColumnParallelLinearWithLoRA._apply_lora_to_output": ("self", "x", "output"),
            "ColumnParallelLinearWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
            "ColumnParallelLinearWithLoRA.reset_lora": ("self", "index"),
            "ColumnParallelLinearWithLoRA.create_lora_weights": (
                "self",
                "max_loras",
                "lora_config",
                "model_config",
            ),
            "MergedColumnParallelLinearWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
            "RowParallelLinearWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
            "from_layer": ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"),
        },
        why="from_layer() wraps a linear layer in the first of these classes that fits; the QAA subclasses add "
        "B z to the layer's output and group a CPU batch's LoRA tokens by slot",
        until="vLLM lets a plugin register adapter layer classes",
    ),
    Seam(
        module="vllm.v1.worker.lora_model_runner_mixin",
        attribute="LRUCacheWorkerLoRAManager",
        replace=_subclass("vllm_qaa.worker", "QAAWorkerManager"),
        methods={
            "LRUCacheWorkerLoRAManager._load_adapter": ("self", "lora_request"),
            "LRUCacheWorkerLoRAManager.create_lora_manager": ("self", "model", "vllm_config"),
            "LRUCacheWorkerLoRAManager.add_adapter": ("self", "lora_request"),
            "LRUCacheWorkerLoRAManager._apply_adapters": ("self", "lora_requests"),
            "LRUCacheWorkerLoRAManager._manager_cls._create_lora_modules": ("self",),
            "LRUCacheWorkerLoRAManager._manager_cls._set_adapter_mapping": ("self", "mapping"),
            "LRUCacheWorkerLoRAManager._manager_cls.activate_adapter": ("self", "lora_id"),
            "LRUCacheWorkerLoRAManager._manager_cls.register_module": ("self", "module_name", "module"),
            "LRUCacheWorkerLoRAManager._manager_cls.remove_all_adapters": ("self",),
            "LRUCacheWorkerLoRAManager._manager_cls._get_punica_wrapper": ("self", "module_name"),
        },
        why="its _load_adapter reads QAA directories, which vLLM's loader refuses, and checks every shape; its "
        "manager class works out, once a step, which tokens belong to which adapter, and leaves output heads as "
        "they are",
        until="vLLM lets a plugin register an adapter type with a loader of its own",
    ),
    Seam(
        module="vllm.v1.worker.cpu_worker",
        attribute="CPUModelRunner",
        replace=_subclass("vllm_qaa.cpu_runner", "SeededCPUModelRunner"),
        methods={"CPUModelRunner.sample_tokens": ("self", "grammar_output")},
        why="on a CPU a request with a seed whose prompt runs in parts ends the engine: a CPU's generator cannot "
        "be set back by what was drawn for a part; the subclass draws nothing for it",
        until="vLLM's runner does so itself",
        cpu_only=True,
    ),
    Seam(
        module="vllm.v1.sample.sampler",
        attribute="batched_count_greater_than",
        replace=_as_written,
        methods={"batched_count_greater_than": ("x", "values")},
        why="vLLM compiles it when the first request asks for logprobs, and all requests wait for the compiler: "
        "34 s in a new container; on a CPU the function runs as it is written",
        until="vLLM compiles it at start, or not on a CPU",
        cpu_only=True,
    ),
)

#: Changed by the server alone, while it makes its engine and its app.
SERVER_SEAMS = (
    Seam(
        module="vllm.entrypoints.launchers.api_server.app_state",
        attribute="OpenAIServingModels",
        methods={
            "OpenAIServingModels": ("engine_client", "base_model_paths", "lora_modules"),
            "OpenAIServingModels.is_base_model": ("self", "model_name"),
            "OpenAIServingModels.model_name": ("self", "lora_request"),
            "OpenAIServingModels.show_available_models": ("self",),
        },
        why="the app's list of models is the catalogue: a request finds the one adapter that is held for it",
        until="vLLM's app takes a list of models that it is given",
    ),
    Seam(
        module="vllm.v1.engine.async_llm",
        attribute="OutputProcessor",
        methods={"OutputProcessor.do_tracing": ("self", "engine_core_output", "req_state", "iteration_stats")},
        why="with --otlp-traces-endpoint: a request's span names its adapter and its revision",
        until="vLLM's spans name the adapter",
    ),
)

_applied: list[tuple[str, str, Any]] = []  # module and global, with the value vLLM had


def apply() -> None:
    """Check all seams, then change all of them; does nothing if that is done already.

    Raises:
        UnsupportedVLLMError: naming every difference found.
    """
    if _applied:
        return
    from vllm.platforms import current_platform
    from vllm.version import __version__ as version

    check_version(version)
    seams = [seam for seam in SEAMS if current_platform.is_cpu() or not seam.cpu_only]
    problems = [problem for seam in seams for problem in check_seam(seam)]
    _refuse("the QAA plugin", version, problems)
    replacements = [
        (seam, seam.replace(getattr(import_module(seam.module), seam.attribute)))
        for seam in seams
        if seam.replace is not None
    ]
    for seam, replacement in replacements:
        _set(seam.module, seam.attribute, replacement)
    _let_llvmlite_be_looked_at()
    _read_loras_without_remains()


def check_server() -> None:
    """Check what the server is going to change.

    Raises:
        UnsupportedVLLMError: naming every difference found.
    """
    from vllm.version import __version__ as version

    _refuse("qaa-serve", version, [problem for seam in SERVER_SEAMS for problem in check_seam(seam)])


def _refuse(what: str, version: str, problems: list[str]) -> None:
    if problems:
        raise UnsupportedVLLMError(
            f"{what} does not fit vLLM {version}: {'; '.join(problems)}. "
            "Install a vLLM that this qaa-serve was tested with, or uninstall qaa-serve"
        )


@contextmanager
def replaced(attribute: str, value: Any) -> Iterator[None]:
    """Give one of the globals of SERVER_SEAMS another value until the context ends."""
    seam = next(seam for seam in SERVER_SEAMS if seam.attribute == attribute)
    module = import_module(seam.module)
    original = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, original)


def moved(name: str) -> Any:
    """One of the functions of MOVED, from where this vLLM has it.

    Raises:
        ImportError: naming every module that was looked at.
    """
    for place in MOVED[name]:
        try:
            module = import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise  # vLLM's module is there, what it imports is not
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"vLLM has {name} in none of {', '.join(MOVED[name])}")


def _set(module: str, attribute: str, value: Any) -> None:
    _applied.append((module, attribute, getattr(import_module(module), attribute)))
    setattr(import_module(module), attribute, value)


def _let_llvmlite_be_looked_at() -> None:
    """Have llvmlite's library object say that it has no attributes of its own.

    When a CPU worker starts, vLLM 0.32 asks every object of every loaded module for its `__dict__`. llvmlite's
    makes a C function of whatever name it is asked for, and the worker ends. numba, which the compiled circuits
    need, loads llvmlite; vLLM does too where it speculates with n-grams.
    """
    try:
        ffi = import_module("llvmlite.binding.ffi")
    except ImportError:
        return
    table = getattr(ffi.lib, "_fntab", None)
    if isinstance(table, dict):
        table["__dict__"] = {}


def _read_loras_without_remains() -> None:
    """Have vLLM's loader of LoRA adapters read by our `weights_file`: safetensors leaves objects behind."""
    from vllm_qaa.weights_file import SAFETENSORS

    if hasattr(import_module("vllm.lora.lora_model"), "safetensors"):
        _set("vllm.lora.lora_model", "safetensors", SAFETENSORS)


def undo() -> None:
    """Give vLLM its own classes back (for comparisons; engines that exist keep what they have)."""
    while _applied:
        module, attribute, value = _applied.pop()
        setattr(import_module(module), attribute, value)


def check_version(version: str) -> None:
    """Raise UnsupportedVLLMError for a version of vLLM outside the supported range."""
    # A development build's version says nothing sure; the signatures are checked all the same.
    release = Version(Version(version).base_version)
    if not MIN_VERSION <= release < END_VERSION:
        raise UnsupportedVLLMError(
            f"the QAA plugin supports vllm>={MIN_VERSION},<{END_VERSION}; found vLLM {version}. "
            "Install a supported vLLM, or uninstall qaa-serve"
        )


def check_seam(seam: Seam) -> list[str]:
    """What about a seam differs from what the plugin expects; empty if all is well."""
    try:
        module = import_module(seam.module)
    except ImportError as error:
        return [f"{seam.module} cannot be imported ({error})"]
    if not hasattr(module, seam.attribute):
        return [f"{seam.module} has no {seam.attribute}"]
    problems = []
    for path, expected in seam.methods.items():
        target: Any = module
        for part in path.split("."):
            target = getattr(target, part, None)
        if target is None:
            problems.append(f"{seam.module} has no {path}")
            continue
        problems += check_parameters(
            f"{seam.module}.{path}", tuple(inspect.signature(target).parameters), expected
        )
    return problems


def check_parameters(path: str, found: tuple[str, ...], expected: tuple[str, ...]) -> list[str]:
    """What about a function's parameters differs; more may follow those that are expected."""
    return [] if found[: len(expected)] == expected else [f"{path} takes {found}, expected {expected}"]


def ledger() -> str:
    """The patch table as Markdown, as docs/plugin.md has it."""

    def row(seam: Seam, by: str) -> str:
        return f"| `{seam.module}.{seam.attribute}` | {by} | {seam.why} | {seam.until} |"

    rows = [row(seam, "plugin, on a CPU" if seam.cpu_only else "plugin") for seam in SEAMS]
    rows += [row(seam, "server") for seam in SERVER_SEAMS]
    return "\n".join(["| what is replaced | by | why | until |", "|---|---|---|---|", *rows])
