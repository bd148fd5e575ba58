"""What `qaa-serve` chooses where the command line is silent, and the command lines it refuses."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from server_process import BIN
from tiny_models import ATTENTION, make_lora, make_model, make_qaa
from vllm_qaa.backend import BACKEND_KEY, MOST_LAYERS, MOST_LAYERS_KEY

from qaa_serve.circuits import BACKENDS
from qaa_serve.registry import Contents
from qaa_serve.server import settings
from qaa_serve.server.keys import KeyRing, first_key
from qaa_serve.server.options import CIRCUIT_BACKENDS

SECRETS = ("VLLM_API_KEY", "QAA_SERVE_ADMIN_KEY")


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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where state directories go by default: not the user's; and no keys from the user's environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "qaa-serve"


def resolve(parser, *arguments, keep_open=False):
    """The arguments as vLLM gets them, our options, where adapters come from, and the keys."""
    args = parser.parse_args([str(argument) for argument in arguments])
    options, contents, sources = settings.resolve(args)
    assert "hush" not in repr(sources) + repr(vars(sources))
    if not keep_open:
        contents.close()
    return args, options, contents, KeyRing(*sources.read())


def test_the_base_is_taken_from_the_adapters(parser, root, capsys):
    args, _, contents, _ = resolve(parser, "--adapters", root / "adapters")
    assert args.model == str(root / "base")
    assert args.served_model_name == ["base"], "where it lies is nobody's business"
    assert contents.source.url == str(root / "adapters")
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


@pytest.mark.parametrize(
    "odd",
    [
        {"r": 100_000},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "x" * 5000},
        {"base_model_name_or_path": None},
        {"rank_pattern": [1]},
    ],
    ids=str,
)
def test_an_odd_adapter_changes_nothing_for_the_others(parser, root, odd):
    """It neither ends the start nor takes part in what is chosen."""
    without, *_ = resolve(parser, "--adapters", root / "adapters")
    place = shutil.copytree(root / "adapters" / "lora", root / "adapters" / "odd")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | odd))
    try:
        args, *_ = resolve(parser, "--adapters", root / "adapters")
    finally:
        shutil.rmtree(place)
    assert (args.model, args.max_lora_rank) == (str(root / "base"), without.max_lora_rank)


@pytest.mark.parametrize("given", [["{base}"], ["--model", "{base}"]])
def test_a_model_that_is_given_is_served(parser, root, given):
    arguments = [argument.format(base=root / "base") for argument in given]
    args, *_ = resolve(parser, *arguments, "--adapters", root / "adapters")
    assert args.model == str(root / "base")


def test_a_config_file_is_read_and_the_command_line_wins(parser, root, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"adapters: {root / 'adapters'}\nport: 8123\nmax-loras: 2\n")
    args, _, contents, _ = resolve(parser, "--config", config, "--max-loras", 5)
    assert (args.port, args.max_loras, contents.source.url) == (8123, 5, str(root / "adapters"))


def test_what_is_left_open_is_chosen_and_printed(parser, root, capsys):
    args, options, *_ = resolve(parser, "--adapters", root / "adapters")
    assert args.enable_lora
    assert args.host == "127.0.0.1"
    assert (args.max_loras, args.max_lora_rank) == (8, 32), "whatever lies in the directory"
    assert args.max_cpu_loras == 1 << 16, "bounded in bytes instead"
    assert args.worker_extension_cls == "vllm_qaa.worker.AdapterRPC"
    assert 0 < args.kv_cache_memory_bytes <= 4 << 30
    assert 0 < options.adapter_cache_bytes <= 8 << 30
    printed = capsys.readouterr().err
    assert "--max-lora-rank 32" in printed
    assert "--host 127.0.0.1" in printed
    assert f"--adapter-cache-bytes {options.adapter_cache_bytes}" in printed


def test_a_server_whose_model_is_given_reads_no_adapter_before_it_starts(parser, root, monkeypatch):
    monkeypatch.setattr(settings, "read_config", lambda directory: pytest.fail("it was read"))
    monkeypatch.setattr(Contents, "check_now", lambda *_: pytest.fail("it was checked"))
    args, *_ = resolve(parser, root / "base", "--adapters", root / "adapters")
    assert args.model == str(root / "base")


def test_the_user_overrides_every_choice(parser, root, capsys):
    args, options, *_ = resolve(
        parser, "--adapters", root / "adapters", "--host", "127.0.0.2", "--max-loras", 2, "--max-lora-rank", 64,
        "--max-cpu-loras", 9, "--served-model-name", "mine", "--kv-cache-memory-bytes", "64M",
        "--adapter-cache-bytes", "1k",
    )  # fmt: skip
    assert (args.host, args.max_loras, args.max_lora_rank, args.max_cpu_loras) == ("127.0.0.2", 2, 64, 9)
    assert args.served_model_name == ["mine"]
    assert options.adapter_cache_bytes == 1000
    assert "Chosen here" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve"),
        (["--adapters", "{root}/nowhere"], "is not a directory"),
        (["--adapters", "{root}/adapters/one"], "is itself an adapter"),
        (["--adapters", "{root}/base"], "give the MODEL to serve"),
        (["--adapters", "{root}/adapters", "--no-enable-lora"], "leave it out"),
        (["--adapters", "{root}/adapters", "--api-server-count", "2"], "one API server"),
        (["--adapters", "{root}/adapters", "--data-parallel-size", "2"], "one API server"),
        (["--adapters", "{root}/adapters", "--headless"], "one API server"),
        (["--adapters", "{root}/adapters", "--qaa-backend", "cuquantum"], "cannot run here"),
        (
            [
                "--adapters",
                "{root}/adapters",
                "--otlp-traces-endpoint",
                "http://127.0.0.1:1",
                "--disable-log-stats",
            ],
            "leave out --disable-log-stats",
        ),
        (["--adapters", "{root}/adapters", "--lora-modules", "a={root}/adapters/one"], "put the adapters"),
        (["--adapters", "{root}/adapters", "--enable-sleep-mode"], "take vLLM 0.33"),
        (["--adapters", "{root}/adapters", "--worker-extension-cls", "a.B"], "needs its own"),
        (["--adapters", "{root}/adapters", "--state-dir", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_command_lines_that_are_refused(parser, root, arguments, message):
    with pytest.raises(settings.UsageError, match=message):
        resolve(parser, *(argument.format(root=root) for argument in arguments))


def test_a_command_line_that_is_refused_holds_no_state_directory(parser, root, tmp_path):
    refused = ("--adapters", root / "adapters", "--state-dir", tmp_path, "--no-enable-lora")
    errors = []  # kept with their tracebacks, so that nothing is closed by the garbage collector alone
    for _ in range(2):
        with pytest.raises(settings.UsageError, match="leave it out") as caught:
            resolve(parser, *refused)
        errors.append(caught)


@pytest.mark.parametrize("variable", ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SKIP_MODEL_NAME_VALIDATION"])
@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_what_would_let_vllm_past_the_gate_is_refused(parser, root, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(settings.UsageError, match=f"{variable}: .*unset it"):
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


def holds_secret(args):
    """Whether anything that vLLM gets or prints has one of the keys here in it."""
    return "hush" in repr(vars(args)) or any("hush" in value for value in os.environ.values())


def test_secrets_leave_the_arguments_and_the_environment_and_are_never_printed(
    parser, root, tmp_path, monkeypatch, capfd
):
    (tmp_path / "clients").write_text("hush-1\nhush-2 one  # only\n")
    (tmp_path / "admins").write_text("ops: hush-3\n")
    monkeypatch.setenv("VLLM_API_KEY", "hush-4")
    monkeypatch.setenv("QAA_SERVE_ADMIN_KEY", "hush-5")
    args, options, _, keys = resolve(
        parser, root / "base", "--adapters", root / "adapters", "--api-key", "hush-6", "hush-7",
        "--admin-key", "hush-8", "hush-9",
        "--api-key-file", tmp_path / "clients", "--admin-key-file", tmp_path / "admins",
    )  # fmt: skip
    assert not holds_secret(args)
    assert (args.api_key, args.admin_key) == (None, [])
    for name in SECRETS:
        assert name not in os.environ
    shown = capfd.readouterr()
    assert "hush" not in shown.out + shown.err + repr(options) + repr(keys) + repr(vars(keys))
    assert keys.admin("hush-3").name == "ops"
    clients = {f"hush-{n}" for n in range(1, 10) if keys.client(f"hush-{n}")}
    admins = {f"hush-{n}" for n in range(1, 10) if keys.admin(f"hush-{n}")}
    # As with vLLM, its variable counts only where no --api-key is given.
    assert clients == {"hush-1", "hush-2", "hush-6", "hush-7"}
    assert admins == {"hush-3", "hush-5", "hush-8", "hush-9"}
    assert keys.client("hush-1").models is None
    assert keys.client("hush-2").models == ("one",)


def test_keys_of_the_environment(parser, root, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hush-4")
    monkeypatch.setenv("QAA_SERVE_ADMIN_KEY", "hush-5")
    args, _, _, keys = resolve(parser, root / "base")
    assert not holds_secret(args)
    assert keys.client("hush-4") is not None
    assert keys.admin("hush-5") is not None
    assert keys.admin("hush-4") is None
    assert keys.client("hush-5") is None


def test_keys_of_a_config_file(parser, root, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {root / 'base'}\napi-key: [hush-1, hush-2]\nadmin-key: [hush-3]\n")
    args, _, _, keys = resolve(parser, "--config", config)
    assert not holds_secret(args)
    assert keys.client("hush-2") is not None
    assert keys.admin("hush-3") is not None
    shown = capfd.readouterr()
    assert "hush" not in shown.out + shown.err


@pytest.mark.parametrize("option", ["--api-key", "--admin-key"])
def test_an_empty_key_is_none(parser, root, option, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "")
    _, options, _, keys = resolve(parser, root / "base", option, "")
    assert not keys.guards_clients
    assert options.made_admin_key is not None
    assert keys.client("") is None
    assert keys.admin("") is None


def test_without_an_admin_key_one_is_made_at_each_start_and_written_for_its_owner(parser, root, capfd):
    made = set()
    for _ in range(2):
        args, options, contents, keys = resolve(parser, root / "base")
        assert options.made_admin_key == contents.state.directory / "admin.key"
        assert stat.S_IMODE(options.made_admin_key.stat().st_mode) == 0o600
        key = first_key(options.made_admin_key)
        assert keys.admin(key).name == "made-at-start"
        assert keys.client(key) is None
        shown = capfd.readouterr()
        assert key not in shown.out + shown.err + repr(vars(args)) + repr(options)
        made.add(key)
    assert len(made) == 2
    assert all(len(key) >= 32 for key in made)


@pytest.mark.parametrize("how", ["option", "file", "environment"])
def test_with_an_admin_key_none_is_made(parser, root, tmp_path, monkeypatch, how):
    (tmp_path / "admins").write_text("hush-1\n")
    given = {"option": ["--admin-key", "hush-1"], "file": ["--admin-key-file", tmp_path / "admins"]}.get(how, [])
    if how == "environment":
        monkeypatch.setenv("QAA_SERVE_ADMIN_KEY", "hush-1")
    _, options, contents, keys = resolve(parser, root / "base", *given)
    assert options.made_admin_key is None
    assert not (contents.state.directory / "admin.key").exists()
    assert keys.admin("hush-1") is not None


@pytest.mark.parametrize("option", ["--api-key-file", "--admin-key-file"])
@pytest.mark.parametrize("content", [None, "", "# hush\n", "hush\xff\n"])
def test_key_files_that_cannot_be_used_are_refused_without_a_key(parser, root, tmp_path, option, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(settings.UsageError) as caught:
        resolve(parser, root / "base", option, file)
    assert str(file) in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_key_file_counts_for_the_warning_of_a_wide_bind(parser, root, tmp_path, capsys):
    (tmp_path / "keys").write_text("hush\n")
    resolve(parser, root / "base", "--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    assert "without an API key" not in capsys.readouterr().err
    resolve(parser, root / "base", "--host", "0.0.0.0", "--admin-key-file", tmp_path / "keys")
    assert "without an API key" in capsys.readouterr().err


def test_each_server_has_a_state_directory_of_its_own_and_finds_it_again(parser, root, cache, tmp_path):
    (tmp_path / "others").mkdir()
    relative = os.path.relpath(root / "adapters")
    servers = {
        "one": ("--adapters", root / "adapters"),
        "its port": ("--adapters", root / "adapters", "--port", 8123),
        "a socket": ("--adapters", root / "adapters", "--uds", "/tmp/x.sock"),
        "other adapters": ("--adapters", tmp_path / "others"),
        "no adapters": (),
    }
    places = {}
    for name, arguments in servers.items():
        _, _, contents, _ = resolve(parser, root / "base", *arguments)
        assert contents.state.directory.parent == cache
        places[name] = contents.state.directory
    assert len(set(places.values())) == len(servers)
    _, _, again, _ = resolve(parser, root / "base", "--adapters", relative, "--host", "0.0.0.0", "--max-loras", 3)
    assert again.state.directory == places["one"]


def test_the_state_directory_may_be_given(parser, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, contents, _ = resolve(parser, root / "base", "--state-dir", "state/here", "--state-bytes", "3M")
    assert contents.state.directory == tmp_path / "state" / "here"
    assert contents.state.max_bytes == 3 << 20
    assert contents._base is not None, "QAA adapters are checked against the base model"


def test_a_state_directory_in_use_by_another_server_is_refused(parser, root, tmp_path):
    *_, contents, _ = resolve(parser, root / "base", "--state-dir", tmp_path, keep_open=True)
    try:
        with pytest.raises(settings.UsageError, match=r"--state-dir .* is in use by another server"):
            resolve(parser, root / "base", "--state-dir", tmp_path)
    finally:
        contents.close()
    resolve(parser, root / "base", "--state-dir", tmp_path)


SIZES = {
    "--state-bytes": "max_bytes",
    "--adapter-cache-bytes": "adapter_cache_bytes",
    "--max-adapter-bytes": "max_adapter_bytes",
    "--max-body-bytes": "max_body_bytes",
    "--max-held-bytes": "max_held_bytes",
}


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("64Mi", 64 << 20), ("64m", 64_000_000), ("1.5g", 1_500_000_000), ("16Gi", 16 << 30),
     ("4096", 4096), ("2Ki", 2048), ("1T", 1 << 40)],
)  # fmt: skip
def test_sizes_may_have_units(parser, root, text, size):
    given = [part for option in SIZES for part in (option, text)]
    _, options, contents, _ = resolve(parser, root / "base", *given)
    for name in SIZES.values():
        assert getattr(contents.state if name == "max_bytes" else options, name) == size
    assert contents._max_bytes == size


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *((option, text) for option in SIZES for text in ("-1", "-64M", "64X", "4i", "", "1.5G", "nan")),
        ("--keep-revisions", "-1"), ("--adapter-max-running", "-1"), ("--adapter-max-queue", "-1"),
        ("--adapter-max-queue", "many"), ("--drain-timeout", "-1"), ("--drain-timeout", "nan"),
        ("--adapter-loaders", "0"), ("--adapter-loaders", "-1"), ("--adapter-load-timeout", "-1"),
        ("--drain-timeout", "inf"), ("--adapters-quiet", "-0.5"), ("--adapters-quiet", "soon"),
        ("--max-queue-wait", "-1"), ("--body-timeout", "nan"), ("--engine-stall-timeout", "-1"),
        ("--max-connections", "-1"), ("--metrics-max-keys", "-1"), ("--log-format", "xml"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(parser, root, capsys, option, text):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([str(root / "base"), f"{option}={text}"])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def test_our_other_options_arrive(parser, root):
    _, options, _, _ = resolve(
        parser, root / "base", "--adapters", root / "adapters", "--adapters-quiet", "0.25",
        "--adapters-check", "lazy", "--keep-revisions", 0, "--adapter-max-running", 3, "--adapter-max-queue", 0,
        "--drain-timeout", 0,
        "--adapter-loaders", 2, "--adapter-load-timeout", 0.5,
    )  # fmt: skip
    assert (options.adapter_loaders, options.adapter_load_timeout_s) == (2, 0.5)
    assert (options.adapters_quiet_s, options.adapters_check, options.keep_revisions) == (0.25, "lazy", 0)
    assert (options.adapter_max_running, options.adapter_max_queue, options.drain_timeout_s) == (3, 0, 0)
    _, options, _, _ = resolve(
        parser, root / "base", "--max-queue-wait", 1, "--body-timeout", 2, "--max-connections", 3,
        "--engine-stall-timeout", 4, "--metrics-max-adapters", 5, "--metrics-max-keys", 6,
        "--admin-listen", "unix:/run/x", "--audit-log", "/var/log/x", "--log-format", "text",
    )  # fmt: skip
    assert (options.max_queue_wait_s, options.body_timeout_s, options.max_connections) == (1, 2, 3)
    assert (options.engine_stall_timeout_s, options.metrics_max_adapters, options.metrics_max_keys) == (4, 5, 6)
    assert (options.admin_listen, str(options.audit_log), options.log_format) == (
        "unix:/run/x", "/var/log/x", "text",
    )  # fmt: skip


def test_what_is_said_of_circuits_reaches_the_workers(parser, root):
    args, *_ = resolve(parser, root / "base", "--qaa-max-layers", 3, "--additional-config", '{"other": 1}')
    assert args.additional_config == {"other": 1, BACKEND_KEY: "auto", MOST_LAYERS_KEY: 3}
    args, *_ = resolve(parser, root / "base")
    assert args.additional_config == {BACKEND_KEY: "auto"}, "how many there are by default is the worker's"
    assert MOST_LAYERS == 8, "and the help's"


def test_log_lines_are_json_if_asked_for(parser, root):
    args, options, _, _ = resolve(parser, root / "base", "--log-format", "json")
    assert options.log_format == "json"
    assert args.logging_config.formatter == "json"


def test_the_backends_that_can_be_chosen_are_those_there_are():
    assert set(CIRCUIT_BACKENDS) == {name for name, backend in BACKENDS.items() if backend.circuits}


def test_our_defaults_are_what_the_help_says(parser, root):
    _, options, contents, _ = resolve(parser, root / "base")
    assert (options.adapters_quiet_s, options.adapters_check, options.keep_revisions) == (1, "background", 2)
    assert (options.adapter_max_running, options.adapter_max_queue, options.drain_timeout_s) == (0, 1000, 30)
    assert (options.adapter_loaders, options.adapter_load_timeout_s) == (4, 60)
    assert (options.max_body_bytes, options.max_adapter_bytes, contents.state.max_bytes) == (
        32 << 20,
        1 << 30,
        16 << 30,
    )
    assert (options.max_held_bytes, options.body_timeout_s, options.max_queue_wait_s) == (256 << 20, 60, 600)
    assert (options.max_connections, options.engine_stall_timeout_s, options.log_format) == (4096, 60, "text")
    assert (options.metrics_max_adapters, options.metrics_max_keys) == (200, 100)
    assert (options.admin_listen, options.audit_log) == (None, None)


def test_a_wrong_command_line_is_one_line_and_status_2(root):
    result = subprocess.run(
        [str(BIN / "qaa-serve"), "--adapters", str(root / "nowhere")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "qaa-serve: --adapters" in result.stderr
    assert "does not exist" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_explains_itself_without_importing_vllm(option):
    code = f"import sys; from qaa_serve.cli import main; main(['{option}']); assert 'vllm' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.1.0" in result.stdout
