"""From the command line to vLLM's arguments: what is left open is chosen here, and said."""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from rich.console import Console
from rich.progress import track

from qaa_serve.adapters import SERVED_RANK, AdapterError, LinearWidths, linear_widths, read_config, resolve_base
from qaa_serve.circuits import choose_backend
from qaa_serve.preflight import UsageError
from qaa_serve.registry import Contents, Index, State, StoreError, base_fingerprint, check_name
from qaa_serve.server.keys import KeyFileError, KeySources, make_key, write_key
from qaa_serve.server.options import DESCRIPTION, GIB, USAGE, ServingOptions, add_options
from qaa_serve.server.runfile import cache_root, data_root
from qaa_serve.sources import HISTORY, DirectoryHistory, DirectorySource, Source, open_source

#: Adapters in one batch, unless the user says so. They cost memory in every adapted layer, as SERVED_RANK does, so
#: neither depends on what happens to lie in the directory; what exceeds the rank is refused by name.
_MAX_LORAS = 8

#: How many adapters are asked which base model they are for.
_BASES_READ = 50

#: Options of vLLM that are chosen here unless the user gives them.
_CHOSEN = (
    "model",
    "host",
    "max_loras",
    "max_lora_rank",
    "max_cpu_loras",
    "adapter_cache_bytes",
    "served_model_name",
    "kv_cache_memory_bytes",
)

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def prepare_environment(arguments: Sequence[str]) -> None:
    """Keep the server to itself: no usage statistics, no look-up of an outside address, no hub for local models.

    Variables that the user has set stay as they are. Must be called before vLLM is imported.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not any("parallel" in argument or "master" in argument for argument in arguments):
        # vLLM finds its own address by way of a public one; a single process needs none but this.
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if _names_no_hub(arguments):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # vLLM's processes are ended without ceremony, and what Python then frees for them is no fault.
    filters = os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
    # Engine and workers end with the server, however it ends (vllm_qaa.register).
    os.environ["QAA_SERVE"] = "1"


def _names_no_hub(arguments: Sequence[str]) -> bool:
    """Whether nothing on the command line can name a repository of the Hugging Face hub."""
    options = (
        "--model",
        "--tokenizer",
        "--speculative",
        "--config",
        "--hf-config",
        "--revision",
        "--adapter-repos",
    )
    model_is_local = not arguments or arguments[0].startswith("-") or Path(arguments[0]).is_dir()
    return model_is_local and not any(argument.startswith(options) for argument in arguments)


def make_parser() -> argparse.ArgumentParser:
    """vLLM's own parser with our options added."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_qaa import port

    parser = FlexibleArgumentParser(
        prog="qaa-serve",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    port.moved("make_arg_parser")(parser)
    parser.set_defaults(**dict.fromkeys(_CHOSEN), enable_lora=True)
    return parser


def resolve(args: argparse.Namespace) -> tuple[ServingOptions, Contents, KeySources]:
    """Fill in what the user left open, in place, and take our options and every secret out of it.

    Returns:
        our options, where adapters come from, and where the keys do.

    Raises:
        UsageError: if the arguments make no sense together.
    """
    keys = _take_keys(args)
    source = _open_source(args)
    if args.audit_log is not None:
        try:
            args.audit_log.open("a").close()
        except OSError as error:
            raise UsageError(f"--audit-log {args.audit_log} cannot be written ({error.strerror})") from error
    if args.log_format == "json":
        from vllm.config.logging import LoggingConfig

        given = getattr(args, "logging_config", None) or LoggingConfig()
        args.logging_config = replace(given, formatter="json")
    _choose(args, source)
    contents = _open_contents(args, source)
    made_admin_key = None
    try:
        if args.strict_adapters or args.adapters_check == "start":
            _check_all(contents, args)
        if not keys.read()[1]:
            made_admin_key, keys = _make_admin_key(contents.state.directory, keys)
    except BaseException:
        contents.close()
        raise
    options = ServingOptions(
        adapters_quiet_s=args.adapters_quiet,
        adapters_check=args.adapters_check,
        adapter_repos=tuple(args.adapter_repos),
        adapter_cache_bytes=args.adapter_cache_bytes,
        adapter_loaders=args.adapter_loaders,
        adapter_load_timeout_s=args.adapter_load_timeout,
        keep_revisions=args.keep_revisions,
        max_adapter_bytes=args.max_adapter_bytes,
        adapter_max_running=args.adapter_max_running,
        adapter_max_queue=args.adapter_max_queue,
        max_queue_wait_s=args.max_queue_wait,
        max_body_bytes=args.max_body_bytes,
        max_held_bytes=args.max_held_bytes,
        body_timeout_s=args.body_timeout,
        max_connections=args.max_connections,
        drain_timeout_s=args.drain_timeout,
        engine_stall_timeout_s=args.engine_stall_timeout,
        metrics_max_adapters=args.metrics_max_adapters,
        metrics_max_keys=args.metrics_max_keys,
        log_format=args.log_format,
        admin_listen=args.admin_listen,
        audit_log=args.audit_log,
        made_admin_key=made_admin_key,
    )
    return options, contents, keys


def _open_source(args: argparse.Namespace) -> Source:
    """Where adapters are; a directory of the server's own, unless one is given."""
    try:
        if args.adapters is not None:
            return open_source(args.adapters, poll_s=args.adapters_poll)
        directory = data_root() / f"adapters-{args.uds.strip('/').replace('/', '-') if args.uds else args.port}"
        directory.mkdir(parents=True, exist_ok=True)
        return open_source(str(directory), poll_s=args.adapters_poll)
    except AdapterError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"uploads have no place: {error}; give --adapters DIR") from error


