"""`qaa-serve adapters` against a small server: what it asks, with which key, and what it says when that fails."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
from contextlib import contextmanager, nullcontext

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed")
pytest.importorskip("fastapi", reason="the server's packages are not installed")
pytest.importorskip("psutil", reason="the server's packages are not installed")

import uvicorn
from fastapi import FastAPI, Request
from registry_support import make
from starlette.responses import JSONResponse, PlainTextResponse

from qaa_serve.adapters import digest_of
from qaa_serve.admin_cli import main
from qaa_serve.server.runfile import RunningServer, cache_root, find_server

KEY = "secret-admin"
REVISION = "one@bbbbbbbbbbbb"


def adapter(name="one", **fields):
    """An adapter as the server describes it."""
    revision = {"state": "current", "loaded": True, "pinned": False, "bytes": {"store": 1234}}
    return {
        "id": name, "state": "served", "kind": "QAA", "revision": f"{name}@bbbbbbbbbbbb",
        "bytes": {"store": 1234, "host": 0, "slot": 0}, "running": 1, "waiting": 2, "rejection": None,
        "revisions": [{"revision": f"{name}@bbbbbbbbbbbb", **revision}], **fields,
    }  # fmt: skip


def alias(name, **shares):
    """An alias as the server describes it."""
    return {"id": name, "object": "alias", "to": shares}


class Stub:
    """A server that takes note of what it is asked.

    Attributes:
        url: where it is.
        asked: (method, path, key, body) of each request.
        conditions: If-Match of each request; None if it has none.
        answer: what it answers instead of what it would.
    """

    def __init__(self, url):
        self.url = url
        self.asked = []
        self.conditions = []
        self.answer = None
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.handle, methods=["GET", "PUT", "POST", "DELETE"])

    async def handle(self, request: Request):
        kind = request.headers.get("content-type", "")
        if kind.startswith("multipart/form-data"):
            async with request.form() as form:
                body = {part: (file.filename, await file.read()) for part, file in form.items()}
        else:
            data = await request.body()
            body = json.loads(data) if data else None
        raw_path = request.scope["raw_path"].decode()
        asked = f"{raw_path}?{query}" if (query := request.scope["query_string"].decode()) else raw_path
        self.asked.append((request.method, asked, request.headers.get("authorization"), body))
        self.conditions.append(request.headers.get("if-match"))
        if self.answer is not None:
            return self.answer
        if request.headers.get("authorization") != f"Bearer {KEY}":
            error = {
                "message": "an admin key is needed",
                "type": "AuthenticationError",
                "param": None,
                "code": 401,
            }
            return JSONResponse({"error": error}, 401)
        if raw_path == "/v1/aliases":
            return {"object": "list", "data": [alias("chat", support=95, other=5), alias("more", support=1)]}
        if raw_path.startswith("/v1/aliases/"):
            return alias("chat", **{f"{REVISION}{'0' * 52}": 95, "other": 5})
        if request.method == "DELETE":
            return {"id": "one", "object": "adapter", "deleted": True}
        return {"object": "list", "data": [adapter()]} if raw_path == "/v1/adapters" else adapter()


class Server(uvicorn.Server):
    """Leaves signals alone."""

    def capture_signals(self):
        return nullcontext()


@contextmanager
def serving(stub, sock):
    server = Server(uvicorn.Config(stub.app, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[sock]),))
    thread.start()
    try:
        yield stub
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """No servers that run here, no keys of the user's, no proxy between."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("QAA_SERVE_ADMIN_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def shared():
    sock = socket.create_server(("127.0.0.1", 0))
    with serving(Stub(f"http://127.0.0.1:{sock.getsockname()[1]}"), sock) as stub:
        yield stub


@pytest.fixture
def server(shared):
    shared.asked, shared.conditions, shared.answer = [], [], None
    return shared


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "admin.key"
    file.write_text(f"ops: {KEY}\n")
    return file


@pytest.fixture
def ask(server, key_file, capsys):
    """Runs the command with a key; returns status, output and errors."""

    def ask(*arguments, key=True):
        more = ["--admin-key-file", str(key_file)] if key else []
        status = main([str(a) for a in arguments] + ["--url", server.url, *more])
        return status, *capsys.readouterr()

    return ask


