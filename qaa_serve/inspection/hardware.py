"""What an adapter would do on imperfect quantum hardware: its circuits on a PennyLane device, on real data."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qaa_serve.adapters import Adapter, ModuleWeights
from qaa_serve.circuits import Ansatz, get_backend
from qaa_serve.circuits.embedding import embed, lengths, standardised
from qaa_serve.inspection.circuit import apply_gates, readouts
from qaa_serve.inspection.errors import InspectionError

#: name -> (PennyLane's channel, what it stands for). "readout" acts before the measurement, the others after
#: every gate, on each of its wires.
NOISES = {
    "depolarizing": ("DepolarizingChannel", "X, Y or Z happens, each with P/3"),
    "bit_flip": ("BitFlip", "X happens with P"),
    "phase_flip": ("PhaseFlip", "Z happens with P"),
    "amplitude_damping": ("AmplitudeDamping", "|1> falls to |0> with P"),
    "phase_damping": ("PhaseDamping", "phase information is lost with P"),
    "readout": ("BitFlip", "the measured bit is read wrongly with P"),
}

#: PennyLane's simulators of state vectors, which cannot carry noise.
_PURE = (
    "default.qubit",
    "lightning.qubit",
    "lightning.gpu",
    "lightning.kokkos",
    "lightning.amdgpu",
    "default.tensor",
)

#: Bytes of states that one call works on, and how many copies of them PennyLane keeps meanwhile, measured.
_CHUNK_BYTES = 64 << 20
_COPIES = 12

#: A density matrix of so many qubits is still quick enough to be tried out.
_TRIED_QUBITS = 7

_MAX_ROW_TOKENS = 1024
_IGNORED = -100


@dataclass(frozen=True)
class HardwareOptions:
    """How ``check_hardware`` runs.

    Attributes:
        device: PennyLane's name of it; None: default.mixed with noise, default.qubit without.
        shots: measurements of every circuit; None: exact expectation values.
        noise: name in ``NOISES`` -> probability.
        rows: how many rows of the data, from the first on.
        tokens: how many positions of each row get their z from the device; None: all.
        seed: of the positions and of the device's shots.
    """

    device: str | None = None
    shots: int | None = None
    noise: Mapping[str, float] = field(default_factory=dict)
    rows: int = 4
    tokens: int | None = 16
    seed: int = 0

    @property
    def device_name(self) -> str:
        """The device that runs."""
        return self.device or ("default.mixed" if self.noise else "default.qubit")


@dataclass(frozen=True)
class Deviation:
    """How far the device's z lies from the exact one.

    Attributes:
        module: the layer's full name, or "all".
        circuits: circuits run.
        mean_error: mean |z_device - z|.
        max_error: the largest one.
        rms_error: root of the mean square.
        spread: standard deviation of the exact z over the positions, as root mean square over the readouts.
        relative_error: rms_error / spread; None for no spread.
        slope: least-squares factor between device and exact z, through the origin: below 1, z shrinks towards 0;
            None for z that are all 0.
        update_ratio: RMS of scale * B z over the RMS of the base layer's output, exact; None for "all".
    """

    module: str
    circuits: int
    mean_error: float
    max_error: float
    rms_error: float
    spread: float
    relative_error: float | None
    slope: float | None
    update_ratio: float | None


@dataclass(frozen=True)
class HardwareResult:
    """What the device does to z and to the loss.

    Attributes:
        device: PennyLane's name of it.
        shots: as asked for.
        noise: as asked for.
        seed: as asked for.
        rows: rows evaluated.
        positions: positions whose z came from the device, over all rows.
        all_positions: positions there are.
        circuits: circuits run; each ``shots`` times.
        answer_tokens: tokens that the loss is the mean over.
        base_loss: of the base alone, in nats a token.
        exact_loss: with the adapter.
        device_loss: with the adapter, its z from the device at those positions.
        loss_move: device_loss - exact_loss.
        kept_gain: (base_loss - device_loss) / (base_loss - exact_loss); None if the adapter gains nothing.
        total: over all modules.
        modules: each module.
        notes: what a reader should know besides.
    """

    device: str
    shots: int | None
    noise: Mapping[str, float]
    seed: int
    rows: int
    positions: int
    all_positions: int
    circuits: int
    answer_tokens: int
    base_loss: float
    exact_loss: float
    device_loss: float
    loss_move: float
    kept_gain: float | None
    total: Deviation
    modules: tuple[Deviation, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object under ``check`` in the JSON."""
        return {**asdict(self), "noise": dict(self.noise)}


