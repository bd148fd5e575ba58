"""What a comparison is made of: plan, rows, scores, reasons of failures, and what the command refuses."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")

from qaa_serve.training import TrainingError, TrainOptions, train
from qaa_serve.training.answers import generate
from qaa_serve.training.compare import cli
from qaa_serve.training.compare.figures import _parameters
from qaa_serve.training.compare.files import model_digest, owned
from qaa_serve.training.compare.paired import differences
from qaa_serve.training.compare.plan import Variant, make_plan, read_config
from qaa_serve.training.compare.results import at_the_edge, smoothed, summarise
from qaa_serve.training.compare.runner import Run, make_run, run_process, tail, why
from qaa_serve.training.compare.study import best_point
from qaa_serve.training.loss import row_losses
from qaa_serve.training.methods import COMPARED
from qaa_serve.training.metrics import (
    BertScore,
    bleu,
    bleu_from,
    exact_match,
    rouge,
    text_scores,
    unseen_by_rouge,
)
from qaa_serve.training.rows import as_test_set, notes_on, read_rows, split
from qaa_serve.training.trained import load_trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", "llama")


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


class TestPlan:
    def config(self, tmp_path: Path, text: str) -> dict[str, Any]:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_config(path)

    def test_all_methods_by_default_without_validation(self) -> None:
        plan = make_plan({})
        assert [variant.name for variant in plan.variants] == [*COMPARED, "qaa frozen", "bias"]
        assert plan.seeds == (0, 1, 2)
        assert plan.validation is None
        assert {variant.name: variant.points for variant in plan.variants} == {
            **dict.fromkeys([*COMPARED, "bias"], ({},)),
            "qaa frozen": ({"freeze_angles": True},),
        }

    def test_grid_is_the_product_of_its_lists_over_the_common_options(self, tmp_path: Path) -> None:
        config = self.config(
            tmp_path,
            """
            common: {epochs: 2, target_modules: [q_proj, v_proj]}
            seeds: [4, 9]
            controls: false
            methods:
              qaa: {lr: [1e-3, 0.1], layers: [2, 4]}
              lora r=4: {method: lora, rank: 4}
            """,
        )
        plan = make_plan(config)
        qaa, lora = plan.variants
        common = {"epochs": 2, "target_modules": ["q_proj", "v_proj"]}
        assert [(p["lr"], p["layers"]) for p in qaa.points] == [(0.001, 2), (0.001, 4), (0.1, 2), (0.1, 4)]
        assert all(common.items() <= point.items() for point in qaa.points)
        assert (lora.name, lora.method, lora.points) == ("lora r=4", "lora", ({**common, "rank": 4},))
        assert plan.seeds == (4, 9)
        assert plan.validation == 0.1

    def test_what_is_given_goes_before_the_config(self) -> None:
        plan = make_plan(
            {"common": {"epochs": 2}, "methods": {"mine": {"method": "qaa"}}, "seeds": 5, "validation": 0.2},
            methods=["lora", "mine"],
            seeds=[7],
            validation="held.jsonl",
            common={"epochs": 1},
        )
        assert [(variant.name, variant.method) for variant in plan.variants] == [
            ("lora", "lora"),
            ("mine", "qaa"),
            ("qaa frozen", "qaa"),
            ("bias", "bias"),
        ]
        assert plan.variants[0].points == ({"epochs": 1},)
        assert (plan.seeds, plan.validation) == ((7,), Path("held.jsonl"))

    def test_common_option_that_a_method_cannot_have_is_not_asked_of_it(self) -> None:
        plan = make_plan({}, methods=["full", "lora"], common={"target_modules": ["q_proj"]})
        assert [variant.points for variant in plan.variants] == [({},), ({"target_modules": ["q_proj"]},)]

    def test_controls_stand_beside_qaa_unless_they_are_there_or_not_wanted(self) -> None:
        def names(config: dict[str, Any], **given: Any) -> list[str]:
            return [variant.name for variant in make_plan(config, **given).variants]

        grid = {"methods": {"qaa": {"lr": [0.1, 0.2], "theta_lr": [0.3, 0.4]}}}
        *_, frozen, _ = make_plan(grid).variants
        assert frozen.points == ({"lr": 0.1, "freeze_angles": True}, {"lr": 0.2, "freeze_angles": True})
        assert names({}, methods=["lora"]) == ["lora"]
        assert names(grid, controls=False) == names({**grid, "controls": False}) == ["qaa"]
        own = {"methods": {"qaa": {}, "still": {"method": "qaa", "freeze_angles": True}, "bias": {"lr": 0.1}}}
        assert names(own) == ["qaa", "still", "bias"]

    def test_configs_of_peft_are_a_grid(self) -> None:
        (vera,) = make_plan({"methods": {"vera": {"peft": [{"r": 4}, {"r": 8}]}}}).variants
        assert vera.points == ({"peft": {"r": 4}}, {"peft": {"r": 8}})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"methods": {"lorra": {}}}, "'lorra' is of the unknown method 'lorra'; known are: qaa, lora"),
            ({"methods": {"qaa": {"rank": 3}}}, r"'qaa' \(method qaa\): unknown key 'rank'; known are: .*layers"),
            ({"common": {"lear": 1}}, "the common options: unknown key 'lear'; known are: .*epochs"),
            ({"common": {"lr": [1, 2]}}, "common option 'lr' must be one value"),
            ({"methods": {"qaa": {"lr": "fast"}}}, "'qaa': --lr: invalid float value: 'fast'"),
            ({"methods": {"qaa": {"lr": -1}}}, "'qaa': --lr must be above 0, found -1.0"),
            ({"methods": {"qaa": {"ansatz": "flat"}}}, "'qaa': --ansatz: invalid choice: 'flat'"),
            ({"methods": {"qaa": {"lr": []}}}, "the list of 'lr' is empty"),
            ({"methods": {"qaa": 3}}, "'qaa' must be a table"),
            ({"methods": {"base": {"method": "qaa"}}}, "'base' is the name of the untrained model's row"),
            ({"seeds": 0}, "seeds: a number above 0"),
            ({"seeds": [1, 1]}, "seeds: one is there twice"),
            ({"validation": 1.5}, "validation: a part from 0"),
            ({"validation": 0, "methods": {"qaa": {"lr": [0.1, 0.2]}}}, "the test set is not used"),
            ({"methods": {"full": {"target_modules": ["q_proj"]}}}, "unknown key 'target_modules'"),
        ],
    )
    def test_refused(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            make_plan(config)

    def test_unknown_method_lists_the_known_ones_and_the_configs(self) -> None:
        with pytest.raises(TrainingError, match=r"unknown method 'qlora'; known are: qaa, lora.*, mine"):
            make_plan({"methods": {"mine": {"method": "qaa"}}}, methods=["qlora"])

    def test_unknown_table_in_the_config(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="unknown key 'method'; known are: common, methods, seeds, valid"):
            self.config(tmp_path, "method: {qaa: {}}")


class TestRows:
    def test_prompts_with_several_references(self, base: Path, tmp_path: Path) -> None:
        rows = [pair("t5 t6", "t7"), pair("t9", "t10 t11"), pair("t5 t6", "t8"), pair("t5 t6", "t7")]
        read = read_rows(str(write_rows(tmp_path / "rows.jsonl", rows)), AutoTokenizer.from_pretrained(base))
        test = as_test_set(read.rows)
        assert [(prompt["references"], prompt["shown"]) for prompt in test["prompts"]] == [
            (["t7", "t8"], "t5 t6"),
            (["t10 t11"], "t9"),
        ]
        assert [row["prompt"] for row in test["rows"]] == [0, 1, 0, 0]
        assert test["prompts"][0]["ids"] == test["rows"][0]["input_ids"][:-2]  # less the answer and the end token

    def test_references_of_a_row_are_as_good_as_repeated_prompts(self, base: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        talk = {"messages": [{"role": "user", "content": "t5"}]}

        def test_set(*rows: Any) -> Any:
            return as_test_set(read_rows(str(write_rows(tmp_path / "rows.jsonl", list(rows))), tokenizer).rows)

        said = [
            {"messages": [*talk["messages"], {"role": "assistant", "content": f"t3 {t}"}]} for t in ("t6", "t7")
        ]
        assert test_set(
            {"prompt": "t5", "references": ["t6", "t7"]}, {**talk, "references": ["t3 t6", "t3 t7"]}
        ) == (test_set(pair("t5", "t6"), pair("t5", "t7"), *said))

    def test_what_is_shown_of_a_conversation(self, base: Path, tmp_path: Path) -> None:
        """Of parts their texts; of a call of tools without words the call; the last answer that is learnt."""
        call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
        asks = {"role": "user", "content": [{"type": "text", "text": "t5"}, {"type": "text", "text": "t6"}]}
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = (
            "{% for m in messages %} {{ m.content }}{% for call in m.tool_calls %} t9{% endfor %}{% endfor %}"
        )
        rows = [
            {"messages": [asks, {"role": "assistant", "tool_calls": [call]}]},
            {"messages": [asks, {"role": "assistant", "content": "t7"}, asks,
                          {"role": "assistant", "content": "t8", "weight": 0}]},
        ]  # fmt: skip
        called, spoken = read_rows(str(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer).rows
        assert (called.shown, called.reference) == ("t5\nt6", "t9")
        assert (spoken.shown, spoken.reference) == ("t5\nt6", "t7")

    def test_last_answer_of_a_conversation_is_asked_for(self, base: Path, tmp_path: Path) -> None:
        turns = [("user", "t5"), ("assistant", "t3 t6"), ("user", "t7"), ("assistant", "t3 t8 t9")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        tokenizer = AutoTokenizer.from_pretrained(base)
        (found,) = read_rows(str(write_rows(tmp_path / "rows.jsonl", [row])), tokenizer).rows
        assert (found.shown, found.reference) == ("t7", "t3 t8 t9")
        assert list(found.prompt) == [1, 5, 3, 6, 7, 3]
        assert [label for label in found.labels if label != -100] == [6, 8, 9]  # the loss is on both answers

    def test_split_is_by_prompt_and_does_not_depend_on_the_order(self, base: Path, tmp_path: Path) -> None:
        rows = [pair(f"t{i % 10 + 5}", f"t{i + 20}") for i in range(30)]
        tokenizer = AutoTokenizer.from_pretrained(base)
        train_rows, held = split(read_rows(str(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer).rows, 0.2)
        assert (len(train_rows), len(held)) == (24, 6)
        assert not {row.prompt for row in train_rows} & {row.prompt for row in held}
        _, again = split(read_rows(str(write_rows(tmp_path / "turned.jsonl", rows[::-1])), tokenizer).rows, 0.2)
        assert {row.prompt for row in again} == {row.prompt for row in held}
        with pytest.raises(TrainingError, match="one prompt only"):
            split(read_rows(str(write_rows(tmp_path / "one.jsonl", rows[:1])), tokenizer).rows, 0.2)

    def test_bad_rows_are_named(self, base: Path, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [pair("t5", "t6"), {"prompt": "t5"}, pair("t5", " ")])
        tokenizer = AutoTokenizer.from_pretrained(base)
        with pytest.raises(TrainingError, match=r"2 of 3 rows cannot be used:\n  line 2: no known.*\n  line 3"):
            read_rows(str(path), tokenizer)
        (note,) = notes_on(read_rows(str(path), tokenizer, skip_bad_rows=True))
        assert note == f"{path}: 2 unusable rows were left out"


class TestScores:
    @pytest.fixture(params=["random", "MiniLM"])
    def encoder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        pytest.importorskip("bert_score")
        if request.param == "random":
            return tiny_bert(tmp_path / "t5-is-in-the-path")
        directory = Path(__file__).parents[1] / "examples" / "smollm2" / "all-MiniLM-L6-v2"
        if not directory.is_dir():
            pytest.skip("examples/smollm2/fetch_encoder.py was not run")
        return directory

    def test_bleu_over_a_corpus_with_several_references(self) -> None:
        texts = ["a b c d e", "f g h i"]
        references = [["q", "a b c d x"], ["f g h i"]]
        # n-grams that match, of all: 4 + 4 of 5 + 4; 3 + 3 of 4 + 3; 2 + 2 of 3 + 2; 1 + 1 of 2 + 1; no penalty,
        # since the nearest reference is as long.
        expected = 100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
        score, signature = bleu(texts, references)
        assert score == pytest.approx(expected)
        assert "tok:13a" in signature
        assert "nrefs:var" in signature
        worse, _ = bleu(texts, [["q"], ["f g h i"]])
        assert worse < score

    def test_rouge_is_the_best_of_the_references_for_each_kind(self) -> None:
        found = rouge(["a b c d"], [["a b x y", "a c d z w"]])
        assert found == {
            "rouge1": [pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)],  # a, c, d of 4 and of 5
            "rouge2": [pytest.approx(100 / 3)],  # ab of 3 and of 3, better than cd of 3 and of 4
            "rouge_l": [pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)],  # a c d
        }
        both = text_scores(["a b c d", "x"], [["a b x y", "a c d z w"], ["y"]])
        assert both.scores["rouge2"] == pytest.approx(100 / 3 / 2)

    def test_rouge_does_not_see_other_scripts(self) -> None:
        assert unseen_by_rouge([["день"], ["день", "day"], ["1"]]) == 1

    def test_exact_match(self) -> None:
        texts, references = [" a b\n", "c", "D", "e"], [["x", "a b"], ["c d"], ["d"], ["e"]]
        assert exact_match(texts, references) == 50.0

    def test_bertscore_by_its_formula(self, encoder: Path) -> None:
        """Each token but start and end against the nearest of the other text, by the last layer."""
        score = BertScore(encoder)
        tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
        assert score.layers == model.config.num_hidden_layers

        def embedded(text: str) -> torch.Tensor:
            with torch.no_grad():
                found = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            return torch.nn.functional.normalize(found, dim=-1)

        text, reference = "a b c t5", "c x t6"
        cosines = embedded(text) @ embedded(reference).T  # (tokens of the text, of the reference)
        precision, recall = cosines[1:-1].amax(1).mean(), cosines[:, 1:-1].amax(0).mean()
        (found,) = score([text], [[reference]])
        assert found == pytest.approx(100 * float(2 * precision * recall / (precision + recall)), abs=1e-3)

    def test_bertscore_is_of_each_text_against_its_best_reference(self, encoder: Path) -> None:
        score = BertScore(encoder)
        same, apart, best, empty = score(
            ["a b c", "a b c", "a b c", " "], [["a b c"], ["x y"], ["x y", "a b c"], ["a b c"]]
        )
        assert [same, best] == pytest.approx([100, 100], abs=1e-3)
        assert 0 < apart < 99
        assert empty == 0
        assert score(["x y"], [["a b c"]]) == [pytest.approx(apart, abs=1e-3)]  # F1 is symmetric
        assert score([""], [["a"]]) == [0]

    def test_bertscore_of_what_is_no_encoder(self, tmp_path: Path) -> None:
        pytest.importorskip("bert_score")
        with pytest.raises(TrainingError, match="must be from 1 to 2"):
            BertScore(tiny_bert(tmp_path / "bert"), 3)
        with pytest.raises(TrainingError, match=r"no directory of a model \(it has no config.json\)"):
            BertScore(tmp_path / "none")

    def test_smoothed(self) -> None:
        assert smoothed([2.0, 1.0]) == pytest.approx([2.0, (0.9 * 0.2 + 0.1) / 0.19])

    def test_summary_has_mean_spread_and_number(self) -> None:
        record = dict.fromkeys(
            ("trainable", "total", "steps", "train_loss", "seconds", "seconds_per_step", "adapter_bytes"), 1.0
        )
        entries = [
            {
                "training": {
                    **record,
                    "eval_loss": None,
                    "memory": {"peak_rss_bytes": 1, "peak_cuda_bytes": None},
                },
                "scores": {"bleu": score},
                "steps_to_loss": None,
            }
            for score in (1.0, 2.0, 6.0)
        ]
        found = summarise(entries)
        assert found["bleu"] == {"mean": 3.0, "sd": pytest.approx(7**0.5), "n": 3}
        assert summarise(entries[:1])["bleu"] == {"mean": 1.0, "sd": None, "n": 1}
        assert "peak_cuda_bytes" not in found


class TestDifferences:
    """To the first variant, on the same prompts."""

    REFERENCES = [[f"a b c d {word} f g h"] for word in "efghijklmnop"]  # noqa: RUF012

    def statistics(self, texts: list[str], nats: list[float]) -> Any:
        losses = np.array([nats, [2.0] * len(nats)]).T
        return {**text_scores(texts, self.REFERENCES).statistics, "test_loss": losses}

    def test_bleu_is_the_corpus_score_on_whatever_prompts(self) -> None:
        texts = [f"a b c d {word} f" for word in "efghijklmnop"]
        texts[3], texts[5] = "", "a b"
        parts = text_scores(texts, self.REFERENCES).statistics["bleu"]
        for places in (range(12), [0, 3, 3, 5, 11], [3]):
            expected, _ = bleu([texts[i] for i in places], [self.REFERENCES[i] for i in places])
            assert bleu_from(parts[list(places)].sum(0)) == pytest.approx(expected)

    def test_mean_over_seeds_and_an_interval_that_prompts_account_for(self) -> None:
        good, bad = [refs[0] for refs in self.REFERENCES], ["a b x"] * 12
        first = [self.statistics(good, [1.0] * 12), self.statistics(bad, [3.0] * 12)]
        half = self.statistics([*good[:6], *bad[6:]], [1.0] * 6 + [3.0] * 6)
        found = differences({"qaa": first, "same": first, "half": [half], "none": []})
        assert found["qaa"] is None
        assert found["none"] is None
        same, other = found["same"], found["half"]
        assert same is not None
        assert other is not None
        assert all(interval == {"difference": 0, "low": 0, "high": 0} for interval in same.values())
        assert other["test_loss"]["difference"] == pytest.approx(0)
        # 2 tokens a prompt: the mean of 12 draws from 0.5 and 1.5, less a constant 1.
        assert -other["test_loss"]["low"] == pytest.approx(1.96 * 0.5 / 12**0.5, abs=0.06)
        assert other["test_loss"]["high"] == pytest.approx(1.96 * 0.5 / 12**0.5, abs=0.06)
        assert other["rouge_l"]["low"] < 0 < other["rouge_l"]["high"]
        assert other["bleu"]["low"] < other["bleu"]["difference"] < other["bleu"]["high"]

    def test_nothing_without_the_first(self) -> None:
        assert differences({"qaa": [], "lora": [self.statistics(["a"] * 12, [1.0] * 12)]}) == {
            "qaa": None,
            "lora": None,
        }

    def test_the_same_prompts_for_both(self) -> None:
        """A constant difference has an interval without width, however much the prompts differ."""
        texts = [refs[0] for refs in self.REFERENCES]
        nats = [float(i) for i in range(12)]
        found = differences(
            {"a": [self.statistics(texts, nats)], "b": [self.statistics(texts, [n + 0.5 for n in nats])]}
        )
        assert found["b"] is not None
        assert found["b"]["test_loss"] == {end: pytest.approx(0.25) for end in ("difference", "low", "high")}


def test_one_curve_a_method_through_its_sizes() -> None:
    def variant(name: str, method: str, size: int, losses: list[float], **options: Any) -> Any:
        variants.append({"name": name, "method": method, "options": options})
        runs.extend(
            {"variant": name, "role": "final", "training": {"trainable": size}, "scores": {"test_loss": loss}}
            for loss in losses
        )

    variants: list[Any] = []
    runs: list[Any] = []
    variant("qaa 2k", "qaa", 2000, [1.0, 2.0])
    variant("mine", "peft", 900, [2.5], peft={"peft_type": "TINYLORA", "r": 2})
    variant("qaa 1k", "qaa", 1000, [3.0])
    variant("still", "qaa", 990, [2.0], freeze_angles=True)
    figure = _parameters({"variants": variants, "runs": runs, "base": {"scores": None}})
    assert figure is not None
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}
    assert curves == {"qaa": [[1000, 3], [2000, 1.5]], "mine": [[900, 2.5]], "still": [[990, 2]]}
    one, two = axes.containers[0].lines[2][0].get_segments()  # the bars of qaa: standard deviations over seeds
    assert one.tolist() == [[1000, 3], [1000, 3]]
    assert two[:, 1] == pytest.approx([1.5 - 0.5**0.5, 1.5 + 0.5**0.5])
    assert {"1k", "2k"} <= {text.get_text() for text in axes.get_xticklabels()}


def tiny_bert(directory: Path) -> Path:
    """A random encoder with two layers and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgwxyz", *(f"t{i}" for i in range(60))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=64,
    ).save_pretrained(directory)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(directory)
    return directory