@pytest.fixture
def directory(tmp_path):
    """An adapter's directory."""
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "adapter_config.json").write_bytes(b"{}")
    (place / "adapter_model.safetensors").write_bytes(b"weights")
    return place


# ------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("arguments", "method", "path", "body"),
    [
        (["list"], "GET", "/v1/adapters", None),
        (["show", "one"], "GET", "/v1/adapters/one", None),
        (["put", "one", "hf://org/repo@v1"], "PUT", "/v1/adapters/one", {"source": "hf://org/repo@v1"}),
        (["delete", "one"], "DELETE", "/v1/adapters/one", None),
        (["delete", "one", "--purge"], "DELETE", "/v1/adapters/one?purge=true", None),
        (["rollback", "one"], "POST", "/v1/adapters/one/rollback", {"revision": None}),
        (["rollback", "one", REVISION], "POST", "/v1/adapters/one/rollback", {"revision": REVISION}),
        (["pin", "one", "bbbbbbbbbbbb"], "POST", "/v1/adapters/one/pin", {"revision": "bbbbbbbbbbbb"}),
        (["unpin", "one"], "POST", "/v1/adapters/one/unpin", {"revision": None}),
        (["load", "one"], "POST", "/v1/adapters/one/load", {"revision": None}),
        (["load", "one", REVISION], "POST", "/v1/adapters/one/load", {"revision": REVISION}),
        (["aliases"], "GET", "/v1/aliases", None),
        (["alias", "chat", "one"], "PUT", "/v1/aliases/chat", {"to": "one"}),
        (["alias", "chat", REVISION], "PUT", "/v1/aliases/chat", {"to": REVISION}),
        (["alias", "chat", "one=1"], "PUT", "/v1/aliases/chat", {"to": {"one": 1}}),
        (["alias", "chat", f"{REVISION}=95", "two=5"], "PUT", "/v1/aliases/chat",
         {"to": {REVISION: 95, "two": 5}}),
        (["unalias", "chat"], "DELETE", "/v1/aliases/chat", None),
        (["show", "a/../b?c#d e"], "GET", "/v1/adapters/a%2F..%2Fb%3Fc%23d%20e", None),
    ],
)  # fmt: skip
def test_each_command_is_one_request(server, ask, arguments, method, path, body):
    status, _, errors = ask(*arguments)
    assert (status, errors) == (0, "")
    assert server.asked == [(method, path, f"Bearer {KEY}", body)]


def test_an_adapter_is_uploaded_with_both_files(server, ask, directory):
    status, output, _ = ask("put", "one", directory)
    assert (status, "one: served" in output) == (0, True)
    files = {"config": ("adapter_config.json", b"{}"), "weights": ("adapter_model.safetensors", b"weights")}
    assert server.asked == [("PUT", "/v1/adapters/one", f"Bearer {KEY}", files)]


@pytest.mark.parametrize("command", [["put", "one", "hf://org/repo"], ["delete", "one"], ["rollback", "one"]])
@pytest.mark.parametrize("revision", [REVISION, "bbbbbbbbbbbb"])
def test_a_change_may_depend_on_what_is_served(server, ask, command, revision):
    assert ask(*command)[0] == 0
    assert ask(*command, "--if-match", revision)[0] == 0
    assert server.conditions == [None, f'"{revision}"']


@pytest.mark.parametrize(
    "targets", [["one", "two"], ["one=1", "two"], ["one=half"], ["one=-1", "two=1"], ["one="]]
)
def test_shares_that_are_none_are_said_and_not_asked_for(server, ask, targets):
    status, _, errors = ask("alias", "chat", *targets)
    assert (status, server.asked) == (1, [])
    assert "has no share: write TARGET=SHARE with a whole number" in errors


def test_a_target_that_is_given_twice_is_said(server, ask):
    status, _, errors = ask("alias", "chat", "one=95", "one=5")
    assert (status, server.asked) == (1, [])
    assert "'one' is given twice" in errors


# --------------------------------------------------------------------------------------------- what is shown


