"""Keys: their files, who they belong to, what they are for, and that none is ever shown."""

from __future__ import annotations

import asyncio
import logging
import os
import stat

import pytest

from qaa_serve.server import keys as module
from qaa_serve.server.keys import (
    KeyFileError,
    KeyRing,
    KeySources,
    first_key,
    make_key,
    read_admin_keys,
    read_client_keys,
    write_key,
)

DEADLINE_S = 60


def ring_of(keys):
    return KeyRing(keys, keys)


# -------------------------------------------------------------------------------------------------- the ring


@pytest.mark.parametrize("key", [None, "", "wrong", "C", "c ", "sk-é", "\udcff", "x" * 100_000])
def test_what_is_no_key_is_nobodys(key):
    ring = KeyRing([make_key("c")], [make_key("a")])
    assert ring.client(key) is None
    assert ring.admin(key) is None


def test_a_key_is_found_among_many_and_for_its_role_alone():
    clients = [make_key(f"c{n}", f"client-{n}") for n in range(1000)]
    ring = KeyRing(clients, [make_key("a", "admin")])
    assert ring.client("c777").name == "client-777"
    assert ring.admin("a").name == "admin"
    assert ring.client("a") is None
    assert ring.admin("c777") is None


def test_a_ring_knows_whether_it_guards_clients_and_whether_they_are_several():
    one, two = make_key("1"), make_key("2")
    for clients, guards, several in (((), False, False), ((one,), True, False), ((one, two), True, True)):
        ring = KeyRing(clients, [one, two])
        assert (ring.guards_clients, ring.has_several_clients) == (guards, several)
    ring.replace([], [])
    assert (ring.guards_clients, ring.client("1"), ring.admin("1")) == (False, None, None)


def test_a_key_without_a_name_is_named_after_its_hash():
    key = make_key("top-secret")
    assert key.name == make_key("top-secret").name != make_key("other-secret").name
    assert key.name == f"key-{key.digest.hex()[:8]}"
    assert make_key("top-secret", "team").name == "team"


def test_a_ring_never_shows_a_key():
    key = make_key("top-secret", "team", ["one"])
    sources = KeySources(clients=(key,), admins=(key,))
    shown = repr(key) + str(key) + repr(sources) + repr(vars(KeyRing([key], [key]))) + repr(KeyRing([key], [key]))
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("models", "allowed", "not_allowed"),
    [
        (None, ["one", "", "anything@aaaaaaaaaaaa"], []),
        ([], [], ["one", ""]),
        (["one"], ["one", "one@aaaaaaaaaaaa"], ["One", "one ", "two", "two@one", "@one", ""]),
        (["team-*"], ["team-", "team-a", "team-a@b"], ["team", "a-team-b"]),
        (["t??", "[!o]x"], ["two", "ax"], ["ox", "to"]),
    ],
)
def test_a_key_is_for_what_its_patterns_match(models, allowed, not_allowed):
    key = make_key("k", models=models)
    assert [name for name in (*allowed, *not_allowed) if key.allows(name)] == allowed


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_of_clients_keys_with_and_without_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        "# clients\n\n  first   # all models\nsec#ond  one  team-*\t two # and no more\n"
        "third #one\n\tfourth\tone#1\r\n#fifth one\nteam-a: sixth\nTeam.B_2@x:  seventh one # mine\n"
    )
    ring = ring_of(read_client_keys(file))
    models = {key: ring.client(key).models for key in ("first", "sec#ond", "third", "fourth", "sixth", "seventh")}
    assert models == {
        "first": None, "sec#ond": ("one", "team-*", "two"), "third": None, "fourth": ("one#1",), "sixth": None,
        "seventh": ("one",),
    }  # fmt: skip
    names = {key: ring.client(key).name for key in models}
    assert (names["sixth"], names["seventh"]) == ("team-a", "Team.B_2@x")
    assert names["first"] == make_key("first").name
    for key in ("#", "fifth", "#fifth", "sec", "one", "", "team-a", "team-a:", "mine"):
        assert ring.client(key) is None


def test_a_colon_without_a_space_is_part_of_the_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text("a:b one\n")
    assert ring_of(read_client_keys(file)).client("a:b").models == ("one",)


def test_a_file_of_admins_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# admins\nfirst # mine\nops: sec#ond\n")
    ring = ring_of(read_admin_keys(file))
    assert ring.admin("sec#ond").name == "ops"
    assert ring.admin("first").models is None
    assert first_key(file) == "first"