def _open_contents(args: argparse.Namespace, source: Source) -> Contents:
    base = _widths(args)
    directory = _state_directory(args, source)
    if (directory / "state.json").exists():
        _console.print(
            f"[yellow]Warning:[/yellow] {directory} is of an earlier version, which kept uploads there, and not "
            f"served: `qaa-serve adapters move-state {directory} {source.url}` moves them; then delete state.json"
        )
    try:
        state = State(directory, max_bytes=args.state_bytes)
    except StoreError as error:
        raise UsageError(str(error)) from error
    return Contents(
        source,
        state,
        Index(state.directory / "index.sqlite", base_fingerprint(base, args.max_adapter_bytes)),
        DirectoryHistory(state.directory / HISTORY),
        base=base,
        max_bytes=args.max_adapter_bytes,
        loaders=args.adapter_loaders,
        timeout_s=args.adapter_load_timeout,
        logger=getLogger("vllm.qaa_serve"),  # vLLM's handlers hang on the name "vllm"
    )


def _check_all(contents: Contents, args: argparse.Namespace) -> None:
    """Check every adapter before anything that takes memory is started.

    Raises:
        UsageError: under --strict-adapters, if one cannot be served.
    """
    try:
        adapters = contents.source.list().adapters
    except AdapterError as error:
        raise UsageError(str(error)) from error

    def problem_of(name: str) -> str | None:
        try:
            check_name(name)
            contents.check_now(name, adapters[name])
        except AdapterError as error:
            return f"{name}: {error}"
        return None

    with ThreadPoolExecutor(args.adapter_loaders, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        checked = track(
            readers.map(problem_of, sorted(adapters)), "Checking adapters", len(adapters), console=_console,
            transient=True, disable=not _console.is_terminal,
        )  # fmt: skip
        problems = [problem for problem in checked if problem is not None]
    if args.strict_adapters and problems:
        raise UsageError(f"--strict-adapters, and {len(problems)} cannot be served: {'; '.join(problems[:20])}")


def _take_keys(args: argparse.Namespace) -> KeySources:
    """The keys, taken out of the arguments: vLLM prints those, and would guard fewer routes than the gate."""
    clients = [*(args.api_key or [os.environ.get("VLLM_API_KEY", "")])]
    admins = [*args.admin_key, os.environ.pop("QAA_SERVE_ADMIN_KEY", "")]
    os.environ.pop("VLLM_API_KEY", None)
    args.api_key, args.admin_key = None, []
    sources = KeySources(
        args.api_key_file,
        args.admin_key_file,
        tuple(make_key(key) for key in clients if key),
        tuple(make_key(key) for key in admins if key),
    )
    try:
        args.clients_need_a_key = bool(sources.read()[0])
    except KeyFileError as error:
        raise UsageError(str(error)) from error
    return sources


def _make_admin_key(state: Path, sources: KeySources) -> tuple[Path, KeySources]:
    """An admin key for this start, in a file that its owner alone can read."""
    path, key = state / "admin.key", secrets.token_urlsafe(32)
    try:
        write_key(path, key)
    except OSError as error:
        raise UsageError(f"the admin key cannot be written to {path} ({error.strerror})") from error
    return path, replace(sources, admins=(make_key(key, "made-at-start"),))


def _state_directory(args: argparse.Namespace, source: Source) -> Path:
    if args.state_dir is not None:
        given: Path = args.state_dir.resolve()
        return given
    # A server of its own has a directory of its own, and finds it again.
    served = f"{source.url}:{args.uds or args.port}"
    return (cache_root() / hashlib.sha256(served.encode()).hexdigest()[:12]).resolve()


def _widths(args: argparse.Namespace) -> LinearWidths | None:
    try:
        return linear_widths(args.model, trust_remote_code=args.trust_remote_code)
    except AdapterError as error:
        _console.print(f"[yellow]Warning:[/yellow] adapters are checked by the engine only: {error}")
        return None


def _choose(args: argparse.Namespace, source: Source) -> None:
    """Fill in what the user left open, in place; the source's adapters may name the base model.

    Raises:
        UsageError: if the arguments make no sense together.
    """
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version
    from vllm_qaa import port
    from vllm_qaa.backend import BACKEND_KEY, MOST_LAYERS_KEY

    from qaa_serve.server.engine import WORKER_EXTENSION

    try:
        choose_backend(args.qaa_backend, torch.device(current_platform.device_type))
    except ValueError as error:
        raise UsageError(f"--qaa-backend {args.qaa_backend}: {error}") from error
    args.additional_config = {**(args.additional_config or {}), BACKEND_KEY: args.qaa_backend}
    if args.qaa_max_layers is not None:
        args.additional_config[MOST_LAYERS_KEY] = args.qaa_max_layers
    if args.data_parallel_size > 1 or (args.api_server_count or 1) > 1 or args.headless:
        raise UsageError(
            "qaa-serve runs one API server and one engine: leave out --data-parallel-size, --api-server-count and "
            "--headless, and start several servers behind a load balancer instead"
        )
    if args.lora_modules:
        raise UsageError("--lora-modules: put the adapters' directories into --adapters DIR instead")
    if getattr(args, "default_mm_loras", None):
        raise UsageError(
            "--default-mm-loras: qaa-serve serves adapters by the name that a request asks for; leave it out"
        )
    if args.enable_sleep_mode and Version(vllm_version) < port.SLOTS_SLEEP:
        raise UsageError(
            f"--enable-sleep-mode: a sleep of level 2 throws away what vLLM {vllm_version} has in the slots of "
            f"adapters, and they would answer wrongly afterwards; leave it out, or take vLLM {port.SLOTS_SLEEP}"
        )
    if args.otlp_traces_endpoint and args.disable_log_stats:
        raise UsageError("--otlp-traces-endpoint: vLLM's spans need statistics, so leave out --disable-log-stats")
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise UsageError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING: vLLM's own routes would change weights under running requests and "
            "under old names in its caches; unset it"
        )
    if os.environ.get("VLLM_SKIP_MODEL_NAME_VALIDATION", "0").strip().lower() in ("1", "true"):
        raise UsageError(
            "VLLM_SKIP_MODEL_NAME_VALIDATION: vLLM would answer for the base model under any name, past the "
            "models that a key is for; unset it"
        )
    args.model = args.model_tag or args.model or _base_of(source, args.adapters)
    chosen: dict[str, tuple[Any, str]] = {}

    def choose(option: str, value: Any, why: str) -> None:
        if getattr(args, option) is None:
            setattr(args, option, value)
            chosen[option] = (value, why)

    local = Path(args.model).is_dir()
    choose("host", "127.0.0.1", "this machine only; --host 0.0.0.0 opens it")
    if local:
        path = str(Path(args.model).resolve())
        choose("served_model_name", [Path(path).name], "the base model's directory")
    choose("max_loras", _MAX_LORAS, "adapters in one batch")
    choose("max_lora_rank", SERVED_RANK, "the largest rank of an adapter that is taken; vLLM's limit is 512")
    if args.max_cpu_loras is None:
        args.max_cpu_loras = 1 << 16  # their memory is bounded in bytes instead
    _choose_memory(args, choose)
    if args.worker_extension_cls not in ("", None, WORKER_EXTENSION):
        raise UsageError("--worker-extension-cls: qaa-serve needs its own; leave it out")
    args.worker_extension_cls = WORKER_EXTENSION
    if not args.enable_lora:
        raise UsageError("--no-enable-lora leaves nothing to serve adapters with: leave it out")
    _print_choices(args.model, chosen)
    _warn_if_open(args)


