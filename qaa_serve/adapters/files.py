"""A QAA adapter on disk: a directory with adapter_config.json and adapter_model.safetensors.

Nothing here needs an engine, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from qaa_serve.adapters.base import LinearWidths
from qaa_serve.adapters.config import AdapterConfig
from qaa_serve.adapters.errors import AdapterError
from qaa_serve.adapters.staging import staged

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 1 << 20
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.qaa_(?P<kind>theta|weight)")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_UNADAPTABLE = re.compile(
    r"(^|\.)(lm_head|embed_out|embed_tokens|embed_positions|word_embeddings|wte|wpe|experts)(\.|$)"
)


@dataclass(frozen=True)
class ModuleWeights:
    """One adapted linear layer.

    Attributes:
        theta: (heads, rows, n) float32 angles.
        weight: (d_out, heads * n), B of the formula.
    """

    theta: torch.Tensor
    weight: torch.Tensor

    @property
    def qubits(self) -> int:
        """Number of qubits n of its circuits."""
        return self.theta.shape[-1]


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: its config, its layers by module name, and the digest of its two files."""

    config: AdapterConfig
    modules: Mapping[str, ModuleWeights]
    digest: str

    @property
    def rank(self) -> int:
        """The largest rank (heads * n) over the layers; the server's max rank must not be below it."""
        return max(module.weight.shape[1] for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(m.theta.nbytes + m.weight.nbytes for m in self.modules.values())


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed adapter_config.json of any PEFT adapter directory, QAA or not.

    Raises:
        AdapterError: if it is missing, unreadable, too large, not JSON or no object.
    """
    raw = _read(directory, CONFIG_FILE, limit=_MAX_CONFIG_BYTES)
    return _parse_config(raw)


def digest_of(directory: Path) -> str:
    """SHA-256, in hex, that identifies an adapter by its content.

    Taken over the SHA-256 of adapter_config.json followed by that of adapter_model.safetensors.

    Raises:
        AdapterError: if a file is missing, unreadable or leaves the directory.
    """
    parts = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with _open(directory, name) as file, _readable(name):
            parts.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def copy_adapter(source: Path, target: Path, *, max_bytes: int) -> None:
    """Copy an adapter's two files, and nothing else, into a directory that exists.

    What is read is what was checked: links are resolved once, must stay inside ``source``, and must lead to
    regular files; a file that grows while it is read is refused.

    Args:
        source: the adapter's directory.
        target: where to.
        max_bytes: for adapter_model.safetensors.

    Raises:
        AdapterError: if a file is missing, unreadable, too large, no regular file or leaves the directory.
        OSError: if ``target`` cannot be written.
    """
    for name, limit in ((CONFIG_FILE, _MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes)):
        with (target / name).open("wb") as copy:
            left = limit
            with _open(source, name, limit) as file:
                while chunk := _read_chunk(file, name):
                    left -= len(chunk)
                    if left < 0:
                        raise AdapterError(f"{name} grew beyond {limit:,} bytes while it was read")
                    copy.write(chunk)


def load_adapter(directory: str | Path, base: LinearWidths | None = None) -> Adapter:
    """Read and validate a QAA adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        base: the base model's linear layers (``linear_widths``); None checks all but the fit to a base.

    Raises:
        AdapterError: for anything that is wrong with it.
    """
    directory = Path(directory)
    config_bytes, weight_bytes = _read(directory, CONFIG_FILE, _MAX_CONFIG_BYTES), _read(directory, WEIGHTS_FILE)
    config = AdapterConfig.parse(_parse_config(config_bytes))
    modules = _modules(config, _parse_weights(weight_bytes))
    if base is not None:
        check_fit(config, modules, base)
    return Adapter(config, modules, _digest(config_bytes, weight_bytes))


def check_lora(directory: Path) -> str:
    """Check the weights of a LoRA adapter as far as they can be judged without the engine that loads them.

    Returns:
        the adapter's digest.

    Raises:
        AdapterError: if the file is damaged or empty, or holds values that are NaN or infinite.
    """
    config_bytes, weight_bytes = _read(directory, CONFIG_FILE, _MAX_CONFIG_BYTES), _read(directory, WEIGHTS_FILE)
    tensors = _parse_weights(weight_bytes)
    if not tensors:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensors")
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    return _digest(config_bytes, weight_bytes)


def save_adapter(
    directory: str | Path,
    config: AdapterConfig,
    modules: Mapping[str, ModuleWeights],
    *,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter: beside its place first, then by a rename, so that nobody sees half of it.

    Args:
        directory: where; must not exist, or be empty, unless ``overwrite``. A link is followed.
        config: what adapter_config.json is to say.
        modules: module name -> weights.
        extra_files: further text files (name -> text), such as a model card.
        overwrite: replace a directory that is there. It is moved aside and comes back if that fails; for a
            moment between the two renames there is none.

    Raises:
        AdapterError: if the weights do not fit the config.
        FileExistsError: if there is something already.
        ValueError: if an extra file's name is not a plain one, or is one of the adapter's own.
    """
    texts = {CONFIG_FILE: json.dumps(config.to_json(), indent=2) + "\n"}
    for name, text in (extra_files or {}).items():
        if Path(name).name != name or name in ("", "..", CONFIG_FILE, WEIGHTS_FILE):
            raise ValueError(f"extra file {name!r}: a plain file name that is not the adapter's own is needed")
        texts[name] = text
    tensors = {}
    for name, module in modules.items():
        if module.theta.ndim != 3 or len(module.theta) != config.heads:
            raise AdapterError(
                f"{name}: theta has shape {tuple(module.theta.shape)}; (heads, rows, n) with {config.heads} "
                "heads is needed"
            )
        theta = module.theta if config.heads > 1 else module.theta[0]
        prefix = f"base_model.model.{name}"
        # Copies: safetensors refuses tensors that share memory, as modules with equal weights may.
        tensors[f"{prefix}.qaa_theta"] = _owned(theta.float())
        tensors[f"{prefix}.qaa_weight"] = _owned(module.weight)
    _modules(config, tensors)
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is not a directory; choose another output")
    if directory.exists() and not overwrite and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists; choose another output or allow overwriting")
    with staged(directory) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")


def resolve_base(directory: Path, name_or_path: str) -> str:
    """The base model an adapter names: a path relative to the adapter's directory if it is one, or as is."""
    relative = directory / name_or_path
    return str(relative.resolve()) if os.path.isdir(relative) else name_or_path  # never raises, unlike is_dir


def matches(module: str, targets: tuple[str, ...]) -> bool:
    """Whether PEFT's rule takes a module: its whole name, or its end after a dot, is among the targets."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


_RESAVE = "save the adapter as safetensors and try again"


def _locate(directory: Path, name: str) -> Path:
    """The real path of one of the two files; links must stay inside the directory."""
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory")
    path = directory / name
    if not path.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if name == WEIGHTS_FILE and pickles:
            raise AdapterError(
                f"{WEIGHTS_FILE} is missing and {pickles[0]} is a pickle, which is never read: {_RESAVE}"
            )
        kind = "no regular file" if os.path.lexists(path) else "missing"
        raise AdapterError(f"{name} is {kind}; an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    real = path.resolve()
    if not real.is_relative_to(directory.resolve()):
        raise AdapterError(f"{name} is a link that leaves the adapter's directory: copy the file into it")
    return real


@contextmanager
def _open(directory: Path, name: str, limit: int | None = None) -> Iterator[BufferedReader]:
    """One of the two files, checked to be a regular one of at most ``limit`` bytes."""
    with _readable(name):
        # Never blocks, as opening a FIFO would; the resolved path has no link left in its last part.
        descriptor = os.open(_locate(directory, name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{name} is no regular file")
        if limit is not None and status.st_size > limit:
            raise AdapterError(f"{name} has {status.st_size:,} bytes; at most {limit:,} are read")
        yield file


def _read_chunk(file: BufferedReader, name: str) -> bytes:
    with _readable(name):
        return file.read(1 << 20)


def _read(directory: Path, name: str, limit: int | None = None) -> bytes:
    with _open(directory, name, limit) as file, _readable(name):
        return file.read()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{name} cannot be read: {error.strerror or error}; check its permissions") from error


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _parse_config(raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} holds a JSON {type(config).__name__}, not an object")
    return config


def _parse_weights(raw: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(raw)
    except Exception as error:  # SafetensorError, and whatever its conversion to torch stumbles over
        if raw[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise AdapterError(f"{WEIGHTS_FILE} is a pickle file, which is never read: {_RESAVE}") from error
        raise AdapterError(
            f"{WEIGHTS_FILE} is damaged or no safetensors file: {error!s:.200}; copy or save it again"
        ) from error
    return tensors


def _digest(config_bytes: bytes, weight_bytes: bytes) -> str:
    parts = (hashlib.sha256(raw).digest() for raw in (config_bytes, weight_bytes))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise AdapterError(f"{name} has {int((~finite).sum())} values that are NaN or infinite")


def _modules(config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, ModuleWeights]:
    """Check names, dtypes, shapes and values; needs no base."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):  # safetensors gives them in no fixed order
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"tensor {name!r} does not belong in a QAA adapter; names are "
                "base_model.model.<module>.qaa_theta and .qaa_weight"
            )
        pairs.setdefault(match["module"], {})[match["kind"]] = tensor
    for target in config.target_modules:
        if not any(matches(module, (target,)) for module in pairs):
            raise AdapterError(f"target module {target!r} has no tensors in {WEIGHTS_FILE}")
    modules = {}
    for module, pair in pairs.items():
        if not matches(module, config.target_modules):
            raise AdapterError(
                f"{WEIGHTS_FILE} adapts {module!r}, which is not among the target_modules "
                f"{list(config.target_modules)}"
            )
        if _UNADAPTABLE.search(module):
            raise AdapterError(
                f"{module!r} cannot be adapted: embeddings, output heads and MoE experts are not supported"
            )
        for kind in ("theta", "weight"):
            if kind not in pair:
                raise AdapterError(f"tensor base_model.model.{module}.qaa_{kind} is missing")
        modules[module] = _module(config, module, pair["theta"], pair["weight"])
    return modules


