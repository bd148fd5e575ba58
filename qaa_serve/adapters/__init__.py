"""QAA adapters on disk: load, save, validate, digest."""

from qaa_serve.adapters.base import LinearWidths, linear_widths
from qaa_serve.adapters.config import QAA_FORMAT, AdapterConfig
from qaa_serve.adapters.errors import AdapterError
from qaa_serve.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    ModuleWeights,
    check_fit,
    check_lora,
    copy_adapter,
    digest_of,
    load_adapter,
    matches,
    read_config,
    resolve_base,
    save_adapter,
)
from qaa_serve.adapters.staging import staged

__all__ = [
    "CONFIG_FILE",
    "QAA_FORMAT",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "LinearWidths",
    "ModuleWeights",
    "check_fit",
    "check_lora",
    "copy_adapter",
    "digest_of",
    "linear_widths",
    "load_adapter",
    "matches",
    "read_config",
    "resolve_base",
    "save_adapter",
    "staged",
]