def test_the_list_shows_each_adapter_with_its_use_and_why_it_is_not_served(server, ask):
    broken = adapter(
        "two", state="rejected", revision=None, kind=None, bytes=None, revisions=[],
        rejection={"reason": "[bold]r: :smile: [/x] is 0", "since": 1.0},
    )  # fmt: skip
    server.answer = JSONResponse({"data": [adapter(), broken]})
    status, output, _ = ask("list")
    assert status == 0
    for text in ("one", "served", "QAA", "bbbbbbbbbbbb", "1,234", "two", "rejected"):
        assert text in output
    assert "[bold]r: :smile: [/x]" in " ".join(output.split()), "a reason is shown as it is"
    server.answer = JSONResponse({"data": []})
    assert "no adapters" in ask("list")[1]


def test_one_adapter_is_shown_with_its_revisions(server, ask):
    kept = {
        "revision": "one@aaaaaaaaaaaa",
        "state": "kept",
        "loaded": False,
        "pinned": True,
        "bytes": {"store": 9},
    }
    one = adapter(rejection={"reason": "[broken]", "since": 1.0})
    one["revisions"].append(kept)
    server.answer = JSONResponse(one)
    assert ask("show", "one")[1] == (
        "one: served, one@bbbbbbbbbbbb\n  one@bbbbbbbbbbbb  current, loaded, 1,234 bytes\n"
        "  one@aaaaaaaaaaaa  kept, pinned, 9 bytes\n  not served: [broken]\n"
    )


def test_what_was_removed_is_said(ask):
    assert ask("delete", "one") == (0, "one is served no more\n", "")
    assert ask("unalias", "chat") == (0, "chat is served no more\n", "")


def test_aliases_are_shown_with_what_they_lead_to(server, ask):
    assert ask("aliases") == (0, "chat  support=95  other=5\nmore  support=1\n", "")
    assert ask("alias", "chat", "one") == (0, f"chat  {REVISION}=95  other=5\n", "")
    server.answer = JSONResponse({"object": "list", "data": []})
    assert ask("aliases") == (0, "no aliases\n", "")


@pytest.mark.parametrize("command", [["list"], ["show", "one"], ["delete", "one"], ["aliases"]])
def test_programs_get_the_servers_answer(server, ask, command):
    server.answer = JSONResponse({"id": "one", "data": [1], "\N{SNOWMAN}": None})
    status, output, _ = ask(*command, "--json")
    assert (status, json.loads(output)) == (0, {"id": "one", "data": [1], "\N{SNOWMAN}": None})


# ------------------------------------------------------------------------------------------------------ keys


def run_file(server, key_file, **fields):
    path = RunningServer(
        **{"url": server.url, "admin_url": server.url, "admin_key_file": key_file and str(key_file),
           "pid": os.getpid(), **fields}
    ).write()  # fmt: skip
    return path


def test_the_key_is_the_given_files_else_the_environments_else_the_one_the_server_made(
    server, ask, key_file, tmp_path, monkeypatch
):
    def key_that_was_sent():
        return server.asked[-1][2].removeprefix("Bearer ")

    made = tmp_path / "made.key"
    made.write_text("made\n")
    run_file(server, made)
    ask("list", key=False)
    assert key_that_was_sent() == "made"
    monkeypatch.setenv("QAA_SERVE_ADMIN_KEY", " from-environment\n")
    ask("list", key=False)
    assert key_that_was_sent() == "from-environment"
    ask("list")
    assert key_that_was_sent() == KEY


def test_without_a_key_nothing_is_asked_and_it_is_said_what_to_do(server, ask):
    status, output, errors = ask("list", key=False)
    assert (status, output, server.asked) == (1, "", [])
    assert (
        f"no admin key for {server.url}: no server on this machine says it is there: start one, or give" in errors
    )
    assert "--admin-key-file FILE or set QAA_SERVE_ADMIN_KEY" in errors
    assert errors.count("\n") == 1


def test_a_server_at_another_port_is_named(server, key_file, capsys):
    run_file(server, key_file)
    assert main(["list", "--url", "http://127.0.0.1:1"]) == 1
    assert server.asked == []
    assert (
        f"no server on this machine says it is there, but at {server.url}: give --url" in capsys.readouterr().err
    )


def test_a_server_whose_keys_were_given_is_found_without_a_key(server, ask):
    run_file(server, None)
    status, _, errors = ask("list", key=False)
    assert (status, server.asked, "its keys were given by hand: give" in errors) == (1, [], True)


