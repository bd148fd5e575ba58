"""A process that dies while it changes a directory source, at each of its steps: nothing is lost or left over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash_process import DIED, DONE
from sources_support import Contents, content

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE
from qaa_serve.sources import DirectorySource

pytestmark = pytest.mark.slow

OWN = f"({CONFIG_FILE}|{WEIGHTS_FILE})"
#: All that a source may hold when nothing is going on.
TIDY = re.compile(
    rf"[a-z]+/{OWN}|\.qaa-serve\.json|\.revisions/[a-z]+/[0-9a-f]{{64}}/{OWN}|\.revisions/\.locks/\w+"
)


@dataclass(frozen=True)
class Case:
    """An operation on the name "a".

    Attributes:
        call: the method and its arguments; a letter after "=" stands for its digest, after "/" for its directory.
        before: what the name has, and its history, the oldest first.
        after: the same when nobody died.
        options: keyword arguments.
    """

    call: tuple[Any, ...]
    before: tuple[str, str]
    after: tuple[str, str]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join(map(str, (*self.call, *self.options, *self.before))).replace("/", "")


PUTS = [
    Case(("put", "a", "/x", "=x"), ("", ""), ("x", "")),
    Case(("put", "a", "/p", "=p"), ("", "pq"), ("p", "q")),
    Case(("put", "a", "/x", "=x"), ("c", "pq"), ("x", "pqc")),
    Case(("put", "a", "/p", "=p"), ("c", "pq"), ("p", "qc")),
    Case(("put", "a", "/x", "=x"), ("p", "pq"), ("x", "qp")),
    Case(("put", "a", "/q", "=q"), ("c", "pq"), ("q", "pqc"), (("again", True),)),
    Case(("put", "a", "/p", "=p"), ("q", "pqc"), ("p", "pqc"), (("again", True),)),
]
OTHERS = [
    Case(("remove", "a"), ("c", "pq"), ("", "pqc")),
    Case(("remove", "a"), ("p", "pq"), ("", "qp")),
    Case(("remove", "a"), ("c", "pq"), ("", ""), (("purge", True),)),
    Case(("keep", "a", "=x", "/x"), ("c", "pq"), ("c", "pqx")),
    Case(("prune", "a", 1), ("c", "pqr"), ("c", "r")),
]


class Dying:
    """Does operations in a process that dies at one of their steps."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("crash_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def perform(self, root: Path, call: list[Any], options: dict[str, Any], die_at: int, exchange: bool) -> bool:
        """Whether it was done before it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"root": str(root), "die_at": die_at, "exchange": exchange, "call": call, "options": options}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (DIED, DONE)
        return status == DONE

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def dying() -> Iterator[Dying]:
    dying = Dying()
    yield dying
    dying.close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Sources:
    """Makes one source after the other for the same case, and has operations die in it."""

    def __init__(self, root: Path, dying: Dying):
        self.contents = Contents(root / "contents")
        self._root, self._dying, self._made = root, dying, 0

    def deaths(self, case: Case, exchange: bool, prepare: Callable[[Path], None]) -> Iterator[tuple[Path, bool]]:
        """A source after each death, and at last after the operation was done, with whether it was."""
        for die_at in range(1, 1000):
            root = self._root / f"source{die_at}"
            root.mkdir()
            prepare(root)
            call = [
                str(self.contents.path(value[1:])) if str(value).startswith("/")
                else self.contents.digest(value[1:]) if str(value).startswith("=")
                else value
                for value in case.call
            ]  # fmt: skip
            done = self._dying.perform(root, call, dict(case.options), die_at, exchange)
            yield root, done
            if done:
                assert die_at > 5, "it died on the way"
                return
        pytest.fail("it never ended")

    def state(self, source: DirectorySource) -> tuple[str, str]:
        """What the name has now, and its history; all of it whole."""
        listed = source.list().adapters.get("a")
        current = self.contents.at(source.root, "a")
        assert (listed is not None and listed.complete) == bool(current)
        assert source.look("a") == listed
        return current, self.contents.history(source.root, "a", source.revisions("a"))


@pytest.fixture
def sources(tmp_path: Path, dying: Dying) -> Sources:
    return Sources(tmp_path, dying)


def step_back(state: tuple[str, str]) -> str:
    """What was served before."""
    current, history = state
    return history.partition(current)[0][-1:] if current and current in history else history[-1:]


def leftovers(root: Path) -> list[str]:
    files = (str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    assert list((root / ".revisions" / ".changing").glob("*")) == []
    return [file for file in files if not TIDY.fullmatch(file)]


@pytest.mark.parametrize(
    ("case", "exchange"),
    [(case, exchange) for exchange in (True, False) for case in PUTS] + [(case, True) for case in OTHERS],
    ids=lambda value: str(value) if isinstance(value, Case) else "one-step" if value else "two-steps",
)
def test_the_old_or_the_new_is_there_whole(case: Case, exchange: bool, sources: Sources) -> None:
    contents = sources.contents

    def prepare(root: Path) -> None:
        contents.build(root, "a", *case.before)
        contents.build(root, "b", "y", "z")

    method = case.call[0]
    states = set()
    for root, done in sources.deaths(case, exchange, prepare):
        source = DirectorySource(root)
        state = current, history = sources.state(source)
        states.add(state)
        if done:
            assert state == case.after
        assert current in (case.before[0], case.after[0])
        assert len(set(history)) == len(history)
        if method == "prune" or dict(case.options).get("purge"):
            assert set(case.after[1]) <= set(history) <= set("".join(case.before))
        else:  # every content is still there
            assert set("".join(case.before)) <= set(current + history) | set(case.after[0])
        if method != "remove" and current:  # a step back leads where it led, or to what was just replaced
            assert step_back(state) in (step_back(case.before), step_back(case.after))
            assert current == case.before[0] or step_back(state) == step_back(case.after)
        assert contents.at(root, "b") == "y"
        assert contents.history(root, "b", source.revisions("b")) == "z"
        source.put("a", contents.path("n"), contents.digest("n"))
        assert contents.at(root, "a") == "n"
        assert leftovers(root) == []
    assert {case.before[0], case.after[0]} <= {current for current, _ in states}


def test_without_exchange_a_name_is_never_listed_as_gone(sources: Sources) -> None:
    """Not even by a server that may not finish the replacement: it lists what was there."""
    case = PUTS[2]
    between = 0
    for root, _ in sources.deaths(case, False, lambda root: sources.contents.build(root, "a", "c")):
        source = DirectorySource(root)
        source._changing = None  # type: ignore[assignment,method-assign]
        source._recover_all = lambda root: ()  # type: ignore[assignment,method-assign]
        listed = source.list().adapters["a"]
        assert listed.complete
        between += not (root / "a").exists()
    assert between, "some died between the two steps"


@pytest.mark.parametrize(
    ("call", "exchange"),
    [(("put", "a", "/x", "=x"), True), (("put", "a", "/x", "=x"), False), (("remove", "a"), True)],
    ids=["put-one-step", "put-two-steps", "remove"],
)
@pytest.mark.parametrize("what", ["link", "link to one that is kept", "incomplete", "with other files"])
def test_what_somebody_else_made_is_not_lost(
    what: str, call: tuple[str, ...], exchange: bool, sources: Sources, tmp_path: Path
) -> None:
    contents = sources.contents
    elsewhere = content(tmp_path / "elsewhere", "c")

    def prepare(root: Path) -> None:
        if what.startswith("link"):
            (root / "a").symlink_to(elsewhere)
            contents.build(root, "a", "", "pcq" if "kept" in what else "pq")
        else:
            contents.build(root, "a", "c", "pcq")
            (root / "a" / "optimizer.pt").write_text("mine")
            if what == "incomplete":
                (root / "a" / CONFIG_FILE).unlink()

    for root, done in sources.deaths(Case(call, ("c", ""), ("", "")), exchange, prepare):
        source = DirectorySource(root)
        source.list()
        history = contents.history(root, "a", source.revisions("a"))
        assert set("pq") <= set(history)
        if what.startswith("link"):
            assert contents.at(tmp_path, "elsewhere") == "c"
            assert (root / "a").is_symlink() or "c" in history
        else:
            assert [path.read_text() for path in root.rglob("optimizer.pt")] == ["mine"]
            if what == "incomplete":
                (rest,) = root.rglob("optimizer.pt")
                assert rest.with_name(WEIGHTS_FILE).exists()
        if done and what == "link to one that is kept":
            assert history == "pqc"
        source.put("a", contents.path("n"), contents.digest("n"))
        assert contents.at(root, "a") == "n"
        assert all("other-" in file for file in leftovers(root))


def test_settings_are_the_old_or_the_new_ones(sources: Sources) -> None:
    def prepare(root: Path) -> None:
        root.joinpath(".qaa-serve.json").write_text("old")

    found = set()
    for die_at in range(1, 100):
        root = sources._root / f"settings{die_at}"
        root.mkdir()
        prepare(root)
        source = DirectorySource(root)
        version = source.read_settings()[1]
        done = sources._dying.perform(root, ["write_settings", "new", version], {}, die_at, True)
        text, version = source.read_settings()
        assert source.list().settings == version
        found.add(text)
        assert done == (text == b"new") or not done
        source.write_settings(b"newer", version)
        assert leftovers(root) == []
        if done:
            break
    assert found == {b"old", b"new"}
