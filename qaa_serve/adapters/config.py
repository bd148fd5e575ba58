"""adapter_config.json of a QAA adapter."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qaa_serve.adapters.errors import AdapterError, shown
from qaa_serve.circuits import ALL_READOUTS, ANSATZ_NAMES, Ansatz, qubits_for

QAA_FORMAT: Literal[1] = 1

#: Keys that PEFT's PeftConfig writes into every adapter_config.json; they say nothing about a QAA adapter.
_PEFT_KEYS = {"auto_mapping", "inference_mode", "peft_version", "revision", "exclude_modules"}

#: Far beyond any use; keeps scales finite in float32.
MAX_ALPHA = 1e6


#: Fields that older readers do not know, with their defaults.
_LATER = {
    "readouts": None, "constant": False, "length": False, "inputs": "raw", "whitened": False, "vectors": False
}  # fmt: skip

#: What is done with a layer's input before it is embedded; DESIGN: x <- (x - offset) * scale, channel by channel.
Inputs: TypeAlias = Literal["raw", "rms", "centred-rms"]


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json, checked. DESIGN: y <- W x + b + scale * B z."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    peft_type: Literal["QAA"] = "QAA"
    qaa_format: Literal[1] = QAA_FORMAT
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str = Field(min_length=1)
    target_modules: tuple[str, ...] = Field(min_length=1)
    ansatz: str = ANSATZ_NAMES[0]
    layers: int = Field(default=2, ge=1, le=64)
    alpha: float = Field(default=16.0, ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False)
    heads: int = Field(default=1, ge=1, le=64)
    #: Added to qaa_format 1 later: written only where they are not the default, so that older readers take what
    #: they can read and refuse what they cannot.
    readouts: int | None = Field(default=None, ge=1)
    constant: bool = False
    length: bool = False
    inputs: Inputs = "raw"
    whitened: bool = False
    vectors: bool = False

    @field_validator("ansatz")
    @classmethod
    def _known_ansatz(cls, name: str) -> str:
        if name not in ANSATZ_NAMES:
            raise ValueError(f"known are: {', '.join(ANSATZ_NAMES)}")
        return name

    @field_validator("target_modules", mode="before")
    @classmethod
    def _sorted_names(cls, names: Any) -> Any:
        if isinstance(names, (list, tuple, set)) and all(isinstance(name, str) and name for name in names):
            return tuple(sorted(set(names)))
        raise ValueError('a list of module names is needed, such as ["q_proj", "v_proj"]')

    def qubits(self, width: int) -> int:
        """Number of qubits n for a layer input of that width.

        Raises:
            ValueError: for a width that cannot be embedded.
        """
        return qubits_for(width, self.constant)

    def circuit(self, qubits: int) -> Ansatz:
        """The circuit's form for a layer input that is embedded in ``qubits`` qubits.

        Raises:
            ValueError: for more readouts than so many qubits have.
        """
        # With vectors one more costs a number, not a column of B.
        readouts = self.readouts or (ALL_READOUTS if self.vectors else 0)
        return Ansatz(self.ansatz, qubits, self.layers, readouts, self.constant, self.length)

    def scale(self, qubits: int) -> float:
        """Factor on B z: alpha * 2**(n/2) / (heads * m) for m readouts a circuit.

        The spread of z falls with the number of qubits n like 2**(-n/2); the factor keeps the update's size
        comparable over widths. Whitened z has spread 1 without it: alpha / (heads * m). A B of signs between
        vectors adds up what is independent, so that its sum's spread grows with the root: alpha / sqrt(heads * m).
        """
        spread = 1 if self.whitened else 2 ** (-qubits / 2)
        columns = self.rank(qubits)
        return float(self.alpha / spread / (columns**0.5 if self.vectors else columns))

    def rank(self, qubits: int) -> int:
        """Number of columns of B, heads * readouts: what the rank is to a LoRA adapter."""
        return self.heads * self.circuit(qubits).columns

    @classmethod
    def parse(cls, raw: object) -> AdapterConfig:
        """Check the parsed JSON of an adapter_config.json.

        Raises:
            AdapterError: names every field that is wrong, with what was found.
        """
        if not isinstance(raw, dict):
            raise AdapterError(f"adapter_config.json holds a JSON {type(raw).__name__}, not an object")
        if raw.get("peft_type") != "QAA":
            raise AdapterError(
                f'adapter_config.json has peft_type {shown(raw.get("peft_type"))}; a QAA adapter has "QAA"'
            )
        found = raw.get("qaa_format")
        if type(found) is not int or found != QAA_FORMAT:  # True and 1.0 equal 1
            raise AdapterError(
                f"adapter_config.json has qaa_format {shown(found)}; this version reads qaa_format "
                f"{QAA_FORMAT}. Save the adapter again with a matching qaa-serve, or update qaa-serve"
            )
        if raw.get("exclude_modules"):
            raise AdapterError(
                f"adapter_config.json has exclude_modules {shown(raw['exclude_modules'])}, which QAA adapters do "
                "not have: list the layers to adapt in target_modules; full names are taken too"
            )
        try:
            return cls.model_validate({k: v for k, v in raw.items() if k not in _PEFT_KEYS}, strict=True)
        except ValidationError as error:
            raise AdapterError(f"adapter_config.json is not valid: {'; '.join(problems_of(error))}") from error

    def to_json(self) -> dict[str, Any]:
        """The object to write to adapter_config.json."""
        fields = self.model_dump(mode="json")
        return {k: v for k, v in fields.items() if k not in _LATER or v != _LATER[k]}


def problems_of(error: ValidationError) -> list[str]:
    """What is wrong with each field, and what was found in it."""
    return [
        f"{'.'.join(map(str, item['loc'])):.80}: {item['msg'].removeprefix('Value error, ')}"
        + ("" if item["type"] == "missing" else f", found {shown(item['input'])}")
        for item in error.errors()
    ]
