"""What a load consists of: who asks for which model, when and how much, and whether the answers came soon enough.

Shared by the locust file, the benchmarks and the tests; needs the standard library only. Everything that is drawn
comes from a seed: the same settings and seed give the same requests at the same times.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from typing import Any


class WorkloadError(ValueError):
    """A setting that makes no sense; the message says what was wrong and what forms there are."""


# ---------------------------------------------------------------------------------------------- popularity

POPULARITY_FORMS = "uniform, zipf:EXPONENT, identical, distinct or skewed"

#: Punica's ratio between the requests for one adapter and those for the next.
SKEW = 1.5


@dataclass(frozen=True)
class Popularity:
    """How requests are shared among n models, the most popular first.

    ==========  ================================================================================================
    uniform     1/n each. (Punica's benchmark gives n requests to ceil(sqrt(n)) models, alike; here it is all.)
    zipf:a      the model of rank i gets a share proportional to 1 / i**a: Zipf's law. zipf:0 is uniform.
                (S-LoRA draws from a power law too, as floor(n * u**(1/a)) for u uniform in (0, 1).)
    identical   all requests for one model, as in Punica.
    distinct    each request for another model, in turn, as in Punica; after n requests from the start again.
    skewed      each model gets 1.5 times the requests of the next: what Punica's benchmark calls zipf:1.5, which
                is geometric, so that some ten models get nearly everything, however many there are.
    ==========  ================================================================================================
    """

    kind: str
    exponent: float = 0.0

    def shares(self, count: int) -> list[float]:
        """The share of requests of each of ``count`` models; they sum to 1."""
        if self.kind == "zipf":
            weights = [rank**-self.exponent for rank in range(1, count + 1)]
        elif self.kind == "skewed":
            weights = [SKEW**-rank for rank in range(count)]
        elif self.kind == "identical":
            weights = [1.0] + [0.0] * (count - 1)
        else:
            weights = [1.0] * count
        total = sum(weights)
        return [weight / total for weight in weights]

    def picks(self, count: int, rng: random.Random) -> Iterator[int]:
        """Without end, the index of the model of the next request, 0 being the most popular."""
        if self.kind == "distinct":
            yield from cycle(range(count))
        edges = list(accumulate(self.shares(count)))
        while True:
            yield min(bisect_right(edges, rng.random()), count - 1)


def parse_popularity(text: str) -> Popularity:
    """A popularity from its form.

    Raises:
        WorkloadError: if it is none of the forms.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind == "zipf":
        return Popularity(kind, _number(rest, text, POPULARITY_FORMS, least=0))
    if kind in ("uniform", "identical", "distinct", "skewed") and not colon:
        return Popularity(kind)
    raise WorkloadError(f"popularity {text!r} is not known: {POPULARITY_FORMS} (zipf:1)")


# ------------------------------------------------------------------------------------------------- lengths

LENGTH_FORMS = "fixed:N, uniform:LEAST-MOST or lognormal:MEAN,SIGMA"


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, at least 1.

    fixed:n            always n
    uniform:a-b        each whole number from a to b alike
    lognormal:m,s      lognormal with mean m tokens, whose logarithm has the standard deviation s; prompts and
                       answers of chats look like that, with s near 1
    """

    kind: str
    first: float
    second: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        if self.kind == "lognormal":
            mu = math.log(self.first) - self.second**2 / 2
            return max(1, round(rng.lognormvariate(mu, self.second)))
        return int(self.first)


def parse_lengths(text: str) -> Lengths:
    """A distribution of lengths from its form; a plain number is fixed.

    Raises:
        WorkloadError: if it is none of the forms.
    """
    kind, _, rest = text.strip().partition(":")
    if re.fullmatch(r"\d+", text.strip()):
        kind, rest = "fixed", text.strip()
    if kind == "fixed":
        return Lengths(kind, _whole(rest, text, LENGTH_FORMS))
    if kind == "uniform":
        least, most = _pair(rest, "-", text, LENGTH_FORMS)
        lengths = Lengths(kind, _whole(least, text, LENGTH_FORMS), _whole(most, text, LENGTH_FORMS))
        if lengths.first > lengths.second:
            raise WorkloadError(f"{text!r}: {least} is more than {most}; the form is uniform:LEAST-MOST")
        return lengths
    if kind == "lognormal":
        mean, sigma = _pair(rest, ",", text, LENGTH_FORMS)
        return Lengths(
            kind, _number(mean, text, LENGTH_FORMS, least=1), _number(sigma, text, LENGTH_FORMS, least=0)
        )
    raise WorkloadError(f"lengths {text!r} are not known: {LENGTH_FORMS} (uniform:16-64)")


# ------------------------------------------------------------------------------------------------ arrivals

ARRIVAL_FORMS = "closed, poisson:RATE or bursty:RATE,CV"


@dataclass(frozen=True)
class Arrivals:
    """When requests are sent.

    closed         each user sends its next request when the last one has been answered, so a slow server is
                   asked less
    poisson:r      r requests a second on average, whatever is still running, with exponential gaps
    bursty:r,cv    r requests a second with gamma-distributed gaps whose standard deviation is cv times their
                   mean: shape 1/cv**2, scale cv**2/r, as in S-LoRA's traces. cv = 1 is Poisson, more comes in
                   bursts, less is more even.
    """

    rate: float | None = None
    cv: float = 1.0

    @property
    def closed(self) -> bool:
        """Whether users wait for their answers."""
        return self.rate is None

    def times(self, seed: int = 0) -> Iterator[float]:
        """Without end, the times of arrivals in seconds from the start.

        Raises:
            WorkloadError: for closed arrivals, which depend on the answers.
        """
        if self.rate is None:
            raise WorkloadError("closed arrivals have no times of their own")
        rng = random.Random(f"arrivals {seed}")
        now = 0.0
        while True:
            now += rng.gammavariate(1 / self.cv**2, self.cv**2 / self.rate)
            yield now


def parse_arrivals(text: str) -> Arrivals:
    """Arrivals from their form.

    Raises:
        WorkloadError: if it is none of the forms.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind == "closed" and not colon:
        return Arrivals()
    if kind == "poisson":
        return Arrivals(_number(rest, text, ARRIVAL_FORMS, above=0))
    if kind == "bursty":
        rate, cv = _pair(rest, ",", text, ARRIVAL_FORMS)
        return Arrivals(_number(rate, text, ARRIVAL_FORMS, above=0), _number(cv, text, ARRIVAL_FORMS, above=0))
    raise WorkloadError(f"arrivals {text!r} are not known: {ARRIVAL_FORMS} (poisson:4)")


# --------------------------------------------------------------------------------------------------- mixes

MIX_FORM = "CLASS=SHARE,CLASS=SHARE"


def parse_mix(text: str) -> dict[str, float]:
    """Shares of model classes, which sum to 1, from a form such as ``base=0.2,qaa=0.6,lora=0.2``.

    Raises:
        WorkloadError: if it is not of that form, or the shares are not positive in sum.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, value = (side.strip() for side in _pair(part, "=", text, MIX_FORM))
        if name in shares:
            raise WorkloadError(f"{text!r} names {name} twice: {MIX_FORM}")
        shares[name] = _number(value, text, MIX_FORM, least=0)
    if (total := sum(shares.values())) <= 0:
        raise WorkloadError(f"{text!r} gives no class a share: {MIX_FORM}")
    return {name: share / total for name, share in shares.items()}


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
Who wrote the play about two young lovers from Verona?
How does a refrigerator keep food cold?
What is a good way to learn a new language?
Why do cats purr when they are content?
How long does light take from the sun to the earth?
What are three ways to save water at home?
How is bread made from flour, water, salt and yeast?
What does a central bank do?
Which animals sleep through the winter?
How can I remove a coffee stain from a shirt?
What makes a good password, and how do I remember it?
Why do leaves change their colour in autumn?
How does a vaccine protect against a disease?
What is the square of twelve plus the square of five?
Where do hurricanes get their energy from?
How do I write a polite letter to my landlord?
What is the boiling point of water on a high mountain?
Which instruments belong to a string quartet?
How do bees find their way back to the hive?
What is the purpose of a budget?
Why does ice float on water?
How do I change a flat tyre safely?
What happens to plastic after it has been thrown away?
How does a search engine decide what to show first?
What was the first thing that was sent by telegraph?
Can you suggest a short walk for a rainy afternoon?
How far away is the moon, and how do we know?
What is the difference between a lake and a pond?
Why do we dream when we sleep?
How do I plan a meal for six people on a small budget?
What are prime numbers, and why do they matter?
How does a lock on a canal lift a boat?""".splitlines()
)

