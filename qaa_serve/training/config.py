"""QAA's config as PEFT wants it: a dataclass whose fields are those of adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from qaa_serve.adapters import QAA_FORMAT, AdapterConfig
from qaa_serve.training.circuit_options import CircuitOptions
from qaa_serve.training.peft_type import qaa_type
from qaa_serve.training.targets import ALL_LINEAR


@dataclass
class QAAConfig(CircuitOptions, PeftConfig):  # type: ignore[misc]
    """Config of a QAA adapter: y <- W x + b + scale * B z, z from a circuit that x is embedded in.

    ``CircuitOptions`` has the fields that say what the circuits are.

    Args:
        target_modules: names of linear layers, or their ends after a dot (``"q_proj"``), or ``"all-linear"``;
            None stands for every linear layer of the attention blocks.
        qaa_format: version of the format on disk.

    Raises:
        AdapterError: for a value that adapter_config.json may not hold.
    """

    inputs: str | None = field(default=None)  # type: ignore[assignment]
    whitened: bool | None = field(default=None)  # type: ignore[assignment]
    target_modules: list[str] | set[str] | str | None = field(default=None)
    qaa_format: int = field(default=QAA_FORMAT)

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT hands over what a file says, its peft_type among it; without one, somebody makes a new adapter.
        unsaid: Any = (
            AdapterConfig.model_fields if self.__dict__["peft_type"] else CircuitOptions.__dataclass_fields__
        )
        for name in ("inputs", "whitened"):
            if getattr(self, name) is None:
                setattr(self, name, unsaid[name].default)
        self.peft_type = qaa_type()
        self.checked(self.base_model_name_or_path or "unknown")

    def checked(self, base: str) -> AdapterConfig:
        """The same config as the server reads it.

        Args:
            base: what to write as the base model's name or path.

        Raises:
            AdapterError: names every field that is wrong.
        """
        targets = self.target_modules
        if targets is None or targets == ALL_LINEAR:
            targets = [ALL_LINEAR]  # resolved as soon as there is a model
        return AdapterConfig.parse(
            {
                "peft_type": "QAA",
                "qaa_format": self.qaa_format,
                "task_type": self.task_type,
                "base_model_name_or_path": base,
                "target_modules": targets,
                **{option.name: getattr(self, option.name) for option in fields(CircuitOptions)},
            }
        )
