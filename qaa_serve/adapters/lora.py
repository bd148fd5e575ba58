"""A LoRA adapter on disk, as PEFT writes it: what vLLM can serve of it, and what it would serve wrongly.

The tensors say which layers are adapted. What the config says of how those were chosen, initialised or trained
changes nothing: exclude_modules, layers_to_transform, lora_dropout, fan_in_fan_out, megatron_config, ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from qaa_serve.adapters.base import LinearWidths
from qaa_serve.adapters.config import MAX_ALPHA, problems_of
from qaa_serve.adapters.errors import AdapterError, shown
from qaa_serve.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    check_finite,
    digest_from,
    header_of,
    parse_config,
    parse_weights,
    read_file,
)

#: The largest rank that vLLM has room for (its MaxLoRARanks), whatever --max-lora-rank says.
MAX_RANK = 512

#: The largest rank that a server takes without --max-lora-rank.
SERVED_RANK = 32

#: Keys that change what an adapter computes, or its base, in a way that vLLM refuses or, worse, ignores.
_UNSERVED = {
    "use_dora": "vLLM has no DoRA; train with use_dora false",
    "use_qalora": "vLLM has no QALoRA; train with use_qalora false",
    "use_bdlora": "vLLM has no block-diagonal LoRA; train without it",
    "alora_invocation_tokens": "vLLM has no activated LoRA (aLoRA); train without it",
    "arrow_config": "vLLM does not route between adapters; serve them one by one",
    "kasa_config": "KaSA changes the base's weights and adds a diagonal, which vLLM ignores; train without it",
    "lora_bias": "vLLM has no bias in lora_B; train with lora_bias false",
    "layer_replication": "vLLM serves the base with the layers it has; train without it",
    "trainable_token_indices": "vLLM does not change single tokens' embeddings; train without it",
}
#: init_lora_weights that leave the base as it is; all others (pissa, olora, corda, loftq) take a part out of it.
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
#: All that vLLM takes of modules_to_save: heads of classification models.
_HEADS = ("classifier", "score")

_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<kind>[AB])\.weight|embedding_(?P<table>[AB]))"
)
_HEAD_NAME = re.compile(rf"(?:.+\.)?(?P<head>{'|'.join(_HEADS)})\.(?:weight|bias)")
#: Written beside adapted embeddings, since the vocabulary may have grown; vLLM passes over them.
_BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_DTYPES = ("F32", "BF16", "F16", "F64")


class LoraConfig(BaseModel):
    """What counts of PEFT's adapter_config.json: dW = scale * B A, scale = alpha / rank or alpha / sqrt(rank).

    Other keys are passed over: every version of PEFT adds some.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    #: As it is written: names, a regular expression, or all-linear.
    target_modules: tuple[str, ...] | str | None
    r: int
    lora_alpha: int | float
    use_rslora: bool | None = None
    #: Ranks and alphas of their own, by a regular expression for the end of a module's name.
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, int | float] = {}
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str | None = True
    modules_to_save: tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool | None = None

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        if names is None or isinstance(names, str):
            return names
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
        raise ValueError("a list of names, a regular expression or all-linear is needed")

    @field_validator("r", mode="before")
    @classmethod
    def _rank(cls, r: Any) -> int:
        if type(r) is int and 1 <= r <= MAX_RANK:
            return r
        raise ValueError(f"a positive integer r is needed, {MAX_RANK} or less, which is vLLM's largest rank")

    @field_validator("lora_alpha", mode="before")
    @classmethod
    def _alpha(cls, alpha: Any) -> int | float:
        if type(alpha) in (int, float) and abs(alpha) <= MAX_ALPHA:
            number: int | float = alpha
            return number
        raise ValueError(f"a number is needed, {MAX_ALPHA:g} or less")

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _pattern(cls, pattern: Any, info: Any) -> Any:
        if pattern is None:
            return {}
        if not isinstance(pattern, dict):
            raise ValueError("an object is needed, of numbers by module name")
        for key, value in pattern.items():
            try:
                (cls._rank if info.field_name == "rank_pattern" else cls._alpha)(value)
                re.compile(f"({key})")
            except (ValueError, re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{shown(key)} is {shown(value)}: {error}") from error
            # vLLM and PEFT search with it, and some searches take longer than anybody waits.
            if len(key) > 256 or re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > 3:
                raise ValueError(f"{shown(key)} is no name that is simple to search for: write modules' names")
        return pattern

    @field_validator("init_lora_weights", mode="after")
    @classmethod
    def _leaves_the_base(cls, init: bool | str | None) -> bool | str | None:
        if isinstance(init, str) and init.lower() not in _INITS:
            raise ValueError(
                f"only {', '.join(_INITS)}, true and false leave the base's weights as they are; save the adapter "
                "with PEFT's path_initial_model_for_weight_conversion"
            )
        return init

    @field_validator("modules_to_save", "target_parameters", mode="before")
    @classmethod
    def _whole_modules(cls, names: Any, info: Any) -> Any:
        saved = info.field_name == "modules_to_save"
        if not names:
            return None
        if isinstance(names, list) and all(
            isinstance(name, str) and (name in _HEADS if saved else "experts" in name) for name in names
        ):
            return tuple(names)
        if saved:
            raise ValueError(f"vLLM serves no whole modules but {' and '.join(_HEADS)}; train without it")
        raise ValueError("vLLM serves parameters of MoE experts alone; name linear layers in target_modules")

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> LoraConfig:
        """Check the parsed JSON of an adapter_config.json.

        Raises:
            AdapterError: names every key that vLLM cannot serve, with what was found and what to do.
        """
        problems = [
            f"{key}: {why}, found {shown(raw[key])}"
            for key, why in _UNSERVED.items()
            if raw.get(key) not in (None, False, [])
        ]
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            problems += problems_of(error)
        if problems:
            raise AdapterError(f"{CONFIG_FILE} of this LoRA adapter cannot be served: {'; '.join(problems)}")
        return config

    @property
    def rank(self) -> int:
        """The largest rank; the server's largest must not be below it."""
        return max([self.r, *self.rank_pattern.values()])

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the checkpoint."""
        return int(_first(self.rank_pattern, module, self.r))

    def scale_of(self, module: str) -> float:
        """The factor on B A."""
        rank = self.rank_of(module)
        return _first(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _first(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the module's name or its end after a dot: PEFT's rule, and vLLM's."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer: dW = scale * B A.

    Attributes:
        a: (rank, d_in).
        b: (d_out, rank).
        scale: of the update.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter that was checked.

    Attributes:
        config: what counts of its config.
        modules: its layers by module name.
        other: tensors that are no pairs of matrices: of MoE experts, classification heads, embeddings.
        digest: of its two files.
        notes: what a reader should know besides, a sentence each.
    """

    config: LoraConfig
    modules: Mapping[str, LoraPair]
    other: Mapping[str, torch.Tensor]
    digest: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pairs = sum(pair.a.nbytes + pair.b.nbytes for pair in self.modules.values())
        return pairs + sum(tensor.nbytes for tensor in self.other.values())


def check_lora(directory: Path, base: LinearWidths | None = None, *, max_bytes: int | None = None) -> Lora:
    """Read and validate a LoRA adapter as far as it can be judged without the engine that loads it.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        base: the base model's linear layers; None checks all but the fit to a base.
        max_bytes: of adapter_model.safetensors: a larger one is refused before it is read; None sets no limit.

    Raises:
        AdapterError: for anything that vLLM would refuse, or serve as something else than was trained.
    """
    config_bytes = read_file(directory, CONFIG_FILE)
    config = LoraConfig.parse(parse_config(config_bytes))
    weight_bytes = read_file(directory, WEIGHTS_FILE, max_bytes)
    pairs, other = _sorted_names(config, header_of(weight_bytes))
    for module, pair in pairs.items():
        _check_pair(config, module, pair, base)
    tensors = parse_weights(weight_bytes)
    check_finite(tensors)
    notes = [
        f"{WEIGHTS_FILE} holds {name}: vLLM passes over it and takes the base model's own"
        for name in other
        if name.endswith(_BASE_EMBEDDINGS)
    ]
    modules = {}
    for module, pair in pairs.items():
        a, b = (tensors[pair[kind][0]] for kind in "AB")
        if a.ndim == b.ndim == 2:
            modules[module] = LoraPair(a, b, config.scale_of(module))
        else:
            other += [pair["A"][0], pair["B"][0]]
    return Lora(
        config,
        modules,
        {name: tensors[name] for name in other},
        digest_from(config_bytes, weight_bytes),
        tuple(notes),
    )


def _sorted_names(
    config: LoraConfig, infos: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, tuple[str, TensorInfo]]], list[str]]:
    """Modules with the tensors of their A and B, and the names of other tensors that may be there."""
    pairs: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    other = []
    for name, info in sorted(infos.items()):
        if info.dtype not in _DTYPES:
            raise AdapterError(
                f"{WEIGHTS_FILE}: {shown(name)} has dtype {info.dtype}; one of {', '.join(_DTYPES)} is needed: "
                "save the adapter in its full precision"
            )
        if 0 in info.shape:
            raise AdapterError(f"{WEIGHTS_FILE}: {shown(name)} is empty, its shape is {shown(list(info.shape))}")
        head = _HEAD_NAME.fullmatch(name)
        if name.endswith(_BASE_EMBEDDINGS) or (head and head["head"] in (config.modules_to_save or ())):
            other.append(name)
            continue
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or len(name) > 256:
            raise AdapterError(
                f"{WEIGHTS_FILE}: tensor {shown(name)} is none that vLLM serves; names are "
                "base_model.model.<module>.lora_A.weight and .lora_B.weight: leave out of the training what made "
                "it, and embeddings out of the file (PEFT's save_embedding_layers=False)"
            )
        pair = pairs.setdefault(match["module"], {})
        kind = match["kind"] or match["table"]
        if kind in pair:
            raise AdapterError(f"{WEIGHTS_FILE}: {shown(name)} is there twice, with other names before or behind")
        pair[kind] = name, info
    if not pairs:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensors of a LoRA adapter; save the adapter again with PEFT")
    return pairs, other


