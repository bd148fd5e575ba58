"""Whether an adapter directory can be served: one judgement, for the server and for ``qaa-serve inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qaa_serve.adapters.base import LinearWidths
from qaa_serve.adapters.errors import AdapterError, only_refusals, shown
from qaa_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter, read_config
from qaa_serve.adapters.lora import MAX_RANK, Lora, check_lora

#: Where nobody has set a limit. A server's is --max-adapter-bytes.
MAX_ADAPTER_BYTES = 16 << 30


@dataclass(frozen=True)
class Sound:
    """What an adapter that can be served is.

    Attributes:
        kind: QAA or LORA.
        content: all of it.
        rank: the largest over its layers; the server's largest must not be below it.
        base: the base model it names, as written; empty if it names none.
        details: for people: the ansatz, layers, ... or r and alpha, and the targets as written.
        notes: what a reader should know besides, a sentence each.
    """

    kind: Literal["QAA", "LORA"]
    content: Adapter | Lora
    rank: int
    base: str
    details: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of its two files."""
        return self.content.digest


@only_refusals(f"{CONFIG_FILE} or {WEIGHTS_FILE}")
def judge(directory: Path, *, base: LinearWidths | None = None, max_bytes: int = MAX_ADAPTER_BYTES) -> Sound:
    """Read an adapter, QAA or LoRA, and check all that can be checked without the engine that will load it.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        base: the base model's linear layers, which it must fit; None leaves that to the engine.
        max_bytes: of adapter_model.safetensors: a larger one is refused before it is read.

    Raises:
        AdapterError: if it cannot be served, and for whatever goes wrong while it is read.
    """
    raw = read_config(directory)
    kind, targets = raw.get("peft_type"), raw.get("target_modules")
    if kind == "LORA":
        lora = check_lora(directory, base, max_bytes=max_bytes)
        details = {"r": lora.config.r, "lora_alpha": lora.config.lora_alpha, "target_modules": targets}
        named = lora.config.base_model_name_or_path or ""
        return Sound("LORA", lora, lora.config.rank, named, details, lora.notes)
    if kind != "QAA":
        raise AdapterError(f"{CONFIG_FILE} has peft_type {shown(kind)}; QAA and LORA adapters can be served")
    adapter = load_adapter(directory, base, max_bytes=max_bytes)
    if adapter.rank > MAX_RANK:
        raise AdapterError(
            f"{CONFIG_FILE}: the adapter has rank {adapter.rank} (heads x readouts) and vLLM takes up to "
            f"{MAX_RANK}: train with fewer heads or readouts"
        )
    details = {key: getattr(adapter.config, key) for key in ("ansatz", "layers", "heads", "alpha")}
    details["target_modules"] = targets
    return Sound("QAA", adapter, adapter.rank, adapter.config.base_model_name_or_path, details)