def test_the_file_of_a_server_that_runs_no_more_gives_no_key_away(server, ask, key_file):
    process = os.fork()
    if not process:
        os._exit(0)
    os.waitpid(process, 0)
    run_file(server, key_file, pid=process)
    status, _, errors = ask("list", key=False)
    assert (status, server.asked) == (1, [])
    assert "no admin key" in errors


@pytest.mark.parametrize("content", [None, "", "secret/: secret-1\n", "a: secret-\N{SNOWMAN}\n"])
def test_a_file_without_a_key_is_said_in_one_line_without_a_key(server, ask, key_file, content):
    if content is None:
        key_file.unlink()
    else:
        key_file.write_text(content)
    status, output, errors = ask("list")
    assert (status, output, server.asked) == (1, "", [])
    assert errors.startswith(f"qaa-serve adapters: {key_file}")
    assert errors.count("\n") == 1
    assert "secret" not in errors


@pytest.mark.parametrize("key", ["secret-\N{SNOWMAN}", "secret-\xe9", "secret\n-two", "secret two"])
def test_a_key_that_no_header_can_carry_is_not_shown(server, ask, monkeypatch, key):
    monkeypatch.setenv("QAA_SERVE_ADMIN_KEY", key)
    status, _, errors = ask("list", key=False)
    assert (status, server.asked) == (1, [])
    assert "QAA_SERVE_ADMIN_KEY" in errors
    assert "secret" not in errors


# ---------------------------------------------------------------------------------------------------- failures


def test_a_refusal_is_one_line_with_the_servers_reason(server, ask, key_file):
    key_file.write_text("wrong\n")
    assert ask("list") == (1, "", "qaa-serve adapters: an admin key is needed (status 401)\n")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (JSONResponse({"error": {"message": "no such thing"}}, 404), "no such thing (status 404)"),
        (PlainTextResponse("Bad\n<b>Gateway</b>\n", 502), "Bad <b>Gateway</b> (status 502)"),
        (JSONResponse({"error": "bad gateway"}, 502), '{"error":"bad gateway"} (status 502)'),
        (JSONResponse({"error": {}}, 500), "no reason was given (status 500)"),
        (JSONResponse({"detail": "no"}, 400), '{"detail":"no"} (status 400)'),
        (JSONResponse([1], 500), "[1] (status 500)"),
        (PlainTextResponse("", 500), "no reason was given (status 500)"),
        (PlainTextResponse("<html>a web site</html>"), "<html>a web site</html> (status 200)"),
    ],
)
def test_whatever_a_server_answers_a_failure_is_one_line(server, ask, answer, message):
    server.answer = answer
    assert ask("show", "one") == (1, "", f"qaa-serve adapters: {message}\n")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "http://[::1", "http://no-such-host.invalid",
                                 "unix:/no/such.sock", "ftp://127.0.0.1"])  # fmt: skip
def test_a_server_that_is_not_there_is_said_in_one_line_with_what_to_do(key_file, capsys, url):
    assert main(["list", "--url", url, "--admin-key-file", str(key_file)]) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert errors.startswith(f"qaa-serve adapters: no server answers at {url} (")
    assert "--url" in errors
    assert KEY not in errors


def test_what_is_no_adapter_directory_is_not_uploaded(server, ask, directory):
    (directory / "adapter_model.safetensors").unlink()
    status, _, errors = ask("put", "one", directory)
    assert (status, server.asked) == (1, [])
    assert "is no adapter directory: No such file or directory" in errors
    assert "adapter_model.safetensors" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["lift"], ["show"], ["put", "one"], ["list", "--port", "5"], ["list", "x"], ["unalias"],
        ["alias", "chat"], ["rollback", "one", "--purge"], ["pin", "one", "--if-match", REVISION],
        ["move-state", "state"],
    ],
)  # fmt: skip
def test_a_wrong_command_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: qaa-serve adapters" in capsys.readouterr().err


# ------------------------------------------------------------------------- an older version's state directory


@pytest.fixture
def older(tmp_path):
    """A state directory with one upload, and an empty source."""
    state = tmp_path / "older"
    copy = make(tmp_path / "upload", 1)
    digest = digest_of(copy)
    (state / "revisions").mkdir(parents=True)
    copy.rename(state / "revisions" / f"support@{digest}")
    fields = {"current": digest, "kept": [], "source": "api", "seen": None, "pinned": True, "pinned_revisions": []}
    (state / "state.json").write_text(json.dumps({"version": 1, "adapters": {"support": fields}}))
    (tmp_path / "source").mkdir()
    return state, digest


