"""Options in a file: YAML, TOML, or the training.json that a training leaves."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaa_serve.training.errors import TrainingError


def read_config(path: Path) -> dict[str, Any]:
    """The options of a file, by name with underscores; of a training.json those it was made with.

    Raises:
        TrainingError: if it cannot be read, or holds no table of options.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        values = _parse(path, text)
    except ValueError as error:
        raise TrainingError(f"--config {path} cannot be read: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("options"), dict) and "format" in values:
        values = values["options"]
    if not isinstance(values, dict):
        raise TrainingError(f"--config {path} holds {type(values).__name__}; a table of options is needed")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _parse(path: Path, text: str) -> object:
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


def use_as_defaults(parser: argparse.ArgumentParser, values: Mapping[str, Any], origin: str) -> None:
    """Make a file's options the defaults of a parser, so that the command line goes before them.

    Args:
        parser: knows the options.
        values: option name with underscores -> value; None stands for the parser's own default.
        origin: what to call the file in messages.

    Raises:
        TrainingError: for an unknown option, or a value that the command line would not take either.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in values.items():
        if name not in actions:
            raise TrainingError(f"{origin}: unknown option {name!r}; known are: {', '.join(sorted(actions))}")
        if value is None:
            continue
        action = actions[name]
        action.default = _checked(action, name, value, origin)
        action.required = False


def _checked(action: argparse.Action, name: str, value: object, origin: str) -> object:
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise TrainingError(f"{origin}: {name} must be true or false, found {value!r}")
        return value
    if action.nargs == "+":
        if not isinstance(value, list):
            value = [value]
        return [_checked_item(action, name, item, origin) for item in value]
    return _checked_item(action, name, value, origin)


def _checked_item(action: argparse.Action, name: str, value: object, origin: str) -> object:
    if isinstance(value, (bool, list, dict)):
        raise TrainingError(f"{origin}: {name} takes one value, found {value!r}")
    try:
        # As text, since YAML takes 1e-3 for a string and a path may look like a number.
        result = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise TrainingError(f"{origin}: {name} cannot be {value!r}: {error}") from error
    if action.choices is not None and result not in action.choices:
        raise TrainingError(
            f"{origin}: {name} must be one of {', '.join(map(str, action.choices))}, found {value!r}"
        )
    return result
