"""The facts of an adapter: what it says, how large it is, and how large its updates are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from os.path import abspath
from pathlib import Path
from sys import stderr
from typing import Any, Literal, TypeAlias

import torch

from qaa_serve.adapters import (
    CONFIG_FILE,
    MAX_ADAPTER_BYTES,
    WEIGHTS_FILE,
    Adapter,
    AdapterError,
    LinearWidths,
    Lora,
    LoraPair,
    TensorInfo,
    digest_of,
    judge,
    linear_widths,
    only_refusals,
    read_config,
    read_header,
)
from qaa_serve.inspection.base_weights import frobenius_norms
from qaa_serve.inspection.errors import InspectionError
from qaa_serve.registry import Revision, read_revision

#: Raised when a key of the JSON goes away or changes its meaning; new keys may come at any time.
INSPECT_FORMAT = 1

#: What vLLM's own check of a LoRA adapter said; it takes no QAA adapters.
VllmCheck: TypeAlias = Literal["passed", "refused", "not asked"]

#: Of one adapter's weights, where a server is not told otherwise.
_USUAL_BYTES = 1 << 30


@dataclass(frozen=True)
class BaseFacts:
    """The base model.

    Attributes:
        named: as the adapter's config writes it.
        resolved: what it stands for: a path if that exists, else the name; or what --base said.
        fits: the adapter was checked against its layers and fits; None: it could not be checked.
        problem: why it could not.
    """

    named: str
    resolved: str
    fits: bool | None
    problem: str | None


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted layer.

    Attributes:
        name: its full name in the model.
        layer: the first number in the name, None if there is none.
        kind: what follows that number, such as ``self_attn.q_proj``.
        d_in: width of its input; None for a QAA adapter whose base cannot be read.
        d_out: width of its output.
        qubits: of each of its circuits; None for LoRA.
        rank: columns of B.
        scale: the factor on the update.
        parameters: trained numbers.
        update_frobenius: QAA: ||scale * B||_F; LoRA: ||scale * B A||_F.
        update_spectral: largest singular value of the same matrix.
        base_frobenius: ||W||_F of the base's layer; None if its weights cannot be read.
        relative_update: size of the update beside that of W x, for an x of independent entries of variance 1.
            LoRA: update_frobenius / base_frobenius, which is exact. QAA: that times 2**(-n/2), which is about
            how large each z_k is for such an x: an estimate.
    """

    name: str
    layer: int | None
    kind: str
    d_in: int | None
    d_out: int
    qubits: int | None
    rank: int
    scale: float
    parameters: int
    update_frobenius: float
    update_spectral: float
    base_frobenius: float | None = None
    relative_update: float | None = None


@dataclass(frozen=True)
class Sizes:
    """How large an adapter is, and what a LoRA adapter on the same layers would be.

    Attributes:
        modules: adapted layers.
        parameters: trained numbers: angles + weights.
        angles: of them angles of circuits (0 for LoRA).
        weights: of them entries of matrices.
        bytes_on_disk: the config's file and the weights' file.
        bytes_in_memory: the tensors, as they lie in the file.
        largest_rank: over the layers; the server's largest rank must not be below it.
        lora_parameters: of a LoRA adapter with the same rank on each of the same layers; None if a width is
            unknown.
        lora_bytes: of its tensors, in the dtype of this adapter's B.
        equal_lora_rank: rank at which a LoRA adapter on those layers has as many parameters as this one.
    """

    modules: int
    parameters: int
    angles: int
    weights: int
    bytes_on_disk: int
    bytes_in_memory: int
    largest_rank: int
    lora_parameters: int | None
    lora_bytes: int | None
    equal_lora_rank: float | None


@dataclass(frozen=True)
class Report:
    """All facts of one adapter.

    Attributes:
        adapter: the validated adapter; None for LoRA.
        config: the fields of adapter_config.json.
        notes: what a reader should know besides, a sentence each.
        vllm_check: whether vLLM's own check was asked too.
    """

    revision: Revision
    config: Mapping[str, Any]
    base: BaseFacts
    sizes: Sizes
    modules: tuple[ModuleFacts, ...]
    notes: tuple[str, ...]
    adapter: Adapter | None
    vllm_check: VllmCheck = "not asked"

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; docs/inspect.md lists the keys."""
        return {
            "inspect_format": INSPECT_FORMAT,
            "can_be_served": True,
            "reason": None,
            "vllm_check": self.vllm_check,
            "name": self.revision.name,
            "revision": self.revision.revision,
            "digest": self.revision.digest,
            "directory": str(self.revision.path),
            "kind": self.revision.kind,
            "config": dict(self.config),
            "base": asdict(self.base),
            "sizes": asdict(self.sizes),
            "modules": [asdict(module) for module in self.modules],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class RefusedReport:
    """What can be told of an adapter that cannot be served; None is what cannot.

    Attributes:
        reason: why it cannot, in the server's words.
        config: what adapter_config.json holds, whatever that is.
        tensors: what the header of the weights says is in them.
        vllm_check: `refused` if it was vLLM's own check that refused it.
    """

    directory: Path
    reason: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo] | None
    digest: str | None
    vllm_check: VllmCheck

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints: the keys of `Report`, and the tensors."""
        config = self.config or {}
        base = {"named": config.get("base_model_name_or_path"), "resolved": None, "fits": None, "problem": None}
        return {
            "inspect_format": INSPECT_FORMAT,
            "can_be_served": False,
            "reason": self.reason,
            "vllm_check": self.vllm_check,
            "name": self.directory.name,
            "revision": None,
            "digest": self.digest,
            "directory": str(self.directory),
            "kind": config.get("peft_type"),
            "config": self.config,
            "base": base,
            "sizes": None,
            "modules": [],
            "notes": [],
            "tensors": [{"name": name, **asdict(info)} for name, info in (self.tensors or {}).items()],
        }