def _check_pair(
    config: LoraConfig, module: str, pair: Mapping[str, tuple[str, TensorInfo]], base: LinearWidths | None
) -> None:
    where = f"{WEIGHTS_FILE}: {module:.200}"
    if "lm_head" in module:
        raise AdapterError(
            f"{where}: LoRA on the output head cannot be served: vLLM mixes up requests when one asks for its "
            "prompt's log-probabilities. Leave 'lm_head' out of target_modules and train again"
        )
    if config.ensure_weight_tying and "lora_embedding" in next(iter(pair.values()))[0]:
        raise AdapterError(
            f"{where}: the output head is tied to these embeddings (ensure_weight_tying), and LoRA on it "
            "cannot be served. Leave the embeddings out of target_modules and train again"
        )
    for kind in "AB":
        if kind not in pair:
            raise AdapterError(f"{where}: lora_{kind} is missing")
    if ".experts" in f".{module}":
        return  # one tensor for all experts, or one each, in several layouts: the engine knows the model
    a, b = pair["A"][1].shape, pair["B"][1].shape
    rank = config.rank_of(module)
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
        raise AdapterError(
            f"{where}: lora_A has shape {shown(a)} and lora_B {shown(b)}; (rank, d_in) and (d_out, rank) are "
            f"needed, of rank {rank} as {CONFIG_FILE} has it"
        )
    if base is not None:
        _check_fit(config, module, (a[1], b[0]), base)


def _check_fit(config: LoraConfig, module: str, widths: tuple[int, int], base: LinearWidths) -> None:
    """Refuse what the base has in other widths, or in other layers only, which vLLM passes over.

    Other names are left to the engine, which knows more of them.
    """
    of = f"the adapter was made for another base, {shown(config.base_model_name_or_path)}"
    if module not in base:
        numbers = re.compile(r"\b\d+\b")
        if numbers.sub("", module) in {numbers.sub("", name) for name in base}:
            raise AdapterError(
                f"{WEIGHTS_FILE}: the base model has no layer {shown(module)}, but others like it: {of}"
            )
    elif base[module] != widths:
        needed, found = (" -> ".join(map(str, pair)) for pair in (base[module], widths))
        raise AdapterError(f"{WEIGHTS_FILE}: {shown(module)} is {needed} in the base model and {found} here: {of}")
