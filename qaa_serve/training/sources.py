"""Where rows come from: a file, a directory or a data set on the Hugging Face hub.

Every row keeps the place it has in its source, so that what is wrong with it can be said by line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaa_serve.training.errors import TrainingError

#: What the names of files that can be read end in; texts may be compressed, with ``.gz`` after it.
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


class RowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class SourceRow:
    """One row: its place, such as ``line 3``, and what stands there, or why that cannot be read."""

    place: str
    value: object


@dataclass(frozen=True)
class Source:
    """All rows of a source.

    Attributes:
        digest: SHA-256, in hex, of the file, or of the rows as JSON where there is no single file.
        rows: in order.
    """

    digest: str
    rows: list[SourceRow]


def read_source(name: str) -> Source:
    """Read all rows of a file or of a data set.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet; all but the last also with .gz), or a directory or a name on
            the hub as ``datasets`` takes them, where ``:`` and a split may follow: ``owner/name:train[:1000]``.
            Without, the split is ``train``.

    Raises:
        TrainingError: if there is no such source, or it cannot be read as a whole.
    """
    path = Path(name)
    if path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()):
        return _read_file(name, path)
    return _read_data_set(name)


def _read_file(name: str, path: Path) -> Source:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"data file {name} cannot be read: {error.strerror}") from error
    if path.suffix == ".parquet":
        rows = _data_set_rows(name, "parquet", data_files=str(path), split="train")
    else:
        packed = path.suffix == ".gz"
        reader = {".json": _json, ".csv": _csv}.get(path.with_suffix("").suffix if packed else path.suffix)
        try:
            text = gzip.decompress(content) if packed else content
            rows = list((reader or _json_lines)(_as_utf8(text)))
        except (TrainingError, csv.Error, EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
            raise TrainingError(f"data file {name} cannot be read: {error}") from error
    return Source(hashlib.sha256(content).hexdigest(), rows)


def _as_utf8(content: bytes) -> bytes:
    """Text as UTF-8, if its byte order mark says that it is UTF-16, and in any case without the mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16").encode()
    return content.removeprefix(codecs.BOM_UTF8)


def _json_lines(content: bytes) -> Iterator[SourceRow]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield SourceRow(f"line {number}", _parsed(line))


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(f"no JSON: {error}")


def _json(content: bytes) -> Iterator[SourceRow]:
    """An array of rows, also as ``data`` of an object, or one row; anything else is taken for JSON lines."""
    whole = _parsed(content)
    if isinstance(whole, dict):
        data = whole.get("data")
        whole = data if isinstance(data, list) else [whole]
    if not isinstance(whole, list):
        yield from _json_lines(content)
        return
    for number, value in enumerate(whole, start=1):
        yield SourceRow(f"row {number}", value)


def _csv(content: bytes) -> Iterator[SourceRow]:
    """Every value is text, as a CSV file has no other kind; an empty one counts as absent."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TrainingError(f"it is not UTF-8: see line {line}") from error
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # its default is shorter than a long document
    reader = csv.DictReader(io.StringIO(text, newline=""))
    line = 2
    for values in reader:
        value: object = {key: text for key, text in values.items() if text}
        if None in values or None in values.values():
            value = RowError(f"the first line names {len(reader.fieldnames or ())} columns, this row has others")
        yield SourceRow(f"line {line}", value)
        line = reader.line_num + 1


def _read_data_set(name: str) -> Source:
    path, _, split = name.partition(":")
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix):
        raise TrainingError(
            f"data {name!r}: there is no such file (files end in {', '.join(SUFFIXES)}), "
            "and it is no name on the Hugging Face hub"
        )
    rows = _data_set_rows(name, path, split=split or "train")
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\n")
    return Source(hashed.hexdigest(), rows)


def _data_set_rows(name: str, path: str, **options: Any) -> list[SourceRow]:
    """Rows as ``datasets`` reads them, without the None that it fills in, at any depth, for what a row lacks."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        if "data_files" in options or Path(path).is_dir():
            options["cache_dir"] = scratch  # of no use to a later run: the digest would have to be the same
        try:
            data = datasets.load_dataset(path, keep_in_memory=True, **options)
            values = list(data)
        except Exception as error:  # it raises what its many readers raise
            causes = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise TrainingError(f"data {name!r} cannot be read: {causes[0]}") from error
    return [SourceRow(f"row {number}", _without_nulls(value)) for number, value in enumerate(values, start=1)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