#: English text has about four tokens to three words with the usual tokenizers.
WORDS_A_TOKEN = 0.75


def english(rng: random.Random, tokens: int) -> str:
    """Questions in random order, cut to about ``tokens`` tokens (three words for four).

    Prompts of more than one question are hardly ever the same twice; shorter ones are, as in life.
    """
    wanted = max(1, round(tokens * WORDS_A_TOKEN))
    words: list[str] = []
    while len(words) < wanted:
        for question in rng.sample(QUESTIONS, len(QUESTIONS)):
            words += question.split()
            if len(words) >= wanted:
                break
    return " ".join(words[:wanted])


# ------------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True)
class Request:
    """One request to an OpenAI-compatible server.

    Attributes:
        model: its name.
        model_class: base, qaa, lora, or adapter if the kind is not known.
        chat: chat completions rather than completions.
        stream: tokens as they come rather than all at the end.
        prompt: the text.
        max_tokens: to generate at most.
    """

    model: str
    model_class: str
    chat: bool
    stream: bool
    prompt: str
    max_tokens: int

    @property
    def path(self) -> str:
        """The route."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON to send; a stream is asked for its usage, since a chunk may hold several tokens."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens}
        if self.chat:
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(extra or {})


def requests(
    models: Mapping[str, Sequence[str]],
    *,
    popularity: Popularity,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    mix: Mapping[str, float] | None = None,
    chat_share: float = 1.0,
    stream_share: float = 1.0,
    seed: int = 0,
    text: Callable[[random.Random, int], str] = english,
) -> Iterator[Request]:
    """Without end, the next request.

    Which model is the most popular, the second and so on, is drawn from the seed.

    Args:
        models: names by class.
        popularity: of the models of a class; without ``mix``, of all models together.
        prompt_tokens: lengths of prompts.
        output_tokens: of answers, at most.
        mix: shares of the classes.
        chat_share: share of chat completions; the others are completions.
        stream_share: share of streams.
        seed: decides everything that is drawn.
        text: makes a prompt of about so many tokens.

    Raises:
        WorkloadError: if there is no model at all, or none of a class in the mix.
    """
    rng = random.Random(f"requests {seed}")
    pools = {name: [(name, model) for model in names] for name, names in models.items() if names}
    if not pools:
        raise WorkloadError("there is no model to ask")
    if mix is None:
        pools = {"": [pair for pool in pools.values() for pair in pool]}
        mix = {"": 1.0}
    for name, share in mix.items():
        if share and name not in pools:
            there = ", ".join(f"{known} ({len(pool)})" for known, pool in sorted(pools.items()))
            raise WorkloadError(f"the mix has {name}={share:g}, but the server has no such model; it has: {there}")
    for pool in pools.values():
        rng.shuffle(pool)
    picks = {name: popularity.picks(len(pool), rng) for name, pool in pools.items()}
    classes, shares = list(mix), list(mix.values())

    def draw() -> Iterator[Request]:
        while True:
            pool = rng.choices(classes, shares)[0]
            model_class, model = pools[pool][next(picks[pool])]
            chat, stream = rng.random() < chat_share, rng.random() < stream_share
            prompt = text(rng, prompt_tokens.draw(rng))
            yield Request(model, model_class, chat, stream, prompt, output_tokens.draw(rng))

    return draw()


# ------------------------------------------------------------------------------------- answers and objectives


@dataclass(frozen=True)
class Timing:
    """How long an answer took, in seconds from the moment its request was due.

    Attributes:
        seconds: until it was complete.
        first: until its first token; None if it was not streamed.
        last: until its last token; None if it was not streamed.
        tokens: generated tokens.
    """

    seconds: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0

    @property
    def inter_token(self) -> float | None:
        """Mean seconds from a token to the next; None without two streamed tokens."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True)
