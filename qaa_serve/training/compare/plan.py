"""From the arguments and the config file to the trainings that are to be compared."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaa_serve.training import cli as train_cli
from qaa_serve.training import fields
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import COMPARED, METHODS, get_method, own_options
from qaa_serve.training.options import TrainOptions, names

#: Options whose single value is a list already.
_LISTS = frozenset(field.name for field in dataclasses.fields(TrainOptions) if field.default == ())

#: Options that have a training stop or evaluate by validation rows.
_NEED_VALIDATION = frozenset({"patience", "eval_steps", "eval_metrics"})

_TOP_KEYS = ("common", "methods", "seeds", "validation", "controls")

#: The row of the untrained model in every table.
BASE = "base"

#: Part of the training prompts to validate on, where validation is needed and nothing else was said.
DEFAULT_VALIDATION = 0.1

# YAML 1.1 reads 1e-3, without a point, as text.
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a method with its options.

    Attributes:
        name: in the tables; unique.
        method: the method's name.
        points: options to choose from, each complete but for the seed; one: nothing to choose.
    """

    name: str
    method: str
    points: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        variants: the rows, in the order of the tables.
        seeds: of the final trainings; the first is that of the selection.
        validation: part of the training prompts, or a file; None: no validation.
        common: the options that all variants share.
    """

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    validation: float | Path | None
    common: Mapping[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file: YAML, TOML or JSON.

    Raises:
        TrainingError: if it cannot be read or has unknown keys.
    """
    config = fields.read_config(path)
    _known(config, _TOP_KEYS, f"--config {path}")
    for key in ("common", "methods"):
        if not isinstance(config.get(key) or {}, dict):
            raise TrainingError(f"--config {path}: {key!r} must be a table, found {config[key]!r}")
    numbers: dict[str, Any] = _numbers(config)
    return numbers


