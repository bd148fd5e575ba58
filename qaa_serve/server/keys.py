"""Who may do what: client keys, admin keys, and the adapters that a client key is for."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from logging import Logger
from pathlib import Path
from typing import Any

#: What a key may be called. The two that it may not are labels in the metrics.
_NAME = re.compile(r"(?!(?:other|unknown)$)[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")

#: What a header can carry, whatever the client.
_SECRET = re.compile(r"[!-~]+")

#: How often the files of keys are looked at, in seconds.
_LOOK_EVERY_S = 1.0


class KeyFileError(ValueError):
    """A file of keys cannot be used; the message says why and never holds a key."""


@dataclass(frozen=True)
class Key:
    """One key, known by its hash alone.

    Attributes:
        digest: SHA-256 of the key.
        name: what logs and metrics call it.
        models: patterns of the names it may use, as a shell writes them; None allows all.
    """

    digest: bytes
    name: str
    models: tuple[str, ...] | None = None

    def allows(self, model: str) -> bool:
        """Whether the key may use a model, under its public name or as name@revision."""
        name = model.partition("@")[0]
        return self.models is None or any(fnmatchcase(name, pattern) for pattern in self.models)


def make_key(key: str, name: str | None = None, models: Iterable[str] | None = None) -> Key:
    """A key as a ring knows it.

    Args:
        key: the secret.
        name: None names it after its hash.
        models: patterns of the names it may use; None allows all.
    """
    digest = _digest(key)
    return Key(digest, name or f"key-{digest.hex()[:8]}", None if models is None else tuple(models))


class KeyRing:
    """Client keys and admin keys. A key is looked up by its hash, whose bits say nothing of the key's."""

    def __init__(self, clients: Iterable[Key] = (), admins: Iterable[Key] = ()):
        self.replace(clients, admins)

    def replace(self, clients: Iterable[Key], admins: Iterable[Key]) -> None:
        """Have these keys from now on."""
        self._clients: Mapping[bytes, Key] = {key.digest: key for key in clients}
        self._admins: Mapping[bytes, Key] = {key.digest: key for key in admins}

    @property
    def guards_clients(self) -> bool:
        """Whether clients need a key."""
        return bool(self._clients)

    @property
    def has_several_clients(self) -> bool:
        """Whether there is more than one client to be fair to."""
        return len(self._clients) > 1

    def client(self, key: str | None) -> Key | None:
        """The client that a key belongs to."""
        return self._clients.get(_digest(key or ""))

    def admin(self, key: str | None) -> Key | None:
        """The admin that a key belongs to."""
        return self._admins.get(_digest(key or ""))


@dataclass(frozen=True)
class KeySources:
    """Where keys come from.

    Attributes:
        client_file: --api-key-file.
        admin_file: --admin-key-file, or the one that the server wrote.
        clients: given otherwise, on the command line or by the environment.
        admins: likewise.
    """

    client_file: Path | None = None
    admin_file: Path | None = None
    clients: tuple[Key, ...] = ()
    admins: tuple[Key, ...] = ()

    def read(self) -> tuple[list[Key], list[Key]]:
        """All client keys and all admin keys.

        Raises:
            KeyFileError: if a file cannot be read or holds no key.
        """
        clients = [] if self.client_file is None else read_client_keys(self.client_file)
        admins = [] if self.admin_file is None else read_admin_keys(self.admin_file)
        return [*clients, *self.clients], [*admins, *self.admins]

    async def follow(self, ring: KeyRing, logger: Logger) -> None:
        """Read the files again whenever they change; keys stay as they were while one cannot be used."""
        files = [file for file in (self.client_file, self.admin_file) if file is not None]
        seen = None  # they may have changed since the ring was made
        while files:
            now = await asyncio.to_thread(_signatures, files)
            if now != seen:
                seen = now
                try:
                    clients, admins = await asyncio.to_thread(self.read)
                except KeyFileError as error:
                    logger.error("The keys stay as they were: %s", error)
                else:
                    ring.replace(clients, admins)
                    logger.info("Keys: %d of clients, %d of admins", len(clients), len(admins))
            await asyncio.sleep(_LOOK_EVERY_S)


def read_client_keys(path: Path) -> list[Key]:
    """Read a file of clients' keys: `NAME: KEY [MODEL...]` or `KEY [MODEL...]` a line; # begins a comment.

    The colon tells a name from a key: without it, `a b` could be a key and its model or a name and its key, and a
    guess could make a model's name a key.

    Raises:
        KeyFileError: if the file cannot be read, holds no key or one twice, or two keys have one name.
    """
    return _read(path, models=True)


def read_admin_keys(path: Path) -> list[Key]:
    """Read a file of admins' keys: `NAME: KEY` or `KEY` a line; # begins a comment.

    Raises:
        KeyFileError: as `read_client_keys`, and if more follows a key.
    """
    return _read(path, models=False)


def first_key(path: Path) -> str:
    """The first key in a file of admins' keys, to be sent.

    Raises:
        KeyFileError: as `read_admin_keys`.
    """
    return next(_entries(path))[1]


def _read(path: Path, *, models: bool) -> list[Key]:
    keys = []
    for name, secret, *patterns in _entries(path):
        if patterns and not models:
            raise KeyFileError(f"{path}: one admin key a line, and nothing after it")
        keys.append(make_key(secret, name, patterns or None))
    if len({key.digest for key in keys}) < len(keys):
        raise KeyFileError(f"{path}: one key is there twice; a key has one line, with all models it is for")
    name, count = Counter(key.name for key in keys).most_common(1)[0]
    if count > 1:
        raise KeyFileError(f"{path}: {count} keys have the name {name!r}; give each its own")
    return keys


def _entries(path: Path) -> Iterator[tuple[Any, ...]]:
    """(name or None, key, pattern...) of each line; at least one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} cannot be read: {error.__class__.__name__}") from error

    def not_comment(field: str) -> bool:
        return not field.startswith("#")

    found = False
    for number, line in enumerate(text.splitlines(), 1):
        fields = list(takewhile(not_comment, line.split()))
        if not fields:
            continue
        name = fields.pop(0)[:-1] if fields[0].endswith(":") else None
        if not fields or (name is not None and not _NAME.fullmatch(name)):
            raise KeyFileError(
                f"{path}, line {number}: write NAME: KEY or KEY alone; a name has letters, digits, '.', '_', '-' "
                "and '@', at most 128, and is neither `other` nor `unknown`"
            )
        if not _SECRET.fullmatch(fields[0]):
            raise KeyFileError(
                f"{path}, line {number}: a key goes into a header, so it has ASCII letters, digits and marks alone"
            )
        found = True
        yield name, *fields
    if not found:
        raise KeyFileError(f"{path} holds no key: write one a line")


def write_key(path: Path, key: str) -> None:
    """Write a key into a file that its owner alone can read, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{key}\n")
    beside.replace(path)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _signatures(files: list[Path]) -> list[tuple[int, ...] | None]:
    return [_signature(file) for file in files]


def _signature(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
