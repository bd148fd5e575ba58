"""What the load tests draw: shares, lengths, models, prompts; and the figures that are made of the answers."""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loadtests"))

from records import Objective, Record, percentile, summarise
from report import latency_rows, markdown, notes, read_series, series_rows, share_rows, text_table
from workload import (
    QUESTIONS,
    Lengths,
    Models,
    WorkloadError,
    english,
    exact_english,
    parse_lengths,
    parse_popularity,
    parse_shares,
)

DRAWS = 20_000


def draws(form: str) -> list[int]:
    lengths, rng = parse_lengths(form), random.Random(2)
    return [lengths.draw(rng) for _ in range(DRAWS)]


# ---------------------------------------------------------------------------------------- shares and lengths


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("uniform", [1 / 4] * 4),
        ("zipf:0", [1 / 4] * 4),
        ("zipf:1", [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        ("zipf:2", [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
        ("distinct", [1 / 4] * 4),
    ],
)
def test_each_popularity_has_its_shares_and_is_drawn_with_them(form, expected):
    picked = Counter(islice(parse_popularity(form).picks(4, random.Random(1)), DRAWS))
    assert parse_popularity(form).shares(4) == pytest.approx(expected)
    assert [picked[i] / DRAWS for i in range(4)] == pytest.approx(expected, abs=0.015)


def test_distinct_takes_each_model_once_before_any_twice():
    assert list(islice(parse_popularity("distinct").picks(3, random.Random()), 7)) == [0, 1, 2, 0, 1, 2, 0]


def test_lengths_have_the_distribution_that_was_asked_for():
    assert set(draws("fixed:7")) == set(draws("7")) == {7}
    uniform = draws("uniform:16-20")
    assert set(uniform) == {16, 17, 18, 19, 20}
    assert statistics.mean(uniform) == pytest.approx(18, abs=0.05)
    lognormal = draws("lognormal:100,0.8")
    assert statistics.mean(lognormal) == pytest.approx(100, rel=0.02)
    assert statistics.stdev(map(math.log, lognormal)) == pytest.approx(0.8, rel=0.02)
    assert min(draws("lognormal:1,2")) == 1
    assert Lengths("fixed", 3).draw(random.Random()) == 3


@pytest.mark.parametrize(
    ("parse", "text", "parts"),
    [
        (parse_popularity, "zip:1", ["'zip:1'", "uniform, zipf:EXPONENT or distinct"]),
        (parse_popularity, "uniform:2", ["'uniform:2'", "zipf:EXPONENT"]),
        (parse_popularity, "zipf", ["'zipf'", "zipf:EXPONENT"]),
        (parse_popularity, "zipf:-1", ["-1 is not at least 0"]),
        (parse_popularity, "zipf:nan", ["nan"]),
        (parse_lengths, "normal:3", ["'normal:3'", "fixed:N, uniform:LEAST-MOST or lognormal:MEAN,SIGMA"]),
        (parse_lengths, "fixed:0", ["0 is not a whole number, at least 1"]),
        (parse_lengths, "1.5", ["a whole number"]),
        (parse_lengths, "uniform:9", ["uniform:LEAST-MOST"]),
        (parse_lengths, "uniform:9-3", ["3 is not a whole number, at least 9"]),
        (parse_lengths, "lognormal:30", ["lognormal:MEAN,SIGMA"]),
        (parse_lengths, "lognormal:30,wide", ["'wide' is no number"]),
        (parse_shares, "0,1.5", ["1.5 is not from 0 to 1"]),
        (parse_shares, "half", ["'half' is no number"]),
    ],
)
def test_a_setting_that_makes_no_sense_says_what_was_wrong_and_what_forms_there_are(parse, text, parts):
    with pytest.raises(WorkloadError) as error:
        parse(text)
    for part in parts:
        assert part in str(error.value)


# -------------------------------------------------------------------------------------------------- models

ADAPTERS = [f"a{i}" for i in range(20)]


def models(seed: int = 4, **settings: float) -> Models:
    return Models(["base"], ADAPTERS, parse_popularity("zipf:1"), random.Random(seed), **settings)


def test_models_are_drawn_by_popularity_beside_the_base_and_repeat_with_their_seed():
    source = models(base_share=0.2)
    asked = Counter(source.next() for _ in range(DRAWS))
    assert asked["base"] / DRAWS == pytest.approx(0.2, abs=0.015)
    most = max(count for name, count in asked.items() if name != "base")
    assert most / DRAWS == pytest.approx(0.8 * parse_popularity("zipf:1").shares(20)[0], abs=0.015)
    first, again, other = ([source.next() for _ in range(50)] for source in (models(4), models(4), models(5)))
    assert first == again != other
    favourites = {Models([], ADAPTERS, parse_popularity("zipf:9"), random.Random(i)).next() for i in range(20)}
    assert len(favourites) > 3, "which adapter is the most popular is drawn, too"


def test_the_cold_ones_come_in_turn_and_the_hot_ones_between_them():
    source = models(hot=3)
    asked = [source.next(0.25) for _ in range(4000)]
    (hot, _), *_ = Counter(asked).most_common()
    hottest = {name for name, _ in Counter(asked).most_common(3)}
    cold = [name for name in asked if name not in hottest]
    assert hot in hottest
    assert len(cold) / len(asked) == pytest.approx(0.25, abs=0.03)
    assert len(set(cold)) == 17
    assert cold[:17] == cold[17:34], "the longest ago comes next: each of the 17 once, then again"
    assert {source.next(0.0) for _ in range(200)} == hottest
    assert not hottest & {source.next(1.0) for _ in range(200)}


def test_models_that_are_not_there_are_missed_at_once():
    with pytest.raises(WorkloadError, match="no model"):
        Models([], [], parse_popularity("uniform"), random.Random())
    with pytest.raises(WorkloadError, match="lists none"):
        Models([], ADAPTERS, parse_popularity("uniform"), random.Random(), base_share=0.1)
    with pytest.raises(WorkloadError, match="of 20 adapters 20 are to be hot"):
        models(hot=20)
    alone = Models(["base"], [], parse_popularity("uniform"), random.Random())
    assert {alone.next() for _ in range(9)} == {"base"}


# ------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("tokens", [1, 4, 40, 4000])
def test_prompts_have_three_words_for_four_tokens_and_long_ones_differ(tokens):
    rng = random.Random(6)
    prompts = [english(rng, tokens) for _ in range(20)]
    assert {len(prompt.split()) for prompt in prompts} == {max(1, round(tokens * 0.75))}
    assert all(any(prompt.startswith(question.split()[0]) for question in QUESTIONS) for prompt in prompts)
    if tokens > 30:
        assert len(set(prompts)) == 20


def test_prompts_are_exact_with_a_tokenizer_or_refused():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(__file__).parents[1] / "examples/assistant/base/tokenizer.json"))
    text, rng = exact_english(tokenizer), random.Random(1)
    for tokens in (1, 2, 7, 64, 500):
        assert len(tokenizer.encode(text(rng, tokens), add_special_tokens=False).ids) == tokens

    class Doubling:
        """Whatever it is given has one token more."""

        def encode(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"ids": [0, *text.split()]})

        def decode(self, ids: list[str]) -> str:
            return " ".join(map(str, ids))

    with pytest.raises(WorkloadError, match="exactly 5 tokens"):
        exact_english(Doubling())(rng, 5)