class QuantumDevice:
    """A PennyLane device that evaluates an adapter's circuits.

    Raises:
        InspectionError: for a device that is not there, or noise on one that cannot carry it.
    """

    def __init__(self, options: HardwareOptions) -> None:
        self.name = options.device_name
        self.notes: tuple[str, ...] = ()
        self._options = options
        self._devices: dict[int, Any] = {}
        if options.noise and self.name in _PURE:
            raise InspectionError(
                f"--device {self.name} simulates state vectors, which carry no noise: use default.mixed, or leave "
                "--noise out"
            )
        self._device(1)

    def check_memory(self, qubits: int) -> None:
        """Raise InspectionError if circuits of that many qubits do not fit into the free memory."""
        needed, free = _COPIES * self._state_bytes(qubits), _free_memory()
        if free is not None and needed > free:
            what = "density matrix" if self.is_mixed else "state"
            raise InspectionError(
                f"{self.name} needs about {needed / 2**30:.1f} GiB for the {what} of {qubits} qubits and "
                f"{free / 2**30:.1f} GiB are free: choose narrower layers with --module, or a device of state "
                "vectors with --shots and no noise"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether it keeps a density matrix, 4**n numbers, and not a state vector."""
        return "mixed" in self.name

    def _state_bytes(self, qubits: int) -> int:
        return int(16 * (4**qubits if self.is_mixed else 2**qubits))

    def chunk(self, qubits: int) -> int:
        """How many states one call takes."""
        return max(1, _CHUNK_BYTES // (_COPIES * self._state_bytes(qubits)))

    def expectation_values(
        self,
        x: torch.Tensor,
        theta: torch.Tensor,
        ansatz: Ansatz,
        advance: Callable[[int], object] = lambda _: None,
    ) -> torch.Tensor:
        """z as the device sees it.

        Args:
            x: (tokens, width), real.
            theta: (heads, rows, n) angles.
            ansatz: the form of the circuits.
            advance: called with the number of circuits done.

        Returns:
            (tokens, heads, columns) float64; a row without a state gives z = 0 and runs nothing.

        Raises:
            InspectionError: if the device cannot run the circuit.
        """
        z = torch.zeros(len(x), len(theta), ansatz.columns, dtype=torch.float64)
        psi = embed(x.double(), ansatz)
        alive = (psi != 0).any(dim=1).nonzero().squeeze(1)
        for head, angles in enumerate(theta.double()):
            for rows in torch.split(alive, self.chunk(ansatz.qubits)):
                z[rows, head] = self._run(psi[rows], angles, ansatz)
                advance(len(rows))
            advance(len(x) - len(alive))
        return z * lengths(x.double())[:, None, None] if ansatz.length else z

    def _run(self, psi: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
        import pennylane as qml

        n, noise = ansatz.qubits, dict(self._options.noise)
        readout = noise.pop("readout", None)
        channels = [(getattr(qml, NOISES[name][0]), probability) for name, probability in noise.items()]

        def after_gate(wires: list[int]) -> None:
            for channel, probability in channels:
                for wire in wires:
                    channel(probability, wires=wire)

        def circuit() -> list[Any]:
            qml.AmplitudeEmbedding(psi, wires=range(n), normalize=True)
            apply_gates(theta, ansatz, after_gate)
            if readout is not None:
                for wire in range(n):
                    qml.BitFlip(readout, wires=wire)
            return readouts(ansatz)

        node = qml.QNode(circuit, self._device(n), interface="torch", diff_method=None)
        if self._options.shots is not None:
            node = qml.set_shots(node, self._options.shots)
        try:
            values = node()
        except Exception as error:  # each device raises what it likes
            raise InspectionError(f"--device {self.name} cannot run the circuit: {_in_one_line(error)}") from error
        # One state in a batch comes back without its axis from some devices.
        return torch.stack([torch.as_tensor(value).double().reshape(len(psi)) for value in values], dim=1)

    def _device(self, qubits: int) -> Any:
        import pennylane as qml

        if qubits not in self._devices:
            try:
                try:
                    made = qml.device(self.name, wires=qubits, seed=self._options.seed + qubits)
                except TypeError:
                    made = qml.device(self.name, wires=qubits)
                    self.notes = (f"{self.name} takes no seed: another run gives other numbers",)
            except Exception as error:
                known = ", ".join(sorted(qml.plugin_devices))
                raise InspectionError(
                    f"--device {self.name}: {_in_one_line(error)} Installed are: {known}"
                ) from error
            self._devices[qubits] = made
        return self._devices[qubits]


@dataclass(frozen=True)
class _Row:
    ids: torch.Tensor  # (tokens,) int64
    labels: torch.Tensor  # (tokens,) int64, -100 where the loss is not
    chosen: torch.Tensor  # (positions,) int64, sorted


class HardwareCheck:
    """The rows, the base and the device, made ready; ``run`` does the work.

    Args:
        adapter: a validated adapter that fits the base.
        base: the base model, a directory or a name on the hub; it is kept in float32.
        data: rows as ``qaa-serve train`` takes them, JSON lines.
        modules: the layers whose z come from the device; the others are exact.
        options: how to run.
        trust_remote_code: whether code that comes with the base model may run.

    Raises:
        InspectionError: if the device, the rows or the base cannot be used.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: str,
        data: Path,
        modules: list[str],
        options: HardwareOptions,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._adapter, self._options = adapter, options
        self._names = modules
        self._device = QuantumDevice(options)
        for qubits in {adapter.modules[name].qubits for name in modules}:
            self._device.check_memory(qubits)
        lines = _first_lines(data, options.rows)
        self._model, tokenizer = _load_base(base, trust_remote_code)
        self._rows = _encode(data, lines, tokenizer, self._max_tokens(), options)

    @property
    def circuits(self) -> int:
        """Circuit executions that ``run`` will ask the device for, each of them ``shots`` times."""
        return self._adapter.config.heads * len(self._names) * sum(len(row.chosen) for row in self._rows)

    def cost(self) -> str:
        """What ``run`` will do, in words."""
        options = self._options
        positions = sum(len(row.chosen) for row in self._rows)
        how = "exact" if options.shots is None else f"{options.shots:,} shots each"
        how += "".join(f", {name} {probability:g}" for name, probability in options.noise.items())
        qubits = sorted({self._adapter.modules[name].qubits for name in self._names})
        return (
            f"{self.circuits:,} circuits of {' and '.join(map(str, qubits))} qubits on {self._device.name} ({how})"
            f": {len(self._names)} modules x {self._adapter.config.heads} heads x {positions} positions"
        )

    def seconds(self) -> float:
        """About how long the circuits will take, from some that are run now, smaller ones where those are slow."""
        total = 0.0
        for qubits in {self._adapter.modules[name].qubits for name in self._names}:
            tried = min(qubits, _TRIED_QUBITS) if self._device.is_mixed else qubits
            ansatz = replace(self._adapter.config.circuit(qubits), qubits=tried, readouts=0)
            x = torch.ones(
                min(self._device.chunk(tried), 2 if self._device.is_mixed else 16), 2**tried - ansatz.constant
            )
            start = time.perf_counter()
            self._device.expectation_values(x, torch.zeros(1, *ansatz.theta_shape), ansatz)
            each = (time.perf_counter() - start) / len(x) * qubits / tried * 4 ** (qubits - tried)
            modules = sum(self._adapter.modules[name].qubits == qubits for name in self._names)
            total += each * self.circuits * modules / len(self._names)
        return total

    def run(self, advance: Callable[[int], object] = lambda _: None) -> HardwareResult:
        """Evaluate every row three times: the base, the adapter with exact z, and with the device's z.

        Args:
            advance: called with the number of circuits done.
        """
        heads = self._adapter.config.heads
        records = {name: _Record(heads) for name in self._adapter.modules}
        losses = {"base": 0.0, "exact": 0.0, "device": 0.0}
        answer_tokens = 0
        for row in self._rows:
            for kind in losses:
                with self._wearing(kind, row, records, advance):
                    total, count = self._loss(row)
                losses[kind] += total
            answer_tokens += count
        base, exact, device = (total / answer_tokens for total in losses.values())
        gain = base - exact
        deviations = tuple(records[name].deviation(name) for name in self._names)
        return HardwareResult(
            device=self._device.name,
            shots=self._options.shots,
            noise=dict(self._options.noise),
            seed=self._options.seed,
            rows=len(self._rows),
            positions=sum(len(row.chosen) for row in self._rows),
            all_positions=sum(len(row.ids) for row in self._rows),
            circuits=self.circuits,
            answer_tokens=answer_tokens,
            base_loss=base,
            exact_loss=exact,
            device_loss=device,
            loss_move=device - exact,
            kept_gain=(base - device) / gain if gain > 0 else None,
            total=_deviation("all", [records[name] for name in self._names], None),
            modules=deviations,
            notes=self._device.notes,
        )

    def _max_tokens(self) -> int:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        return min(limit, _MAX_ROW_TOKENS) if isinstance(limit, int) else _MAX_ROW_TOKENS

    @torch.no_grad()
    def _loss(self, row: _Row) -> tuple[float, int]:
        """Sum of the losses of a row's answer tokens, and their number."""
        logits = self._model(row.ids.unsqueeze(0)).logits[0, :-1].float()
        total = torch.nn.functional.cross_entropy(logits, row.labels[1:], ignore_index=_IGNORED, reduction="sum")
        return float(total), int((row.labels[1:] != _IGNORED).sum())

    @contextmanager
    def _wearing(
        self, kind: str, row: _Row, records: Mapping[str, _Record], advance: Callable[[int], object]
    ) -> Iterator[None]:
        """The base as it is ("base"), or with the adapter on it, its z "exact" or from the "device"."""
        hooks = []
        layers = dict(self._model.named_modules()) if kind != "base" else {}
        try:
            for name, weights in self._adapter.modules.items() if kind != "base" else ():
                measured = kind == "device" and name in self._names
                hook = self._hook(weights, row, records[name], measured, kind == "exact", advance)
                hooks.append(layers[name].register_forward_hook(hook))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(
        self,
        weights: ModuleWeights,
        row: _Row,
        record: _Record,
        measured: bool,
        sized: bool,
        advance: Callable[[int], object],
    ) -> Callable[..., torch.Tensor]:
        config = self._adapter.config
        ansatz, scale = config.circuit(weights.qubits), config.scale(weights.qubits)
        exact = get_backend("torch")

        def add_update(_layer: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])  # (tokens, d_in)
            x = standardised(x.double(), weights.inputs)
            z = exact(x, weights.theta.double(), ansatz, None)  # (tokens, heads, n)
            if measured:
                seen = self._device.expectation_values(x[row.chosen], weights.theta, ansatz, advance)
                record.exact.append(z[row.chosen].flatten(1))
                record.device.append(seen.flatten(1))
                z = z.index_copy(0, row.chosen, seen)
            z = standardised(z.flatten(1), weights.readouts)
            update = (scale * z @ weights.weight.double().T).reshape(output.shape)
            if sized:
                record.update_square += float(update.square().sum())
                record.output_square += float(output.double().square().sum())
            return output + update.to(output.dtype)

        return add_update


