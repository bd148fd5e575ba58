"""Methods of PEFT beside QAA: what is saved is what was trained, and a server takes those that say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_training_methods import loss_of
from training_support import options

from qaa_serve.adapters import AdapterError, check_lora
from qaa_serve.training import TrainingError, train
from qaa_serve.training.methods import COMPARED, METHODS
from qaa_serve.training.methods.base import SERVED
from qaa_serve.training.methods.peft import PRESETS
from qaa_serve.training.trained import load_trained

#: What their defaults for real models are too large for.
SMALL: dict[str, dict[str, Any]] = {
    "fourierft": {"peft": {"n_frequency": 100}},
    "shira": {"rank": 2},
    "oft": {"peft": {"oft_block_size": 4}},
    "vblora": {"peft": {"num_vectors": 20, "topk": 1}},
}


def one(base: Path, data: Path, method: str, **changed: Any) -> Any:
    return train(options(base, data, method=method, method_options=SMALL.get(method, {}), **changed))


@pytest.mark.parametrize("method", [preset.name for preset in PRESETS])
def test_a_preset_trains_and_is_saved_as_trained(base: Path, data: Path, method: str) -> None:
    result = one(base, data, method, max_steps=12, eval_data=data)
    assert 0 < result.trainable < result.total
    model, _ = load_trained(result.output)
    assert loss_of(model) == pytest.approx(result.eval_loss, abs=1e-4)
    assert result.eval_loss < result.base_eval_loss
    served = METHODS[method].usage == SERVED
    if json.loads((result.output / "adapter_config.json").read_text())["peft_type"] == "LORA" and served:
        check_lora(result.output)
    else:
        with pytest.raises(AdapterError):
            check_lora(result.output)
    assert ("serve it with" in (result.output / "README.md").read_text()) == served


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ({"peft_type": "VERA", "r": 4}, True),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, False),
    ],
)
def test_any_method_of_peft_by_its_config(base: Path, data: Path, given: dict[str, Any], targets: bool) -> None:
    result = train(
        options(base, data, method="peft", method_options={"peft": given}, max_steps=2, accept_worse=True)
    )
    config = json.loads((result.output / "adapter_config.json").read_text())
    assert given.items() <= config.items()
    assert bool(result.target_modules) == targets
    assert json.loads((result.output / "training.json").read_text())["options"]["peft"] == given


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("peft", {}, "--peft needs a peft_type of ADALORA, .*; it is missing"),
        ("peft", {"peft_type": "FLORA"}, "found 'FLORA'"),
        ("vera", {"rank": 3}, "--peft: VERA has no key 'rank'; it has .*, r, "),
        ("boft", {"boft_block_size": 7}, "PEFT cannot put BOFTConfig on this base: .*7"),
    ],
)
def test_a_config_that_does_not_go_is_one_message(
    base: Path, data: Path, method: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        train(options(base, data, method=method, method_options={"peft": given}))


def test_a_prompt_has_no_layers_to_choose(base: Path, data: Path) -> None:
    given = {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}
    with pytest.raises(TrainingError, match="adapts no layers: leave --target-modules"):
        train(options(base, data, method="peft", method_options=given, target_modules=("q_proj",)))


def test_a_bias_is_one_number_an_output(base: Path, data: Path) -> None:
    result = one(base, data, "bias", max_steps=1, target_modules=("q_proj", "k_proj"))
    assert result.trainable == 2 * (16 + 8)


def test_frozen_angles_stay_and_are_not_counted(base: Path, data: Path) -> None:
    free, frozen = (
        train(options(base, data, method_options={"freeze_angles": freeze}, output=data.parent / str(freeze)))
        for freeze in (False, True)
    )
    assert free.trainable - frozen.trainable == 8 * 5 * 4  # 8 layers, 5 rows of angles, 4 qubits
    from qaa_serve.adapters import load_adapter

    one_step = train(
        options(base, data, method_options={"freeze_angles": True}, max_steps=1, output=data.parent / "short")
    )
    for name, module in load_adapter(frozen.output).modules.items():
        assert (module.theta == load_adapter(one_step.output).modules[name].theta).all()
        assert (module.theta != load_adapter(free.output).modules[name].theta).any()


class TestPrefix:
    def test_begins_with_the_keys_and_values_of_a_text(self, base: Path, data: Path) -> None:
        """Another text before the prompts gives another loss before training."""

        def begun(text: str) -> Any:
            given = {"prefix_tokens": 3, "prefix_text": text}
            more = {"eval_data": data, "max_steps": 8, "overwrite": True}
            return train(options(base, data, method="prefix", method_options=given, **more))

        first, result = begun("a b c d"), begun("e f g h")
        assert first.base_eval_loss != result.base_eval_loss
        assert loss_of(load_trained(result.output)[0]) == pytest.approx(result.eval_loss, abs=1e-4)

    def test_projection_is_trained_and_not_saved(self, base: Path, data: Path) -> None:
        given = {"prefix_tokens": 3, "prefix_projection": True}
        result = train(
            options(base, data, method="prefix", method_options=given, eval_data=data, max_steps=8, lr=1e-2)
        )
        assert result.trainable > 2 * 2 * 3 * 8
        assert loss_of(load_trained(result.output)[0]) == pytest.approx(result.eval_loss, abs=1e-4)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"prefix_text": "a", "prefix_tokens": 3}, "--prefix-text has 2 tokens, fewer than --prefix-tokens 3"),
            ({"prefix_text": "a b", "prefix_projection": True}, "exclude each other"),
        ],
    )
    def test_refused(self, base: Path, data: Path, given: dict[str, Any], said: str) -> None:
        with pytest.raises(TrainingError, match=said):
            train(options(base, data, method="prefix", method_options=given))


def test_what_is_compared_by_default_is_known() -> None:
    assert set(COMPARED) <= set(METHODS)
