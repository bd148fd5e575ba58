"""What an object store holds of one adapter, and which content its name stands for."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE
from qaa_serve.sources.base import Listed

FILES = (CONFIG_FILE, WEIGHTS_FILE)

#: Where half an adapter goes that a content took the place of: nobody asked for its end.
INCOMPLETE = "incomplete"

#: DIGEST-TOKEN, where a content is.
PLACE = re.compile(rf"(?!{INCOMPLETE}-)[^/]+-[0-9a-f]{{16}}")

#: What a head is; with an empty one only plain objects count.
EMPTY, CONTENT, REMOVED = range(3)

#: What file systems call the time of the last change.
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of the store.

    Attributes:
        path: as fsspec wants it.
        etag: opaque; another content has another one.
        changed: Unix time.
        nbytes: its size.
    """

    path: str
    etag: str
    changed: float
    nbytes: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> StoredObject:
        """From what fsspec says of it; without an etag its time and size make one."""
        changed = next((_time(info[key]) for key in _TIMES if info.get(key)), 0.0)
        nbytes = int(info["size"] or 0)
        etag = next((info[key] for key in ("ETag", "etag") if info.get(key)), f"{changed:.6f}-{nbytes}")
        return cls(info["name"], bare(etag), changed, nbytes)

    @property
    def mark(self) -> str:
        """Another upload has another one, of the same content too; a store may keep times in whole seconds."""
        return f"{self.etag}@{int(self.changed)}"


def bare(etag: object) -> str:
    """An etag without its quotes."""
    return str(etag).strip('"')


def _time(value: datetime | str | float) -> float:
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


@dataclass(frozen=True)
class Head:
    """What head.json holds.

    Attributes:
        content: the place of what the name stands for; None if there is no adapter.
        history: places of former contents, the oldest first. None of them is ever `content` again.
        over: marks of the plain config and weights that it replaced.
        token: each head's own, so that no two have one etag.
    """

    content: str | None = None
    history: tuple[str, ...] = ()
    over: tuple[str | None, str | None] = (None, None)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def kind(self) -> int:
        """CONTENT; REMOVED, if plain objects of its `over` may still be there; EMPTY."""
        if self.content is not None:
            return CONTENT
        return EMPTY if self.over == (None, None) else REMOVED

    def encode(self) -> bytes:
        """As JSON whose number of bytes, divided by three, leaves its kind.

        A listing has sizes: so it tells what kinds of heads there are, and need not read them.
        """
        raw = json.dumps(asdict(self)).encode()
        return raw + b"\n" * ((self.kind - len(raw)) % 3)

    @classmethod
    def decode(cls, raw: bytes) -> Head:
        """Raises ValueError if it is none."""
        match json.loads(raw):
            case {
                "content": str() | None as content,
                "history": list(history),
                "over": [a, b],
                "token": str(token),
            }:
                return cls(content, tuple(map(str, history)), (a, b), token)
        raise ValueError("it has other fields")


def digest_of_place(place: str) -> str:
    """The digest of the content there."""
    return place.rpartition("-")[0]


@dataclass
class Found:
    """The objects of one name: plain ones by file, the head, and those of each place by file."""

    plain: dict[str, StoredObject] = field(default_factory=dict)
    head: StoredObject | None = None
    places: dict[str, dict[str, StoredObject]] = field(default_factory=dict)

    def is_whole(self, place: str) -> bool:
        """Whether both files are there."""
        return len(self.places.get(place, ())) == len(FILES)

    def live(self, head: Head) -> dict[str, StoredObject]:
        """The plain objects, if they are newer than the head."""
        over = dict(zip(FILES, head.over, strict=True))
        return self.plain if any(over[file] != item.mark for file, item in self.plain.items()) else {}


@dataclass(frozen=True)
class State:
    """What a name stands for in one moment."""

    found: Found
    head: Head

    @property
    def live(self) -> dict[str, StoredObject]:
        """The plain objects, if they are what the name stands for."""
        return self.found.live(self.head)

    @property
    def history(self) -> list[str]:
        """The places of its history that are there."""
        return [place for place in self.head.history if self.found.is_whole(place)]

    @property
    def marks(self) -> tuple[str | None, str | None]:
        """What a head says that takes the place of the plain objects."""
        config, weights = (self.found.plain.get(file) for file in FILES)
        return config.mark if config else None, weights.mark if weights else None

    @property
    def listed(self) -> Listed | None:
        """As `Source.look` has it."""
        if self.live:
            return listed_plain(self.live)
        if self.head.content is None or self.found.head is None:
            return None
        return listed_head(self.found, self.head.content)

    @property
    def version(self) -> str:
        """As listed; "" if there is no adapter."""
        return listed.version if (listed := self.listed) else ""


def listed_plain(plain: Mapping[str, StoredObject]) -> Listed:
    """Plain objects as they are listed."""
    return Listed(
        version="+".join(plain[file].etag if file in plain else "-" for file in FILES),
        changed=max(item.changed for item in plain.values()),
        nbytes=plain[WEIGHTS_FILE].nbytes if WEIGHTS_FILE in plain else 0,
        complete=len(plain) == len(FILES),
    )


def listed_head(found: Found, content: str | None) -> Listed:
    """A head as it is listed; with its content's place unknown, the largest of its weights count."""
    assert found.head is not None
    places = found.places.values() if content is None else [found.places.get(content, {})]
    whole = [files for files in places if len(files) == len(FILES)]
    return Listed(
        version=head_version(found.head.etag),
        changed=found.head.changed,
        nbytes=max((files[WEIGHTS_FILE].nbytes for files in whole), default=0),
        complete=bool(whole),
        settled=True,
    )


def head_version(etag: str) -> str:
    """The version of a content that was put in one step."""
    return f"head:{etag}"


def merged(
    history: Iterable[str], replaced: Iterable[str], *, again: bool = False, new: str | None = None
) -> tuple[str, ...]:
    """A history with what was replaced at its end.

    Args:
        history: places.
        replaced: places, the newest last.
        again: whether those whose content is in the history stay there: one has gone back in it.
        new: digest of what comes in their place, which is taken out of the history unless `again`.
    """
    merged = [place for place in history if again or digest_of_place(place) != new]
    for place in replaced:
        digest = digest_of_place(place)
        if again and any(digest_of_place(other) == digest for other in merged):
            continue
        if digest != new or again:
            merged = [other for other in merged if digest_of_place(other) != digest] + [place]
    return tuple(merged)
