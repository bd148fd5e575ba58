"""Adapters that vLLM's own resolver plugins find by name, when somebody first asks for them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from registry_support import FakeEngine, Place, in_a_loop, make_lora
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from qaa_serve.registry import Catalogue
from qaa_serve.server.resolvers import Resolvers


class Counting(FilesystemResolver):
    """vLLM's own, for adapters of a directory; counts what it is asked for, and may fail."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.asked: list[str] = []
        self.error: Exception | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        self.asked.append(lora_name)
        if self.error is not None:
            raise self.error
        return await super().resolve_lora(base_model_name, lora_name)


def make_resolvers(place: Place, catalogue: Catalogue) -> tuple[Resolvers, Counting]:
    found = Counting(place.directory / "elsewhere")
    return Resolvers([found], catalogue, "org/base", logging.getLogger("test")), found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    make_lora(tmp_path / "elsewhere" / "found")
    return place


@in_a_loop
async def test_what_a_plugin_finds_is_served_without_being_in_the_source(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        resolvers, plugin = make_resolvers(place, catalogue)
        assert not catalogue.knows("found")
        assert await resolvers.resolve("found")
        async with catalogue.use("found") as revision:
            assert revision.kind == "LORA"
        assert not list(place.adapters.glob("[!.]*"))
        assert await resolvers.resolve("found"), "it is known by now"
        assert plugin.asked == ["found"]


@in_a_loop
async def test_who_asks_for_what_is_nowhere_asks_the_plugins_now_and_then(place: Place) -> None:
    async with place.server() as catalogue:
        resolvers, plugin = make_resolvers(place, catalogue)
        for _ in range(100):
            assert not await resolvers.resolve("nobody")
        assert plugin.asked == ["nobody"]
        for odd in ("../found", "other", "a b", ""):
            assert not await resolvers.resolve(odd), "no adapter may have that name"
        assert plugin.asked == ["nobody"]


@in_a_loop
async def test_a_plugin_that_fails_and_an_adapter_that_is_broken_are_not_there(place: Place) -> None:
    async with place.server() as catalogue:
        resolvers, plugin = make_resolvers(place, catalogue)
        plugin.error = RuntimeError("the plugin's own trouble")
        assert not await resolvers.resolve("found")
        plugin.error = None
        config = place.directory / "elsewhere" / "found" / "adapter_config.json"
        broken = make_lora(place.directory / "elsewhere" / "broken") / "adapter_config.json"
        broken.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        assert not await resolvers.resolve("broken")
        assert "broken" not in catalogue.entries


@in_a_loop
async def test_without_plugins_nothing_is_asked(place: Place) -> None:
    async with place.server() as catalogue:
        assert not await Resolvers([], catalogue, "base", logging.getLogger("test")).resolve("found")