@dataclass
class _Record:
    """What was seen at one module."""

    heads: int
    exact: list[torch.Tensor] = field(default_factory=list)  # each (positions, heads * n) float64
    device: list[torch.Tensor] = field(default_factory=list)
    update_square: float = 0.0
    output_square: float = 0.0

    def deviation(self, name: str) -> Deviation:
        """Numbers of this module alone."""
        ratio = math.sqrt(self.update_square / self.output_square) if self.output_square else None
        return _deviation(name, [self], ratio)


def _deviation(name: str, records: list[_Record], ratio: float | None) -> Deviation:
    pairs = [(torch.cat(record.exact), torch.cat(record.device)) for record in records]
    exact = torch.cat([z.flatten() for z, _ in pairs])
    device = torch.cat([z.flatten() for _, z in pairs])
    variances = torch.cat([z.var(dim=0, correction=0) for z, _ in pairs])
    error = (device - exact).abs()
    rms, spread = float(error.square().mean().sqrt()), float(variances.mean().sqrt())
    power = float(exact.square().sum())
    return Deviation(
        module=name,
        circuits=sum(record.heads * len(z) for record, (z, _) in zip(records, pairs, strict=True)),
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        rms_error=rms,
        spread=spread,
        relative_error=rms / spread if spread > 0 else None,
        slope=float((exact * device).sum()) / power if power > 0 else None,
        update_ratio=ratio,
    )


