"""Documents that repeat what the code says are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_patch_ledger_is_the_patch_table():
    port = pytest.importorskip("vllm_qaa.port", reason="the plugin needs packaging")
    text = (ROOT / "docs" / "plugin.md").read_text()
    assert f"\n{port.ledger()}\n<!-- end -->" in text, "write port.ledger() into docs/plugin.md"


def test_only_the_plugin_and_the_server_import_vllm():
    found = [
        path.relative_to(ROOT)
        for path in (ROOT / "qaa_serve").rglob("*.py")
        if "server" not in path.parts and any(
            line.lstrip().startswith(("import vllm", "from vllm")) for line in path.read_text().splitlines()
        )
    ]  # fmt: skip
    assert found == []


PAGES = [
    *ROOT.glob("*.md"),
    *(page for part in ("docs", "deploy", "examples") for page in (ROOT / part).rglob("*.md")),
]


@pytest.mark.parametrize("path", sorted(PAGES), ids=str)
def test_no_merge_has_left_its_marks(path):
    """Markers of a conflict, a line twice, or rows of a table without its head."""
    lines = path.read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        assert not line.startswith(("<<<<<<<", ">>>>>>>")), line
        assert line != before or len(line) < 40, line
    for blank, row, below in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
        assert blank or not row.startswith("| ") or below.startswith("|--"), row
