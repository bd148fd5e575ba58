"""How a program on this machine finds a server that runs here, and the admin key that it made."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


def cache_root() -> Path:
    """Where qaa-serve keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qaa-serve"


def data_root() -> Path:
    """Where qaa-serve keeps what users store and have named no place for."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "qaa-serve"


@dataclass(frozen=True)
class RunningServer:
    """A server on this machine.

    Attributes:
        url: where clients find it: http://HOST:PORT or unix:PATH.
        admin_url: where the admin routes are.
        admin_key_file: a file that holds an admin key; None if keys were given in another way.
        pid: its process.
    """

    url: str
    admin_url: str
    admin_key_file: str | None
    pid: int

    def write(self) -> Path:
        """Note it for others; returns the file, which its owner alone can read.

        Raises:
            OSError: if it cannot be written.
        """
        path = _path(self.url)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_suffix(f".{self.pid}")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)
        beside.replace(path)
        return path


def find_server(url: str) -> RunningServer | None:
    """The server that answers at a URL, if one on this machine has noted so."""
    return _read(_path(url))


def list_servers() -> list[RunningServer]:
    """All servers that run on this machine and have noted so."""
    return [server for path in sorted(_directory().glob("*.json")) if (server := _read(path)) is not None]


def _read(path: Path) -> RunningServer | None:
    with suppress(OSError, ValueError, TypeError):
        server = RunningServer(**json.loads(path.read_text()))
        # One that was killed leaves its file; what answers there now may be anybody's, and must not get its key.
        return server if psutil.pid_exists(server.pid) else None
    return None


def _directory() -> Path:
    return cache_root() / "servers"


def _path(url: str) -> Path:
    """By port where the server is on this machine, whatever its host is called here."""
    url = url.rstrip("/")
    host, _, port = url.rpartition("://")[2].rpartition(":")
    here = host.strip("[]") in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
    name = port if here and port.isdigit() else hashlib.sha256(url.encode()).hexdigest()[:16]
    return _directory() / f"{name}.json"
