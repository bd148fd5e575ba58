"""Rights, limits and what is said of the server, as clients and operators meet them on a real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from server_process import BIN, ServerProcess
from tiny_models import ATTENTION, make_lora, make_model, make_qaa

WIDE, NARROW, STRANGER = "wide-secret-1", "narrow-secret-2", "stranger-secret-3"
ADMIN = "admin-secret-4"
#: Of one model: sequences that run, that wait, and what one key of several may have of both.
RUNNING, WAITING, SHARE = 4, 8, 9
CONNECTIONS = 40
ORIGIN = {"Origin": "http://page.example"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rules")
    base = make_model(root / "base", "llama")
    make_qaa(root / "adapters" / "one", base, ATTENTION["llama"], 1)
    make_lora(root / "adapters" / "two", base, ATTENTION["llama"], 2)
    (root / "clients").write_text(f"wide: {WIDE}\nnarrow: {NARROW} one\n")
    (root / "admins").write_text(f"# who is on duty\nnight-shift: {ADMIN}\n")
    return root


@pytest.fixture(scope="module")
def server(root):
    """Admin routes on a socket of their own."""
    server = ServerProcess(
        [
            "qaa-serve", "--adapters", str(root / "adapters"), "--state-dir", str(root / "state"),
            "--api-key-file", str(root / "clients"), "--admin-key-file", str(root / "admins"),
            "--admin-listen", f"unix:{root / 'admin.sock'}", "--audit-log", str(root / "audit.jsonl"),
            "--adapter-max-running", str(RUNNING), "--adapter-max-queue", str(WAITING), "--body-timeout", "2",
            "--max-connections", str(CONNECTIONS), "--log-format", "json", "--dtype", "float32",
            "--allowed-origins", json.dumps([ORIGIN["Origin"]]),
            "--kv-cache-memory-bytes", "64M",
        ],
        root / "server.log",
        forked=True,
        environment={"XDG_CACHE_HOME": str(root / "cache"), "VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    )  # fmt: skip
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def admin(root):
    transport = httpx.HTTPTransport(uds=str(root / "admin.sock"))
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url="http://localhost", transport=transport, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def wait_until(condition, limit_s: float = 30):
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def error_of(answer: httpx.Response) -> dict:
    """The error in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, answer.text
    assert error["code"] == answer.status_code
    return error


# ------------------------------------------------------------------------------------------------- models


