"""The dry run of benchmarks/gpu_check.py, so that its first run on a GPU does not fail on a slip."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import gpu_check
import mixed_logprobs
import psutil
import pytest
import torch
from fork_server import ForkServer, training_server
from server_process import gone, serving_server

pytestmark = pytest.mark.slow

NEEDS_TRAINING = pytest.mark.skipif(
    any(find_spec(name) is None for name in gpu_check.TRAINING_PACKAGES), reason="peft or transformers is missing"
)
NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def fork_from(server: ForkServer, patch: pytest.MonkeyPatch, log: Path) -> None:
    """Have parts and scripts forked from what has imported everything."""
    log.touch()

    def run_process(command: list[str], limit_s: float) -> int:
        process = server.start(command, os.environ, log)
        try:
            return process.wait(limit_s)
        finally:
            process.kill()
            print(log.read_text())

    patch.setattr(gpu_check, "run_process", run_process)


@NEEDS_TRAINING
def test_every_part_but_serving_passes_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    fork_from(training_server(), monkeypatch, tmp_path / "log")
    parts = ["--parts", "1", "2", "3", "4", "6", "--minutes", "60"]
    assert gpu_check.main(["--dry-run", *parts, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["about"]["dry_run"]
    assert sum(report["about"]["seconds_planned"].values()) == pytest.approx(3600, abs=3)
    assert [part["failures"] for part in report["parts"]] == [[]] * 5
    here = {*gpu_check.BACKENDS} - report["about"]["missing"].keys()
    # Nothing is compiled for a device that is not there.
    for part, expected in zip(report["parts"], ({"torch"}, here, here - {"torch"}, here), strict=False):
        assert {row["backend"] for row in part["results"] if "backend" in row} == expected
    assert [row["method"] for row in report["parts"][4]["results"]] == [*gpu_check.METHODS]
    for number, part in zip((1, 2, 3, 4, 6), report["parts"], strict=True):
        assert json.loads(file.with_suffix(f".{number}.json").read_text())["parts"] == [part]


@NEEDS_TRAINING
@NEEDS_VLLM
@pytest.mark.vllm
def test_serving_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of vLLM: ours, stock, and two whose log-probabilities are compared."""
    file = tmp_path / "gpu.json"
    fork_from(serving_server(), monkeypatch, tmp_path / "log")
    assert gpu_check.main(["--dry-run", "--parts", "5", "--minutes", "60", "--json", str(file)]) == 0
    (part,) = json.loads(file.read_text())["parts"]
    assert [row["script"] for row in part["results"]] == ["mixed_logprobs", "serving", "serving"]
    assert {"base", "LoRA", "QAA"} <= part["results"][2]["results"]["decode 1"].keys()


def test_a_row_is_in_the_file_at_once_and_an_exception_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"

    def broken(setting: gpu_check.Setting, findings: gpu_check.Findings) -> None:
        findings.add({"row": 1})
        assert json.loads(file.read_text())["parts"][0]["results"] == [{"row": 1}]
        raise RuntimeError("out of order")

    monkeypatch.setitem(gpu_check.PARTS, 2, ("correctness", broken))
    assert gpu_check.main(["--dry-run", "--parts", "2", "--minutes", "60", "--json", str(file)]) == 1
    (part,) = json.loads(file.read_text())["parts"]
    assert part["failures"] == ["RuntimeError: out of order"]
    assert part["results"] == [{"row": 1}]


#: In place of the check: part 2 ends as by a fault, part 3 hangs, part 4 has a process that it leaves behind.
STANDIN = """
import json, os, subprocess, sys, time
from pathlib import Path
number, file = sys.argv[2], Path(sys.argv[6])
part = {"part": number, "seconds": 0, "results": [{"row": 1}], "summary": [], "aims": [], "failures": []}
if number != "1":
    file.write_text(json.dumps({"about": {"hardware": "here"}, "parts": [part]}))
if number == "4":
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    file.with_name("left").write_text(str(left.pid))
if number in "12":
    os.abort()
if number == "3":
    time.sleep(3600)
"""


