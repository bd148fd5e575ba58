"""Options as the fields of dataclasses: what a field says is what parser, config files, checks and cards know.

transformers' HfArgumentParser does the same, but importing transformers takes seconds, and ``--help`` shall not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from qaa_serve.training.errors import TrainingError


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str = "",
    metavar: str | None = None,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    free: bool = False,
    card: bool = True,
    shared: bool = True,
) -> Any:
    """A dataclass's field that is an option.

    Args:
        default: its default; without, it must be given.
        help: one line for ``--help``; the default is added unless it names one.
        group: heading in ``--help``.
        metavar: what ``--help`` calls the value.
        above: a value must be greater.
        least: a value must not be smaller.
        below: a value must be smaller.
        free: a training's result does not depend on it, so that ``--resume`` may change it.
        card: a model card has it.
        shared: ``qaa-serve compare`` has it too, for all of its trainings.
    """
    metadata = {
        "help": help, "group": group, "metavar": metavar, "above": above, "least": least, "below": below,
        "free": free, "card": card, "shared": shared,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def check_ranges(options: Any) -> None:
    """Check the values of a dataclass of options, those of tuples one by one.

    Raises:
        TrainingError: for one out of its range.
    """
    words = {"above": "above", "least": "at least", "below": "below"}
    holds = {"above": operator.gt, "least": operator.ge, "below": operator.lt}
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        bounds = {kind: field.metadata[kind] for kind in words if field.metadata.get(kind) is not None}
        for value in given if isinstance(given, tuple) else () if given is None else (given,):
            if not all(holds[kind](value, bound) for kind, bound in bounds.items()):
                wanted = " and ".join(f"{words[kind]} {bound:g}" for kind, bound in bounds.items())
                raise TrainingError(f"{flag(field.name)} must be {wanted}, found {value}")


def add_fields(parser: argparse.ArgumentParser, *classes: type, only: Iterable[str] | None = None) -> None:
    """Add the options of dataclasses to a parser. What is not given is not in the namespace.

    Args:
        parser: gets a group for each heading; an option that it has already is passed over.
        classes: of which several may have an option of the same name.
        only: names of the options to add; None: all.
    """
    groups = {group.title: group for group in parser._action_groups}
    known = {action.dest for action in parser._actions}
    owners: dict[str, list[str]] = {}  # of an option, where not every class has it
    for cls in classes:
        for field in dataclasses.fields(cls):
            owners.setdefault(field.name, []).append(getattr(cls, "name", ""))
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if (
                "help" not in field.metadata
                or field.name in known
                or (only is not None and field.name not in only)
            ):
                continue
            known.add(field.name)
            title = field.metadata["group"] or "options"
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            about = _kind(hints[field.name], field.metadata["metavar"])
            if field.default is dataclasses.MISSING:
                about["required"] = True
            if field.default is True:
                about["action"] = argparse.BooleanOptionalAction
            about["help"] = _owned(owners[field.name], len(classes)) + _help(field).replace("%", "%%")
            groups[title].add_argument(flag(field.name), default=argparse.SUPPRESS, **about)


def _owned(owners: list[str], classes: int) -> str:
    if len(owners) == classes:
        return ""
    return f"{', '.join(owners[:4])}{', ...' if len(owners) > 4 else ''}: "


def _help(field: dataclasses.Field[Any]) -> str:
    text, default = str(field.metadata["help"]), field.default
    if "(default" in text or default in ((), None) or default is False or default is dataclasses.MISSING:
        return text
    default = "yes" if default is True else default
    return f"{text} (default: {f'{default:g}' if isinstance(default, float) else default})"


def _kind(hint: Any, metavar: str | None) -> dict[str, Any]:
    """What argparse is to know about values of a type."""
    parts = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
    origins = [typing.get_origin(part) for part in parts]
    if tuple in origins:
        item = typing.get_args(parts[origins.index(tuple)])[0]
        return {**_kind(item, metavar), "nargs": "+"}
    if Literal in origins:
        return {"choices": typing.get_args(parts[0])}
    if Mapping in origins:
        return {"type": _table, "metavar": metavar or "JSON"}
    if bool in parts:
        return {"action": "store_true"}
    if int in parts or float in parts:
        kind: type = float if float in parts else int
        return {"type": kind, "metavar": metavar or ("X" if kind is float else "N")}
    return {"type": Path if parts == [Path] else str, "metavar": metavar or "NAME"}


def _table(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, found {text}")
    return value


def parse_values(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], origin: str
) -> tuple[argparse.Namespace, list[str]]:
    """Take options of a file as the command line takes them.

    Args:
        parser: knows the options.
        values: option name with underscores -> value; None: not given.
        origin: what to call the file in messages.

    Returns:
        The options, and the same as arguments.

    Raises:
        TrainingError: for an unknown option, or a value that the command line would not take either.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    arguments: list[str] = []
    for name, value in values.items():
        action = actions.get(name)
        if action is None:
            raise TrainingError(f"{origin}: unknown option {name!r}; known are: {', '.join(sorted(actions))}")
        if value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise TrainingError(f"{origin}: {name} must be true or false, found {value!r}")
            arguments += action.option_strings[:1] if value else action.option_strings[1:]
        elif action.type is _table and isinstance(value, dict):
            arguments.append(f"{flag(name)}={json.dumps(value)}")
        elif action.nargs == "+":
            items = value if isinstance(value, list | tuple) else [value]
            arguments += [flag(name), *map(str, items)] if items else []
        elif isinstance(value, bool | list | dict):
            raise TrainingError(f"{origin}: {name} takes one value, found {value!r}")
        else:
            arguments.append(f"{flag(name)}={value}")

    def refuse(message: str) -> NoReturn:
        raise TrainingError(f"{origin}: {message.removeprefix('argument ')}")

    needed = [action for action in parser._actions if action.required]
    error = parser.error
    try:  # the file alone: what the command line has to give beside it is not missing yet
        for action in needed:
            action.required = False
        parser.error = refuse  # type: ignore[method-assign]
        return parser.parse_args(arguments), arguments
    finally:
        parser.error = error  # type: ignore[method-assign]
        for action in needed:
            action.required = True


def read_config(path: Path) -> dict[str, Any]:
    """The options of a file, by name with underscores; of a training.json those it was made with.

    Raises:
        TrainingError: if it cannot be read, or holds no table of options.
    """
    try:
        values = _parsed(path, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise TrainingError(f"--config {path} cannot be read: {said}") from error
    if isinstance(values, dict) and isinstance(values.get("options"), dict) and "format" in values:
        values = values["options"]
    if not isinstance(values, dict):
        raise TrainingError(f"--config {path} holds {type(values).__name__}; a table of options is needed")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _parsed(path: Path, text: str) -> object:
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    raise ValueError(f"its name ends in {path.suffix!r}; .yaml, .yml, .toml and .json are read")