def make_plan(
    config: Mapping[str, Any],
    *,
    methods: Sequence[str] = (),
    seeds: object = None,
    validation: object = None,
    controls: bool | None = None,
    common: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a config, in which what is given besides takes precedence.

    Args:
        config: as ``read_config`` returns it.
        methods: names to compare: the config's, or methods as such; empty: all of the config's, or the usual ones.
        seeds: a number of seeds or a list of them; None: the config's, or 3.
        validation: a part from 0 to 1 or a file; None: the config's, or as much as is needed.
        controls: whether two controls stand beside QAA; None: as the config says, which by default they do.
        common: options over those of the config's ``common``.

    Raises:
        TrainingError: for anything unknown or out of range.
    """
    named: dict[str, Any] = dict(config.get("methods") or {})
    shared = {**(config.get("common") or {}), **(common or {})}
    _known(shared, _common_options(), "the common options")
    for key, value in shared.items():
        if isinstance(value, list) and key not in _LISTS:
            raise TrainingError(f"common option {key!r} must be one value, not a list: grids belong to methods")
    chosen = list(methods) or list(named) or list(COMPARED)
    variants = []
    for name in chosen:
        if name not in named and name not in METHODS:
            raise TrainingError(
                f"unknown method {name!r}; known are: {', '.join(dict.fromkeys([*METHODS, *named]))}"
            )
        if chosen.count(name) > 1:
            raise TrainingError(f"method {name!r} is named twice; give variants names of their own in a config")
        variants.append(_variant(name, named.get(name), shared))
    if config.get("controls", True) if controls is None else controls:
        variants += _controls(variants, named, shared)
    selects = any(len(variant.points) > 1 for variant in variants)
    needed = selects or any(_NEED_VALIDATION & point.keys() for v in variants for point in v.points)
    return Plan(
        variants=tuple(variants),
        seeds=_seeds(config.get("seeds", 3) if seeds is None else seeds),
        validation=_validation(config.get("validation") if validation is None else validation, needed),
        common=shared,
    )


def _controls(
    variants: Sequence[Variant], named: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterator[Variant]:
    """What shows how much of QAA's result is the circuit's: QAA with frozen angles, and a bias alone."""
    trained = [variant for variant in variants if variant.method == "qaa"]
    if trained and not any(point.get("freeze_angles") for variant in trained for point in variant.points):
        points: list[Mapping[str, Any]] = []
        for point in trained[0].points:
            frozen = {key: value for key, value in point.items() if key != "theta_lr"} | {"freeze_angles": True}
            points += [frozen] if frozen not in points else []
        yield Variant("qaa frozen", "qaa", tuple(points))
    if trained and not any(variant.method == "bias" for variant in variants):
        yield _variant("bias", named.get("bias"), shared)


def _variant(name: str, options: object, shared: Mapping[str, Any]) -> Variant:
    if name == BASE:
        raise TrainingError(f"{BASE!r} is the name of the untrained model's row; choose another one")
    if options is not None and not isinstance(options, dict):
        raise TrainingError(f"config: method {name!r} must be a table of options, found {options!r}")
    given = dict(options or {})
    method = given.pop("method", name)
    if method not in METHODS:
        raise TrainingError(
            f"config: {name!r} is of the unknown method {method!r}; known are: {', '.join(METHODS)}. A variant "
            "with a name of its own says which method it is with 'method'"
        )
    refused = get_method(method).refuses
    known = [key for key in (*_common_options(), *own_options(get_method(method))) if key not in refused]
    _known(given, known, f"{name!r} (method {method})")
    axes = []
    for key, value in given.items():
        is_grid = isinstance(value, list) and (key not in _LISTS or any(isinstance(v, list) for v in value))
        values = value if is_grid else [value]
        if not values:
            raise TrainingError(f"config: {name!r}: the list of {key!r} is empty")
        axes.append([(key, each) for each in values])
    # What all are to share and this method cannot have at all, such as layers to adapt, is not asked of it.
    asked = {key: value for key, value in shared.items() if key not in refused}
    points = tuple({**asked, **dict(point)} for point in itertools.product(*axes))
    for point in points:
        check_options(name, method, point)
    return Variant(name, str(method), points)


def check_options(name: str, method: str, options: Mapping[str, Any]) -> TrainOptions:
    """Find out before the first training what would stop the last one.

    Returns:
        The options, without those of the comparison.

    Raises:
        TrainingError: for a value out of range or of the wrong type.
    """
    parser = argparse.ArgumentParser()
    train_cli.add_arguments(parser)
    given, _ = fields.parse_values(parser, {**options, "method": method}, repr(name))
    # What needs evaluation data is make_plan's business.
    whole = {**vars(given), "model": "", "data": "", "output": Path(), "eval_data": ""}
    for key in ("config", "dry_run"):
        del whole[key]
    try:
        return train_cli.options_of(whole)
    except TrainingError as error:
        raise TrainingError(f"{name!r}: {error}") from error


def _common_options() -> tuple[str, ...]:
    return tuple(sorted(names(shared=True)))


def _known(given: Iterable[object], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in given:
        if key not in known:
            raise TrainingError(f"{where}: unknown key {key!r}; known are: {', '.join(known)}")


def _seeds(given: object) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(given))
    if (
        isinstance(given, list | tuple)
        and given
        and all(type(seed) is int and 0 <= seed < 2**32 for seed in given)
    ):
        if len(set(given)) < len(given):
            raise TrainingError(f"seeds: one is there twice: {', '.join(map(str, given))}")
        return tuple(given)
    raise TrainingError(f"seeds: a number above 0 or a list of numbers from 0 is needed, found {given!r}")


def _validation(given: object, needed: bool) -> float | Path | None:
    if given is None:
        return DEFAULT_VALIDATION if needed else None
    if isinstance(given, str | Path):
        return Path(given)
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given < 1:
        raise TrainingError(f"validation: a part from 0 to below 1 or a file is needed, found {given!r}")
    if given == 0 and needed:
        raise TrainingError(
            "validation: 0 leaves nothing to choose among the grid's points by, or to stop early by; "
            "the test set is not used for either"
        )
    return float(given) or None


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value, in hex; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.") or "variant"


def differing(options: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a point's options those that not all points have alike."""
    return {key: value for key, value in options.items() if any(point.get(key) != value for point in points)}


def options_text(options: Mapping[str, Any]) -> str:
    """Options in a line for people."""

    def one(value: object) -> str:
        if isinstance(value, float):
            return f"{value:g}"
        return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return ", ".join(f"{key} {one(value)}" for key, value in options.items()) or "defaults"
