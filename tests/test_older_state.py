"""What an earlier version kept in its state directory is brought into a source, and nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from registry_support import Place, make

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.older_state import move_state
from qaa_serve.registry import Catalogue, SourceSettings
from qaa_serve.sources import DirectorySource, SourceError


class Older:
    """The state directory of an earlier version's server, beside the directory that it followed.

    Attributes:
        source: that directory.
        state: the state directory.
    """

    def __init__(self, directory: Path):
        self.place = Place(directory)
        self.source = DirectorySource(self.place.adapters)
        self.state = directory / "older"
        self.adapters: dict[str, Any] = {}

    def digest(self, seed: int) -> str:
        return digest_of(self.place.version(seed))

    def note(
        self,
        name: str,
        current: int | None,
        kept: tuple[int, ...] = (),
        *,
        seen: int | None = None,
        pinned: bool = False,
        pinned_revisions: tuple[int, ...] = (),
        digits: int = 64,
    ) -> None:
        """Write down what a name stands for, with a copy of each content; contents are seeds, the newest first."""
        for seed in {*kept, *([] if current is None else [current])}:
            copy = self.state / "revisions" / f"{name}@{self.digest(seed)[:digits]}"
            shutil.copytree(self.place.version(seed), copy, dirs_exist_ok=True)
        self.adapters[name] = {
            "current": None if current is None else self.digest(current)[:digits],
            "kept": [self.digest(seed)[:digits] for seed in kept],
            "source": "api" if seen is None else "directory",
            "seen": None if seen is None else self.digest(seen)[:digits],
            "published": 1.7e9,
            "pinned": pinned,
            "pinned_revisions": [self.digest(seed)[:digits] for seed in pinned_revisions],
        }
        self.state.mkdir(exist_ok=True)
        (self.state / "state.json").write_text(json.dumps({"version": 1, "adapters": self.adapters}, indent=1))

    def put(self, name: str, seed: int) -> None:
        """Put an adapter into the directory by hand."""
        make(self.place.adapters / name, seed)

    def move(self) -> list[str]:
        before = {path: path.read_bytes() for path in self.state.rglob("*") if path.is_file()}
        said = list(move_state(self.state, self.source))
        assert before == {path: path.read_bytes() for path in self.state.rglob("*") if path.is_file()}
        return said

    def now(self, name: str) -> tuple[int | None, list[int]]:
        """What a name has in the source and in its history, the oldest first, as seeds."""
        seeds = {self.digest(seed): seed for seed in range(1, 6)}
        there = self.place.adapters / name
        current = seeds[digest_of(there)] if there.exists() else None
        return current, [seeds[digest] for digest in self.source.revisions(name)]


@pytest.fixture
def older(tmp_path: Path) -> Older:
    return Older(tmp_path)


def test_an_upload_comes_with_its_history(older: Older) -> None:
    older.note("a", 3, (2, 1))
    (line,) = older.move()
    assert line == f"a: {older.digest(3)[:12]} put into the source, 2 former contents kept"
    assert older.now("a") == (3, [1, 2])


def test_what_was_rolled_back_stays_so(older: Older) -> None:
    older.put("a", 2)
    older.note("a", 1, (2,), seen=2)
    older.move()
    assert older.now("a") == (1, [2])


def test_what_the_directory_has_already_stays_there(older: Older) -> None:
    older.put("a", 2)
    inode = (older.place.adapters / "a").stat().st_ino
    older.note("a", 2, (1,), seen=2)
    assert older.move() == ["a: is in the source"]
    assert older.now("a") == (2, [1])
    assert (older.place.adapters / "a").stat().st_ino == inode


def test_what_the_api_removed_goes_to_the_history(older: Older) -> None:
    older.put("a", 1)
    older.note("a", None, seen=1)
    assert older.move() == ["a: removed, as it was by the API"]
    assert older.now("a") == (None, [1])


def test_what_was_changed_since_stays_and_what_was_served_can_be_gone_back_to(older: Older) -> None:
    older.put("a", 3)
    older.put("b", 3)
    older.note("a", 2, (1,), seen=2)
    older.note("b", None, seen=2)
    assert older.move() == [f"{name}: stays as it is in the source, which was changed since" for name in "ab"]
    assert older.now("a") == (3, [1, 2])
    assert older.now("b") == (3, [])


def test_what_was_served_in_place_of_a_damaged_directory_still_is(older: Older) -> None:
    older.put("a", 2)
    (older.place.adapters / "a" / WEIGHTS_FILE).unlink()
    (older.place.adapters / "a" / CONFIG_FILE).write_text("{")
    older.note("a", 2, (1,), seen=2)
    older.move()
    assert [*older.source.revisions("a")] == [older.digest(1), older.digest(2)]
    assert (older.place.adapters / "a" / CONFIG_FILE).read_text() == "{"

    async def body(catalogue: Catalogue) -> None:
        assert (await catalogue.find("a")).digest == older.digest(2)

    older.place.serve(body)


def test_pins_are_the_sources_beside_those_it_has(older: Older) -> None:
    older.source.write_settings(SourceSettings(frozenset({"x"})).encode(), None)
    older.note("a", 3, (2, 1), pinned_revisions=(2,))
    older.note("b", 1, pinned=True)
    assert older.move()[-1] == f"pinned: a@{older.digest(2)}, b"
    content, _ = older.source.read_settings()
    assert SourceSettings.parse(content).pinned == {"x", "b", f"a@{older.digest(2)}"}


def test_copies_that_are_damaged_or_gone_are_left_out(older: Older) -> None:
    older.note("a", 3, (2, 1))
    older.note("b", 3, (1,))
    older.note("c", 3, seen=3)
    older.put("c", 3)
    copies = older.state / "revisions"
    for name, seed in (("a", 2), ("b", 3), ("c", 3)):
        (copies / f"{name}@{older.digest(seed)}" / WEIGHTS_FILE).write_bytes(b"damaged")
    shutil.rmtree(copies / f"b@{older.digest(1)}")
    assert older.move() == [
        f"a: {older.digest(3)[:12]} put into the source, 1 former contents kept",
        f"b: not moved: its copy {older.digest(3)[:12]} is gone or damaged",
        "c: is in the source",
    ]
    assert older.now("a") == (3, [1])
    assert older.now("b") == (None, [])


def test_twelve_digits_are_as_good(older: Older) -> None:
    for name in "ab":
        older.put(name, 2)
    older.note("a", 2, (1,), seen=2, digits=12)
    older.note("b", 1, (2,), seen=2, digits=12, pinned_revisions=(2,))
    assert older.move()[0] == "a: is in the source"
    assert older.now("a") == (2, [1])
    assert older.now("b") == (1, [2])


def test_it_may_be_done_again(older: Older) -> None:
    older.put("rolled-back", 2)
    older.put("removed", 1)
    older.note("uploaded", 3, (2, 1), pinned=True)
    older.note("rolled-back", 1, (2,), seen=2)
    older.note("removed", None, seen=1)
    older.move()
    moved = {name: older.now(name) for name in older.adapters}
    settings, _ = older.source.read_settings()
    assert older.move() == ["uploaded: is in the source", "rolled-back: is in the source", "pinned: uploaded"]
    assert {name: older.now(name) for name in older.adapters} == moved
    assert older.source.read_settings()[0] == settings


@pytest.mark.parametrize(
    "fields",
    [
        None, [], {}, {"current": "00", "kept": None}, {"current": 1, "kept": []},
        {"current": None, "kept": [], "pinned_revisions": ["../x"]},
    ],
)  # fmt: skip
def test_what_cannot_be_understood_of_one_name_keeps_no_other_back(older: Older, fields: Any) -> None:
    older.adapters["bad"] = fields
    older.adapters["../bad"] = {"current": None, "kept": []}
    older.note("good", 1)
    said = older.move()
    assert [line.partition(" moved: ")[0] for line in said[:2]] == ["bad: not", "../bad: not"]
    assert older.now("good") == (1, [])
    assert older.source.read_settings() == (b"", None)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"adapters": null}', '{"adapters": 3}'])
def test_what_is_no_state_is_said(older: Older, content: str | None) -> None:
    older.state.mkdir()
    if content is not None:
        (older.state / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json cannot be read .*: is it the --state-dir of one\?"):
        older.move()


def test_a_source_that_cannot_be_read_now_is_not_written_over(
    older: Older, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise SourceError("the store does not answer")

    older.put("a", 3)
    older.note("a", 2, seen=2)
    monkeypatch.setattr(older.source, "fetch", fail)
    with pytest.raises(SourceError, match="does not answer"):
        older.move()
    assert older.now("a") == (3, [])
