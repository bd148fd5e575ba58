"""The facts as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qaa_serve.inspection.hardware import Deviation, HardwareResult
from qaa_serve.inspection.plot import by_kind
from qaa_serve.inspection.report import ModuleFacts, RefusedReport, Report, place_of

#: Config keys that have a line of their own.
_SHOWN = ("base_model_name_or_path", "peft_type", "target_modules")

_BARS = " ▁▂▃▄▅▆▇█"

#: More modules than this are shown by kind.
_MAX_ROWS = 32


def show_report(console: Console, report: Report) -> None:
    """Print the summary, the table of kinds and that of norms by layer."""
    revision, sizes = report.revision, report.sizes
    facts = _grid()

    def fact(name: str, value: object) -> None:
        facts.add_row(name, _plain(str(value)))

    console.print(Text.assemble((_plain(revision.revision), "bold cyan"), f"   {revision.kind} adapter"))
    console.print(f"can be served: yes, {_vllm(report)}", soft_wrap=True)
    fact("directory", revision.path)
    fact("base model", _base(report))
    fact("digest", f"{revision.digest} (SHA-256)")
    fact("config", _config(revision.kind, report.config))
    fact("targets", _targets(report.config))
    split = f" ({sizes.angles:,} angles, {sizes.weights:,} in B)" if sizes.angles else ""
    fact("trained", f"{sizes.parameters:,} parameters{split} in {sizes.modules} modules, rank {_ranks(report)}")
    fact("bytes", f"{sizes.bytes_on_disk:,} on disk, {sizes.bytes_in_memory:,} in memory")
    if revision.kind == "QAA":
        fact("beside LoRA", _beside_lora(report))
    console.print(facts)
    console.print()
    console.print(_kinds(report))
    console.print()
    console.print(_layers(report))
    console.print(_meaning(report), style="dim")
    for note in report.notes:
        console.print(Text(f"note: {_plain(note)}", style="yellow"))


def show_refused(console: Console, report: RefusedReport) -> None:
    """Print why an adapter cannot be served, and what its files say."""
    config, tensors = report.config or {}, report.tensors or {}
    kind = config.get("peft_type")
    console.print(Text.assemble((_plain(report.directory.name), "bold cyan"), f"   {_plain(str(kind))} adapter"))
    console.print(Text(f"can be served: no: {_plain(report.reason)}", style="red"), soft_wrap=True)
    facts = _grid()
    facts.add_row("directory", _plain(str(report.directory)))
    facts.add_row("base model", _plain(str(config.get("base_model_name_or_path") or "none")))
    facts.add_row("digest", f"{report.digest} (SHA-256)" if report.digest else "unknown")
    facts.add_row("config", _plain(_config(str(kind), config)) if report.config is not None else "unreadable")
    facts.add_row("targets", _plain(_targets(config)))
    facts.add_row("tensors", "unreadable" if report.tensors is None else str(len(tensors)))
    console.print(facts)
    for name, info in list(tensors.items())[:_MAX_ROWS]:
        console.print(_plain(f"  {name} {info.dtype} {list(info.shape)}"), soft_wrap=True)
    if len(tensors) > _MAX_ROWS:
        console.print(f"  ... --json has all {len(tensors)}", style="dim")


def _grid() -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    return facts


def _vllm(report: Report) -> str:
    if report.revision.kind == "QAA":
        return "as far as can be told without the engine (vLLM itself has no check of QAA adapters)"
    if report.vllm_check == "passed":
        return "and vLLM's own check of its config and names passed"
    return "as far as can be told without the engine; vLLM's own check was not asked (--with-vllm asks it)"


def _targets(config: Mapping[str, Any]) -> str:
    """A list by its names, a regular expression and all-linear as they are written."""
    targets = config.get("target_modules") or ""
    return ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def show_check(console: Console, result: HardwareResult) -> None:
    """Print what a device does to z and to the loss."""
    console.print()
    shots = "exact expectation values" if result.shots is None else f"{result.shots:,} shots a circuit"
    noise = ", ".join(f"{name} {value:g}" for name, value in result.noise.items()) or "no noise"
    console.print(Text.assemble(("on " + result.device, "bold cyan"), f"   {shots}, {noise}, seed {result.seed}"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("module")
    for name in ("circuits", "|dz| mean", "|dz| max", "spread of z", "rms dz / spread", "slope", "update / Wx"):
        table.add_column(name, justify="right")
    rows = result.modules if len(result.modules) <= _MAX_ROWS else _worst(result.modules)
    for row in rows:
        table.add_row(*_deviation(row))
    table.add_row(*_deviation(result.total), style="bold")
    console.print(table)
    if len(rows) < len(result.modules):
        console.print(
            f"the module with the largest relative error of each kind; --json has all {len(result.modules)}",
            style="dim",
        )
    console.print(
        "dz: the device's z minus the exact one, on the same activations; slope: least-squares factor of the\n"
        "device's z over the exact one, below 1 where noise pulls z towards 0; update / Wx: RMS of scale * B z\n"
        "over that of the base layer's output.",
        style="dim",
    )
    part = f"z from the device at {result.positions:,} of {result.all_positions:,} positions"
    console.print(
        f"loss (nats a token, {result.answer_tokens:,} answer tokens of {result.rows} rows; {part}):\n"
        f"  base {result.base_loss:.4f}   adapter {result.exact_loss:.4f}   "
        f"on the device {result.device_loss:.4f} ({round(result.loss_move, 4) + 0.0:+.4f})"  # no -0.0000
    )
    if result.kept_gain is not None:
        console.print(f"  {result.kept_gain:.1%} of the adapter's gain over the base is left")
    if result.positions < result.all_positions:
        console.print("  --tokens all takes every position, as real hardware would", style="dim")
    for note in result.notes:
        console.print(Text(f"note: {_plain(note)}", style="yellow"))


def _base(report: Report) -> str:
    base = report.base
    text = base.resolved if base.resolved == base.named else f"{base.resolved} (named {base.named!r})"
    if base.fits is None:
        return f"{text or 'none'}\nthe fit to it was not checked: {base.problem}"
    return f"{text}, {'which it fits' if base.fits else 'which lacks names that it has'}"


def _config(kind: str, config: Mapping[str, Any]) -> str:
    """Every field of a QAA adapter; of PEFT's dozens for LoRA, those that say something."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in config.items()
        if key not in _SHOWN and (kind == "QAA" or not (value is None or value is False or value in ({}, [], "")))
    )


