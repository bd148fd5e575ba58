"""The loss of a model on rows, for each choice that rests on one: what is kept, when to stop, which point wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qaa_serve.training.data import IGNORED, collate


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> torch.Tensor:
    """The loss of each row, summed over its answer tokens.

    The sums of both columns give a mean over all tokens, which does not depend on the batches.

    Args:
        model: a causal language model, which is set to evaluation; its device is used.
        rows: ``input_ids`` and ``labels`` of each; ``position_ids`` too where rows are packed.
        batch_size: rows at once.

    Returns:
        (rows, 2), float64, on the CPU: the sum in nats and the number of tokens, in the order of the rows.
    """
    model.eval()
    device = next(model.parameters()).device
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in places]).items()}
        labels = batch.pop("labels")[:, 1:]
        asked = labels != IGNORED
        # Counted from the end, since some methods have tokens of their own in front.
        logits = model(**batch).logits[:, -asked.shape[1] - 1 : -1]
        logits = logits[asked].float()  # (asked tokens, vocabulary)
        losses = torch.zeros(asked.shape, dtype=torch.float64, device=device)
        losses[asked] = torch.nn.functional.cross_entropy(logits, labels[asked], reduction="none").double()
        found[places] = torch.stack([losses.sum(1), asked.sum(1).double()], 1).cpu()
    return found
