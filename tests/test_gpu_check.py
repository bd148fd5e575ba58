"""The dry run of benchmarks/gpu_check.py, so that its first run on a GPU does not fail on a slip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
import torch

SMALLEST = replace(gpu_check.TINY, checked=(2,), timed=(2,), tokens=(1, 2), captured=(2,), gradients=2)

pytestmark = pytest.mark.slow


def test_the_circuits_parts_pass(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    status = gpu_check.main(["--dry-run", "--parts", "1", "2", "3", "--json", str(file)], SMALLEST)
    report = json.loads(file.read_text())
    assert report["about"]["dry_run"]
    assert [part["failures"] for part in report["parts"]] == [[], [], []]
    assert status == 0
    here = {*gpu_check.BACKENDS} - report["about"]["missing"].keys()
    for part, expected in zip(report["parts"], (here, here, here - {"torch"}), strict=True):
        assert {row["backend"] for row in part["results"] if "backend" in row} == expected


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setting: gpu_check.Setting) -> gpu_check.Findings:
        raise RuntimeError("out of order")

    monkeypatch.setitem(gpu_check.PARTS, 2, ("timings", broken))
    file = tmp_path / "report.json"
    assert gpu_check.main(["--dry-run", "--parts", "2", "3", "--json", str(file)], SMALLEST) == 1
    second, third = json.loads(file.read_text())["parts"]
    assert second["failures"] == ["RuntimeError: out of order"]
    assert third["results"]
    assert not third["failures"]


def test_wrong_circuits_fail_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(gpu_check.InterpretedTriton):
        def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return super().run(x, index) + 1e-3

    monkeypatch.setattr(gpu_check, "InterpretedTriton", Wrong)
    file = tmp_path / "report.json"
    assert gpu_check.main(["--dry-run", "--parts", "1", "2", "3", "--json", str(file)], SMALLEST) == 1
    for part in json.loads(file.read_text())["parts"]:
        assert part["failures"]
        assert all("triton" in failure for failure in part["failures"])
        assert not any("us" in row for row in part["results"] if row.get("backend") == "triton")