# ------------------------------------------------------------------------------------------------- records


def answer(at: float, tier: str, first: float, seconds: float = 1.0, **more: object) -> Record:
    values = {"inter_token_s": 0.01, "longest_gap_s": 0.02, "prompt_tokens": 8, "tokens": 10} | more
    kind = values.pop("kind", "base" if tier == "base" else "qaa")
    asked = values.pop("asked_cold", None)
    return Record(at, "m", kind, tier, asked, "answered", "", seconds, first, **values)


def lost(at: float, outcome: str, problem: str = "") -> Record:
    return Record(at, "m", "qaa", "host", None, outcome, problem, 0.1)


def test_percentiles_are_values_that_were_measured():
    assert [percentile(range(1, 101), share) for share in (0.5, 0.95, 0.99, 1)] == [50, 95, 99, 100]
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([], 0.5) is None


def test_figures_are_of_what_was_sent_after_the_warm_up_and_rates_of_what_came_in_the_time():
    records = [
        answer(1.0, "host", 9.0, 2.5),  # sent in the warm-up, came after it: counts in the rate alone
        answer(1.5, "host", 9.0, 2.5),
        answer(0.0, "host", 9.0, 1.0),  # all in the warm-up
        answer(3.0, "device", 0.1),
        answer(4.0, "host", 0.3),
        answer(5.0, "store", 0.8),
        answer(11.5, "source", 1.0, 2.0),  # sent in time, came too late for the rate
    ]
    summary = summarise(records, 2.0, 12.0)
    assert summary["all"]["answered"] == 4
    assert summary["all"]["requests_per_second"] == 5 / 10
    assert summary["all"]["tokens_per_second"] == 50 / 10
    assert list(summary["tiers"]) == ["device", "host", "store", "source"]
    assert summary["tiers"]["host"]["ttft_s"] == {
        "count": 1, "mean": 0.3, "p50": 0.3, "p90": 0.3, "p95": 0.3, "p99": 0.3, "max": 0.3,
    }  # fmt: skip
    assert summary["cold_share"] == 0.5
    assert (summary["ttft_s"]["cold"]["p50"], summary["ttft_s"]["warm"]["p50"]) == (0.8, 0.1)
    assert any("after 800 ms" in note and "8.00 times" in note for note in notes({**summary, "swaps": {}}))
    assert ("store", "1", "0", "0", "0.10") in [row[:5] for row in latency_rows(summary)]
    assert markdown(latency_rows(summary))[-1].startswith("| all | 4 | 0 | 0 | 0.50 | 5.0 | 300 / 1,000 / 1,000 |")
    assert len({len(line) for line in text_table({**summary, "swaps": {}})[:5]}) == 1, "in columns"


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, True),
        ({"first": 0.6}, False),
        ({"inter_token_s": 0.11}, False),
        ({"seconds": 3.1}, False),
        ({"first": None, "inter_token_s": None}, True),
    ],
    ids=["at all limits", "first too late", "tokens too slow", "too long", "not streamed"],
)
def test_an_answer_must_meet_every_limit_that_applies(changed, met):
    values = {"first": 0.5, "seconds": 3.0, "inter_token_s": 0.1} | changed
    assert Objective(0.5, 0.1, 3.0).met_by(answer(0.0, "host", **values)) is met


