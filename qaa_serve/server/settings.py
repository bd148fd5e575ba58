"""From the command line to vLLM's arguments: what is left open is chosen here, and said."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import Rejection, Revision, scan

DESCRIPTION = """\
Serve a base model and every QAA or LoRA adapter directory in DIR with an OpenAI-compatible API. A request's
"model" is an adapter's directory name, or the base model's name.

  qaa-serve --adapters my-adapters/                      base model as the adapters name it
  qaa-serve meta-llama/Llama-3.2-1B --adapters dir/      base model by name or path

All options of vllm serve can be given too; --help=all lists them. What you leave open of --enable-lora,
--max-loras, --max-lora-rank, --max-cpu-loras, --host and --served-model-name is chosen to fit, and printed."""

#: Options of vLLM that are chosen here unless the user gives them.
_CHOSEN = (
    "model",
    "host",
    "max_loras",
    "max_lora_rank",
    "max_cpu_loras",
    "served_model_name",
    "kv_cache_memory_bytes",
)

_GIB = 1 << 30
_console = Console(stderr=True, highlight=False, soft_wrap=True)


class UsageError(ValueError):
    """The command line cannot be carried out; the message says why and what to do."""


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
    # Engine and workers end with the server, however it ends (vllm_qaa.register).
    os.environ["QAA_SERVE"] = "1"


def _names_no_hub(arguments: Sequence[str]) -> bool:
    """Whether nothing on the command line can name a repository of the Hugging Face hub."""
    options = ("--model", "--tokenizer", "--speculative", "--config", "--hf-config", "--revision")
    model_is_local = not arguments or arguments[0].startswith("-") or Path(arguments[0]).is_dir()
    return model_is_local and not any(argument.startswith(options) for argument in arguments)


def make_parser() -> argparse.ArgumentParser:
    """vLLM's own parser with our options added."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="qaa-serve",
        usage="qaa-serve [serve] [MODEL] --adapters DIR [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("qaa-serve")
    group.add_argument(
        "--adapters",
        metavar="DIR",
        type=Path,
        help="directory whose sub-directories are adapters; each is served under its directory's name",
    )
    make_arg_parser(parser)
    parser.set_defaults(**dict.fromkeys(_CHOSEN), enable_lora=True)
    return parser


def resolve(args: argparse.Namespace) -> tuple[list[Revision], list[Rejection]]:
    """Fill in what the user left open, in place.

    Returns:
        the adapters that can be served so far, and the rejected ones.

    Raises:
        UsageError: if the arguments make no sense together.
    """
    try:
        revisions, rejections = ([], []) if args.adapters is None else scan(args.adapters)
    except AdapterError as error:
        raise UsageError(str(error)) from error
    if args.data_parallel_size > 1 or (args.api_server_count or 1) > 1 or args.headless:
        raise UsageError(
            "qaa-serve runs one API server and one engine: leave out --data-parallel-size, --api-server-count and "
            "--headless, and start several servers behind a load balancer instead"
        )
    if args.lora_modules:
        raise UsageError("--lora-modules: put the adapters' directories into --adapters DIR instead")
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise UsageError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING: vLLM's own routes would change weights under running requests and "
            "under old names in its caches; unset it"
        )
    args.model = args.model_tag or args.model or _base_of(revisions, args.adapters)
    chosen: dict[str, tuple[Any, str]] = {}

    def choose(option: str, value: Any, why: str) -> None:
        if getattr(args, option) is None:
            setattr(args, option, value)
            chosen[option] = (value, why)

    local = Path(args.model).is_dir()
    choose("host", "127.0.0.1", "this machine only; --host 0.0.0.0 opens it")
    if local:
        path = str(Path(args.model).resolve())
        choose("served_model_name", [Path(path).name, args.model], "the base model's directory, and its path")
    count = len(revisions)
    choose("max_loras", min(max(count, 1), 16), f"slots in one batch, for {count} adapters")
    choose("max_lora_rank", _rank_class(revisions), "the largest rank of an adapter, rounded up")
    choose(
        "max_cpu_loras",
        max(2 * count, 64, args.max_loras),
        "adapters kept in memory, so that none is read from disk in a request",
    )
    if args.max_cpu_loras < count:
        raise UsageError(
            f"--max-cpu-loras {args.max_cpu_loras} is less than the {count} adapters: one that is pushed out of "
            "memory would be read from disk inside the engine's step"
        )
    _choose_cpu_memory(args, choose)
    if not args.enable_lora:
        raise UsageError("--no-enable-lora leaves nothing to serve adapters with: leave it out")
    _print_choices(args.model, chosen)
    _warn_if_open(args)
    return revisions, rejections


def _base_of(revisions: Sequence[Revision], directory: Path | None) -> str:
    """The one local base model that the adapters name."""
    if directory is None:
        raise UsageError("nothing to serve: give a MODEL, or --adapters DIR whose adapters name a local base")
    bases = sorted({revision.base for revision in revisions})
    local = [base for base in bases if Path(base).is_dir()]
    if len(local) == 1:
        return local[0]
    found = ", ".join(map(repr, bases)) or "no valid adapter"
    raise UsageError(
        f"give the MODEL to serve: the adapters in {directory} do not name one local base model (found {found})"
    )


def _rank_class(revisions: Sequence[Revision]) -> int:
    from vllm.config.lora import MaxLoRARanks

    needed = max([16, *(revision.rank for revision in revisions)])
    allowed: tuple[int, ...] = get_args(MaxLoRARanks)
    return next((rank for rank in allowed if rank >= needed), allowed[-1])


def _choose_cpu_memory(args: argparse.Namespace, choose: Callable[[str, Any, str], None]) -> None:
    """On a CPU vLLM would take nearly all memory for the KV cache."""
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return
    size = min(psutil.virtual_memory().available // 4, 4 * _GIB)
    choose("kv_cache_memory_bytes", size, "KV cache on a CPU: a quarter of the free memory, at most 4 GiB")


def _print_choices(model: str, chosen: dict[str, tuple[Any, str]]) -> None:
    _console.print(f"Base model: {model}")
    if chosen:
        _console.print("Chosen here (give an option to override it):")
    for option, (value, why) in chosen.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        _console.print(f"  --{option.replace('_', '-')} {text}  [dim]({why})[/dim]")


def _warn_if_open(args: argparse.Namespace) -> None:
    has_key = bool(args.api_key or os.environ.get("VLLM_API_KEY"))
    if args.uds or has_key or _is_loopback(args.host):
        return
    _console.print(
        f"[yellow]Warning:[/yellow] listening on {args.host} without an API key: whoever reaches this port can "
        "use the server. Give --api-key KEY, or --host 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
