"""Any method of PEFT by its config, and presets of those that are known by a name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import option
from qaa_serve.training.methods.base import FROM_PYTHON, GROUP, SERVED, Method, Setting

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, TrainerCallback


@dataclass
class PeftMethod(Method):
    """A method of PEFT; ``config`` holds what a preset says, ``peft`` what the user says over it."""

    name: ClassVar[str] = "peft"
    summary: ClassVar[str] = 'any method of PEFT, by --peft \'{"peft_type": "VERA", ...}\''
    learning_rate: ClassVar[float] = 1e-3
    usage: ClassVar[str] = FROM_PYTHON
    config: ClassVar[Mapping[str, Any]] = {}

    peft: Mapping[str, Any] | None = option(
        None,
        'keys of the method\'s PEFT config, such as {"r": 4}, over those that it is trained with',
        group=GROUP,
    )

    def values(self) -> dict[str, Any]:
        """The keys of PEFT's config, but for what depends on the base."""
        return {**self.config, **(self.peft or {})}

    @property
    def is_adalora(self) -> bool:
        """Whether this is the one method that has to be told of each step."""
        return bool(self.values().get("peft_type") == "ADALORA")

    def _class(self) -> type[PeftConfig]:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        named = str(self.values().get("peft_type") or "")
        known: dict[str, type[PeftConfig]] = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if named not in known:
            found = f"found {named!r}" if named else "it is missing"
            raise TrainingError(f"--peft needs a peft_type of {', '.join(sorted(known))}; {found}")
        return known[named]

    def _keys(self) -> set[str]:
        return {field.name for field in fields(self._class())}

    @property
    def adapts_layers(self) -> bool:
        """Whether layers of the base are to be chosen: prompts have none."""
        return super().adapts_layers and "target_modules" in self._keys()

    def build(self, base: PreTrainedModel, setting: Setting) -> PeftModel:
        """The base with the method's layers on it."""
        from peft import get_peft_model

        cls, keys, values = self._class(), self._keys(), self.values()
        unknown = sorted(values.keys() - keys)
        if unknown:
            raise TrainingError(f"--peft: {values['peft_type']} has no key {unknown[0]!r}; it has {_listed(keys)}")
        values = {**_fitting(base, setting, keys), **values, "task_type": "CAUSAL_LM"}
        values.pop("peft_type")
        try:
            model = get_peft_model(base, cls(**values))
        except (TypeError, ValueError, ImportError, RuntimeError, AttributeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"PEFT cannot put {cls.__name__} on this base: {line}") from error
        if self.is_adalora:  # adds a penalty to every loss, which an evaluation must not see
            tuner, penalised = model.base_model, model.base_model.forward
            tuner.forward = lambda *args, **kwargs: (penalised if tuner.training else tuner.model)(*args, **kwargs)
        return model

    def save(self, model: PeftModel, directory: Path, base: str) -> None:
        """Write the adapter, with a config whose bytes do not depend on the order of a set."""
        from qaa_serve.adapters import CONFIG_FILE

        model.save_pretrained(directory)
        path = directory / CONFIG_FILE
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = sorted(config["target_modules"])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card

    def callbacks(self) -> list[TrainerCallback]:
        """AdaLoRA is told of each step, in which it moves ranks from layer to layer."""
        if not self.is_adalora:
            return []
        from transformers import TrainerCallback

        class Allocate(TrainerCallback):  # type: ignore[misc]
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                kwargs["model"].base_model.update_and_allocate(state.global_step)

        return [Allocate()]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _fitting(base: PreTrainedModel, setting: Setting, keys: set[str]) -> dict[str, Any]:
    """Keys whose values depend on the base or on the training."""
    from transformers.pytorch_utils import Conv1D

    values: dict[str, Any] = {}
    if "target_modules" in keys:
        values["target_modules"] = setting.targets
    if "fan_in_fan_out" in keys:
        # GPT-2's linear layers store their weights transposed; no model mixes the two kinds.
        values["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in base.modules())
    if "total_step" in keys:
        values["total_step"] = setting.steps
    if "feedforward_modules" in keys:
        values["feedforward_modules"] = []
    if "vector_length" in keys:  # what divides every width, at most PEFT's own default
        from qaa_serve.adapters import matches
        from qaa_serve.training.layer import linear_shape

        shapes = [
            linear_shape(module) for name, module in base.named_modules() if matches(name, tuple(setting.targets))
        ]
        common = math.gcd(256, *(width for shape in shapes if shape for width in shape))
        values["vector_length"] = common
    return values


@dataclass
class Ranked(PeftMethod):
    """A method of PEFT whose size is a rank."""

    rank: int | None = option(
        None, "rank of the update (default: 8 for lora and its kin, else PEFT's)", group=GROUP, above=0
    )

    def values(self) -> dict[str, Any]:
        """With the rank under its key."""
        rank = {} if self.rank is None else {self.rank_key: self.rank}
        return {**self.config, **rank, **(self.peft or {})}

    rank_key: ClassVar[str] = "r"


@dataclass
class Lora(Ranked):
    """LoRA and its kin."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "two low-rank matrices"
    usage: ClassVar[str] = SERVED
    config: ClassVar[Mapping[str, Any]] = {"peft_type": "LORA"}

    rank: int | None = option(
        8, "rank of the update (default: 8 for lora and its kin, else PEFT's)", group=GROUP, above=0
    )
    alpha: float = option(16.0, "size of the adapter's update", group=GROUP, above=0)
    dropout: float = option(
        0.0, "part of a layer's inputs that training leaves out", group=GROUP, least=0, below=1
    )

    def values(self) -> dict[str, Any]:
        """With LoRA's keys."""
        own = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return {**self.config, **own, **(self.peft or {})}


def _preset(
    kind: type[PeftMethod],
    name: str,
    learning_rate: float,
    summary: str,
    config: Mapping[str, Any],
    **more: Any,
) -> type[PeftMethod]:
    about = {"name": name, "summary": summary, "learning_rate": learning_rate, "config": config}
    return type(name, (kind,), {"__doc__": summary, "__module__": __name__, **about, **more})


#: Methods of PEFT by the names they are known by. Rates are starting points, of the size their authors use.
PRESETS: Sequence[type[PeftMethod]] = (
    _preset(Lora, "rslora", 5e-4, "LoRA scaled by alpha / sqrt(r)", {"peft_type": "LORA", "use_rslora": True}),
    _preset(
        Lora, "dora", 1e-3, "LoRA with a trained length for each column",
        {"peft_type": "LORA", "use_dora": True}, usage=FROM_PYTHON,
    ),
    _preset(
        Ranked, "adalora", 2e-3, "LoRA whose ranks move to the layers that need them", {"peft_type": "ADALORA"},
        rank_key="target_r",
    ),
    _preset(
        Ranked, "vera", 4e-2, "random matrices that all layers share, with two trained vectors a layer",
        {"peft_type": "VERA"},
    ),
    _preset(Ranked, "randlora", 1e-3, "sums of random low-rank matrices, scaled", {"peft_type": "RANDLORA"}),
    _preset(PeftMethod, "vblora", 5e-3, "LoRA out of a shared bank of vectors", {"peft_type": "VBLORA"}),
    _preset(Ranked, "loha", 1e-3, "Hadamard product of two low-rank updates", {"peft_type": "LOHA"}),
    _preset(Ranked, "lokr", 3e-3, "Kronecker product of small matrices", {"peft_type": "LOKR"}),
    _preset(PeftMethod, "fourierft", 1e-2, "coefficients of a sparse spectrum", {"peft_type": "FOURIERFT"}),
    _preset(PeftMethod, "oft", 1e-3, "orthogonal blocks before the weights", {"peft_type": "OFT"}),
    _preset(PeftMethod, "boft", 1e-3, "orthogonal butterflies before the weights", {"peft_type": "BOFT"}),
    _preset(Ranked, "shira", 1e-3, "single weights of the base, chosen at random", {"peft_type": "SHIRA"}),
    _preset(PeftMethod, "ia3", 5e-3, "a factor on each of a layer's outputs", {"peft_type": "IA3"}),
    _preset(PeftMethod, "bias", 1e-2, "a bias on each of a layer's outputs", {"peft_type": "BEFT"}),
)  # fmt: skip
