"""The loss of a model on rows, for each choice that rests on one: what is kept, when to stop, which point wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qaa_serve.training.data import IGNORED, collate


@torch.no_grad()
def summed_loss(model: Any, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> tuple[float, int]:
    """The loss over all answer tokens of the rows, every token with the same weight.

    Divided by the number of tokens it is a mean that does not depend on the batches, as a mean of theirs would.

    Args:
        model: a causal language model, which is set to evaluation; its device is used.
        rows: ``input_ids`` and ``labels`` of each; ``position_ids`` too where rows are packed.
        batch_size: rows at once.

    Returns:
        The sum in nats (float64), and the number of tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = {name: tensor.to(device) for name, tensor in collate(ordered[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        asked = labels != IGNORED
        # Counted from the end, since some methods have tokens of their own in front.
        logits = model(**batch).logits[:, -asked.shape[1] - 1 : -1]
        logits = logits[asked].float()  # (asked tokens, vocabulary)
        losses = torch.nn.functional.cross_entropy(logits, labels[asked], reduction="none")
        total += losses.double().sum().item()
        tokens += len(losses)
    return total, tokens
