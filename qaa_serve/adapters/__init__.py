"""QAA adapters on disk: load, save, validate, digest."""

from qaa_serve.adapters.base import LinearWidths, linear_widths
from qaa_serve.adapters.config import QAA_FORMAT, AdapterConfig, Inputs
from qaa_serve.adapters.errors import AdapterError, Kind, only_refusals, shown
from qaa_serve.adapters.files import (
    CONFIG_FILE,
    DIGEST_PATTERN,
    WEIGHTS_FILE,
    Adapter,
    ModuleWeights,
    TensorInfo,
    check_fit,
    copy_adapter,
    digest_of,
    load_adapter,
    matches,
    misfit,
    parse_adapter,
    parse_config,
    read_config,
    read_file,
    read_header,
    resolve_base,
    save_adapter,
)
from qaa_serve.adapters.lora import MAX_RANK, SERVED_RANK, Lora, LoraConfig, LoraPair, check_lora
from qaa_serve.adapters.staging import staged
from qaa_serve.adapters.vectors import signs, signs_between
from qaa_serve.adapters.verdict import MAX_ADAPTER_BYTES, Sound, judge

__all__ = [
    "CONFIG_FILE",
    "DIGEST_PATTERN",
    "MAX_ADAPTER_BYTES",
    "MAX_RANK",
    "QAA_FORMAT",
    "SERVED_RANK",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "Inputs",
    "Kind",
    "LinearWidths",
    "Lora",
    "LoraConfig",
    "LoraPair",
    "ModuleWeights",
    "Sound",
    "TensorInfo",
    "check_fit",
    "check_lora",
    "copy_adapter",
    "digest_of",
    "judge",
    "linear_widths",
    "load_adapter",
    "matches",
    "misfit",
    "only_refusals",
    "parse_adapter",
    "parse_config",
    "read_config",
    "read_file",
    "read_header",
    "resolve_base",
    "save_adapter",
    "shown",
    "signs",
    "signs_between",
    "staged",
]