def test_models_can_be_retrieved_and_keep_their_creation_time(server, admin):
    client = server.client(WIDE)
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"base", "one", "two"}, "the base is listed once"
    time.sleep(1.1)  # `created` counts seconds
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
    revision = admin.get("/v1/adapters/one").json()["revision"]
    kept = client.models.retrieve(revision)
    assert (kept.id, kept.created) == (revision, listed["one"].created)
    for name in ("nobody", "one@000000000000", "one/x"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_a_key_sees_its_models_alone_and_nobody_sees_the_disk(server, root):
    narrow = server.client(NARROW)
    assert [model.id for model in narrow.models.list()] == ["one"]
    for name in ("two", "base"):
        with pytest.raises(openai.NotFoundError):
            narrow.models.retrieve(name)
    said = []
    for name in ("two", "base", "nobody"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            narrow.completions.create(model=name, prompt="t5")
        said.append(caught.value.body["message"].replace(name, "NAME"))
    assert len(set(said)) == 1, "what there is and what there is not look alike"
    with pytest.raises(openai.NotFoundError) as caught:
        server.client(WIDE).completions.create(model="nobody", prompt="t5")
    assert not re.search(r"\bone\b|\btwo\b", caught.value.body["message"])
    for key in (WIDE, NARROW):
        assert str(root) not in httpx.get(f"{server.url}/v1/models", headers=bearer(key)).text


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/nowhere", 404), ("POST", "/chat/completions", 404),
     ("DELETE", "/v1/models", 405), ("GET", "/v1/chat/completions", 405), ("GET", "/tokenizer_info", 404),
     ("PUT", "/health", 405)],
)  # fmt: skip
def test_unknown_routes_and_methods_are_answered_as_openai_does(http, method, path, status):
    answer = http.request(method, path, headers=bearer(WIDE) | {"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert path in error_of(answer)["message"]


def test_every_answer_has_a_request_id_and_refusals_can_be_read_by_web_pages(http):
    ask = {"model": "one", "prompt": "t5", "max_tokens": 1}
    answers = {
        200: http.post("/v1/completions", json=ask, headers=bearer(WIDE) | ORIGIN),
        401: http.post("/v1/completions", json=ask, headers=ORIGIN),
        403: http.post("/v1/completions", json=ask | {"model": "two"}, headers=bearer(NARROW) | ORIGIN),
        404: http.post("/v1/completions", json=ask | {"model": "nobody"}, headers=bearer(WIDE) | ORIGIN),
        413: http.post("/v1/completions", content=b" " * (33 << 20), headers=bearer(WIDE) | ORIGIN),
    }
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert len(answer.headers["x-request-id"]) == 32
    mine = http.get("/v1/models", headers=bearer(WIDE) | {"x-request-id": "mine"})
    assert mine.headers.get_list("x-request-id") == ["mine"]
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert http.options("/v1/completions", headers=ORIGIN | asked).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"\xef\xbb\xbf" + b'{"model": "one", "prompt": "t5"}', '{"model": "one", "prompt": "t5"}'.encode("utf-16"),
     '{"model": "one", "prompt": "t5"}'.encode("utf-16-le"), b'{"model": "one", "prompt": "\\ud800"}',
     b'{"model": "one", "prompt": "t5", "temperature": NaN}', b'{"model": "one", "prompt": "t5",}',
     b'{"model": ["one"], "prompt": "t5"}', b'[{"model": "one"}]'],
)  # fmt: skip
def test_a_body_that_two_readers_could_read_differently_is_a_plain_400(http, body):
    answer = http.post(
        "/v1/completions", content=body, headers=bearer(NARROW) | {"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert re.search("not JSON in UTF-8|not what the route takes", error_of(answer)["message"])


def test_what_vllm_refuses_by_a_setting_says_which_option_turns_it_on(server):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        server.client(WIDE).chat.completions.create(
            model="one", messages=[{"role": "user", "content": "t5"}], tools=[tool], tool_choice="auto"
        )
    for option in ("--enable-auto-tool-choice", "--tool-call-parser"):
        assert option in caught.value.body["message"]


# ------------------------------------------------------------------------------------------------- limits


def test_prompts_times_n_are_what_is_limited(server):
    client = server.client(WIDE)
    answer = client.completions.create(model="one", prompt=["t5"] * 3, n=3, max_tokens=2, temperature=0.5)
    assert len(answer.choices) == SHARE
    for prompts, n in ((50_000, 8), (SHARE + 1, 1), (1, SHARE + 1)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="one", prompt=["t5"] * prompts, n=n, max_tokens=1)
        assert f"{prompts * n:,} sequences" in caught.value.body["message"]
    batch = [[{"role": "user", "content": "t5"}]] * (SHARE + 1)
    answer = httpx.post(
        f"{server.url}/v1/chat/completions/batch",
        json={"model": "one", "messages": batch, "max_tokens": 1}, headers=bearer(WIDE), timeout=60,
    )  # fmt: skip
    assert answer.status_code == 400
    assert f"{SHARE + 1:,} sequences" in error_of(answer)["message"]


def test_sequences_beyond_the_seats_wait_and_beyond_the_queue_are_429(server, admin):
    client = server.client(WIDE)

    def counts():
        found = admin.get("/v1/adapters/one").json()
        return found["running"], found["waiting"]

    with server.held():
        asking = threading.Thread(
            target=lambda: client.completions.create(model="one", prompt=["t5"] * SHARE, max_tokens=2)
        )
        asking.start()
        # One key has three quarters of the seats; the rest of its prompts wait in the line, not in the engine.
        wait_until(lambda: counts() == (3, SHARE - 3))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="one", prompt="t5", max_tokens=1)
        assert "your key" in caught.value.body["message"]
        assert caught.value.response.headers["retry-after"] == "1"
    # Another key has a seat all the same.
    assert server.client(NARROW).completions.create(model="one", prompt="t5", max_tokens=1).choices
    asking.join(60)
    assert not asking.is_alive()
    wait_until(lambda: counts() == (0, 0))


def test_half_a_body_holds_nothing_and_ends_in_time(server, admin):
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {WIDE}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        '{"model": "one", "prompt": '
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as half:
        half.sendall(head.encode())
        time.sleep(0.3)
        assert admin.get("/v1/adapters/one").json()["running"] == 0
        answer = b"".join(iter(lambda: half.recv(65536), b"")).decode()  # head and body may come apart
    assert answer.startswith("HTTP/1.1 408")
    assert "--body-timeout" in answer


def test_connections_are_bounded_and_who_has_one_is_served(server, http):
    assert http.get("/health").status_code == 200  # a connection that stays open
    crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(60)]
    try:
        for connection in crowd[CONNECTIONS:]:  # those before may have a place
            answer = b"".join(iter(partial(connection.recv, 65536), b""))
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"connections open" in answer
        assert http.get("/health").status_code == 200
    finally:
        for connection in crowd:
            connection.close()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


