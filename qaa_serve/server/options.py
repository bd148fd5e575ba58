"""The options of `qaa-serve serve`, which can be explained without vLLM or torch."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USAGE = "qaa-serve [serve] [MODEL] --adapters SOURCE [options]"

DESCRIPTION = """\
Serve a base model and every QAA or LoRA adapter of a source with an OpenAI-compatible API. A request's "model" is
an adapter's name there, or the base model's name. What is in the source is what is served, also when it changes
while the server runs; docs/hot-swap.md tells how.

  qaa-serve --adapters my-adapters/                      base model as the adapters name it
  qaa-serve meta-llama/Llama-3.2-1B --adapters dir/      base model by name or path
  qaa-serve MODEL --adapters s3://bucket/prefix          adapters of an object store; replicas follow it too

All options of vllm serve can be given too; --help=all lists them. What you leave open of --adapter-cache-bytes,
--host, --served-model-name, --max-loras and --max-lora-rank is chosen, and printed."""

#: What can run circuits (qaa_serve.circuits.BACKENDS), named here since that imports torch.
CIRCUIT_BACKENDS = ("cuquantum", "triton", "cpu", "torch")

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class ServingOptions:
    """Our own options; sizes are in bytes.

    Attributes:
        adapters_quiet_s: how long an adapter must not change before it is read.
        adapters_check: when adapters that nobody has asked for are checked.
        adapter_repos: patterns of repositories on the hub that adapters may be taken from.
        adapter_cache_bytes: host memory in the engine for adapters.
        adapter_loaders: adapters that are loaded at once.
        adapter_load_timeout_s: how long the engine may take to load one; 0: for ever.
        keep_revisions: former revisions of each name to keep.
        max_adapter_bytes: of one adapter's weights.
        adapter_max_running: requests of one model in the engine at once; 0: as many as the engine runs.
        adapter_max_queue: further requests of one model that wait.
        max_queue_wait_s: the longest that a request waits for its turn.
        max_body_bytes: of a request.
        max_held_bytes: of all bodies that arrive or wait for their turn.
        body_timeout_s: for a body to arrive.
        max_connections: open at once.
        drain_timeout_s: how long running requests have after a signal.
        engine_stall_timeout_s: how long an idle engine may leave a question unanswered; 0: for ever.
        metrics_max_adapters: adapters with labels of their own in the metrics.
        metrics_max_keys: clients' keys with labels of their own.
        log_format: text, or json with a line for every request.
        admin_listen: where the admin routes are, and then nowhere else: HOST:PORT or unix:PATH.
        audit_log: a file for a line a change.
        made_admin_key: a file with the admin key that was made here, since none was given.
    """

    adapters_quiet_s: float
    adapters_check: str
    adapter_repos: tuple[str, ...]
    adapter_cache_bytes: int
    adapter_loaders: int
    adapter_load_timeout_s: float
    keep_revisions: int
    max_adapter_bytes: int
    adapter_max_running: int
    adapter_max_queue: int
    max_queue_wait_s: float
    max_body_bytes: int
    max_held_bytes: int
    body_timeout_s: float
    max_connections: int
    drain_timeout_s: float
    engine_stall_timeout_s: float
    metrics_max_adapters: int
    metrics_max_keys: int
    log_format: str
    admin_listen: str | None
    audit_log: Path | None
    made_admin_key: Path | None


def print_help() -> None:
    """Explain our options; vLLM's own help takes long to come."""
    parser = argparse.ArgumentParser(
        prog="qaa-serve serve",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="vLLM's options are listed by --help=all, one group by --help=GROUP, one option by --help=NAME.",
    )
    add_options(parser)
    parser.print_help()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our options of `qaa-serve serve`."""
    group = parser.add_argument_group("qaa-serve: adapters")
    group.add_argument(
        "--adapters",
        metavar="SOURCE",
        help="where adapters are: a directory, or an object store's s3://BUCKET/PREFIX (gs://, az:// with their "
        "packages). Each is served under the name of its directory there, and changes are followed. Uploads go "
        "there too (default: a directory below ~/.local/share/qaa-serve, by port)",
    )
    group.add_argument(
        "--adapters-poll",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="how often an object store is listed, and a directory besides what its events tell (default: 10)",
    )
    group.add_argument(
        "--adapters-check",
        choices=("start", "background", "lazy"),
        default="background",
        help="when adapters are read and checked that no request has named yet: before the server starts, while "
        "it runs, or never (default: background)",
    )
    group.add_argument(
        "--adapter-repos",
        metavar="PATTERN",
        nargs="+",
        default=[],
        help="repositories of the Hugging Face hub, as a shell writes patterns (my-org/*), that an admin may take "
        "adapters from with hf://ORG/REPO@REVISION (default: none)",
    )
    group.add_argument(
        "--adapters-quiet",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="how long an adapter must not change before it is read; one that is renamed into place is read at "
        "once (default: 1)",
    )
    group.add_argument(
        "--strict-adapters",
        action="store_true",
        help="check all adapters before the server starts, and end if one is invalid",
    )
    group.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        help="a cache of checked copies; without it a start reads all anew, and nothing else is lost "
        "(default: below ~/.cache/qaa-serve, by source and port)",
    )
    size: dict[str, Any] = {"metavar": "SIZE", "type": _size}
    group.add_argument(
        "--state-bytes",
        **size,
        default=16 * GIB,
        help="most that the copies may take; the least recently used go (default: 16Gi)",
    )
    group.add_argument(
        "--keep-revisions",
        metavar="N",
        type=_count,
        default=2,
        help="former revisions of each adapter to keep in the source, for NAME@REVISION and for rolling back "
        "(default: 2)",
    )
    group.add_argument(
        "--adapter-cache-bytes",
        **size,
        default=None,
        help="memory of the engine for adapters; what is not in use makes room, and is loaded again before the "
        "next request for it (default: a quarter of the free memory, at most 8Gi)",
    )
    group.add_argument(
        "--adapter-loaders",
        metavar="N",
        type=_at_least_one,
        default=4,
        help="adapters that are loaded into the engine at once, or copied and checked at once (default: 4)",
    )
    group.add_argument(
        "--adapter-load-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long the engine may take to load an adapter before the requests for it are answered 503; "
        "0: for ever (default: 60)",
    )
    group.add_argument(
        "--max-adapter-bytes", **size, default=GIB, help="largest weights file that is taken (default: 1Gi)"
    )
    group.add_argument(
        "--qaa-backend",
        choices=("auto", *CIRCUIT_BACKENDS),
        default="auto",
        help="what runs the circuits; auto takes on a GPU the faster one of triton and cuquantum, timed on the "
        "model's layers, on a CPU the compiled one; without these torch; the log says which (default: auto)",
    )
    group.add_argument(
        "--qaa-max-layers",
        metavar="N",
        type=_at_least_one,
        help="with triton: layers of gates that the circuits of a module may have, in all its heads; room for "
        "them is made in advance, in each of the --max-loras slots (default: 8)",
    )
    group = parser.add_argument_group("qaa-serve: rights and limits")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help="file with a client's key a line: `NAME: KEY [MODEL...]` or `KEY [MODEL...]`, the models it may use "
        "as a shell writes patterns; read again when it changes (also: --api-key, VLLM_API_KEY)",
    )
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        nargs="+",
        default=[],
        help="keys for the admin API; others on this machine see a command line, so rather use --admin-key-file "
        "or QAA_SERVE_ADMIN_KEY. Without any, one is made at each start and written to STATE/admin.key, where "
        "`qaa-serve adapters` finds it",
    )
    group.add_argument(
        "--admin-key-file",
        metavar="FILE",
        type=Path,
        help="file with an admin's key a line, `NAME: KEY` or `KEY`; read again when it changes",
    )
    group.add_argument(
        "--admin-listen",
        metavar="ADDRESS",
        help="HOST:PORT or unix:PATH for the admin routes, which are then found nowhere else",
    )
    group.add_argument(
        "--audit-log",
        metavar="FILE",
        type=Path,
        help="file to which a JSON line is added for every change of what is served (default: the log alone)",
    )
    group.add_argument(
        "--adapter-max-running",
        metavar="N",
        type=_count,
        default=0,
        help="sequences (prompts x n) of one model in the engine at once (default: as many as the engine runs, "
        "--max-num-seqs)",
    )
    group.add_argument(
        "--adapter-max-queue",
        metavar="N",
        type=_count,
        default=1000,
        help="further sequences of one model that may wait; more are answered 429 (default: 1000)",
    )
    group.add_argument(
        "--max-queue-wait",
        metavar="SECONDS",
        type=_seconds,
        default=600.0,
        help="the longest that a request waits for its turn before it is answered 503 (default: 600)",
    )
    group.add_argument(
        "--max-body-bytes", **size, default=32 * MIB, help="largest body of a request (default: 32Mi)"
    )
    group.add_argument(
        "--max-held-bytes",
        **size,
        default=256 * MIB,
        help="most that the bodies of requests that arrive or wait may take together (default: 256Mi)",
    )
    group.add_argument(
        "--body-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long a request's body may take to arrive, and an upload to go on (default: 60)",
    )
    group.add_argument(
        "--max-connections",
        metavar="N",
        type=_count,
        default=4096,
        help="connections open at once (default: 4096)",
    )
    group.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=30.0,
        help="how long running requests have to end after SIGTERM; new ones are answered 503 (default: 30)",
    )
    group.add_argument(
        "--engine-stall-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long the engine may answer nothing while its workers do nothing: then /ready says 503 and the "
        "server ends with status 1; ten times as long if they do something; 0: for ever (default: 60)",
    )
    group.add_argument(
        "--metrics-max-adapters",
        metavar="N",
        type=_count,
        default=200,
        help="adapters with labels of their own in the metrics, the busiest; the rest are `other` (default: 200)",
    )
    group.add_argument(
        "--metrics-max-keys",
        metavar="N",
        type=_count,
        default=100,
        help="clients' keys with labels of their own in the metrics, by name; the rest are `other` (default: 100)",
    )
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: a JSON object a line, and one for every request with its adapter, revision, tokens and times",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _at_least_one(text: str) -> int:
    if not (number := _count(text)):
        raise argparse.ArgumentTypeError("at least one is needed")
    return number


def _size(text: str) -> int:
    from vllm.utils.argparse_utils import human_readable_int

    number: int = human_readable_int(re.sub("(?<=[KMGT])i$", "", text))
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return number
