"""What is asked for: models by popularity or by how cold they are, lengths, prompts.

Shared by the locust file, the benchmarks and the tests; needs the standard library only, and `tokenizers` for
prompts of an exact length. Everything that is drawn comes from a random.Random: a seed gives the same requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any


class WorkloadError(ValueError):
    """A setting that makes no sense; the message says what was wrong and what forms there are."""


# ---------------------------------------------------------------------------------------------- popularity

POPULARITY_FORMS = "uniform, zipf:EXPONENT or distinct"


@dataclass(frozen=True)
class Popularity:
    """How requests are shared among n models, the most popular first.

    uniform     1/n each
    zipf:a      the model of rank i gets a share proportional to 1 / i**a; zipf:0 is uniform
    distinct    each request for another model, in turn; after n requests from the start again
    """

    kind: str
    exponent: float = 0.0

    def shares(self, count: int) -> list[float]:
        """The share of requests of each of ``count`` models; they sum to 1."""
        weights = [rank**-self.exponent for rank in range(1, count + 1)]
        total = sum(weights)
        return [weight / total for weight in weights]

    def picks(self, count: int, rng: random.Random) -> Iterator[int]:
        """Without end, the index of the model of the next request, 0 being the most popular."""
        if self.kind == "distinct":
            yield from cycle(range(count))
        edges = list(accumulate(self.shares(count)))
        while True:
            yield rng.choices(range(count), cum_weights=edges)[0]


def parse_popularity(text: str) -> Popularity:
    """A popularity from its form.

    Raises:
        WorkloadError: if it is none of the forms.
    """
    kind, colon, rest = text.partition(":")
    if kind == "zipf" and colon:
        return Popularity(kind, _number(rest, text, POPULARITY_FORMS))
    if kind in ("uniform", "distinct") and not colon:
        return Popularity(kind)
    raise WorkloadError(f"popularity {text!r} is not known: {POPULARITY_FORMS} (zipf:1)")


# ------------------------------------------------------------------------------------------------- lengths

LENGTH_FORMS = "fixed:N, uniform:LEAST-MOST or lognormal:MEAN,SIGMA"


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, at least 1.

    fixed:n            always n
    uniform:a-b        each whole number from a to b alike
    lognormal:m,s      lognormal with mean m tokens, whose logarithm has the standard deviation s
    """

    kind: str
    first: float
    second: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        if self.kind == "lognormal":
            return max(1, round(rng.lognormvariate(math.log(self.first) - self.second**2 / 2, self.second)))
        return int(self.first)


def parse_lengths(text: str) -> Lengths:
    """A distribution of lengths from its form; a plain number is fixed.

    Raises:
        WorkloadError: if it is none of the forms.
    """
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", ":", text)
    if kind == "fixed":
        return Lengths(kind, _number(rest, text, LENGTH_FORMS, least=1, whole=True))
    separator = {"uniform": "-", "lognormal": ","}.get(kind)
    first, found, second = rest.partition(separator or ":")
    if separator is None or not found:
        raise WorkloadError(f"lengths {text!r} are not known: {LENGTH_FORMS} (uniform:16-64)")
    whole = kind == "uniform"
    low = _number(first, text, LENGTH_FORMS, least=1, whole=whole)
    return Lengths(kind, low, _number(second, text, LENGTH_FORMS, least=low if whole else 0, whole=whole))


SHARE_FORMS = "SHARE,SHARE,... with each from 0 to 1"


def parse_shares(text: str) -> list[float]:
    """Shares from 0 to 1; none of an empty text.

    Raises:
        WorkloadError: if one is not.
    """
    return [_number(part, text, SHARE_FORMS, most=1) for part in text.split(",") if text]


def _number(
    text: str, form: str, forms: str, least: float = 0, most: float = math.inf, whole: bool = False
) -> float:
    try:
        number = float(text)
    except ValueError:
        raise WorkloadError(f"{form!r}: {text!r} is no number; the forms are {forms}") from None
    if not (math.isfinite(number) and least <= number <= most) or (whole and number != int(number)):
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise WorkloadError(f"{form!r}: {text} is not {'a whole number, ' * whole}{bounds}; the forms are {forms}")
    return number


# ------------------------------------------------------------------------------------------------- models


