"""`qaa-serve inspect --check`: an exact device changes nothing, shots and noise change what theory says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuits_support import OPTIONS
from tiny_models import ReferenceModel, make_model, make_qaa
from transformers import AutoTokenizer

from qaa_serve.adapters import Adapter, load_adapter
from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, get_backend
from qaa_serve.circuits.ansatz import Rotation
from qaa_serve.cli import main
from qaa_serve.inspection.errors import InspectionError
from qaa_serve.inspection.hardware import NOISES, HardwareCheck, HardwareOptions, HardwareResult, QuantumDevice
from qaa_serve.training.data import encode_row

ROWS = [
    {"prompt": "t5 t9 t20", "completion": "t30 t31 t7"},
    {"messages": [{"role": "user", "content": "t8 t11"}, {"role": "assistant", "content": "t3 t41 t42 t43"}]},
    {"prompt": "t6", "completion": "t50"},
]

reference = get_backend("reference")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Adapter:
    directory = tmp_path_factory.mktemp("adapters") / "a"
    return make_qaa(directory, base, ("q_proj", "v_proj"), seed=1, heads=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, ROWS)) + "\nnot read, since only the rows asked for are\n")
    return file


@pytest.fixture
def check(adapter: Adapter, base: Path, data: Path) -> Callable[..., HardwareResult]:
    def run(modules: list[str] | None = None, **options: Any) -> HardwareResult:
        chosen = list(adapter.modules) if modules is None else modules
        return HardwareCheck(adapter, str(base), data, chosen, HardwareOptions(**{"rows": 3, **options})).run()

    return run


def inputs(ansatz: Ansatz, heads: int = 1, tokens: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, max(2, 2**ansatz.qubits - 1), generator=generator)
    return x, torch.randn(heads, *ansatz.theta_shape, generator=generator) * 2


# -------------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("device", ["default.qubit", "default.mixed", "lightning.qubit"])
def test_an_exact_device_gives_the_reference_s_z(device: str, name: str) -> None:
    ansatz = Ansatz(name, 3, 2)
    x, theta = inputs(ansatz, heads=2)
    x[1] = 0
    x[2] *= 1e-30  # its square is no float32
    done: list[int] = []
    z = QuantumDevice(HardwareOptions(device=device)).expectation_values(x, theta, ansatz, done.append)
    torch.testing.assert_close(z, reference(x, theta, ansatz, None), rtol=0, atol=1e-12)
    assert sum(done) == 2 * 4


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_circuit_reach_the_device(option: str) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2, **OPTIONS[option])
    theta = torch.randn(2, *ansatz.theta_shape)
    x = torch.randn(5, 13)
    x[1] = 0
    z = QuantumDevice(HardwareOptions()).expectation_values(x, theta, ansatz)
    torch.testing.assert_close(z, reference(x, theta, ansatz, None), rtol=0, atol=1e-12)


def test_more_states_than_fit_one_call_are_run_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 2, 1)
    x, theta = inputs(ansatz, tokens=5)
    device = QuantumDevice(HardwareOptions())
    monkeypatch.setattr(device, "chunk", lambda qubits: 2)
    torch.testing.assert_close(
        device.expectation_values(x, theta, ansatz), reference(x, theta, ansatz, None), rtol=0, atol=1e-12
    )


def kraus(name: str, p: float) -> list[np.ndarray]:
    """The channels from their definitions."""
    one, x, z = np.eye(2), np.array([[0, 1], [1, 0]]), np.diag([1.0, -1.0])
    zero_of_one = np.array([[0, 1.0], [0, 0]])
    return {
        "depolarizing": [np.sqrt(1 - p) * one, *(np.sqrt(p / 3) * pauli for pauli in (x, 1j * x @ z, z))],
        "bit_flip": [np.sqrt(1 - p) * one, np.sqrt(p) * x],
        "phase_flip": [np.sqrt(1 - p) * one, np.sqrt(p) * z],
        "amplitude_damping": [np.diag([1, np.sqrt(1 - p)]), np.sqrt(p) * zero_of_one],
        "phase_damping": [np.diag([1, np.sqrt(1 - p)]), np.sqrt(p) * np.diag([0, 1.0])],
    }[name]


def noisy_z(x: np.ndarray, theta: np.ndarray, ansatz: Ansatz, noise: dict[str, float]) -> np.ndarray:
    """z of one noisy circuit, with whole matrices: each gate, then each noise on each of its wires."""
    n = ansatz.qubits
    x = np.pad(x / np.linalg.norm(x), (0, 2**n - len(x)))
    rho = np.outer(x, x).astype(complex)

    def on(wire: int, matrix: np.ndarray) -> np.ndarray:
        return np.kron(np.kron(np.eye(2**wire), matrix), np.eye(2 ** (n - 1 - wire)))

    def suffer(rho: np.ndarray, wires: list[int]) -> np.ndarray:
        for name in noise.keys() - {"readout"}:
            for wire in wires:
                rho = sum(on(wire, k) @ rho @ on(wire, k).conj().T for k in kraus(name, noise[name]))
        return rho

    for gate in ansatz.gates():
        if isinstance(gate, Rotation):
            for wire in range(n):
                half = theta[gate.row, wire] / 2
                c, s = np.cos(half), np.sin(half)
                matrix = (
                    np.array([[c, -s], [s, c]]) if gate.axis == "Y" else np.diag(np.exp([-1j * half, 1j * half]))
                )
                rho = suffer(on(wire, matrix) @ rho @ on(wire, matrix).conj().T, [wire])
        else:
            for control, target in gate.pairs:
                flip = np.array([[0, 1], [1, 0]])
                cnot = on(control, np.diag([1, 0])) + on(control, np.diag([0, 1])) @ on(target, flip)
                rho = suffer(cnot @ rho @ cnot.T, [control, target])
    z = [np.real(np.trace(on(wire, np.diag([1, -1])) @ rho)) for wire in range(n)]
    return (1 - 2 * noise.get("readout", 0)) * np.array(z)


@pytest.mark.parametrize("noise", [*({name: 0.07} for name in NOISES), {"phase_damping": 0.1, "readout": 0.02}],
                         ids=lambda noise: "+".join(noise))  # fmt: skip
def test_noise_is_what_the_docs_say(noise: dict[str, float]) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x, theta = inputs(ansatz, tokens=2)
    z = QuantumDevice(HardwareOptions(noise=noise)).expectation_values(x, theta, ansatz)
    for row in range(2):
        expected = noisy_z(x[row].double().numpy(), theta[0].double().numpy(), ansatz, noise)
        np.testing.assert_allclose(z[row, 0].numpy(), expected, atol=1e-12)
    assert (z - reference(x, theta, ansatz, None)).abs().max() > 1e-3


@pytest.mark.parametrize("device", ["default.qubit", "default.mixed", "lightning.qubit"])
def test_the_error_of_shots_falls_with_their_square_root(device: str) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 1)
    x, theta = inputs(ansatz, tokens=24)
    z = reference(x, theta, ansatz, None)
    for shots in (100, 10_000):
        seen = QuantumDevice(HardwareOptions(device=device, shots=shots, seed=3)).expectation_values(
            x, theta, ansatz
        )
        # Each z_k is the mean of shots of +1 and -1, so that its variance is (1 - z_k^2) / shots.
        scores = (seen - z) / ((1 - z**2) / shots).sqrt()
        assert 0.7 < float(scores.square().mean().sqrt()) < 1.3  # 96 scores: three sigma are 0.22


@pytest.mark.parametrize("device", ["default.qubit", "default.mixed", "lightning.qubit"])
def test_a_seed_repeats_the_shots_and_another_does_not(device: str) -> None:
    ansatz = Ansatz("ry_ring", 3, 1)
    x, theta = inputs(ansatz)

    def seen(seed: int) -> list[torch.Tensor]:
        made = QuantumDevice(HardwareOptions(device=device, shots=50, seed=seed))
        return [made.expectation_values(x, theta, ansatz) for _ in range(2)]

    first, again = seen(1)
    assert not torch.equal(first, again), "the same shots twice would hide their error"
    assert torch.equal(torch.stack(seen(1)), torch.stack([first, again]))
    assert not torch.equal(seen(2)[0], first)


def test_noise_and_pure_states_do_not_go_together() -> None:
    for device in ("default.qubit", "lightning.qubit"):
        with pytest.raises(InspectionError, match=r"carry no noise: use default\.mixed"):
            QuantumDevice(HardwareOptions(device=device, noise={"depolarizing": 0.1}))
    assert QuantumDevice(HardwareOptions(noise={"depolarizing": 0.1})).name == "default.mixed"
    assert QuantumDevice(HardwareOptions()).name == "default.qubit"


def test_circuits_that_do_not_fit_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaa_serve.inspection.hardware._free_memory", lambda: 8 << 30)
    device = QuantumDevice(HardwareOptions(noise={"readout": 0.1}))
    device.check_memory(12)
    with pytest.raises(
        InspectionError, match=r"default\.mixed needs about 12\.0 GiB for the density matrix of 13"
    ):
        device.check_memory(13)
    QuantumDevice(HardwareOptions()).check_memory(16)


def test_a_device_that_cannot_run_the_circuit_says_so() -> None:
    ansatz = Ansatz("ry_ring", 2, 1)
    with pytest.raises(InspectionError, match=r"--device default\.gaussian cannot run the circuit: "):
        QuantumDevice(HardwareOptions(device="default.gaussian")).expectation_values(*inputs(ansatz), ansatz)


# ------------------------------------------------------------------------------------------ the whole check


def reference_loss(base: Path, adapter: Adapter | None) -> tuple[float, int]:
    model, tokenizer = ReferenceModel(base), AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for row in ROWS:
        ids, labels = encode_row(row, tokenizer)
        logprobs = model.logprobs(adapter, ids)
        for position, label in enumerate(labels[1:]):
            if label != -100:
                total -= float(logprobs[position, label])
                count += 1
    return total / count, count


def test_standardised_circuits_are_those_that_are_served(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_qaa(tmp_path / "s", base, ("q_proj", "v_proj"), 1, 3, inputs="centred-rms", whitened=True)
    result = HardwareCheck(adapter, str(base), data, list(adapter.modules), HardwareOptions(rows=3)).run()
    assert result.exact_loss == pytest.approx(reference_loss(base, adapter)[0], abs=1e-5)
    assert abs(result.exact_loss - result.base_loss) > 0.1
    assert abs(result.loss_move) < 1e-6


def test_an_exact_device_does_not_move_the_loss(
    check: Callable[..., HardwareResult], base: Path, adapter: Adapter
) -> None:
    result = check(tokens=None)
    loss, tokens = reference_loss(base, adapter)
    assert result.answer_tokens == tokens
    assert result.exact_loss == pytest.approx(loss, abs=1e-5)
    assert result.base_loss == pytest.approx(reference_loss(base, None)[0], abs=1e-5)
    assert abs(result.exact_loss - result.base_loss) > 0.1
    assert abs(result.loss_move) < 1e-6
    assert result.total.max_error < 1e-12
    assert result.total.slope == pytest.approx(1)
    assert result.positions == result.all_positions
    assert result.circuits == result.positions * 2 * len(adapter.modules)
    assert result.circuits == result.total.circuits == sum(module.circuits for module in result.modules)


def test_a_readout_that_is_wrong_half_the_time_leaves_the_base(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_qaa(tmp_path / "v", base, ("v_proj",), seed=1, layers=1)
    options = HardwareOptions(tokens=None, rows=1, noise={"readout": 0.5})
    result = HardwareCheck(adapter, str(base), data, list(adapter.modules), options).run()
    assert result.total.slope == pytest.approx(0, abs=1e-9)
    assert result.total.mean_error == pytest.approx(result.total.rms_error, rel=0.5)
    assert result.device_loss == pytest.approx(result.base_loss, abs=1e-5)
    assert abs(result.loss_move) > 0.01


def test_noise_pulls_z_towards_zero(check: Callable[..., HardwareResult], adapter: Adapter) -> None:
    name = next(iter(adapter.modules))
    slopes = [check([name], tokens=1, rows=1, noise={"depolarizing": p}).total.slope or 0 for p in (0.002, 0.05)]
    assert 0.9 < slopes[0] < 1
    assert abs(slopes[1]) < slopes[0] - 0.1


def test_only_the_chosen_modules_and_positions_come_from_the_device(
    check: Callable[..., HardwareResult], adapter: Adapter
) -> None:
    name = "model.layers.1.self_attn.v_proj"
    result = check([name], tokens=2, shots=20)
    assert [module.module for module in result.modules] == [name]
    assert (result.positions, result.circuits) == (2 * 3, 2 * 2 * 3)
    assert result.total.mean_error > 0.01
    whole = check([name], tokens=None, shots=20)
    assert whole.positions == whole.all_positions > result.positions
    assert whole.loss_move != result.loss_move
    again = check([name], tokens=2, shots=20)
    assert again == result
    assert check([name], tokens=2, shots=20, seed=1).loss_move != result.loss_move


def test_statistics_are_those_of_z(check: Callable[..., HardwareResult], adapter: Adapter, base: Path) -> None:
    """With readout errors the device's z is 0.8 z, so that every number follows from the exact z."""
    name = "model.layers.0.self_attn.q_proj"  # its input is the base's own
    module = check([name], tokens=None, rows=1, noise={"readout": 0.1}).modules[0]
    model, tokenizer = ReferenceModel(base), AutoTokenizer.from_pretrained(base)
    seen: list[torch.Tensor] = []
    layer = dict(model.model.named_modules())[name]
    layer.register_forward_hook(lambda _, args, output: seen.extend([args[0][0], output[0]]))
    model.logprobs(None, encode_row(ROWS[0], tokenizer)[0])
    weights = adapter.modules[name]
    z = reference(seen[0], weights.theta, adapter.config.circuit(7), None).flatten(1)
    assert module.mean_error == pytest.approx(float(0.2 * z.abs().mean()), rel=1e-6)
    assert module.max_error == pytest.approx(float(0.2 * z.abs().max()), rel=1e-6)
    assert module.rms_error == pytest.approx(float(0.2 * z.square().mean().sqrt()), rel=1e-6)
    spread = float(z.var(dim=0, correction=0).mean().sqrt())
    assert module.spread == pytest.approx(spread, rel=1e-6)
    assert module.relative_error == pytest.approx(module.rms_error / spread)
    assert module.slope == pytest.approx(0.8)
    update = adapter.config.scale(7) * z @ weights.weight.double().T
    ratio = float(torch.linalg.vector_norm(update) / torch.linalg.vector_norm(seen[1].double()))
    assert module.update_ratio == pytest.approx(ratio, rel=1e-5)