class VllmRefusedError(AdapterError):
    """vLLM's own check refuses an adapter that ours takes."""


def describe_refused(directory: Path, error: AdapterError) -> RefusedReport:
    """What can be told of an adapter that `inspect_adapter` refused with this error."""
    directory = Path(abspath(directory))
    config = tensors = digest = None
    with suppress(AdapterError), only_refusals(CONFIG_FILE):
        config = read_config(directory)
    with suppress(AdapterError), only_refusals(WEIGHTS_FILE):
        tensors = read_header(directory)
    with suppress(AdapterError), only_refusals(WEIGHTS_FILE):
        digest = digest_of(directory, max_bytes=MAX_ADAPTER_BYTES)
    said: VllmCheck = "refused" if isinstance(error, VllmRefusedError) else "not asked"
    return RefusedReport(directory, str(error), config, tensors, digest, said)


def inspect_adapter(
    directory: Path, base: str | None = None, *, trust_remote_code: bool = False, with_vllm: bool = False
) -> Report:
    """Validate an adapter as the server does, and describe it.

    Args:
        directory: the adapter.
        base: a base model in place of the one that the adapter names.
        trust_remote_code: whether code that comes with the base model may run.
        with_vllm: ask vLLM's own check of LoRA adapters too.

    Raises:
        InspectionError: if there is no such directory, or no adapter in it, ``base`` cannot be read, or vLLM is
            not there.
        AdapterError: if the adapter cannot be served.
    """
    directory = Path(abspath(directory))  # "." has no name, and a link keeps its own
    if not directory.is_dir():
        raise InspectionError(
            f"{directory} is {'no directory' if directory.exists() else 'not there'}; give the directory that "
            f"holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if not any((directory / file).exists() for file in (CONFIG_FILE, WEIGHTS_FILE)):
        inside = sorted(config.parent.name for config in directory.glob(f"*/{CONFIG_FILE}"))
        more = " ..." if len(inside) > 5 else ""
        raise InspectionError(
            f"{directory} holds neither {CONFIG_FILE} nor {WEIGHTS_FILE}; give an adapter's own directory"
            + (f", such as one in it: {' '.join(inside[:5])}{more}" if inside else "")
        )
    revision = read_revision(directory)
    raw = read_config(directory)
    resolved = revision.base if base is None else base
    widths, problem = _widths(resolved, trust_remote_code)
    if base is not None and problem is not None:
        raise InspectionError(f"--base {base}: {problem}")
    found = judge(directory, base=widths)
    said: VllmCheck = "not asked"
    if with_vllm and isinstance(found.content, Lora):
        _ask_vllm(directory)
        said = "passed"
    facts = BaseFacts(found.base, resolved, None, problem)
    notes = found.notes
    if revision.nbytes > _USUAL_BYTES:
        notes = (
            *notes,
            f"a server takes {WEIGHTS_FILE} only with a larger --max-adapter-bytes than it has by default",
        )
    disk = sum((directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    if isinstance(found.content, Adapter):
        report = _qaa_report(found.content, revision, facts, widths, disk)
    else:
        report = _lora_report(found.content, revision, raw, facts, widths, disk)
    return _with_base_norms(replace(report, notes=(*notes, *report.notes), vllm_check=said))


def _ask_vllm(directory: Path) -> None:
    """Raise AdapterError if vLLM's own check refuses a LoRA adapter.

    By name, since importing vLLM takes seconds and only this needs it.
    """
    if find_spec("vllm") is None or find_spec("vllm_qaa") is None:
        raise InspectionError("--with-vllm: vLLM is not installed here; leave it out, or ask where the server is")
    with redirect_stdout(stderr):  # which vLLM logs to
        check = import_module("vllm_qaa.lora_check").check
        try:
            check(directory, read_header(directory))
        except AdapterError as error:
            raise VllmRefusedError(str(error)) from error


def _widths(base: str, trust_remote_code: bool) -> tuple[LinearWidths | None, str | None]:
    """The base's layers, or why they cannot be known."""
    if not base:
        return None, "the adapter names no base model; name one with --base"
    try:
        return linear_widths(base, trust_remote_code=trust_remote_code), None
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        return None, 'reading a base model needs transformers: pip install "qaa-serve[train]"'
    except AdapterError as error:
        return None, _first_line(error)


def _qaa_report(
    adapter: Adapter, revision: Revision, base: BaseFacts, widths: LinearWidths | None, disk: int
) -> Report:
    if widths is not None:
        base = replace(base, fits=True)
    modules = []
    for name, weights in adapter.modules.items():
        scale = adapter.config.scale(weights.qubits)
        update = weights.weight.double() * scale
        modules.append(
            ModuleFacts(
                name,
                *place_of(name),
                d_in=None if widths is None else widths[name][0],
                d_out=weights.d_out,
                qubits=weights.qubits,
                rank=weights.rank,
                scale=scale,
                parameters=weights.trained,
                update_frobenius=float(torch.linalg.matrix_norm(update)),
                update_spectral=float(torch.linalg.matrix_norm(update, ord=2)),
            )
        )
    angles = sum(weights.theta.numel() for weights in adapter.modules.values())
    item = max(weights.weight.element_size() for weights in adapter.modules.values())
    sizes = _sizes(modules, angles, disk, adapter.nbytes, item)
    notes = []
    still = sum(module.update_frobenius == 0 for module in modules)
    if still:
        notes.append(f"B is zero in {still} of {len(modules)} modules: there the adapter does nothing")
    return Report(revision, adapter.config.to_json(), base, sizes, tuple(modules), tuple(notes), adapter)


def _lora_report(
    lora: Lora,
    revision: Revision,
    raw: Mapping[str, Any],
    base: BaseFacts,
    widths: LinearWidths | None,
    disk: int,
) -> Report:
    modules = []
    notes = []
    for name, pair in lora.modules.items():
        frobenius, spectral = _norms(pair)
        modules.append(
            ModuleFacts(
                name,
                *place_of(name),
                d_in=pair.a.shape[1],
                d_out=pair.b.shape[0],
                qubits=None,
                rank=pair.a.shape[0],
                scale=pair.scale,
                parameters=pair.a.numel() + pair.b.numel(),
                update_frobenius=frobenius,
                update_spectral=spectral,
            )
        )
    if lora.other:
        notes.append(
            f"{len(lora.other)} tensors are no pairs of matrices, the first {next(iter(lora.other))!r}; they "
            "count as parameters and are in no norm"
        )
    if widths is not None:
        unknown = [m.name for m in modules if m.name not in widths]
        if unknown:
            notes.append(
                f"{len(unknown)} of {len(modules)} modules, the first {unknown[0]!r}, are no linear layers of the "
                "base model by name: whether they fit is for the engine to say"
            )
        base = replace(base, fits=not unknown)
    item = max((pair.b.element_size() for pair in lora.modules.values()), default=0)
    other = sum(tensor.numel() for tensor in lora.other.values())
    sizes = _sizes(modules, 0, disk, lora.nbytes, item, other=other)
    return Report(revision, dict(raw), base, sizes, tuple(modules), tuple(notes), None)


def _norms(pair: LoraPair) -> tuple[float, float]:
    """(Frobenius, spectral) norm of dW, without making it: those of two small triangular factors."""
    right = torch.linalg.qr(pair.a.double().T, mode="r").R
    left = torch.linalg.qr(pair.b.double(), mode="r").R
    values = torch.linalg.svdvals(left @ right.T) * abs(pair.scale)
    return float(torch.linalg.vector_norm(values)), float(values.max())


def _sizes(modules: list[ModuleFacts], angles: int, disk: int, memory: int, item: int, other: int = 0) -> Sizes:
    parameters = sum(module.parameters for module in modules) + other
    same_rank = per_rank = None
    if all(module.d_in is not None for module in modules):
        widths = [(module.d_in or 0) + module.d_out for module in modules]
        per_rank = sum(widths)
        same_rank = sum(m.rank * width for m, width in zip(modules, widths, strict=True))
    return Sizes(
        modules=len(modules),
        parameters=parameters,
        angles=angles,
        weights=parameters - angles,
        bytes_on_disk=disk,
        bytes_in_memory=memory,
        largest_rank=max((module.rank for module in modules), default=0),
        lora_parameters=same_rank,
        lora_bytes=None if same_rank is None else same_rank * item,
        equal_lora_rank=parameters / per_rank if per_rank else None,
    )


def _with_base_norms(report: Report) -> Report:
    if report.base.fits is None:
        return report
    norms, problem = frobenius_norms(report.base.resolved, [module.name for module in report.modules])
    modules = tuple(
        replace(
            module,
            base_frobenius=norms[module.name],
            relative_update=module.update_frobenius
            / norms[module.name]
            * (1.0 if module.qubits is None else 2 ** (-module.qubits / 2)),
        )
        if norms.get(module.name)
        else module
        for module in report.modules
    )
    notes = report.notes if problem is None else (*report.notes, problem)
    return replace(report, modules=modules, notes=notes)


def place_of(module: str) -> tuple[int | None, str]:
    """(layer, kind) of a module's name: the first number in it, and what follows."""
    parts = module.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return int(part), ".".join(parts[position + 1 :])
    return None, module


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