def _module(config: AdapterConfig, module: str, theta: torch.Tensor, weight: torch.Tensor) -> ModuleWeights:
    if theta.dtype != torch.float32:
        raise AdapterError(f"{module}.qaa_theta has dtype {theta.dtype}; torch.float32 is needed")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise AdapterError(f"{module}.qaa_weight has dtype {weight.dtype}; one of {_WEIGHT_DTYPES} is needed")
    qubits = theta.shape[-1] if theta.ndim else 0
    try:
        shape = config.circuit(qubits).theta_shape
    except ValueError as error:
        raise AdapterError(f"{module}.qaa_theta has shape {tuple(theta.shape)}: {error}") from error
    expected = shape if config.heads == 1 else (config.heads, *shape)
    if tuple(theta.shape) != expected:
        raise AdapterError(
            f"{module}.qaa_theta has shape {tuple(theta.shape)}; {expected} is needed for ansatz "
            f"{config.ansatz!r} with {config.layers} layers, {config.heads} heads and {qubits} qubits"
        )
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != config.rank(qubits):
        raise AdapterError(
            f"{module}.qaa_weight has shape {tuple(weight.shape)}; (d_out, {config.rank(qubits)}) is needed"
        )
    _check_finite(f"{module}.qaa_theta", theta)
    _check_finite(f"{module}.qaa_weight", weight)
    return ModuleWeights(theta.reshape(config.heads, *shape), weight)


