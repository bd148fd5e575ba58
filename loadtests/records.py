"""What became of the requests: a record each, and the figures that are made of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: Where an adapter can be when its request comes, nearest to the device first.
WARM = ("device", "host")
COLD = ("store", "source")
TIERS = ("base", *WARM, *COLD, "unknown")


class Record(NamedTuple):
    """One request. Times are in seconds, ``at`` from the beginning of the test, the others from ``at``.

    Attributes:
        at: when it was sent.
        model: what was asked for.
        kind: base, qaa, lora; adapter where the server does not tell.
        tier: where the adapter was: device (a slot of the batch), host (the engine's memory), store (checked, not
            in the engine), source (not even checked); base; unknown where the server does not tell.
        asked_cold: the share of cold requests that was asked for at that time; None: none was.
        outcome: answered, failed, refused (429), or unfinished when the test ended.
        problem: why it failed.
        seconds: until the end.
        first_s: until the first text; None if it was not streamed.
        inter_token_s: mean time between tokens, (last - first) / (tokens - 1); None without two streamed tokens.
        longest_gap_s: between two chunks with text.
        prompt_tokens: as the server counted them.
        tokens: generated.
    """

    at: float
    model: str
    kind: str
    tier: str
    asked_cold: float | None
    outcome: str
    problem: str
    seconds: float
    first_s: float | None = None
    inter_token_s: float | None = None
    longest_gap_s: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def ended(self) -> float:
        """When the answer was complete, from the beginning of the test."""
        return self.at + self.seconds

    @property
    def answered(self) -> bool:
        """Whether the answer came whole."""
        return self.outcome == "answered"


@dataclass(frozen=True)
class Objective:
    """A service level objective: limits in seconds that a share of the requests must meet, all of them.

    A request that failed or was refused does not meet it. A limit that does not apply is met: the first token of
    an answer that was not streamed.
    """

    first_s: float = math.inf
    inter_token_s: float = math.inf
    seconds: float = math.inf
    share: float = 0.99

    @property
    def limits(self) -> dict[str, float]:
        """Those that there are, by the field of a record."""
        fields = {name: getattr(self, name) for name in ("first_s", "inter_token_s", "seconds")}
        return {name: limit for name, limit in fields.items() if limit < math.inf}

    def met_by(self, record: Record) -> bool:
        """Whether a complete answer came soon enough."""
        took = ((getattr(record, name), limit) for name, limit in self.limits.items())
        return record.answered and all(seconds is None or seconds <= limit for seconds, limit in took)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least of the ``values``, in order, that ``share`` of them do not exceed; None without values."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def spread(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Count, mean, percentiles and the greatest of the values that are known."""
    known = sorted(value for value in values if value is not None)
    mean = statistics.fmean(known) if known else None
    percentiles = {f"p{share}": percentile(known, share / 100) for share in (50, 90, 95, 99)}
    return {"count": len(known), "mean": mean} | percentiles | {"max": known[-1] if known else None}


def first_tokens(records: Sequence[Record]) -> dict[str, dict[str, float | int | None]]:
    """Times to first token of the adapters that were cold, and of those that were warm."""
    return {
        name: spread(record.first_s for record in records if record.tier in tiers)
        for name, tiers in (("cold", COLD), ("warm", WARM))
    }


def figures(records: Sequence[Record], began: float, ended: float, objective: Objective) -> dict[str, Any]:
    """What can be said of some of the records of a test that was measured from ``began`` to ``ended``.

    Latencies are of the requests that were sent in that time, rates of the answers that came in it.
    """
    sent = [record for record in records if record.at >= began]
    done = [record for record in sent if record.answered]
    came = [record for record in records if record.answered and began <= record.ended <= ended]
    outcomes = Counter(record.outcome for record in sent)
    judged, seconds = len(sent) - outcomes["unfinished"], ended - began
    return {
        **{outcome: outcomes[outcome] for outcome in ("answered", "failed", "refused", "unfinished")},
        "attainment": sum(map(objective.met_by, done)) / judged if judged else None,
        "requests_per_second": len(came) / seconds if seconds > 0 else None,
        "tokens_per_second": sum(record.tokens for record in came) / seconds if seconds > 0 else None,
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "tokens": sum(record.tokens for record in done),
        "ttft_s": spread(record.first_s for record in done),
        "inter_token_s": spread(record.inter_token_s for record in done),
        "longest_gap_s": spread(record.longest_gap_s for record in done),
        "end_to_end_s": spread(record.seconds for record in done),
    }


def cold_share(records: Iterable[Record]) -> float | None:
    """The share of cold ones among the requests for adapters whose tier is known; None without any."""
    known = [record.tier in COLD for record in records if record.tier in COLD + WARM]
    return statistics.fmean(known) if known else None


def turns(records: Sequence[Record], began: float, ended: float, every: float) -> list[dict[str, Any]]:
    """Rates, time to first token and the share of cold requests in each stretch of ``every`` seconds.

    The last one may be a fifth shorter.
    """
    sent, came = defaultdict(list), defaultdict(list)
    for record in records:
        if record.answered:
            sent[math.floor((record.at - began) / every)].append(record)
            if record.ended <= ended:
                came[math.floor((record.ended - began) / every)].append(record)
    found = []
    for number in range(math.floor((ended - began) / every + 0.2)):
        mine, seconds = sent[number], min(every, ended - began - number * every)
        found.append(
            {
                "began": began + number * every,
                # Of one that was drawn as the turn before ended: that one's.
                "asked_cold": statistics.mode(record.asked_cold for record in mine) if mine else None,
                "cold_share": cold_share(mine),
                "requests_per_second": len(came[number]) / seconds,
                "tokens_per_second": sum(record.tokens for record in came[number]) / seconds,
                "ttft_p50_s": {name: figures["p50"] for name, figures in first_tokens(mine).items()},
            }
        )
    return found


def summarise(
    records: Sequence[Record], began: float, ended: float, *, objective: Objective | None = None, every: float = 10
) -> dict[str, Any]:
    """All figures of a test: together, by kind, by tier and by stretch of time.

    Args:
        records: of all requests, those of the warm-up too.
        began: end of the warm-up, in seconds from the beginning of the test.
        ended: when no more requests were sent.
        objective: what is good enough; without one, an answer.
        every: seconds of a stretch.
    """
    wanted = objective or Objective()
    kinds, tiers = defaultdict(list), defaultdict(list)
    for record in records:
        kinds[record.kind].append(record)
        tiers[record.tier].append(record)
    total = figures(records, began, ended, wanted)
    measured = [record for record in records if record.at >= began]
    done = [record for record in measured if record.answered]
    slo = None
    if objective is not None:
        met = total["attainment"] is not None and total["attainment"] >= objective.share
        slo = {**objective.limits, "share": objective.share, "met": met}
    return {
        "began": began,
        "seconds": ended - began,
        "all": total,
        "kinds": {kind: figures(kinds[kind], began, ended, wanted) for kind in sorted(kinds)},
        "tiers": {tier: figures(tiers[tier], began, ended, wanted) for tier in TIERS if tier in tiers},
        "cold_share": cold_share(done),
        "ttft_s": first_tokens(done),
        "turns": turns(records, began, ended, every),
        "slo": slo,
        "failures": dict(Counter(r.problem for r in measured if r.outcome == "failed").most_common()),
    }


def by_asked_share(found: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """The stretches of a test by the share of cold requests that was asked for in them; empty if none was."""
    shares = sorted({turn["asked_cold"] for turn in found} - {None})
    return {share: [turn for turn in found if turn["asked_cold"] == share] for share in shares}
