"""A QAA adapter on disk: a directory with adapter_config.json and adapter_model.safetensors.

Nothing here needs an engine, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from io import BufferedIOBase, BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from qaa_serve.adapters.base import LinearWidths
from qaa_serve.adapters.config import AdapterConfig
from qaa_serve.adapters.errors import AdapterError, shown
from qaa_serve.adapters.staging import staged
from qaa_serve.adapters.vectors import signs_between

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: As much of a digest as names a revision.
DIGEST_PATTERN = re.compile("[0-9a-f]{12,64}")

_MAX_CONFIG_BYTES = 1 << 20
#: Of safetensors files; names and shapes of some hundred thousand tensors.
_MAX_HEADER_BYTES = 1 << 26
#: Bytes of a number, by safetensors' name of its type. Others are left to the library.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8), **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2), **dict.fromkeys(("BOOL", "I8", "U8"), 1),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2"), 1),
}  # fmt: skip
_VECTORS = ("lambda_b", "lambda_d")
_TRAINED = ("theta", "weight", *_VECTORS)
_KINDS = (*_TRAINED, "inputs", "readouts")
_TENSOR_NAME = re.compile(rf"base_model\.model\.(?P<module>.+)\.qaa_(?P<kind>{'|'.join(_KINDS)})")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_UNADAPTABLE = re.compile(
    r"(^|\.)(lm_head|embed_out|embed_tokens|embed_positions|word_embeddings|wte|wpe|experts)(\.|$)"
)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors file's header says of a tensor: its type by safetensors' name, such as F32, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleWeights:
    """One adapted linear layer.

    Attributes:
        theta: (heads, rows, n) float32 angles.
        b: B of the formula, (d_out, rank) with rank = heads * readouts; or what it is made of, lambda_b (d_out,)
            and lambda_d (rank,) float32.
        inputs: (2, d_in) float32, offset and scale of each channel of x; None for raw ones.
        readouts: (2, rank) float32, offset and scale of each of z; None unless whitened.
    """

    theta: torch.Tensor
    b: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    inputs: torch.Tensor | None = None
    readouts: torch.Tensor | None = None

    @cached_property
    def weight(self) -> torch.Tensor:
        """B, (d_out, rank). Made when it is asked for: vectors of a small file may stand for a huge matrix."""
        return self.b if isinstance(self.b, torch.Tensor) else signs_between(*self.b)

    @property
    def d_out(self) -> int:
        """The layer's outputs."""
        return len(self.b[0] if isinstance(self.b, tuple) else self.b)

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b[1].shape[0] if isinstance(self.b, tuple) else self.b.shape[1]

    @property
    def trained(self) -> int:
        """How many numbers a training changes."""
        return sum(self.tensors[kind].numel() for kind in _TRAINED if kind in self.tensors)

    @property
    def qubits(self) -> int:
        """Number of qubits n of its circuits."""
        return self.theta.shape[-1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by what follows ``qaa_`` in their names on disk."""
        b = {"weight": self.b} if isinstance(self.b, torch.Tensor) else dict(zip(_VECTORS, self.b, strict=True))
        found = {"theta": self.theta, **b, "inputs": self.inputs, "readouts": self.readouts}
        return {kind: tensor for kind, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: its config, its layers by module name, and the digest of its two files."""

    config: AdapterConfig
    modules: Mapping[str, ModuleWeights]
    digest: str

    @property
    def rank(self) -> int:
        """The largest rank (heads * n) over the layers; the server's max rank must not be below it."""
        return max(module.rank for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for module in self.modules.values() for tensor in module.tensors.values())


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed adapter_config.json of any PEFT adapter directory, QAA or not.

    Raises:
        AdapterError: if it is missing, unreadable, too large, not JSON or no object.
    """
    return parse_config(read_file(directory, CONFIG_FILE))


def digest_of(directory: Path, *, max_bytes: int | None = None) -> str:
    """SHA-256, in hex, that identifies an adapter by its content.

    Taken over the SHA-256 of adapter_config.json followed by that of adapter_model.safetensors, which may have
    ``max_bytes``.

    Raises:
        AdapterError: if a file is missing, unreadable, too large or leaves the directory.
    """
    parts = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with _open(directory, name, max_bytes) as file, _readable(name):
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


def load_adapter(
    directory: str | Path, base: LinearWidths | None = None, *, max_bytes: int | None = None
) -> Adapter:
    """Read and validate a QAA adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        base: the base model's linear layers (``linear_widths``); None checks all but the fit to a base.
        max_bytes: of adapter_model.safetensors: a larger one is refused before it is read; None sets no limit.

    Raises:
        AdapterError: for anything that is wrong with it.
    """
    directory = Path(directory)
    return parse_adapter(read_file(directory, CONFIG_FILE), read_file(directory, WEIGHTS_FILE, max_bytes), base)


def parse_adapter(config_bytes: bytes, weight_bytes: bytes, base: LinearWidths | None = None) -> Adapter:
    """As `load_adapter`, of what ``read_file`` gave."""
    config = AdapterConfig.parse(parse_config(config_bytes))
    modules = _modules(config, parse_weights(weight_bytes))
    if base is not None:
        check_fit(config, modules, base)
    return Adapter(config, modules, digest_from(config_bytes, weight_bytes))


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
        for kind, tensor in module.tensors.items():
            if kind != "weight":
                tensor = tensor.float()
            if kind == "theta" and config.heads == 1:
                tensor = tensor[0]
            # A copy: safetensors refuses tensors that share memory, as modules with equal weights may.
            tensors[f"base_model.model.{name}.qaa_{kind}"] = _owned(tensor)
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
    found = name_or_path and os.path.isdir(relative)  # never raises, unlike is_dir
    return str(relative.resolve()) if found else name_or_path


def matches(module: str, targets: tuple[str, ...]) -> bool:
    """Whether PEFT's rule takes a module: its whole name, or its end after a dot, is among the targets."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


_RESAVE = "save the adapter as safetensors and try again"


def _locate(directory: Path, name: str) -> Path:
    """The real path of one of the two files; links must stay inside the directory, or the hub's repository.

    The Hugging Face hub's cache keeps a repository as models--ORG--NAME, with its files in blobs/ and links to
    them in snapshots/COMMIT/: all of it comes from that one repository.
    """
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
    home = directory.resolve()
    for place in home.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            home = place.parent if (place.parent / "blobs").is_dir() else home
    if not real.is_relative_to(home):
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


def read_file(directory: Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of one of the two files.

    Args:
        directory: the adapter's.
        name: CONFIG_FILE or WEIGHTS_FILE.
        limit: of the weights' bytes: a larger file is refused unread, and so is one whose header does not fit it.

    Raises:
        AdapterError: if it is missing, unreadable, too large or leaves the directory.
    """
    with _open(directory, name, _MAX_CONFIG_BYTES if name == CONFIG_FILE else limit) as file, _readable(name):
        size = os.fstat(file.fileno()).st_size
        if name == WEIGHTS_FILE:
            _header(file, size)
            file.seek(0)
        return file.read(size)  # and no more, if it grows


def read_header(directory: Path) -> dict[str, TensorInfo]:
    """Name, type and shape of the tensors in a directory's weights, whatever they are; no tensor is read.

    Raises:
        AdapterError: if the file is missing, unreadable, no safetensors file, or leaves the directory.
    """
    with _open(directory, WEIGHTS_FILE) as file, _readable(WEIGHTS_FILE):
        return _header(file, os.fstat(file.fileno()).st_size)


def header_of(raw: bytes) -> dict[str, TensorInfo]:
    """As `read_header`, of what was read."""
    return _header(BytesIO(raw), len(raw))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{name} cannot be read: {error.strerror or error}; check its permissions") from error


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def parse_config(raw: bytes) -> dict[str, Any]:
    """What an adapter_config.json holds.

    Raises:
        AdapterError: if it is no JSON object.
    """
    config = _parse_json(raw, f"{CONFIG_FILE} is not JSON: ")
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} holds a JSON {type(config).__name__}, not an object")
    return config


def _parse_json(raw: bytes, trouble: str) -> Any:
    """JSON without what readers of it disagree on, or cannot write again: twice a key, NaN, half a character."""
    try:
        # As text, since vLLM and PEFT read it so: other encodings and a byte order mark are none to them.
        whole = json.loads(raw.decode(), object_pairs_hook=_object)
        json.dumps(whole, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{trouble}{error!s:.200}") from error
    return whole


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{shown(key)} is {value}, and numbers must be finite")
        found[key] = value
    return found


_DAMAGED = f"{WEIGHTS_FILE} is damaged or no safetensors file: "
_AGAIN = "; copy or save it again"


def _header(file: BufferedIOBase, size: int) -> dict[str, TensorInfo]:
    """A safetensors file's header, checked against the file's size: nothing is made because a header claims it."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise AdapterError(f"{WEIGHTS_FILE} is a pickle file, which is never read: {_RESAVE}")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise AdapterError(f"{_DAMAGED}of its {size:,} bytes {length:,} would be the header{_AGAIN}")
    entries = _parse_json(file.read(length), f"{_DAMAGED}its header is not JSON: ")
    if not isinstance(entries, dict):
        raise AdapterError(f"{_DAMAGED}its header is a JSON {type(entries).__name__}, not an object{_AGAIN}")
    entries.pop("__metadata__", None)
    found, places = {}, []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if all(
                type(number) is int and number >= 0 for number in (*shape, begin, end)
            ):
                if end - begin != math.prod(shape) * _ITEM_BYTES.get(dtype, 0) and dtype in _ITEM_BYTES:
                    raise AdapterError(
                        f"{_DAMAGED}{shown(name)} has {end - begin:,} bytes, which are not those of "
                        f"{shown(shape)} in {dtype}{_AGAIN}"
                    )
                found[name] = TensorInfo(dtype, tuple(shape))
                places.append((begin, end))
            case _:
                raise AdapterError(f"{_DAMAGED}{shown(name)} is {shown(entry)} in its header{_AGAIN}")
    reached = 0
    for begin, end in sorted(places):
        if not begin == reached <= end:
            raise AdapterError(
                f"{_DAMAGED}its tensors overlap or leave gaps at byte {begin:,} of the data{_AGAIN}"
            )
        reached = end
    if reached != size - 8 - length:
        raise AdapterError(
            f"{_DAMAGED}its tensors take {reached:,} bytes and {size - 8 - length:,} are there{_AGAIN}"
        )
    return found


def parse_weights(raw: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose header was checked.

    Raises:
        AdapterError: if it is damaged, or has types that torch does not know.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(raw)
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and whatever its conversion to torch stumbles over
        raise AdapterError(f"{_DAMAGED}{error!s:.200}{_AGAIN}") from error
    return tensors


def digest_from(config_bytes: bytes, weight_bytes: bytes) -> str:
    """As `digest_of`, of what was read."""
    parts = (hashlib.sha256(raw).digest() for raw in (config_bytes, weight_bytes))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise AdapterError for the first, by name, that holds NaN or infinity."""
    if not tensors:
        return
    # A sum shows them too, for a fraction of the operations; of large float64 numbers it may overflow by itself.
    sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors.values()])
    if sums.isfinite().all():
        return
    for name, tensor in sorted(tensors.items()):
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise AdapterError(f"{WEIGHTS_FILE}: {name:.200} has {bad} values that are NaN or infinite")


def _modules(config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, ModuleWeights]:
    """Check names, dtypes, shapes and values; needs no base."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):  # safetensors gives them in no fixed order
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{WEIGHTS_FILE}: tensor {shown(name)} does not belong in a QAA adapter; names are "
                f"base_model.model.<module>.{', .'.join(f'qaa_{kind}' for kind in _KINDS)}"
            )
        pairs.setdefault(match["module"], {})[match["kind"]] = tensor
    for target in config.target_modules:
        if not any(matches(module, (target,)) for module in pairs):
            raise AdapterError(f"target module {shown(target)} has no tensors in {WEIGHTS_FILE}")
    asked = {
        "theta": True, "weight": not config.vectors, **dict.fromkeys(_VECTORS, config.vectors),
        "inputs": config.inputs != "raw", "readouts": config.whitened,
    }  # fmt: skip
    modules = {}
    problem_of = cache(partial(_problem, config))  # most layers are like another one
    for module, pair in pairs.items():
        if not matches(module, config.target_modules):
            raise AdapterError(
                f"{WEIGHTS_FILE} adapts {shown(module)}, which is not among the target_modules "
                f"{shown(list(config.target_modules))}"
            )
        if _UNADAPTABLE.search(module):
            raise AdapterError(
                f"{WEIGHTS_FILE}: {shown(module)} cannot be adapted: embeddings, output heads and MoE experts are "
                "not supported"
            )
        for kind, wanted in asked.items():
            if wanted and kind not in pair:
                raise AdapterError(f"{WEIGHTS_FILE}: tensor base_model.model.{module:.200}.qaa_{kind} is missing")
            if kind in pair and not wanted:
                raise AdapterError(
                    f"{WEIGHTS_FILE}: tensor base_model.model.{module:.200}.qaa_{kind} does not belong in an "
                    f"adapter with inputs {shown(config.inputs)}, whitened {shown(config.whitened)} and vectors "
                    f"{shown(config.vectors)}"
                )
        if (
            problem := problem_of(tuple((kind, each.dtype, each.shape) for kind, each in pair.items()))
        ) is not None:
            raise AdapterError(f"{WEIGHTS_FILE}: {module:.200}.qaa_{problem}")
        theta = pair["theta"] if config.heads > 1 else pair["theta"][None]
        b = (pair["lambda_b"], pair["lambda_d"]) if config.vectors else pair["weight"]
        modules[module] = ModuleWeights(theta, b, pair.get("inputs"), pair.get("readouts"))
    check_finite(tensors)
    return modules


def _problem(config: AdapterConfig, tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> str | None:
    """The first of a module's tensors, (kind, dtype, shape), that is none of such an adapter's, and why."""
    for kind, dtype, _ in tensors:
        dtypes = _WEIGHT_DTYPES if kind == "weight" else (torch.float32,)
        if dtype not in dtypes:
            needed = f"one of {dtypes}" if len(dtypes) > 1 else str(dtypes[0])
            return f"{kind} has dtype {dtype}; {needed} is needed"
    shapes = {kind: tuple(shape) for kind, _, shape in tensors}
    theta = shapes["theta"]
    qubits = theta[-1] if theta else 0
    try:
        circuit = config.circuit(qubits).theta_shape
    except ValueError as error:
        return f"theta has shape {theta}: {error}"
    expected = circuit if config.heads == 1 else (config.heads, *circuit)
    if theta != expected:
        return (
            f"theta has shape {theta}; {expected} is needed for ansatz {config.ansatz!r} with {config.layers} "
            f"layers, {config.heads} heads and {qubits} qubits"
        )
    rank = config.rank(qubits)
    all_widths: dict[str, tuple[int | str, ...]] = {
        "weight": ("d_out", rank), "lambda_b": ("d_out",), "lambda_d": (rank,), "readouts": (2, rank)
    }  # fmt: skip
    for kind, widths in all_widths.items():
        if kind in shapes and not _is_shaped(shapes[kind], widths):
            return f"{kind} has shape {shapes[kind]}; {_written(widths)} is needed"
    inputs = shapes.get("inputs")
    if inputs is not None and not (len(inputs) == 2 and inputs[0] == 2 and _embeds(config, inputs[1]) == qubits):
        return f"inputs has shape {inputs}; (2, d_in) is needed, with a d_in that {qubits} qubits are for"
    return None


def _is_shaped(shape: tuple[int, ...], widths: tuple[int | str, ...]) -> bool:
    """Whether a shape has these widths; one with a name is any but 0."""
    return len(shape) == len(widths) and all(
        found > 0 if isinstance(width, str) else found == width for found, width in zip(shape, widths, strict=True)
    )


def _written(widths: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, widths))}{',' * (len(widths) == 1)})"


