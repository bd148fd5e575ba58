"""The revision store: private copies that are what was checked, whatever happens around them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from registry_support import make, make_lora, make_store, tree

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.adapters import files as adapter_files
from qaa_serve.registry import Revision, RevisionStore, StoreError, revisions_left
from qaa_serve.registry import store as store_module

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make devices")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RevisionStore]:
    store = make_store(tmp_path / "state")
    yield store
    store.close()


def copies(store: RevisionStore) -> list[str]:
    """Everything below the store's directory of revisions, hidden things too."""
    return tree(store.directory / "revisions")


def copy_of(revision: Revision) -> list[str]:
    """What the store holds if it holds this revision alone."""
    place = revision.engine_name
    return [place, f"{place}/{CONFIG_FILE}", f"{place}/{WEIGHTS_FILE}"]


# ------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("maker", [make, make_lora])
def test_what_is_admitted_is_a_copy_of_the_two_files(tmp_path: Path, store: RevisionStore, maker: Any) -> None:
    source = maker(tmp_path / "adapters" / "a")
    (source / "README.md").write_text("not served")
    revision = store.admit(source, "support")
    assert revision.name == "support"
    assert revision.digest == digest_of(source) == digest_of(revision.path)
    assert revision.path == store.directory / "revisions" / revision.engine_name
    assert copies(store) == copy_of(revision)


def test_what_happens_to_the_source_afterwards_does_not_matter(tmp_path: Path, store: RevisionStore) -> None:
    source = make(tmp_path / "a")
    revision = store.admit(source, "a")
    with (source / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"damaged")
    assert digest_of(revision.path) == revision.digest
    shutil.rmtree(source)
    assert store.recall("a", revision.digest) == revision


def test_a_base_beside_the_source_is_found(tmp_path: Path, store: RevisionStore) -> None:
    (tmp_path / "base").mkdir()
    assert store.admit(make(tmp_path / "adapters" / "a"), "a").base == str(tmp_path / "base")


def test_the_same_content_twice_is_one_copy(tmp_path: Path, store: RevisionStore) -> None:
    first = store.admit(make(tmp_path / "a"), "a")
    inodes = [file.stat().st_ino for file in sorted(first.path.iterdir())]
    again = store.admit(Path(shutil.copytree(tmp_path / "a", tmp_path / "b")), "a")
    assert again == first
    assert [file.stat().st_ino for file in sorted(first.path.iterdir())] == inodes
    assert copies(store) == copy_of(first)


def test_a_revision_is_the_same_wherever_its_content_was_read(tmp_path: Path, store: RevisionStore) -> None:
    """A base beside the source is found there only; that makes no other revision of it."""
    (tmp_path / "base").mkdir()
    first = store.admit(make(tmp_path / "adapters" / "a"), "a")
    uploaded = store.admit(Path(shutil.copytree(first.path, tmp_path / "x" / "y" / "upload")), "a")
    assert uploaded.base != first.base
    assert uploaded == first
    assert store.recall("a", first.digest) == first
    assert len({uploaded, first}) == 1


def test_a_damaged_copy_in_the_store_is_replaced(tmp_path: Path, store: RevisionStore) -> None:
    revision = store.admit(make(tmp_path / "a"), "a")
    with (revision.path / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"damaged")
    (revision.path / "more").write_text("x")
    assert store.admit(tmp_path / "a", "a") == revision
    assert digest_of(revision.path) == revision.digest
    assert copies(store) == copy_of(revision)


def test_removing_twice_is_removing(tmp_path: Path, store: RevisionStore) -> None:
    revision = store.admit(make(tmp_path / "a"), "a")
    store.remove(revision)
    store.remove(revision)
    assert copies(store) == []


def test_only_what_is_kept_stays(tmp_path: Path, store: RevisionStore) -> None:
    kept = store.admit(make(tmp_path / "a", seed=1), "a")
    store.admit(make(tmp_path / "a", seed=2), "a")
    store.keep_only([(kept.name, kept.digest)])
    assert copies(store) == copy_of(kept)


# ------------------------------------------------------------------------------------------------ refusals


