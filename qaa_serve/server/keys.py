"""Who may do what: client keys, admin keys, and the adapters that a client key is for."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path


class KeyFileError(ValueError):
    """A file of keys cannot be used; the message says why and never holds a key."""


@dataclass(frozen=True)
class ClientKey:
    """One client's key, known by its hash alone.

    Attributes:
        digest: SHA-256 of the key.
        models: patterns of the names it may use, as a shell writes them; None allows all.
    """

    digest: bytes
    models: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """What it is called in metrics; says nothing of the key that helps to guess it."""
        return self.digest.hex()[:8]

    def allows(self, model: str) -> bool:
        """Whether the key may use a model, under its public name or as name@revision."""
        name = model.partition("@")[0]
        return self.models is None or any(fnmatchcase(name, pattern) for pattern in self.models)


class KeyRing:
    """Client keys and admin keys."""

    def __init__(self, clients: Iterable[ClientKey] = (), admins: Iterable[str] = ()):
        self._clients = tuple(clients)
        self._admins = tuple(_digest(key) for key in admins)

    @property
    def guards_clients(self) -> bool:
        """Whether clients need a key."""
        return bool(self._clients)

    @property
    def guards_admins(self) -> bool:
        """Whether there is an admin key; without one, admin requests are taken from this machine only."""
        return bool(self._admins)

    def client(self, key: str | None) -> ClientKey | None:
        """The client that a key belongs to. Every key is compared, so that the time says nothing."""
        digest, found = _digest(key or ""), None
        for client in self._clients:
            if hmac.compare_digest(client.digest, digest):
                found = client
        return found

    def is_admin(self, key: str | None) -> bool:
        """Whether a key is an admin's."""
        digest = _digest(key or "")
        matches = [hmac.compare_digest(admin, digest) for admin in self._admins]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def client_key(key: str, models: Iterable[str] | None = None) -> ClientKey:
    """A client's key, and the patterns of the names it may use (None: all)."""
    return ClientKey(_digest(key), None if models is None else tuple(models))


def read_client_keys(path: Path) -> list[ClientKey]:
    """Read a file with a key a line, and after it the names it may use, if not all; # begins a comment.

    Raises:
        KeyFileError: if the file cannot be read or holds no key.
    """
    return [client_key(key, models or None) for key, *models in _lines(path)]


def read_admin_keys(path: Path) -> list[str]:
    """Read a file with a key a line; # begins a comment.

    Raises:
        KeyFileError: if the file cannot be read, holds no key, or has more than a key in a line.
    """
    lines = _lines(path)
    if any(len(line) > 1 for line in lines):
        raise KeyFileError(f"{path}: one admin key a line, and nothing after it")
    return [line[0] for line in lines]


def _lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} cannot be read: {error.__class__.__name__}") from error

    def not_comment(field: str) -> bool:
        return not field.startswith("#")

    lines = [fields for line in text.splitlines() if (fields := list(takewhile(not_comment, line.split())))]
    if not lines:
        raise KeyFileError(f"{path} holds no key: write one a line")
    return lines