# ------------------------------------------------------------------------------------------- command line


@pytest.fixture
def directory(adapter: Adapter, base: Path, tmp_path: Path) -> Path:
    from qaa_serve.adapters import save_adapter

    save_adapter(tmp_path / "a", adapter.config, adapter.modules)
    return tmp_path / "a"


def test_the_command_says_what_it_will_cost_and_what_it_found(
    directory: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", str(directory), "--check", str(data), "--rows", "2", "--tokens", "3", "--shots", "100"]
    assert main([*command, "--module", "q_proj"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        "24 circuits of 7 qubits on default.qubit (100 shots each): 2 modules x 2 heads x 6 positions; about 1 s"
    )
    assert "on default.qubit   100 shots a circuit, no noise, seed 0" in said.out
    assert "z from the device at 6 of" in said.out
    assert "model.layers.0.self_attn.q_proj" in said.out
    command = ["inspect", str(directory), "--check", str(data), "--rows", "1", "--tokens", "1", "--json"]
    assert main([*command, "--module", "layers.1.self_attn.q_proj", "--noise", "bit-flip=0"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert (found["circuits"], found["shots"], found["device"]) == (2, None, "default.mixed")
    assert [module["module"] for module in found["modules"]] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "nope"], "--device nope: Device nope does not exist"),
        (["--device", "lightning.qubit", "--noise", "readout=0.1"], "carry no noise"),
        (["--noise", "gremlins=0.1"], "unknown noise 'gremlins'; known are depolarizing"),
        (["--noise", "readout"], "a probability from 0 to 1 is needed, such as readout=0.001"),
        (["--noise", "readout=1.5"], "a probability from 0 to 1"),
        (["--noise", "readout=nan"], "a probability from 0 to 1"),
        (["--noise", "readout=0.1", "--noise", "readout=0.2"], "the same name twice"),
        (["--shots", "0"], "--shots 0: a whole number from 1 on"),
        (["--tokens", "some"], "--tokens some: a whole number or all"),
        (["--tokens", "0"], "--tokens 0"),
        (["--rows", "-2"], "--rows -2"),
        (["--seed", "-2"], "--seed -2"),
        (["--module", "x_proj"], "--module x_proj"),
        (["--rows", "9"], "line 6: no JSON"),
        (["--qasm", "-"], "give it a file"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(
    arguments: list[str], expected: str, directory: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(directory), "--check", str(data), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file"),
        (b"\n \n", "has no rows"),
        (b"\xff\xfe\n", "is no text"),
        (b'{"text": "t5"}\n', "line 1: no known keys"),
        (b'\n{"prompt": "t5", "completion": ""}\n', "line 2: the answer"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    content: bytes | None, expected: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert main(["inspect", str(directory), "--check", str(file)]) == 2
    assert expected in capsys.readouterr().err


def test_an_interrupted_check_prints_no_half_report(
    directory: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HardwareCheck, "run", interrupt)
    picture = directory.parent / "c.png"
    command = ["inspect", str(directory), "--check", str(data), "--rows", "1", "--plot", str(picture)]
    assert main(command) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("qaa-serve inspect: interrupted\n")
    assert not picture.exists()


def test_the_adapter_is_the_one_on_disk(directory: Path, adapter: Adapter) -> None:
    assert load_adapter(directory).digest == adapter.digest