def refusal(store: RevisionStore, source: Path) -> str:
    """The message with which an adapter is refused; the store is as before then."""
    before = copies(store)
    with pytest.raises(AdapterError) as caught:
        store.admit(source, "a")
    assert copies(store) == before
    return str(caught.value)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_that_leaves_the_directory_is_not_copied(tmp_path: Path, store: RevisionStore, name: str) -> None:
    source = make(tmp_path / "a")
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    assert f"{name} is a link that leaves the adapter's directory" in refusal(store, source)


def test_a_link_inside_the_directory_is_copied_as_a_file(tmp_path: Path, store: RevisionStore) -> None:
    source = make(tmp_path / "a")
    (source / WEIGHTS_FILE).rename(source / "v2.safetensors")
    (source / WEIGHTS_FILE).symlink_to("v2.safetensors")
    revision = store.admit(source, "a")
    assert not (revision.path / WEIGHTS_FILE).is_symlink()
    assert digest_of(revision.path) == revision.digest


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, store: RevisionStore, name: str) -> None:
    source = make(tmp_path / "a")
    (source / name).unlink()
    os.mkfifo(source / name)
    assert f"{name} is no regular file" in refusal(store, source)


@pytest.mark.parametrize(
    ("special", "reason"),
    [
        ("pipe", "is no regular file"),
        pytest.param("device", "is no regular file", marks=AS_ROOT),
        ("link", "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_takes_a_files_place_after_it_was_found_is_refused(
    tmp_path: Path, store: RevisionStore, special: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "a")
    locate = adapter_files._locate

    def locate_and_swap(directory: Path, name: str) -> Path:
        place = locate(directory, name)
        if name == WEIGHTS_FILE:
            place.unlink()
            if special == "pipe":
                os.mkfifo(place)
            elif special == "device":
                os.mknod(place, 0o20644, os.makedev(1, 5))  # /dev/zero, which never ends
            else:
                place.symlink_to("/etc/passwd")
        return place

    monkeypatch.setattr(adapter_files, "_locate", locate_and_swap)
    assert f"{WEIGHTS_FILE} {reason}" in refusal(store, source)


@AS_ROOT
def test_a_device_is_refused(tmp_path: Path, store: RevisionStore) -> None:
    source = make(tmp_path / "a")
    (source / WEIGHTS_FILE).unlink()
    os.mknod(source / WEIGHTS_FILE, 0o20644, os.makedev(1, 5))
    assert f"{WEIGHTS_FILE} is no regular file" in refusal(store, source)


def test_a_huge_file_is_refused_before_it_is_copied(tmp_path: Path, store: RevisionStore) -> None:
    """A sparse one: it takes no space where it is, and all there is once it is copied."""
    source = make(tmp_path / "a")
    os.truncate(source / WEIGHTS_FILE, 1 << 40)
    assert f"{WEIGHTS_FILE} has 1,099,511,627,776 bytes; at most 65,536 are read" in refusal(store, source)


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "a")
    read = adapter_files._read_chunk

    def read_and_grow(file: Any, name: str) -> bytes:
        if name == WEIGHTS_FILE:
            with (source / name).open("ab") as more:
                more.write(bytes(40_000))
        return read(file, name)

    monkeypatch.setattr(adapter_files, "_read_chunk", read_and_grow)
    assert f"{WEIGHTS_FILE} grew beyond 65,536 bytes while it was read" in refusal(store, source)


def test_a_damaged_adapter_is_refused(tmp_path: Path, store: RevisionStore) -> None:
    source = make_lora(tmp_path / "a", value=float("nan"))
    assert "NaN" in refusal(store, source)


# --------------------------------------------------------------------------------------------------- room


def size(adapter: Path) -> int:
    return (adapter / WEIGHTS_FILE).stat().st_size


def test_the_store_takes_as_many_bytes_as_it_may_and_no_more(tmp_path: Path) -> None:
    adapters = [make(tmp_path / "adapters" / str(seed), seed) for seed in range(3)]
    room = size(adapters[0]) + size(adapters[1])
    store = make_store(tmp_path / "state", max_bytes=room)
    revisions = [store.admit(adapter, "a") for adapter in adapters[:2]]
    assert store.nbytes() == room
    message = refusal(store, adapters[2])
    assert f"has {room:,} of {room:,} bytes in use and the adapter needs {size(adapters[2]):,}" in message
    assert "larger --state-bytes" in message
    assert store.admit(adapters[1], "a") == revisions[1], "what is there already takes no more"
    with (revisions[1].path / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"damaged")
    assert store.admit(adapters[1], "a") == revisions[1], "what replaces a damaged copy takes no more"
    store.remove(revisions[0])
    store.admit(adapters[2], "a")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here, so it cannot be filled either")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_nothing_behind_and_says_what_to_do(tmp_path: Path, small_disk: Path) -> None:
    store = make_store(small_disk / "state", max_bytes=1 << 30, max_adapter_bytes=1 << 30)
    first = store.admit(make(tmp_path / "a"), "a")
    store.write_state({"adapters": 1})
    (small_disk / "other").write_bytes(bytes((1 << 20) - 64 * 1024))
    large = make(tmp_path / "large")
    os.truncate(large / WEIGHTS_FILE, 1 << 19)
    message = refusal(store, large)
    assert "No space left on device" in message
    assert "Free some space there, or give another --state-dir" in message
    with pytest.raises(OSError, match="No space left"):
        store.write_state({"adapters": "x" * (1 << 19)})
    assert store.read_state() == {"adapters": 1}
    assert copies(store) == copy_of(first)
    (small_disk / "other").unlink()
    assert store.admit(make(tmp_path / "b"), "b").name == "b"
    store.close()


def test_a_write_that_fails_leaves_nothing_behind_and_says_what_to_do(
    tmp_path: Path, store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, without one."""

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    source = make(tmp_path / "a")
    monkeypatch.setattr(Path, "rename", fail)
    assert "No space left on device. Free some space there, or give another --state-dir" in refusal(store, source)


# -------------------------------------------------------------------------------------- taking hold, restart


def test_a_second_store_on_the_same_directory_is_refused(tmp_path: Path, store: RevisionStore) -> None:
    with pytest.raises(StoreError, match=r"state is in use by another server: give each server its own"):
        make_store(store.directory)
    store.close()
    make_store(store.directory).close()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be written \(Not a directory\): give a directory that can"):
        make_store(tmp_path / "file" / "state")


def test_what_a_killed_server_left_half_done_is_removed(tmp_path: Path, store: RevisionStore) -> None:
    revision = store.admit(make(tmp_path / "a"), "a")
    store.write_state({"adapters": {}})
    for leftover in (store.directory / "revisions" / ".incoming-x", store.directory / ".upload-y"):
        make(leftover)
    store.close()
    again = make_store(store.directory)
    assert copies(again) == copy_of(revision)
    assert sorted(os.listdir(again.directory)) == ["lock", "revisions", "state.json"]
    assert again.read_state() == {"adapters": {}}
    assert revisions_left(again.directory, 1 << 30) == [revision]
    again.close()


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_recalling_finds_damage(tmp_path: Path, store: RevisionStore, name: str, damage: str) -> None:
    revision = store.admit(make(tmp_path / "a"), "a")
    assert store.recall("a", revision.digest) == revision
    file = revision.path / name
    sound = file.read_bytes()
    if damage == "changed":  # still a valid adapter, but another one
        file.write_bytes(sound.replace(b"16.0", b"17.0") if name == CONFIG_FILE else sound[:-1] + b"\x3e")
        assert file.read_bytes() != sound
    elif damage == "cut":
        file.write_bytes(sound[:-3])
    else:
        file.unlink()
    with pytest.raises(AdapterError):
        store.recall("a", revision.digest)
    assert revisions_left(store.directory, 1 << 30) == []


def test_the_state_is_replaced_in_one_step(store: RevisionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_state({"n": 1})
    replace = Path.replace
    before: list[object] = []

    def look_and_replace(path: Path, target: Path) -> Path:
        before.append(store.read_state())
        return replace(path, target)

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", look_and_replace)
    store.write_state({"n": 2})
    assert (before, store.read_state()) == ([{"n": 1}], {"n": 2})
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.write_state({"n": 3})
    assert store.read_state() == {"n": 2}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 200_000])
def test_a_state_that_cannot_be_read_is_no_state(store: RevisionStore, content: bytes) -> None:
    (store.directory / "state.json").write_bytes(content)
    assert store.read_state() is None
    aside = store.set_state_aside()
    assert aside is not None
    assert aside.read_bytes() == content
    assert store.set_state_aside() is None


def test_a_state_of_a_newer_version_is_not_read(store: RevisionStore) -> None:
    store.write_state({"a": {}})
    file = store.directory / "state.json"
    assert store.read_state() == {"a": {}}
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    assert store.read_state() is None


def test_a_store_that_was_deleted_is_made_anew(tmp_path: Path, store: RevisionStore) -> None:
    first = store.admit(make(tmp_path / "a"), "a")
    shutil.rmtree(store.directory)
    assert store.nbytes() == 0
    with pytest.raises(AdapterError):
        store.recall("a", first.digest)
    store.remove(first)
    store.keep_only([])
    store.write_state({"n": 1})
    assert store.read_state() == {"n": 1}
    again = store.admit(tmp_path / "a", "a")
    assert again == first
    assert copies(store) == copy_of(again)


# --------------------------------------------------------------------------- several threads, older versions


def test_a_copy_that_an_older_version_left_is_found_and_used(tmp_path: Path, store: RevisionStore) -> None:
    """It named the directories by 12 digits."""
    revision = store.admit(make(tmp_path / "a"), "a")
    older = revision.path.rename(store.directory / "revisions" / revision.revision)
    assert store.recall("a", revision.digest).path == older
    assert store.admit(tmp_path / "a", "a").path == older
    assert [found.path for found in revisions_left(store.directory, 1 << 30)] == [older]
    store.keep_only([("a", revision.digest)])
    assert older.exists()
    (older / WEIGHTS_FILE).write_bytes(b"damaged")
    assert store.admit(tmp_path / "a", "a").path == revision.path
    assert store.recall("a", revision.digest).path == revision.path


def test_two_contents_with_the_same_12_digits_have_a_copy_each(
    tmp_path: Path, store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {seed: digest_of(make(tmp_path / str(seed), seed)) for seed in (1, 2)}
    alike = {digest: "0" * 12 + digest[12:] for digest in digests.values()}
    real = adapter_files.digest_of

    def same_beginning(revision: Revision) -> Revision:
        return dataclasses.replace(revision, digest=alike[revision.digest])

    read = store_module.read_revision
    monkeypatch.setattr(
        store_module, "read_revision", lambda *args, **kwargs: same_beginning(read(*args, **kwargs))
    )
    monkeypatch.setattr(store_module, "digest_of", lambda place: alike[real(place)])
    first = store.admit(tmp_path / "1", "a")
    older = first.path.rename(store.directory / "revisions" / "a@000000000000")
    second = store.admit(tmp_path / "2", "a")
    assert first.revision == second.revision
    assert second.path != older
    assert store.recall("a", first.digest).path == older
    assert store.recall("a", second.digest) == second
    store.remove(second)
    assert store.admit(tmp_path / "1", "a").path == older


def test_threads_that_copy_at_once_do_not_overfill_the_store(tmp_path: Path) -> None:
    sources = [make(tmp_path / f"n{i}", i) for i in range(16)]
    size = (sources[0] / WEIGHTS_FILE).stat().st_size
    store = make_store(tmp_path / "state", max_bytes=5 * size)

    def admit(source: Path) -> Revision | None:
        try:
            return store.admit(source, source.name)
        except AdapterError:
            return None

    with ThreadPoolExecutor(8) as threads:
        admitted = [revision for revision in threads.map(admit, sources) if revision is not None]
    assert len(admitted) == 5
    assert store.nbytes() == 5 * size
    store.remove(admitted[0])
    assert admit(sources[0]) is not None
    store.close()
