"""The norms of the updates as a picture."""

from __future__ import annotations

import io

from qaa_serve.inspection.report import ModuleFacts, Report


def plot_norms(report: Report, suffix: str) -> bytes:
    """Norm by layer, a line a kind of module; with the base's norms, a second panel relative to them.

    Args:
        report: an adapter's facts.
        suffix: of the image file, such as ".png".

    Returns:
        The image file's bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    relative = any(module.relative_update is not None for module in report.modules)
    figure = Figure(figsize=(11 if relative else 6.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if relative else 1, squeeze=False)[0]
    update = r"$\|s B\|$" if report.revision.kind == "QAA" else r"$\|s B A\|$"
    labels = {
        "update_frobenius": f"{update}  (solid: Frobenius, dotted: spectral)",
        "relative_update": "update beside W x, for random x",
    }
    for axes, (key, label) in zip(panels, labels.items(), strict=False):
        for number, (kind, modules) in enumerate(by_kind(report.modules).items()):
            color, marker = f"C{number % 10}", "os^Dvp*XhP"[number % 10]
            _line(axes, modules, key, color=color, marker=marker, label=kind)
            if key == "update_frobenius":
                _line(axes, modules, "update_spectral", color=color, marker=marker, markersize=3, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{report.revision.revision}: size of the update", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format=suffix.lower().removeprefix("."), dpi=140)
    return image.getvalue()


def by_kind(modules: tuple[ModuleFacts, ...]) -> dict[str, list[ModuleFacts]]:
    """Modules by kind, each in the order of the layers."""
    kinds: dict[str, list[ModuleFacts]] = {}
    for module in sorted(modules, key=lambda module: (module.layer is not None, module.layer or 0)):
        kinds.setdefault(module.kind, []).append(module)
    return kinds


def _line(axes: object, modules: list[ModuleFacts], key: str, **style: object) -> None:
    points = [(module.layer or 0, getattr(module, key)) for module in modules]
    known = [(layer, value) for layer, value in points if value is not None]
    axes.plot([layer for layer, _ in known], [value for _, value in known], **style)  # type: ignore[attr-defined]
