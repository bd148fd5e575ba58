"""The state directory as a cache: what is in it is what was put there, and no more than it may hold."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from registry_support import tree

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.registry import state as state_module
from qaa_serve.registry.state import NoRoomError, State, StoreError

#: Bytes of each content that is made here, and contents that a cache has room for.
SIZE, ROOM = 100, 5


def write(directory: Path, seed: int, size: int = SIZE) -> str:
    """Two files that make a content of its own for each seed; its digest. Nobody looks into them here."""
    config = f'{{"seed": {seed}}}'.encode()
    (directory / CONFIG_FILE).write_bytes(config)
    (directory / WEIGHTS_FILE).write_bytes(random.Random(seed).randbytes(size - len(config)))
    return digest_of(directory)


def put(state: State, seed: int, size: int = SIZE) -> str:
    """Add a content as a server does; its digest."""
    with state.staging(size) as staged:
        digest = write(staged, seed, size)
        assert state.add(staged, digest) == state.directory / "objects" / digest
    return digest


def on_disk(state: State) -> int:
    return sum(path.stat().st_size for path in state.directory.glob("objects/*/*"))


def damage(state: State, digest: str) -> None:
    with (state.directory / "objects" / digest / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"damaged")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state", max_bytes=ROOM * SIZE)
    yield state
    state.close()


# ------------------------------------------------------------------------------------------------ contents


def test_what_was_added_is_there_after_a_restart_too(tmp_path: Path) -> None:
    state = State(tmp_path / "state", max_bytes=1 << 20)
    digest = put(state, 1)
    path = state.get(digest)
    assert path is not None
    assert digest_of(path) == digest
    assert path.is_absolute()
    state.close()
    state = State(tmp_path / "state", max_bytes=1 << 20)
    assert state.get(digest) == path
    assert state.nbytes == SIZE
    state.close()


def test_an_unknown_content_is_not_there(state: State) -> None:
    assert state.get("0" * 64) is None


def test_what_is_no_digest_touches_nothing(state: State) -> None:
    digest = put(state, 1)
    for wrong in ("", ".", "..", "../objects", digest[:12], digest.upper()):
        with pytest.raises(ValueError, match="64 hex digits"):
            state.get(wrong)
    assert state.get(digest)


def test_the_same_content_twice_is_one_copy_that_stays_as_it_is(state: State) -> None:
    digest = put(state, 1)
    inodes = [file.stat().st_ino for file in sorted((state.directory / "objects" / digest).iterdir())]
    assert put(state, 1) == digest
    assert [file.stat().st_ino for file in sorted((state.directory / "objects" / digest).iterdir())] == inodes
    assert state.nbytes == on_disk(state) == SIZE
    assert tree(state.directory) == ["lock", "objects", *(f"objects/{p}" for p in tree(state._objects))]


@pytest.mark.parametrize("by", ["another byte", "a missing file", "a third file", "a file in its place"])
def test_a_damaged_content_is_not_served_and_can_be_added_again(state: State, by: str) -> None:
    digest = put(state, 1)
    place = state.directory / "objects" / digest

    def harm() -> None:
        if by == "another byte":
            damage(state, digest)
        elif by == "a missing file":
            (place / CONFIG_FILE).unlink()
        elif by == "a third file":
            (place / "new_embeddings.safetensors").touch()
        else:
            shutil.rmtree(place)
            place.touch()

    harm()
    assert state.get(digest) is None
    assert not place.exists()
    assert state.nbytes == 0
    put(state, 1)
    harm()
    put(state, 1)  # found to be damaged by nobody before
    assert state.get(digest) == place
    assert state.nbytes == on_disk(state) == SIZE


def test_a_staging_directory_is_new_empty_and_gone_at_the_end(state: State) -> None:
    with state.staging(10) as one, state.staging(10) as other:
        assert one != other
        assert one.parent == other.parent == state.directory
        assert not list(one.iterdir())
        write(one, 1)
    with suppress(KeyError), state.staging(10) as staged:
        write(staged, 1)
        raise KeyError
    assert tree(state.directory) == ["lock", "objects"]


def test_what_a_killed_server_left_is_cleared_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    (directory / ".staging-1").mkdir(parents=True)
    write(directory / ".staging-1", 1)
    for stranger in ("objects/notes/README", "revisions/a@1/adapter_config.json", "state.json"):
        (directory / stranger).parent.mkdir(parents=True, exist_ok=True)
        (directory / stranger).write_text("a stranger's")
    state = State(directory, max_bytes=SIZE)
    put(state, 1)
    put(state, 2)
    state.close()
    assert not (directory / ".staging-1").exists()
    for stranger in ("objects/notes/README", "revisions/a@1/adapter_config.json", "state.json"):
        assert (directory / stranger).read_text() == "a stranger's"


# ------------------------------------------------------------------------------------------------- servers


def test_two_servers_cannot_use_one_directory(tmp_path: Path, state: State) -> None:
    with state.staging(SIZE) as staged:
        with pytest.raises(StoreError, match="in use by another server: give each server its own"):
            State(state.directory, max_bytes=1)
        assert staged.is_dir()  # the second has not cleared the first one's
    state.close()
    State(state.directory, max_bytes=1).close()


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StoreError, match=r"cannot be written .*: give a directory that can"):
        State(tmp_path / "state", max_bytes=1)


@pytest.mark.parametrize("what", ["objects", ""])
def test_what_somebody_deletes_while_it_runs_is_made_anew(state: State, what: str) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    shutil.rmtree(state.directory / what)
    assert state.get(digests[0]) is None
    for seed in range(10, 10 + ROOM):
        put(state, seed)
    assert state.nbytes == on_disk(state) == ROOM * SIZE


# -------------------------------------------------------------------------------------------------- room


def test_the_longest_unused_go_first(state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.get(digests[0])
    put(state, 1)  # added again
    put(state, 10)
    put(state, 11)
    assert [state.get(digest) is not None for digest in digests] == [True, True, False, False, True]


def test_the_last_use_outlives_a_restart(tmp_path: Path, state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.get(digests[0])
    state.close()
    again = State(state.directory, max_bytes=state.max_bytes)
    put(again, 10)
    assert [again.get(digest) is not None for digest in digests] == [True, False, True, True, True]
    again.close()


def test_what_is_needed_stays(state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.needed = lambda digest: digest in digests[:3]
    with state.staging(2 * SIZE):
        assert [state.get(digest) is not None for digest in digests] == [True, True, True, False, False]
    state.needed = lambda digest: digest == digests[0]
    put(state, 10, size=4 * SIZE)
    assert [state.get(digest) is not None for digest in digests] == [True, False, False, False, False]


def test_no_room_is_said_and_costs_nothing(state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.needed = lambda digest: digest in digests[:3]
    with pytest.raises(NoRoomError, match=r"500 of 500 bytes .* needs 201: .* --state-bytes") as raised:
        state.staging(201).__enter__()
    assert raised.value.temporary
    with pytest.raises(NoRoomError, match="needs 501"):
        state.staging(501).__enter__()
    assert tree(state.directory)[:2] == ["lock", "objects"]
    assert all(map(state.get, digests))


def test_an_adapter_that_is_larger_than_was_said_takes_no_more_room_than_there_is(state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.needed = lambda digest: digest in digests[1:]
    with state.staging(10) as staged, pytest.raises(NoRoomError, match="needs 101"):
        state.add(staged, write(staged, 9, SIZE + 1))
    with state.staging() as staged:
        state.add(staged, write(staged, 9))
    assert state.nbytes == on_disk(state) == ROOM * SIZE


def test_what_is_being_staged_counts(state: State) -> None:
    for seed in range(ROOM):
        put(state, seed)
    with state.staging(2 * SIZE), state.staging(2 * SIZE) as staged:
        assert state.nbytes == SIZE
        with pytest.raises(NoRoomError), state.staging(2 * SIZE):
            pass
        state.add(staged, write(staged, 10, 2 * SIZE))  # its room is what it reserved
        assert state.nbytes == 3 * SIZE
    put(state, 11, 3 * SIZE)
    assert state.nbytes == on_disk(state) == 5 * SIZE


def test_contents_that_somebody_deleted_are_not_in_the_way(state: State) -> None:
    digests = [put(state, seed) for seed in range(ROOM)]
    state.needed = lambda digest: digest in digests
    shutil.rmtree(state.directory / "objects" / digests[2])
    put(state, 10)


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "Free some space"), (errno.EACCES, "Look at its permissions")]
)
def test_a_disk_that_takes_nothing_is_said(
    state: State, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(NoRoomError, match=advice), state.staging():
        fail()  # what fetches into it finds the disk full
    with state.staging() as staged, monkeypatch.context() as patch:
        digest = write(staged, 1)
        patch.setattr(Path, "rename", fail)
        with pytest.raises(NoRoomError, match=advice):
            state.add(staged, digest)
    monkeypatch.setattr(state_module.tempfile, "mkdtemp", fail)
    with pytest.raises(NoRoomError, match=advice), state.staging():
        pass
    assert tree(state.directory) == ["lock", "objects"]


# ----------------------------------------------------------------------------------------- many operations


class Model:
    """What a cache must hold: contents in the order of their last use, by seed."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.damaged: set[int] = set()
        self.needed: set[int] = set()

    def use(self, seed: int) -> bool:
        if seed in self.damaged or seed not in self.sizes:
            self.lose(seed)
            return False
        self.sizes[seed] = self.sizes.pop(seed)
        return True

    def lose(self, seed: int) -> None:
        self.sizes.pop(seed, None)
        self.damaged.discard(seed)

    def add(self, seed: int, size: int) -> bool:
        victims, free = [], ROOM * SIZE - sum(self.sizes.values())
        for other in self.sizes:
            if free < size and other not in self.needed:
                victims.append(other)
                free += self.sizes[other]
        if free < size:
            return False
        for victim in victims:
            self.lose(victim)
        if seed in self.damaged:
            self.lose(seed)
        self.sizes[seed] = self.sizes.pop(seed, size)
        return True


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_end_as_in_a_simple_model(tmp_path: Path, seed: int) -> None:
    choose, model, digests, sizes = random.Random(seed), Model(), {}, {}
    (tmp_path / "content").mkdir()
    for content in range(12):
        sizes[content] = choose.randrange(SIZE // 2, 2 * SIZE)
        digests[content] = write(tmp_path / "content", content, sizes[content])

    def start() -> State:
        return State(
            tmp_path / "state",
            max_bytes=ROOM * SIZE,
            needed=lambda digest: any(digests[content] == digest for content in model.needed),
        )

    state = start()
    for _ in range(300):
        content = choose.randrange(12)
        match choose.choice(["add", "add", "get", "get", "damage", "delete", "need", "restart"]):
            case "add":
                if model.add(content, sizes[content]):
                    put(state, content, sizes[content])
                else:
                    with pytest.raises(NoRoomError):
                        put(state, content, sizes[content])
            case "get":
                assert (state.get(digests[content]) is not None) == model.use(content)
            case "damage" if content in model.sizes:
                damage(state, digests[content])
                model.damaged.add(content)
            case "delete" if content in model.sizes:
                shutil.rmtree(state.directory / "objects" / digests[content])
                state.get(digests[content])
                model.lose(content)
            case "need":
                model.needed = set(choose.sample(range(12), 2))
            case "restart":
                state.close()
                state = start()
        assert state.nbytes == on_disk(state) == sum(model.sizes.values())
    state.close()


def test_a_content_that_is_added_while_a_damaged_one_is_read_is_not_deleted_with_it(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(state, 1)
    damage(state, digest)
    was_read, added = threading.Event(), threading.Event()

    def slow(place: Path) -> str:
        found = digest_of(place)
        if not was_read.is_set():
            was_read.set()
            added.wait(0.3)  # for long enough to add another
        return found

    monkeypatch.setattr(state_module, "digest_of", slow)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(state.get, digest)
        assert was_read.wait(30)
        put(state, 1)
        added.set()
        assert reading.result() is None
    assert state.get(digest)
    assert state.nbytes == on_disk(state) == SIZE


def test_many_threads_keep_to_the_limit_and_to_what_is_needed(state: State) -> None:
    """Some contents are needed: once there, they stay; others come, go, and are damaged on the way."""
    needed = [put(state, seed) for seed in (0, 1)]
    state.needed = lambda digest: digest in needed

    def work(number: int) -> int:
        choose, found = random.Random(number), 0
        for _ in range(150):
            seed = choose.randrange(8)
            match choose.choice(["add", "get", "damage", "needed"]):
                case "add":
                    try:
                        put(state, seed)
                    except NoRoomError:  # others stage as much as there is room for
                        continue
                case "get":
                    found += state.get(choose.choice(digests)) is not None
                case "damage" if (digest := digests[seed]) not in needed:
                    try:
                        damage(state, digest)
                    except OSError:
                        continue
                case "needed":
                    path = state.get(choose.choice(needed))
                    assert path is not None
                    assert digest_of(path) == path.name
            assert state.nbytes <= state.max_bytes
        return found

    place = state.directory.parent / "content"
    place.mkdir()
    digests = [write(place, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) > 0
    assert all(map(state.get, needed))
    assert state.nbytes == on_disk(state) <= state.max_bytes
    assert tree(state.directory)[:2] == ["lock", "objects"]