def _base_of(source: Source, given: str | None) -> str:
    """The one local base model that adapters of a directory name.

    Raises:
        UsageError: if there is none, or more than one.
    """
    if given is None:
        raise UsageError("nothing to serve: give a MODEL, or --adapters DIR whose adapters name a local base")
    if not isinstance(source, DirectorySource):
        raise UsageError(f"give the MODEL to serve: adapters of {given} cannot name a directory of this machine")
    bases = set()
    for name in sorted(source.list().adapters)[:_BASES_READ]:
        with suppress(AdapterError):
            named = read_config(source.root / name).get("base_model_name_or_path")
            if isinstance(named, str) and named:
                bases.add(resolve_base(source.root / name, named))
    local = [base for base in bases if os.path.isdir(base)]  # which never raises, whatever the name
    if len(local) == 1:
        return local[0]
    found = ", ".join(map(repr, sorted(bases))) or "no valid adapter"
    raise UsageError(
        f"give the MODEL to serve: the adapters in {given} do not name one local base model (found {found})"
    )


def _choose_memory(args: argparse.Namespace, choose: Callable[[str, Any, str], None]) -> None:
    """Memory for adapters; and on a CPU, for the KV cache, where vLLM would take nearly all there is."""
    from vllm.platforms import current_platform
    from vllm_qaa.memory import host_free

    free = host_free()
    size = min(free // 4, 8 * GIB)
    choose("adapter_cache_bytes", size, "adapters in memory: a quarter of what is free, at most 8 GiB")
    if not current_platform.is_cpu() or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return
    size = min(free // 4, 4 * GIB)
    choose("kv_cache_memory_bytes", size, "KV cache on a CPU: a quarter of the free memory, at most 4 GiB")


def _print_choices(model: str, chosen: dict[str, tuple[Any, str]]) -> None:
    _console.print(f"Base model: {model}")
    if chosen:
        _console.print("Chosen here (give an option to override it):")
    for option, (value, why) in chosen.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        _console.print(f"  --{option.replace('_', '-')} {text}  [dim]({why})[/dim]")


def _is_loopback(host: str) -> bool:
    """Whether a host's name or address stands for this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warn_if_open(args: argparse.Namespace) -> None:
    if args.uds or args.clients_need_a_key or _is_loopback(args.host):
        return
    _console.print(
        f"[yellow]Warning:[/yellow] listening on {args.host} without an API key: whoever reaches this port can "
        "use the server. Give --api-key-file FILE, or --host 127.0.0.1"
    )