class TestAnswers:
    """Every method's result, read back: in batches padded on the left it must say what it says alone."""

    @pytest.mark.parametrize("method", COMPARED)
    def test_batch_and_loss(self, base: Path, tmp_path: Path, method: str) -> None:
        prompts = [" ".join(f"t{i + k}" for k in range(i % 5 + 1)) for i in range(3, 12)]
        given = [pair(prompt, f"t{i} t{i + 1}") for i, prompt in enumerate(prompts, start=40)]
        rows = write_rows(tmp_path / "rows.jsonl", given)
        result = train(
            TrainOptions(
                str(base),
                rows,
                tmp_path / "made",
                method=method,
                lr=1e-2,
                max_steps=3,
                eval_data=rows,
                batch_size=4,
            )
        )
        model, tokenizer = load_trained(tmp_path / "made")
        test = as_test_set(read_rows(str(rows), tokenizer).rows)
        losses = row_losses(model, test["rows"], 4)
        alone = torch.cat([row_losses(model, [row], 1) for row in test["rows"]])
        torch.testing.assert_close(losses, alone, atol=1e-4, rtol=1e-4)
        total, tokens = losses.sum(0).tolist()
        assert tokens == 9 * 3
        assert total / tokens == pytest.approx(result.eval_loss, abs=1e-4)
        asked = [prompt["ids"] for prompt in test["prompts"]]
        together = dict(generate(model, tokenizer, asked, batch_size=4, max_new_tokens=6))
        apart = {
            place: next(generate(model, tokenizer, [ids], batch_size=1, max_new_tokens=6))[1]
            for place, ids in enumerate(asked)
        }
        assert together == apart
        untrained = row_losses(load_trained(base)[0], test["rows"], 4)
        assert total != pytest.approx(untrained[:, 0].sum().item(), abs=1e-3)

    def test_greedy_whatever_the_base_prefers_and_up_to_its_end_tokens(self, base: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        prompts = [[1, 5, 6], [1, 9]]
        plain = dict(generate(model, tokenizer, prompts, batch_size=2, max_new_tokens=8))
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
        assert dict(generate(model, tokenizer, prompts, batch_size=2, max_new_tokens=8)) == plain
        third = plain[0][2]
        model.generation_config.eos_token_id = [2, third]
        ended = dict(generate(model, tokenizer, prompts, batch_size=2, max_new_tokens=8))
        assert ended[0] == plain[0][: plain[0].index(third)]

    def test_padding_token_without_an_embedding(self, base: Path) -> None:
        model, tokenizer = load_trained(base)
        expected = dict(generate(model, tokenizer, [[1, 5, 6], [1]], batch_size=2, max_new_tokens=4))
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id >= model.config.vocab_size
        assert dict(generate(model, tokenizer, [[1, 5, 6], [1]], batch_size=2, max_new_tokens=4)) == expected

    def test_nothing_to_load(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="holds neither an adapter"):
            load_trained(tmp_path)


class TestRuns:
    DIGESTS = {"model": "m", "data": "d", "eval_data": None}  # noqa: RUF012

    def run(self, tmp_path: Path, **changed: Any) -> Run:
        options = {"model": "base", "data": "rows.jsonl", "lr": 0.1, **changed}
        return make_run(tmp_path, "lora r=4", "lora r=4", options, 1, self.DIGESTS)

    def test_known_by_what_it_depends_on_and_not_by_where_it_lies(self, tmp_path: Path) -> None:
        run = self.run(tmp_path)
        assert run.name == f"lora-r=4-seed1-{run.digest[:10]}"
        assert self.run(tmp_path, data="elsewhere/rows.jsonl").digest == run.digest
        assert self.run(tmp_path, lr=0.2).digest != run.digest
        other = make_run(tmp_path, "x", "x", run.options, 1, {**self.DIGESTS, "data": "other"})
        assert other.digest != run.digest

    def test_model_digest_sees_contents(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        before = model_digest(tmp_path)
        (tmp_path / "README.md").write_text("words")
        assert model_digest(tmp_path) == before
        (tmp_path / "config.json").write_text("[]")
        assert model_digest(tmp_path) != before

    def test_chosen_by_validation_loss(self, tmp_path: Path) -> None:
        points = tuple({"lr": lr} for lr in (0.1, 0.2, 0.3))
        runs = [self.run(tmp_path, **point) for point in points]
        for run, loss in zip(runs[:2], (0.5, 0.4), strict=True):  # the third one failed
            run.model.mkdir(parents=True)
            (run.model / "training.json").write_text(json.dumps({"eval_loss": loss, "train_loss": -loss}))
        assert best_point(Variant("v", "lora", points), runs) == {"lr": 0.2}
        assert best_point(Variant("v", "lora", points[1:]), runs[2:] * 2) is None

    @pytest.mark.parametrize(
        ("status", "text", "reason"),
        [
            (2, "step 1\nqaa-serve train: rows are bad:\n  line 3: no JSON\n", "rows are bad: line 3: no JSON"),
            (1, "Traceback\n  File\nRuntimeError: no such thing\n\n", "RuntimeError: no such thing"),
            (-9, "step 3/9\n", "killed by SIGKILL, most likely for want of memory"),
            (1, "", "nothing was written to the log"),
        ],
    )
    def test_reason_of_a_failure(self, tmp_path: Path, status: int, text: str, reason: str) -> None:
        (tmp_path / "log").write_text(text)
        assert why(status, tmp_path / "log").startswith(reason)

    def test_interrupt_ends_the_process_in_good_order(self, tmp_path: Path) -> None:
        code = (
            "import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit('put away'))\n"
            "print('step 1/9', flush=True); time.sleep(60)"
        )

        def interrupt(line: str) -> None:
            assert line == "step 1/9"
            raise KeyboardInterrupt

        with owned(tmp_path / "out") as lock, pytest.raises(KeyboardInterrupt):
            run_process([sys.executable, "-c", code], tmp_path / "log", interrupt, lock)
        assert tail(tmp_path / "log") == ["step 1/9", "put away"]

    def test_process_that_is_left_running_keeps_the_output_locked(self, tmp_path: Path) -> None:
        import subprocess

        with owned(tmp_path) as lock:
            orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
        try:
            with pytest.raises(TrainingError, match="in use by another comparison"), owned(tmp_path):
                pass
        finally:
            orphan.send_signal(signal.SIGKILL)
            orphan.wait()
        with owned(tmp_path):
            pass

    def test_foreign_directory_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(TrainingError, match="is no comparison's"), owned(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        (tmp_path / "file").write_text("")
        with pytest.raises(TrainingError, match="cannot be written"), owned(tmp_path / "file" / "below"):
            pass


class TestCommand:
    @pytest.fixture
    def rows(self, tmp_path: Path) -> Path:
        return write_rows(tmp_path / "rows.jsonl", [pair(f"t{i}", f"t{i + 1}") for i in range(5, 15)])

    def run(self, base: Path | str, rows: Path, *arguments: str) -> int:
        given = ["--model", str(base), "--data", str(rows), "--eval-data", str(rows)]
        given += ["--output", str(rows.parent / "report"), *arguments]
        return cli.main(given)

    def test_dry_run_writes_nothing(self, base: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = rows.parent / "grid.toml"
        config.write_text("common = {grad_accum = 2}\n[methods]\nlora = {rank = [2, 4]}\nqaa = {}\n")
        arguments = ("--config", str(config), "--epochs", "2", "--batch-size", "3", "--dry-run")
        assert self.run(base, rows, *arguments) == 0
        out = capsys.readouterr()
        assert "9 rows to train on, 1 to validate on, 10 prompts to test on; seeds 0, 1, 2" in out.out
        assert "  rank 2: 4 steps, 2,560 parameters\n  rank 4: 4 steps, 5,120 parameters" in out.out
        assert "13 trainings in all, 13 evaluations" in out.out
        assert "10 of the 10 test prompts are training prompts too" in out.err
        assert not (rows.parent / "report").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--methods", "lora,qlora"), "unknown method 'qlora'; known are: qaa, lora"),
            (("--max-new-tokens", "400"), "is more than the 256 that the base model takes"),
            (("--max-new-tokens", "0"), "--max-new-tokens must be above 0"),
            (("--config", "none.yaml"), "none.yaml cannot be read: No such file"),
            (("--batch-size", "0"), "--batch-size must be above 0"),
            (("--data", "none.jsonl"), "none.jsonl cannot be read"),
            (("--bertscore-model", "none"), "--bertscore-model none is no directory of a model"),
        ],
    )
    def test_bad_input(
        self, base: Path, rows: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(base, rows, *arguments) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("qaa-serve compare: ")
        assert message in err
        assert not (rows.parent / "report").exists()

    def test_missing_model(self, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("no/model", rows) == 2
        assert "the base model 'no/model' cannot be read" in capsys.readouterr().err

    def test_missing_packages(
        self, base: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "bert_score", None)
        assert self.run(base, rows, "--bertscore-model", "somewhere") == 2
        assert 'bert_score is not installed; comparing needs the extra: pip install "qaa-serve[comp' in (
            capsys.readouterr().err
        )
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        assert self.run(base, rows) == 2
        assert capsys.readouterr().err == (
            "qaa-serve compare: sacrebleu is not installed; comparing needs the extra: "
            'pip install "qaa-serve[compare]"\n'
        )


@pytest.mark.parametrize(
    ("chosen", "tried", "at_the_end"),
    [
        (0.1, (0.1, 0.2, 0.4), True),
        (0.4, (0.1, 0.2, 0.4), True),
        (0.2, (0.1, 0.2, 0.4), False),
        (1, (1, 2), False),
    ],
)
def test_a_best_rate_at_the_end_of_its_grid_is_pointed_out(
    chosen: float, tried: tuple[float, ...], at_the_end: bool
) -> None:
    variant = Variant("qaa", "qaa", tuple({"lr": value, "layers": 2} for value in tried))
    notes = list(at_the_edge(variant, {"lr": chosen, "layers": 2}))
    assert len(notes) == at_the_end
    assert all(note.startswith(f"qaa: the best lr of those tried, {chosen:g}, is at the end") for note in notes)
