"""What is wrong with a command line that can be seen at once, before anything that takes seconds is imported.

Only what would end the command anyway is looked at here. What cannot be told for sure passes, and whoever uses it
finds out.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"

#: Files of rows; a name without one may be a data set's on the hub.
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")

#: What a name on the Hugging Face hub looks like.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

#: The longest that the hub may take to be reached, in seconds.
_HUB_WAIT_S = 1.5


class UsageError(ValueError):
    """The command line cannot be carried out; the message says why and what to do."""


def check_serve(arguments: Sequence[str]) -> None:
    """Check the arguments of `qaa-serve serve` as far as that takes no time.

    Raises:
        UsageError: saying what was found and what to do.
    """
    if _value(arguments, "--config") is not None:  # it may say anything
        return
    adapters = _value(arguments, "--adapters")
    if adapters is not None and "://" not in adapters:
        check_adapters_directory(Path(adapters))
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if (model := first or _value(arguments, "--model")) is not None:
        check_model(model)
    if _value(arguments, "--uds") is None:
        _check_port(_value(arguments, "--host") or "127.0.0.1", _value(arguments, "--port") or "8000")


def check_train(arguments: Sequence[str]) -> None:
    """Check the arguments of `qaa-serve train` or `compare` as far as that takes no time.

    Raises:
        UsageError: saying what was found and what to do.
    """
    if _value(arguments, "--config") is not None:
        return
    if (model := _value(arguments, "--model")) is not None:
        check_model(model)
    for option in ("--data", "--eval-data"):
        data = _value(arguments, option)
        is_file = data is not None and (_is_path(data) or data.endswith(_DATA_SUFFIXES))
        if is_file and not Path(str(data)).exists():
            raise UsageError(f"{option} {data}: there is no such file")


def check_adapters_directory(directory: Path) -> None:
    """Raise UsageError unless ``directory`` is one, and not an adapter itself."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UsageError(f"--adapters {directory} {what}: give the directory that holds adapter directories")
    if (directory / _ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"--adapters {directory} is itself an adapter; give the directory that holds adapter directories"
        )


def check_model(model: str) -> None:
    """Raise UsageError for a base model that is neither here nor to be had."""
    path = Path(model)
    if path.is_file():
        with path.open("rb") as file:
            gguf = file.read(4) == b"GGUF"
        if not gguf:
            raise UsageError(f"{model} is a file; a model is a directory with {_CONFIG}, weights and tokenizer")
        raise UsageError(
            f"{model} is a GGUF file, which is not served as it is. Convert it once with transformers and the "
            f"package gguf: AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, "
            f"gguf_file={path.name!r}), the same for AutoTokenizer, and save_pretrained() both to one place"
        )
    if path.is_dir():
        if not any((path / name).is_file() for name in (_CONFIG, "params.json")):
            raise UsageError(f"{model} holds no {_CONFIG}, so it is no model; give the directory that does")
        return
    if "://" in model:
        return
    if _is_path(model):
        raise UsageError(f"there is no directory {model}: give the base model's directory, or its name on the hub")
    if _HUB_NAME.fullmatch(model) and not os.environ.get("VLLM_USE_MODELSCOPE"):
        _check_hub(model)


def _check_hub(name: str) -> None:
    """Raise UsageError if a name can be neither in the hub's cache nor fetched."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if (cache / f"models--{name.replace('/', '--')}").is_dir():
        return
    here = (
        f"there is no directory {name} here, and no model of that name in the Hugging Face hub's cache ({cache})"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise UsageError(f"{here}; HF_HUB_OFFLINE keeps it from being fetched: give the model's directory")
    if any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), _HUB_WAIT_S).close()
    except OSError as error:
        raise UsageError(
            f"{here}; the hub cannot be reached ({hub.hostname}: {error}): give the model's directory"
        ) from error


def _check_port(host: str, port: str) -> None:
    """Raise UsageError if somebody listens there; for other troubles the server has better words."""
    if not port.isdigit():
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} of {host} is taken: end what listens there, or give another --port"
                ) from error


def _is_path(text: str) -> bool:
    """Whether a text can only be a path: it begins like one, or has more parts than a name on the hub."""
    return text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or text in (".", "..")


def _value(arguments: Sequence[str], option: str) -> str | None:
    """The last value that an option is given; None if it is not."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value
