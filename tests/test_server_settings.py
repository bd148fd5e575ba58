"""What `qaa-serve` chooses where the command line is silent, and the command lines it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from server_process import BIN
from tiny_models import ATTENTION, make_lora, make_model, make_qaa

from qaa_serve.server import settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    base = make_model(root / "base", "llama")
    make_qaa(root / "adapters" / "one", base, ATTENTION["llama"], 1)
    make_qaa(root / "adapters" / "wide", base, ATTENTION["llama"], 2, heads=3)
    make_lora(root / "adapters" / "lora", base, ("q_proj",), 3)
    return root


@pytest.fixture(scope="module")
def parser():
    return settings.make_parser()


def resolve(parser, *arguments):
    args = parser.parse_args([str(argument) for argument in arguments])
    return args, *settings.resolve(args)


def test_the_base_is_taken_from_the_adapters(parser, root, capsys):
    args, revisions, rejections = resolve(parser, "--adapters", root / "adapters")
    assert args.model == str(root / "base")
    assert args.served_model_name == ["base", str(root / "base")]
    assert [revision.name for revision in revisions] == ["lora", "one", "wide"]
    assert rejections == []
    assert f"Base model: {root / 'base'}" in capsys.readouterr().err


def test_the_base_may_be_relative_to_the_adapter(parser, root):
    config = root / "adapters" / "one" / "adapter_config.json"
    original = config.read_text()
    config.write_text(original.replace(str(root / "base"), "../../base"))
    try:
        args, *_ = resolve(parser, "--adapters", root / "adapters")
    finally:
        config.write_text(original)
    assert args.model == str(root / "base")


@pytest.mark.parametrize("given", [["{base}"], ["--model", "{base}"]])
def test_a_model_that_is_given_is_served(parser, root, given):
    arguments = [argument.format(base=root / "base") for argument in given]
    args, *_ = resolve(parser, *arguments, "--adapters", root / "adapters")
    assert args.model == str(root / "base")


def test_a_config_file_is_read_and_the_command_line_wins(parser, root, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"adapters: {root / 'adapters'}\nport: 8123\nmax-loras: 2\n")
    args, revisions, _ = resolve(parser, "--config", config, "--max-loras", 5)
    assert (args.port, args.max_loras, len(revisions)) == (8123, 5, 3)


def test_slots_ranks_and_cache_fit_the_adapters(parser, root, capsys):
    args, *_ = resolve(parser, "--adapters", root / "adapters")
    assert args.enable_lora
    assert args.host == "127.0.0.1"
    assert args.max_loras == 3
    assert args.max_lora_rank == 32, "3 heads x 7 qubits = 21"
    assert args.max_cpu_loras == 64
    assert 0 < args.kv_cache_memory_bytes <= 4 << 30
    printed = capsys.readouterr().err
    assert "--max-lora-rank 32" in printed
    assert "--host 127.0.0.1" in printed


def test_the_user_overrides_every_choice(parser, root, capsys):
    args, *_ = resolve(
        parser, "--adapters", root / "adapters", "--host", "127.0.0.2", "--max-loras", 2, "--max-lora-rank", 64,
        "--max-cpu-loras", 9, "--served-model-name", "mine", "--kv-cache-memory-bytes", "64M",
    )  # fmt: skip
    assert (args.host, args.max_loras, args.max_lora_rank, args.max_cpu_loras) == ("127.0.0.2", 2, 64, 9)
    assert args.served_model_name == ["mine"]
    assert "Chosen here" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve"),
        (["--adapters", "{root}/nowhere"], "is not a directory"),
        (["--adapters", "{root}/adapters/one"], "is itself an adapter"),
        (["--adapters", "{root}/base"], "give the MODEL to serve"),
        (["--adapters", "{root}/adapters", "--max-cpu-loras", "2"], "less than the 3 adapters"),
        (["--adapters", "{root}/adapters", "--no-enable-lora"], "leave it out"),
        (["--adapters", "{root}/adapters", "--api-server-count", "2"], "one API server"),
    ],
)
def test_command_lines_that_are_refused(parser, root, arguments, message):
    with pytest.raises(settings.UsageError, match=message):
        resolve(parser, *(argument.format(root=root) for argument in arguments))


def test_vllms_own_loading_routes_are_refused(parser, root, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(settings.UsageError, match="unset it"):
        resolve(parser, "--adapters", root / "adapters")


@pytest.mark.parametrize(
    ("arguments", "offline"),
    [
        (["--adapters", "x"], True),
        (["{root}", "--port", "1"], True),
        (["org/model"], False),
        (["{root}", "--tokenizer", "org/tok"], False),
    ],
)
def test_the_hub_is_shut_out_where_nothing_names_it(root, monkeypatch, arguments, offline):
    environment = {"PATH": ""}
    monkeypatch.setattr(os, "environ", environment)
    settings.prepare_environment([argument.format(root=root) for argument in arguments])
    assert ("HF_HUB_OFFLINE" in environment) == offline
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("host", "warns"), [("0.0.0.0", True), ("::", True), ("localhost", False), ("::1", False)]
)
def test_a_wide_bind_without_a_key_is_warned_about(parser, root, capsys, host, warns):
    resolve(parser, "--adapters", root / "adapters", "--host", host)
    assert ("without an API key" in capsys.readouterr().err) == warns
    resolve(parser, "--adapters", root / "adapters", "--host", host, "--api-key", "secret")
    assert "without an API key" not in capsys.readouterr().err


def test_a_wrong_command_line_is_one_line_and_status_2(root):
    result = subprocess.run(
        [str(BIN / "qaa-serve"), "--adapters", str(root / "nowhere")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "qaa-serve: --adapters" in result.stderr
    assert "is not a directory" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_explains_itself_without_importing_vllm(option):
    code = f"import sys; from qaa_serve.cli import main; main(['{option}']); assert 'vllm' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.1.0" in result.stdout
