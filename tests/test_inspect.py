"""`qaa-serve inspect`: the facts are the files', and whatever cannot be done is said in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ATTENTION, MLP, make_lora, make_model, make_qaa

from qaa_serve.adapters import (
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    digest_of,
    linear_widths,
    load_adapter,
)
from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, get_backend
from qaa_serve.cli import main
from qaa_serve.inspection.circuit import Circuit, choose_circuit, draw, to_qasm
from qaa_serve.inspection.report import inspect_adapter, place_of
from qaa_serve.registry import read_revision

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "assistant"
PIRATE = EXAMPLES / "adapters" / "pirate"
Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """q, k, v, o and down of both layers, two heads, B in bfloat16."""
    targets = (*ATTENTION["llama"], MLP["llama"][2])
    make_qaa(tmp_path / "support", base, targets, seed=1, heads=2, layers=3, weight_dtype=torch.bfloat16)
    return tmp_path / "support"


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refusal(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """What is said when it is refused: one line on stderr, and on stdout what can be told of a refused adapter."""
    capsys.readouterr()  # what making the parts has printed
    assert main(["inspect", *map(str, arguments)]) == status
    said = capsys.readouterr()
    assert ("can be served: no: " in said.out) if status == 1 else said.out == ""
    assert said.err.startswith("qaa-serve inspect: ")
    assert said.err.count("\n") == 1
    return said.err


# -------------------------------------------------------------------------------------------------- facts


def test_the_facts_of_a_qaa_adapter_are_its_files(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert found["config"] == config
    assert (found["name"], found["kind"]) == ("support", "QAA")
    assert found["revision"] == read_revision(adapter).revision
    assert found["base"] == {"named": str(base), "resolved": str(base), "fits": True, "problem": None}
    angles = sum(t.numel() for name, t in tensors.items() if name.endswith("theta"))
    weights = sum(t.numel() for name, t in tensors.items() if name.endswith("weight"))
    widths = linear_widths(base)
    sizes = found["sizes"]
    assert (sizes["angles"], sizes["weights"], sizes["parameters"]) == (angles, weights, angles + weights)
    assert sizes["bytes_in_memory"] == 4 * angles + 2 * weights
    assert sizes["bytes_on_disk"] == sum((adapter / f"adapter_{n}").stat().st_size for n in
                                         ("config.json", "model.safetensors"))  # fmt: skip
    ranks = {name: 2 * (d_in - 1).bit_length() for name, (d_in, _) in widths.items()}
    names = [module["name"] for module in found["modules"]]
    assert sorted(names) == sorted({n.split(".", 2)[2].rsplit(".", 1)[0] for n in tensors})
    assert sizes["modules"] == len(names) == 10
    assert sizes["largest_rank"] == 16
    assert sizes["lora_parameters"] == sum(ranks[name] * sum(widths[name]) for name in names)
    assert sizes["lora_bytes"] == 2 * sizes["lora_parameters"]
    assert sizes["equal_lora_rank"] == pytest.approx((angles + weights) / sum(sum(widths[n]) for n in names))


def test_norms_are_those_of_scale_times_b(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for module in facts(capsys, adapter)["modules"]:
        name = module["name"]
        d_out, d_in = weights[f"{name}.weight"].shape
        n = (d_in - 1).bit_length()
        b = tensors[f"base_model.model.{name}.qaa_weight"].double().numpy()
        scale = 4.0 * 2 ** (n / 2) / (2 * n)
        assert (module["d_in"], module["d_out"], module["qubits"], module["rank"]) == (d_in, d_out, n, 2 * n)
        assert module["scale"] == pytest.approx(scale)
        assert module["parameters"] == b.size + 2 * 7 * n
        assert module["update_frobenius"] == pytest.approx(scale * np.sqrt((b**2).sum()))
        assert module["update_spectral"] == pytest.approx(scale * np.linalg.svd(b)[1][0])
        norm = float(np.sqrt((weights[f"{name}.weight"].double().numpy() ** 2).sum()))
        assert module["base_frobenius"] == pytest.approx(norm, rel=1e-5)
        expected = module["update_frobenius"] / norm * 2 ** (-n / 2)
        assert module["relative_update"] == pytest.approx(expected, rel=1e-5)


def test_a_base_whose_files_name_tensors_without_a_prefix_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_model(tmp_path / "opt", "opt")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"}
    )
    make_qaa(tmp_path / "a", base, ("fc1", "out_proj"), seed=2)
    modules = facts(capsys, tmp_path / "a")["modules"]
    assert len(modules) == 4
    for module in modules:
        norm = float(torch.linalg.matrix_norm(tensors[f"{module['name']}.weight"]))
        assert module["base_frobenius"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("patterns", [False, True])
def test_a_lora_adapter_has_the_norms_of_its_product(
    tmp_path: Path, base: Path, patterns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj", "down_proj"), seed=3)
    config_file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    if patterns:
        config |= {"alpha_pattern": {"layers.1.mlp.down_proj": 3.0}, "use_rslora": True}
        config_file.write_text(json.dumps(config))
    found = facts(capsys, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert found["kind"] == "LORA"
    assert found["base"]["fits"] is True
    assert found["sizes"]["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["sizes"]["equal_lora_rank"] == 4
    assert len(found["modules"]) == 4
    for module in found["modules"]:
        a, b = (tensors[f"base_model.model.{module['name']}.lora_{kind}.weight"].double() for kind in "AB")
        scale = 8 / 4
        if patterns:
            scale = (3 if module["name"] == "model.layers.1.mlp.down_proj" else 8) / 2
        assert module["scale"] == scale
        assert module["update_frobenius"] == pytest.approx(float(torch.linalg.matrix_norm(scale * b @ a)))
        assert module["update_spectral"] == pytest.approx(float(torch.linalg.matrix_norm(scale * b @ a, ord=2)))
        assert module["relative_update"] == pytest.approx(module["update_frobenius"] / module["base_frobenius"])


@pytest.mark.parametrize("name", ["pirate", "brief-lora"])
def test_the_summary_says_what_matters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = EXAMPLES / "adapters" / name
    assert main(["inspect", str(directory)]) == 0
    text = capsys.readouterr().out
    revision = read_revision(directory)
    for expected in (revision.revision, revision.digest, str(EXAMPLES / "base"), "256 -> 256", "self_attn.q_proj"):
        assert expected in text
    if revision.kind == "QAA":
        assert "33,408 parameters (640 angles, 32,768 in B) in 16 modules, rank 8" in text
        assert "65,536 parameters" in text
        fields = AdapterConfig.parse(json.loads((directory / "adapter_config.json").read_text())).to_json()
        for field in fields.keys() - {"peft_type", "base_model_name_or_path", "target_modules"}:
            assert f"{field} {fields[field]}" in text
    else:
        assert "65,536 parameters in 16 modules, rank 8" in text
        assert "lora_alpha 16.0" in text


def test_every_key_of_the_json_is_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "inspect.md").read_text()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is the capital of France?", "completion": "Paris, matey."}\n')
    found = facts(
        capsys, PIRATE, "--check", rows, "--rows", 1, "--tokens", 1, "--module", "layers.0.self_attn.q_proj"
    )
    keys = set(found) | found["base"].keys() | found["sizes"].keys() | found["modules"][0].keys()
    keys |= found["check"].keys() | found["check"]["total"].keys()
    assert not [key for key in keys if f"`{key}`" not in text]


def test_an_adapter_is_named_as_the_server_names_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter.parent / "current").symlink_to(adapter)
    monkeypatch.chdir(adapter)
    assert facts(capsys, ".")["name"] == "support"
    assert facts(capsys, adapter.parent / "current")["name"] == "current"


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (Q1, (1, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_proj", (11, "attn.c_proj")),
        ("score", (None, "score")),
    ],
)
def test_a_name_says_layer_and_kind(module: str, place: tuple[int | None, str]) -> None:
    assert place_of(module) == place


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "[red]\x1b[31mnone", "task_type": "\x1b]0;x\x07"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["inspect", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert "[red]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


# ------------------------------------------------------------------------------------------------ validity


def test_an_invalid_adapter_is_refused_in_the_server_s_words(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layers": 4}))
    with pytest.raises(AdapterError) as server:
        read_revision(adapter)
    assert refusal(capsys, 1, adapter) == f"qaa-serve inspect: {adapter} is not valid: {server.value}\n"


def test_an_adapter_for_another_base_is_refused_in_the_server_s_words(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "qwen2", "qwen2")
    with pytest.raises(AdapterError) as server:
        load_adapter(adapter, linear_widths(other))
    assert refusal(capsys, 1, adapter, "--base", other).endswith(f"is not valid: {server.value}\n")


@pytest.mark.parametrize("damage", ["no A", "shapes", "cut", "nothing"])
def test_a_damaged_lora_adapter_is_refused(
    tmp_path: Path, base: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    expected = {
        "no A": "lora_A is missing",
        "shapes": "(rank, d_in)",
        "cut": "damaged",
        "nothing": "none that vLLM serves",
    }
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        changed = {"no A": {}, "shapes": {first: tensors[first][1:].clone()}, "nothing": {"x": torch.ones(1)}}[
            damage
        ]
        rest = {} if damage == "nothing" else {name: t for name, t in tensors.items() if name != first}
        save_file(rest | changed, file)
    assert expected[damage] in refusal(capsys, 1, tmp_path / "lora")


def test_a_lora_adapter_for_another_base_is_refused_in_the_server_s_words(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    other = make_model(tmp_path / "qwen2", "qwen2")
    with pytest.raises(AdapterError) as server:
        read_revision(tmp_path / "lora", base=linear_widths(other))
    assert refusal(capsys, 1, tmp_path / "lora", "--base", other).endswith(f"is not valid: {server.value}\n")


def test_modules_that_the_base_has_no_name_for_are_left_to_the_engine(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    found = facts(capsys, tmp_path / "lora", "--base", make_model(tmp_path / "opt", "opt"))
    assert (found["can_be_served"], found["base"]["fits"]) == (True, False)
    assert "2 of 2 modules" in found["notes"][0]


def test_what_can_be_told_of_an_adapter_that_cannot_be_served_is_told(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"use_dora": True, "target_modules": "all-linear"}
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterError) as server:
        read_revision(tmp_path / "lora")
    assert main(["inspect", str(tmp_path / "lora"), "--json", "--plot", str(tmp_path / "a.png")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["can_be_served"], told["reason"], told["vllm_check"]) == (False, str(server.value), "not asked")
    assert (told["kind"], told["config"], told["digest"]) == ("LORA", config, digest_of(tmp_path / "lora"))
    assert {tensor["name"] for tensor in told["tensors"]} == load_file(file.with_name(WEIGHTS_FILE)).keys()
    assert not (tmp_path / "a.png").exists()
    assert main(["inspect", str(tmp_path / "lora")]) == 1
    text = capsys.readouterr().out
    assert f"can be served: no: {server.value}" in text
    for expected in ("targets     all-linear", "tensors     4", f"{Q1}.lora_A.weight F32 [4, 96]"):
        assert expected in text
    file.write_text("no JSON")
    assert main(["inspect", str(tmp_path / "lora")]) == 1
    assert "config      unreadable" in capsys.readouterr().out


def test_a_regular_expression_of_targets_is_shown_as_it_is_written(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": r".*\.(q|k)_proj"}))
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert r"targets     .*\.(q|k)_proj" in capsys.readouterr().out
    assert read_revision(tmp_path / "lora").details["target_modules"] == r".*\.(q|k)_proj"


def test_inspecting_does_not_import_vllm(tmp_path: Path) -> None:
    """It takes seconds; only --with-vllm needs it."""
    code = "import sys; from qaa_serve.cli import main; main(sys.argv[1:]); sys.exit('vllm' in sys.modules)"
    command = [sys.executable, "-c", code, "inspect", str(EXAMPLES / "adapters" / "brief-lora")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_vllm_s_own_check_is_asked_when_that_is_wanted(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    make_lora(tmp_path / "lora", base, ("q_proj",), seed=3)
    assert facts(capsys, tmp_path / "lora", "--with-vllm")["vllm_check"] == "passed"
    assert facts(capsys, tmp_path / "lora")["vllm_check"] == "not asked"
    from vllm.lora.peft_helper import PEFTHelper

    def refuse(self: Any, lora_config: Any) -> None:
        raise ValueError("vLLM does not take this.")

    monkeypatch.setattr(
        PEFTHelper, "validate_legal", refuse
    )  # as a version of vLLM that takes less than ours does
    assert main(["inspect", str(tmp_path / "lora"), "--with-vllm", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["reason"], told["vllm_check"]) == ("vLLM refuses it: vLLM does not take this.", "refused")


def test_without_a_readable_base_all_but_the_fit_is_checked(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../gone"}))
    found = facts(capsys, adapter)
    assert found["base"]["fits"] is None
    assert "'../gone' cannot be read" in found["base"]["problem"]
    assert found["modules"][0]["d_in"] is None
    assert found["modules"][0]["update_frobenius"] > 0
    assert found["sizes"]["lora_parameters"] is None
    assert main(["inspect", str(adapter)]) == 0
    assert "the fit to it was not checked" in capsys.readouterr().out
    message = refusal(capsys, 2, adapter, "--check", EXAMPLES / "data" / "heldout.jsonl")
    assert "--check runs the base model, which cannot be read" in message


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "is not there; give the directory"),
        ([__file__], "is no directory; give the directory"),
        ([EXAMPLES / "base"], "nor adapter_model.safetensors; give an adapter's own directory\n"),
        ([EXAMPLES / "adapters"], "such as one in it: brief brief-lora json pirate"),
        ([PIRATE, "--base", "nowhere"], "--base nowhere: the base model 'nowhere' cannot be read"),
        ([PIRATE, "--draw", "out.txt"], "ends in .txt"),
        ([PIRATE, "--plot", "gone/out.png"], "there is no directory"),
        ([PIRATE, "--plot", ".."], "ends in nothing"),
        ([PIRATE, "--qasm", ".."], "no regular file"),
        ([PIRATE, "--qasm", "a.png", "--draw", "a.png"], "two outputs have the same name"),
        ([PIRATE, "--draw", "a.png", "--module", "x_proj"], "x_proj: the adapter has no such module; it has"),
        ([PIRATE, "--draw", "a.png", "--head", "1"], "--head 1: the adapter's heads are 0 to 0"),
        ([PIRATE, "--draw", "a.png", "--head", "-1"], "--head -1"),
        ([PIRATE, "--head", "0"], "--head chooses a circuit for --draw or --qasm"),
        ([PIRATE, "--module", "q_proj"], "--module chooses for"),
        ([PIRATE, "--shots", "5"], "--shots says how --check runs"),
        ([PIRATE, "--json", "--qasm"], "--qasm prints on stdout"),
        ([EXAMPLES / "adapters" / "brief-lora", "--qasm", "a.qasm"], "brief-lora is a LoRA adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[object],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, 2, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "option"), [("pennylane", "--draw"), ("matplotlib", "--plot")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in __import__("sys").modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = refusal(capsys, 2, PIRATE, option, tmp_path / "a.png")
    assert f'{package} is not installed: pip install "qaa-serve[inspect]"' in message


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "qaa-serve inspect adapters/support --check support.jsonl --shots 1000" in text
    assert "exit status" in text


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_written_and_what_is_there_stays_when_it_fails(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, picture = tmp_path / "norms.png", tmp_path / "circuit.png"
    make_qaa(adapter, base, ("v_proj",), seed=1, layers=1)  # a small circuit: drawing takes its time
    capsys.readouterr()
    assert main(["inspect", str(adapter), "--plot", str(plot), "--draw", str(picture)]) == 0
    assert capsys.readouterr().err == f"wrote {plot}\nwrote {picture}\n"
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in (plot, picture))
    before = {path.name: path.read_bytes() for path in (plot, picture)}
    names = set(tmp_path.iterdir())

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["inspect", str(adapter), "--plot", str(plot)]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (plot, picture)} == before
    assert set(tmp_path.iterdir()) == names


def test_the_drawing_shows_the_angles_of_the_circuit_that_was_asked_for(adapter: Path) -> None:
    report = inspect_adapter(adapter)
    assert report.adapter is not None
    circuit = choose_circuit(report.adapter, report.revision.revision, ["layers.1.self_attn.q_proj"], 1)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw(circuit, ".svg").decode()
    theta = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{Q1}.qaa_theta"][1]
    labels = re.findall(r">\((-?\d+\.\d\d)\)<", text)
    assert sorted(labels) == sorted(f"{angle:.2f}" for angle in theta.flatten().tolist())
    assert f"{report.revision.revision}, {Q1}, head 1" in text


# ---------------------------------------------------------------------------------------------------- QASM


def simulate(qasm: str, state: np.ndarray) -> np.ndarray:
    """z of every classical bit after an OpenQASM 2 program; reads the gates we write and nothing else."""
    header, *lines = [line for line in qasm.splitlines() if not line.startswith("//")]
    assert header == "OPENQASM 2.0;"
    assert lines.pop(0) == 'include "qelib1.inc";'
    n = int(re.fullmatch(r"qreg q\[(\d+)\];", lines.pop(0))[1])
    assert lines.pop(0) == f"creg c[{n}];"
    psi = state.astype(complex)
    basis = np.arange(2**n)
    bits = (basis[:, None] >> np.arange(n)[::-1]) & 1  # column k: the bit of q[k], q[0] the most significant
    z = np.full(n, np.nan)
    for line in lines:
        if match := re.fullmatch(r"r([yz])\((-?\d+\.\d+(?:e-?\d+)?)\) q\[(\d+)\];", line):
            axis, half, wire = match[1], float(match[2]) / 2, int(match[3])
            sign = 1 - 2 * bits[:, wire]
            if axis == "z":
                psi = psi * np.exp(-1j * half * sign)
            else:
                psi = np.cos(half) * psi - np.sin(half) * sign * psi[basis ^ (1 << (n - 1 - wire))]
        elif match := re.fullmatch(r"cx q\[(\d+)\],q\[(\d+)\];", line):
            control, target = int(match[1]), int(match[2])
            psi = psi[np.where(bits[:, control] == 1, basis ^ (1 << (n - 1 - target)), basis)]
        else:
            match = re.fullmatch(r"measure q\[(\d+)\] -> c\[(\d+)\];", line)
            assert match, line
            z[int(match[2])] = (np.abs(psi) ** 2 * (1 - 2 * bits[:, int(match[1])])).sum()
    return z


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 3, 5])
def test_the_qasm_is_the_circuit(name: str, qubits: int) -> None:
    ansatz = Ansatz(name, qubits, 3)
    generator = torch.Generator().manual_seed(qubits)
    theta = torch.randn(1, *ansatz.theta_shape, generator=generator) * 2
    theta[0, 0, 0] = 1e-20  # repr writes an exponent and no point
    x = torch.randn(1, 2**qubits, generator=generator, dtype=torch.float64)
    expected = get_backend("reference")(x, theta, ansatz, None)[0, 0].numpy()
    found = simulate(to_qasm(Circuit("a@0", "m", 0, ansatz, theta[0])), (x / x.norm())[0].numpy())
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_the_qasm_says_what_to_prepare_and_to_read_out() -> None:
    def said(inputs: Any = "raw", **options: Any) -> str:
        ansatz = Ansatz("ry_ring", 3, 1, **options)
        return to_qasm(Circuit("a@0", "m", 0, ansatz, torch.zeros(ansatz.theta_shape), inputs))

    assert "Prepare the state x / ||x||, padded" in said()
    assert "Prepare the state x / ||x|| of the x that qaa_inputs standardises, padded" in said("rms")
    assert "z_k is the mean of (-1)^c[k].\n" in said()
    assert "Prepare the state (x / ||x||, 1) / sqrt(2), padded" in said(constant=True)
    assert "(-1)^c[k] for k < 2, times ||x|| / sqrt(width of x).\n" in said(readouts=2, length=True)
    assert "then of (-1)^(c[i] + c[j]) for i j = 0 1, 0 2.\n" in said(readouts=5)


def test_the_qasm_is_that_of_the_module_and_head_that_were_asked_for(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--module", "layers.1.self_attn.q_proj", "--head", "1"]
    assert main(["inspect", str(adapter), "--qasm", str(tmp_path / "c.qasm"), *chosen]) == 0
    assert Q1 not in capsys.readouterr().out
    assert main(["inspect", str(adapter), "--qasm", "-", *chosen]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "c.qasm").read_text()
    loaded: Adapter = load_adapter(adapter)
    weights: ModuleWeights = loaded.modules[Q1]
    x = torch.randn(1, 96, dtype=torch.float64)
    expected = get_backend("reference")(x, weights.theta[1:], loaded.config.circuit(7), None)[0, 0].numpy()
    state = torch.nn.functional.pad(x / x.norm(), (0, 32))[0].numpy()
    np.testing.assert_allclose(simulate(text, state), expected, atol=1e-12)


def test_a_copy_of_an_adapter_keeps_its_digest_and_takes_its_own_name(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "copy")
    first, second = facts(capsys, adapter), facts(capsys, tmp_path / "copy")
    assert first["digest"] == second["digest"]
    assert second["revision"] == f"copy@{first['digest'][:12]}"
