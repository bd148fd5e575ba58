"""The dry run of benchmarks/gpu_check.py, so that its first run on a GPU does not fail on a slip."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gpu_check
import mixed_logprobs
import pytest
import torch

SMALLEST = replace(gpu_check.TINY, checked=(2,), timed=(2,), tokens=(1, 2), captured=(2,), gradients=(2,))

pytestmark = pytest.mark.slow


def test_the_circuits_parts_pass(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    status = gpu_check.main(["--dry-run", "--parts", "1", "2", "3", "4", "--json", str(file)], SMALLEST)
    report = json.loads(file.read_text())
    assert report["about"]["dry_run"]
    assert [part["failures"] for part in report["parts"]] == [[], [], [], []]
    assert status == 0
    assert sum(report["about"]["seconds_planned"].values()) == pytest.approx(9 * 60, abs=3)
    here = {*gpu_check.BACKENDS} - report["about"]["missing"].keys()
    # Nothing is compiled for a device that is not there.
    for part, expected in zip(report["parts"], ({"torch"}, here, here - {"torch"}, here), strict=True):
        assert {row["backend"] for row in part["results"] if "backend" in row} == expected


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.json"

    def broken(setting: gpu_check.Setting, findings: gpu_check.Findings) -> None:
        findings.add({"row": 1})
        assert json.loads(file.read_text())["parts"][0]["results"] == [{"row": 1}], "the file has it at once"
        raise RuntimeError("out of order")

    monkeypatch.setitem(gpu_check.PARTS, 2, ("timings", broken))
    assert gpu_check.main(["--dry-run", "--parts", "2", "3", "--json", str(file)], SMALLEST) == 1
    second, third = json.loads(file.read_text())["parts"]
    assert second["failures"] == ["RuntimeError: out of order"]
    assert second["results"] == [{"row": 1}]
    assert third["results"]
    assert not third["failures"]


def test_wrong_circuits_fail_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(gpu_check.InterpretedTriton):
        def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return super().run(x, index) + 1e-3

    monkeypatch.setattr(gpu_check, "InterpretedTriton", Wrong)
    file = tmp_path / "report.json"
    assert gpu_check.main(["--dry-run", "--parts", "2", "3", "4", "--json", str(file)], SMALLEST) == 1
    for part in json.loads(file.read_text())["parts"]:
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


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("vllm", "peft", "transformers")),
    reason="vllm, peft or transformers is not installed",
)
def test_serving_is_set_beside_vllms_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks themselves run in tests of their own; here they only leave what they found."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> None:
        asked.append(f"{Path(command[1]).stem} {'--stock' in command}")
        kinds = {kind: {"ms": 10.0, "ratio": 1.0} for kind in ("base", "LoRA", "QAA")}
        found = {"lines": ["logprobs"], "results": {"decode 1": kinds}, "activation_ms": {"QAA": 3.0}}
        Path(command[-1]).write_text(json.dumps(found))

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    file = tmp_path / "report.json"
    assert gpu_check.main(["--dry-run", "--parts", "5", "--json", str(file)], SMALLEST) == 0
    assert asked == ["mixed_logprobs False", "serving True", "serving False"]
    (part,) = json.loads(file.read_text())["parts"]
    assert [aim["met"] for aim in part["aims"]] == [True, True, False]
