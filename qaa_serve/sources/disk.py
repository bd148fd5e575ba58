"""What changing a directory safely takes: locks, durable names, an exchange in one step, errors that help."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qaa_serve.sources.base import ReadOnlyError, SourceError

#: How often a lock that somebody else holds is tried, in seconds.
_POLL_S = 0.02

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Turn an OSError into the error of a source.

    Args:
        where: what is being changed, for the message.

    Raises:
        ReadOnlyError: if it may not be written.
        SourceError: for whatever else went wrong.
    """
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ReadOnlyError(
                f"{where} cannot be written by this server ({found}): change it where it is kept, or let the "
                "server's user write there"
            ) from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SourceError(
            f"{where} cannot be changed now ({found}): "
            + ("free some space there" if full else "look at its file system, then try again")
        ) from error


@contextmanager
def locked(file: Path, wait_s: float, what: str) -> Iterator[None]:
    """Hold a lock against all threads and processes, and on NFS 4 all machines.

    Args:
        file: made if it does not exist; it stays.
        wait_s: how long to wait for others, in seconds.
        what: what is locked, for the message.

    Raises:
        SourceError: if somebody else holds it for longer.
        OSError: if it cannot be locked at all.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SourceError(
                        f"{what} is being changed by somebody else in this moment: try again"
                    ) from None
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor too
    finally:
        os.close(descriptor)


def sync(*paths: Path) -> None:
    """Have the disk hold what was written to files, or the names in directories."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Have each of two names lead to what the other leads to, in one step.

    Returns:
        False if the system or the file system cannot do that, as NFS and old kernels; nothing happened then.

    Raises:
        OSError: if it failed otherwise.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
