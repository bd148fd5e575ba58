"""Every vLLM that is supported has what we use of it: records of sources, which tests/vllm_surface.py writes."""

from __future__ import annotations

import importlib
import inspect
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm_qaa.port", reason="the plugin needs packaging")

import vllm_surface
from packaging.version import Version
from vllm_qaa import port

SEAMS = (*port.SEAMS, *port.SERVER_SEAMS)
VERSIONS = sorted((path.stem for path in vllm_surface.RECORDS.glob("*.json")), key=Version)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def record(version: str) -> dict[str, Any]:
    return json.loads((vllm_surface.RECORDS / f"{version}.json").read_text())


def answer(record: dict[str, Any], version: str, module: str, name: str) -> Any:
    key = f"{module}:{name}" if name else module
    assert key in record["names"], f"nobody has looked for {key}: run python tests/vllm_surface.py {version}"
    return record["names"][key]


def parameters(record: dict[str, Any], version: str, module: str, name: str) -> tuple[str, ...]:
    found = answer(record, version, module, name)
    assert isinstance(found, dict), f"vLLM {version} has no {module}.{name}"
    (names,) = found.values()
    return tuple(names)


def test_the_newest_supported_version_has_a_record() -> None:
    newest = Version(VERSIONS[-1])
    assert Version(f"{newest.major}.{newest.minor + 1}") == port.END_VERSION


def test_every_version_is_one_that_the_plugin_takes(version: str) -> None:
    port.check_version(version)


def test_everything_that_is_imported_is_there(version: str, record: dict[str, Any]) -> None:
    missing = [ask for ask in sorted({*vllm_surface.imports()}) if answer(record, version, *ask) is None]
    assert not missing, "what vLLM has moved belongs in port.MOVED"


@pytest.mark.parametrize("name", port.MOVED)
def test_what_was_moved_is_in_one_of_its_places(version: str, record: dict[str, Any], name: str) -> None:
    found = [place for place in port.MOVED[name] if answer(record, version, place, name) is not None]
    assert len(found) == 1
    assert len({str(answer(record, version, place, name)) for place in found}) == 1


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.attribute)
def test_the_patch_table_fits(version: str, record: dict[str, Any], seam: port.Seam) -> None:
    assert answer(record, version, seam.module, seam.attribute) is not None
    for path, expected in seam.methods.items():
        assert not port.check_parameters(path, parameters(record, version, seam.module, path), expected)


@pytest.mark.parametrize("called", vllm_surface.CALLED, ids=lambda called: called[1])
def test_what_is_called_takes_what_it_is_given(
    version: str, record: dict[str, Any], called: tuple[str, str]
) -> None:
    found = parameters(record, version, *called)
    assert not {*vllm_surface.CALLED[called]} - {*found}, found


def test_settings_and_options_are_there(version: str, record: dict[str, Any]) -> None:
    wanted = {"environment": vllm_surface.attributes_of("envs"), "options": vllm_surface.asked_options()}
    for kind, names in wanted.items():
        found = record[kind]
        assert names <= {*found}, f"write the record anew: python tests/vllm_surface.py {version}"
        assert not {name for name in names if not found[name]}, f"vLLM {version} has no such {kind}"


# -------------------------------------------------------------------------------------- the version that is here


@pytest.fixture(scope="module")
def here() -> tuple[str, Path]:
    """The installed vLLM's version and the directory it is in."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    version = importlib.import_module("vllm.version").__version__
    return Version(version).base_version, Path(spec.origin).parents[1]


def test_the_record_of_the_installed_version_is_what_its_sources_say(here: tuple[str, Path]) -> None:
    version, sources = here
    record = json.loads((vllm_surface.RECORDS / f"{version}.json").read_text())
    assert vllm_surface.read(sources) == record, f"write it anew: python tests/vllm_surface.py {version}"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.attribute)
def test_sources_are_read_as_python_reads_them(here: tuple[str, Path], seam: port.Seam) -> None:
    sources = vllm_surface.Sources(here[1])
    for path in seam.methods:
        target: Any = importlib.import_module(seam.module)
        for part in path.split("."):
            target = getattr(target, part)
        (read,) = sources.describe(seam.module, path).values()
        assert read == [*inspect.signature(target).parameters]


@pytest.mark.parametrize("name", port.MOVED)
def test_what_was_moved_is_found(here: tuple[str, Path], name: str) -> None:
    assert port.moved(name).__module__ in port.MOVED[name]


def test_what_is_nowhere_is_named_with_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(port.MOVED, "gone", ("vllm.nowhere.at_all", "vllm.version"))
    with pytest.raises(ImportError, match=r"gone in none of vllm.nowhere.at_all, vllm.version"):
        port.moved("gone")