# --------------------------------------------------------------------------------------- stored responses


def test_a_stored_response_is_its_own_keys(server):
    wide, narrow = server.client(WIDE), server.client(NARROW)
    made = wide.responses.create(model="one", input="t5 t6", max_output_tokens=4)
    assert wide.responses.retrieve(made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        narrow.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        narrow.responses.cancel(made.id)
    with pytest.raises(openai.NotFoundError):
        narrow.responses.create(model="one", input="t5", previous_response_id=made.id, max_output_tokens=4)


def test_a_cancel_waits_for_no_turn(server):
    client = server.client(WIDE)
    with server.held():
        made = client.responses.create(model="one", input="t5 t6", max_output_tokens=200, background=True)
        fill = [
            threading.Thread(
                target=lambda: client.completions.create(model="base", prompt=["t5"] * 3, max_tokens=2),
                daemon=True,
            )
            for _ in range(3)
        ]
        for thread in fill:
            thread.start()
        cancelled = client.with_options(timeout=20).responses.cancel(made.id)
        assert cancelled.status == "cancelled"
    for thread in fill:
        thread.join(60)


# ----------------------------------------------------------------------------------------- keys and admins


def test_admin_routes_are_at_their_own_address_and_nowhere_else(server, root, admin):
    assert stat.S_IMODE((root / "admin.sock").stat().st_mode) == 0o600
    assert httpx.get(f"{server.url}/v1/adapters", headers=bearer(ADMIN)).status_code == 404
    assert httpx.put(f"{server.url}/v1/adapters/x", headers=bearer(ADMIN), json={}).status_code == 404
    assert admin.get("/v1/adapters").status_code == 200
    assert admin.get("/v1/adapters", headers=bearer(WIDE)).status_code == 403
    assert admin.get("/v1/adapters", headers=bearer("wrong")).status_code == 401
    assert admin.get("/v1/models").status_code == 404
    assert admin.get("/health").status_code == 200


def adapters(server, root, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(BIN / "qaa-serve"), "adapters", *words, "--url", server.url],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"XDG_CACHE_HOME": str(root / "cache")},
    )  # fmt: skip


def audited(root):
    return [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]


