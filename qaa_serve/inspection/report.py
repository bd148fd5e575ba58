"""The facts of an adapter: what it says, how large it is, and how large its updates are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os.path import abspath
from pathlib import Path
from typing import Any

import torch

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterError,
    LinearWidths,
    check_fit,
    linear_widths,
    load_adapter,
    read_config,
)
from qaa_serve.inspection.base_weights import frobenius_norms
from qaa_serve.inspection.errors import InspectionError
from qaa_serve.inspection.lora import read_lora
from qaa_serve.registry import Revision, read_revision

#: Raised when a key of the JSON goes away or changes its meaning; new keys may come at any time.
INSPECT_FORMAT = 1


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
    """

    revision: Revision
    config: Mapping[str, Any]
    base: BaseFacts
    sizes: Sizes
    modules: tuple[ModuleFacts, ...]
    notes: tuple[str, ...]
    adapter: Adapter | None

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; docs/inspect.md lists the keys."""
        return {
            "inspect_format": INSPECT_FORMAT,
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


def inspect_adapter(directory: Path, base: str | None = None, *, trust_remote_code: bool = False) -> Report:
    """Validate an adapter as the server does, and describe it.

    Args:
        directory: the adapter.
        base: a base model in place of the one that the adapter names.
        trust_remote_code: whether code that comes with the base model may run.

    Raises:
        InspectionError: if there is no such directory, or ``base`` cannot be read.
        AdapterError: if the adapter cannot be served.
    """
    directory = Path(abspath(directory))  # "." has no name, and a link keeps its own
    if not directory.is_dir():
        raise InspectionError(
            f"{directory} is {'no directory' if directory.exists() else 'not there'}; give the directory that "
            f"holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    revision = read_revision(directory)
    raw = read_config(directory)
    resolved = revision.base if base is None else base
    widths, problem = _widths(resolved, trust_remote_code)
    if base is not None and problem is not None:
        raise InspectionError(f"--base {base}: {problem}")
    facts = BaseFacts(str(raw.get("base_model_name_or_path") or ""), resolved, None, problem)
    disk = sum((directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    if revision.kind == "QAA":
        report = _qaa_report(directory, revision, facts, widths, disk)
    else:
        report = _lora_report(directory, revision, raw, facts, widths, disk)
    return _with_base_norms(report)


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
    directory: Path, revision: Revision, base: BaseFacts, widths: LinearWidths | None, disk: int
) -> Report:
    adapter = load_adapter(directory)
    if widths is not None:
        check_fit(adapter.config, adapter.modules, widths)
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
                d_out=weights.weight.shape[0],
                qubits=weights.qubits,
                rank=weights.weight.shape[1],
                scale=scale,
                parameters=weights.theta.numel() + weights.weight.numel(),
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
    directory: Path,
    revision: Revision,
    raw: Mapping[str, Any],
    base: BaseFacts,
    widths: LinearWidths | None,
    disk: int,
) -> Report:
    lora = read_lora(directory, raw)
    modules = []
    notes = list(lora.notes)
    for name, pair in lora.modules.items():
        frobenius, spectral = pair.norms()
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
    if widths is not None:
        misfits = [m.name for m in modules if widths.get(m.name) != (m.d_in, m.d_out)]
        if misfits:
            notes.append(
                f"{len(misfits)} of {len(modules)} modules, the first {misfits[0]!r}, are not in the base model "
                "with these widths: the adapter was made for another base, or names its layers otherwise"
            )
        base = replace(base, fits=not misfits)
    item = max(pair.b.element_size() for pair in lora.modules.values())
    sizes = _sizes(modules, 0, disk, lora.nbytes, item, other=lora.other_parameters)
    return Report(revision, dict(raw), base, sizes, tuple(modules), tuple(notes), None)


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
        largest_rank=max(module.rank for module in modules),
        lora_parameters=same_rank,
        lora_bytes=None if same_rank is None else same_rank * item,
        equal_lora_rank=None if per_rank is None else parameters / per_rank,
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
