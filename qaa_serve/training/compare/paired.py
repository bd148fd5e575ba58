"""How far a variant is from another one on the same prompts: differences of scores with their intervals.

A paired bootstrap (Koehn 2004, "Statistical significance tests for machine translation evaluation"): the test
prompts are drawn again with replacement, many times; each time both variants are scored on the prompts drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qaa_serve.training.metrics import bleu_from

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

Array = NDArray[np.float64]

#: What a score is made of, by its name: (prompts, numbers), to be summed over the prompts.
Statistics = Mapping[str, Array]


def differences(variants: Mapping[str, Sequence[Statistics]]) -> dict[str, dict[str, dict[str, float]] | None]:
    """The differences of all variants to the first one.

    A variant's score is the mean over its seeds, on the same prompts for all of them: the interval says how much
    rests on the choice of prompts, and nothing about how much seeds vary.

    Args:
        variants: the statistics of each finished seed, by the variant's name.

    Returns:
        By variant and score: ``difference`` (the variant's less the first one's), ``low`` and ``high``, the ends
        of the interval by percentiles; None for the first variant, and where either has no finished seed.
    """
    first, *others = variants
    found: dict[str, dict[str, dict[str, float]] | None] = dict.fromkeys(variants)
    if not variants[first]:
        return found
    prompts = len(variants[first][0]["test_loss"])
    drawn = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    times = np.vstack([np.ones(prompts), drawn])  # how often each prompt is in a sample; the first is the test set
    reference = _scores(variants[first], times)
    for name in others:
        if variants[name]:
            scores = _scores(variants[name], times)
            found[name] = {score: _interval(scores[score] - reference[score]) for score in scores}
    return found


def _scores(seeds: Sequence[Statistics], times: Array) -> dict[str, Array]:
    """By name of the score: (samples,), mean over the seeds."""
    return {name: np.mean([_score(name, times @ each[name]) for each in seeds], axis=0) for name in seeds[0]}


def _score(name: str, sums: Array) -> Array:
    """From sums of what a score is made of, (samples, numbers), to the score of each sample, (samples,)."""
    if name == "bleu":
        return np.array([bleu_from(row) for row in sums])
    return sums[:, 0] / sums[:, 1]


def _interval(differences: Array) -> dict[str, float]:
    low, high = np.quantile(differences[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"difference": float(differences[0]), "low": float(low), "high": float(high)}