def _first_lines(path: Path, count: int) -> list[tuple[int, str]]:
    """The first rows that are not empty, with their line numbers; the rest of the file is not read."""
    lines: list[tuple[int, str]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append((number, line))
                if len(lines) == count:
                    break
    except OSError as error:
        raise InspectionError(f"--check {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InspectionError(f"--check {path} is no text: {error}") from error
    if not lines:
        raise InspectionError(f"--check {path} has no rows")
    return lines


def _encode(
    path: Path, lines: list[tuple[int, str]], tokenizer: Any, max_tokens: int, options: HardwareOptions
) -> list[_Row]:
    from qaa_serve.training.data import encode_row

    generator = torch.Generator().manual_seed(options.seed)
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InspectionError(f"--check {path}, line {number}: no JSON: {error}") from error
        try:
            ids, labels = encode_row(row, tokenizer)
        except ValueError as error:
            raise InspectionError(f"--check {path}, line {number}: {error}") from error
        ids, labels = ids[:max_tokens], labels[:max_tokens]
        if all(label == _IGNORED for label in labels[1:]):
            raise InspectionError(
                f"--check {path}, line {number}: within {max_tokens} tokens there is no answer to take the loss of"
            )
        count = len(ids) if options.tokens is None else min(options.tokens, len(ids))
        chosen = torch.randperm(len(ids), generator=generator)[:count].sort().values
        rows.append(_Row(torch.tensor(ids), torch.tensor(labels), chosen))
    return rows


def _load_base(base: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise InspectionError(f"the base model {base!r} cannot be loaded: {_in_one_line(error)}") from error
    return model.eval(), tokenizer


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
