"""Paths in admin requests: inside the adapters directory, wherever links lead, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from qaa_serve.server.admin import path_inside
from qaa_serve.server.errors import RefusedError


@pytest.fixture
def root(tmp_path):
    """An adapters directory with an adapter, a file and links, beside what is nobody's business."""
    root = tmp_path / "adapters"
    (root / "one" / "deep").mkdir(parents=True)
    (root / "file").write_text("x")
    (root / "..one").mkdir()
    (root / "with space").mkdir()
    (tmp_path / "secret" / "inner").mkdir(parents=True)
    (tmp_path / "adapters-too").mkdir()
    links = {
        "in": root / "one", "out": tmp_path / "secret", "up": Path(".."), "self": root, "loop": root / "loop",
        "loop-a": root / "loop-b", "loop-b": root / "loop-a", "nowhere": root / "gone", "far": Path("/etc"),
        "chain": root / "out",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    return root


def refusal(root, text):
    """The status and the message of a refusal."""
    with pytest.raises(RefusedError) as caught:
        path_inside(root, text)
    return caught.value.status, caught.value.message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one", "one"),
        ("one/", "one"),
        ("./one", "one"),
        ("one/.", "one"),
        ("one/deep", "one/deep"),
        ("one/../one", "one"),
        ("one//deep", "one/deep"),
        ("in", "one"),
        ("in/deep", "one/deep"),
        ("self/one", "one"),
        ("..one", "..one"),
        ("with space", "with space"),
        ("{root}/one", "one"),
        ("{root}/../adapters/one", "one"),
        ("../adapters/one", "one"),
    ],
)
def test_a_directory_inside_is_taken_with_its_links_followed(root, text, place):
    assert path_inside(root, text.format(root=root)) == root / place


@pytest.mark.parametrize(
    "text",
    ["..", "../", "../secret", "../secret/inner", "one/../../secret", "/", "/etc", "/etc/passwd", "//etc", "out",
     "out/", "out/inner", "chain", "up", "up/secret", "in/../../secret", "far", "far/ssl", "{root}/../secret",
     "{root}-too", "../adapters-too", "self/../secret", "../../../../../../../../etc", "/proc/self/cwd",
     "/dev/fd/0", "../no-such-secret", "out/no-such"],
)  # fmt: skip
def test_what_is_not_inside_is_refused_whether_or_not_it_is_there(root, text):
    status, message = refusal(root, text.format(root=root))
    assert status == 403
    assert "not inside the adapters directory" in message
    assert str(root.parent) not in message or "{root}" in text, "it does not say where things are"


@pytest.mark.parametrize("text", ["", ".", "./", "self", "one/..", "{root}", "{root}/", "self/self/."])
def test_the_directory_itself_is_no_adapter(root, text):
    assert refusal(root, text.format(root=root))[0] == 403


@pytest.mark.parametrize(
    "text", ["file", "no-such", "nowhere", "loop", "loop-a", "loop/one", "file/one", "one/no-such"]
)
def test_what_is_inside_and_no_directory_is_not_found(root, text):
    assert refusal(root, text)[0] == 404


@pytest.mark.parametrize(
    "text",
    [
        "\N{ONE DOT LEADER}\N{ONE DOT LEADER}/secret",
        "\N{TWO DOT LEADER}/secret",
        "..\N{FULLWIDTH SOLIDUS}secret",
        "..\N{DIVISION SLASH}secret",
        "..\N{FRACTION SLASH}secret",
        "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/secret",
        "..\\secret",
        "%2e%2e/secret",
        "%2e%2e%2fsecret",
        "..;/secret",
        "~root",
        "~",
        "$HOME",
        "file:///etc",
        "one\N{RIGHT-TO-LEFT OVERRIDE}",
        " ..",
        ".. ",
        "...",
    ],
)
def test_look_alikes_are_names_like_any_other(root, text):
    assert refusal(root, text)[0] == 404


@pytest.mark.parametrize("text", ["one\0", "\0", "one\0/../../secret", "/etc\0"])
def test_nul_is_refused(root, text):
    assert refusal(root, text) == (400, "a path cannot hold a NUL character")


@pytest.mark.parametrize(
    "text", ["x" * 300, "x" * 100_000, "one/" * 2000, "../" * 3000, "one/../" * 1000 + "one/" * 2000]
)
def test_very_long_paths_are_refused(root, text):
    assert refusal(root, text)[0] in (400, 403, 404)


def test_half_of_a_surrogate_pair_is_refused_and_can_be_said(root):
    status, message = refusal(root, "\ud800")
    assert status in (400, 404)
    message.encode()


@pytest.mark.parametrize("text", ["one", "/", ""])
def test_without_an_adapters_directory_no_path_is_taken(text):
    status, message = refusal(None, text)
    assert status == 403
    assert "--adapters" in message


def test_the_adapters_directory_may_itself_be_a_link(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    assert path_inside(link, "one") == root / "one"
    assert path_inside(link, f"{link}/one") == root / "one"
    assert refusal(link, "../secret")[0] == 403


def test_an_adapters_directory_that_is_gone_is_an_answer(root, tmp_path):
    assert refusal(tmp_path / "gone", "one")[0] == 404


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
def test_a_directory_that_may_not_be_looked_into_is_an_answer(root):
    (root / "one").chmod(0)
    try:
        assert refusal(root, "one/deep")[0] in (400, 404)
    finally:
        (root / "one").chmod(0o700)