def test_a_part_that_ends_or_hangs_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, file = tmp_path / "standin.py", tmp_path / "gpu.json"
    script.write_text(STANDIN)
    monkeypatch.setattr(gpu_check, "SCRIPT", str(script))
    parts = ["--parts", "1", "2", "4"]
    assert gpu_check.main(["--dry-run", *parts, "--json", str(file)]) == 1
    report = json.loads(file.read_text())
    assert report["about"]["hardware"] == "here"
    first, second, fourth = report["parts"]
    assert first["failures"] == ["its process ended with -6"]
    assert second["failures"] == ["its process ended with -6"]
    assert second["results"] == [{"row": 1}], "what it had found is kept"
    assert not fourth["failures"]
    left = int((tmp_path / "left").read_text())
    assert not gone([process for process in psutil.process_iter() if process.pid == left]), (
        "nothing outlives a part"
    )
    monkeypatch.setattr(gpu_check, "_GRACE_S", 0.5)
    assert gpu_check.main(["--dry-run", "--parts", "3", "3", "--minutes", "0", "--json", str(file)]) == 1
    for part in json.loads(file.read_text())["parts"]:
        assert "something hung" in part["failures"][0]


def test_wrong_circuits_fail_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(gpu_check.InterpretedTriton):
        def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return super().run(x, index) + 1e-3

    monkeypatch.setattr(gpu_check, "InterpretedTriton", Wrong)
    for number in ("2", "3", "4"):
        file = tmp_path / "gpu.json"
        assert gpu_check.main(["--dry-run", "--parts", number, "--minutes", "60", "--json", str(file)]) == 1
        (part,) = json.loads(file.read_text())["parts"]
        assert part["failures"]
        assert all("triton" in failure for failure in part["failures"])
        assert not any("us" in row for row in part["results"] if row.get("backend") == "triton")


def test_what_a_part_leaves_goes_to_those_behind_it() -> None:
    clock = gpu_check.Clock(9, [1, 5, 6])
    shares = gpu_check.SHARES
    whole = shares[1] + shares[5] + shares[6]
    assert clock.plan()[5] == pytest.approx(540 * shares[5] / whole, abs=1)
    clock.next_part()
    assert clock.left == pytest.approx(540 * shares[1] / whole, abs=1)
    clock.next_part()
    assert clock.left == pytest.approx(540 * shares[5] / (shares[5] + shares[6]), abs=1)
    clock.next_part()
    assert clock.left == pytest.approx(540, abs=1)


def test_aims_are_met_or_missed_against_vllms_own_engine() -> None:
    findings = gpu_check.Findings()
    ours = {"decode 1": {"QAA": {"ms": 10.4}}, "prefill": {"QAA": {"ms": 11.6}}}
    stock = {situation: {"base": {"ms": 10.0}, "LoRA": {"ms": 10.3}} for situation in ours}
    gpu_check.serving_aims(findings, "triton", ours, stock)
    assert [aim["met"] for aim in findings.aims] == [True, False, False]
    assert not findings.failures


def test_log_probabilities_that_are_off_or_lack_an_adapter_fail() -> None:
    rows = len(mixed_logprobs.NAMES)
    exact, plain = torch.zeros(rows, 3), torch.ones(rows, 3)
    good = {"graphs": exact + 0.01, "eager": exact}
    assert not [line for line in mixed_logprobs.compare(good, exact, plain, 0.01) if line.startswith("FAILED")]
    off = {"graphs": exact + 0.03, "eager": exact}
    assert mixed_logprobs.compare(off, exact, plain, 0.01)[0].startswith("FAILED: logprobs, graphs")
    without = mixed_logprobs.compare(good, exact, exact, 0.01)
    assert sum(line.startswith("FAILED") for line in without) == rows - 1


@NEEDS_TRAINING
@NEEDS_VLLM
def test_serving_is_set_beside_vllms_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], _: float) -> int:
        asked.append(f"{Path(command[1]).stem} {'--stock' in command}")
        kinds = {kind: {"ms": 10.0, "ratio": 1.0} for kind in ("base", "LoRA", "QAA")}
        found = {"lines": ["logprobs"], "results": {"decode 1": kinds}, "load_ms": {"slot": {"QAA": 3.0}}}
        Path(command[-1]).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(gpu_check, "run_process", run)
    file = tmp_path / "report.json"
    assert gpu_check.main(["--dry-run", "--parts", "5", "--json", str(file)]) == 0
    assert asked == ["mixed_logprobs False", "serving True", "serving False"]
    (part,) = json.loads(file.read_text())["parts"]
    assert [aim["met"] for aim in part["aims"]] == [True, True, False]