def test_the_command_finds_server_and_key_and_the_audit_log_has_every_change(server, root, admin):
    place = root / "new"
    make_qaa(place, root / "base", ATTENTION["llama"], 7)
    assert "one" in adapters(server, root, "list").stdout
    first = adapters(server, root, "put", "guest", str(place))
    assert first.returncode == 0, first.stderr
    old = admin.get("/v1/adapters/guest").json()["revision"]
    make_qaa(place, root / "base", ATTENTION["llama"], 8)
    assert adapters(server, root, "put", "guest", str(place)).returncode == 0
    new = admin.get("/v1/adapters/guest").json()["revision"]
    assert adapters(server, root, "pin", "guest", old).returncode == 0
    assert adapters(server, root, "rollback", "guest").returncode == 0
    assert adapters(server, root, "delete", "guest").returncode == 0
    refused = adapters(server, root, "delete", "guest")
    assert refused.returncode == 1
    assert "there is no adapter 'guest'" in refused.stderr
    lines = audited(root)
    mine = [line for line in lines if line["adapter"] == "guest"]
    assert [(line["action"], line["before"], line["after"]) for line in mine] == [
        ("put", None, old), ("put", old, new), ("pin", old, old), ("rollback", new, old), ("delete", old, None),
        ("delete", None, None),
    ]  # fmt: skip
    assert [line["result"] for line in mine[:-1]] == ["ok"] * 5
    assert mine[-1]["result"].startswith("404")
    assert {(line["key"], line["from"]) for line in mine} == {("night-shift", "local")}
    make_qaa(root / "adapters" / "dropped", root / "base", ATTENTION["llama"], 9)
    deadline = time.monotonic() + 60
    while not (watched := [line for line in audited(root) if line["adapter"] == "dropped"]):
        assert time.monotonic() < deadline, "what came into the directory was not told"
        time.sleep(0.1)
    shutil.rmtree(root / "adapters" / "dropped")
    assert (watched[0]["action"], watched[0]["key"], watched[0]["from"]) == ("publish", None, "adapters directory")


def test_keys_are_read_again_and_logs_and_metrics_have_their_names_alone(server, root):
    ask = {"model": "two", "prompt": "t5", "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.AuthenticationError):
        server.client(STRANGER).completions.create(**ask)
    with (root / "clients").open("a") as file:
        file.write(f"late-comer: {STRANGER} two\n")

    def served():
        try:
            return server.client(STRANGER).completions.create(**ask)
        except openai.AuthenticationError:
            return None

    wait_until(served)
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert re.search(r'qaa_key_tokens_total\{key="late-comer",kind="generated"\} 3\.0', page)
    assert re.search(r'qaa_key_requests_total\{key="late-comer",outcome="success"\} 1\.0', page)
    assert re.search(r'qaa_wrong_keys_total\{role="client"\} [1-9]', page)
    log = wait_until(lambda: [line for line in server.text().splitlines() if '"key": "late-comer"' in line])
    assert json.loads(log[-1][log[-1].index("{") :])["adapter"] == "two"
    everything = server.text() + page + (root / "audit.jsonl").read_text()
    assert not [key for key in (WIDE, NARROW, STRANGER, ADMIN) if key in everything]


def test_a_wrong_key_is_slowed_down_and_logged_once(server, http):
    begun = time.monotonic()
    for i in range(4):
        assert http.get("/v1/models", headers=bearer(f"guess-{i}")).status_code == 401
    assert time.monotonic() - begun > 0.05 * (1 + 2 + 4)
    assert sum("A wrong key for client" in line for line in server.text().splitlines()) == 1
    assert "guess-" not in server.text()


def test_state_and_run_file_are_gone_with_the_server(server, root):
    """The last test of this server."""
    run_files = list((root / "cache" / "qaa-serve" / "servers").iterdir())
    assert [stat.S_IMODE(file.stat().st_mode) for file in run_files] == [0o600]
    server.stop()
    assert not list((root / "cache" / "qaa-serve" / "servers").iterdir())
    assert not Path(root / "state" / "admin.key").exists(), "an admin key was given, so none was made"