def _ranks(report: Report) -> str:
    ranks = sorted({module.rank for module in report.modules})
    return " and ".join(map(str, ranks)) if len(ranks) < 4 else f"{ranks[0]} to {ranks[-1]}"


def _beside_lora(report: Report) -> str:
    sizes = report.sizes
    if sizes.lora_parameters is None or sizes.lora_bytes is None or sizes.equal_lora_rank is None:
        return "unknown: the base's widths are needed"
    return (
        f"of the same rank on the same modules: {sizes.lora_parameters:,} parameters, {sizes.lora_bytes:,} bytes "
        f"({sizes.lora_parameters / sizes.parameters:.2f} times as many); a LoRA of rank "
        f"{sizes.equal_lora_rank:.2f} has as many as this"
    )


def _kinds(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    qaa = report.revision.kind == "QAA"
    table.add_column("kind of module")
    for name in ("modules", "d_in -> d_out", *(("qubits",) if qaa else ()), "rank", "scale", "parameters each",
                 "spectral norm", "Frobenius norm"):  # fmt: skip
        table.add_column(name, justify="right")
    for kind, same in by_kind(report.modules).items():
        forms: dict[tuple[object, ...], list[ModuleFacts]] = {}
        for m in same:
            forms.setdefault((m.d_in, m.d_out, m.qubits, m.rank, m.scale, m.parameters), []).append(m)
        for (d_in, d_out, qubits, rank, scale, parameters), modules in forms.items():
            table.add_row(
                _plain(kind),
                str(len(modules)),
                f"{'?' if d_in is None else d_in} -> {d_out}",
                *((str(qubits),) if qaa else ()),
                str(rank),
                f"{scale:.4g}",
                f"{parameters:,}",
                _range([m.update_spectral for m in modules]),
                _range([m.update_frobenius for m in modules]),
            )
    return table


def _layers(report: Report) -> Table:
    """Frobenius norms, layers down, kinds across; a bar each, and the part of the base's norm."""
    kinds = by_kind(report.modules)
    largest = max((module.update_frobenius for module in report.modules), default=0) or 1.0
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(_plain(kind), justify="right")
    cells = {(m.layer, m.kind): m for m in report.modules}
    for layer in sorted({m.layer for m in report.modules}, key=lambda layer: (layer is not None, layer or 0)):
        row = [Text("-" if layer is None else str(layer))]
        for kind in kinds:
            module = cells.get((layer, kind))
            row.append(Text("") if module is None else _cell(module, largest))
        table.add_row(*row)
    return table


def _cell(module: ModuleFacts, largest: float) -> Text:
    bar = _BARS[min(8, round(8 * module.update_frobenius / largest))]
    part = "" if module.relative_update is None else f" {module.relative_update:>6.1%}"
    return Text.assemble((bar, "cyan"), f" {module.update_frobenius:.4g}", (part, "dim"))


def _meaning(report: Report) -> str:
    if report.revision.kind == "LORA":
        what = "scale * B A, which is added to the base's W"
    else:
        what = "scale * B, which turns z (each |z_k| <= 1) into the update of the layer's output"
    relative = ""
    if any(module.relative_update is not None for module in report.modules):
        relative = "; %: the update's size beside that of W x, for an x of random entries"
        if report.revision.kind == "QAA":
            relative += ", about; --check measures it on real ones"
    return f"norms: of {what}\nby layer: Frobenius{relative}"


def _worst(modules: Sequence[Deviation]) -> list[Deviation]:
    kinds: dict[str, Deviation] = {}
    for row in modules:
        kind = place_of(row.module)[1]
        if kind not in kinds or (row.relative_error or 0) > (kinds[kind].relative_error or 0):
            kinds[kind] = row
    return list(kinds.values())


def _deviation(row: Deviation) -> tuple[str, ...]:
    return (
        _plain(row.module),
        f"{row.circuits:,}",
        f"{row.mean_error:.3g}",
        f"{row.max_error:.3g}",
        f"{row.spread:.3g}",
        _or_dash(row.relative_error, ".3g"),
        _or_dash(row.slope, ".3f"),
        _or_dash(row.update_ratio, ".1%"),
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _plain(text: str) -> str:
    """Text of a stranger's file, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
