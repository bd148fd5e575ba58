"""Finding adapters in a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qaa_serve.adapters import CONFIG_FILE, AdapterError
from qaa_serve.registry.revisions import Revision, read_revision


@dataclass(frozen=True)
class Rejection:
    """An adapter directory that cannot be served, and why."""

    name: str
    path: Path
    reason: str


def scan(directory: Path) -> tuple[list[Revision], list[Rejection]]:
    """Read every adapter directory in a directory, in the order of their names.

    Hidden directories and those that hold neither an adapter config nor weights are passed over.

    Raises:
        AdapterError: if ``directory`` is not a directory, or is itself an adapter.
    """
    if not directory.is_dir():
        raise AdapterError(f"--adapters {directory} is not a directory")
    if (directory / CONFIG_FILE).is_file():
        raise AdapterError(
            f"--adapters {directory} is itself an adapter; give the directory that holds adapter directories"
        )
    revisions: list[Revision] = []
    rejections: list[Rejection] = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if not (path / CONFIG_FILE).exists() and not any(path.glob("adapter_model.*")):
            continue
        try:
            revisions.append(read_revision(path))
        except AdapterError as error:
            rejections.append(Rejection(path.name, path, str(error)))
    return revisions, rejections