def test_uploads_of_an_older_version_are_moved_without_a_server(older, tmp_path, capsys):
    state, digest = older
    assert main(["move-state", str(state), str(tmp_path / "source")]) == 0
    output, errors = capsys.readouterr()
    assert (output, errors) == (
        f"support: {digest[:12]} put into the source, 0 former contents kept\npinned: support\n", ""
    )  # fmt: skip
    assert digest_of(tmp_path / "source" / "support") == digest


def test_what_cannot_be_moved_is_said_in_one_line(older, tmp_path, capsys):
    state, _ = older
    for arguments, reason in (
        ([state, tmp_path / "nowhere"], "nowhere is not a directory"),
        ([tmp_path / "source", tmp_path / "source"], "is it the --state-dir of one?"),
        ([state, "no-such-store://bucket/prefix"], "no-such-store://bucket/prefix"),
    ):
        assert main(["move-state", *map(str, arguments)]) == 1
        output, errors = capsys.readouterr()
        assert (output, errors.count("\n")) == ("", 1)
        assert errors.startswith("qaa-serve adapters: ")
        assert reason in errors


# ------------------------------------------------------------------------------------- where servers are found


def test_a_server_at_a_unix_socket(tmp_path, key_file, capsys):
    path = tmp_path / "qaa.sock"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    with serving(Stub(f"unix:{path}"), sock) as stub:
        run_file(stub, key_file)
        assert main(["list", "--url", stub.url]) == 0
        assert main(["show", "one", "--url", stub.url, "--admin-key-file", str(key_file)]) == 0
    assert [path for _, path, *_ in stub.asked] == ["/v1/adapters", "/v1/adapters/one"]


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_admin_routes_elsewhere_are_found_by_the_servers_own_url(server, ask, key_file, capsys, scheme):
    admin = server.url.removeprefix("http://")
    run_file(server, key_file, url="http://127.0.0.1:8000", admin_url=f"{scheme}{admin}")
    assert main(["list"]) == 0
    assert main(["list", "--url", "localhost:8000"]) == 0
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("noted", "asked"),
    [
        ("http://0.0.0.0:8123", "http://127.0.0.1:8123"),
        ("http://0.0.0.0:8123", "http://localhost:8123/"),
        ("http://0.0.0.0:8123", "localhost:8123"),
        ("http://[::]:8123", "http://[::1]:8123"),
        ("http://127.0.0.1:8123", "https://localhost:8123"),
        ("http://10.0.0.9:8123", "http://10.0.0.9:8123/"),
        ("unix:/run/qaa.sock", "unix:/run/qaa.sock"),
    ],
)
def test_a_server_is_found_by_its_port_whatever_its_host_is_called(noted, asked):
    server = RunningServer(noted, "unix:/run/admin.sock", "/state/admin.key", os.getpid())
    path = server.write()
    assert find_server(asked) == server
    assert path.is_relative_to(cache_root())
    path.unlink()
    assert find_server(asked) is None


@pytest.mark.parametrize(
    "asked",
    ["http://127.0.0.1:8124", "http://10.0.0.9:8123", "unix:/run/8123", "8123", "", "http://127.0.0.1:8123/v1"],
)
def test_another_server_is_not_found(asked):
    RunningServer("http://127.0.0.1:8123", "x", None, os.getpid()).write()
    assert find_server(asked) is None


def test_the_note_of_a_server_is_its_owners_alone_and_the_newest_counts():
    before = os.umask(0)
    try:
        for pid in (os.getppid(), os.getpid()):
            path = RunningServer("http://127.0.0.1:8123", "x", "/state/admin.key", pid).write()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]
    assert find_server("http://127.0.0.1:8123").pid == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "[1, 2]", "{}", '{"url": 1}', "\0"])
def test_a_note_that_cannot_be_read_is_none(content):
    path = RunningServer("http://127.0.0.1:8123", "x", None, os.getpid()).write()
    path.write_text(content)
    assert find_server("http://127.0.0.1:8123") is None