class Models:
    """Which model the next request asks for.

    Args:
        bases: models without an adapter.
        adapters: the others. Which of them is the most popular is drawn.
        popularity: of the adapters.
        base_share: share of the requests that go to the bases; all of them if there are no adapters.
        hot: with a share of cold requests: so many adapters, the most popular, get all others.
        rng: what decides.

    Raises:
        WorkloadError: if there is no model, or none of a kind that is to be asked for.
    """

    def __init__(
        self,
        bases: Sequence[str],
        adapters: Sequence[str],
        popularity: Popularity,
        rng: random.Random,
        *,
        base_share: float = 0.0,
        hot: int = 0,
    ) -> None:
        if not adapters and not bases:
            raise WorkloadError("there is no model to ask")
        if base_share and not bases:
            raise WorkloadError(f"a share of {base_share:g} is for the base model, and the server lists none")
        if hot and len(adapters) <= hot:
            raise WorkloadError(f"of {len(adapters)} adapters {hot} are to be hot: there is none to be cold")
        adapters = rng.sample(adapters, len(adapters))
        self.rng, self.bases = rng, bases
        self.base_share = base_share if adapters else 1.0
        self.ranked = (adapters[i] for i in popularity.picks(len(adapters), rng)) if adapters else iter(())
        self.hot = (adapters[i] for i in popularity.picks(hot, rng)) if hot else iter(())
        self.cold = cycle(adapters[hot:])

    def next(self, cold_share: float | None = None) -> str:
        """A model. With a ``cold_share``, the adapter whose turn is the longest ago with that probability.

        The others go to the hot ones then. Without, popularity alone decides.
        """
        if self.rng.random() < self.base_share:
            return self.rng.choice(self.bases)
        if cold_share is None:
            return next(self.ranked)
        return next(self.cold if self.rng.random() < cold_share else self.hot)


# ------------------------------------------------------------------------------------------------- prompts

QUESTIONS = tuple(
    """\
What is the capital of France?
How do I boil an egg so that the yolk stays soft?
Why is the sky blue during the day and red in the evening?
Which planet is the largest in our solar system?
Can you explain how a bicycle stays upright?
What should I pack for a weekend in the mountains?
How many continents are there, and what are their names?
What is the difference between weather and climate?
How does a refrigerator keep food cold?
What is a good way to learn a new language?
Why do cats purr when they are content?
How long does light take from the sun to the earth?
What are three ways to save water at home?
How is bread made from flour, water, salt and yeast?
Which animals sleep through the winter?
How can I remove a coffee stain from a shirt?
What makes a good password, and how do I remember it?
Why do leaves change their colour in autumn?
What is the square of twelve plus the square of five?
How do I write a polite letter to my landlord?
Which instruments belong to a string quartet?
How do bees find their way back to the hive?
Why does ice float on water?
How do I change a flat tyre safely?""".splitlines()
)

#: English text has about four tokens to three words with the usual tokenizers.
WORDS_A_TOKEN = 0.75


def english(rng: random.Random, tokens: int) -> str:
    """Questions in random order, cut to about ``tokens`` tokens (three words for four)."""
    wanted = max(1, round(tokens * WORDS_A_TOKEN))
    words: list[str] = []
    while len(words) < wanted:
        words += " ".join(rng.sample(QUESTIONS, len(QUESTIONS))).split()
    return " ".join(words[:wanted])


def exact_english(tokenizer: Any) -> Callable[[random.Random, int], str]:
    """What makes such text of exactly so many tokens of a `tokenizers.Tokenizer`, special ones not counted.

    Raises (what is returned):
        WorkloadError: if texts that are cut after so many tokens never have as many.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    def text(rng: random.Random, tokens: int) -> str:
        for _ in range(50):
            ids = tokenizer.encode(english(rng, 4 * tokens), add_special_tokens=False).ids[:tokens]
            cut: str = tokenizer.decode(ids)
            if count(cut) == tokens:
                return cut
        raise WorkloadError(f"no text was found that the tokenizer cuts into exactly {tokens} tokens")

    return text


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model's directory, or a tokenizer.json.

    Raises:
        WorkloadError: if it cannot be read.
    """
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise WorkloadError(f"the tokenizer {file} cannot be read: {error}") from error
