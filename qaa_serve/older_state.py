"""What earlier versions kept in their state directory, brought into a source of adapters.

STATE/state.json                 which revision each name stands for, where that came from, what is pinned
STATE/revisions/NAME@DIGEST/     copies; DIGEST has 64 hex digits, or the first 12
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qaa_serve.adapters import MAX_ADAPTER_BYTES, AdapterError, digest_of
from qaa_serve.registry.revisions import check_name, check_reference
from qaa_serve.registry.settings import SourceSettings
from qaa_serve.sources import Listed, Source


def move_state(state: Path, source: Source) -> Iterator[str]:
    """Put uploads, rolled back contents, former contents and pins into a source; STATE stays as it is.

    A name whose content in the source is not the one that was seen there last has been changed since, and stays.
    The same command may be given again.

    Args:
        state: the directory of a server that does not run.
        source: what `--adapters` names.

    Yields:
        what was done, a line for each name.

    Raises:
        ValueError: if there is no such state.
        AdapterError: if the source cannot be read or written.
    """
    file = state / "state.json"
    try:
        saved = dict(json.loads(file.read_bytes())["adapters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as an older version's ({error}): is it the --state-dir of one?"
        ) from error
    adapters = source.list().adapters
    pins = set()
    for name, fields in saved.items():
        try:
            check_name(name)
            current, seen, kept = fields["current"], fields.get("seen"), [*filter(None, fields["kept"])]
            copies = {digest: _copy_of(state, name, digest) for digest in (*kept, current) if digest}
            pinned = {name} if fields.get("pinned") else set()
            for digest in fields.get("pinned_revisions") or ():
                check_reference(f"{name}@{digest}")
                pinned.add(f"{name}@{digest}")
        except (AdapterError, KeyError, TypeError) as error:
            yield f"{name}: not moved: {error}"
            continue
        for digest in reversed(kept):
            _keep(source, name, copies[digest])
        pins |= pinned
        copy = None if current is None else copies[current]
        there = _content_of(source, name, adapters.get(name))
        if there is not None and not _is_one_of(there, seen, current):
            _keep(source, name, copy)  # it is served if what is there cannot be, as it was
            yield f"{name}: stays as it is in the source, which was changed since"
        elif current is None:
            if there is not None:
                source.remove(name)
                yield f"{name}: removed, as it was by the API"
        elif there is not None and _is_one_of(there, current):
            yield f"{name}: is in the source"
        elif copy is None:
            yield f"{name}: not moved: its copy {current[:12]} is gone or damaged"
        else:
            source.put(name, copy, digest_of(copy))
            former = sum(copies[digest] is not None for digest in kept)
            yield f"{name}: {current[:12]} put into the source, {former} former contents kept"
    if pins:
        content, version = source.read_settings()
        settings = SourceSettings.parse(content)
        for pin in sorted(pins):
            settings = settings.with_pin(pin, True)
        source.write_settings(settings.encode(), version)
        yield f"pinned: {', '.join(sorted(pins))}"


def _is_one_of(digest: str, *noted: str | None) -> bool:
    """Whether a content is one of those that were written down, with all digits or the first 12."""
    return any(digest.startswith(one) for one in noted if one)


def _content_of(source: Source, name: str, listed: Listed | None) -> str | None:
    """The digest of what the source has under a name; "" if that is no whole adapter, None if it is nothing.

    Raises:
        AdapterError: if it cannot be read now.
    """
    if listed is None:
        return None
    with tempfile.TemporaryDirectory() as staged:
        try:
            source.fetch(name, listed.version, Path(staged), max_bytes=MAX_ADAPTER_BYTES)
            return digest_of(Path(staged))
        except AdapterError as error:
            if error.temporary:
                raise
    return ""


def _keep(source: Source, name: str, copy: Path | None) -> None:
    """Put a copy, if there is one, into the source's history."""
    if copy is not None:
        source.keep(name, digest_of(copy), copy)


def _copy_of(state: Path, name: str, digest: str) -> Path | None:
    """A copy that is whole."""
    for place in (state / "revisions" / f"{name}@{digest}", state / "revisions" / f"{name}@{digest[:12]}"):
        try:
            if digest_of(place).startswith(digest):
                return place
        except AdapterError:
            continue
    return None
