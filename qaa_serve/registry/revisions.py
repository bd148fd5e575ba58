"""Revisions: one content of one adapter each, and what it is called inside the engine."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qaa_serve.adapters import (
    DIGEST_PATTERN,
    MAX_ADAPTER_BYTES,
    WEIGHTS_FILE,
    AdapterError,
    Kind,
    LinearWidths,
    judge,
    only_refusals,
    resolve_base,
    shown,
)

#: Names that adapters may be served under. "@" separates a name from a revision's digest.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_REFERENCE = re.compile(rf"{NAME_PATTERN.pattern}(@{DIGEST_PATTERN.pattern})?")

#: Names that the metrics have a meaning of their own for: of what has no series of its own, and of no model.
RESERVED_NAMES = frozenset({"other", "unknown"})


class Ids:
    """Integer ids of revisions in the engine: counted, so no two revisions ever have one.

    The first are vLLM's own (its warm-up uses 1, 2, ...), and its GPU model runner keeps ids as int32. An id is
    kept for the life of the process, in some 300 bytes: a revision that comes back has the same one. Any thread
    may ask.
    """

    def __init__(self, first: int = 1 << 16, limit: int = 1 << 31):
        self._ids: dict[str, int] = {}
        self._free = iter(range(first, limit))

    def of(self, engine_name: str) -> int:
        """The id of the revision with this name in the engine.

        Raises:
            OverflowError: if there is none left.
        """
        int_id = self._ids.get(engine_name)
        if int_id is None:
            if (free := next(self._free, None)) is None:
                raise OverflowError("no integer id is left for another adapter: start the server anew")
            int_id = self._ids.setdefault(engine_name, free)  # of two threads that came at once, both have one
        return int_id


_ids = Ids()


@dataclass(frozen=True)
class Revision:
    """One content of one adapter.

    vLLM keys its prefix cache by an adapter's name and path, compares requests by name and weights by id: so a
    revision has all three of its own, and a new content under an old name can never meet the old one's cache.

    Two are equal if name and digest are: the base depends on where the content was read, too.

    Attributes:
        name: the public name.
        digest: SHA-256 of the adapter's two files, in hex.
        path: the directory that is served: within the store, a private copy that never changes.
        kind: QAA or LORA.
        rank: columns of B (heads * qubits for QAA).
        nbytes: size of adapter_model.safetensors.
        base: the base model it names, as a path if that exists, else as written.
        details: for people: the ansatz, layers, ... or r and alpha.
    """

    name: str
    digest: str
    path: Path = field(compare=False)
    kind: Literal["QAA", "LORA"] = field(compare=False)
    rank: int = field(compare=False)
    nbytes: int = field(compare=False)
    base: str = field(compare=False)
    details: dict[str, Any] = field(compare=False)

    @property
    def short_digest(self) -> str:
        """The first 12 hex digits of the digest, which clients know the revision by."""
        return self.digest[:12]

    @property
    def revision(self) -> str:
        """`name@<first 12 hex of the digest>`, as clients and logs call it."""
        return f"{self.name}@{self.short_digest}"

    @property
    def engine_name(self) -> str:
        """`name@<digest>`, the adapter's name inside the engine, which no other content has."""
        return f"{self.name}@{self.digest}"

    @property
    def int_id(self) -> int:
        """The adapter's integer id inside the engine; this process's own, other servers have others."""
        return _ids.of(self.engine_name)


@dataclass(frozen=True)
class Rejection:
    """A content that cannot be served, and why.

    Attributes:
        name: the adapter's.
        reason: what is wrong, what was found, what to do.
        kind: what it was refused for, as AdapterError has it.
        since: Unix time.
    """

    name: str
    reason: str
    kind: Kind = "invalid"
    since: float = field(default_factory=time.time, compare=False)


class NameRefusedError(AdapterError):
    """No adapter may be served under this name."""

    kind = "name"


def public_form(engine_name: str) -> str:
    """What clients know a revision by, from its name inside the engine."""
    name, at, digest = engine_name.rpartition("@")
    return name + at + digest[:12]


def check_name(name: str) -> None:
    """Raise NameRefusedError unless an adapter may be served under this name."""
    if not NAME_PATTERN.fullmatch(name):
        raise NameRefusedError(
            f"{name!r} cannot be an adapter's name: letters, digits, '.', '_' and '-', at most 128, the first a "
            "letter or digit. Choose another"
        )
    if name in RESERVED_NAMES:
        raise NameRefusedError(
            f"{name!r} cannot be an adapter's name: in the metrics it stands for requests of others. Choose "
            "another"
        )


def check_reference(reference: object) -> None:
    """Raise NameRefusedError unless this is NAME or NAME@REVISION, with 12 to 64 hex digits."""
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise NameRefusedError(
            f"{shown(reference)} is neither an adapter's name nor NAME@REVISION with 12 to 64 hex digits"
        )


@only_refusals("the adapter")
def read_revision(
    directory: Path,
    name: str | None = None,
    *,
    base: LinearWidths | None = None,
    max_bytes: int = MAX_ADAPTER_BYTES,
) -> Revision:
    """Validate an adapter directory, QAA or LoRA, as far as is possible without an engine.

    Args:
        directory: the adapter.
        name: the name to serve it under; None takes the directory's.
        base: the base model's linear layers, which an adapter must fit; None leaves that to the engine.
        max_bytes: of the weights: a larger file is refused before it is read.

    Raises:
        AdapterError: if it cannot be served, and for whatever goes wrong while it is read.
    """
    name = directory.name if name is None else name
    check_name(name)
    found = judge(directory, base=base, max_bytes=max_bytes)
    return Revision(
        name=name,
        digest=found.digest,
        path=directory.resolve(),
        kind=found.kind,
        rank=found.rank,
        nbytes=(directory / WEIGHTS_FILE).stat().st_size,
        base=resolve_base(directory, found.base),
        details=found.details,
    )
