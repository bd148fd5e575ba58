"""What earlier versions kept in their state directory, brought into a source of adapters.

STATE/state.json                 which revision each name stands for, where that came from, what is pinned
STATE/revisions/NAME@DIGEST/     copies; DIGEST has 64 hex digits, or the first 12
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qaa_serve.adapters import MAX_ADAPTER_BYTES, AdapterError, digest_of
from qaa_serve.registry.revisions import check_name
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
        AdapterError: if the source cannot be written.
    """
    file = state / "state.json"
    try:
        saved = json.loads(file.read_bytes())["adapters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as an older version's ({error}): is it the --state-dir of one?"
        ) from error
    adapters = source.list().adapters
    pins = set()
    for name, fields in saved.items():
        try:
            check_name(name)
            current, kept = fields["current"], fields["kept"]
            copies = {digest: _copy_of(state, name, digest) for digest in [*reversed(kept), current] if digest}
        except (AdapterError, KeyError, TypeError) as error:
            yield f"{name}: not moved: {error}"
            continue
        for digest in reversed(kept):
            if (copy := copies[digest]) is not None:
                source.keep(name, digest_of(copy), copy)
        pins |= {name} if fields.get("pinned") else set()
        pins |= {f"{name}@{digest}" for digest in fields.get("pinned_revisions") or ()}
        there = _content_of(source, name, adapters.get(name))
        if there not in (None, fields.get("seen"), current):
            yield f"{name}: stays as it is in the source, which was changed since"
            continue
        copy = None if current is None else copies[current]
        if current is None:
            if there is not None:
                source.remove(name)
                yield f"{name}: removed, as it was by the API"
            continue
        if copy is None:
            yield f"{name}: not moved: its copy {current[:12]} is gone or damaged"
        elif there == current:
            yield f"{name}: is in the source"
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


def _content_of(source: Source, name: str, listed: Listed | None) -> str | None:
    """The digest of what the source has under a name; None if there is nothing that could be read."""
    with tempfile.TemporaryDirectory() as staged, suppress(AdapterError):
        if listed is not None:
            source.fetch(name, listed.version, Path(staged), max_bytes=MAX_ADAPTER_BYTES)
            return digest_of(Path(staged))
    return None


def _copy_of(state: Path, name: str, digest: str) -> Path | None:
    """A copy that is whole."""
    for place in (state / "revisions" / f"{name}@{digest}", state / "revisions" / f"{name}@{digest[:12]}"):
        try:
            if digest_of(place).startswith(digest):
                return place
        except AdapterError:
            continue
    return None
