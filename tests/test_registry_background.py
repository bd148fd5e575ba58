"""What a server does with adapters before anybody asks for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from registry_support import FakeEngine, Place, eventually, make, settle

from qaa_serve.registry import SourceSettings
from qaa_serve.sources import DirectorySource


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    for seed in range(3):
        make(place.adapters / f"name{seed}", seed)
    return place


def test_all_are_checked_from_the_start_on_and_none_is_loaded(place: Place) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with place.server(engine, check=True) as catalogue:
            await eventually(lambda: catalogue.counts["served"] == 3, "all are checked")
            assert engine.loads == []

    asyncio.run(run())


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_pinned_in_the_source_is_loaded_at_the_start(place: Place, lazy: bool) -> None:
    DirectorySource(place.adapters).write_settings(SourceSettings(frozenset({"name1", "gone"})).encode(), None)

    async def run() -> None:
        engine = FakeEngine()
        async with place.server(engine, check=True, lazy=lazy) as catalogue:
            await eventually(lambda: [revision.name for revision in engine.held] == ["name1"], "it is loaded")
            await settle()
            assert catalogue.counts["known"] == (2 if lazy else 0)

    asyncio.run(run())
