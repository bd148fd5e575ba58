"""Norms of a base model's layers, read one tensor at a time from its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

#: Anything else is quantised, and means nothing without its scales.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def frobenius_norms(base: str, modules: Iterable[str]) -> tuple[dict[str, float], str | None]:
    """||W||_F of the named layers.

    Args:
        base: a directory, or a name whose files are in the Hugging Face cache; nothing is downloaded.
        modules: full module names.

    Returns:
        module -> norm for those that were found, and what a reader should know if some were not.
    """
    wanted = list(modules)
    directory = _directory(base)
    if directory is None:
        return {}, f"the weights of {base} are not on this machine: norms relative to the base are left out"
    norms = {}
    try:
        files = {path: _stems(path) for path in sorted(directory.glob("*.safetensors"))}
        for module in wanted:
            for path, stems in files.items():
                stem = _find(module, stems)
                if stem is None:
                    continue
                with safe_open(path, framework="pt") as file:
                    weight = file.get_tensor(f"{stem}.weight")
                if weight.ndim == 2 and weight.dtype in _DTYPES:
                    norms[module] = float(torch.linalg.matrix_norm(weight.float()))
                break
    except (OSError, SafetensorError) as error:
        return {}, f"the weights of {base} cannot be read ({error}): norms relative to the base are left out"
    missing = len(wanted) - len(norms)
    if missing:
        return norms, f"{missing} of {len(wanted)} layers have no plain weight in the safetensors files of {base}"
    return norms, None


def _directory(base: str) -> Path | None:
    if Path(base).is_dir():
        return Path(base)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return None
    for name in ("model.safetensors.index.json", "model.safetensors"):
        try:
            found = try_to_load_from_cache(base, name)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _stems(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118


def _find(module: str, stems: set[str]) -> str | None:
    """The tensor of a module: some files leave out or add a prefix such as "model."."""
    if module in stems:
        return module
    near = [stem for stem in stems if module.endswith(f".{stem}") or stem.endswith(f".{module}")]
    return near[0] if len(near) == 1 else None