class Objective:
    """A service level objective (SLO): limits that a share of the requests must meet, all of them.

    A request that failed or was refused does not meet it. A limit that does not apply (first token of an answer
    that was not streamed) is met. The limit between tokens is for a request's mean, as in vLLM's goodput.

    Attributes:
        first: seconds to the first token.
        inter_token: mean seconds between a request's tokens.
        seconds: seconds to the end of the answer.
        share: of the requests, from 0 to 1.
    """

    first: float | None = None
    inter_token: float | None = None
    seconds: float | None = None
    share: float = 0.99

    def met_by(self, timing: Timing) -> bool:
        """Whether a complete answer came soon enough."""
        pairs = (
            (timing.first, self.first),
            (timing.inter_token, self.inter_token),
            (timing.seconds, self.seconds),
        )
        return all(took is None or limit is None or took <= limit for took, limit in pairs)

    def attained(self, met: int, judged: int) -> bool:
        """Whether enough of the requests met it; of none at all, no."""
        return judged > 0 and met >= self.share * judged


class Histogram:
    """Many values in buckets 2 % wide: percentiles within 1 %, in bounded memory, and two can be added up.

    Count, sum, least and greatest are exact. (The idea is that of DDSketch: Masson, Rim and Lee, 2019.)
    """

    _LOG_RATIO = math.log(1.02)

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.least, self.most = math.inf, -math.inf
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """One value, not negative."""
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        self._buckets[round(math.log(max(value, 1e-9)) / self._LOG_RATIO)] += 1

    def percentile(self, share: float) -> float | None:
        """The value that ``share`` of the values do not exceed; None without values."""
        if not self.count:
            return None
        wanted, seen = max(1, math.ceil(share * self.count)), 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                break
        return min(max(math.exp(bucket * self._LOG_RATIO), self.least), self.most)

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean, percentiles and the greatest value."""
        percentiles = {f"p{share}": self.percentile(share / 100) for share in (50, 90, 95, 99)}
        mean = self.total / self.count if self.count else None
        return {"count": self.count, "mean": mean} | percentiles | {"max": self.most if self.count else None}

    def merge(self, other: Histogram) -> None:
        """Add another one's values."""
        self.count, self.total = self.count + other.count, self.total + other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self._buckets += other._buckets

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        limits = {"least": self.least, "most": self.most} if self.count else {}
        buckets = [list(pair) for pair in self._buckets.items()]
        return {"count": self.count, "total": self.total, "buckets": buckets} | limits

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Histogram:
        """The one that ``to_json`` described."""
        histogram = cls()
        histogram.count, histogram.total = data["count"], data["total"]
        histogram.least, histogram.most = data.get("least", math.inf), data.get("most", -math.inf)
        histogram._buckets = Counter(dict(data["buckets"]))
        return histogram


