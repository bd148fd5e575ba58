"""Which layers of a base model can be adapted, and which of them a list of target modules means."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qaa_serve.adapters import matches
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.layer import linear_shape

#: Stands for every linear layer but the output head, as in PEFT.
ALL_LINEAR = "all-linear"


def adaptable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that an adapter may stand on: all but the output head and MoE experts.

    A layer that carries adapters already counts under its own name.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    names: list[str] = []
    inside = " "  # no module's name
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        layer = module
        if isinstance(module, BaseTunerLayer):
            inside, layer = f"{name}.", module.get_base_layer()
        if layer is not head and linear_shape(layer) is not None and "experts" not in name.split("."):
            names.append(name)
    return names


def resolve_targets(
    model: nn.Module,
    targets: Collection[str] | str | None,
    *,
    exclude: Collection[str] = (),
    blocks: Collection[int] = (),
) -> list[str]:
    """The target modules to write into an adapter's config, sorted, each found in the model.

    Args:
        model: the base model.
        targets: module names or their ends; ``"all-linear"``; None or empty: those of attention.
        exclude: of these, names or ends of the layers to leave out.
        blocks: numbers of the blocks to keep to; empty: all.

    Raises:
        TrainingError: for a name that matches no layer, or one that cannot be adapted.
    """
    layers = adaptable_layers(model)
    if targets is None or len(targets) == 0:
        wanted = [name for name in layers if _in_attention(name)]
        if not wanted:
            raise TrainingError(f"no attention layers were recognised; choose target modules: {_ends(layers)}")
    elif ([targets.lower()] if isinstance(targets, str) else [name.lower() for name in targets]) == [ALL_LINEAR]:
        wanted = layers
    else:
        targets = [targets] if isinstance(targets, str) else targets
        wanted = [name for target in targets for name in _named(model, layers, target)]
        if not exclude and not blocks:
            return sorted(set(targets))  # as they were given
    left_out = {name for end in exclude for name in _named(model, layers, end)}
    kept = [name for name in wanted if name not in left_out and (not blocks or _block(name) in blocks)]
    if blocks and not {_block(name) for name in wanted} >= set(blocks):
        known = sorted({number for name in wanted if (number := _block(name)) is not None})
        raise TrainingError(f"the base model has no block {max(set(blocks) - set(known))}; it has {known}")
    if not kept:
        raise TrainingError("no layer is left to adapt: exclude fewer")
    return _shortest_ends(kept, layers)


def _named(model: nn.Module, layers: list[str], target: str) -> list[str]:
    """The layers that a name or the end of one means."""
    taken = [name for name, _ in model.named_modules() if matches(name, (target,))]
    if not taken:
        raise TrainingError(f"the base model has no module {target!r}; it has {_ends(layers)}")
    for name in taken:
        if name not in layers:
            raise TrainingError(
                f"target module {target!r} names {name!r}, which cannot be adapted: embeddings, output "
                f"heads, MoE experts and whatever is no linear layer cannot; there is {_ends(layers)}"
            )
    return taken


def _block(name: str) -> int | None:
    """The first number in a layer's name: ``model.layers.3.mlp.up_proj`` is of block 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _shortest_ends(wanted: list[str], layers: list[str]) -> list[str]:
    """Ends of the wanted names that match no other layer: GPT-2 has a ``c_proj`` in attention and MLP."""
    others = [name for name in layers if name not in set(wanted)]
    ends = set()
    for name in wanted:
        parts = name.split(".")
        length = 1
        while length < len(parts) and any(matches(other, (".".join(parts[-length:]),)) for other in others):
            length += 1
        ends.add(".".join(parts[-length:]))
    return sorted(ends)


def _ends(layers: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "no linear layer"
