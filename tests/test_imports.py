"""How the files of the project may import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_of(package: str) -> dict[str, Path]:
    """Module -> file, of a package and all below it."""
    files = (ROOT / package.replace(".", "/")).rglob("*.py")
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }


def imports_of(file: Path, module: str, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports anywhere, for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in known else node.module for part in parts}
    return (found & known.keys()) - {module}


@pytest.mark.parametrize("package", ["server", "registry", "adapters", "sources"])
def test_no_files_import_each_other_in_a_circle(package):
    known = modules_of(f"qaa_serve.{package}")
    assert len(known) > 4
    try:
        TopologicalSorter({module: imports_of(file, module, known) for module, file in known.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
