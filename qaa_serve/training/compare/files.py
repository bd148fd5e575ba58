"""The report's directory: whose it is, one comparison at a time, files that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaa_serve.training.errors import TrainingError

#: Marks a directory as a report of ours.
MARKER = "compare.json"


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is whole as soon as it is there."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it is there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file's value; None if it is not there or not whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextmanager
def owned(directory: Path) -> Iterator[int]:
    """Make a directory ours, or take up one that is, for as long as the context lasts.

    Yields:
        A descriptor that holds the lock. A child that inherits it keeps the lock if this process is killed, so
        that nobody trains into the same place beside it.

    Raises:
        TrainingError: if it cannot be written, has somebody else's files, or is in use.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / MARKER).is_file():
            raise TrainingError(
                f"output {directory} has files and is no comparison's (it has no {MARKER}): "
                "choose another --output"
            )
        write_json(directory / MARKER, {"format": 1, "what": "a report of qaa-serve compare, and its runs"})
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TrainingError(f"output {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TrainingError(
            f"output {directory} is in use by another comparison, or a training that one left running"
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def model_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a model directory's own files, in hex."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in {".md", ".png"}:
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