@dataclass
class Tally:
    """What became of the requests of one class.

    Attributes:
        answered: completely.
        failed: by an error of any kind but the next.
        refused: with status 429.
        unfinished: still running when the test ended; not judged.
        met: of the answered ones, those that met the objective.
        prompt_tokens: as the server counted them.
        tokens: generated.
        first: seconds to the first token, of streams.
        inter_token: seconds from one chunk with text to the next, of streams.
        seconds: seconds to the complete answer.
        tokens_per_second: of each answer, from the request to its end.
    """

    answered: int = 0
    failed: int = 0
    refused: int = 0
    unfinished: int = 0
    met: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    first: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    seconds: Histogram = field(default_factory=Histogram)
    tokens_per_second: Histogram = field(default_factory=Histogram)

    @property
    def judged(self) -> int:
        """Requests that count towards the objective."""
        return self.answered + self.failed + self.refused

    @property
    def attainment(self) -> float | None:
        """Share of the judged requests that met the objective; None without any."""
        return self.met / self.judged if self.judged else None

    def add_answer(self, timing: Timing, objective: Objective) -> None:
        """A complete answer. The times between its chunks are added to ``inter_token`` as they come."""
        self.answered += 1
        self.met += objective.met_by(timing)
        self.tokens += timing.tokens
        self.seconds.add(timing.seconds)
        if timing.first is not None:
            self.first.add(timing.first)
        if timing.seconds > 0:
            self.tokens_per_second.add(timing.tokens / timing.seconds)

    def merge(self, other: Tally) -> None:
        """Add another one's requests."""
        for name, value in vars(other).items():
            if isinstance(value, Histogram):
                getattr(self, name).merge(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        return {k: v.to_json() if isinstance(v, Histogram) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """The one that ``to_json`` described."""
        return cls(**{k: Histogram.from_json(v) if isinstance(v, Mapping) else v for k, v in data.items()})

    def summary(self, seconds: float) -> dict[str, Any]:
        """Figures of a test that took so many seconds."""
        counts = {k: v for k, v in vars(self).items() if isinstance(v, int)}
        return counts | {
            "attainment": self.attainment,
            "requests_per_second": self.answered / seconds if seconds > 0 else None,
            "tokens_per_second": self.tokens / seconds if seconds > 0 else None,
            "ttft_s": self.first.summary(),
            "inter_token_s": self.inter_token.summary(),
            "end_to_end_s": self.seconds.summary(),
            "request_tokens_per_second": self.tokens_per_second.summary(),
        }


def added(tallies: Mapping[str, Tally]) -> Tally:
    """All classes together."""
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    return total


# ---------------------------------------------------------------------------------------------------- ramps

RAMP_FORM = "USERS:SECONDS or xFACTOR:SECONDS"


@dataclass(frozen=True)
class Ramp:
    """How the number of users grows: by ``users``, or by ``factor``, every ``seconds``."""

    seconds: float
    users: int = 0
    factor: float = 1.0

    def after(self, users: int) -> int:
        """Users of the next step."""
        return max(users + 1, users + self.users, round(users * self.factor))


def parse_ramp(text: str) -> Ramp:
    """A ramp from a form such as ``4:15`` (four users more every 15 seconds) or ``x2:15`` (twice as many).

    Raises:
        WorkloadError: if it is not of that form.
    """
    step, seconds = _pair(text.strip(), ":", text, RAMP_FORM)
    duration = _number(seconds, text, RAMP_FORM, least=1)
    if step.startswith("x"):
        return Ramp(duration, factor=_number(step[1:], text, RAMP_FORM, above=1))
    return Ramp(duration, users=_whole(step, text, RAMP_FORM))


@dataclass(frozen=True)
class Step:
    """What was measured with so many users: answers a second, and SLO attainment (None if nothing ended)."""

    users: int
    requests_per_second: float
    attainment: float | None

    def holds(self, objective: Objective | None) -> bool:
        """Whether the objective was attained, if there is one."""
        return objective is None or (self.attainment is not None and self.attainment >= objective.share)


def why_ended(steps: Sequence[Step], objective: Objective | None, growth: float = 0.05) -> str | None:
    """Why a ramp should end now: the SLO was missed, or two steps brought less than ``growth``; else None."""
    if not steps:
        return None
    if not steps[-1].holds(objective):
        return f"the SLO was missed with {steps[-1].users} users"
    if len(steps) > 2:
        before = max(step.requests_per_second for step in steps[:-2])
        if max(step.requests_per_second for step in steps[-2:]) < (1 + growth) * before:
            return f"throughput stopped growing: less than {growth:.0%} more in two steps"
    return None


def knee(steps: Sequence[Step], objective: Objective | None, share: float = 0.95) -> Step | None:
    """The fewest users that reach ``share`` of the best throughput, of the steps that attained the SLO."""
    held = [step for step in steps if step.holds(objective) and step.requests_per_second > 0]
    best = max((step.requests_per_second for step in held), default=0.0)
    return next((step for step in held if step.requests_per_second >= share * best), None)


# ------------------------------------------------------------------------------------------------- parsing


def _number(text: str, whole: str, forms: str, least: float | None = None, above: float | None = None) -> float:
    try:
        number = float(text)
    except ValueError:
        raise WorkloadError(f"{whole!r}: {text!r} is no number; the forms are {forms}") from None
    if not math.isfinite(number) or (least is not None and number < least):
        raise WorkloadError(f"{whole!r}: {text} is less than {least}; the forms are {forms}")
    if above is not None and number <= above:
        raise WorkloadError(f"{whole!r}: {text} is not more than {above}; the forms are {forms}")
    return number


def _whole(text: str, whole: str, forms: str) -> int:
    number = _number(text, whole, forms, least=1)
    if number != int(number):
        raise WorkloadError(f"{whole!r}: {text} is no whole number; the forms are {forms}")
    return int(number)


def _pair(text: str, separator: str, whole: str, forms: str) -> tuple[str, str]:
    first, found, second = text.partition(separator)
    if not found:
        raise WorkloadError(f"{whole!r}: {text!r} has no {separator!r}; the forms are {forms}")
    return first.strip(), second.strip()
