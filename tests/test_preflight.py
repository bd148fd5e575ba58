"""What is wrong with a command line is said in one line, before anything heavy is imported."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest

from qaa_serve.preflight import UsageError, check_model, check_serve, check_train

#: Runs the command line and fails if it has imported what takes seconds.
PROGRAM = """
import sys
from qaa_serve.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "vllm", "transformers", "numba", "datasets"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with one model and one adapter; the hub cannot be reached and nothing was fetched."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapters" / "one").mkdir(parents=True)
    (tmp_path / "adapters" / "one" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    return tmp_path


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope", "--adapters", "adapters"], "no directory nope here, .* the hub cannot be reached"),
        (["serve", "org/nope", "--adapters", "adapters"], "no directory org/nope here"),
        (["--adapters", "missing"], "--adapters missing does not exist"),
        (["adpaters", "list"], "no command and no model adpaters: is adapters meant"),
        (["./nope"], "there is no directory ./nope"),
        (["model.gguf"], "GGUF file.*from_pretrained.*gguf_file='model.gguf'"),
        (["file"], "is a file; a model is a directory"),
        (["empty"], "holds no config.json"),
        (["base", "--adapters", "missing"], "--adapters missing does not exist"),
        (["--adapters=file"], "--adapters file is a file"),
        (["base", "--adapters", "adapters/one"], "is itself an adapter"),
        (["train", "--model", "./nope", "--data", "rows.jsonl", "--output", "x"], "no directory ./nope"),
        (
            ["train", "--model", "base", "--data", "rows.jsonl", "--output", "x"],
            "--data rows.jsonl: there is no such",
        ),
        (["compare", "--model", "base", "--data", "/x/y", "--output", "x"], "--data /x/y: there is no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_heavy_is_imported(here, arguments, said):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60, cwd=here
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("qaa-serve: ")
    assert re.search(said, line), line


def test_serving_is_explained_without_importing_anything_heavy(here):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "serve", "--help"], capture_output=True, text=True, timeout=60, cwd=here
    )
    assert done.returncode == 0, done.stderr
    for option in ("--adapters", "--admin-listen", "--engine-stall-timeout", "--help=all"):
        assert option in done.stdout


@pytest.mark.parametrize(("command", "option"), [("train", "--push-to-hub"), ("compare", "--bertscore-model")])
def test_training_is_explained_without_importing_anything_heavy(here, command, option):
    program = PROGRAM.replace(
        "status = main(sys.argv[1:])", "try: main(sys.argv[1:])\nexcept SystemExit: status = 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, command, "--help"], capture_output=True, text=True, timeout=60, cwd=here
    )
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_a_port_that_is_taken_is_said(here):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is taken"):
            check_serve(["base", "--port", port])
        with pytest.raises(UsageError, match="is taken"):
            check_serve(["base", f"--port={port}", "--host", "0.0.0.0"])
        check_serve(["base", "--port", port, "--uds", "socket"])


def test_what_may_be_right_passes(here, monkeypatch):
    port = ["--port", str(closed_port())]
    check_serve(["base", "--adapters", "adapters", *port])
    check_serve(["--adapters", "adapters", "--model", str(here / "base"), *port])
    check_serve(["nope", "--config", "settings.yaml", *port])
    check_serve(["s3://bucket/model", *port])
    check_train(["--model", "base", "--data", "squad:train"])
    (here / "hub" / "hub" / "models--org--kept").mkdir(parents=True)
    check_model("org/kept")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{sock.getsockname()[1]}")
        check_model("org/to-be-fetched")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        check_model("org/to-be-fetched")
