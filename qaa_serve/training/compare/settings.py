"""What to compare, on what: each option with its default, help and range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qaa_serve.training.compare.plan import Plan
from qaa_serve.training.fields import check_ranges, option

WHAT, TEST, AGAIN = "what to compare, on what", "the test", "going on"


@dataclass(frozen=True)
class Settings:
    """What to compare, on what; ``qaa-serve compare --help`` says what each option is.

    Attributes:
        plan: the variants, seeds and validation.
        command: the command line, for the report.
    """

    plan: Plan
    model: str = option(
        help="base model: a directory, or a name on the Hugging Face hub", group=WHAT, metavar="BASE"
    )
    data: str = option(help="training rows, as qaa-serve train takes them", group=WHAT, metavar="FILE")
    eval_data: str = option(
        help="the test set: rows to score on, and used for nothing else; rows with the same prompt are several "
        "references",
        group=WHAT, metavar="FILE",
    )  # fmt: skip
    output: Path = option(help="where report and trainings go", group=WHAT, metavar="DIR")
    max_new_tokens: int = option(128, "tokens of an answer at most", group=TEST, above=0)
    eval_batch_size: int = option(16, "prompts or rows at once", group=TEST, above=0)
    bertscore_model: Path | None = option(
        None, "an encoder in a directory, for BERTScore (needs the extra bertscore)", group=TEST, metavar="DIR"
    )
    bertscore_layers: int | None = option(
        None, "its layer to compare (default: bert_score's choice for a directory of that name, else the last)",
        group=TEST,
    )  # fmt: skip
    loss_target: float | None = option(
        None, 'for "steps to loss" (default: the lowest smoothed loss that every training reached)', group=TEST
    )
    examples: int = option(5, "prompts shown in full", group=TEST, least=0)
    retry_failed: bool = option(False, "train again what failed before", group=AGAIN)
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_ranges(self)