def test_a_file_with_a_byte_order_mark_begins_with_its_first_key(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert ring_of(read_client_keys(file)).client("first") is not None
    assert first_key(file) == "first"


WRONG = {
    "missing": None,
    "empty": b"",
    "comments alone": b"\n \n# secret\n",
    "no text": b"secret\xff\n",
    "a name alone": b"first\nsecret:\n",
    "a bad name": b"se/cret: secret\n",
    "a long name": b"x" * 129 + b": secret\n",
    "a name of a label": b"other: secret\n",
    "another": b"unknown: secret\n",
    "no name before the colon": b": secret\n",
    "two of one name": b"a: secret-1\na: secret-2\n",
    "a key twice": b"a: secret\nb: secret one\n",
    "a key twice without names": b"secret\nsecret\n",
    "a key that no header can carry": "a: secret-\N{SNOWMAN}\n".encode(),
}


@pytest.mark.parametrize("read", [read_client_keys, read_admin_keys])
@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_of_keys_is_said_without_a_key(tmp_path, read, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(KeyFileError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_line_that_is_wrong_is_named_by_its_number(tmp_path):
    file = tmp_path / "keys"
    file.write_text("first\n# two\nthree/: secret\n")
    with pytest.raises(KeyFileError, match="line 3: write NAME: KEY or KEY alone"):
        read_client_keys(file)


def test_an_admins_key_has_no_models(tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret one\n")
    with pytest.raises(KeyFileError, match="one admin key a line") as caught:
        read_admin_keys(file)
    assert "secret" not in str(caught.value)


def test_a_directory_is_no_file_of_keys(tmp_path):
    with pytest.raises(KeyFileError, match="IsADirectoryError"):
        read_client_keys(tmp_path)


def test_keys_of_files_and_given_ones_count_together(tmp_path):
    (tmp_path / "clients").write_text("a: one\n")
    (tmp_path / "admins").write_text("b: two\n")
    sources = KeySources(tmp_path / "clients", tmp_path / "admins", (make_key("three"),), (make_key("four"),))
    ring = KeyRing(*sources.read())
    assert all(map(ring.client, ("one", "three")))
    assert all(map(ring.admin, ("two", "four")))
    assert not any(map(ring.client, ("two", "four")))
    assert KeySources().read() == ([], [])


# ------------------------------------------------------------------------------------------ while it runs


def follow(monkeypatch, sources, test):
    """Run a test beside a ring that follows its files, which are looked at all the time."""
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.001)

    async def main():
        ring = KeyRing([make_key("of the start")])
        task = asyncio.create_task(sources.follow(ring, logging.getLogger("test")))
        try:
            await test(ring)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


def replace(file, text):
    beside = file.with_suffix(".new")
    beside.write_text(text)
    beside.replace(file)


def test_keys_are_read_again_when_a_file_changes(tmp_path, monkeypatch, caplog):
    clients, admins = tmp_path / "clients", tmp_path / "admins"
    clients.write_text("secret-1 one\n")
    admins.write_text("secret-2\n")

    async def test(ring):
        await until(lambda: ring.client("secret-1"))
        assert ring.client("of the start") is None, "the files may have changed since the start"
        replace(clients, "secret-1 two\nsecret-3\n")
        await until(lambda: ring.client("secret-3"))
        assert ring.client("secret-1").models == ("two",)
        with admins.open("a") as file:  # in place
            file.write("ops: secret-4\n")
        await until(lambda: ring.admin("secret-4"))
        replace(clients, "secret-3\n")
        await until(lambda: not ring.client("secret-1"))
        assert ring.client("given") is not None
        assert "2 of clients, 2 of admins" in caplog.text
        assert "secret" not in caplog.text

    with caplog.at_level(logging.INFO):
        follow(monkeypatch, KeySources(clients, admins, (make_key("given"),)), test)


@pytest.mark.parametrize("content", ["", "secret/: secret-1\n", "secret-1\nsecret-1\n", None])
def test_keys_stay_as_they_were_while_a_file_cannot_be_used_and_it_is_said_once(
    tmp_path, monkeypatch, caplog, content
):
    file = tmp_path / "clients"
    file.write_text("secret-1\n")

    async def test(ring):
        await until(lambda: ring.client("secret-1"))
        if content is None:
            file.unlink()
        else:
            replace(file, content)
        await until(lambda: "stay as they were" in caplog.text)
        await asyncio.sleep(0.02)
        assert ring.client("secret-1") is not None
        assert caplog.text.count("stay as they were") == 1
        assert str(file) in caplog.text
        replace(file, "secret-2\n")
        await until(lambda: ring.client("secret-2"))
        assert ring.client("secret-1") is None
        assert "secret" not in caplog.text

    follow(monkeypatch, KeySources(file), test)


def test_without_files_there_is_nothing_to_follow(monkeypatch):
    async def test(ring):
        await asyncio.sleep(0.005)
        assert ring.client("of the start") is not None

    follow(monkeypatch, KeySources(clients=(make_key("k"),)), test)


# ---------------------------------------------------------------------------------------------------- writing


def test_a_key_is_written_for_its_owner_alone_whatever_was_there_before(tmp_path):
    file = tmp_path / "state" / "deep" / "admin.key"
    before = os.umask(0)
    try:
        write_key(file, "first")
        assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("first\n", 0o600)
        file.chmod(0o644)
        file.with_name(".admin.key.new").write_text("left behind")
        write_key(file, "second")
    finally:
        os.umask(before)
    assert (first_key(file), stat.S_IMODE(file.stat().st_mode)) == ("second", 0o600)
    assert os.listdir(file.parent) == ["admin.key"]


def test_a_key_is_not_written_where_a_link_leads(tmp_path):
    file, target = tmp_path / "admin.key", tmp_path / "target"
    target.write_text("somebody's")
    file.symlink_to(target)
    file.with_name(".admin.key.new").symlink_to(target)
    write_key(file, "secret")
    assert target.read_text() == "somebody's"
    assert not file.is_symlink()