def _embeds(config: AdapterConfig, channels: int) -> int:
    """The qubits for so many channels; 0 if none do."""
    try:
        return config.qubits(channels)
    except ValueError:
        return 0


def misfit(weights: ModuleWeights, qubits: int, d_in: int, d_out: int) -> str | None:
    """Why weights are not for a layer d_in -> d_out whose input so many qubits embed; None if they are."""
    rows = weights.d_out
    if weights.qubits != qubits or rows != d_out:
        kind = "lambda_b" if isinstance(weights.b, tuple) else "weight"
        needed = f"{qubits} qubits and {d_out} rows of qaa_{kind}"
        return f"which needs {needed}; the adapter has {weights.qubits} and {rows}"
    if weights.inputs is not None and weights.inputs.shape[1] != d_in:
        return f"which needs {d_in} columns of qaa_inputs; the adapter has {weights.inputs.shape[1]}"
    return None


def check_fit(config: AdapterConfig, modules: Mapping[str, ModuleWeights], base: LinearWidths) -> None:
    """Check an adapter against a base model's linear layers.

    Raises:
        AdapterError: for modules the base lacks, other widths, or targeted layers without tensors.
    """
    of = f"made for another base, {shown(config.base_model_name_or_path)}"
    for module, weights in modules.items():
        if module not in base:
            near = sorted({name.rpartition(".")[2] for name in base})
            raise AdapterError(
                f"{WEIGHTS_FILE}: the base model has no linear layer {shown(module)} (its layers end in "
                f"{', '.join(near):.200}): the adapter was {of}"
            )
        d_in, d_out = base[module]
        try:
            qubits = config.qubits(d_in)
        except ValueError as error:
            raise AdapterError(
                f"{WEIGHTS_FILE}: {module!r} of the base model cannot be adapted: {error}"
            ) from error
        if problem := misfit(weights, qubits, d_in, d_out):
            raise AdapterError(
                f"{WEIGHTS_FILE}: {module!r} is {d_in} -> {d_out} in the base model, {problem}: it was {of}"
            )
    for module in base:
        if matches(module, config.target_modules) and module not in modules:
            raise AdapterError(f"{WEIGHTS_FILE}: tensors for {module!r} are missing, which target_modules names")