def check_fit(config: AdapterConfig, modules: Mapping[str, ModuleWeights], base: LinearWidths) -> None:
    """Check an adapter against a base model's linear layers.

    Raises:
        AdapterError: for modules the base lacks, other widths, or targeted layers without tensors.
    """
    for module, weights in modules.items():
        if module not in base:
            near = sorted({name.rpartition(".")[2] for name in base})
            raise AdapterError(
                f"the base model has no linear layer {module!r} (its layers end in {', '.join(near)}): "
                f"the adapter was made for another base, {config.base_model_name_or_path!r}"
            )
        d_in, d_out = base[module]
        try:
            qubits = config.qubits(d_in)
        except ValueError as error:
            raise AdapterError(f"{module!r} of the base model cannot be adapted: {error}") from error
        if weights.qubits != qubits or weights.weight.shape[0] != d_out:
            raise AdapterError(
                f"{module!r} is {d_in} -> {d_out} in the base model, which needs {qubits} qubits and {d_out} "
                f"rows of qaa_weight; the adapter has {weights.qubits} and {weights.weight.shape[0]}: it was "
                f"made for another base, {config.base_model_name_or_path!r}"
            )
    for module in base:
        if matches(module, config.target_modules) and module not in modules:
            raise AdapterError(f"tensors for {module!r} are missing, which target_modules names")
