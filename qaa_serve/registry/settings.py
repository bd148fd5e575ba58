"""What goes with a source's adapters: which of them are pinned, and names that stand for others."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qaa_serve.adapters import AdapterError, shown
from qaa_serve.registry.revisions import check_name, check_reference

_VERSION = 1


class SettingsError(AdapterError):
    """The pins and aliases of a source are not what they should be."""


@dataclass(frozen=True)
class Alias:
    """A name that stands for an adapter, for one of its revisions, or for several by their shares.

    Attributes:
        shares: of each target, NAME or NAME@REVISION, relative to their sum.
    """

    shares: Mapping[str, int]

    def choose(self, who: str | None = None) -> str:
        """A target by the shares: the same one for the same `who`, as long as the shares are the same."""
        total = sum(self.shares.values())
        if who is None:
            point = random.randrange(total)
        else:
            point = int.from_bytes(hashlib.sha256(who.encode("utf-8", "replace")).digest()[:8]) % total
        for target, share in self.shares.items():
            point -= share
            if point < 0:
                return target
        raise AssertionError("shares are positive")

    @classmethod
    def parse(cls, to: object) -> Alias:
        """Read what a client or the source says.

        Raises:
            SettingsError: if it is neither a target nor targets with whole shares.
        """
        shares = {to: 1} if isinstance(to, str) else to
        if not isinstance(shares, dict) or not 0 < len(shares) <= 100:
            raise SettingsError(
                f'an alias leads to "NAME", "NAME@REVISION" or {{"NAME": SHARE, ...}}, not to {shown(to)}'
            )
        for target, share in shares.items():
            check_reference(target)
            if type(share) is not int or not 0 <= share <= 1_000_000:
                raise SettingsError(
                    f"the share of {target!r} is {shown(share)}: give a whole number from 0 to 1000000"
                )
        if not sum(shares.values()):
            raise SettingsError("all shares are 0: give one that is not")
        return cls({target: share for target, share in sorted(shares.items()) if share})


@dataclass(frozen=True)
class SourceSettings:
    """Pins and aliases, as they lie in the source.

    Attributes:
        pinned: NAME (whatever it stands for) or NAME@REVISION; these stay in every server's memory.
        aliases: by name.
    """

    pinned: frozenset[str] = frozenset()
    aliases: Mapping[str, Alias] = field(default_factory=dict)

    @cached_property
    def _pins(self) -> Mapping[str, frozenset[str]]:
        pins: dict[str, frozenset[str]] = {}
        for name, _, digest in (reference.partition("@") for reference in self.pinned):
            pins[name] = pins.get(name, frozenset()) | {digest}
        return pins

    def pins(self, name: str) -> frozenset[str]:
        """What is pinned of a name: beginnings of digests, and "" for whatever it stands for."""
        return self._pins.get(name, frozenset())

    def protected(self, name: str) -> frozenset[str]:
        """Digests of a name, or the beginnings of them, that somebody relies on."""
        targets = (target for alias in self.aliases.values() for target in alias.shares)
        parts = (reference.partition("@") for reference in (*self.pinned, *targets))
        return frozenset(digest for of, _, digest in parts if of == name and digest)

    def users(self, name: str) -> list[str]:
        """Aliases that lead to a name."""
        return [
            alias
            for alias, to in self.aliases.items()
            if any(target.partition("@")[0] == name for target in to.shares)
        ]

    def with_pin(self, reference: str, pinned: bool) -> SourceSettings:
        """The same with one pin more or less."""
        return replace(self, pinned=self.pinned | {reference} if pinned else self.pinned - {reference})

    def with_alias(self, name: str, alias: Alias | None) -> SourceSettings:
        """The same with an alias set, or without it."""
        rest = {other: to for other, to in self.aliases.items() if other != name}
        return replace(self, aliases=rest if alias is None else {**rest, name: alias})

    def encode(self) -> bytes:
        """As the file holds it."""
        aliases = {name: {"to": dict(alias.shares)} for name, alias in sorted(self.aliases.items())}
        content = {"version": _VERSION, "pinned": sorted(self.pinned), "aliases": aliases}
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes) -> SourceSettings:
        """Read the file.

        Raises:
            SettingsError: if it is not what `encode` writes, or of a newer version.
        """
        if not content:
            return cls()
        try:
            raw: Any = json.loads(content)
            if raw["version"] != _VERSION:
                raise SettingsError(
                    f"version {shown(raw['version'])} is not known here; this server reads {_VERSION}"
                )
            for name in raw["aliases"]:
                check_name(name)
            for reference in raw["pinned"]:
                check_reference(reference)
            return cls(
                frozenset(raw["pinned"]), {name: Alias.parse(to["to"]) for name, to in raw["aliases"].items()}
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, AdapterError):
                raise
            raise SettingsError(f"they cannot be read ({type(error).__name__}: {error})") from error
