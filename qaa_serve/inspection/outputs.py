"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qaa_serve.inspection.errors import InspectionError


def check_writable(path: Path) -> None:
    """Say early what would fail late.

    Raises:
        InspectionError: if ``path`` cannot become a file.
    """
    if path.exists() and not path.is_file():
        raise InspectionError(f"{path} exists and is no regular file; choose another output")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise InspectionError(f"{path} cannot be written: there is no directory {parent}; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InspectionError(f"{path} cannot be written: no permission to write into {parent}")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the place, then rename: readers see the old file or the new one. A link is followed.

    Raises:
        InspectionError: if it cannot be written; what was there stays.
    """
    check_writable(path)
    path = path.resolve()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise InspectionError(f"{path} cannot be written: {error.strerror or error}") from error
        raise
