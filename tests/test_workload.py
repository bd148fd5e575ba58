"""What the load tests draw: shares, lengths, arrivals; and how answers are judged."""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loadtests"))

from workload import (
    QUESTIONS,
    Histogram,
    Lengths,
    Objective,
    Popularity,
    Ramp,
    Step,
    Tally,
    Timing,
    WorkloadError,
    added,
    english,
    knee,
    parse_arrivals,
    parse_lengths,
    parse_mix,
    parse_popularity,
    parse_ramp,
    requests,
    why_ended,
)

DRAWS = 20_000


def frequencies(form: str, count: int) -> list[float]:
    picked = Counter(islice(parse_popularity(form).picks(count, random.Random(1)), DRAWS))
    return [picked[i] / DRAWS for i in range(count)]


def draws(form: str) -> list[int]:
    lengths, rng = parse_lengths(form), random.Random(2)
    return [lengths.draw(rng) for _ in range(DRAWS)]


def gaps(form: str) -> list[float]:
    return [b - a for a, b in pairwise(islice(parse_arrivals(form).times(seed=3), DRAWS))]


# ---------------------------------------------------------------------------------------------- popularity


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("uniform", [1 / 4] * 4),
        ("zipf:0", [1 / 4] * 4),
        ("zipf:1", [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        ("zipf:2", [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
        ("identical", [1, 0, 0, 0]),
        ("distinct", [1 / 4] * 4),
        ("skewed", [27 / 65, 18 / 65, 12 / 65, 8 / 65]),
    ],
)
def test_each_popularity_has_its_shares_and_is_drawn_with_them(form, expected):
    assert parse_popularity(form).shares(4) == pytest.approx(expected)
    assert frequencies(form, 4) == pytest.approx(expected, abs=0.015)


def test_skewed_gives_a_few_models_nearly_everything_however_many_there_are():
    assert sum(Popularity("skewed").shares(1000)[:10]) > 0.98
    assert sum(Popularity("zipf", 1.0).shares(1000)[:10]) == pytest.approx(0.391, abs=0.001)


def test_distinct_takes_each_model_once_before_any_twice():
    assert list(islice(parse_popularity("distinct").picks(3, random.Random()), 7)) == [0, 1, 2, 0, 1, 2, 0]


# ----------------------------------------------------------------------------------------- lengths, arrivals


def test_lengths_have_the_distribution_that_was_asked_for():
    assert set(draws("fixed:7")) == set(draws("7")) == {7}
    uniform = draws("uniform:16-20")
    assert set(uniform) == {16, 17, 18, 19, 20}
    assert statistics.mean(uniform) == pytest.approx(18, abs=0.05)
    lognormal = draws("lognormal:100,0.8")
    assert statistics.mean(lognormal) == pytest.approx(100, rel=0.02)
    assert statistics.stdev(map(math.log, lognormal)) == pytest.approx(0.8, rel=0.02)
    assert min(draws("lognormal:1,2")) == 1


@pytest.mark.parametrize(
    ("form", "cv"), [("poisson:5", 1), ("bursty:5,1", 1), ("bursty:5,3", 3), ("bursty:5,0.2", 0.2)]
)
def test_arrivals_have_their_mean_rate_and_coefficient_of_variation(form, cv):
    between = gaps(form)
    assert min(between) >= 0
    assert statistics.mean(between) == pytest.approx(1 / 5, rel=0.06)
    assert statistics.stdev(between) / statistics.mean(between) == pytest.approx(cv, rel=0.06)


def test_gaps_of_poisson_arrivals_are_exponential():
    between = gaps("poisson:5")
    for seconds in (0.05, 0.2, 0.6):
        assert sum(gap > seconds for gap in between) / len(between) == pytest.approx(
            math.exp(-5 * seconds), abs=0.01
        )


def test_arrivals_repeat_with_their_seed_and_closed_ones_have_no_times():
    arrivals = parse_arrivals("bursty:5,2")
    assert list(islice(arrivals.times(1), 9)) == list(islice(arrivals.times(1), 9))
    assert list(islice(arrivals.times(1), 9)) != list(islice(arrivals.times(2), 9))
    assert not arrivals.closed
    assert parse_arrivals("closed").closed
    with pytest.raises(WorkloadError, match="no times"):
        next(parse_arrivals("closed").times())


# -------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("parse", "text", "parts"),
    [
        (parse_popularity, "zip:1", ["'zip:1'", "uniform, zipf:EXPONENT, identical, distinct or skewed"]),
        (parse_popularity, "uniform:2", ["'uniform:2'", "zipf:EXPONENT"]),
        (parse_popularity, "zipf", ["'zipf'", "'' is no number", "zipf:EXPONENT"]),
        (parse_popularity, "zipf:-1", ["-1 is less than 0"]),
        (parse_popularity, "zipf:nan", ["nan"]),
        (parse_lengths, "normal:3", ["'normal:3'", "fixed:N, uniform:LEAST-MOST or lognormal:MEAN,SIGMA"]),
        (parse_lengths, "fixed:0", ["0 is less than 1"]),
        (parse_lengths, "fixed:1.5", ["no whole number"]),
        (parse_lengths, "uniform:9", ["no '-'"]),
        (parse_lengths, "uniform:9-3", ["9 is more than 3"]),
        (parse_lengths, "lognormal:30", ["no ','"]),
        (parse_lengths, "lognormal:30,wide", ["'wide' is no number"]),
        (parse_arrivals, "closed:3", ["closed, poisson:RATE or bursty:RATE,CV"]),
        (parse_arrivals, "poisson:0", ["0 is not more than 0"]),
        (parse_arrivals, "bursty:3", ["no ','", "bursty:RATE,CV"]),
        (parse_mix, "base", ["no '='", "CLASS=SHARE"]),
        (parse_mix, "base=1,base=2", ["base twice"]),
        (parse_mix, "base=0", ["no class a share"]),
        (parse_ramp, "4", ["no ':'", "USERS:SECONDS or xFACTOR:SECONDS"]),
        (parse_ramp, "x1:10", ["1 is not more than 1"]),
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_says_what_was_wrong_and_what_forms_there_are(parse, text, parts):
    with pytest.raises(WorkloadError) as error:
        parse(text)
    for part in parts:
        assert part in str(error.value)


def test_shares_of_a_mix_sum_to_one():
    assert parse_mix("base=1, qaa=3") == {"base": 0.25, "qaa": 0.75}


# ------------------------------------------------------------------------------------------------- requests


MODELS = {"base": ["assistant"], "qaa": [f"q{i}" for i in range(20)], "lora": ["l0", "l1"]}
SETTINGS = {
    "popularity": parse_popularity("zipf:1"), "prompt_tokens": parse_lengths("uniform:8-16"),
    "output_tokens": parse_lengths("fixed:4"),
}  # fmt: skip


def test_requests_keep_to_the_mix_and_the_shares_and_repeat_with_their_seed():
    settings = SETTINGS | {"mix": parse_mix("base=0.2,qaa=0.6,lora=0.2"), "chat_share": 0.5, "stream_share": 0.8}
    asked = list(islice(requests(MODELS, **settings, seed=4), 5000))
    classes = Counter(request.model_class for request in asked)
    assert classes["qaa"] / 5000 == pytest.approx(0.6, abs=0.03)
    assert classes["base"] / 5000 == pytest.approx(0.2, abs=0.03)
    assert sum(request.chat for request in asked) / 5000 == pytest.approx(0.5, abs=0.03)
    assert sum(request.stream for request in asked) / 5000 == pytest.approx(0.8, abs=0.03)
    most = Counter(r.model for r in asked if r.model_class == "qaa").most_common()
    assert most[0][1] / classes["qaa"] == pytest.approx(SETTINGS["popularity"].shares(20)[0], abs=0.03)
    assert asked == list(islice(requests(MODELS, **settings, seed=4), 5000))
    assert asked != list(islice(requests(MODELS, **settings, seed=5), 5000))


def test_which_model_is_the_most_popular_is_drawn_from_the_seed():
    favourites = {
        Counter(r.model for r in islice(requests(MODELS, **SETTINGS, seed=seed), 300)).most_common(1)[0][0]
        for seed in range(8)
    }
    assert len(favourites) > 3


def test_a_mix_with_a_class_that_is_not_there_says_what_is():
    with pytest.raises(WorkloadError, match=r"prefix=0\.5.*base \(1\), lora \(2\), qaa \(20\)"):
        requests(MODELS, **SETTINGS, mix=parse_mix("base=1,prefix=1"))
    with pytest.raises(WorkloadError, match="no model"):
        requests({"base": []}, **SETTINGS)


def test_a_request_is_what_openai_clients_send():
    request = next(requests({"base": ["m"]}, **SETTINGS, stream_share=0.0))
    assert request.path == "/v1/chat/completions"
    assert request.body({"ignore_eos": True}) == {
        "model": "m",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": request.prompt}],
        "ignore_eos": True,
    }
    request = next(requests({"base": ["m"]}, **SETTINGS, chat_share=0.0))
    assert request.path == "/v1/completions"
    assert request.body()["prompt"] == request.prompt
    assert request.body()["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("tokens", [1, 4, 40, 4000])
def test_prompts_have_three_words_for_four_tokens_and_long_ones_differ(tokens):
    rng = random.Random(6)
    prompts = [english(rng, tokens) for _ in range(20)]
    assert {len(prompt.split()) for prompt in prompts} == {max(1, round(tokens * 0.75))}
    assert all(any(prompt.startswith(question.split()[0]) for question in QUESTIONS) for prompt in prompts)
    if tokens > 30:
        assert len(set(prompts)) == 20


# ------------------------------------------------------------------------------------------ answers and SLO


def test_the_time_between_tokens_is_the_mean_from_the_first_to_the_last():
    assert Timing(2.0, 0.5, 1.5, 11).inter_token == pytest.approx(0.1)
    assert Timing(2.0, 0.5, 0.5, 1).inter_token is None
    assert Timing(2.0, tokens=11).inter_token is None


@pytest.mark.parametrize(
    ("timing", "met"),
    [
        (Timing(3.0, 0.5, 2.5, 21), True),
        (Timing(3.1, 0.5, 2.5, 21), False),
        (Timing(3.0, 0.6, 2.5, 21), False),
        (Timing(3.0, 0.5, 2.6, 21), False),
        (Timing(3.0), True),
    ],
    ids=["at all limits", "too long", "first too late", "tokens too slow", "not streamed"],
)
def test_an_answer_must_meet_every_limit_that_applies(timing, met):
    assert Objective(first=0.5, inter_token=0.1, seconds=3.0).met_by(timing) is met


def test_failed_and_refused_requests_miss_the_slo_and_unfinished_ones_are_not_judged():
    tally, objective = Tally(failed=1, refused=1, unfinished=5), Objective(seconds=1.0, share=0.75)
    for seconds in (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 2.0, 0.5):
        tally.add_answer(Timing(seconds, 0.1, 0.4, 4), objective)
    assert (tally.met, tally.judged) == (7, 10)
    assert tally.attainment == 0.7
    assert not objective.attained(tally.met, tally.judged)
    assert Objective(share=0.7).attained(tally.met, tally.judged)
    assert not Objective(share=0.0).attained(0, 0)
    figures = tally.summary(seconds=4.0)
    assert figures["requests_per_second"] == 2
    assert figures["tokens_per_second"] == 8
    assert figures["ttft_s"]["p50"] == pytest.approx(0.1, rel=0.011)


def test_percentiles_are_within_one_percent_and_extremes_exact():
    rng = random.Random(7)
    values = [rng.lognormvariate(-3, 1) for _ in range(3000)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for share in (0.01, 0.5, 0.9, 0.99):
        assert histogram.percentile(share) == pytest.approx(values[math.ceil(share * len(values)) - 1], rel=0.0101)
    assert histogram.percentile(1) == values[-1]
    assert histogram.summary()["max"] == values[-1]
    assert histogram.summary()["mean"] == pytest.approx(statistics.mean(values))
    assert Histogram().summary()["p50"] is None


def test_tallies_of_several_processes_add_up_to_that_of_one():
    parts, whole = [Tally(refused=1), Tally(failed=2)], Tally(refused=1, failed=2)
    for i in range(100):
        timing = Timing(0.1 + i / 50, 0.1 + i / 100, 0.1 + i / 60, 3)
        parts[i % 2].add_answer(timing, Objective(seconds=1.0))
        whole.add_answer(timing, Objective(seconds=1.0))
    sent = {str(i): Tally.from_json(part.to_json()) for i, part in enumerate(parts)}
    summed, expected = added(sent).summary(10.0), whole.summary(10.0)
    assert summed["ttft_s"].pop("mean") == pytest.approx(expected["ttft_s"].pop("mean"))
    for key in ("end_to_end_s", "request_tokens_per_second"):
        assert summed[key].pop("mean") == pytest.approx(expected[key].pop("mean"))
    assert summed == expected
    assert Tally.from_json(Tally().to_json()).summary(1.0) == Tally().summary(1.0)


# ---------------------------------------------------------------------------------------------------- ramps


def steps(*rates: float, attainment: float = 1.0) -> list[Step]:
    return [Step(2 * i + 2, rate, attainment) for i, rate in enumerate(rates)]


def test_a_ramp_adds_or_multiplies_users():
    assert parse_ramp("4:15") == Ramp(15, users=4)
    assert parse_ramp("4:15").after(8) == 12
    assert [parse_ramp("x1.5:10").after(users) for users in (1, 2, 10)] == [2, 3, 15]


def test_a_ramp_ends_when_throughput_stops_growing_or_the_slo_is_missed():
    assert why_ended(steps(1, 2, 3, 4), None) is None
    assert why_ended(steps(1, 2, 4, 4.1), None) is None
    assert "throughput" in why_ended(steps(1, 2, 4, 4.1, 4.1), None)
    assert why_ended([], Objective()) is None
    assert "SLO was missed with 2 users" in why_ended(steps(1, attainment=0.9), Objective(share=0.95))


def test_the_knee_is_the_fewest_users_near_the_best_throughput_that_hold_the_slo():
    measured = steps(1, 2, 3.9, 4, 4.1)
    assert knee(measured, None).users == 6
    missed = [*measured[:2], Step(6, 3.9, 0.5)]
    assert knee(missed, Objective(share=0.9)).users == 4
    assert knee(steps(1, attainment=0.5), Objective()) is None
    assert knee([Step(2, 0.0, None)], None) is None


def test_lengths_can_be_made_without_a_form():
    assert Lengths("fixed", 3).draw(random.Random()) == 3