def test_failed_and_refused_requests_miss_the_slo_and_unfinished_ones_are_not_judged():
    records = [answer(i, "host", 0.1) for i in range(7)]
    records += [answer(8, "host", 9.0), lost(8, "failed", "500 gone"), lost(9, "refused"), lost(9, "unfinished")]
    summary = summarise(records, 0.0, 10.0, objective=Objective(first_s=1.0, share=0.7))
    assert summary["all"]["attainment"] == 0.7
    assert summary["slo"] == {"first_s": 1.0, "share": 0.7, "met": True}
    assert summarise(records, 0.0, 10.0, objective=Objective(first_s=1.0, share=0.71))["slo"]["met"] is False
    assert summary["failures"] == {"500 gone": 1}
    assert summarise([], 0.0, 10.0, objective=Objective())["slo"]["met"] is False


def test_turns_show_throughput_against_the_share_of_cold_requests():
    records = [answer(i / 10, "host", 0.05, 0.05, asked_cold=0.0) for i in range(100)]
    records += [answer(10 + i / 2, "store", 0.4, 0.4, asked_cold=0.5) for i in range(10)]
    records += [answer(10.01 + i / 2, "host", 0.2, 0.4, asked_cold=0.5) for i in range(10)]
    records += [answer(15 + i / 10, "host", 0.1, 0.1, asked_cold=0.0) for i in range(50)]
    summary = summarise(records, 0.0, 19.5, every=5)
    found = [(turn["asked_cold"], turn["cold_share"]) for turn in summary["turns"]]
    assert found == [(0.0, 0.0), (0.0, 0.0), (0.5, 0.5), (0.0, 0.0)], "the last one lacks a tenth"
    assert summary["turns"][2]["requests_per_second"] == 4
    assert summary["turns"][2]["ttft_p50_s"] == {"cold": 0.4, "warm": 0.2}
    _, none, half = share_rows(summary)
    assert none[:3] == ("0%", "3", "0% (0% to 0%)")
    rates = ("4.00 (4.00 to 4.00)", "40 (40 to 40)")
    assert half == ("50%", "1", "50% (50% to 50%)", *rates, "200 (200 to 200)", "400 (400 to 400)")
    assert len(summarise(records, 0.0, 18.0, every=5)["turns"]) == 3, "the last one lacks two fifths"
    assert share_rows(summarise([answer(1, "host", 0.1)], 0.0, 9.0, every=3))[1:] == []


def test_a_share_of_cold_requests_that_was_not_reached_is_said():
    records = [answer(i, "host", 0.1, 0.1, asked_cold=0.5) for i in range(10)]
    (said,) = notes({**summarise(records, 0.0, 10.0, every=5), "swaps": {}})
    assert said.startswith("50% were to be cold, 0% were")


def test_the_servers_series_are_read_without_most_labels_and_their_changes_shown():
    page = (
        "# TYPE qaa_requests counter\n"
        'qaa_requests_total{{adapter="a",outcome="success"}} {0}\n'
        'qaa_requests_total{{adapter="b",outcome="success"}} {0}\n'
        'qaa_requests_total{{adapter="b",outcome="rejected"}} 4\n'
        "# TYPE qaa_adapter_load_seconds histogram\n"
        'qaa_adapter_load_seconds_bucket{{le="+Inf"}} {0}\n'
        "qaa_adapter_load_seconds_sum {1}\n"
        "qaa_adapter_load_seconds_count {0}\n"
        "# TYPE qaa_adapter_cache_bytes gauge\n"
        "qaa_adapter_cache_bytes {0}\n"
        "# TYPE python_info gauge\n"
        "python_info 1\n"
    )
    before, after = read_series(page.format(10, 1.0)), read_series(page.format(30, 3.0))
    assert after['qaa_requests_total{outcome="success"}'] == 60
    assert series_rows(before, after)[1:] == [
        ("`qaa_adapter_cache_bytes`", "", "10 -> 30"),
        ("`qaa_adapter_load_seconds`", "20", "0.1"),
        ('`qaa_requests_total{outcome="success"}`', "40", ""),
    ]
    assert series_rows(after, after)[1:] == []
