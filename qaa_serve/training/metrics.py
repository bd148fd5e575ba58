"""Scores of generated texts against references; all of them in percent, more is better."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaa_serve.training.errors import TrainingError

_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU with all references of a prompt.

    Args:
        texts: one a prompt.
        references: one or more a prompt; their number may differ.

    Returns:
        The score and sacrebleu's signature.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    most = max(map(len, references))
    # sacrebleu wants the first references of all prompts, then the second ones ...; None where there is none.
    streams = [[refs[place] if place < len(refs) else None for refs in references] for place in range(most)]
    score = metric.corpus_score(texts, streams)
    return float(score.score), str(metric.get_signature())


def bleu_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """What BLEU sums over the prompts: (prompts, 10).

    Matches of 1 to 4 tokens, numbers of 1 to 4 tokens, length, length of the nearest reference.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # for the score of a sentence, which is not used
    found = [metric.sentence_score(text, list(refs)) for text, refs in zip(texts, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in found], np.float64)


def bleu_from(sums: NDArray[np.float64]) -> float:
    """Corpus BLEU from the sums of ``bleu_statistics``: (10,)."""
    from sacrebleu.metrics.bleu import BLEU

    *counts, length, nearest = map(int, sums)
    return float(BLEU.compute_bleu(counts[:4], counts[4:], length, nearest, smooth_method="exp").score)


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each prompt: F1 in percent against the best reference, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), use_stemmer=False)
    scored = [scorer.score_multi(list(refs), text) for text, refs in zip(texts, references, strict=True)]
    return {name: [100 * score[kind].fmeasure for score in scored] for kind, name in _ROUGE.items()}


def unseen_by_rouge(references: Sequence[Sequence[str]]) -> int:
    """Number of prompts without any token to ROUGE, which knows a-z and 0-9 only."""
    from rouge_score.tokenize import tokenize

    return sum(not any(tokenize(ref, None) for ref in refs) for refs in references)


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts that are one of their references, without space around either; case counts."""
    hits = [text.strip() in {ref.strip() for ref in refs} for text, refs in zip(texts, references, strict=True)]
    return 100 * sum(hits) / len(hits)


@dataclass(frozen=True)
class TextScores:
    """All scores of texts that need no model.

    Attributes:
        scores: by name.
        bleu_signature: sacrebleu's.
        statistics: what a score is made of, by name: (prompts, numbers), to be summed over prompts.
    """

    scores: dict[str, float]
    bleu_signature: str
    statistics: dict[str, NDArray[np.float64]]


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """Score texts, one a prompt, against the references of each."""
    score, signature = bleu(texts, references)
    by_prompt = rouge(texts, references)
    return TextScores(
        {
            "bleu": score,
            **{name: sum(values) / len(values) for name, values in by_prompt.items()},
            "exact_match": exact_match(texts, references),
        },
        signature,
        {
            "bleu": bleu_statistics(texts, references),
            "rouge_l": np.array([[value, 1] for value in by_prompt["rouge_l"]]),
        },
    )


class BertScore:
    """BERTScore's F1 of each text with a model from a directory, the best over a prompt's references.

    Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT" (arXiv:1904.09675), as the package
    bert_score computes it: of each token but start and end the largest cosine with any token of the other text, by
    one layer's outputs; precision is the mean over the text, recall the mean over the reference. Tokens are not
    weighted by idf, and nothing is rescaled by a baseline.

    Args:
        model: an encoder in a directory, with its tokenizer.
        layers: which layer's output to compare; None: the one that bert_score lists for a model of the
            directory's name, else the last.

    Attributes:
        model: as given.
        layers: the one in use.
        description: model, layer and version, for the report.

    Raises:
        TrainingError: if the model cannot be loaded.
    """

    def __init__(self, model: Path, layers: int | None = None) -> None:
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        if not (model / "config.json").is_file():
            raise TrainingError(f"--bertscore-model {model} is no directory of a model (it has no config.json)")
        try:
            config = AutoConfig.from_pretrained(model)
            total = int(config.num_hidden_layers)
        except Exception as error:  # whatever transformers meets in the directory
            raise TrainingError(f"--bertscore-model {model} cannot be read: {error}") from error
        listed = {name.rpartition("/")[2]: number for name, number in model2layers.items()}
        self.layers = min(listed.get(model.resolve().name, total), total) if layers is None else layers
        if not 0 < self.layers <= total:
            raise TrainingError(f"--bertscore-layers must be from 1 to {total} for {model}, found {layers}")
        self.description = (
            f"{model.name}, layer {self.layers} of {total}, no idf, no baseline rescaling, "
            f"bert-score {version('bert-score')}"
        )
        self.model = model
        self._is_t5 = config.model_type == "t5"
        self._scorer: Any = None

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each text, one a prompt, against the best of its references; 0 for an empty one."""
        if self._scorer is None:  # not before the trainings, which need the memory
            import bert_score
            from transformers.utils import logging

            logging.disable_progress_bar()
            try:
                with tempfile.TemporaryDirectory(prefix="encoder-") as scratch:
                    path = self.model.resolve()
                    if "t5" in str(path) and not self._is_t5:  # bert_score takes any such path for a T5's
                        path = Path(scratch) / "link"
                        path.symlink_to(self.model.resolve())
                    self._scorer = bert_score.BERTScorer(model_type=str(path), num_layers=self.layers)
            except Exception as error:
                raise TrainingError(f"--bertscore-model {self.model} cannot be loaded: {error}") from error
        found = [0.0] * len(texts)
        said = [place for place, text in enumerate(texts) if text.strip()]  # bert_score fails on an empty one
        if said:
            refs = [list(references[place]) for place in said]
            _, _, f1 = self._scorer.score([texts[place] for place in said], refs, batch_size=32)
            for place, value in zip(said, f1.tolist(), strict=True):
                found[place] = 100 * value
        return found
