"""QAA's config as PEFT wants it: a dataclass whose fields are those of adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from qaa_serve.adapters import QAA_FORMAT, AdapterConfig

#: The fields that say what the circuits are.
CIRCUIT_OPTIONS = ("ansatz", "layers", "alpha", "heads", "readouts", "constant", "length")

#: Stands for every linear layer but the output head, as in PEFT.
ALL_LINEAR = "all-linear"


@dataclass
class QAAConfig(PeftConfig):  # type: ignore[misc]
    """Config of a QAA adapter: y <- W x + b + scale * B z, z from a circuit that x is embedded in.

    Args:
        target_modules: names of linear layers, or their ends after a dot (``"q_proj"``), or ``"all-linear"``;
            None stands for every linear layer of the attention blocks.
        ansatz: the circuit's form; ``qaa_serve.circuits.ANSATZ_NAMES`` lists the known ones.
        layers: number of the circuit's layers.
        alpha: the update's size; scale = alpha * 2**(n/2) / (heads * readouts) for n qubits.
        heads: number of circuits over one x, whose readouts stand side by side.
        readouts: expectation values of a circuit: Z on each qubit, then Z Z on pairs; None: n.
        constant: embed a constant beside x.
        length: multiply z by ||x|| / sqrt(d_in).
        qaa_format: version of the format on disk.

    Raises:
        AdapterError: for a value that adapter_config.json may not hold.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    ansatz: str = field(default=AdapterConfig.model_fields["ansatz"].default)
    layers: int = field(default=AdapterConfig.model_fields["layers"].default)
    alpha: float = field(default=AdapterConfig.model_fields["alpha"].default)
    heads: int = field(default=AdapterConfig.model_fields["heads"].default)
    readouts: int | None = field(default=None)
    constant: bool = field(default=False)
    length: bool = field(default=False)
    qaa_format: int = field(default=QAA_FORMAT)

    def __post_init__(self) -> None:
        from qaa_serve.training.registration import register

        super().__post_init__()
        self.peft_type = register()
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
                **{name: getattr(self, name) for name in CIRCUIT_OPTIONS},
            }
        )
